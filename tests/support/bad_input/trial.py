"""Trying bad input: a world of small files, some damage to them, and what the command line answers."""

from __future__ import annotations

import hashlib
import io
import os
import re
import shutil
import sys
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from contextlib import chdir, contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path

import gguf
import torch
import yaml
from transformers import AutoConfig, AutoModelForCausalLM, ByT5Tokenizer

import layershed as ls
from layershed.cli.main import main as command_line
from layershed.planning.plan import Drop, DropPlan
from tests.support.bad_input.damage import FIT, Case
from tests.support.bad_input.files import LACKING, MODELS, PLANS
from tests.support.bad_input.runs import CALLBACKS, CHECKPOINTS, DATA, OPTIONS, PLACES, YAML
from tests.support.small_world import TEXT, TINY

CASES: Mapping[str, Case] = {
    **MODELS,
    **LACKING,
    **PLANS,
    **CHECKPOINTS,
    **DATA,
    **YAML,
    **OPTIONS,
    **CALLBACKS,
    **PLACES,
}
KEEP = {"class_path": "ModelCheckpoint", "init_args": {"dirpath": "kept", "filename": "run", "every_n_train_steps": 3}}
DROP = {"class_path": "SublayerDrop", "init_args": {"start": 2, "count": 1, "scope": "attention", "quality_batches": 0}}


@dataclass(frozen=True)
class Answer:
    """What the command line did.

    Args:
        code: Its exit code; -1 for an exception that left it.
        told: The lines on the standard error.
        changed: Names of files that are not what they were.
    """

    code: int
    told: list[str]
    changed: list[str]


def make_world(folder: Path) -> None:
    """What every case finds before the damage."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**TINY))
    model.save_pretrained(folder / "model")
    ByT5Tokenizer(extra_ids=0).save_pretrained(folder / "model")
    (folder / "text.txt").write_text(TEXT, encoding="utf-8")
    (folder / "data").mkdir()
    (folder / "data" / "letter.txt").write_text("dear reader", encoding="utf-8")
    (folder / "resume.yaml").write_text(yaml.safe_dump({"trainer": {"callbacks": [DROP, KEEP]}}), encoding="utf-8")
    last = ls.find_sublayers(model)[2]
    plan = DropPlan((Drop(last, 0.1, 3),), scope="attention", metric="cosine")
    plan.save(folder / "plan.json")
    ls.bypass(model, plan)
    ls.save_pretrained(model, folder / "dropped", plan=plan)
    _write_gguf(folder / "model.gguf")
    with chdir(folder):
        code, told = _run([*FIT, "--config=resume.yaml"])
        if code:
            raise RuntimeError(f"a good input was refused: {told}")
        shutil.rmtree("runs")
        Path("kept/run.ckpt").rename("run.ckpt")


def try_case(case: Case, world: Path) -> Answer:
    """Run a case in a folder of its own."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "case"
        shutil.copytree(world, folder)
        case.damage(folder)
        before = _snapshot(folder)
        with chdir(folder):
            code, told = _run(case.words)
        after = _snapshot(folder)
    changed = [name for name, what in before.items() if after.get(name) != what]
    # a progress bar draws over itself and is gone, and some libraries draw theirs also where nobody looks
    lines = [line for line in told.splitlines() if line and not re.search(r"\d%\|", line)]
    return Answer(code, lines, changed + [name for name in after if name.startswith("marker")])


def problems(case: Case, answer: Answer) -> Iterator[str]:
    """What is wrong with an answer."""
    sentence = answer.told[0] if answer.told else ""
    if answer.code in (0, -1):
        yield "it went through" if answer.code == 0 else "an exception left it"
    if len(answer.told) != 1:
        yield f"it says {len(answer.told)} lines"
    if not sentence.startswith("error: ") or "Traceback" in "".join(answer.told):
        yield "it says no error in a sentence"
    if missing := [words for words in case.says if words not in sentence]:
        yield f"it does not say {', '.join(missing)}"
    if answer.changed:
        yield f"it changed {', '.join(answer.changed)}"


def _run(words: list[str]) -> tuple[int, str]:
    """Exit code and standard error, as a shell would see them, however they are written."""
    with tempfile.TemporaryFile("w+", encoding="utf-8") as heard, _at_descriptor(heard.fileno()):
        with redirect_stderr(heard), redirect_stdout(io.StringIO()):
            try:
                code = command_line(words)
            except SystemExit as stop:
                code = int(stop.code or 0)
            except BaseException as error:
                heard.write(f"Traceback: {type(error).__name__}: {error}\n")
                code = -1
        heard.seek(0)
        return code, heard.read()


@contextmanager
def _at_descriptor(target: int) -> Iterator[None]:
    """What is written to descriptor 2 goes to another one."""
    sys.stderr.flush()
    kept = os.dup(2)
    os.dup2(target, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def _snapshot(folder: Path) -> dict[str, str]:
    """Every file below a folder by its content, and every folder."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "a folder"
        for path in folder.rglob("*")
    }


def _write_gguf(path: Path) -> None:
    """A GGUF file of which all weights but the embedding are missing."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(TINY["num_hidden_layers"])
    writer.add_embedding_length(TINY["hidden_size"])
    writer.add_feed_forward_length(TINY["intermediate_size"])
    writer.add_head_count(TINY["num_attention_heads"])
    writer.add_head_count_kv(TINY["num_key_value_heads"])
    writer.add_context_length(TINY["max_position_embeddings"])
    writer.add_vocab_size(TINY["vocab_size"])
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_dimension_count(8)
    writer.add_tensor("token_embd.weight", torch.zeros(259, 16).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def main() -> int:
    """Try every case; the last line says how many were answered."""
    warnings.filterwarnings("ignore", module="torch")
    answered = 0
    with tempfile.TemporaryDirectory() as place:
        world = Path(place) / "world"
        world.mkdir()
        make_world(world)
        for name, case in CASES.items():
            answer = try_case(case, world)
            found = list(problems(case, answer))
            answered += not found
            print(f"{'FAIL' if found else 'ok'}  {name}: {(answer.told or [''])[0]}")
            for problem in found:
                print(f"      {problem}")
            for line in answer.told[1:] if found else ():
                print(f"      {line}")
    print(f"{len(CASES)} bad inputs tried, {answered} answered in one sentence")
    return int(answered != len(CASES))
