"""Calibration against the plain way: run the model in float64, store X and Y of everything, then average."""

import copy
import json
import math
from contextlib import contextmanager, nullcontext

import pytest
import torch
from torch.nn.functional import cosine_similarity
from transformers import AutoModelForSeq2SeqLM, set_seed
from transformers.models.auto.configuration_auto import AutoConfig

from layershed.discovery.find import find_sublayers
from layershed.errors import CalibrationError, NotFiniteError, UnknownNameError
from layershed.importance.metrics import METRICS, ImportanceMetric
from layershed.importance.padding import Padding
from layershed.importance.running_sums import RunningSums, Skipped
from layershed.importance.taps import Taps
from layershed.importance.tracker import ImportanceTracker, estimate_importance
from layershed.planning.plan import ImportanceScores, Sublayer
from layershed.spellings import recompute_activations
from layershed.surgery import bypass, remove
from tests.support.models import build_model

# path of the blocks, and in each: attention, MLP, and the norms whose inputs are X of the one and of the other
LLAMA_LIKE = ("model.layers", "self_attn", "mlp", "input_layernorm", "post_attention_layernorm")
PATHS = {
    "llama": LLAMA_LIKE,
    "mistral": LLAMA_LIKE,
    "qwen3": LLAMA_LIKE,
    "gpt2": ("transformer.h", "attn", "mlp", "ln_1", "ln_2"),
}
FORMULAS = {
    "cosine": lambda x, y: 1 - cosine_similarity(x, y, dim=-1),
    "relative_magnitude": lambda x, y: (y - x).norm(dim=-1) / x.norm(dim=-1),
    "angular": lambda x, y: torch.arccos(cosine_similarity(x, y, dim=-1)) / math.pi,
}


def make_batch(seed, rows, length, padding=0, side="left"):
    ids = torch.randint(3, 97, (rows, length), generator=torch.Generator().manual_seed(seed))
    mask = torch.ones_like(ids)
    if padding:
        padded = slice(0, padding) if side == "left" else slice(length - padding, length)
        mask[0, padded], ids[0, padded] = 0, 0
    return {"input_ids": ids, "attention_mask": mask}


BATCHES = [make_batch(0, 2, 12, padding=5), make_batch(1, 1, 7), make_batch(2, 3, 9, padding=2, side="right")]
TOKENS = sum(int(batch["attention_mask"].sum()) for batch in BATCHES)


def plain_scores(model, batches, metric="cosine", zeroed=()):
    """By sublayer and by block, from stored float64 hidden states; ``zeroed`` branches are multiplied by zero."""
    path, attention, mlp, *norms = PATHS[model.config.model_type]
    model = copy.deepcopy(model).double().eval()
    stored = {}

    def store(key):
        return lambda _module, _args, output: stored.setdefault(key, []).append(
            (output[0] if isinstance(output, tuple) else output).detach()
        )

    def store_input(key):
        return lambda _module, args: stored.setdefault(key, []).append(args[0].detach())

    def zero(_module, _args, output):
        return (output[0] * 0, *output[1:]) if isinstance(output, tuple) else output * 0

    blocks = model.get_submodule(path)
    for i, block in enumerate(blocks):
        for k, norm in enumerate(norms):
            block.get_submodule(norm).register_forward_pre_hook(store_input((i, k)))
        block.register_forward_hook(store((i, 2)))
    for sublayer in zeroed:
        model.get_submodule(sublayer.path).register_forward_hook(zero)
    with torch.no_grad():
        for batch in batches:
            model(**batch, use_cache=False)

    masks = [batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool() for batch in batches]

    def mean(start, stop):
        pairs = zip(stored[start], stored[stop], masks, strict=True)
        return torch.cat([FORMULAS[metric](x[mask], y[mask]) for x, y, mask in pairs]).mean().item()

    sublayers = {
        Sublayer(i, kind, f"{path}.{i}.{name}"): mean((i, k), (i, k + 1))
        for i in range(len(blocks))
        for k, (kind, name) in enumerate([("attention", attention), ("mlp", mlp)])
    }
    return sublayers, {i: mean((i, 0), (i, 2)) for i in range(len(blocks))}


