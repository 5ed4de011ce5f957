"""What users have in their own runs, beside a drop: each against a run by hand, or refused in one sentence.

Gradient accumulation, gradient checkpointing, another precision's quality and two transformers stand in
test_sublayer_drop.
"""

import copy
import itertools
import logging
from datetime import timedelta

import pytest
import torch
from lightning.pytorch.callbacks import (
    EarlyStopping,
    EMAWeightAveraging,
    ModelCheckpoint,
    StochasticWeightAveraging,
    WeightAveraging,
)

import layershed as ls
from layershed.callbacks import (
    ExactResume,
    Export,
    LoRARecovery,
    Quantization,
    RedundancyMonitor,
    SpeedMonitor,
    SublayerDrop,
)
from layershed.errors import AmbiguousModelError, LayershedError, ScheduleError
from tests.support.runs import (
    Foreign,
    HandRun,
    Manual,
    Save,
    Watch,
    fit_foreign,
    loader,
    ranked,
    same,
    state_of,
    unmarked,
    val_loader,
)
from tests.support.thinned import crossed, some_of

AT, COUNT, STEPS, WINDOW = 4, 3, 7, 2


def dropping(**kwargs):
    return SublayerDrop(**{"start": AT, "count": COUNT, "calibration_batches": WINDOW, "quality_batches": 2, **kwargs})


def batches(count=STEPS):
    return itertools.islice(itertools.cycle(list(loader())), count)


def keys(plan):
    return [(sublayer.block, sublayer.kind) for sublayer in plan]


def drop_by_hand(hand, steps, at=AT, window=WINDOW):
    """Let a run by hand take its steps, with the drop that the window before it asks for; the scores of that."""
    scores = None
    for step in steps:
        if step == at - window:
            hand.seen()
        if step == at:
            scores = hand.seen()
            hand.drop(ranked(scores, "joint", COUNT))
    return scores


def check(module, drop, hand, scores, rel=2e-5):
    """The same sublayers for the same reason, and the same weights to the last bit."""
    assert keys(drop.plan) == hand.dropped
    assert [entry.score for entry in drop.plan.drops] == pytest.approx([scores[key] for key in hand.dropped], rel=rel)
    assert same(dict(module.state_dict()), dict(hand.module.state_dict()))


class Groups(Foreign):
    """Weight decay for matrices alone, and a rate of its own for the embedding."""

    def configure_optimizers(self):
        embedding = self.net.get_input_embeddings().weight
        others = [parameter for parameter in self.parameters() if parameter is not embedding]
        groups = [
            {"params": [p for p in others if p.ndim > 1], "weight_decay": 0.1},
            {"params": [p for p in others if p.ndim == 1], "weight_decay": 0.0},
            {"params": [embedding], "lr": 1e-3},
        ]
        optimizer = torch.optim.AdamW(groups, lr=self.lr)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=self.steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def test_drop_with_several_param_groups_equals_a_loop_by_hand(make_trainer):
    drop = dropping()
    trainer = make_trainer(drop, max_steps=STEPS)
    module = fit_foreign(trainer, Groups())
    hand = HandRun()
    settings = Groups.configure_optimizers(hand.module)
    hand.optimizer, hand.schedule = settings["optimizer"], settings["lr_scheduler"]["scheduler"]
    check(module, drop, hand, drop_by_hand(hand, hand.train(batches())))
    assert [group["lr"] for group in trainer.optimizers[0].param_groups] == [
        group["lr"] for group in hand.optimizer.param_groups
    ]


