"""The running metrics against one float64 mean over all tokens at once, in one process and in two."""

import copy
import math
import pickle
import warnings
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from torch.nn.functional import cosine_similarity

from layershed.errors import LayershedError, UnknownNameError
from layershed.importance.metrics import (
    METRICS,
    Angular,
    CosineImportance,
    ImportanceMetric,
    RelativeMagnitude,
    get_metric,
)
from layershed.importance.running_sums import PassSums
from layershed.importance.tracker import estimate_importance
from tests.support.forked import fork_server
from tests.support.models import build_model

FORMULAS = {
    CosineImportance: lambda x, b: 1 - cosine_similarity(x, x + b, dim=-1),
    RelativeMagnitude: lambda x, b: b.norm(dim=-1) / x.norm(dim=-1),
    Angular: lambda x, b: torch.arccos(cosine_similarity(x, x + b, dim=-1)) / torch.pi,
}
metrics = pytest.mark.parametrize("metric_class", list(FORMULAS))


def batch(seed, *shape):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, 16, generator=generator), torch.randn(*shape, 16, generator=generator)


def per_token(metric_class, x, b):
    return FORMULAS[metric_class](x.double(), b.double())


def assert_equal(metric, expected):
    # torchmetrics squeezes what has one element, so that a metric of one branch may give a scalar
    values = metric.compute().reshape(-1)
    torch.testing.assert_close(values, torch.tensor(expected, dtype=torch.float64), rtol=1e-5, atol=0)


@metrics
def test_importance_metric_over_batches_equals_the_mean_over_all_tokens(metric_class):
    batches = [batch(0, 2, 7), batch(1, 5), batch(2, 3, 1), batch(3, 1, 40)]
    metric = metric_class()
    for x, b in batches:
        metric.update(x, b)
    tokens = torch.cat([per_token(metric_class, x, b).flatten() for x, b in batches])
    assert_equal(metric, [tokens.mean().item()])


@metrics
def test_importance_metric_leaves_masked_tokens_out_even_if_they_are_nan(metric_class):
    metric, tokens = metric_class(), []
    for seed in range(3):
        x, b = batch(seed, 2, 6)
        mask = torch.rand(2, 6, generator=torch.Generator().manual_seed(seed)) > 0.4
        tokens.append(per_token(metric_class, x, b)[mask])
        x[~mask] = torch.nan
        # OPT and its kin flatten (batch, tokens) on the way: the mask follows
        metric.update(x, b, mask) if seed else metric.update(x.flatten(0, 1), b.flatten(0, 1), mask.long())
    assert_equal(metric, [torch.cat(tokens).mean().item()])


@metrics
def test_importance_metric_keeps_several_branches_apart(metric_class):
    metric, expected = metric_class(num_branches=3), []
    for index in range(3):
        x, b = batch(index, 4, 5 + index)
        expected.append(per_token(metric_class, x, b).mean().item())
        metric.update(x, b, index=index)
    assert_equal(metric, expected)


def test_importance_metric_of_a_branch_without_tokens_is_nan():
    metric = CosineImportance(num_branches=2)
    x, b = batch(0, 3)
    metric.update(x, b, index=1)
    assert metric.compute().isnan().tolist() == [True, False]


@metrics
def test_reset_metric_forgets_earlier_tokens(metric_class):
    metric = metric_class()
    metric.update(*batch(0, 9))
    metric.reset()
    x, b = batch(1, 4)
    metric.update(x, b)
    assert_equal(metric, [per_token(metric_class, x, b).mean().item()])


def test_computing_a_metric_midway_changes_nothing():
    metric, (x, b), (x2, b2) = CosineImportance(), batch(0, 3), batch(1, 8)
    metric.update(x, b)
    metric.compute()
    metric.update(x2, b2)
    tokens = torch.cat([per_token(CosineImportance, x, b), per_token(CosineImportance, x2, b2)])
    assert_equal(metric, [tokens.mean().item()])