def measured(model, batches, compiled=None, **kwargs):
    """What a tracker says of these batches, run through ``compiled`` or the model."""
    with ImportanceTracker(model, **kwargs) as tracker:
        tracker.start()
        for batch in batches:
            (compiled or model)(**batch, use_cache=False)
        return tracker.compute()


def assert_close(scores, sublayers, blocks):
    assert dict(scores) == pytest.approx(sublayers, rel=1e-5)
    assert scores.blocks == pytest.approx(blocks, rel=1e-5)


@pytest.mark.parametrize("metric", list(FORMULAS))
def test_estimated_importance_equals_that_of_stored_hidden_states(model, metric):
    scores = estimate_importance(model, BATCHES, metric)
    assert_close(scores, *plain_scores(model, BATCHES, metric))
    assert (scores.metric, scores.tokens) == (metric, TOKENS)
    assert isinstance(scores, ImportanceScores)
    assert list(scores) == list(find_sublayers(model))


def test_estimated_importance_without_a_mask_counts_every_token(model):
    batches = [{"input_ids": batch["input_ids"]} for batch in BATCHES]
    assert_close(estimate_importance(model, batches), *plain_scores(model, batches))


def test_estimated_importance_does_not_depend_on_padding(llama):
    plain, padded = make_batch(5, 2, 8), make_batch(5, 2, 8)
    padding = {"input_ids": torch.full((2, 3), 17), "attention_mask": torch.zeros(2, 3, dtype=torch.long)}
    right = {key: torch.cat([padded[key], padding[key]], dim=1) for key in padded}
    expected = estimate_importance(llama, [plain])
    assert dict(estimate_importance(llama, [right])) == pytest.approx(expected, rel=1e-5)


def test_estimated_importance_weighs_tokens_and_not_batches_equally(llama):
    whole = {key: torch.cat([BATCHES[1][key]] * 3) for key in BATCHES[1]}
    three = estimate_importance(llama, [BATCHES[1]] * 3 + [make_batch(3, 1, 4)])
    one = estimate_importance(llama, [whole, make_batch(3, 1, 4)])
    assert dict(three) == pytest.approx(one, rel=1e-6)


def test_importance_of_a_held_transformer_equals_that_of_the_transformer(llama):
    holder = torch.nn.ModuleDict({"student": llama, "teacher": build_model("gpt2")})
    assert estimate_importance(holder, BATCHES, name="student") == estimate_importance(llama, BATCHES)


@pytest.mark.parametrize("family", ["gpt_neox", "phi", "olmo2", "gemma3_text"])
def test_block_importance_of_other_topologies_compares_block_input_with_output(family):
    """Whatever norms stand around the branches: X is the block's input and Y its output."""
    model = build_model(family)
    blocks = model.get_submodule("gpt_neox.layers" if family == "gpt_neox" else "model.layers")
    scores = estimate_importance(model, BATCHES)
    double, stored = copy.deepcopy(model).double(), []
    for block in double.get_submodule("gpt_neox.layers" if family == "gpt_neox" else "model.layers"):
        block.register_forward_hook(
            lambda _module, args, output: stored.append((args[0], output[0] if isinstance(output, tuple) else output))
        )
    with torch.no_grad():
        for batch in BATCHES:
            double(**batch, use_cache=False)
    for i in range(len(blocks)):
        own = stored[i :: len(blocks)]
        tokens = [
            FORMULAS["cosine"](x[batch["attention_mask"].bool()], y[batch["attention_mask"].bool()])
            for (x, y), batch in zip(own, BATCHES, strict=True)
        ]
        assert scores.blocks[i] == pytest.approx(torch.cat(tokens).mean().item(), rel=1e-4), i