@pytest.mark.default_cases(1)
@pytest.mark.parametrize(
    ("at", "calibrated", "window"),
    some_of([(AT, 2 * WINDOW, WINDOW), (AT, 2 * WINDOW - 1, WINDOW), (AT, 1, 1), (1, 1, 1)], 2),
)
def test_drop_with_several_manual_optimizers_equals_a_loop_by_hand(make_trainer, at, calibrated, window):
    """global_step counts the steps of both: the drop at 8 comes with the fourth batch, of the steps 7 and 8."""
    drop = dropping(start=2 * at, calibration_batches=calibrated)
    module = fit_foreign(make_trainer(drop, max_steps=2 * STEPS), Manual())
    hand, scale = HandRun(), torch.nn.Parameter(torch.ones(()))
    optimizers = [torch.optim.AdamW(hand.module.net.parameters(), lr=1e-2), torch.optim.SGD([scale], lr=1e-3)]

    def steps():
        for step, batch in enumerate(batches(), 1):
            (hand.module.loss(batch) * scale).backward()
            for parameter in hand.frozen:
                parameter.grad = None
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
            yield step

    scores = drop_by_hand(hand, steps(), at, window)
    hand.module.scale = scale
    check(module, drop, hand, scores)
    assert scale.item() != 1


@pytest.mark.default_cases(1)
@pytest.mark.parametrize(("how", "value"), [("norm", 0.3), ("value", 0.01)])
def test_drop_with_gradient_clipping_equals_a_loop_by_hand(make_trainer, how, value):
    drop = dropping()
    trainer = make_trainer(drop, max_steps=STEPS, gradient_clip_val=value, gradient_clip_algorithm=how)
    module = fit_foreign(trainer)
    clip = {"norm": torch.nn.utils.clip_grad_norm_, "value": torch.nn.utils.clip_grad_value_}[how]
    hand = HandRun()
    hand.optimizer.register_step_pre_hook(lambda *_: (clip(hand.module.parameters(), value), None)[1])
    check(module, drop, hand, drop_by_hand(hand, hand.train(batches())))
    assert not same(
        dict(module.state_dict()), dict(fit_foreign(make_trainer(dropping(), max_steps=STEPS)).state_dict())
    )


def test_drop_with_mixed_precision_equals_a_loop_by_hand(make_trainer, tmp_path):
    """Measurements under autocast are those of the model under autocast."""
    drop, monitor = dropping(), RedundancyMonitor(AT)
    module = fit_foreign(make_trainer(monitor, drop, max_steps=STEPS, precision="bf16-mixed"))
    hand = HandRun()
    loss = hand.module.loss

    def autocast(batch):
        with torch.autocast("cpu", torch.bfloat16):
            return loss(batch)

    hand.module.loss = autocast
    measured = {}

    def steps():
        for step in hand.train(batches()):
            if step == AT:  # the monitor's own step; the window of the drop is two
                caught = {key: pairs[-1:] for key, pairs in hand.captured.pairs.items()}
                kept, hand.captured.pairs = hand.captured.pairs, caught
                measured.update(hand.captured.importances())
                hand.captured.pairs = kept
            yield step

    scores = drop_by_hand(hand, steps())
    check(module, drop, hand, scores, rel=2e-2)
    rows = [line.split(",") for line in (tmp_path / "run" / "importance.csv").read_text().splitlines()[1:]]
    found = {(int(block), kind): float(value) for step, block, kind, _, value in rows if int(step) == AT}
    assert found == pytest.approx(measured, rel=2e-2)


def test_drop_keeps_a_frozen_embedding_frozen(make_trainer):
    def freeze(module):
        module.net.get_input_embeddings().requires_grad_(False)
        return module

    drop = dropping()
    module = fit_foreign(make_trainer(drop, max_steps=STEPS), freeze(Foreign()))
    hand = HandRun()
    freeze(hand.module)
    check(module, drop, hand, drop_by_hand(hand, hand.train(batches())))
    before = Foreign().net.get_input_embeddings().weight
    assert torch.equal(module.net.get_input_embeddings().weight, before)
    for recovery in (LoRARecovery(rank=2), LoRARecovery(mode="full")):
        recovered = fit_foreign(make_trainer(dropping(), recovery, max_steps=STEPS), freeze(Foreign()))
        assert torch.equal(recovered.net.get_input_embeddings().weight, before)
        assert not recovered.net.get_input_embeddings().weight.requires_grad


