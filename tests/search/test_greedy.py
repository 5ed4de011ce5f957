"""Greedy search against trying every candidate in every round by whole passes; interrupted and resumed; refusals."""

import copy
import json

import pytest
import torch

import layershed as ls
from layershed.drop import few
from layershed.errors import SelectionError
from layershed.search.greedy import greedy_search
from tests.support.damage import damage, make_batches
from tests.support.linear_maps import random_maps
from tests.support.models import build_model


def by_trying(model, batches, count):
    """The choices of a search that measures every candidate in every round."""
    chosen = []
    for _ in range(count):
        tried = {}
        for sublayer in ls.find_sublayers(model):
            if sublayer not in chosen:
                twin = copy.deepcopy(model)
                ls.bypass(twin, [*chosen, sublayer])
                tried[sublayer] = damage(model, twin, "kl", batches)
        chosen.append(min(tried, key=tried.get))
        yield chosen[-1], tried[chosen[-1]]


def test_with_a_long_shortlist_it_is_the_search_that_tries_all():
    model, batches = build_model("llama", num_hidden_layers=3), make_batches()
    plan = greedy_search(model, batches, count=3, shortlist=6)
    expected = list(by_trying(model, batches, 3))
    assert list(plan) == [sublayer for sublayer, _ in expected]
    assert [drop.score for drop in plan.drops] == pytest.approx([value for _, value in expected], rel=1e-4)
    assert plan.metric == "kl"
    assert ls.dropped_sublayers(model) == ()


def test_every_beginning_of_a_plan_is_the_plan_for_fewer():
    model, batches = build_model("llama"), make_batches()
    assert list(greedy_search(model, batches, count=4, shortlist=2))[:2] == list(
        greedy_search(model, batches, count=2, shortlist=2)
    )


def test_a_search_of_blocks_drops_whole_blocks():
    model, batches = build_model("llama"), make_batches()
    plan = greedy_search(model, batches, "block", count=2)
    assert len(plan) == 4
    assert len({sublayer.block for sublayer in plan}) == 2


def test_sublayers_with_maps_get_the_action_linear():
    model, batches = build_model("llama"), make_batches()
    maps = random_maps([s for s in ls.find_sublayers(model) if s.kind == "mlp"], 32, rank=2)
    plan = greedy_search(model, batches, count=8, maps=maps)
    assert {(d.sublayer.kind, d.action, d.rank) for d in plan.drops} == {
        ("mlp", "linear", 2),
        ("attention", "bypass", None),
    }


def test_an_interrupted_search_goes_on_to_the_same_plan(tmp_path):
    model, batches = build_model("llama"), make_batches()
    whole = greedy_search(model, batches, count=4, shortlist=3)
    file = tmp_path / "search.json"
    greedy_search(model, batches, count=2, shortlist=3, state=file)
    passes = json.loads(file.read_text())["rounds"]["passes"]
    assert greedy_search(model, batches, count=4, shortlist=3, state=file) == whole
    assert json.loads(file.read_text())["rounds"]["passes"] > passes


def test_the_state_of_another_search_is_refused(tmp_path):
    model, batches = build_model("llama"), make_batches()
    file = tmp_path / "search.json"
    greedy_search(model, batches, count=1, state=file)
    with pytest.raises(SelectionError, match="about another search: metric differs"):
        greedy_search(model, batches, count=1, metric="loss", state=file)
    file.write_text("{")
    with pytest.raises(SelectionError, match="no state of a search"):
        greedy_search(model, batches, count=1, state=file)


def test_too_many_are_refused_and_protected_ones_stay():
    model, batches = build_model("llama"), make_batches()
    plan = greedy_search(model, batches, count=4, protect=[0, -1])
    assert {sublayer.block for sublayer in plan} == {1, 2}
    with pytest.raises(SelectionError, match="only 4 candidates"):
        greedy_search(model, batches, count=5, protect=[0, -1])


def test_the_best_method_drops_with_maps_that_fit():
    model = build_model("llama")
    generator = torch.Generator().manual_seed(3)
    batches = [{"input_ids": torch.randint(3, 97, (4, 24), generator=generator)} for _ in range(8)]
    plan = ls.drop_sublayers(model, batches, count=3, metric="kl", search="greedy", replace="linear", rank=4)
    assert [drop.action for drop in plan.drops] == ["linear"] * 3
    assert set(ls.linear_maps(model)) == set(plan)
    assert {linear_map.rank for linear_map in ls.linear_maps(model).values()} == {4}


def test_methods_that_contradict_themselves_are_refused():
    model, batches = build_model("llama"), make_batches()
    with pytest.raises(SelectionError, match="Choose kl or loss"):
        ls.drop_sublayers(model, batches, count=1, search="greedy")
    with pytest.raises(SelectionError, match="Set replace='linear'"):
        ls.drop_sublayers(model, batches, count=1, rank=4)


def test_dropping_with_folds_changes_what_lies_behind():
    model = build_model("llama")
    generator = torch.Generator().manual_seed(3)
    batches = [{"input_ids": torch.randint(3, 97, (4, 24), generator=generator)} for _ in range(8)]
    twin = copy.deepcopy(model)
    plan = ls.drop_sublayers(model, batches, "attention", count=1, replace="fold")
    ls.bypass(twin, plan)
    ls.compensate(twin, batches)
    assert all(map(torch.equal, model.state_dict().values(), twin.state_dict().values()))
    assert ls.linear_maps(model) == {}


def test_damage_is_measured_on_some_two_thousand_tokens_spread_over_the_batches():
    batches = [{"input_ids": torch.full((16, 128), n), "attention_mask": torch.ones(16, 128)} for n in range(20)]
    found = few(batches)
    assert sum(batch["input_ids"].numel() for batch in found) == 2048
    assert [int(batch["input_ids"][0, 0]) for batch in found] == [0, 2, 4, 6, 8, 10, 12, 14]
    assert all(batch["attention_mask"].shape == batch["input_ids"].shape for batch in found)
    assert [len(each) for each in few([torch.ones(3, 4096, dtype=torch.long)])[0].values()] == [1]
