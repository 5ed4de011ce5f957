"""Runs that the strategy cannot do are refused before training; and the state that FSDP2 needs of an optimizer."""

import copy

import lightning.pytorch as pl
import pytest
import torch
import torch.distributed.checkpoint as dcp
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from torch import distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.optim import SGD, AdamW, NAdam

import layershed as ls
from layershed.callbacks import LoRARecovery, Quantization, SpeedMonitor, SublayerDrop
from layershed.errors import CheckpointError, StrategyError
from layershed.integration.fsdp_checkpoints import reshard
from layershed.recovery.optimizer_groups import complete_state, without_empty_groups
from layershed.saving.checkpoint import write_structure
from layershed.stand_ins.contexts import withheld
from tests.support.runs import Foreign, same

# torch speaks of what it assumes without a process group
READS = pytest.mark.filterwarnings("ignore::UserWarning:torch")

CHANGING = {
    "SublayerDrop": lambda: SublayerDrop(2, count=1),
    "LoRARecovery": lambda: LoRARecovery(start=1),
    "Quantization": lambda: Quantization(start="end"),
}


class Unstarted:
    """A strategy of which nothing is asked but its class."""

    def __init__(self, *_, **__):
        pass


class Elsewhere(Unstarted, FSDPStrategy):
    pass


class Zero(Unstarted, DeepSpeedStrategy):
    pass


class Flat(Unstarted, FSDPStrategy):
    """Of somebody's own."""


class Replicas(Unstarted, DDPStrategy):
    pass


class Shards(Unstarted, ModelParallelStrategy):
    cluster_environment = _model = None
    _optimizers = ()

    def __init__(self, tensor_parallel_size=1):
        self._tensor_parallel_size = tensor_parallel_size


def trainer_with(strategy, *callbacks):
    trainer = pl.Trainer(
        accelerator="cpu", logger=False, enable_checkpointing=False, max_steps=4, callbacks=list(callbacks)
    )
    trainer._accelerator_connector.strategy = strategy
    return trainer


@pytest.mark.parametrize("name", CHANGING)
@pytest.mark.parametrize("strategy", [Elsewhere, Zero, Flat])
def test_strategy_that_holds_the_weights_is_refused(name, strategy):
    callback = CHANGING[name]()
    with pytest.raises(StrategyError, match=rf"^{name}: .*{strategy.__name__}.* use ModelParallelStrategy \(FSDP2\)"):
        callback.setup(trainer_with(strategy()), Foreign(), "fit")


@pytest.mark.parametrize("name", CHANGING)
def test_ddp_is_accepted(name):
    CHANGING[name]().setup(trainer_with(Replicas()), Foreign(), "fit")


@pytest.mark.parametrize("name", [name for name in CHANGING if name != "Quantization"])  # which refuses all shards
def test_tensor_parallelism_is_refused(name):
    with pytest.raises(StrategyError, match=rf"^{name}: .*tensor_parallel_size=2.*set tensor_parallel_size=1"):
        CHANGING[name]().setup(trainer_with(Shards(2)), Foreign(), "fit")


@pytest.mark.parametrize(
    "callback",
    [
        lambda: SpeedMonitor(),
        lambda: SublayerDrop(2, target_speedup=1.1),
        lambda: SublayerDrop(2, count=1, objective="speed"),
    ],
    ids=["SpeedMonitor", "target_speedup", "objective"],
)
def test_speed_of_sharded_weights_is_refused(callback):
    own = callback()
    with pytest.raises(StrategyError, match=r"gathering shards would be measured\. Leave it out"):
        own.on_fit_start(trainer_with(Shards(), own), Foreign())


def loading(path, module, *optimizers):
    strategy = Shards()
    strategy._optimizers, strategy._lightning_module = list(optimizers), module
    strategy.broadcast = lambda found: found
    callback = SublayerDrop(2, count=1)
    callback.setup(trainer_with(strategy), module, "validate")
    return strategy.load_checkpoint(path)


def test_quantized_checkpoint_is_refused_under_fsdp2(tmp_path):
    note = {"dropped": None, "quantized": {"mode": "nf4"}, "adapters": None}
    torch.save({"state_dict": {}, "layershed": note}, tmp_path / "quantized.ckpt")
    with pytest.raises(CheckpointError, match="quantized, and ModelParallelStrategy cannot shard"):
        loading(tmp_path / "quantized.ckpt", Foreign())


def test_single_file_with_stateless_optimizer_is_refused_under_fsdp2(tmp_path):
    """Of which Lightning asks for the first."""
    module = Foreign()
    for name, state in (("none", {}), ("some", {0: {"step": 1.0}})):
        content = {"state_dict": {}, "optimizer_states": [{"state": state, "param_groups": []}]}
        torch.save(content, tmp_path / f"{name}.ckpt")
    with pytest.raises(CheckpointError, match=r"SGD without momentum.*single file.*save_distributed_checkpoint=True"):
        loading(tmp_path / "none.ckpt", module, SGD(module.parameters(), lr=0.1))
    with pytest.raises(ValueError, match="distributed model"):  # as far as Lightning's own reading
        loading(tmp_path / "some.ckpt", module, SGD(module.parameters(), lr=0.1))


