from pathlib import Path

import numpy as np
import torch

from sfumato.masks import redundant_tokens, token_redundancy

VECTORS = {k: torch.from_numpy(v) for k, v in np.load(Path(__file__).parents[1] / "vectors" / "hybrid-distill.npz").items()}


def test_redundancy_is_the_reference():
    tokens = VECTORS["tokens"]
    redundancy = token_redundancy(tokens)
    torch.testing.assert_close(redundancy, VECTORS["redundancy"], rtol=0, atol=1e-9)
    drop = tokens.shape[1] // 3
    assert torch.equal(redundant_tokens(tokens, drop, protect=0), VECTORS["kept"])


def test_duplicates_go_first_and_the_class_token_never():
    g = torch.Generator().manual_seed(0)
    x = torch.linalg.qr(torch.randn(8, 8, generator=g))[0][None].repeat(2, 1, 1)
    x[0, [2, 5]] = x[0, 4].clone()
    x[1, 1:] = x[1, 0].clone()  # all alike, the class token too
    kept = redundant_tokens(x, 3)
    assert kept[0].tolist() == [0, 1, 3, 6, 7]
    assert kept[1, 0] == 0
    assert (kept.diff(dim=1) > 0).all()
    assert redundant_tokens(x, 0).tolist() == [list(range(8))] * 2
    assert redundant_tokens(torch.zeros(1, 5, 3), 4).tolist() == [[0]]
    assert token_redundancy(torch.zeros(1, 1, 3)).tolist() == [[0]]
