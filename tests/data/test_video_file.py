import sys

import numpy as np
import pytest
import torch

from sfumato.data import describe, open_data
from sfumato.errors import BadData, MissingExtra


def film(path, frames=12):
    av = pytest.importorskip("av")
    with av.open(str(path), "w") as out:
        stream = out.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = 48, 32, "yuv420p"
        for i in range(frames):
            frame = av.VideoFrame.from_ndarray(np.full((32, 48, 3), 20 * i, np.uint8), format="rgb24")
            out.mux(stream.encode(frame))
        out.mux(stream.encode())
    return path


def test_frames_of_a_video_are_images_in_order(tmp_path):
    images = open_data(film(tmp_path / "a film.mp4"))
    assert describe(tmp_path / "a film.mp4") == "12 images, 48x32"
    means = images.tensors().x.mean((1, 2, 3)) * 255
    assert torch.allclose(means, 20.0 * torch.arange(12), atol=4)
    assert images[3].x.dtype == torch.uint8
    assert open_data(tmp_path / "a film.mp4", "test") is None
    assert open_data(tmp_path / "a film.mp4", channels=1).facts.channels == 1


def test_videos_that_do_not_fit_or_are_none(tmp_path):
    path = film(tmp_path / "a.mp4")
    with pytest.raises(BadData, match="give a folder of its frames"):
        open_data(path, cache_mb=0.01)
    (tmp_path / "b.mp4").write_bytes(b"no video")
    with pytest.raises(BadData, match=r"b\.mp4: truncated or no video"):
        open_data(tmp_path / "b.mp4")


def test_missing_package_is_named(tmp_path, monkeypatch):
    (tmp_path / "a.mp4").write_bytes(b"x")
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(MissingExtra, match=r"pip install 'sfumato\[data\]'"):
        open_data(tmp_path / "a.mp4")
