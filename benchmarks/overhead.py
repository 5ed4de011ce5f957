"""What does RedundancyMonitor cost a training step, and does the share grow with the tokens?

SmolLM2-135M in full under AdamW and Lightning's Trainer, in float32. In one fit per shape of batch the arms take turns
step by step: without the monitor, with it at every 10th step, with it at every step. A round is one step of each arm on
the same batch, in an order that changes; between two steps the hooks are put on or taken off, and the trainer's list
of callbacks is exchanged. A step is everything from the end of one batch to the end of the next. Ratios to the step
without are medians over the rounds with 95 % bootstrap intervals, of wall time and of processor time.

"whole" takes the steps as they are. "forward" takes the difference of what is not backward pass or optimizer, where the
monitor has no hooks and the machine most of its noise, over the whole step. For every 10th step, "direct" is the ratio
of the sums over 10 rounds, which hold one measured step each; "forward" is composed of 9 idle steps and one measured;
"pieces" too, but an idle step's part is what the idle hooks add to a forward pass over a single token, where nothing
else hides it.

    export LAYERSHED_SMOLLM2=.../SmolLM2-135M-Instruct.Q4_1.gguf
    OMP_NUM_THREADS=1 MALLOC_MMAP_THRESHOLD_=10000000000 MALLOC_TRIM_THRESHOLD_=100000000000 \
        taskset -c 1 python benchmarks/overhead.py --rounds 20

Seen on one core of a shared Xeon, the other one busy, torch 2.13.0, 17 minutes; wall time:

    idle hooks: 1.08 [1.02, 1.24] ms a forward pass; once per fit: 0.30 to 0.47 s
                         1 x 128                  1 x 512                  4 x 128                  2 x 256
    s a step             1.39                     3.92                     3.85                     3.85
    every step, whole    1.028 [1.008, 1.038]     1.029 [1.010, 1.046]     1.023 [1.004, 1.039]     1.029 [1.013, 1.037]
    every step, forward  1.030 [1.026, 1.033]     1.027 [1.020, 1.031]     1.028 [1.025, 1.031]     1.021 [1.015, 1.027]
    every 10th, direct   1.018 [1.008, 1.027]     1.010 [0.987, 1.033]     0.950 [0.910, 0.990]     0.994 [0.989, 1.000]
    every 10th, forward  1.008 [1.003, 1.013]     1.008 [1.000, 1.012]     1.008 [0.998, 1.010]     0.999 [0.994, 1.004]
    every 10th, pieces   1.004 [1.003, 1.004]     1.003 [1.002, 1.003]     1.003 [1.003, 1.003]     1.002 [1.002, 1.003]

The last line alone resolves half a percent.
"""

import argparse
import logging
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import permutations
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from smollm2 import batches, gguf_path, load
from torch import Tensor
from torch.utils.data import DataLoader

from layershed.callbacks import RedundancyMonitor
from layershed.importance.tracker import ImportanceTracker
from layershed.performance.intervals import Interval, bootstrap_interval
from layershed.training.causal_lm import CausalLM

SHAPES = (1, 128), (1, 512), (4, 128), (2, 256)  # batch size, tokens
EVERY = 10
ARMS = {"absent": 0, "every 10th": EVERY, "every": 1}
ORDERS = list(permutations(ARMS))
TEXTS = 8  # different batches
WARM_UP = 2  # rounds
IDLE_PAIRS = 100  # forward passes
CLOCKS = {"wall": time.perf_counter, "processor": time.process_time}


@dataclass
class Spans:
    """Seconds of the steps of an arm, and of their part that is neither backward pass nor optimizer."""

    whole: list[float] = field(default_factory=list)
    forward: list[float] = field(default_factory=list)


