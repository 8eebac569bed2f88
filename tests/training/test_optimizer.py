"""Compare our AdamW with PyTorch's AdamW bit for bit: steps, state and refusals."""

from copy import deepcopy

import torch
from torch import nn

from tests.helpers import DEVICE
from training.trainer import AdamW

SHAPES = ((5, 3), (7,))


def optimizer(kind):
    generator = torch.Generator().manual_seed(0)
    parameters = [
        nn.Parameter(torch.randn(*shape, generator=generator).to(DEVICE)) for shape in SHAPES
    ]
    groups = [{"params": parameters[:1]}, {"params": parameters[1:], "lr": 0.3}]
    return kind(groups, lr=0.1, weight_decay=0.2, fused=True), parameters


def take_steps(made, parameters, count):
    for step in range(count):
        for i, parameter in enumerate(parameters):
            generator = torch.Generator().manual_seed(10 * step + i)
            parameter.grad = torch.randn(parameter.shape, generator=generator).to(DEVICE)
        made.step()
        made.zero_grad(set_to_none=True)
        assert all(parameter.grad is None for parameter in parameters)


def test_steps_and_state_are_pytorchs_to_the_bit_also_after_resuming():
    theirs, expected = optimizer(torch.optim.AdamW)
    take_steps(theirs, expected, 5)
    ours, found = optimizer(AdamW)
    take_steps(ours, found, 5)
    torch.testing.assert_close(ours.state_dict(), theirs.state_dict(), rtol=0, atol=0)

    resumed, copied = optimizer(AdamW)
    resumed.load_state_dict(deepcopy(theirs.state_dict()))  # load_state_dict shares tensors
    with torch.no_grad():
        for parameter, value in zip(copied, found, strict=True):
            parameter.copy_(value)
    for made, parameters in ((theirs, expected), (ours, found), (resumed, copied)):
        take_steps(made, parameters, 3)
    for parameters in (found, copied):
        assert all(map(torch.equal, parameters, expected))
    assert torch.is_grad_enabled()