def test_importance_metric_adds_small_values_to_a_large_sum_exactly():
    """In float32 a sum that has reached 10^7 swallows every further 0.3."""
    metric = RelativeMagnitude()
    metric.total += 1e7
    metric.tokens += 1e6
    x, b = torch.ones(1, 4), torch.full((1, 4), 0.3)
    for _ in range(100):
        metric.update(x, b)
    assert_equal(metric, [(1e7 + 100 * 0.3) / (1e6 + 100)])
    assert (metric.total - 1e7).item() == pytest.approx(30, rel=1e-6)


@pytest.mark.parametrize(
    "cast",
    [lambda m: m.float(), lambda m: m.half(), lambda m: torch.nn.Sequential(m).bfloat16()],
    ids=["float32", "float16", "bfloat16"],
)
def test_importance_metric_stays_float64_when_its_model_is_cast(cast):
    metric = CosineImportance()
    metric.update(*batch(0, 3))
    before = metric.total.clone()
    cast(metric)
    assert metric.total.dtype == metric.tokens.dtype == torch.float64
    assert torch.equal(metric.total, before)


def test_importance_metric_holds_two_numbers_per_branch_however_many_tokens():
    metric = CosineImportance(num_branches=5)
    for seed in range(4):
        metric.update(*batch(seed, 8, 32), index=seed)
    held = [value for value in vars(metric).values() if isinstance(value, torch.Tensor)]
    assert sum(value.numel() for value in held) == 2 * 5


@metrics
@pytest.mark.parametrize(
    "carry", [copy.deepcopy, lambda metric: pickle.loads(pickle.dumps(metric))], ids=["deepcopy", "pickle"]
)
def test_copied_importance_metric_counts_independently(metric_class, carry):
    metric, (x, b), (x2, b2) = metric_class(), batch(0, 3), batch(1, 8)
    metric.update(x, b)
    twin = carry(metric)
    twin.update(x2, b2)
    first, second = (per_token(metric_class, *pair) for pair in ((x, b), (x2, b2)))
    assert_equal(metric, [first.mean().item()])
    assert_equal(twin, [torch.cat([first, second]).mean().item()])


def test_metric_registry_finds_every_metric_by_name():
    expected = {"cosine": CosineImportance, "relative_magnitude": RelativeMagnitude, "angular": Angular}
    assert expected == METRICS
    assert get_metric("angular") is Angular


def test_unknown_metric_name_is_refused_with_the_nearest_name():
    with pytest.raises(UnknownNameError, match=r"Unknown importance metric 'cosin'\. Did you mean 'cosine'") as caught:
        get_metric("cosin")
    assert caught.value.name == "cosin"
    assert caught.value.available == ("angular", "cosine", "kl", "loss", "relative_magnitude")
    assert isinstance(caught.value, LayershedError)
    with pytest.raises(UnknownNameError, match="Available: angular, cosine, kl, loss, relative_magnitude") as caught:
        get_metric("zzz")
    assert "Did you mean" not in str(caught.value)


def test_registered_custom_metric_is_found_by_name(monkeypatch):
    class BranchSize(ImportanceMetric):
        function = staticmethod(lambda x, branch, reduction: branch.norm(dim=-1))

    monkeypatch.setitem(METRICS, "branch_size", BranchSize)
    metric = get_metric("branch_size")()
    metric.update(torch.zeros(2, 4), torch.full((2, 4), 3.0))
    assert metric.compute().item() == 6.0


SHARDS = ((11,), (2, 3))  # rank 0 sees 11 tokens, rank 1 six: the mean of the ranks' means would be wrong


def token_batches(rank):
    lengths = ((12, 5), (7,))[rank]  # two batches on one rank, one on the other
    return [{"input_ids": torch.randint(3, 97, (2, n), generator=torch.Generator().manual_seed(n))} for n in lengths]


