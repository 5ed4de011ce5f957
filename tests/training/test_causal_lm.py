"""CausalLM: training, logging, sources of the model, and errors."""

import functools
import itertools
import json
import math

import lightning.pytorch as pl
import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset
from transformers import AutoModelForCausalLM

from layershed.discovery.find import find_sublayers
from layershed.errors import LayershedError, ModelError, ScheduleError
from layershed.saving.load_model import build_model
from layershed.saving.pretrained import save_pretrained
from layershed.surgery import bypass, dropped_sublayers
from layershed.training.causal_lm import CausalLM
from layershed.training.text_data import TextData
from tests.support.models import SIZES
from tests.support.models import build_model as tiny

CONFIG = {"model_type": "llama", **SIZES}
TOKENS = 10


def items(count, seed=0, ignore=0):
    """Sequences whose first labels are ignored."""
    rows = torch.randint(3, 97, (count, TOKENS), generator=torch.Generator().manual_seed(seed))
    labels = rows.clone()
    labels[:, :ignore] = -100
    return [{"input_ids": row, "labels": label} for row, label in zip(rows, labels, strict=True)]


def loader(count=8, **kwargs):
    return DataLoader(items(count, **kwargs), batch_size=2)


@pytest.fixture
def make_trainer(tmp_path):
    def make(*callbacks, **kwargs):
        settings = {"max_steps": 4, "num_sanity_val_steps": 0, "logger": False, "enable_checkpointing": False}
        return pl.Trainer(
            accelerator="cpu",
            default_root_dir=tmp_path,
            enable_progress_bar=False,
            enable_model_summary=False,
            callbacks=list(callbacks),
            **{**settings, **kwargs},
        )

    return make


class Notes(pl.Callback):
    def __init__(self):
        self.losses, self.rates = [], []

    def on_train_batch_end(self, trainer, pl_module, *_):
        self.losses.append(trainer.callback_metrics["train_loss"].item())
        self.rates.append(trainer.optimizers[0].param_groups[0]["lr"])


def cross_entropy(net, batch):
    """Loss of each predicted token that is not ignored, in float64."""
    with torch.no_grad():
        logits = net(input_ids=batch["input_ids"]).logits[:, :-1].double()
    targets = batch["labels"][:, 1:]
    values = -logits.log_softmax(-1).gather(-1, targets.clamp_min(0)[..., None])[..., 0]
    return values[targets != -100]


