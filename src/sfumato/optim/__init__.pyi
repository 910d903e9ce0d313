from .adahessian import AdaHessian as AdaHessian
from .adahessian import spatial_average as spatial_average