class Monitor(RedundancyMonitor):
    """One that can be taken off between two steps; it counts rounds, as it sees one step of each."""

    def should_measure(self, step: int) -> bool:
        """Of the round that the step belongs to, counted from 1."""
        return super().should_measure(-(-step // len(ARMS)))

    def switch(self, trainer: Trainer, pl_module: LightningModule, *, on: bool) -> None:
        """Put the hooks on, as if training began here, or take them off."""
        tracker = self._require_tracker()
        if on:
            tracker.attach()
            self.on_train_start(trainer, pl_module)
        else:
            tracker.detach()


class Turns(Callback):
    """Hands every step to one of the arms, and times it, last of the callbacks; the first rounds only warm up."""

    def __init__(self) -> None:
        self.monitors = {arm: Monitor(every_n_steps=every) for arm, every in ARMS.items() if every}
        self.spans = {clock: {arm: Spans() for arm in ARMS} for clock in CLOCKS}
        self.once: list[float] = []
        self.after_optimizer = AfterOptimizer()
        self._arm = ""
        self._began: dict[str, float] = {}
        self._before_backward: dict[str, float] = {}

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Let the monitors find the sublayers."""
        for monitor in self.monitors.values():
            start = time.perf_counter()
            monitor.on_fit_start(trainer, pl_module)
            self.once.append(time.perf_counter() - start)
            monitor.switch(trainer, pl_module, on=False)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin with the first arm."""
        self._next(trainer, pl_module)

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """The forward pass is done."""
        self._before_backward = read_clocks()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Stop the clocks, and start them again for the next arm."""
        ended = read_clocks()
        if trainer.global_step > WARM_UP * len(ARMS):
            for clock, end in ended.items():
                whole = end - self._began[clock]
                spans = self.spans[clock][self._arm]
                spans.whole.append(whole)
                spans.forward.append(whole - self.after_optimizer.clocks[clock] + self._before_backward[clock])
        if self._arm in self.monitors:
            self.monitors[self._arm].switch(trainer, pl_module, on=False)
        self._next(trainer, pl_module)

    def _next(self, trainer: Trainer, pl_module: LightningModule) -> None:
        turn, place = divmod(trainer.global_step, len(ARMS))
        self._arm = ORDERS[turn % len(ORDERS)][place]
        monitors = [monitor for arm, monitor in self.monitors.items() if arm == self._arm]
        for monitor in monitors:
            monitor.switch(trainer, pl_module, on=True)
        # a new list: Lightning is iterating over the old one
        trainer.callbacks = [self.after_optimizer, *monitors, self]  # type: ignore[attr-defined]
        self._began = read_clocks()


class AfterOptimizer(Callback):
    """Reads the clocks when the optimizer is done, first of the callbacks."""

    clocks: dict[str, float]

    def on_train_batch_end(self, *_: Any) -> None:
        """The optimizer is done."""
        self.clocks = read_clocks()


def read_clocks() -> dict[str, float]:
    """Seconds, by clock."""
    return {name: clock() for name, clock in CLOCKS.items()}


def fit(batch_size: int, tokens: int, rounds: int, precision: Any) -> Turns:
    """Train for so many rounds, and some to warm up."""
    texts = batches(TEXTS, batch_size=batch_size, tokens=tokens)
    rows = [{**texts[i % TEXTS], "labels": texts[i % TEXTS]["input_ids"]} for i in range(rounds + WARM_UP)]
    module = CausalLM(
        str(gguf_path()), optimizer=lambda weights: torch.optim.AdamW(weights, lr=1e-5), schedule="constant"
    )
    turns = Turns()
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            accelerator="cpu",
            precision=precision,
            max_epochs=1,
            callbacks=[turns],
            default_root_dir=folder,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(module, DataLoader([row for row in rows for _ in ARMS], batch_size=None))  # type: ignore[arg-type]
    return turns


def idle_cost() -> Interval:
    """Seconds that idle hooks add to a forward pass, however many tokens it has."""
    model = load()
    tracker = ImportanceTracker(model)
    inputs = {"input_ids": torch.zeros(1, 1, dtype=torch.long), "use_cache": False}

    def forward() -> float:
        start = time.perf_counter()
        with torch.no_grad():
            model(**inputs)
        return time.perf_counter() - start

    more = []
    for _ in range(IDLE_PAIRS + WARM_UP):
        with tracker:
            hooked = forward()
        more.append(hooked - forward())
    return bootstrap_interval(more[WARM_UP:])


def report(spans: Mapping[str, Spans], idle_hooks: Interval) -> dict[str, Interval]:
    """The figures of one clock: ratios, and milliseconds."""
    absent, tenth, every = (spans[arm] for arm in ARMS)
    rounds = range(len(absent.whole))
    idle = [i for i in rounds if (i + 1 + WARM_UP) % EVERY]
    tens = [slice(i, i + EVERY) for i in rounds[::EVERY]]
    more = [a - b for a, b in zip(every.forward, absent.forward, strict=True)]
    found = {
        "every step, whole": [every.whole[i] / absent.whole[i] for i in rounds],
        "every step, forward": [1 + more[i] / absent.whole[i] for i in rounds],
        "every step, ms more": [1000 * seconds for seconds in more],
        "idle step, whole": [tenth.whole[i] / absent.whole[i] for i in idle],
        "idle step, forward": [1 + (tenth.forward[i] - absent.forward[i]) / absent.whole[i] for i in idle],
        "every 10th, direct": [sum(tenth.whole[ten]) / sum(absent.whole[ten]) for ten in tens],
    }
    figures = {name: bootstrap_interval(values) for name, values in found.items()}
    step, measured = statistics.median(absent.whole), figures["every step, forward"]
    hooks = mapped(lambda seconds: 1 + seconds / step, idle_hooks)
    figures["every 10th, forward"] = composed(figures["idle step, forward"], measured)
    figures["every 10th, pieces"] = composed(hooks, measured)
    return figures


def composed(idle: Interval, measured: Interval) -> Interval:
    """Of 10 steps, one of them measured; the ends are those of both intervals, which is wider than 95 %."""
    pairs = zip(ends(idle), ends(measured), strict=True)
    median, low, high = (((EVERY - 1) * a + b) / EVERY for a, b in pairs)
    return Interval(median, low, high)


def mapped(function: Callable[[float], float], interval: Interval) -> Interval:
    """The interval of a rising function of the value."""
    return Interval(function(interval.median), function(interval.low), function(interval.high))


def ends(interval: Interval) -> tuple[float, float, float]:
    """As numbers, the median first."""
    return interval.median, interval.low, interval.high


def shown(figure: Interval, digits: int) -> str:
    """A median with its interval."""
    return f"{figure.median:.{digits}f} [{figure.low:.{digits}f}, {figure.high:.{digits}f}]"


def main() -> None:
    """Print the ratios of every shape."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=2 * EVERY, help="steps of each arm; a multiple of 10")
    parser.add_argument("--precision", default="32-true", help="of the Trainer, e.g. bf16-mixed")
    options = parser.parse_args()
    if options.rounds < EVERY or options.rounds % EVERY:
        parser.error(f"--rounds {options.rounds}: it must be a multiple of {EVERY}")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", ".*does not have many workers")
    print(f"{options.rounds} rounds, {options.precision}, {torch.get_num_threads()} threads")
    idle_hooks = idle_cost()
    milliseconds = mapped(lambda seconds: 1000 * seconds, idle_hooks)
    print(f"idle hooks: {shown(milliseconds, 2)} ms a forward pass")
    for batch_size, tokens in SHAPES:
        turns = fit(batch_size, tokens, options.rounds, options.precision)
        step = statistics.median(turns.spans["wall"]["absent"].whole)
        once = statistics.median(turns.once)
        print(f"\n{batch_size} x {tokens} tokens: {step:.2f} s a step without the monitor; once per fit {once:.2f} s")
        print(f"{'':22}" + "".join(f"{clock + ' time':28}" for clock in CLOCKS))
        figures = [report(spans, idle_hooks) for spans in turns.spans.values()]
        for name in figures[0]:
            line = "".join(f"{shown(found[name], 1 if 'ms' in name else 4):28}" for found in figures)
            print(f"{name:22}{line}".rstrip(), flush=True)


if __name__ == "__main__":
    main()
