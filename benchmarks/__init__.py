"""Races: our parts against the libraries people would use instead, in one process, interleaved; ratios, never assertions.

python -m benchmarks NAME... | --all | --list
"""
