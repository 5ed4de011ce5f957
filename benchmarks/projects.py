"""Try nine small projects in the manner of public ones, under both namespaces of Lightning.

    python benchmarks/projects.py [name ...]

Each project runs with the README's two lines alone, then with every callback; Quantization takes Hugging Face models
alone. It counts if both runs work, the drop happened, the outputs equal those with zeroed branches, and merged adapters
compute what the adapters did.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tests.support.projects.every import PROJECTS, trial
from tests.support.projects.project import NAMESPACES, namespace_of


def main() -> None:
    torch.set_num_threads(1)
    wanted = sys.argv[1:] or list(PROJECTS)
    works = 0
    for namespace in NAMESPACES:
        pl = namespace_of(namespace)
        for name in wanted:
            with tempfile.TemporaryDirectory() as folder:
                said = trial(name, namespace, Path(folder))
            wrong = {what: text for what, text in said.items() if text}
            works += not wrong
            like = "" if pl is None else PROJECTS[name](pl).imitates
            print(f"{namespace:18} {name:10} {'works' if not wrong else 'does not work':14} like {like}")
            for what, text in wrong.items():
                print(f"{'':18} {what}: {text}")
    print(f"{works} of {len(NAMESPACES) * len(wanted)} work")


if __name__ == "__main__":
    main()