def test_training_losses_and_weights_equal_a_loop_by_hand(make_trainer):
    module = CausalLM(config=CONFIG, optimizer=functools.partial(torch.optim.AdamW, lr=1e-2, weight_decay=0.3))
    reference = AutoModelForCausalLM.from_config(module.model.config)
    reference.load_state_dict(module.model.state_dict())
    notes = Notes()
    make_trainer(notes, limit_val_batches=0).fit(module, loader(ignore=3), loader())

    optimizer = torch.optim.AdamW(reference.parameters(), lr=1e-2, weight_decay=0.3)
    wanted = []
    for step, batch in enumerate(loader(ignore=3)):
        optimizer.param_groups[0]["lr"] = 1e-2 * (1 + math.cos(math.pi * step / 4)) / 2
        wanted.append(cross_entropy(reference, batch).mean().item())
        logits = reference(input_ids=batch["input_ids"]).logits[:, :-1].flatten(0, 1)
        torch.nn.functional.cross_entropy(logits, batch["labels"][:, 1:].flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert notes.losses == pytest.approx(wanted, rel=1e-5)
    for name, weight in reference.state_dict().items():
        torch.testing.assert_close(module.model.state_dict()[name], weight)


@pytest.mark.parametrize("how", ["validate", "test"])
def test_evaluation_losses_are_means_and_perplexity_their_exponential(make_trainer, how):
    """Every batch holds the same number of tokens, the last one fewer sequences."""
    module = CausalLM(config=CONFIG)
    batches = loader(5, ignore=2)
    (found,) = getattr(make_trainer(), how)(module, batches, verbose=False)
    module.eval()
    loss = torch.cat([cross_entropy(module.model, batch) for batch in batches]).mean().item()
    name = {"validate": "val", "test": "test"}[how]
    assert found == {
        f"{name}_loss": pytest.approx(loss, rel=1e-5),
        f"{name}_perplexity": pytest.approx(math.exp(loss), rel=1e-4),
    }


def test_validation_perplexity_is_reset_each_epoch(make_trainer):
    seen = []

    class Look(pl.Callback):
        def on_validation_end(self, trainer, pl_module):
            seen.append({name: trainer.callback_metrics[f"val_{name}"].item() for name in ("loss", "perplexity")})

    module = CausalLM(config=CONFIG, optimizer=functools.partial(torch.optim.SGD, lr=0.5))
    make_trainer(Look(), max_steps=12).fit(module, loader(), loader(4, seed=1))
    assert len(seen) == 3
    assert len({values["loss"] for values in seen}) == 3
    for values in seen:
        assert values["perplexity"] == pytest.approx(math.exp(values["loss"]), rel=1e-4)


def test_predict_step_gives_the_most_likely_next_tokens(make_trainer):
    module = CausalLM(config=CONFIG)
    predicted = make_trainer().predict(module, loader(5))
    assert [tuple(own.shape) for own in predicted] == [(2, TOKENS), (2, TOKENS), (1, TOKENS)]
    module.eval()
    with torch.no_grad():
        for own, batch in zip(predicted, loader(5), strict=True):
            assert torch.equal(own, module.model(input_ids=batch["input_ids"]).logits.topk(1).indices[..., 0])


def rate(name, warmup, step, steps=8):
    """Share of the peak learning rate before optimizer step ``step``, counted from 0."""
    if step < warmup:
        return step / warmup
    done = (step - warmup) / (steps - warmup)
    return {"constant": 1, "linear": 1 - done, "cosine": (1 + math.cos(math.pi * done)) / 2}[name.split("_")[0]]


@pytest.mark.parametrize(
    ("name", "warmup"),
    [("constant", 0), ("constant_with_warmup", 3), ("linear", 0), ("linear", 2), ("cosine", 0), ("cosine", 3)],
)
@pytest.mark.parametrize("length", [{"max_steps": 8}, {"max_steps": -1, "max_epochs": 2}], ids=["steps", "epochs"])
def test_named_schedules_span_the_run(make_trainer, name, warmup, length):
    """Two epochs of four batches are eight steps."""
    notes = Notes()
    optimizer = functools.partial(torch.optim.SGD, lr=0.02)
    module = CausalLM(
        config={**CONFIG, "num_hidden_layers": 1}, optimizer=optimizer, schedule=name, warmup_steps=warmup
    )
    make_trainer(notes, limit_val_batches=0, **length).fit(module, loader(), loader())
    # after a step the rate is that of the next one
    assert notes.rates == pytest.approx([0.02 * rate(name, warmup, step) for step in range(1, 9)])


def test_accumulation_shortens_the_schedule(make_trainer):
    notes = Notes()
    module = CausalLM(config=CONFIG, optimizer=functools.partial(torch.optim.SGD, lr=1.0), schedule="linear")
    trainer = make_trainer(notes, max_steps=-1, max_epochs=2, accumulate_grad_batches=2, limit_val_batches=0)
    trainer.fit(module, loader(), loader())
    assert trainer.global_step == 4
    assert notes.rates[-1] == pytest.approx(0)
    assert notes.rates[1] == pytest.approx(0.75)


class Stop(pl.Callback):
    def on_train_batch_end(self, trainer, *_):
        trainer.should_stop = trainer.global_step >= 2


class Endless(IterableDataset):
    def __iter__(self):
        return itertools.cycle(items(4))


@pytest.mark.parametrize("train", [loader(), DataLoader(Endless(), batch_size=2)], ids=["sized", "endless"])
@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant", "constant_with_warmup"])
def test_endless_run_accepts_only_constant_schedules(make_trainer, schedule, train):
    module = CausalLM(config={**CONFIG, "num_hidden_layers": 1}, schedule=schedule)
    trainer = make_trainer(Stop(), max_steps=-1, max_epochs=-1, limit_val_batches=0)
    if schedule.startswith("constant"):
        trainer.fit(module, train, loader())
        assert trainer.global_step == 2
    else:
        with pytest.raises(ScheduleError, match=f"'{schedule}'.*max_steps or max_epochs"):
            trainer.fit(module, train, loader())


def test_optimizer_gets_its_arguments_and_only_trainable_parameters(make_trainer):
    class Look(pl.Callback):
        def on_train_start(self, trainer, pl_module):
            (self.optimizer,) = trainer.optimizers

    optimizer = functools.partial(torch.optim.AdamW, lr=0.3, betas=(0.5, 0.6), weight_decay=0.7)
    module = CausalLM(config=CONFIG, optimizer=optimizer)
    frozen = module.model.model.embed_tokens.weight.requires_grad_(False)
    before = frozen.clone()
    look = Look()
    make_trainer(look, limit_val_batches=0).fit(module, loader(), loader())
    group = look.optimizer.param_groups[0]
    assert type(look.optimizer) is torch.optim.AdamW
    assert (group["initial_lr"], group["betas"], group["weight_decay"]) == (0.3, (0.5, 0.6), 0.7)
    assert set(group["params"]) == set(module.parameters()) - {frozen}
    assert torch.equal(frozen, before)


def test_causal_lm_default_is_a_small_llama_over_bytes():
    model = CausalLM().model
    assert model.config.model_type == "llama"
    assert model.config.vocab_size == TextData().vocab_size
    assert len(find_sublayers(model)) == 24
    assert 2.3e6 < sum(parameter.numel() for parameter in model.parameters()) < 2.5e6


@pytest.mark.parametrize("model_type", ["gpt2", "qwen3"])
def test_causal_lm_builds_any_model_type_and_dtype_from_a_config(model_type):
    module = CausalLM(config={**CONFIG, "model_type": model_type, "num_hidden_layers": 3}, dtype="bfloat16")
    assert module.model.config.model_type == model_type
    assert {s.block for s in find_sublayers(module)} == {0, 1, 2}
    assert {parameter.dtype for parameter in module.parameters()} == {torch.bfloat16}


@pytest.fixture
def folders(tmp_path, monkeypatch):
    """A dense folder and a dropped one, with their logits."""
    tokens = torch.tensor([[5, 6, 7, 8]])
    logits = {}
    dense = tiny("llama")
    with torch.no_grad():
        logits["dense"] = dense(input_ids=tokens).logits
        dense.save_pretrained(tmp_path / "dense")
        bypass(dense, find_sublayers(dense)[1:4])
        logits["dropped"] = dense(input_ids=tokens).logits
    save_pretrained(dense, tmp_path / "dropped")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    return tokens, logits


@pytest.mark.default_cases(4)
@pytest.mark.parametrize("name", ["dense", "dropped"])
@pytest.mark.parametrize("form", ["{}/", "./", "~/", ""], ids=["absolute", "relative", "home", "bare"])
def test_causal_lm_loads_a_folder_with_equal_logits_in_train_mode(folders, tmp_path, name, form):
    tokens, logits = folders
    module = CausalLM(pretrained=form.format(tmp_path) + name)
    assert all(own.training for own in module.modules())
    assert len(dropped_sublayers(module.model)) == (3 if name == "dropped" else 0)
    module.eval()
    with torch.no_grad():
        assert torch.equal(module(input_ids=tokens).logits, logits[name])


def test_training_a_dropped_folder_saves_a_checkpoint_that_reloads(folders, tmp_path, make_trainer):
    tokens, _ = folders
    module = CausalLM(pretrained="dropped", optimizer=functools.partial(torch.optim.AdamW, lr=1e-2))
    trainer = make_trainer()
    trainer.fit(module, loader(), loader())
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    loaded = CausalLM.load_from_checkpoint(tmp_path / "a.ckpt")
    module.eval()
    loaded.eval()
    with torch.no_grad():
        assert torch.equal(loaded(input_ids=tokens).logits, module(input_ids=tokens).logits)
    assert len(dropped_sublayers(loaded.model)) == 3


def test_config_fields_override_those_of_the_folder(folders):
    module = CausalLM(pretrained="dense", config={"model_type": "llama", "attention_dropout": 0.25}, dtype="bfloat16")
    assert module.model.config.attention_dropout == 0.25
    assert module.model.model.layers[0].self_attn.attention_dropout == 0.25
    assert {parameter.dtype for parameter in module.parameters()} == {torch.bfloat16}
    assert CausalLM(pretrained="dense").model.config.attention_dropout == 0


def test_gradient_checkpointing_trains_to_the_same_weights(make_trainer):
    """The decoder layers must run again in the backward pass."""
    states, passes = [], []
    for on in (False, True):
        torch.manual_seed(0)
        module = CausalLM(config=CONFIG, gradient_checkpointing=on)
        counted = []
        attention = module.model.model.layers[0].self_attn
        attention.register_forward_pre_hook(lambda *_, counted=counted: counted.append(1))
        make_trainer(limit_val_batches=0).fit(module, loader(), loader())
        states.append(module.state_dict())
        passes.append(len(counted))
    assert passes == [4, 8]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_checkpoint_is_plain_data_and_loads_without_pickle(make_trainer, tmp_path):
    """Also with an optimizer class and with a function that cannot be pickled."""
    for optimizer in (
        torch.optim.AdamW,
        functools.partial(torch.optim.SGD, lr=0.1),
        lambda p: torch.optim.SGD(p, lr=1),
    ):
        module = CausalLM(config=CONFIG, optimizer=optimizer, schedule="linear", warmup_steps=2)
        trainer = make_trainer()
        trainer.fit(module, loader(), loader())
        trainer.save_checkpoint(tmp_path / "a.ckpt")
        content = torch.load(tmp_path / "a.ckpt", weights_only=True)
        assert content["hyper_parameters"] == {
            "pretrained": None,
            "config": CONFIG,
            "schedule": "linear",
            "warmup_steps": 2,
            "dtype": "float32",
            "gradient_checkpointing": False,
            "distillation": None,
        }
        loaded = CausalLM.load_from_checkpoint(tmp_path / "a.ckpt")
        assert all(torch.equal(value, module.state_dict()[name]) for name, value in loaded.state_dict().items())


def test_run_of_epochs_resumes_to_the_same_weights(make_trainer, tmp_path):
    """Reading the length of the run must not lose the position of the loader."""
    (tmp_path / "words.txt").write_text("\n\n".join(f"{i} and {i * i} are two numbers" for i in range(30)))

    class Save(pl.Callback):
        def on_train_batch_end(self, trainer, *_):
            if trainer.global_step == 5 and not (tmp_path / "cut.ckpt").exists():
                trainer.save_checkpoint(tmp_path / "cut.ckpt")

    states = []
    for ckpt_path in (None, tmp_path / "cut.ckpt"):
        torch.manual_seed(0)
        module = CausalLM(config={**CONFIG, "vocab_size": 259})
        data = TextData(str(tmp_path / "words.txt"), block_size=16, batch_size=4, max_tokens=512)
        trainer = make_trainer(Save(), max_steps=-1, max_epochs=2)
        trainer.fit(module, datamodule=data, ckpt_path=ckpt_path)
        assert trainer.global_step == 16
        states.append(module.state_dict())
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def one_sentence(error):
    text = str(error)
    assert "\n" not in text
    assert len(text) < 500
    assert text.strip() == text
    return text


@pytest.mark.parametrize(
    ("config", "match"),
    [
        ({}, "needs a model_type"),
        ({"hidden_size": 32}, "needs a model_type"),
        ({"model_type": "lama"}, "'lama'; did you mean 'llama'"),
        ({"model_type": "zzzzzzzz"}, "no model_type 'zzzzzzzz'"),
        ({**CONFIG, "hidden_size": 30, "head_dim": None}, "not a multiple of the number of attention heads"),
        ({**CONFIG, "hidden_size": "many"}, "hidden_size.*expected int, got str"),
        ({**CONFIG, "hidden_act": "nope"}, "nope"),
        ({**CONFIG, "num_attention_heads": 0, "head_dim": None}, "num_attention_heads=0"),
    ],
    ids=[
        "empty",
        "no type",
        "typo in type",
        "unknown type",
        "odd size",
        "size a word",
        "unknown activation",
        "no heads",
    ],
)
def test_invalid_model_config_gives_a_one_sentence_error(config, match):
    with pytest.raises(ModelError, match=match) as caught:
        CausalLM(config=config)
    assert one_sentence(caught.value).startswith("config: ")


def broken(tmp_path, kind):
    """A folder, or a file, with one fault."""
    folder = tmp_path / kind
    folder.mkdir()
    config = tiny("llama").config
    if kind == "no weights":
        config.save_pretrained(folder)
    elif kind == "broken config":
        (folder / "config.json").write_text("{")
    elif kind == "unknown type":
        (folder / "config.json").write_text(json.dumps({**config.to_dict(), "model_type": "lama"}))
    elif kind == "no type":
        (folder / "config.json").write_text("{}")
    elif kind == "cut weights":
        tiny("llama").save_pretrained(folder)
        weights = folder / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:500])
    elif kind == "broken gguf":
        folder = folder / "model.gguf"
        folder.write_bytes(b"nothing of the kind")
    return str(folder)


