import pytest
import torch
from torch import nn

from sfumato.errors import BadCheckpoint
from sfumato.optim import MFAC, AdaHessian, PerpGrad, SurrogateSharpness, refuse_foreign_state

MAKERS = {
    "AdaHessian": lambda params: AdaHessian(params, lr=0.1),
    "MFAC": lambda params: MFAC(params, ngrads=4, damp=0.1),
    "MFAC with momentum": lambda params: MFAC(params, ngrads=4, damp=0.1, momentum=0.9),
    "PerpGrad": lambda params: PerpGrad(torch.optim.AdamW(params)),
    "SurrogateSharpness": lambda params: SurrogateSharpness(torch.optim.Adam(params)),
}


def trained(make, width=3):
    torch.manual_seed(0)
    net = nn.Linear(width, 2)
    optimizer = make(net.parameters())
    x = torch.randn(5, width)
    for _ in range(2):

        def closure():
            optimizer.zero_grad()
            loss = net(x).square().mean()
            if not isinstance(optimizer, AdaHessian):
                loss.backward()
            return loss

        optimizer.step(closure)
    return optimizer


@pytest.mark.parametrize("name", MAKERS)
def test_a_state_of_another_model_is_refused_and_nothing_is_lost(name):
    make = MAKERS[name]
    ours, theirs = trained(make), trained(make, width=4)
    before = repr(ours.state_dict())
    with pytest.raises(BadCheckpoint, match="of other parameters"):
        ours.load_state_dict(theirs.state_dict())
    assert repr(ours.state_dict()) == before
    ours.load_state_dict(trained(make).state_dict())


@pytest.mark.parametrize("name", MAKERS)
def test_another_number_of_parameters_is_refused(name):
    one = trained(MAKERS[name])
    more = MAKERS[name]([*nn.Linear(3, 2).parameters(), *nn.Linear(2, 2).parameters()])
    with pytest.raises(BadCheckpoint, match=r"groups of \[2\], here of \[4\]"):
        more.load_state_dict(one.state_dict())


def test_a_fresh_state_is_of_any_parameters():
    refuse_foreign_state(torch.optim.Adam([torch.zeros(3)]), torch.optim.Adam([torch.zeros(2)]).state_dict())
