from .obs import MFACPruner as MFACPruner
from .obs import obs_prune as obs_prune