def folder_of(path, module, **more):
    """What FSDP2 would have written of a module's weights."""
    checkpoint = {"state_dict": {}, **more}
    write_structure(checkpoint, module)
    with withheld(module):
        weights = {**module.state_dict(), **checkpoint.pop("state_dict")}
        dcp.save({"state_dict": {name: tensor.clone() for name, tensor in weights.items()}}, checkpoint_id=path)
    torch.save(checkpoint, path / "meta.pt")


def trained():
    """Other weights than a new module's, and two sublayers dropped."""
    module = Foreign()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(1.0)
    ls.bypass(module.net, ls.find_sublayers(module.net)[2:4])
    return module


@READS
def test_fsdp2_finds_shards_whose_replacement_was_cut_off(tmp_path):
    module, found = trained(), Foreign()
    folder_of(tmp_path / ".last.ckpt.former", module)
    loading(tmp_path / "last.ckpt", found)
    assert same(dict(found.state_dict()), dict(module.state_dict()))
    assert ls.dropped_sublayers(found.net) == ls.dropped_sublayers(module.net)


@READS
def test_shards_with_unknown_weights_are_refused_if_loading_is_strict(tmp_path):
    """torch by itself would silently read only the requested weights."""
    folder_of(tmp_path / "last.ckpt", Foreign())
    small = Foreign(num_hidden_layers=2)
    with pytest.raises(
        CheckpointError, match=r"this module lacks, such as 'net\.model\.layers\.2\..*Build the module from"
    ):
        loading(tmp_path / "last.ckpt", small)
    small.strict_loading = False
    loading(tmp_path / "last.ckpt", small)


def test_fsdp2_refuses_a_path_that_is_no_checkpoint(tmp_path):
    torch.save([1], tmp_path / "list.ckpt")
    for path in (tmp_path, tmp_path / "none.ckpt", tmp_path / "list.ckpt"):
        with pytest.raises(CheckpointError, match=r"neither a checkpoint file nor a folder of shards with a meta\.pt"):
            loading(path, Foreign())


def test_reshard_restores_the_optimizers_parameters(tmp_path):
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        module = pl.LightningModule()
        module.head = torch.nn.Linear(4, 4)
        fully_shard(module.head, mesh=init_device_mesh("cpu", (1,)))
        before = list(map(id, module.parameters()))
        with torch.no_grad():
            module.head(torch.ones(1, 4))
        assert list(map(id, module.parameters())) != before, "else there is nothing to put right"
        reshard(module)
        assert list(map(id, module.parameters())) == before
    finally:
        distributed.destroy_process_group()


@pytest.mark.parametrize(
    "make",
    [
        lambda groups: AdamW(groups, lr=0.1, weight_decay=0.1, amsgrad=True),
        lambda groups: SGD(groups, lr=0.1, momentum=0.9, weight_decay=0.1),
        lambda groups: NAdam(groups, lr=0.1, weight_decay=0.1),
    ],
    ids=["AdamW", "SGD", "NAdam"],
)
def test_complete_state_changes_nothing_else(make):
    first, second, frozen = (torch.nn.Parameter(torch.ones(3)) for _ in range(3))
    optimizer = make([{"params": [first, frozen]}, {"params": [second], "lr": 0.2}])
    first.grad = torch.ones(3)
    optimizer.step()
    frozen.requires_grad_(False)
    second.grad = torch.full((3,), 9.0)

    def state():
        every = (first, second, frozen)
        return [[p.data, p.grad] for p in every], optimizer.state[first], copy.deepcopy(optimizer.param_groups)

    before = copy.deepcopy(state())
    assert [id(parameter) for parameter in complete_state(optimizer)] == [id(second)]
    assert optimizer.state[second].keys() == optimizer.state[first].keys()
    assert frozen not in optimizer.state
    assert same(state(), before)
    assert complete_state(optimizer) == []


def test_empty_param_groups_are_hidden_and_restored():
    parameters = [torch.nn.Parameter(torch.ones(2)) for _ in range(2)]
    optimizer = AdamW([{"params": [p], "lr": rate} for p, rate in zip(parameters, (0.1, 0.2), strict=True)])
    optimizer.param_groups[0]["params"].clear()
    with without_empty_groups([optimizer]):
        loaded = copy.deepcopy(optimizer.state_dict())
        loaded["param_groups"][0]["lr"] = 0.5
        optimizer.load_state_dict(loaded)
    assert [(len(group["params"]), group["lr"]) for group in optimizer.param_groups] == [(0, 0.1), (1, 0.5)]


@pytest.mark.parametrize("failed", [False, True], ids=["teardown", "exception"])
def test_sharded_strategy_has_its_own_methods_back_after_the_run(failed):
    strategy, callbacks = Shards(), [SublayerDrop(2, count=1), LoRARecovery(finish="adapter")]
    strategy.save_checkpoint = lambda *_: None  # the user's own
    trainer, module, before = trainer_with(strategy, *callbacks), Foreign(), dict(vars(strategy))
    for callback in callbacks:
        callback.setup(trainer, module, "fit")
        assert vars(strategy).keys() - before.keys() == {"load_checkpoint", "optimizer_state"}
        assert strategy.save_checkpoint is not before["save_checkpoint"]
    for callback in callbacks:
        if failed:
            callback.on_exception(trainer, module, ValueError())
        else:
            callback.teardown(trainer, module, "fit")
    assert vars(strategy) == before
