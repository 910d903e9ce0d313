"""Encode a folder of pictures once, then train on their latents: a masked autoencoder that never sees a picture again.

    python examples/train_on_cached_latents.py
    python examples/train_on_cached_latents.py --data my_photos/ --cache my_photos.safetensors --steps 2000
    python examples/train_on_cached_latents.py --data my_photos/ --vae sd-vae/ --size 224 --views 2 --steps 2000

A frozen auto-encoder gives the same latents in every epoch, and often costs more than what is trained behind it. Here it is the
principal components of 4 x 4 patches, or a VAE of diffusers from a folder of weights. Each picture is stored in a few augmented
views. A second call with the same pictures finds the file and encodes nothing. At the end stands how near hidden parts of the
pictures come, and what the file took.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import sfumato
from sfumato.data import Batch, LatentCache, open_data, photo_crops
from sfumato.papers.masking.lmd import LMD


def own_pictures(where: str | None) -> Any:
    """A data set of pictures: a folder, or crops of photographs."""
    return open_data(where or photo_crops(512, 40, generator=torch.Generator().manual_seed(0)), channels=3)


def main(arguments: Sequence[str] | None = None) -> dict[str, float]:
    """Cache, train, and measure on pictures that were not trained on."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="a folder of pictures; default: crops of photographs")
    parser.add_argument("--cache", default="latents.safetensors", help="where the latents are kept")
    parser.add_argument("--vae", help="a folder with an AutoencoderKL of diffusers; default: principal components")
    parser.add_argument("--size", type=int, default=32, help="side of a picture in pixels")
    parser.add_argument("--views", type=int, default=4, help="augmented views of each picture")
    parser.add_argument("--steps", type=int, default=200, help="optimizer steps")
    options = parser.parse_args(arguments)

    torch.manual_seed(0)
    codec = {"codec": "vae", "vae": options.vae, "reduction": 8} if options.vae else {"codec": "pca", "reduction": 4}
    method = LMD(LMD.Config.small(channels=3, image_size=options.size, **codec))
    pictures = own_pictures(options.data)
    method.survey(pictures.gather(torch.tensor([i])) for i in range(len(pictures)))  # reads the VAE, or fits the components

    started = time.monotonic()
    cache = LatentCache(method.codec, pictures, options.cache, views=options.views, augment=method.augment())
    seconds, size = time.monotonic() - started, Path(options.cache).stat().st_size
    print(f"{cache}, {size / 2**20:.1f} MB in {options.cache}, after {seconds:.1f} s")

    sfumato.fit(method, cache, steps=options.steps, device="cpu")

    x = photo_crops(256, options.size, split="test", generator=torch.Generator().manual_seed(0))
    figures = method.evaluate([Batch(x, torch.arange(len(x)))])
    print(f"three quarters hidden: {figures['hidden_psnr']:.2f} dB where unseen photographs were hidden")
    print(f"features of {len(x)} photographs: {list(method.encode(x).shape)}")
    return {**figures, "latents": float(len(cache)), "bytes": float(size)}


if __name__ == "__main__":
    main()
