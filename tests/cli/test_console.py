import pytest

from sfumato.cli import console
from sfumato.cli.sample import _told_of_steps
from sfumato.papers.diffusion.ddpm import DDPM
from sfumato.papers.diffusion.harmonic_bases import BlindDenoiser


@pytest.mark.parametrize("terminal", [True, False])
def test_a_bar_is_shown_on_a_terminal_alone(monkeypatch, capsys, terminal):
    monkeypatch.setattr("sys.stderr.isatty", lambda: terminal)
    with console.bar("samples", 4) as advance:
        advance(4)
    assert ("samples" in capsys.readouterr().err) == terminal


def test_the_bar_of_samples_ends_where_they_do():
    """With the steps where a sampler shows them, with the batches where it does not."""
    small = {"channels": 1, "image_size": 8, "width": 8, "sample_steps": 4}
    for method, count in ((DDPM(DDPM.Config.small(**small)), 8), (BlindDenoiser(BlindDenoiser.Config.small(**small)), 2)):
        moved = []
        draw = _told_of_steps(method, moved.append)
        for n in (3, 2):
            draw(n, None)
        assert sum(moved) == pytest.approx(5)
        assert len(moved) == count
