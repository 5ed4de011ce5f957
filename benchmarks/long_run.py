"""Does the memory of the callbacks grow over a long run?

A tiny Llama trains for 20,000 optimizer steps with every callback: importance measured at every step, the loss noted at
every step, a validation every 10; in the middle two sublayers are dropped, the rest is quantized to nf4 and adapters
take over. Every 2,000 steps it prints what the callbacks hold (their attributes and whatever hangs on those in
containers, tensors and objects of layershed, modules of the model not), the size of a checkpoint, that of
importance.csv, and the resident memory of the process, in which PyTorch and Lightning have their part.

    OMP_NUM_THREADS=1 python benchmarks/long_run.py

Seen on a shared Xeon, torch 2.13.0, 221 s of processor time. What is left is a sawtooth: a curve of the report grows to
500 points and is then halved.

          step  callbacks hold      checkpoint  importance.csv        resident
         4,000        186.6 kB        355.4 kB        965.3 kB        491.7 MB
         8,000        187.9 kB        355.6 kB          1.9 MB        491.8 MB
        12,000        206.5 kB        149.1 kB          2.7 MB        558.3 MB
        16,000        202.3 kB        148.6 kB          3.4 MB        558.3 MB
        20,000        227.4 kB        152.3 kB          4.0 MB        558.4 MB
    20,000 steps: from step 4,000 to 8,000 callbacks hold 186.6 kB -> 187.9 kB (at most 191.5 kB), checkpoint 355.4 kB
    -> 355.6 kB, resident +0.1 MB; from step 12,000 to 20,000 callbacks hold 206.5 kB -> 227.4 kB (at most 227.4 kB),
    checkpoint 149.1 kB -> 152.3 kB, resident +0.0 MB
"""

import argparse
import logging
import sys
import tempfile
import time
import warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # the run stands beside the tests, which try a short one

from layershed.formatting import short_bytes
from tests.support.long_run import LOOKS, resident, train


def main() -> None:
    """Print memory over the run."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--steps", type=int, default=20_000, help="optimizer steps; a multiple of 10")
    options = parser.parse_args()
    if options.steps < 200 or options.steps % LOOKS:
        parser.error(f"--steps {options.steps}: it must be a multiple of {LOOKS}, and at least 200")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", ".*does not have many workers|.*Checkpoint directory")
    columns = ("callbacks hold", "checkpoint", "importance.csv", "resident")
    print(f"{'step':>10}" + "".join(f"{name:>16}" for name in columns))
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        look = train(options.steps, LOOKS, folder, show=True)
    minutes = (time.perf_counter() - start) / 60
    print(f"{minutes:.1f} minutes; held at most {short_bytes(max(look.held))}; at the end {short_bytes(resident())}")
    # the drop brings adapters, and libraries that are imported for it: before and after it are two stretches
    print(f"{options.steps:,} steps: {look.between(1, 3)}; {look.between(5, 9)}")


if __name__ == "__main__":
    main()