def test_estimating_importance_runs_one_forward_pass_per_batch(model):
    seen = []
    path, *_ = PATHS[model.config.model_type]
    last = model.get_submodule(path)[-1]
    last.register_forward_hook(lambda _module, args, _output: seen.append(tuple(args[0].shape[:2])))
    estimate_importance(model, BATCHES)
    assert [shape for shape in seen if shape != (1, 4)] == [tuple(b["input_ids"].shape) for b in BATCHES]
    assert seen.count((1, 4)) <= 5  # discovery: a probe, one with a cache, and the block tried without its sublayers


def test_estimating_importance_skips_the_head(llama):
    seen = []
    llama.lm_head.register_forward_hook(lambda _module, args, _output: seen.append(args[0].shape))
    estimate_importance(llama, BATCHES)
    assert {tuple(shape[:2]) for shape in seen} == {(1, 4)}  # discovery's probes


def test_estimating_importance_changes_nothing_in_the_model(llama):
    llama.train()
    llama.model.layers[1].eval()
    llama.model.layers[0].mlp.up_proj.weight.requires_grad_(False)
    llama(**BATCHES[0], labels=BATCHES[0]["input_ids"]).loss.backward()

    def everything():
        named = dict(llama.named_parameters())
        return {
            "state": {name: tensor.tolist() for name, tensor in llama.state_dict().items()},
            "buffers": {name: tensor.tolist() for name, tensor in llama.named_buffers()},
            "gradients": {name: p.grad if p.grad is None else p.grad.tolist() for name, p in named.items()},
            "requires_grad": {name: p.requires_grad for name, p in named.items()},
            "training": {name: module.training for name, module in llama.named_modules()},
            "hooks": {n: (len(m._forward_hooks), len(m._forward_pre_hooks)) for n, m in llama.named_modules()},
            "random state": torch.get_rng_state().tolist(),
            "grad mode": torch.is_grad_enabled(),
        }

    before = everything()
    estimate_importance(llama, BATCHES)
    assert [name for name, value in everything().items() if value != before[name]] == []
    with pytest.raises(CalibrationError):
        estimate_importance(llama, [BATCHES[0], [1, 2]])
    assert [name for name, value in everything().items() if value != before[name]] == []


def test_importance_is_estimated_without_dropout(make_model):
    model = make_model("llama", attention_dropout=0.5).train()
    assert_close(estimate_importance(model, BATCHES), *plain_scores(model, BATCHES))


def test_estimated_importance_of_a_dropped_model_has_only_the_sublayers_left(model):
    found = find_sublayers(model)
    dropped = [found[0], found[3], *found[4:6]]
    sublayers, blocks = plain_scores(model, BATCHES, zeroed=dropped)
    bypass(model, dropped)
    scores = estimate_importance(model, BATCHES)
    expected = {sublayer: score for sublayer, score in sublayers.items() if sublayer not in dropped}
    assert_close(scores, expected, {block: score for block, score in blocks.items() if block != 2})
    remove(model)
    assert estimate_importance(model, BATCHES) == scores


def test_tracker_measures_the_dropped_model_after_a_bypass(llama):
    found = find_sublayers(llama)
    sublayers, blocks = plain_scores(llama, BATCHES, zeroed=found[3:4])
    with ImportanceTracker(llama) as tracker:
        tracker.start()
        llama(**BATCHES[0])
        tracker.stop()
        bypass(llama, found[3:4])
        tracker.reset()
        tracker.start()
        for batch in BATCHES:
            llama(**batch)
        assert_close(tracker.compute(), {s: v for s, v in sublayers.items() if s != found[3]}, blocks)


def test_tracker_does_not_measure_discovery_probes(llama):
    """Its probe puts random values in the place of every branch."""
    with ImportanceTracker(llama) as tracker:
        tracker.start()
        llama(**BATCHES[0])
        before = tracker.compute()
        find_sublayers(llama)
        assert tracker.compute() == before
        assert tracker.compute().tokens == before.tokens


@pytest.mark.parametrize("take", [1, 2, 3, 99])
def test_estimating_importance_takes_max_batches_from_a_generator(llama, take):
    drawn = []

    def generate():
        for batch in BATCHES:
            drawn.append(batch)
            yield batch

    scores = estimate_importance(llama, generate(), max_batches=take)
    assert len(drawn) == min(take, 3)
    assert scores == estimate_importance(llama, BATCHES[:take])


