from .gradient_attacks import cw_l2 as cw_l2
from .gradient_attacks import fgsm as fgsm
from .gradient_attacks import pgd as pgd
from .objectives import cross_entropy as cross_entropy
from .objectives import kl_shift as kl_shift
from .objectives import margin as margin
from .objectives import margin_shift as margin_shift
from .objectives import mse as mse