@pytest.mark.parametrize(
    ("kind", "match"),
    [
        ("empty", "config.json"),
        ("no weights", "model.safetensors"),
        ("broken config", "not valid JSON"),
        ("unknown type", "lama"),
        ("no type", "model_type"),
        ("cut weights", "header"),
        ("broken gguf", "not a GGUF file"),
    ],
)
def test_unreadable_pretrained_source_gives_a_one_sentence_error(tmp_path, kind, match):
    with pytest.raises(LayershedError, match=match) as caught:
        CausalLM(pretrained=broken(tmp_path, kind))
    assert kind in one_sentence(caught.value)


@pytest.mark.parametrize(
    ("pretrained", "match"),
    [
        ("./nowhere", "no such folder"),
        ("/nowhere/at/all", "no such folder"),
        ("~/nowhere", "no such folder"),
        ("../nowhere.gguf", "no such GGUF file"),
        ("nowhere.gguf", "no such GGUF file"),
    ],
)
def test_missing_local_source_is_named_without_asking_the_hub(folders, monkeypatch, pretrained, match):
    def refuse(*_, **__):
        raise AssertionError("the hub was asked")

    monkeypatch.setattr("socket.create_connection", refuse)
    monkeypatch.setattr("socket.getaddrinfo", refuse)
    with pytest.raises(ModelError, match=match) as caught:
        build_model(pretrained)
    assert pretrained.rsplit("/", maxsplit=1)[-1] in one_sentence(caught.value)


@pytest.mark.parametrize(
    ("name", "config", "match"),
    [
        ("dense", {"no_such_field": 1}, "no_such_field"),
        ("dense", {"hidden_size": 64}, "another shape than the config says"),
        ("dense", {"model_type": "gpt2"}, "of model_type 'llama', not 'gpt2'"),
        ("dropped", {"attention_dropout": 0.1}, "leave out attention_dropout"),
        ("dropped", {"model_type": "gpt2"}, "of model_type 'llama', not 'gpt2'"),
    ],
    ids=["unknown field", "other shape", "other type", "field of a dropped model", "other type of a dropped model"],
)
def test_config_fields_that_a_folder_cannot_take_are_an_error(folders, name, config, match):
    with pytest.raises(ModelError, match=match) as caught:
        CausalLM(pretrained=name, config=config)
    assert f"'{name}'" in one_sentence(caught.value)