def test_estimating_importance_ignores_batch_entries_that_the_body_does_not_take(llama):
    extended = [{**batch, "labels": batch["input_ids"], "text": ["a"], "idx": torch.arange(3)} for batch in BATCHES]
    expected, given = estimate_importance(llama, BATCHES), []
    llama.model.register_forward_pre_hook(lambda _module, _args, kwargs: given.append(set(kwargs)), with_kwargs=True)
    assert estimate_importance(llama, extended) == expected
    assert given[-3:] == [{"input_ids", "attention_mask", "use_cache"}] * 3


def test_estimating_importance_takes_any_mapping_as_a_batch(llama):
    from transformers import BatchEncoding

    encoded = [BatchEncoding(batch) for batch in BATCHES]
    assert estimate_importance(llama, encoded) == estimate_importance(llama, BATCHES)


def test_estimating_importance_takes_plain_token_ids_as_a_batch(llama):
    bare = [batch["input_ids"] for batch in BATCHES]
    assert estimate_importance(llama, bare) == estimate_importance(llama, [{"input_ids": ids} for ids in bare])


@pytest.mark.parametrize(
    ("batches", "names"),
    [
        ([], "No token was seen: the batches are empty"),
        ([make_batch(0, 1, 4, padding=4)], "every token in them is padding"),
        ([{"tokens": torch.ones(1, 4)}], "mapping with input_ids.*keys tokens"),
        ([[1, 2, 3]], "mapping with input_ids.*a list"),
        ([torch.ones(1, 4)], r"mapping with input_ids.*shape \(1, 4\) and type torch.float32"),
        ([torch.ones(4, dtype=torch.long)], r"mapping with input_ids.*shape \(4,\)"),
    ],
)
def test_estimating_importance_refuses_unusable_batches(llama, batches, names):
    with pytest.raises(CalibrationError, match=names):
        estimate_importance(llama, batches)


def test_estimating_importance_refuses_an_unknown_metric_before_a_forward_pass(llama):
    llama.register_forward_pre_hook(lambda *_: pytest.fail("the model ran"))
    with pytest.raises(UnknownNameError, match="Did you mean 'cosine'"):
        estimate_importance(llama, BATCHES, "cosin")


def test_estimating_importance_refuses_a_model_without_sublayers_left(llama):
    bypass(llama, find_sublayers(llama))
    with pytest.raises(CalibrationError):
        estimate_importance(llama, BATCHES)


MARKER = 95  # a token that neither BATCHES nor discovery's probe holds


def marked(model, value=math.nan):
    """A batch that nothing finite comes of, once the marker's embedding has that value."""
    assert not any((batch["input_ids"] == MARKER).any() for batch in BATCHES)
    with torch.no_grad():
        model.get_input_embeddings().weight[MARKER] = value
    batch = make_batch(9, 2, 8)
    batch["input_ids"][1, 3] = MARKER
    return batch


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("metric", list(FORMULAS))
def test_batch_with_nan_or_infinity_is_left_out_of_the_importance_with_a_warning(llama, metric, value):
    bad = marked(llama, value)
    with pytest.warns(UserWarning, match=r"^2 of 5 forward passes left out.*first that of attention\.0\.$"):
        scores = estimate_importance(llama, [bad, *BATCHES[:2], bad, BATCHES[2]], metric)
    assert_close(scores, *plain_scores(llama, BATCHES, metric))
    assert scores.tokens == TOKENS
    finite = estimate_importance(llama, BATCHES, metric)
    assert (scores, scores.blocks) == (finite, finite.blocks)


@pytest.mark.parametrize("metric", list(FORMULAS))
def test_estimating_importance_refuses_batches_that_are_all_not_finite(llama, metric):
    """A NaN must not turn into a number that could be ranked."""
    bad = marked(llama)
    with pytest.raises(NotFiniteError, match=r"2 of 2 forward passes.*attention\.0, and nothing is left"):
        estimate_importance(llama, [bad, bad], metric)


