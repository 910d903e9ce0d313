from .flat import flatten_params as flatten_params
from .flat import layer_slices as layer_slices
from .flat import unflatten_params as unflatten_params
