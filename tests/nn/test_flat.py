import pytest
import torch
from torch import nn

from sfumato.errors import BadData
from sfumato.nn import flatten_params, layer_slices, unflatten_params


def tied():
    net = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3, bias=False), nn.Sequential(nn.Linear(3, 2)))
    net[1].weight = net[0].weight
    return net


def test_round_trip_as_module_dict_and_list():
    net = tied()
    for like in (net, dict(net.named_parameters()), list(net.parameters())):
        vec = flatten_params(like)
        assert vec.shape == (9 + 3 + 6 + 2,)
        assert torch.equal(flatten_params(unflatten_params(vec, like)), vec)


def test_order_is_that_of_named_parameters_and_frozen_are_left_out():
    net = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))
    net[0].weight.requires_grad_(False)
    assert list(unflatten_params(flatten_params(net), net)) == ["0.bias", "1.weight", "1.bias"]
    assert layer_slices(net) == {"0": slice(0, 2), "1": slice(2, 5)}


def test_layer_slices_cut_out_the_layers_and_count_tied_weights_once():
    net = tied()
    vec, slices = flatten_params(net), layer_slices(net)
    assert list(slices) == ["0", "2.0"]
    assert torch.equal(vec[slices["2.0"]], flatten_params(net[2]))


def test_batched_vectors_types_and_gradients():
    like = [torch.zeros(2, 3, dtype=torch.float64), torch.zeros(4)]
    pieces = unflatten_params(torch.arange(20.0).view(2, 10), like)
    assert [p.shape for p in pieces] == [(2, 2, 3), (2, 4)]
    assert [p.dtype for p in pieces] == [torch.float64, torch.float32]
    theta = torch.randn(5, dtype=torch.float64, requires_grad=True)
    shapes = [torch.zeros(3, dtype=torch.float64), torch.zeros(1, 2, dtype=torch.float64)]
    assert torch.autograd.gradcheck(lambda t: flatten_params(unflatten_params(t, shapes)) ** 2, theta)


def test_wrong_length_is_told():
    with pytest.raises(BadData, match="length 7 does not fit 5"):
        unflatten_params(torch.zeros(7), [torch.zeros(5)])
    assert flatten_params([]).shape == (0,)
