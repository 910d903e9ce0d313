import pytest
import torch

from sfumato.diffusion import Schedule, beta_schedule, sample_ddim
from sfumato.nn import small_unet
from sfumato.sparsity import MaskedUNet, optimise_masks, rewarded_model


def _seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def free():
    torch.manual_seed(0)
    return MaskedUNet(small_unet(8, 1, width=8, mults=(1, 2), attn_at=(0, 1)).eval(), by="free")


def test_masks_are_moved_towards_the_reward_and_put_back(free):
    x, t = torch.randn(2, 1, 8, 8, generator=_seeded()), torch.full((2,), 500)
    worth, before = [], [p.clone() for p in free.mask_parameters()]

    def reward(pictures):
        worth.append(float(pictures.mean()))
        return pictures.mean((1, 2, 3))

    def step():
        out = free(x, t, generator=_seeded(7)).sample
        return out, out

    last = optimise_masks(step, free, reward, iters=12, lr=0.3)
    assert not last.requires_grad
    assert float(last.mean()) > worth[0]
    assert len(worth) == 11
    assert all(torch.equal(p, q) and p.grad is None for p, q in zip(free.mask_parameters(), before, strict=True))
    assert torch.allclose(optimise_masks(step, free, reward, iters=1), step()[0], atol=1e-5)


def test_early_steps_take_one_call_and_late_ones_several(free):
    schedule, calls = Schedule(beta_schedule("linear")), []
    hook = free.unet.register_forward_hook(lambda *_: calls.append(1))
    model = rewarded_model(free, lambda x: x.mean((1, 2, 3)), schedule, iters=4, early=3, generator=_seeded())
    x = sample_ddim(model, torch.randn(2, 1, 8, 8, generator=_seeded()), schedule, steps=5)
    hook.remove()
    assert len(calls) == 3 + 2 * 4
    assert x.isfinite().all()
