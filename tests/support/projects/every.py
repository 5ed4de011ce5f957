"""All nine projects by name, and their trial under a namespace of Lightning."""

from __future__ import annotations

import logging
from collections.abc import Callable
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
    for quiet in ("lightning", "pytorch_lightning", "lightning.pytorch"):
        logging.getLogger(quiet).setLevel(logging.ERROR)
    project, said = PROJECTS[name](pl), {}
    for what, attempt in (("two lines", try_two_lines), ("everything", try_everything)):
        place = folder / what.replace(" ", "_")
        place.mkdir(parents=True)
        try:
            attempt(project, pl, place)
        except Exception as error:  # any is a failure of this project, and the others go on
            said[what] = f"{type(error).__name__}: {error}"
        else:
            said[what] = ""
    return said
