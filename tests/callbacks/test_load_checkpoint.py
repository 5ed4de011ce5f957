"""A checkpoint of a dropped, quantized or adapted model: that model, or refused; never the dense one in silence."""

import re
import warnings

import pytest
import torch
from torch.distributed.checkpoint import load as load_shards
from torch.distributed.checkpoint import save as save_shards
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

import layershed as ls
from layershed.callbacks import LoRARecovery, Quantization, SublayerDrop
from layershed.errors import AmbiguousModelError, CheckpointError
from layershed.saving.checkpoint import CHECKPOINT_KEY
from layershed.stand_ins.contexts import withheld
from layershed.training.causal_lm import CausalLM
from tests.support.runs import Foreign, HandRun, causal_lm, fit_foreign, same, unmarked, val_loader
from tests.support.thinned import crossed, some_of

WHAT = {
    "drop": (lambda: [SublayerDrop(3, count=3)], r"{names} are dropped; load with .* or put SublayerDrop among"),
    "one": (lambda: [SublayerDrop(3, count=1)], r"{names} is dropped; load with"),
    "nf4": (
        lambda: [Quantization(start="end")],
        r"weights are quantized \(nf4\); load with .* or put Quantization among",
    ),
    "lora": (
        lambda: [LoRARecovery(start=2, rank=2, finish="adapter")],
        r"adapters are added; load with .* or put LoRARecovery among",
    ),
    "all": (
        lambda: [SublayerDrop(3, count=3), Quantization(), LoRARecovery(rank=2, finish="adapter")],
        r"{names} are dropped, weights are quantized \(nf4\), adapters are added; load with .* or put SublayerDrop",
    ),
}
LOADERS = {
    "load_from_checkpoint": lambda path, _: Foreign.load_from_checkpoint(path),
    "validate": lambda path, trainer: trainer.validate(Foreign(), val_loader(), ckpt_path=path, verbose=False),
    "test": lambda path, trainer: trainer.test(Foreign(), val_loader(), ckpt_path=path, verbose=False),
    "predict": lambda path, trainer: trainer.predict(Foreign(), val_loader(), ckpt_path=path),
    "fit": lambda path, trainer: trainer.fit(Foreign(), val_loader(), val_loader(), ckpt_path=path),
    "the transformer alone": lambda path, _: Foreign().net.load_state_dict(
        {name.removeprefix("net."): tensor for name, tensor in torch.load(path)["state_dict"].items()}
    ),
}


@pytest.fixture
def saved(make_trainer, tmp_path):
    """Trains with callbacks and saves whole and the weights alone."""

    def save(what, module=None):
        trainer = make_trainer(*WHAT[what][0](), max_steps=5, name="saved")
        module = fit_foreign(trainer, module)
        trainer.save_checkpoint(tmp_path / "whole.ckpt")
        trainer.save_checkpoint(tmp_path / "weights.ckpt", weights_only=True)
        return module

    return save


def logits(module):
    """Over every validation batch, in eval mode, in the order of the loader."""
    with torch.no_grad():
        return [module.eval().net(input_ids=batch["input_ids"], use_cache=False).logits for batch in val_loader()]


def names(module):
    return ", ".join(sublayer.name for sublayer in ls.bypassed_sublayers(module))


@pytest.mark.default_cases(1)
@pytest.mark.parametrize("what", some_of(WHAT, 2))
def test_dropped_checkpoint_loaded_plainly_raises_an_error_with_advice(make_trainer, tmp_path, saved, what):
    wanted = WHAT[what][1].format(names=re.escape(names(saved(what))))
    for file in ("whole.ckpt", "weights.ckpt"):
        for how in LOADERS if what == "drop" else ["load_from_checkpoint"]:
            with pytest.raises(RuntimeError, match=rf'"layershed: {wanted}'):
                LOADERS[how](tmp_path / file, make_trainer(name=how))


