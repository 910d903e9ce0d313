"""The page of a probe shows every block that an instrument may ask for."""

import pytest
import torch

from sfumato.instruments import Findings, Pictures, Plot, Section, Table
from sfumato.report import write_probe_report
from sfumato.report.probe_report import with_error


@pytest.fixture
def found():
    t = torch.linspace(0, 1, 50)
    blocks = [
        Table([{"a": "x", "b": 1.0}], "a table"),
        Plot("curves", {"one": (t, t**2)}, {"xlabel": "t"}),
        Plot("spectrum", {"Hessian": (t, torch.rand(3, 50) + 0.1)}, {"xlabel": "eigenvalue"}, "a spectrum"),
        [Plot("bars", {"layer": 1.0, "other": 2.0}), Plot("dots", {"arm": [1.0, 2.0]})],
        Pictures({"picture": torch.rand(3, 8, 8)}, "pictures"),
    ]
    about = {
        "probe": "curvature", "models": [{"model": "<net>", "data": "9 pairs"}, {"model": "<net>", "data": "9 pairs"}],
        "settings": {"samples": 9}, "plan": {"seconds": {"a": 1.0}}, "seconds": {"measuring": 2.0}, "version": "1",
    }  # fmt: skip
    return Findings({}, {"trace": (1.25, 0.03)}, "It is so.", [Section("All", "text", blocks)], ["first note"], about=about)


def test_every_block_is_on_the_page(found, tmp_path):
    page = write_probe_report(found, tmp_path / "a" / "page.html", command="sfumato probe x").read_text()
    for text in ("Curvature of &lt;net&gt;", "on 9 pairs", "1.250 ± 0.030", "It is so.", "a table", "a spectrum", "First note."):
        assert text in page, text
    assert "sfumato probe x" in page
    assert page.count("<svg") >= 6
    assert "<net>" not in page
    assert "model B" in page


@pytest.mark.parametrize(
    ("value", "told"),
    [
        ((12.3456, 0.2), "12.35 ± 0.20"), ((1.5e-6, 2e-8), "1.5e-6 ± 2e-8"), ((-3.0, 0.5), "−3.00 ± 0.50"),
        ((1e9, 3e7), "1e9 ± 3e7"), ((5.0, float("inf")), "5"), (float("nan"), "–"), ("many", "many"),
    ],
)  # fmt: skip
def test_figures_with_their_errors(value, told):
    assert with_error(value) == told