@contextmanager
def broken_in(module):
    """NaN in one number of its output."""

    def spoil(_module, _args, output):
        spoiled = output.clone()
        spoiled[0, 2, 0] = math.nan
        return spoiled

    handle = module.register_forward_hook(spoil, prepend=True)
    yield
    handle.remove()


def test_nan_pass_counts_for_no_sublayer_of_the_tracker(llama):
    """Or the first sublayers would be averaged over other tokens than the last."""
    expected = measured(llama, BATCHES[::2])
    with ImportanceTracker(llama) as tracker:
        tracker.start()
        llama(**BATCHES[0])
        with broken_in(llama.model.layers[2].mlp):
            llama(**BATCHES[1])
        llama(**BATCHES[2])
        scores = tracker.compute()
        assert (scores, scores.blocks, scores.tokens) == (expected, expected.blocks, expected.tokens)
        assert tracker.skipped == Skipped(1, 3, "mlp.2")
        tracker.reset()
        llama(**BATCHES[0])
        tracker.compute()
        assert tracker.skipped is None
        llama(**BATCHES[0])
        tracker.reset()
        with broken_in(llama.model.layers[1].mlp):
            llama(**BATCHES[1])
        with pytest.raises(NotFiniteError, match=r"1 of 1 forward passes.*mlp\.1"):
            tracker.compute()


def test_nan_pass_under_activation_checkpointing_is_skipped_once(llama):
    llama.train()
    expected = measured(llama, BATCHES[:1])
    recompute_activations(llama, {"use_reentrant": False})
    with ImportanceTracker(llama) as tracker:
        tracker.start()
        llama(**BATCHES[0], labels=BATCHES[0]["input_ids"], use_cache=False).loss.backward()
        with broken_in(llama.model.layers[1].self_attn.o_proj):
            llama(**BATCHES[1], labels=BATCHES[1]["input_ids"], use_cache=False).loss.backward()
        assert tracker.compute() == expected
        assert tracker.skipped == Skipped(1, 2, "attention.1")


