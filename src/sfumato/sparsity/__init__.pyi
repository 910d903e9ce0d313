from .obs import MFACPruner as MFACPruner
from .obs import obs_prune as obs_prune
from .weight_gates import MaskAdapter as MaskAdapter
from .weight_gates import MaskedUNet as MaskedUNet
from .weight_gates import WeightMaskGenerator as WeightMaskGenerator
from .weight_gates import gated_conv2d as gated_conv2d
from .weight_gates import gated_linear as gated_linear
from .weight_gates import keep_logit as keep_logit
