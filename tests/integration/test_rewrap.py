"""DistributedDataParallel built anew in the middle of a run."""

from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch.strategies import DDPStrategy
from torch import nn

from layershed.integration.run import averaged, rewrap
from layershed.integration.trained_parameters import TrainsWatch


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


@pytest.mark.parametrize("change", ["unfreeze", "give the optimizer", "build anew", None])
def test_watch_notices_what_trains_now(change):
    module, other = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), nn.Linear(2, 2)
    module[1].requires_grad_(False)
    optimizer = torch.optim.SGD(module.parameters())
    trainer = SimpleNamespace(strategy=SimpleNamespace(model=module), optimizers=[optimizer])
    watch = TrainsWatch()
    assert not watch.unchanged(trainer)
    watch.note(trainer, module)
    assert watch.unchanged(trainer)
    if change == "unfreeze":
        module[1].weight.requires_grad_(True)
    elif change == "give the optimizer":
        optimizer.add_param_group({"params": list(other.parameters())})
    elif change == "build anew":
        trainer.strategy.model = nn.ModuleList([module])
    assert watch.unchanged(trainer) == (change is None)
