"""Counter-based randomness: every draw is keyed by where it happens, so a position is all that a checkpoint must remember.

>>> from sfumato.engine.randomness import key
>>> key(0, "order", 3) == key(0, "order", 3), key(0, "order", 3) == key(0, "order", 4)
(True, False)
"""

from __future__ import annotations

import hashlib

import torch


def key(*parts: int | str) -> int:
    """A 56-bit seed from (seed, step, phase, ...): equal parts give equal seeds, on every machine."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=7).digest(), "big")


def seed_everything(value: int, device: torch.device) -> None:
    """Set torch's global generators: the CPU's, and the device's where it is another one."""
    torch.default_generator.manual_seed(value)
    if device.type != "cpu":
        torch.get_device_module(device).manual_seed(value)
