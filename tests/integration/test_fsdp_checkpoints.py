"""What FSDP2 refuses before training. Its runs are in tests/distributed."""

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch.distributed.fsdp import fully_shard
from torch.optim import AdamW

import layershed as ls
from layershed.callbacks import LoRARecovery, Quantization, RedundancyMonitor, Report, SublayerDrop
from layershed.errors import QuantizationError, RecoveryError, StrategyError
from tests.support.models import build_model

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


REFUSED = {
    "finish='adapter'": lambda: LoRARecovery(start=1),
    "placement='all'": lambda: LoRARecovery(start=1, finish="adapter", placement="neighbours"),
    "ModelParallelStrategy": lambda: Quantization(start=1),
}


@pytest.mark.parametrize("said", REFUSED)
def test_fsdp_refuses_impossible_callbacks_before_training(said, tmp_path):
    trainer = trainer_of(tmp_path, REFUSED[said](), max_steps=2)
    module = Sharded()
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    callback = trainer.callbacks[0]
    with pytest.raises((RecoveryError, QuantizationError), match=said):
        _ = callback.setup(trainer, module, "fit"), callback.on_fit_start(trainer, module)
    assert all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items() if name in before)


@pytest.mark.parametrize("watcher", [lambda: RedundancyMonitor(2), Report], ids=["RedundancyMonitor", "Report"])
def test_fsdp_refuses_an_unrecorded_bypass_by_hand_before_training(tmp_path, watcher):
    """None of these has the dropped weights go by other names, and a Trainer would take the dense ones."""
    for bypassed, others in [(True, []), (False, []), (True, [SublayerDrop(START, count=1)])]:
        module = Sharded()
        if bypassed:
            ls.bypass(module, ls.find_sublayers(module)[:2])
        trainer = trainer_of(tmp_path, *others, watcher(), max_steps=2)
        for callback in trainer.callbacks:
            callback.setup(trainer, module, "fit")
        if bypassed and not others:
            with pytest.raises(StrategyError, match="Instead of bypassing by hand, list SublayerDrop, or use another"):
                trainer.callbacks[-1].on_fit_start(trainer, module)
        else:
            trainer.callbacks[-1].on_fit_start(trainer, module)
