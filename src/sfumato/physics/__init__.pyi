from .spatial_noise import correlated_noise as correlated_noise
