"""DistributedDataParallel built anew in the middle of a run."""

from types import SimpleNamespace

import torch
from lightning.pytorch.strategies import DDPStrategy
from torch import nn

from layershed.integration.run import averaged, rewrap


def test_rebuilt_ddp_keeps_accumulated_gradients_and_says_what_it_averages():
    module = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    strategy = object.__new__(DDPStrategy)
    seen = []

    def configure():
        seen.append([parameter.grad for parameter in module.parameters()])
        strategy._model = nn.ModuleList([module])

    strategy.configure_ddp = configure
    trainer = SimpleNamespace(strategy=strategy)
    module(torch.ones(1, 2)).sum().backward()
    before = [parameter.grad.clone() for parameter in module.parameters()]
    module[1].requires_grad_(False)
    rewrap(trainer, module)
    assert seen == [[None] * 4]
    for parameter, gradient in zip(module[0].parameters(), before[:2], strict=True):
        torch.testing.assert_close(parameter.grad, gradient)
    assert [parameter.grad for parameter in module[1].parameters()] == [None, None]
    assert averaged(trainer) == {id(parameter) for parameter in module[0].parameters()}
