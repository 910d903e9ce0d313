"""Measurements: side by side, in one process, interleaved; medians and ratios, never assertions."""
