from .frequency_mask import apply_frequency_mask as apply_frequency_mask
from .frequency_operator import FrequencyMask as FrequencyMask
from .real_degradation import BLUR_KINDS as BLUR_KINDS
from .real_degradation import REAL_ESRGAN_BLURS as REAL_ESRGAN_BLURS
from .real_degradation import gaussian_or_poisson_noise as gaussian_or_poisson_noise
from .real_degradation import random_blur_kernel as random_blur_kernel
from .real_degradation import random_blur_kernels as random_blur_kernels
from .spatial_noise import correlated_noise as correlated_noise
