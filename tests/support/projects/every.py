"""All nine projects by name, and their trial under a namespace of Lightning."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.support.projects import comet, demo, diffusion, glue, gpt, protein, seq2seq, speech, vision
from tests.support.projects.project import Project, namespace_of, try_everything, try_two_lines

PROJECTS: dict[str, Callable[[Any], Project]] = {
    "glue": glue.project,
    "seq2seq": seq2seq.project,
    "comet": comet.project,
    "protein": protein.project,
    "vision": vision.project,
    "gpt": gpt.project,
    "speech": speech.project,
    "demo": demo.project,
    "diffusion": diffusion.project,
}


def trial(name: str, namespace: str, folder: Path) -> dict[str, str]:
    """Try a project under a namespace: by run, an empty text if it works, else what is wrong."""
    pl = namespace_of(namespace)
    if pl is None:
        missing = f"{namespace} is not installed"
        return {"two lines": missing, "everything": missing}
    project, said = PROJECTS[name](pl), {}
    for what, attempt in (("two lines", try_two_lines), ("everything", try_everything)):
        place = folder / what.replace(" ", "_")
        place.mkdir(parents=True)
        try:
            with _quiet():
                attempt(project, pl, place)
        except Exception as error:  # any is a failure of this project, and the others go on
            said[what] = f"{type(error).__name__}: {error}"
        else:
            said[what] = ""
    return said


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what both Lightnings say about devices and the end of a fit."""
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "pytorch_lightning")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
