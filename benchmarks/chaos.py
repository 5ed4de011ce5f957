"""Does a run that is killed again and again end as the run that was left alone? Bit for bit, or it says where not.

    python benchmarks/chaos.py --rounds 4

One-shot and iterative drops, LoRA recovery and nf4 at the drop, each with our CausalLM by the command line and with a
LightningModule that knows nothing of layershed. Every train loader has a state; the runs with a plain DataLoader went
together with the reading of its epoch again. SIGKILL at a random time, and at every place of the writing of a
checkpoint; then again with --ckpt_path last, until the run is done.
Compared are weights, optimizer, schedule, plan, qualities, the logged metrics by step (over all segments),
importance.csv and drop_plan.json. Some minutes on two cores.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # the cases stand beside the tests, which try some of them

from jsonargparse import auto_cli

from tests.support.chaos import main

if __name__ == "__main__":
    auto_cli(main, as_positional=False)
