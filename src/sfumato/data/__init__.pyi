from .batch import Batch as Batch
from .batch import Facts as Facts
from .samples import digits as digits
from .samples import faces as faces
from .samples import moving_crops as moving_crops
from .samples import photo_crops as photo_crops
from .samples import photo_names as photo_names
from .samples import photos as photos