def broken_on_one(rank):
    """Importances, and the warnings, if rank 1 has a batch of NaN beside the finite one."""
    model = build_model("llama")
    with torch.no_grad():
        model.get_input_embeddings().weight[95] = math.nan
    batches = token_batches(rank)
    if rank == 1:
        batches.insert(0, {"input_ids": torch.full((1, 6), 95)})
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        scores = estimate_importance(model, batches)
    return list(scores.values()), [str(warning.message) for warning in caught]


def _rank(rank, store, results):
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=2, timeout=timedelta(seconds=60)
    )
    try:
        values = []
        for metric_class in FORMULAS:
            metric = metric_class(num_branches=2)
            metric.update(*batch(rank, *SHARDS[rank]), index=0)
            if rank == 0:
                metric.update(*batch(7, 4), index=1)  # one rank has nothing for this branch
            values.append(metric.compute().tolist())
        scores = estimate_importance(build_model("llama"), token_batches(rank))
        results[rank] = (values, list(scores.values()), list(scores.blocks.values()), scores.tokens)
        results[rank] += (broken_on_one(rank),)
        dist.barrier()
    finally:
        dist.destroy_process_group()


def _child(store, path):
    results = {}
    _rank(1, store, results)
    torch.save(results[1], path)


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What each of two processes computed; this one is rank 0."""
    folder, results = tmp_path_factory.mktemp("ranks"), {}
    other = fork_server().Process(target=_child, args=(str(folder / "store"), str(folder / "1.pt")))
    other.start()
    try:
        _rank(0, folder / "store", results)
        other.join(60)
        assert other.exitcode == 0
    finally:
        other.kill()
    return results[0], torch.load(folder / "1.pt", weights_only=True)


def test_importance_metric_on_two_ranks_equals_one_process_over_all_tokens(ranks):
    for values, *_ in ranks:
        for metric_class, (shared, lonely) in zip(FORMULAS, values, strict=True):
            tokens = [per_token(metric_class, *batch(r, *shape)).flatten() for r, shape in enumerate(SHARDS)]
            assert shared == pytest.approx(torch.cat(tokens).mean().item(), rel=1e-5)
            assert lonely == pytest.approx(per_token(metric_class, *batch(7, 4)).mean().item(), rel=1e-5)


def test_estimated_importance_on_two_ranks_equals_one_process_over_all_batches(ranks):
    """One process is compared with stored hidden states in test_tracker.py."""
    scores = estimate_importance(build_model("llama"), token_batches(0) + token_batches(1))
    for _, values, blocks, tokens, _ in ranks:
        assert values == pytest.approx(list(scores.values()), rel=1e-6)
        assert blocks == pytest.approx(list(scores.blocks.values()), rel=1e-6)
        assert tokens == 2 * (12 + 5 + 7)
    assert ranks[0][1:] == ranks[1][1:]


def test_nan_batch_of_one_rank_is_left_out_on_both_ranks(ranks):
    for _, values, _, _, (without, told) in ranks:
        assert without == values
        assert len(told) == 1
        assert told[0].startswith("1 of 4 forward passes left out")


@metrics
def test_pass_sums_leave_out_a_pass_if_one_branch_is_not_finite(metric_class):
    """Against the mean over the tokens of the passes in which all branches are finite."""
    sums, expected = PassSums(2), ([], [])
    for seed in range(5):
        one = metric_class(2)
        for index in range(2):
            x, b = batch(10 * seed + index, 3, 4)
            if (seed, index) in {(1, 1), (3, 0)}:
                b[0, 0, 0] = math.nan if seed == 1 else math.inf
            elif seed in (0, 2, 4):
                expected[index].append(per_token(metric_class, x, b).flatten())
            one.update(x, b, index=index)
        sums.update(one)
    assert_equal(sums, [torch.cat(tokens).mean().item() for tokens in expected])
    assert sums.tokens.tolist() == [36, 36]
    assert sums.passes.tolist() == [1, 1, 3]