def test_drop_keeps_tied_weights_tied(make_trainer, tmp_path):
    drop = dropping()
    trainer = make_trainer(drop, Export(), max_steps=STEPS)
    module = fit_foreign(trainer, tie_word_embeddings=True)
    hand = HandRun(tie_word_embeddings=True)
    check(module, drop, hand, drop_by_hand(hand, hand.train(batches())))
    assert module.net.lm_head.weight is module.net.get_input_embeddings().weight
    ids = next(iter(val_loader()))["input_ids"]
    exported = ls.load_pretrained(tmp_path / "run" / "pruned")
    with torch.no_grad():
        wanted = hand.module.eval().net(input_ids=ids).logits
        assert torch.equal(exported(input_ids=ids).logits, wanted)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    again = Foreign(tie_word_embeddings=True)
    ls.load_checkpoint(again, tmp_path / "a.ckpt")
    with torch.no_grad():
        assert torch.equal(again.eval().net(input_ids=ids).logits, wanted)


class Two(Foreign):
    """A model that learns, and another one beside it."""

    def __init__(self):
        super().__init__()
        self.teacher = Foreign().net.requires_grad_(False)


NAMELESS = {
    "RedundancyMonitor": lambda **kwargs: [RedundancyMonitor(2, **kwargs)],
    "SublayerDrop": lambda **kwargs: [dropping(**kwargs)],
    "SpeedMonitor": lambda **kwargs: [dropping(transformer="net"), SpeedMonitor(8, 2, runs=1, **kwargs)],
    "Quantization": lambda **kwargs: [
        dropping(transformer="net"),
        Quantization(**kwargs),
        LoRARecovery(rank=2, finish="adapter", transformer="net"),
    ],
    "LoRARecovery": lambda **kwargs: [dropping(transformer="net"), LoRARecovery(rank=2, **kwargs)],
    "Export": lambda **kwargs: [dropping(transformer="net"), Export(**kwargs)],
}


@pytest.mark.default_cases(1)
@pytest.mark.parametrize("name", NAMELESS)
def test_two_transformers_require_a_name(make_trainer, name):
    module, seen = Two(), Watch(lambda *_: None)
    with pytest.raises(AmbiguousModelError, match="net, teacher"):
        fit_foreign(make_trainer(*NAMELESS[name](), seen, max_steps=STEPS), module)
    assert seen.seen == []
    teacher = {key: value.clone() for key, value in module.teacher.state_dict().items()}
    module = Two()
    fit_foreign(make_trainer(*NAMELESS[name](transformer="net"), seen, max_steps=STEPS), module)
    assert len(seen.seen) == STEPS
    assert same(dict(module.teacher.state_dict()), teacher)
    assert ls.bypassed_sublayers(module.teacher) == ()
    assert len(ls.bypassed_sublayers(module.net)) == (0 if name == "RedundancyMonitor" else COUNT)


class Averaged:
    """The exponential moving average of everything that a run by hand trains."""

    def __init__(self, decay):
        self.decay, self.values = decay, None

    def update(self, module):
        state = dict(module.state_dict())
        if self.values is None:
            self.values = copy.deepcopy(state)
        self.values = {k: self.decay * v + (1 - self.decay) * state[k] for k, v in self.values.items()}


DECAY = 0.7
EMA = {"ema": lambda: EMAWeightAveraging(decay=DECAY), "mean": lambda: WeightAveraging()}
AVERAGES = [
    pytest.param(EMA["ema"], id="ema"),
    pytest.param(lambda: StochasticWeightAveraging(1e-3, swa_epoch_start=1), id="swa"),
]


