from .batch import Batch as Batch
from .batch import Facts as Facts
