from . import attacks as attacks
from . import catalogue as catalogue
from . import claim as claim
from . import data as data
from . import diffusion as diffusion
from . import engine as engine
from . import errors as errors
from . import instruments as instruments
from . import losses as losses
from . import masks as masks
from . import method as method
from . import metrics as metrics
from . import nn as nn
from . import optim as optim
from . import physics as physics
from . import probes as probes
from . import report as report
from . import sparsity as sparsity
from .engine import compare as compare
from .engine import fit as fit
from .engine import load as load
from .instruments import probe as probe

__version__: str