def test_weight_average_follows_a_drop(make_trainer, tmp_path):
    """Validation, the end and the checkpoint use the dropped average; training continues with the weights."""
    drop, noted = dropping(), []

    class Noting(Foreign):
        def on_validation_end(self):
            noted.append(self.trainer.callback_metrics["val_loss"].item())

    trainer = make_trainer(EMA["ema"](), drop, Save(tmp_path / "a.ckpt", STEPS), max_steps=STEPS, val_check_interval=5)
    module = fit_foreign(trainer, Noting())
    hand, average = HandRun(), Averaged(DECAY)

    def lose():
        state = copy.deepcopy(hand.module.state_dict())
        hand.module.load_state_dict(unmarked(average.values))
        loss, _ = hand.quality(val_loader())
        hand.module.load_state_dict(unmarked(state))
        return loss

    losses = []

    def steps():
        for step in hand.train(batches()):
            average.update(hand.module)
            if step == 5:
                losses.append(lose())
            yield step

    scores = drop_by_hand(hand, steps())
    assert noted == pytest.approx(losses, rel=1e-5)
    assert keys(drop.plan) == hand.dropped
    assert [entry.score for entry in drop.plan.drops] == pytest.approx([scores[k] for k in hand.dropped], rel=2e-5)
    content = torch.load(tmp_path / "a.ckpt", weights_only=True)
    assert same(content["current_model_state"], dict(hand.module.state_dict()))
    torch.testing.assert_close(unmarked(module.state_dict()), unmarked(average.values))
    hand.module.load_state_dict(unmarked(average.values))
    assert drop.quality["end"].loss == pytest.approx(hand.quality(itertools.islice(val_loader(), 2))[0], rel=1e-5)
    loaded = Foreign()
    ls.load_checkpoint(loaded, tmp_path / "a.ckpt")
    ids = next(iter(val_loader()))["input_ids"]
    with torch.no_grad():
        torch.testing.assert_close(
            loaded.eval().net(input_ids=ids).logits, hand.module.eval().net(input_ids=ids).logits
        )
    with pytest.raises(RuntimeError, match="are dropped; load with"):
        Foreign.load_from_checkpoint(tmp_path / "a.ckpt")


@pytest.mark.default_cases(1)
@pytest.mark.filterwarnings("ignore:The dirpath has changed:UserWarning")
@pytest.mark.parametrize(("kind", "start"), crossed(EMA, (4, 8)))
def test_weight_average_resumed_equals_uninterrupted(make_trainer, tmp_path, kind, start):
    """An epoch has six steps: it ends after the drop, or before it."""

    def run(name, ckpt_path=None):
        drop, average = dropping(start=start), EMA[kind]()
        every = ModelCheckpoint(tmp_path / name, filename="{step}", save_top_k=-1, save_on_train_epoch_end=True)
        trainer = make_trainer(ExactResume(), average, drop, every, name=name, enable_checkpointing=True, max_steps=12)
        module = Foreign()
        trainer.fit(module, loader(), val_loader(), ckpt_path=ckpt_path)
        return state_of(trainer, module), dict(average._average_model.state_dict()), drop.plan, drop.quality

    whole = run("whole")
    assert same(run("resumed", tmp_path / "whole" / "step=6.ckpt"), whole)
    assert len(whole[2].drops) == COUNT


@pytest.mark.parametrize("average", AVERAGES)
def test_weight_average_listed_after_the_drop_is_refused(make_trainer, average):
    module = Foreign()
    with pytest.raises(ScheduleError, match=r"List .* before it"):
        fit_foreign(make_trainer(dropping(), average(), max_steps=STEPS), module)
    assert ls.bypassed_sublayers(module) == ()


@pytest.mark.parametrize("average", AVERAGES)
@pytest.mark.parametrize("ours", ["LoRARecovery", "Quantization"])
def test_weight_average_with_adapters_or_quantization_is_refused(make_trainer, ours, average):
    own = [dropping(), *([Quantization()] if ours == "Quantization" else []), LoRARecovery(rank=2, finish="adapter")]
    with pytest.raises(ScheduleError, match=f"{ours}: a weight average"):
        fit_foreign(make_trainer(average(), *own, max_steps=STEPS))