@pytest.mark.default_cases(2)
@pytest.mark.filterwarnings("ignore:.*callbacks used to create the checkpoint need to be provided:UserWarning")
@pytest.mark.parametrize(("what", "file"), crossed(WHAT, ("whole.ckpt", "weights.ckpt")))
def test_load_checkpoint_and_the_named_callback_restore_the_saved_model(make_trainer, tmp_path, saved, what, file):
    module = saved(what)
    loaded = Foreign()
    ls.load_checkpoint(loaded, tmp_path / file)
    assert same(dict(loaded.state_dict()), dict(module.state_dict()))
    assert names(loaded) == names(module)
    trainer = make_trainer(WHAT[what][0]()[0], name="again")
    if what in ("drop", "one"):
        hand = HandRun()
        hand.module.load_state_dict(unmarked(module.state_dict()))
        hand.drop([(sublayer.block, sublayer.kind) for sublayer in ls.bypassed_sublayers(module)])
        wanted = logits(hand.module)
        dense = Foreign()
        dense.load_state_dict(unmarked(module.state_dict()))
        assert not same(logits(dense), wanted)
    else:
        wanted = logits(module)
    assert same(logits(loaded), wanted)
    assert same(trainer.predict(Foreign(), val_loader(), ckpt_path=tmp_path / file), wanted)


def test_causal_lm_checkpoint_loads_without_load_checkpoint_or_callback(make_trainer, tmp_path, text_data):
    trainer = make_trainer(SublayerDrop(3, count=3), max_steps=5)
    module = causal_lm()
    trainer.fit(module, datamodule=text_data())
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    ids = torch.arange(3, 19)[None]
    hand = HandRun(vocab_size=259, eos_token_id=1)
    hand.module.net.load_state_dict(unmarked(module.model.state_dict()))
    hand.drop([(sublayer.block, sublayer.kind) for sublayer in ls.bypassed_sublayers(module)])
    fresh = causal_lm()
    ls.load_checkpoint(fresh, tmp_path / "a.ckpt")
    for loaded in (CausalLM.load_from_checkpoint(tmp_path / "a.ckpt"), fresh):
        with torch.no_grad():
            assert torch.equal(loaded.eval()(input_ids=ids).logits, hand.module.eval().net(input_ids=ids).logits)


def test_dense_checkpoint_has_no_mark_and_restores(make_trainer, tmp_path):
    trainer = make_trainer(SublayerDrop(6, count=3), max_steps=8)
    module = Foreign()
    keys = set(module.state_dict())
    trainer.callbacks[0].on_train_end = lambda *_: trainer.save_checkpoint(tmp_path / "dropped.ckpt")
    fit_foreign(trainer, module)
    marked = torch.load(tmp_path / "dropped.ckpt")["state_dict"]
    assert len(unmarked(marked).keys() - keys) == 1
    assert len(marked.keys() - keys) == 1 + 3
    ls.restore(module)
    trainer.save_checkpoint(tmp_path / "dense.ckpt")
    assert torch.load(tmp_path / "dense.ckpt")["state_dict"].keys() == keys
    loaded = Foreign.load_from_checkpoint(tmp_path / "dense.ckpt")
    wanted = logits(loaded)
    ls.load_checkpoint(loaded, tmp_path / "dropped.ckpt")
    assert not same(logits(loaded), wanted)
    ls.load_checkpoint(loaded, tmp_path / "dense.ckpt")
    assert same(logits(loaded), wanted)
    assert names(loaded) == ""


def test_checkpoint_that_lost_its_note_is_refused_by_its_mark(tmp_path, saved, make_trainer):
    saved("drop")
    content = torch.load(tmp_path / "whole.ckpt")
    del content[CHECKPOINT_KEY]
    torch.save(content, tmp_path / "lost.ckpt")
    with pytest.raises(CheckpointError, match="do not fit this Foreign") as caught:
        ls.load_checkpoint(Foreign(), tmp_path / "lost.ckpt")
    assert "are dropped" in str(caught.value.__cause__)
    with pytest.raises(RuntimeError, match="are dropped"):
        make_trainer(SublayerDrop(3, count=3)).validate(Foreign(), val_loader(), ckpt_path=tmp_path / "lost.ckpt")


def test_load_checkpoint_takes_one_of_two_transformers_by_name(make_trainer, tmp_path):
    class Two(Foreign):
        def __init__(self):
            super().__init__()
            self.teacher = Foreign().net.requires_grad_(False)

    trainer = make_trainer(SublayerDrop(2, count=3, transformer="net"), max_steps=4)
    module = fit_foreign(trainer, Two())
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    loaded = Two()
    with pytest.raises(AmbiguousModelError, match="net, teacher"):
        ls.load_checkpoint(loaded, tmp_path / "a.ckpt")
    ls.load_checkpoint(loaded, tmp_path / "a.ckpt", name="net")
    assert same(logits(loaded), logits(module))
    assert ls.bypassed_sublayers(loaded.teacher) == ()


