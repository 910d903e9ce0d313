from pathlib import Path

import numpy as np
import pytest
import torch

from sfumato.errors import BadData
from sfumato.metrics import distance_metrics

V = {k: torch.from_numpy(v) for k, v in np.load(Path(__file__).parents[1] / "vectors" / "masked-object-modeling.npz").items()}
OFFICIAL = {
    "abs_rel": "abs_rel_diff", "sq_rel": "squa_rel_diff", "rmse": "rmse_linear", "rmse_log": "rmse_log", "delta_1": "delta_1",
    "delta_2": "delta_2", "delta_3": "delta_3", "alp_0.5": "alp_@0.5m", "alp_1": "alp_@1m", "alp_2": "alp_@2m",
    "ale_0-10": "ale_0-10", "ale_10-20": "ale_10-20", "ale_20-30": "ale_20-30", "ale_30-100": "ale_30-100", "ale": "ale_all",
    "aloe_0-30": "aloe_0.0-0.3", "aloe_30-50": "aloe_0.3-0.5", "aloe_50-75": "aloe_0.5-0.75", "aloe_75-100": "aloe_0.75-1.0",
}  # fmt: skip


def test_official_figures():
    ours = distance_metrics(V["mu"], V["y"], V["visibility"])
    for name, theirs in OFFICIAL.items():
        assert ours[name] == pytest.approx(V[f"metric_{theirs}"].item(), rel=1e-5, nan_ok=True), name
    for p in (5, 10, 15):
        assert 100 * ours[f"rde_{p}"] == pytest.approx(V[f"metric_rel_dist_{p}"].item())
    assert set(ours) == set(OFFICIAL) | {"rde_5", "rde_10", "rde_15"}


def test_perfect_and_negative_estimates():
    y = torch.tensor([5.0, 15.0])
    perfect = distance_metrics(y, y)
    assert perfect["abs_rel"] == perfect["rmse_log"] == 0
    assert perfect["delta_1"] == perfect["rde_5"] == perfect["alp_0.5"] == 1
    assert "aloe_0-30" not in perfect
    assert all(v == v for k, v in distance_metrics(-y, y).items() if k in ("rmse_log", "delta_3"))


def test_refusals():
    for pred, true in ((torch.ones(2), torch.ones(3)), (torch.ones(0), torch.ones(0)), (torch.ones(2), torch.tensor([1.0, 0.0]))):
        with pytest.raises(BadData):
            distance_metrics(pred, true)