def test_early_stopping_by_a_module_metric_works_with_a_drop(make_trainer):
    """It stops where the run without a drop stops; a missed drop is warned of."""
    found = []
    for own in ([], [dropping(quality_batches=0)]):
        stopping = EarlyStopping("val_loss", patience=1, min_delta=10.0)
        trainer = make_trainer(*own, stopping, max_steps=30, val_check_interval=3)
        fit_foreign(trainer)
        found.append(trainer.global_step)
    assert found == [6, 6]
    stopping = EarlyStopping("val_loss", patience=1, min_delta=10.0)
    trainer = make_trainer(dropping(start=9), stopping, max_steps=30, val_check_interval=3)
    with pytest.warns(UserWarning, match="ended at step 6, so the drop at step 9 never happened"):
        fit_foreign(trainer)


@pytest.mark.default_cases(1)
@pytest.mark.parametrize(("strict", "interval", "looks"), [(True, 5, [5, 10]), (False, 2, [4, 6])])
def test_early_stopping_by_the_loss_after_a_drop_works(make_trainer, strict, interval, looks):
    """Rounds at 3, 6 and 9, none better than the one before by the monitored metric."""
    drop = dropping(start=3, count=1, every_n_steps=3, rounds=4)
    losses = Watch(lambda trainer, _: trainer.callback_metrics.get("drop/loss_after"))
    stopping = EarlyStopping("drop/loss_after", patience=1, min_delta=10.0, strict=strict)
    trainer = make_trainer(drop, losses, stopping, max_steps=20, val_check_interval=interval)
    with pytest.warns(UserWarning, match=f"ended at step {looks[1]}, so the drop at step"):
        fit_foreign(trainer, train=loader(20))
    assert trainer.global_step == looks[1]
    assert stopping.best_score == dict(losses.seen)[looks[0]]
    assert drop.quality["after"].loss == pytest.approx(dict(losses.seen)[looks[1]].item())


WATCHERS = {
    "stopping, epochs": (lambda: EarlyStopping("drop/loss_after"), {}, "first looks after 6 steps.*at step 8"),
    "stopping, steps": (lambda: EarlyStopping("speed/decode_speedup"), {"val_check_interval": 3}, "after 3 steps"),
    "accumulated": (lambda: EarlyStopping("drop/mlp"), {"accumulate_grad_batches": 2}, "strict=False"),
    "checkpoint": (lambda: ModelCheckpoint(monitor="drop/loss_after"), {}, "after 6 steps"),
    "checkpoint, steps": (
        lambda: ModelCheckpoint(monitor="drop/loss_after", every_n_train_steps=4),
        {},
        r"after 4 steps.*every_n_train_steps\), drop sooner\.",
    ),
    "at the end": (lambda: ModelCheckpoint(monitor="drop/loss_end"), {}, "Monitor drop/loss_after instead"),
}


@pytest.mark.parametrize("case", WATCHERS)
def test_monitor_that_looks_before_the_drop_is_refused_before_training(make_trainer, case):
    watcher, options, match = WATCHERS[case]
    seen = Watch(lambda *_: None)
    with pytest.raises(ScheduleError, match=match) as caught:
        fit_foreign(make_trainer(dropping(start=8), watcher(), seen, enable_checkpointing=True, **options))
    assert isinstance(caught.value, LayershedError)
    assert "\n" not in str(caught.value)
    assert seen.seen == []


class Stopping(EarlyStopping):
    """Notes when it looks, and stops nothing."""

    def _run_early_stopping_check(self, trainer):
        self.looked = [*getattr(self, "looked", []), trainer.global_step]


class Saving(ModelCheckpoint):
    """Notes when it looks, and saves nothing."""

    def _save_topk_checkpoint(self, trainer, monitor_candidates):
        self.looked = [*getattr(self, "looked", []), trainer.global_step]


