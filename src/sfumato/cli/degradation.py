"""`--physics`: what degraded a picture, in a word, as physics of deepinv.

blur, blur:SIGMA      Gaussian blur, deviation in pixels (2)
inpaint:MASK.png      white is what is missing
sr4                   made smaller by a factor (2 to 16), bicubic with antialiasing as Pillow does it
noise:SIGMA           Gaussian noise, deviation in [0, 1]; alone, or behind another: sr4+noise:0.05
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from torch import Tensor

from sfumato.errors import BadSetting

WORDS = "blur, blur:2, inpaint:mask.png, sr4, noise:0.1, or two: sr4+noise:0.05"


def degradation(words: str, y: Tensor) -> Any:
    """The physics that `words` name, for pictures that were degraded to `y`.

    Args:
        words: one of those above, or one of them, `+`, and noise.
        y: `[B, C, H, W]` in [0, 1], as it is now.

    Raises:
        BadSetting: a word that is not known, or numbers out of range.
        BadData: a mask that cannot be read, has another size, or hides nothing or all.
    """
    from deepinv.physics import Blur, Denoising, DownsamplingMatlab, GaussianNoise, ZeroNoise
    from deepinv.physics.functional import gaussian_blur

    main, plus, behind = words.partition("+")
    name, _, value = main.partition(":")
    noise: Any = ZeroNoise()
    if plus or name == "noise":
        kind, _, deviation = (behind if plus else main).partition(":")
        if kind != "noise" or (plus and name == "noise"):
            raise _unknown(words)
        noise = GaussianNoise(_number(words, deviation or "0.1", 0, 1))
    if name == "noise":
        physics: Any = Denoising(noise)
    elif name == "blur":
        sigma = _number(words, value or "2", 0.1, 50)
        physics = Blur(filter=gaussian_blur(sigma=(sigma, sigma)), padding="replicate")
        physics.noise_model = noise
    elif name == "inpaint" and value:
        physics = _inpainting(Path(value), y, noise)
    elif found := re.fullmatch(r"sr(\d+)", main):
        factor = int(_number(words, found[1], 2, 16))
        physics = DownsamplingMatlab(factor=factor)
        physics.noise_model = noise
    else:
        raise _unknown(words)
    return physics.to(y.device)


def _inpainting(path: Path, y: Tensor, noise: Any) -> Any:
    from deepinv.physics import Inpainting

    from sfumato.data.images import read_image
    from sfumato.errors import BadData

    hidden = read_image(path).float().mean(0) > 0.5
    if hidden.shape != y.shape[-2:]:
        sides = (f"{s[1]}x{s[0]}" for s in (hidden.shape, y.shape[-2:]))
        raise BadData("the mask {} has {} pixels and the picture {}: resize one to the other".format(path, *sides))
    if hidden.all() or not hidden.any():
        share = "all" if hidden.all() else "nothing"
        raise BadData(f"the mask {path} hides {share}: paint what is missing white, the rest black")
    return Inpainting((1, *hidden.shape), mask=(~hidden).to(y.dtype)[None], noise_model=noise)


def _number(words: str, text: str, low: float, high: float) -> float:
    try:
        value = float(text)
    except ValueError:
        raise _unknown(words) from None
    if not low <= value <= high:
        raise BadSetting(f"--physics {words}: {text} is not between {low:g} and {high:g}")
    return value


def _unknown(words: str) -> BadSetting:
    return BadSetting(f"--physics {words} is not known: say {WORDS}")
