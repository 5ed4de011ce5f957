"""What must hold when weights are unfrozen during a run on two ranks, as functions that fail where it does not."""

from functools import partial

import torch

from tests.support.finetuned import DROPS
from tests.support.ranks import sharded_unfreezing, unfreezing
from tests.support.runs import same
from tests.support.two_ranks import run_two_ranks


def run_replicated(folder):
    """Both ranks' results under DDP."""
    return _run("tests.support.ranks.unfreezing", folder)


def run_sharded(folder):
    """Both ranks' results under FSDP2."""
    return _run("tests.support.ranks.sharded_unfreezing", folder)


def _run(module, folder):
    run_two_ranks(module, folder, timeout=900)
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in (0, 1)]


def stays_frozen(key, drop, ranks):
    """The ranks agree; dropped weights, and the base under LoRA, took part in no step and kept their values."""
    first, second = (rank[*key, None] for rank in ranks)
    assert first.get("error") is None
    assert same(first["state"], second["state"])
    assert len(first["dropped"]) == 3
    assert first["frozen"] == second["frozen"] == []
    trained = [path for path in first["trainable"] if path.startswith("backbone.")]
    assert trained
    assert all("lora_" in path for path in trained) == ("LoRA" in drop)
    if "before" not in drop:
        return
    # they were frozen from the start until the drop, or the adapters, came
    branches = tuple(
        f"backbone.model.layers.{block}.{'mlp' if kind == 'mlp' else 'self_attn'}." for block, kind in first["dropped"]
    )
    weights, compared = first["state"]["weights"], 0
    for name, wanted in unfreezing.Backbone().state_dict().items():
        if name.startswith("backbone.") and ("LoRA" in drop or name.startswith(branches)):
            module, _, end = name.rpartition(".")
            found = weights.get(name, weights.get(f"{module}.base_layer.{end}"))
            assert torch.equal(found, wanted), name
            compared += 1
    assert compared >= 9


def resumed_is_whole(key, cut, ranks):
    """Bit for bit."""
    for rank in ranks:
        assert rank[*key, None].get("error") is None
        assert same(rank[*key, cut], rank[*key, None])


def checks_of_replicated():
    """All of those of DDP."""
    return _checks("DDP", {(name, unused): name for unused in (False, True) for name in DROPS}, unfreezing)


def checks_of_sharded():
    """All of those of FSDP2."""
    return _checks("FSDP2", {run: run[1] for run in sharded_unfreezing.RUNS}, sharded_unfreezing)


def _checks(strategy, runs, scenario):
    checks = {}
    for key, drop in runs.items():
        title = f"{strategy}, unfreezing, {', '.join(_words(key))}"
        checks[f"{title}: what is dropped stays frozen"] = partial(stays_frozen, key, drop)
        for cut in scenario.CUTS:
            checks[f"{title}: resumed at step {cut}"] = partial(resumed_is_whole, key, cut)
    return checks


def _words(key):
    said = {True: "shards", False: "one file"} if len(key) == 3 else {True: "unused looked for", False: "plain"}
    return [said.get(part, part) for part in key]