LOOKS = {  # an epoch has 6 batches
    "stopping": (EarlyStopping, {}, {}),
    "stopping, epoch's end": (EarlyStopping, {"check_on_train_epoch_end": True}, {"val_check_interval": 4}),
    "stopping, validation": (EarlyStopping, {"check_on_train_epoch_end": False}, {"val_check_interval": 4}),
    "stopping, accumulated": (EarlyStopping, {}, {"val_check_interval": 3, "accumulate_grad_batches": 2}),
    "stopping, second epoch": (EarlyStopping, {}, {"check_val_every_n_epoch": 2, "accumulate_grad_batches": 4}),
    "stopping, across epochs": (EarlyStopping, {}, {"val_check_interval": 8, "check_val_every_n_epoch": None}),
    "saving, epoch's end": (ModelCheckpoint, {"save_on_train_epoch_end": True}, {"val_check_interval": 4}),
    "saving, validation": (ModelCheckpoint, {}, {"val_check_interval": 4}),
    "saving, two epochs": (ModelCheckpoint, {"every_n_epochs": 2}, {}),
    "saving, validation in two": (ModelCheckpoint, {"every_n_epochs": 2}, {"val_check_interval": 2}),
    "saving, every second and third": (
        ModelCheckpoint,
        {"every_n_epochs": 2},
        {"check_val_every_n_epoch": 3, "max_steps": 40},
    ),
    "saving, across epochs": (
        ModelCheckpoint,
        {"every_n_epochs": 2},
        {"val_check_interval": 4, "check_val_every_n_epoch": None},
    ),
}


QUICK = {"stopping", "saving, across epochs"}


@pytest.mark.default_cases(1)
@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=() if case in QUICK else pytest.mark.slow) for case in LOOKS]
)
def test_monitor_may_look_at_the_step_of_the_drop_but_not_one_before(make_trainer, case):
    """When it first looks, Lightning says in a run without a drop."""
    kind, arguments, options = LOOKS[case]
    options = {"enable_checkpointing": True, "max_steps": 20, **options}
    spy = {EarlyStopping: Stopping, ModelCheckpoint: Saving}[kind](monitor="drop/mlp", **arguments)
    fit_foreign(make_trainer(spy, **options))
    first = spy.looked[0]
    with pytest.raises(ScheduleError, match=f"first looks after {first} steps"):
        fit_foreign(
            make_trainer(dropping(start=first + 1), kind(monitor="drop/mlp", **arguments), name="after", **options)
        )
    watcher = kind(monitor="drop/mlp", **arguments)
    drop = dropping(start=first, quality_batches=0, calibration_batches=1)
    fit_foreign(make_trainer(drop, watcher, name="at", **options))
    assert drop.plan is not None
    found = watcher.best_score if kind is EarlyStopping else watcher.best_model_score
    assert found == sum(sublayer.kind == "mlp" for sublayer in drop.plan)


NEVER = {
    "by the clock": (lambda: ModelCheckpoint(monitor="drop/mlp", train_time_interval=timedelta(days=1)), {}),
    "no validation": (
        lambda: EarlyStopping("drop/mlp", check_on_train_epoch_end=False),
        {"limit_val_batches": 0},
    ),
}


@pytest.mark.default_cases(1)
@pytest.mark.parametrize("case", NEVER)
def test_monitor_that_never_looks_is_allowed(make_trainer, case):
    watcher, options = NEVER[case]
    drop = dropping(start=8, quality_batches=0)
    fit_foreign(make_trainer(drop, watcher(), enable_checkpointing=True, **options))
    assert drop.plan is not None


METRICS = ["drop/loss_after", "drop/attention", "importance/attention_mean", "importance/mlp.1", "speed/decode_speedup"]