def test_load_checkpoint_runs_a_modules_own_hooks_and_needs_none(tmp_path, saved):
    class Noting(Foreign):
        def on_save_checkpoint(self, checkpoint):
            checkpoint["mine"] = 3

        def on_load_checkpoint(self, checkpoint):
            self.found = checkpoint["mine"], [key for key in checkpoint["state_dict"] if "layershed" in key]

    module = saved("drop", Noting())
    loaded = Noting()
    ls.load_checkpoint(loaded, tmp_path / "whole.ckpt")
    assert loaded.found == (3, [])
    plain = torch.nn.Module()
    plain.net = Foreign().net
    ls.load_checkpoint(plain, str(tmp_path / "weights.ckpt"))
    assert same(logits(plain), logits(module))


class Evil:
    def __reduce__(self):
        return exec, ("raise SystemExit('executed')",)


def test_load_checkpoint_refuses_another_models_checkpoint_in_one_sentence(tmp_path, saved):
    saved("drop")
    (tmp_path / "torn.ckpt").write_bytes((tmp_path / "whole.ckpt").read_bytes()[:-400])
    (tmp_path / "text.ckpt").write_text("hello")
    (tmp_path / "empty.ckpt").touch()
    torch.save({"state_dict": {}, "evil": Evil()}, tmp_path / "evil.ckpt")
    torch.save([1], tmp_path / "list.ckpt")
    torch.save(Foreign().state_dict(), tmp_path / "bare.ckpt")
    for name, module, match in (
        ("none.ckpt", Foreign(), "there is no such file"),
        ("torn.ckpt", Foreign(), "is corrupt"),
        ("text.ckpt", Foreign(), "is corrupt"),
        ("empty.ckpt", Foreign(), "is corrupt"),
        ("evil.ckpt", Foreign(), "holds more than tensors"),
        ("list.ckpt", Foreign(), "not a checkpoint that Lightning wrote"),
        ("bare.ckpt", Foreign(), "not a checkpoint that Lightning wrote"),
        ("whole.ckpt", Foreign(num_hidden_layers=1), "do not fit this model"),
        ("whole.ckpt", Foreign(vocab_size=99), "do not fit this Foreign\\. Build it"),
        ("whole.ckpt", torch.nn.Linear(2, 2), "Linear holds no Hugging Face transformer"),
    ):
        with pytest.raises(CheckpointError, match=match) as caught:
            ls.load_checkpoint(module, tmp_path / name)
        assert f"'{tmp_path / name}'" in str(caught.value)
        assert "\n" not in str(caught.value)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled, unavailable or uninitialized:UserWarning")
def test_shards_have_the_mark_and_keep_it_when_consolidated(tmp_path, saved):
    """As ModelParallelStrategy saves and loads: the rest of the checkpoint goes into a file of its own."""
    module = saved("drop")
    state = torch.load(tmp_path / "whole.ckpt")["state_dict"]
    save_shards({"state_dict": dict(state)}, checkpoint_id=tmp_path / "shards", no_dist=True)
    fresh = {"state_dict": {name: torch.zeros_like(value) for name, value in module.state_dict().items()}}
    load_shards(fresh, checkpoint_id=tmp_path / "shards", no_dist=True)
    assert same(fresh["state_dict"], dict(module.state_dict()))
    dcp_to_torch_save(tmp_path / "shards", tmp_path / "one.ckpt")
    with pytest.raises(RuntimeError, match=f"layershed: {names(module)} are dropped"):
        Foreign().load_state_dict(torch.load(tmp_path / "one.ckpt", weights_only=True)["state_dict"])


class Counted(Foreign):
    """Saves more than tensors, too."""

    count = 0

    def get_extra_state(self):
        return {"count": self.count}

    def set_extra_state(self, state):
        self.count = state["count"]


