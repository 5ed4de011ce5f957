"""What cannot work is refused before the first step, not at the drop or at the end; LBFGS works."""

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torchdata.stateful_dataloader import StatefulDataLoader

import layershed as ls
from layershed.callbacks import ExactResume, Export
from layershed.errors import CheckpointError, ExportError, OptimizerError
from layershed.recovery.lora import adapted_modules
from layershed.surgery import bypassed_sublayers
from tests.support.lora_runs import dropping, recovery, refused_at_start
from tests.support.models import build_model
from tests.support.runs import BATCH, Foreign, fit_foreign, logits_of, same, sequences, state_of
from tests.support.thinned import one_of

peft = pytest.importorskip("peft")


class Adapted(Foreign):
    """Its transformer carries an adapter of the user's own."""

    def __init__(self, config):
        super().__init__()
        self.net = peft.get_peft_model(build_model().train(), config)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.parametrize(
    "config",
    [
        peft.LoraConfig(r=2, target_modules=["q_proj"]),
        peft.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"]),
        peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2),
    ],
    ids=["LoRA", "LoRA and a saved module", "prompt"],
)
def test_export_of_a_users_adapter_is_refused_before_the_first_step(make_trainer, config):
    refused_at_start(make_trainer(dropping(4), Export()), Adapted(config), ExportError, "carries adapters of peft")


class LBFGSModule(Foreign):
    def configure_optimizers(self):
        return torch.optim.LBFGS(self.parameters(), lr=1e-2, max_iter=3, history_size=4)


@pytest.mark.filterwarnings("ignore:'set_vital' is deprecated")
@pytest.mark.filterwarnings("ignore:The dirpath has changed:UserWarning")
@pytest.mark.parametrize("lora", one_of([True, False]))
def test_run_with_lbfgs_drops_trains_on_and_resumes(make_trainer, tmp_path, lora):
    def run(folder, ckpt_path=None):
        saving = ModelCheckpoint(folder, filename="{step}", save_top_k=-1, every_n_train_steps=1)
        own = [dropping(3), *([recovery(finish="adapter")] if lora else [])]
        trainer = make_trainer(*own, saving, enable_checkpointing=True, max_steps=6)
        module, data = LBFGSModule(), StatefulDataLoader(sequences(BATCH * 6), batch_size=BATCH)
        trainer.fit(module, data, data, ckpt_path=ckpt_path)
        return trainer, module

    trainer, module = run(tmp_path / "whole")
    at_drop = torch.load(tmp_path / "whole" / "step=3.ckpt", weights_only=True)["state_dict"]
    assert len(bypassed_sublayers(module)) == 3
    assert bool(adapted_modules(module)) == lora
    moved = [name for name, value in module.state_dict().items() if name in at_drop and not same(value, at_drop[name])]
    assert moved
    assert all(value.isfinite().all() for value in module.state_dict().values() if value.is_floating_point())
    for step in (2, 3, 5):
        again, resumed = run(tmp_path / f"again-{step}", tmp_path / "whole" / f"step={step}.ckpt")
        assert same(state_of(again, resumed), state_of(trainer, module)), step


class Wrapping(torch.optim.SGD):
    """Like ZeroRedundancyOptimizer: the optimizer inside has lists of its own."""

    def __init__(self, parameters):
        parameters = list(parameters)
        super().__init__(parameters, lr=1e-2)
        self.optim = torch.optim.SGD(parameters, lr=1e-2)


class Sharing(Wrapping):
    """Like SAM: the optimizer inside uses the very same groups."""

    def __init__(self, parameters):
        super().__init__(parameters)
        self.optim.param_groups = self.param_groups


@pytest.mark.parametrize("make", [lambda: dropping(4), lambda: recovery(start=2)], ids=["drop", "LoRA"])
def test_optimizer_around_another_with_its_own_list_is_refused_before_the_first_step(make_trainer, make):
    module = Foreign()
    module.configure_optimizers = lambda: Wrapping(module.parameters())
    refused_at_start(make_trainer(make()), module, OptimizerError, "holds another optimizer")


def test_optimizer_around_another_that_shares_its_groups_works(make_trainer):
    module = Foreign()
    module.configure_optimizers = lambda: Sharing(module.parameters())
    fit_foreign(make_trainer(dropping(3), max_steps=4), module)
    assert len(bypassed_sublayers(module)) == 3


class Late(Foreign):
    """Builds its model in configure_model, once."""

    def __init__(self):
        super().__init__()
        self.net, self.calls = None, 0

    def configure_model(self):
        self.calls += 1
        if self.net is None:
            self.net = build_model().train()


class NeedsTrainer(Late):
    """Builds its model with the help of the Trainer."""

    def configure_model(self):
        self.rank = self.trainer.global_rank
        super().configure_model()


def test_load_checkpoint_says_that_configure_model_needs_a_trainer(make_trainer, tmp_path):
    trainer = make_trainer(max_steps=1)
    fit_foreign(trainer, NeedsTrainer())
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    with pytest.raises(CheckpointError, match=r"configure_model\(\) of NeedsTrainer failed without a Trainer"):
        ls.load_checkpoint(NeedsTrainer(), tmp_path / "a.ckpt")
    with pytest.raises(ls.LayershedError, match="Late"):
        ls.load_checkpoint(Late, tmp_path / "a.ckpt")


def test_load_checkpoint_builds_a_model_that_configure_model_builds(make_trainer, tmp_path):
    trainer = make_trainer(dropping(3), max_steps=5)
    trained = fit_foreign(trainer, Late())
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    for early in (False, True):
        module = Late()
        if early:
            module.configure_model()
        ls.load_checkpoint(module, tmp_path / "a.ckpt")
        assert module.calls == 1 + early
        assert bypassed_sublayers(module) == bypassed_sublayers(trained)
        assert torch.equal(logits_of(module.net), logits_of(trained.net))


def test_load_checkpoint_into_a_module_without_a_transformer_is_still_refused(make_trainer, tmp_path):
    trainer = make_trainer(dropping(3), max_steps=5)
    fit_foreign(trainer)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    with pytest.raises(CheckpointError, match="holds no Hugging Face transformer"):
        ls.load_checkpoint(torch.nn.Linear(2, 2), tmp_path / "a.ckpt")


def test_exact_resume_is_refused_before_training_by_a_lightning_that_hides_where_it_resumes(make_trainer, monkeypatch):
    monkeypatch.setattr("layershed.callbacks.exact_resume.supports_exact_resume", lambda _: False)
    with pytest.raises(CheckpointError, match=r"needs Lightning 2\.5\.3 or newer.*leave ExactResume out"):
        fit_foreign(make_trainer(ExactResume()))
