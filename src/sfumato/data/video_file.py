"""The frames of a video file as a set of images (for longer films, frames in a folder).

Decoding is FFmpeg's, through the package av. Frames are named by their number.

>>> ".mp4" in VIDEO_SUFFIXES
True
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from sfumato.data.decoding import first_line
from sfumato.data.image_files import CACHE_BYTES
from sfumato.data.image_set import ImageSet, InMemory, to_channels
from sfumato.errors import BadData, MissingExtra

VIDEO_SUFFIXES = (".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".mpg", ".mpeg")
"""Suffixes of the files that are taken for videos."""


def open_video(path: Path, *, channels: int | None = None, cache_bytes: int = CACHE_BYTES) -> ImageSet:
    """All frames of a video, in memory as uint8, in order.

    Args:
        path: the file.
        channels: 1 or 3; None: 3.
        cache_bytes: most memory that the frames may take.

    Raises:
        BadData: unreadable, without frames, or too long for the memory.
        MissingExtra: av is not installed.
    """
    try:
        import av
    except ImportError:
        raise MissingExtra(f"{path}: videos need the package av: pip install 'sfumato[data]'") from None
    frames: list[torch.Tensor] = []
    notes = []
    try:
        with av.open(str(path)) as film:
            for frame in film.decode(video=0):
                turned = np.rot90(frame.to_ndarray(format="rgb24"), getattr(frame, "rotation", 0) // 90)
                frames.append(to_channels(torch.from_numpy(turned.transpose(2, 0, 1).copy()), channels or 3))
                if len(frames) * frames[0].nbytes > cache_bytes:
                    raise BadData(
                        f"{path}: more than {cache_bytes >> 20} MB of frames: shorten it, or give a folder of its frames"
                        f" (ffmpeg -i {path.name} frames/%06d.png)"
                    )
    except (OSError, ValueError, IndexError) as error:  # those of FFmpeg are both
        if not frames:
            raise BadData(f"{path}: truncated or no video ({first_line(error)}): repair or remove it") from None
        notes.append(f"{path.name} breaks off after {len(frames)} frames ({first_line(error)})")
    if not frames:
        raise BadData(f"{path}: no frames in it: give another video")
    return ImageSet(InMemory(frames), names=[f"frame {i}" for i in range(len(frames))], notes=notes)