def test_nan_pass_of_an_encoder_decoder_counts_for_neither_part():
    sizes = {"vocab_size": 97, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
    config = AutoConfig.for_model("t5", decoder_start_token_id=0, **sizes)
    set_seed(0)
    model = AutoModelForSeq2SeqLM.from_config(config).eval()
    batches = [{**batch, "labels": batch["input_ids"]} for batch in BATCHES]
    expected = estimate_importance(model, batches)
    bad = marked(model)
    bad["labels"] = make_batch(4, 2, 8)["input_ids"]  # only the encoder reads the marker
    with pytest.warns(UserWarning, match=r"1 of 4 forward passes.*mlp\.0"):
        scores = estimate_importance(model, [*batches, bad])
    assert (scores, scores.blocks) == (expected, expected.blocks)


def test_tracker_state_keeps_the_number_of_skipped_passes(llama):
    with ImportanceTracker(llama) as tracker:
        tracker.start()
        llama(**BATCHES[0])
        with broken_in(llama.model.layers[0].mlp):
            llama(**BATCHES[1])
        state = json.loads(json.dumps(tracker.state_dict()))
        expected = tracker.compute()
    resumed = ImportanceTracker(llama)
    resumed.load_state_dict(state)
    assert resumed.compute() == expected
    assert resumed.skipped == tracker.skipped == Skipped(1, 2, "mlp.0")


def test_custom_metric_leaves_nan_passes_out_without_code_of_its_own(llama, monkeypatch):
    class Size(ImportanceMetric):
        """One that fills its sums in its own way."""

        def update(self, x, branch, mask=None, index=0):
            self.total[index] += branch.norm(dim=-1).sum()
            self.tokens[index] += branch[..., 0].numel()

    monkeypatch.setitem(METRICS, "size", Size)
    expected = estimate_importance(llama, BATCHES, "size")
    with pytest.warns(UserWarning, match="1 of 4 forward passes"):
        assert estimate_importance(llama, [*BATCHES, marked(llama)], "size") == expected


def test_tracker_under_inference_mode_gives_the_same_scores(llama):
    expected = estimate_importance(llama, BATCHES)
    with ImportanceTracker(llama) as tracker:
        tracker.start()
        with torch.inference_mode():
            for batch in BATCHES[:2]:
                llama(**batch)
            tracker.compute()
        llama(**BATCHES[2])
        assert tracker.compute() == expected


OWN = (Padding, RunningSums, Taps)


def token_tensors(tracker, tokens):
    """Tensors with a dimension of that length that hang on a tracker."""
    found, todo = [], [vars(tracker)]
    while todo:
        item = todo.pop()
        if isinstance(item, torch.Tensor) and tokens in item.shape:
            found.append(item)
        elif isinstance(item, dict):
            todo += item.values()
        elif isinstance(item, list | tuple | set):
            todo += item
        elif isinstance(item, OWN) or (isinstance(item, torch.nn.Module) and not hasattr(item, "config")):
            todo.append(vars(item))
    return found


def test_tracker_keeps_no_activation(llama):
    batch = make_batch(0, 2, 61, padding=3)
    with ImportanceTracker(llama) as tracker:
        tracker.start()
        llama(**batch)
        assert not any(tensor.is_floating_point() for tensor in token_tensors(tracker, 61))
    assert token_tensors(tracker, 61) == []


def test_detached_tracker_keeps_no_activation_of_a_failed_pass(llama):
    with ImportanceTracker(llama) as tracker:
        tracker.start()
        with pytest.raises(KeyError), raising_in(llama.model.layers[2].mlp):
            llama(**make_batch(0, 2, 61))
        assert any(tensor.is_floating_point() for tensor in token_tensors(tracker, 61))
    assert token_tensors(tracker, 61) == []


@contextmanager
def raising_in(module):
    def fail(*_):
        raise KeyError

    handle = module.register_forward_pre_hook(fail)
    try:
        yield
    finally:
        handle.remove()


def test_tracker_reset_after_a_failed_pass_measures_the_next_exactly(llama):
    expected = measured(llama, BATCHES[1:2])
    with ImportanceTracker(llama) as tracker:
        tracker.start()
        with pytest.raises(KeyError), raising_in(llama.model.layers[2].mlp):
            llama(**BATCHES[0])
        tracker.reset()
        llama(**BATCHES[1])
        assert tracker.compute() == expected


@pytest.mark.parametrize("reentrant", [False, True])
def test_tracker_under_activation_checkpointing_counts_each_token_once(llama, reentrant):
    llama.train()
    expected = measured(llama, BATCHES)
    recompute_activations(llama, {"use_reentrant": reentrant})
    llama.enable_input_require_grads()
    with ImportanceTracker(llama) as tracker:
        tracker.start()
        for batch in BATCHES:
            llama(**batch, labels=batch["input_ids"], use_cache=False).loss.backward()
        scores = tracker.compute()
    assert scores == expected
    assert scores.tokens == expected.tokens == TOKENS
    assert llama.model.layers[0].mlp.up_proj.weight.grad is not None


def test_tracker_in_training_mode_gives_the_scores_of_estimated_importance(model_type, make_model):
    dropout = {"resid_pdrop": 0, "embd_pdrop": 0, "attn_pdrop": 0} if model_type == "gpt2" else {}
    model = make_model(model_type, **dropout).train()
    assert_close(measured(model, BATCHES), *plain_scores(model, BATCHES))


def test_tracker_does_not_change_gradients(llama):
    llama(**BATCHES[0], labels=BATCHES[0]["input_ids"]).loss.backward()
    expected = {name: parameter.grad.clone() for name, parameter in llama.named_parameters()}
    llama.zero_grad()
    with ImportanceTracker(llama) as tracker:
        tracker.start()
        llama(**BATCHES[0], labels=BATCHES[0]["input_ids"]).loss.backward()
    assert all(torch.equal(parameter.grad, expected[name]) for name, parameter in llama.named_parameters())


def test_inactive_tracker_measures_nothing(llama):
    with ImportanceTracker(llama) as tracker:
        for batch in BATCHES:
            llama(**batch)
        assert all(sum(values) == 0 for values in tracker.state_dict().values())
        with pytest.raises(CalibrationError, match="No token was seen"):
            tracker.compute()


def test_detached_tracker_measures_nothing_and_keeps_its_sums(llama):
    tracker = ImportanceTracker(llama)
    with tracker:
        tracker.start()
        llama(**BATCHES[0])
    before = tracker.compute()
    assert not tracker.active
    with pytest.raises(CalibrationError, match=r"its hooks are not on the model\. Call attach\(\)"):
        tracker.start()
    llama(**BATCHES[1])
    assert tracker.compute() == before
    tracker.reset()
    with pytest.raises(CalibrationError):
        tracker.compute()


def test_tracker_is_inactive_after_an_error_while_measuring(llama):
    with ImportanceTracker(llama) as tracker:
        with pytest.raises(KeyError), tracker.measuring():
            raise KeyError
        assert not tracker.active


def test_tracker_leaves_out_batches_that_run_while_it_is_inactive(llama):
    with ImportanceTracker(llama) as tracker:
        for batch, active in zip(BATCHES, [True, False, True], strict=True):
            with tracker.measuring() if active else nullcontext():
                assert tracker.active == active
                llama(**batch)
            assert not tracker.active
        assert_close(tracker.compute(), *plain_scores(llama, BATCHES[::2]))


def test_tracker_counts_each_token_once_in_cached_generation_with_padding(llama):
    """The mask grows with the cache; the tokens of this pass are its last ones."""
    batch = make_batch(0, 2, 6, padding=2)
    with ImportanceTracker(llama) as tracker:
        tracker.start()
        llama.generate(**batch, max_new_tokens=3, do_sample=False, eos_token_id=None)
        assert tracker.compute().tokens == 4 + 6 + 2 * 2  # the third new token is never read


def test_tracker_state_resumes_through_json(llama):
    with ImportanceTracker(llama) as tracker:
        tracker.start()
        llama(**BATCHES[0])
        text = json.dumps(tracker.state_dict())
        llama(**BATCHES[1])
        whole = tracker.compute()
    with ImportanceTracker(llama) as resumed:
        resumed.load_state_dict(json.loads(text))
        assert json.dumps(resumed.state_dict()) == text
        resumed.start()
        llama(**BATCHES[1])
        again = resumed.compute()
    assert again == whole
    assert again.blocks == whole.blocks
    assert again.tokens == whole.tokens


def test_computing_tracker_scores_midway_changes_nothing(llama):
    with ImportanceTracker(llama) as tracker:
        tracker.start()
        for batch in BATCHES:
            llama(**batch)
            tracker.compute()
        assert tracker.compute() == measured(llama, BATCHES)


def test_estimated_importance_under_bfloat16_autocast_is_near_that_of_float64(llama):
    expected, _ = plain_scores(llama, BATCHES)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        scores = estimate_importance(llama, BATCHES)
    assert dict(scores) == pytest.approx(expected, rel=0.05)  # bfloat16 activations, three digits


@pytest.mark.slow  # tests/callbacks/test_setups.py compiles a watched model by default
def test_tracker_starts_after_torch_compile():
    model = build_model("llama", num_hidden_layers=1)
    expected = measured(model, BATCHES[:1])
    with ImportanceTracker(model) as tracker, torch.no_grad():
        compiled = torch.compile(model, backend="aot_eager")
        compiled(**BATCHES[0], use_cache=False)
        tracker.start()
        compiled(**BATCHES[0], use_cache=False)
        compiled(**BATCHES[0], use_cache=False)
        scores = tracker.compute()
    assert dict(scores) == pytest.approx(expected, rel=1e-5)
    assert scores.blocks == pytest.approx(expected.blocks, rel=1e-5)
    assert scores.tokens == 2 * expected.tokens