def test_checkpoint_can_monitor_every_published_metric(make_trainer, tmp_path):
    """The best of those looked at, after the drop at 3: rounds at 3, 5 and 7."""
    drop = dropping(start=3, count=1, every_n_steps=2, rounds=3)
    own = [RedundancyMonitor(1), drop, SpeedMonitor(8, 2, runs=1)]
    values = Watch(lambda trainer, _: {metric: trainer.callback_metrics.get(metric) for metric in METRICS})
    keepers = {
        metric: ModelCheckpoint(
            tmp_path / str(place), filename="{step}", monitor=metric, mode="max", every_n_train_steps=3
        )
        for place, metric in enumerate(METRICS)
    }
    trainer = make_trainer(*own, values, *keepers.values(), enable_checkpointing=True, max_steps=9)
    fit_foreign(trainer)
    for place, (metric, keep) in enumerate(keepers.items()):
        looked = {step: seen[metric].item() for step, seen in values.seen if step in (3, 6, 9)}
        best = max(looked, key=looked.get)
        assert keep.best_model_score.item() == looked[best], metric
        assert keep.best_model_path == str(tmp_path / str(place) / f"step={best}.ckpt")
        assert len(set(looked.values())) > 1 or metric == "drop/attention"


def test_published_metrics_outlive_the_end_of_an_epoch(make_trainer):
    """Lightning forgets the metrics that the module logged. Published ones stay until the end of the next epoch."""
    stays = Watch(lambda trainer, _: trainer.callback_metrics.get("drop/loss_after"))
    drop = dropping()
    fit_foreign(make_trainer(drop, stays, max_steps=15))
    seen = dict(stays.seen)
    assert seen[3] is None
    assert {seen[step].item() for step in range(4, 16)} == {seen[4].item()}


class Silent(Foreign):
    """Under torch.compile(module) Lightning's own self.log does not compile with this torch."""

    def training_step(self, batch, batch_idx):
        return self.loss(batch)

    def validation_step(self, batch, batch_idx):
        self.loss(batch)


def inside(module, backend):
    module.net.compile(backend=backend)
    return module


COMPILED = {
    "torch.compile(module)": lambda module, backend: torch.compile(module, backend=backend),
    "module.net.compile()": inside,
}


@pytest.fixture
def counted():
    """How many graphs torch has compiled."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield torch._dynamo.utils.counters
    torch._dynamo.reset()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf Tensor:UserWarning")
@pytest.mark.parametrize("how", sorted(COMPILED))
def test_compiled_model_is_measured_and_dropped_as_uncompiled(make_trainer, tmp_path, counted, caplog, how):
    """Measured at 3; one drop at 4; the graph of the dropped model is another one."""
    found = {}
    for name in ("plain", "compiled"):
        drop, monitor = dropping(), RedundancyMonitor(3)
        module = Silent(num_hidden_layers=2)
        graphs = Watch(lambda *_: counted["stats"]["unique_graphs"])
        fitted = COMPILED[how](module, "eager") if name == "compiled" else module
        trainer = make_trainer(monitor, drop, graphs, max_steps=AT + 1, name=name)
        with caplog.at_level(logging.WARNING, "torch._dynamo"):
            torch.manual_seed(7)
            trainer.fit(fitted, loader(), val_loader())
        rows = [line.rsplit(",", 1) for line in (tmp_path / name / "importance.csv").read_text().splitlines()[1:]]
        rows = {key: float(value) for key, value in rows}
        found[name] = drop.plan, rows, dict(module.state_dict()), drop.quality, graphs.seen
    plain, compiled = found["plain"], found["compiled"]
    assert keys(compiled[0]) == keys(plain[0])
    assert compiled[1] == pytest.approx(plain[1], rel=1e-5)
    assert {step for step, _ in (key.split(",")[:2] for key in compiled[1])} == {"3"}
    torch.testing.assert_close(compiled[2], plain[2], rtol=1e-5, atol=3e-5)  # AdamW enlarges rounding
    for when, quality in plain[3].items():
        assert compiled[3][when].loss == pytest.approx(quality.loss, rel=1e-5)
    graphs = dict(compiled[4])
    assert 0 < graphs[1] < graphs[3]
    assert graphs[AT] < graphs[AT + 1]
    assert graphs[AT] <= 12  # were what measures compiled as well, it would be 24
    assert "recompile_limit" not in caplog.text
