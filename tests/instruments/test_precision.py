"""Numerical stability through the whole instrument: logits on either side of the edge, and a gradient along the weights."""

import signal

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import sfumato
from sfumato.errors import BadData, BadSetting, Interrupted
from sfumato.instruments import Probe


def leading(lead):
    """Two classes, always right, the winner ahead by `lead` nats; a loss that only wants the weights longer."""
    net = nn.Linear(2, 2, bias=False)
    nn.init.zeros_(net.weight)
    net.weight.data += lead / 2 * (2 * torch.eye(2) - 1)
    return net


PAIRS = [(torch.eye(2).repeat(6, 1), torch.arange(2).repeat(6))]


def shares(found, of="collapsed"):
    return [found.numbers["formats"][name][of] for name in ("bfloat16", "float16", "float32")]


@pytest.mark.parametrize(
    ("lead", "collapsed", "told"),
    [
        (3.0, [0, 0, 0], "Far from the edge"),
        (6.5, [1, 0, 0], "over the edge in half precision: 100% in bfloat16 of"),
        (10.0, [1, 1, 0], "100% in bfloat16 and 100% in float16"),
        (20.0, [1, 1, 1], "Over the edge: even in float32 100%"),
    ],
)
def test_each_format_collapses_at_its_own_lead(lead, collapsed, told):
    found = sfumato.probe("precision", leading(lead), PAIRS)
    assert shares(found) == collapsed
    assert shares(found, "zero_loss") == collapsed
    assert shares(found, "loss_not_finite") == [0, 0, 0]
    assert found.numbers["accuracy"] == 1
    assert told in found.verdict
    torch.testing.assert_close(found.numbers["leads"], torch.full((12,), lead, dtype=torch.float64))


def test_scaled_logits_reach_the_edge_where_it_is():
    numbers = sfumato.probe("precision", leading(4.0), PAIRS).numbers
    for one in numbers["formats"].values():
        away = (4 * numbers["scales"] / one["edge"] - 1).abs() > 0.1  # at the edge itself the way of summing decides
        wanted = (4 * numbers["scales"] > one["edge"]).double()
        torch.testing.assert_close(torch.tensor(one["collapsed_scaled"], dtype=torch.float64)[away], wanted[away])


def test_a_gradient_along_the_weights_is_told():
    found = sfumato.probe("precision", leading(3.0), PAIRS)
    assert found.numbers["alignment"]["all"] == pytest.approx(1)
    assert found.numbers["alignment"]["parameters"] == {"weight": pytest.approx(1)}
    assert "goes towards it" in found.verdict
    away = sfumato.probe("precision", leading(-3.0), PAIRS)
    assert away.numbers["alignment"]["all"] == pytest.approx(-1)
    assert "does not head there" in away.verdict
    assert away.numbers["accuracy"] == 0
    assert shares(sfumato.probe("precision", leading(-20.0), PAIRS), "zero_loss") == [0, 0, 0]
    ended = sfumato.probe("precision", leading(400.0), PAIRS)
    assert "learning has ended" in ended.verdict


def test_numbers_are_those_of_the_parts_and_batches_do_not_matter():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 4))
    x, y = torch.randn(30, 3), torch.arange(30) % 4
    one, many = (sfumato.probe("precision", net, [(x, y)], batch_size=size) for size in (30, 7))
    loss = F.cross_entropy(net(x), y)
    grads = torch.autograd.grad(loss, list(net.parameters()))
    weights, slopes = (torch.cat([t.detach().flatten() for t in ts]) for ts in (net.parameters(), grads))
    for found in (one, many):
        assert found.numbers["loss"] == pytest.approx(loss.item(), rel=1e-5)
        assert found.numbers["gradient_norm"] == pytest.approx(slopes.norm().item(), rel=1e-5)
        assert found.numbers["alignment"]["all"] == pytest.approx(-F.cosine_similarity(weights, slopes, dim=0).item(), abs=1e-5)
    assert all(p.grad is None for p in net.parameters())


def test_samples_are_left_out_where_the_time_is_short():
    x = torch.randn(100, 2)
    plan = Probe("precision", leading(1.0), [(x, (x[:, 0] > 0).long())], minutes=1e-9).plan
    assert plan.chosen["samples"] == 16
    assert any("only 16 samples" in note for note in plan.notes)


@pytest.mark.parametrize("kind", ["precision", "collapse", "robustness"])
def test_what_is_no_classifier_is_refused(kind):
    x = torch.randn(6, 2)
    with pytest.raises(BadData, match="class label with every sample"):
        sfumato.probe(kind, nn.Linear(2, 1), [(x, x[:, :1])])
    half = lambda out, _: out.square().mean()  # noqa: E731
    with pytest.raises(BadSetting, match=r"one output for every class: the model gives \[2\] a sample, and the data has 3"):
        sfumato.probe(kind, nn.Linear(2, 2), [(x, torch.arange(6) % 3)], loss=half)
    with pytest.raises(BadSetting, match="one output for every class"):
        sfumato.probe(kind, nn.Linear(2, 1), [(x, torch.arange(6) % 2)], loss=half)


class Stopping(nn.Linear):
    """A layer that presses Ctrl-C once it was called often enough."""

    left = 10**9

    def forward(self, x):
        self.left -= 1
        if self.left == 0:
            signal.raise_signal(signal.SIGINT)
        return super().forward(x)


def test_ctrl_c_gives_what_was_measured():
    for after, names in ((5, {"formats"}), (2, None)):
        net = Stopping(2, 2)
        ready = Probe("precision", net, PAIRS, batch_size=3, minutes=None)
        net.left = after
        if names is None:
            with pytest.raises(Interrupted, match="before anything"):
                ready.run()
        else:
            found = ready.run()
            assert found.interrupted
            assert "formats" in found.numbers
            assert "alignment" not in found.numbers
