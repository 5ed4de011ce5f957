"""generate: the text is that of transformers' own generate, by the dropped and the dense model, in the terminal."""

import io
import json
import re
import sys
from contextlib import chdir, redirect_stdout
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, ByT5Tokenizer, GenerationConfig

import layershed as ls
from layershed.cli import generate as generating
from layershed.cli import generate_config, prompts, sampling
from layershed.cli.lightning_cli import LayershedCLI
from layershed.errors import GenerationError, UnknownNameError
from tests.support.command_line import DATA, FILES, TRAINER, callbacks, run
from tests.support.models import build_model
from tests.support.small_world import TINY
from tests.support.thinned import one_of, some_of

pytestmark = pytest.mark.usefixtures("own_seed", "one_parser")

TEMPLATE = (
    "{% for m in messages %}{% if m.role not in ('system', 'user', 'assistant') %}{{ raise_exception('no ' + m.role) }}"
    "{% endif %}<{{ m.role }}>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)
KEEP = {"class_path": "ModelCheckpoint", "init_args": {"every_n_train_steps": 2, "save_last": True}}
DROP = {"class_path": "SublayerDrop", "init_args": {"start": 1, "count": 2, "quality_batches": 1}}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A dense model, its dropped folder, and the run of a fit that started from it; both dropped models differ."""
    folder = tmp_path_factory.mktemp("generate")
    fields = {name: value for name, value in TINY.items() if name != "model_type"}
    model = build_model("llama", **{**fields, "head_dim": 8, "num_hidden_layers": 4, "max_position_embeddings": 96})
    tokenizer = ByT5Tokenizer(extra_ids=0)
    model.save_pretrained(folder / "dense")
    tokenizer.save_pretrained(folder / "base_tokenizer")
    tokenizer.chat_template = TEMPLATE
    for name in ("dense", "tokenizer"):
        tokenizer.save_pretrained(folder / name)
    model = AutoModelForCausalLM.from_pretrained(folder / "dense")
    ls.bypass(model, [s for s in ls.find_sublayers(model) if s.name in ("attention.0", "mlp.2")])
    ls.save_pretrained(model, folder / "pruned", tokenizer=tokenizer)
    with chdir(folder), pytest.MonkeyPatch.context() as patch, torch.random.fork_rng(devices=[]):
        for name in ("PL_GLOBAL_SEED", "PL_SEED_WORKERS"):
            patch.setenv(name, "0")
        Path("text.txt").write_text(FILES["text.txt"])
        Path("run.yaml").write_text(callbacks(KEEP, DROP))
        words = ["fit", "--model.pretrained=dense", "--data.tokenizer=tokenizer", "--model.optimizer.lr=0.01"]
        assert run([*words, *DATA, *TRAINER, "--config=run.yaml"]) == 0
        yield folder


def told(*words, code=0):
    """What generate prints; it never touches the folder of the runs."""
    runs = sorted(Path("runs").iterdir()) if Path("runs").is_dir() else []
    out = io.StringIO()
    with redirect_stdout(out):
        assert run(["generate", "--trainer.accelerator=cpu", *words]) == code
    assert (sorted(Path("runs").iterdir()) if Path("runs").is_dir() else []) == runs
    return out.getvalue()


def expected(model, text, seed=0, tokenizer="tokenizer", **options):
    """The text of transformers alone."""
    tokenizer = AutoTokenizer.from_pretrained(tokenizer)
    ids = tokenizer(text, return_tensors="pt", add_special_tokens=False).input_ids
    torch.manual_seed(seed)
    options = {"max_new_tokens": 12, "pad_token_id": 0, "eos_token_id": 1, **options}
    with torch.no_grad():
        found = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=GenerationConfig(**options))
    return shown(tokenizer.decode(found[0, ids.shape[1] :], skip_special_tokens=True))


def shown(text):
    """A terminal gets no control codes."""
    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\xa0]", "?", text)


def of_checkpoint(dense=False):
    """The trained model by hand: its weights, and the branches of what was dropped multiplied by zero."""
    content = torch.load("runs/version_0/checkpoints/last.ckpt", weights_only=True)
    model = AutoModelForCausalLM.from_pretrained("dense")
    weights = {
        k.removeprefix("model."): v
        for k, v in content["state_dict"].items()
        if k.removeprefix("model.") in model.state_dict()
    }
    model.load_state_dict(weights)
    for drop in [] if dense else content["layershed"]["dropped"]["drops"]:
        model.get_submodule(drop["path"]).register_forward_hook(
            lambda _module, _inputs, out: (out[0] * 0, *out[1:]) if isinstance(out, tuple) else out * 0
        )
    return model.eval()


@pytest.mark.parametrize("word", one_of(["last", "runs/version_0/checkpoints/last.ckpt", "--ckpt_path"]))
def test_checkpoint_of_fit_continues_a_prompt_with_the_tokenizer_of_its_run(word, place):
    named = ["--ckpt_path=last"] if word == "--ckpt_path" else [f"--model.pretrained={word}"]
    assert told(*named, "--prompt=In the", "--max_new_tokens=12") == f"In the{expected(of_checkpoint(), 'In the')}\n"


def test_saved_folder_continues_what_yaml_would_read_as_something_else(place):
    model = ls.load_pretrained("pruned")
    for text in ("[1, 2", "true"):
        found = told("--model.pretrained=pruned", f"--prompt={text}", "--max_new_tokens=12")
        assert found == f"{text}{expected(model, text)}\n", text


def test_dense_text_stands_beside_the_dropped_from_checkpoint_and_from_folder(place):
    found = told("--model.pretrained=last", "--prompt=In", "--max_new_tokens=12", "--dense").splitlines()
    dropped, dense = (expected(of_checkpoint(dense), "In") for dense in (False, True))
    assert dropped != dense
    assert [line for line in found if not line.endswith("----")] == [
        *f"In{dropped}".splitlines(),
        *f"In{dense}".splitlines(),
    ]
    assert any("the same weights with the bypass lifted" in line for line in found)

    found = told("--model.pretrained=pruned", "--prompt=In", "--max_new_tokens=12", "--dense", "dense").splitlines()
    dropped, dense = (expected(model, "In") for model in (ls.load_pretrained("pruned"), ls.load_pretrained("dense")))
    assert [line for line in found if not line.endswith("----")] == [
        *f"In{dropped}".splitlines(),
        *f"In{dense}".splitlines(),
    ]
    assert any(line.startswith("dropped: without 1 attention, 1 mlp") for line in found)


SAMPLED = {
    "temperature": {"temperature": 0.8},
    "top_k and top_p": {"top_k": 20, "top_p": 0.9},
    "min_p": {"min_p": 0.05},
    "do_sample": {"do_sample": True},
    "repetition_penalty": {"repetition_penalty": 1.5},
    "beams": {"num_beams": 3},
    "another field": {"generation": {"no_repeat_ngram_size": 2}},
}


@pytest.mark.default_cases(1)
@pytest.mark.parametrize("case", some_of(SAMPLED, 3))
def test_sampling_options_are_those_of_transformers(case, place):
    options = SAMPLED[case]
    words = [f"--{name}={json.dumps(value)}" for name, value in options.items()]
    asked = {**options, **options.get("generation", {})}
    asked.pop("generation", None)
    if asked.keys() & {"temperature", "top_k", "top_p", "min_p"}:
        asked["do_sample"] = True
    words += ["--model.pretrained=pruned", "--prompt=Once", "--max_new_tokens=12", "--seed_everything=3"]
    found = told(*words)
    assert found == f"Once{expected(ls.load_pretrained('pruned'), 'Once', seed=3, **asked)}\n"
    if asked.get("do_sample"):
        assert told(*words) == found, "the same seed"
        assert told(*words[:-1], "--seed_everything=4") != found


def test_text_of_a_prompt_does_not_depend_on_the_model_before_it(place):
    """Dropped and dense draw the same random numbers: of one model twice, the texts are equal."""
    words = ["--model.pretrained=dense", "--prompt=Once", "--max_new_tokens=12", "--temperature=2.0", "--dense=dense"]
    lines = told(*words)
    first, second = (part.split("dense: ")[0] for part in lines.split("Once")[1:])
    assert first.strip() == second.strip()


def test_prompts_of_a_file_are_continued_in_order(place):
    Path("many.txt").write_text("In the\n\nOf a\n")
    Path("many.jsonl").write_text('{"prompt": "In the"}\n"Of a"\n')
    model = ls.load_pretrained("pruned")
    wanted = [*f"In the{expected(model, 'In the')}".splitlines(), *f"Of a{expected(model, 'Of a')}".splitlines()]
    for name in ("many.txt", "many.jsonl"):
        found = told("--model.pretrained=pruned", f"--prompts={name}", "--max_new_tokens=12").splitlines()
        assert [line for line in found if not line.endswith("----")] == wanted
        assert found[0].startswith("prompt 1 of 2: In the ---")


# ---- chat ----


def test_chat_writes_the_prompt_with_the_tokenizers_template(place):
    found = told("--model.pretrained=pruned", "--prompt=Hi", "--chat", "--system=Be kind", "--max_new_tokens=12")
    text = AutoTokenizer.from_pretrained("tokenizer").apply_chat_template(
        [{"role": "system", "content": "Be kind"}, {"role": "user", "content": "Hi"}],
        tokenize=False,
        add_generation_prompt=True,
    )
    assert text == "<system>Be kind<user>Hi<assistant>"
    assert found == f"{expected(ls.load_pretrained('pruned'), text)}\n"


def test_conversations_of_a_file_keep_their_messages(place):
    rows = [{"role": "user", "content": "A"}, {"role": "assistant", "content": "B"}, {"role": "user", "content": "C"}]
    Path("talk.jsonl").write_text(json.dumps({"messages": rows, "id": 7}) + "\n")
    found = told("--model.pretrained=pruned", "--prompts=talk.jsonl", "--max_new_tokens=12")
    assert found == f"{expected(ls.load_pretrained('pruned'), '<user>A<assistant>B<user>C<assistant>')}\n"


def test_talk_at_the_terminal_remembers_what_was_said(place, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("Hi\n\nAnd\n"))
    found = told("--model.pretrained=pruned", "--chat", "--max_new_tokens=6")
    model = ls.load_pretrained("pruned")
    first = expected(model, "<user>Hi<assistant>", max_new_tokens=6)
    second = expected(model, f"<user>Hi<assistant>{first}<user>And<assistant>", max_new_tokens=6)
    assert found == f"{first}\n{second}\n"


# ---- streaming ----


def test_words_appear_while_the_text_is_generated_and_without_control_codes(place, monkeypatch):
    events = []

    class Out(io.StringIO):
        def write(self, text):
            events.append(text)
            return len(text)

    model_class = type(ls.load_pretrained("pruned"))
    forward = model_class.forward
    spoken = iter([*b"one two \x1b[31mthree four"])

    answer, speaking = generating._answer, []

    def speak(self, *args, **kwargs):
        out = forward(self, *args, **kwargs)
        if not speaking:
            return out  # the model is being proven
        events.append(None)
        out.logits[:, -1] = -1e4
        out.logits[:, -1, next(spoken) + 3] = 1e4
        return out

    monkeypatch.setattr(model_class, "forward", speak)
    monkeypatch.setattr(generating, "_answer", lambda *args: speaking.append(True) or answer(*args))
    with redirect_stdout(Out()):
        assert run(["generate", "--model.pretrained=pruned", "--prompt=Say", "--max_new_tokens=23"]) == 0
    assert "".join(filter(None, events)) == "Sayone two ?[31mthree four\n"
    halfway = events[: [index for index, event in enumerate(events) if event is None][12]]
    assert "".join(filter(None, halfway)).startswith("Sayone two "), "it was shown while the rest was not there yet"


# ---- errors ----

BAD = {
    "no prompt": ({}, "there is no prompt"),
    "two kinds of prompts": ({"prompt": "a", "file": "b.txt"}, "both prompt and prompts"),
    "system without chat": ({"prompt": "a", "system": "b"}, "needs a chat template"),
    "missing file": ({"file": "nope.txt"}, "nope.txt' cannot be read .No such file"),
    "folder": ({"file": "."}, "cannot be read .Is a directory"),
    "empty file": ({"file": ("x.txt", b"\n \n")}, "holds no prompt"),
    "no text": ({"file": ("x.txt", b"\xff\xfe\x00")}, "is no UTF-8 text"),
    "no JSON": ({"file": ("x.jsonl", b'{"prompt": "a"}\n{')}, "line 2 is not JSON"),
    "no prompt in a row": ({"file": ("x.jsonl", b'{"text": "a"}')}, "line 1 has neither"),
    "a number": ({"file": ("x.jsonl", b"7")}, "line 1 has neither"),
    "messages without roles": ({"file": ("x.jsonl", b'{"messages": [{"content": "a"}]}')}, "role and content"),
    "no messages": ({"file": ("x.jsonl", b'{"messages": []}')}, "role and content"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_prompts_are_refused_by_name(case, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    given, message = BAD[case]
    if isinstance(given.get("file"), tuple):
        name, content = given["file"]
        Path(name).write_bytes(content)
        given = {**given, "file": name}
    with pytest.raises(GenerationError, match=message):
        prompts.read_prompts(**{"prompt": None, "file": None, "chat": False, "system": None, **given})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": 0.0}, "temperature=0.0: it must be above 0.*--do_sample false"),
        ({"temperature": float("nan")}, "temperature=nan"),
        ({"top_p": 1.5}, r"top_p=1.5: it must be in \(0, 1\]"),
        ({"top_k": 0}, "top_k=0"),
        ({"max_new_tokens": 0}, "max_new_tokens=0"),
        ({"num_beams": True}, "num_beams=True"),
        ({"temperature": 0.5, "do_sample": False}, "temperature has no effect with do_sample=False"),
        ({"no_repeat_ngram": 2}, "Did you mean 'no_repeat_ngram_size'"),
    ],
)
def test_bad_sampling_is_refused_by_name(options, message):
    kind = UnknownNameError if "mean" in message else GenerationError
    with pytest.raises(kind, match=message):
        sampling.check_sampling(options)


WRONG = {
    "chat with a base model": (
        ["--model.pretrained=dense", "--data.tokenizer=base_tokenizer", "--prompt=a", "--chat"],
        "no chat template",
    ),
    "a role that the template refuses": (
        ["--model.pretrained=pruned", "--prompts=tool.jsonl"],
        "refuses a conversation of tool",
    ),
    "dense of a folder": (["--model.pretrained=pruned", "--prompt=a", "--dense"], "--dense dense"),
    "dense of a dense model": (["--model.pretrained=dense", "--prompt=a", "--dense"], "nothing is dropped"),
    "dense that is dropped": (["--model.pretrained=dense", "--prompt=a", "--dense=pruned"], "dense='pruned': it lacks"),
    "no model": (["--prompt=a"], "only random weights"),
    "no such checkpoint": (["--model.pretrained=nope.ckpt", "--prompt=a"], "'nope.ckpt': there is no such file"),
    "no run": (
        ["--model.pretrained=last", "--prompt=a", "--trainer.default_root_dir=else"],
        "no checkpoint under 'else'",
    ),
    "two checkpoints": (["--model.pretrained=a.ckpt", "--ckpt_path=b.ckpt", "--prompt=a"], "two checkpoints"),
    "a long prompt": (["--model.pretrained=pruned", f"--prompt={'a' * 96}"], "shorten the prompt"),
    "too many tokens": (["--model.pretrained=pruned", "--prompt=aaaaaa", "--max_new_tokens=91"], "to at most 90"),
    "an impossible field": (
        ["--model.pretrained=pruned", "--prompt=a", '--generation={"num_return_sequences": 3}'],
        "transformers refuses these options",
    ),
    "an empty prompt": (["--model.pretrained=pruned", "--prompt="], "no tokens"),
}


@pytest.mark.parametrize("case", some_of(WRONG, 2))
def test_impossible_generation_is_one_sentence(case, place, capsys):
    Path("tool.jsonl").write_text('{"messages": [{"role": "tool", "content": "a"}]}\n')
    words, message = WRONG[case]
    assert run(["generate", "--trainer.accelerator=cpu", *words]) == 1
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert said.startswith("error: ")
    assert message in said


def test_dense_of_a_folder_from_scratch_is_advised_from_the_checkpoint_of_its_run(place, capsys):
    model = build_model("llama", vocab_size=300)
    ls.bypass(model, ls.find_sublayers(model)[:1])
    ls.save_pretrained(model, "scratch", tokenizer=AutoTokenizer.from_pretrained("base_tokenizer"))
    words = ["--model.pretrained=scratch", "--prompt=a", "--dense"]
    assert run(["generate", "--trainer.accelerator=cpu", *words]) == 1
    said = capsys.readouterr().err
    assert "It was trained from scratch" in said
    assert said.strip().endswith("--model.pretrained last --dense")
    # and the advice works
    assert "dense: " in told("--model.pretrained=last", "--prompt=a", "--dense", "--max_new_tokens=2")


def test_bad_prompts_and_options_are_refused_before_the_model_is_loaded(place, monkeypatch, capsys):
    monkeypatch.setattr(LayershedCLI, "instantiate_classes", lambda self: pytest.fail("the model was loaded"))
    for words in (["--prompts=nope.txt"], ["--prompt=a", "--top_p=7"], ["--prompt=a", '--generation={"x": 1}'], []):
        assert run(["generate", "--model.pretrained=pruned", *words]) == 1
    assert "error: generate: " in capsys.readouterr().err


def test_checkpoint_that_was_moved_out_of_its_run_takes_the_models_tokenizer(place):
    (Path("alone") / "deep").mkdir(parents=True, exist_ok=True)
    assert generate_config._tokenizer_of_run(Path("runs/version_0/checkpoints/last.ckpt")) == "tokenizer"
    assert generate_config._tokenizer_of_run(Path("alone/deep/last.ckpt")) is None