def write_folder(folder, weights, notes):
    """What ModelParallelStrategy would have written, which is tried in tests/distributed."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch speaks of what it assumes without a process group
        save_shards({"state_dict": weights}, checkpoint_id=folder)
    torch.save(notes, folder / "meta.pt")
    return folder


def folder_of(tmp_path, module):
    """The checkpoint that was saved whole, as a folder."""
    whole = torch.load(tmp_path / "whole.ckpt", weights_only=True)
    marks = {name: value for name, value in whole.pop("state_dict").items() if name.startswith("layershed")}
    del whole["optimizer_states"]
    with withheld(module):
        return write_folder(tmp_path / "folder", {**module.state_dict(), **marks}, whole)


@pytest.mark.default_cases(1)
@pytest.mark.parametrize("what", ["drop", "lora"])
def test_load_checkpoint_restores_the_saved_model_from_shards(tmp_path, saved, what):
    module = Counted()
    module.count = 7
    saved(what, module)
    found, tokens = Counted(), torch.arange(3, 11)[None]
    ls.load_checkpoint(found, folder_of(tmp_path, module))
    assert ls.dropped_sublayers(found.net) == ls.dropped_sublayers(module.net)
    assert same(dict(found.state_dict()), dict(module.state_dict()))
    assert found.count == 7
    with torch.no_grad():
        assert torch.equal(found.eval().net(tokens).logits, module.eval().net(tokens).logits)


def test_transformer_alone_takes_its_part_of_a_folder_of_shards(tmp_path, saved):
    module, alone = saved("drop"), Foreign().net
    ls.load_checkpoint(alone, folder_of(tmp_path, module))
    assert ls.bypassed_sublayers(alone) == ls.bypassed_sublayers(module.net)
    assert same(dict(alone.state_dict()), dict(module.net.state_dict()))


def test_load_checkpoint_refuses_another_models_shards_in_one_sentence(tmp_path, saved):
    """Of weights that are asked of nobody torch says nothing."""
    folder = folder_of(tmp_path, saved("lora"))
    for module, match in (
        (Foreign(num_hidden_layers=1), "do not fit this model|does not fit this model"),
        (Foreign(vocab_size=99), "do not fit"),
        (torch.nn.Linear(2, 2), "Linear holds no Hugging Face transformer"),
    ):
        with pytest.raises(CheckpointError, match=match) as caught:
            ls.load_checkpoint(module, folder)
        assert f"'{folder}'" in str(caught.value)
    dense = write_folder(tmp_path / "dense", Foreign().state_dict(), {})
    with pytest.raises(CheckpointError, match=r"18 weights that this module lacks, such as 'net\.model"):
        ls.load_checkpoint(Foreign(num_hidden_layers=2), dense)


def test_load_checkpoint_finds_shards_whose_replacement_was_cut_off(tmp_path, saved):
    module = saved("drop")
    folder_of(tmp_path, module).rename(tmp_path / ".last.ckpt.former")
    found = Foreign()
    ls.load_checkpoint(found, tmp_path / "last.ckpt")
    assert same(dict(found.state_dict()), dict(module.state_dict()))


@pytest.mark.default_cases(1)
@pytest.mark.parametrize("file", ["whole.ckpt", "weights.ckpt"])
def test_transformer_alone_takes_its_part_of_a_checkpoint(saved, tmp_path, file):
    module, alone = saved("drop"), Foreign().net
    ls.load_checkpoint(alone, tmp_path / file)
    assert ls.bypassed_sublayers(alone) == ls.bypassed_sublayers(module.net)
    assert same(dict(alone.state_dict()), dict(module.net.state_dict()))


def test_transformer_that_fits_two_parts_of_a_checkpoint_or_none_is_refused_with_the_prefix(tmp_path):
    net = Foreign().net
    for name, parts in (("two", ("net.", "teacher.")), ("other", ("net.",))):
        weights = {f"{part}{key}": value for part in parts for key, value in net.state_dict().items()}
        if name == "other":
            weights.popitem()
        torch.save({"state_dict": weights}, tmp_path / name)
    with pytest.raises(CheckpointError, match=r"under 'net\.' and 'teacher\.'\. Pass the LightningModule"):
        ls.load_checkpoint(net, tmp_path / "two")
    with pytest.raises(CheckpointError, match=r"its weights begin with 'net\.'.* Pass the LightningModule"):
        ls.load_checkpoint(net, tmp_path / "other")
