from .spectrum import band_energy as band_energy
from .spectrum import radial_spectrum as radial_spectrum
