"""A drop and LoRA under FSDP2 (two gloo processes), against the same run by hand in one."""

import os
import sys
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from safetensors.torch import load_file
from torch.distributed.fsdp import fully_shard
from torch.optim import AdamW
from torch.utils.data import DataLoader
from torch.utils.data.distributed import DistributedSampler

import layershed as ls
from layershed.callbacks import LoRARecovery, Quantization, RedundancyMonitor, Report, SublayerDrop
from layershed.errors import QuantizationError, RecoveryError, StrategyError
from layershed.recovery.lora import set_enabled
from tests.support.models import build_model
from tests.support.two_ranks import run_two_ranks

START, STEPS, RATE = 3, 6, 1e-2
SEQUENCES = torch.randint(3, 97, (4 * STEPS, 12), generator=torch.Generator().manual_seed(0))


class Sharded(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = build_model().train()

    def configure_model(self):
        mesh = self.device_mesh["data_parallel"]
        for block in self.net.model.layers:
            fully_shard(block, mesh=mesh)
        fully_shard(self.net, mesh=mesh)

    def training_step(self, batch, batch_idx):
        return self.net(input_ids=batch, labels=batch, use_cache=False).loss

    def configure_optimizers(self):
        return AdamW(self.parameters(), lr=RATE)


def trainer_of(folder, *callbacks, **options):
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    strategy = ModelParallelStrategy(
        data_parallel_size=options.get("devices", 1), tensor_parallel_size=1, process_group_backend="gloo"
    )
    return pl.Trainer(
        default_root_dir=folder, accelerator="cpu", strategy=strategy, callbacks=list(callbacks), **quiet, **options
    )


def run(folder):
    """What each of the two processes does."""
    drop = SublayerDrop(START, scope="attention", count=1, calibration_batches=2, quality_batches=0)
    recover = LoRARecovery(rank=4, finish="adapter")
    trainer = trainer_of(folder, drop, recover, devices=2, max_steps=STEPS)
    module = Sharded()
    share = DistributedSampler(SEQUENCES, num_replicas=2, rank=int(os.environ["RANK"]), shuffle=False)
    trainer.fit(module, DataLoader(SEQUENCES, batch_size=2, sampler=share))
    trained = {name for name, parameter in module.named_parameters() if parameter.requires_grad}
    torch.save({"plan": drop.plan.to_dict(), "trained": trained}, folder / f"{trainer.global_rank}.pt")


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sharded")
    run_two_ranks("tests.integration.test_fsdp_checkpoints", folder)
    return folder, [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in (0, 1)]


def test_both_ranks_drop_the_same_and_train_the_same(ranks):
    _, (first, second) = ranks
    assert first == second
    assert first["trained"]
    assert all("lora_" in name for name in first["trained"])


def test_the_adapter_is_that_of_a_run_by_hand(ranks):
    """Adapters are there from the start and off; each step averages the gradients of both ranks' batches."""
    folder, (found, _) = ranks
    model = build_model().train()
    ls.inject_lora(model, rank=4)
    set_enabled(model, False)
    base = [parameter for name, parameter in model.named_parameters() if "lora_" not in name]
    adapters = [parameter for name, parameter in model.named_parameters() if "lora_" in name]
    for parameter in base:
        parameter.requires_grad_(True)
    optimizer = AdamW(base, lr=RATE)
    for step in range(STEPS):
        if step == START:
            plan = ls.DropPlan.from_dict(found["plan"])
            ls.bypass(model, plan)
            set_enabled(model, True)
            optimizer = AdamW(adapters, lr=RATE)
        for rank in (0, 1):
            batch = SEQUENCES[rank::2][2 * step : 2 * step + 2]
            (model(input_ids=batch, labels=batch, use_cache=False).loss / 2).backward()
        optimizer.step()
        model.zero_grad()
    ls.save_adapter(model, folder / "by_hand")
    saved, hand = (load_file(folder / name / "adapter_model.safetensors") for name in ("adapter", "by_hand"))
    assert saved.keys() == hand.keys()
    assert any("lora_B" in name and tensor.any() for name, tensor in hand.items())
    for name, tensor in hand.items():
        torch.testing.assert_close(saved[name], tensor, rtol=1e-3, atol=1e-5)


REFUSED = {
    "finish='adapter'": lambda: LoRARecovery(start=1),
    "placement='all'": lambda: LoRARecovery(start=1, finish="adapter", placement="neighbours"),
    "ModelParallelStrategy": lambda: Quantization(start=1),
}


@pytest.mark.parametrize("said", REFUSED)
def test_what_cannot_be_done_to_shards_is_refused_before_training(said, tmp_path):
    trainer = trainer_of(tmp_path, REFUSED[said](), max_steps=2)
    module = Sharded()
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    callback = trainer.callbacks[0]
    with pytest.raises((RecoveryError, QuantizationError), match=said):
        _ = callback.setup(trainer, module, "fit"), callback.on_fit_start(trainer, module)
    assert all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items() if name in before)


@pytest.mark.parametrize("watcher", [lambda: RedundancyMonitor(2), Report])
def test_a_drop_by_hand_that_nobody_would_read_back_is_refused_before_training(tmp_path, watcher):
    """None of these has the dropped weights go by other names, and a Trainer would take the dense ones."""
    for bypassed, others in [(True, []), (False, []), (True, [SublayerDrop(START, count=1)])]:
        module = Sharded()
        if bypassed:
            ls.bypass(module, ls.find_sublayers(module)[:2])
        trainer = trainer_of(tmp_path, *others, watcher(), max_steps=2)
        for callback in trainer.callbacks:
            callback.setup(trainer, module, "fit")
        if bypassed and not others:
            with pytest.raises(StrategyError, match="list SublayerDrop instead of bypassing by hand, or use another"):
                trainer.callbacks[-1].on_fit_start(trainer, module)
        else:
            trainer.callbacks[-1].on_fit_start(trainer, module)


if __name__ == "__main__":
    run(Path(sys.argv[1]))
