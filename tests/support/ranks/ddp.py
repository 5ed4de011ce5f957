"""Everything that two ranks do under DDP, in one launch: each scenario writes into a folder of its own."""

import sys
from pathlib import Path

import torch

from layershed.discovery import find
from tests.support.ranks import chats, clock, files, lora, own_quality, replicated
from tests.support.shared_proofs import prove_once

SCENARIOS = {
    "chats": chats.run,
    "replicated": replicated.run,
    "files": files.run,
    "clock": clock.run,
    "lora": lora.run,
    "own_quality": own_quality.run,
}

if __name__ == "__main__":
    torch.set_num_threads(1)
    find._prove = prove_once
    root, names = Path(sys.argv[1]), sys.argv[2:] or list(SCENARIOS)
    for name in names:
        (root / name).mkdir(exist_ok=True)
        SCENARIOS[name](root / name)
