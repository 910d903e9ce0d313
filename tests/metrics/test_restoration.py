import math

import torch

from sfumato.metrics import psnr


def test_one_value_a_picture():
    clean = torch.rand(3, 3, 9, 7, generator=torch.Generator().manual_seed(0))
    x = clean + torch.tensor([0.1, 0.01, 0.0]).view(3, 1, 1, 1) * torch.randn(clean.shape)
    expected = -10 * (x - clean).square().mean((1, 2, 3)).log10()
    torch.testing.assert_close(psnr(x, clean), expected)
    assert psnr(x, clean)[2] == math.inf
