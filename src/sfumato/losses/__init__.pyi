from .masked import masked_l1 as masked_l1
from .masked import masked_mean as masked_mean
from .masked import masked_patch_mse as masked_patch_mse
from .masked import normalize_patches as normalize_patches
from .masked import patch_statistics as patch_statistics
from .masked import weighted_l1 as weighted_l1
