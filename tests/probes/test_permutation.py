import pytest
import torch
import torch.nn.functional as F
from torch import nn

from sfumato.errors import BadCheckpoint, BadSetting
from sfumato.probes import barrier, match_permutation, path_loss


class Residual(nn.Module):
    """Convolutions with batch norm, a depthwise one, a residual sum, and a flattened map before the head."""

    def __init__(self):
        super().__init__()
        self.stem, self.norm = nn.Conv2d(2, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.inner, self.outer = nn.Conv2d(6, 5, 3, padding=1), nn.Conv2d(5, 6, 1)
        self.depth = nn.Conv2d(6, 6, 3, padding=1, groups=6)
        self.head = nn.Linear(6 * 4, 3)

    def forward(self, x):
        z = torch.relu(self.norm(self.stem(x)))
        z = z + self.outer(F.relu(self.inner(z)))
        return self.head(F.max_pool2d(self.depth(z), 2).flatten(1))


def mlp():
    return nn.Sequential(nn.Linear(4, 12), nn.BatchNorm1d(12), nn.ReLU(), nn.Linear(12, 9), nn.Tanh(), nn.Linear(9, 3))


def randomised(net, seed):
    generator = torch.Generator().manual_seed(seed)
    for t in net.state_dict().values():
        if t.is_floating_point():
            t.copy_(torch.rand(t.shape, generator=generator) + 0.1 if t.dim() == 1 else torch.randn(t.shape, generator=generator))
    return net.double().eval()


def shuffled_mlp(state, seed):
    generator = torch.Generator().manual_seed(seed)
    p, q = torch.randperm(12, generator=generator), torch.randperm(9, generator=generator)
    b = {n: t[p] if n.startswith(("0.", "1.")) and t.dim() else t for n, t in state.items()}
    return {**b, "3.weight": b["3.weight"][q][:, p], "3.bias": b["3.bias"][q], "5.weight": b["5.weight"][:, q]}


def test_shuffled_units_are_put_back_and_the_barrier_with_them():
    net = randomised(mlp(), 0)
    a = {n: t.clone() for n, t in net.state_dict().items()}
    near = {
        n: t + 0.05 * torch.randn(t.shape, generator=torch.Generator().manual_seed(1)).to(t) if t.dim() else t
        for n, t in a.items()
    }
    b = shuffled_mlp(near, 2)
    data = torch.randn(50, 4, dtype=torch.float64), torch.arange(50) % 3
    found = match_permutation(net, a, b)
    assert all(torch.equal(found[n], t) for n, t in near.items())
    plain, off, matched = (barrier(path_loss(net, a, s, F.cross_entropy, data, alphas=5)).rise for s in (near, b, found))
    torch.testing.assert_close(plain, matched)
    assert float((off - plain).abs().max()) > 0.05


@pytest.mark.parametrize(("net", "x"), [(mlp(), torch.randn(7, 4)), (Residual(), torch.randn(7, 2, 4, 4))])
def test_function_stays_and_agreement_grows(net, x):
    a = {n: t.clone() for n, t in randomised(net, 0).state_dict().items()}
    net = randomised(net, 1)
    b = {n: t.clone() for n, t in net.state_dict().items()}
    with torch.no_grad():
        before = net(x.double())
        found = match_permutation(net, a, b)
        assert all(torch.equal(b[n], t) for n, t in net.state_dict().items())
        net.load_state_dict(found)
        torch.testing.assert_close(net(x.double()), before)

    def agreement(state):
        return float(sum((a[n] * state[n]).sum() for n, _ in net.named_parameters()))

    assert any(not torch.equal(found[n], b[n]) for n in b)
    assert agreement(found) > agreement(b)


def test_residual_network_is_put_back():
    net = randomised(Residual(), 0)
    a = {n: t.clone() for n, t in net.state_dict().items()}
    p, q = torch.tensor([3, 1, 5, 0, 2, 4]), torch.tensor([4, 2, 0, 1, 3])
    b = {n: t[p] if t.dim() and n.startswith(("stem", "norm", "outer", "depth")) else t for n, t in a.items()}
    b |= {"inner.weight": a["inner.weight"][q][:, p], "inner.bias": a["inner.bias"][q]}
    b["outer.weight"] = b["outer.weight"][:, q]
    b["head.weight"] = a["head.weight"].view(3, 6, 4)[:, p].reshape(3, 24)
    net.load_state_dict(b)
    found = match_permutation(net, a, b)
    assert all(torch.equal(found[n], t) for n, t in a.items())


def test_what_cannot_be_followed_is_refused():
    def refuses(net, words):
        state = net.state_dict()
        with pytest.raises(BadSetting, match=words):
            match_permutation(net, state, state)

    refuses(nn.Sequential(nn.Linear(2, 3), nn.LayerNorm(3), nn.Linear(3, 1)), "LayerNorm")
    refuses(nn.Sequential(nn.Conv2d(4, 4, 1, groups=2)), "Conv2d")
    refuses(nn.Sequential(nn.Linear(2, 3), nn.Flatten(), nn.Linear(6, 1)), "cannot be lined up")
    tied = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    tied[1].weight = tied[0].weight
    refuses(tied, "tied")

    class Branch(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(2, 2)

        def forward(self, x):
            return self.layer(x) if x.sum() > 0 else x

    refuses(Branch(), "cannot be traced")
    net = mlp()
    with pytest.raises(BadCheckpoint, match="lacks"):
        match_permutation(net, net.state_dict(), {})
