"""One run of tests/support/ranks/replicated.py on two ranks, by its name."""

import os
import sys
from pathlib import Path

import lightning.pytorch as pl
import torch

from tests.support.ranks import replicated

if __name__ == "__main__":
    torch.set_num_threads(1)
    folder, name = Path(sys.argv[1]), sys.argv[2]
    found = {name: replicated.train(folder, name, 2), "lightning": pl.__name__}
    torch.save(found, folder / f"{os.environ['RANK']}.pt")
