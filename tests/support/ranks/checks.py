"""What must hold of the runs of two processes, each as a function that fails where it does not."""

import csv
import math
import re
from dataclasses import astuple
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

import layershed as ls
from layershed.files.checkpoint_shards import read_notes
from layershed.integration.lightning_private import supports_exact_resume
from layershed.quality import evaluate_quality
from layershed.recovery.lora import set_enabled
from tests.support.models import build_model
from tests.support.ranks import replicated, sharded
from tests.support.runs import BATCH, FORMULAS, Foreign, HandRun, same, sequences, unmarked
from tests.support.two_ranks import run_two_ranks
from tests.support.versions import EXACT_RESUME_REFUSES


def run_replicated(folder):
    """Both ranks' results under DDP, and one process's over the batches of both."""
    run_two_ranks("tests.support.ranks.ddp", folder, "replicated", timeout=600)
    return replicated_in(folder / "replicated")


def replicated_in(folder):
    """The same, of ranks that have run already."""
    ranks = [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in (0, 1)]
    one = {name: replicated.train(folder / "one", name, 1) for name in replicated.RUNS}
    return SimpleNamespace(folder=folder, ranks=ranks, one=one)


def run_sharded(folder, which):
    """Both ranks' results under FSDP2: ``every`` run, or ``some``."""
    run_two_ranks("tests.support.ranks.sharded", folder, which, timeout=600)
    return SimpleNamespace(folder=folder, ranks=[torch.load(folder / f"{rank}.pt") for rank in (0, 1)])


def same_on_both_ranks(key, found):
    first, second = (rank[key] for rank in found.ranks)
    assert same(first, second)


def close(found, wanted, rtol=1e-3, atol=1e-5):
    """Two state dicts up to float rounding; integers, such as quantized weights, may be off by one."""
    found, wanted = unmarked(found), unmarked(wanted)
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        whole = not tensor.is_floating_point()
        torch.testing.assert_close(
            found[name].double(), tensor.double(), rtol=0 if whole else rtol, atol=1 if whole else atol, msg=name
        )


def as_one_process(name, found):
    """The same plan, qualities and weights as a run over batches of twice the size."""
    two, one = found.ranks[0][name], found.one[name]
    assert two["bypassed"] == one["bypassed"]
    for when, values in one["quality"].items():
        assert two["quality"][when] == pytest.approx(values, rel=1e-4)
    scores = [[drop["score"] for drop in run["plan"]["drops"]] for run in (two, one)]
    assert scores[0] == pytest.approx(scores[1], rel=1e-4)
    close(two["state"]["weights"], one["state"]["weights"])


def scored_by_token(found):
    """The paper's formula over the tokens of both ranks, of which one has few; the mean of their means is another."""
    rows = [replicated.of_rank(rank, BATCH * replicated.STEPS) for rank in (0, 1)]
    batches = [
        {name: torch.stack([item[name] for item in own[BATCH * step : BATCH * (step + 1)]]) for name in own[0]}
        for step in range(replicated.STEPS)
        for own in rows
    ]
    masks = [batch["attention_mask"].bool() for batch in batches]
    hand, wanted, window = HandRun(accumulate=2), {}, {}
    for step in hand.train(batches):
        pairs, hand.captured.pairs = hand.captured.pairs, {}
        for key, passes in pairs.items():
            ranks = [
                FORMULAS["cosine"](x, y)[mask]
                for (x, y), mask in zip(passes, masks[2 * step - 2 : 2 * step], strict=True)
            ]
            wanted[step, key] = torch.cat(ranks).mean().item(), sum(own.mean().item() for own in ranks) / 2
            if replicated.START - replicated.WINDOW < step <= replicated.START:
                window.setdefault(key, []).extend(ranks)
        if step == replicated.START:
            scores = {key: torch.cat(tokens).mean().item() for key, tokens in window.items()}
            drops = found.ranks[0]["running"]["plan"]["drops"]
            keys = [(drop["block"], drop["kind"]) for drop in drops]
            assert [drop["score"] for drop in drops] == pytest.approx([scores[key] for key in keys], rel=1e-4)
            lowest = sorted((score, key) for key, score in scores.items() if key[1] != "block")
            assert keys == [key for _, key in lowest[: len(keys)]]
            hand.drop(keys)
    with (found.folder / "running" / "importance.csv").open() as file:
        measured = {(int(r["step"]), (int(r["block"]), r["kind"])): float(r["value"]) for r in csv.DictReader(file)}
    assert len(measured) > 12 * 4
    assert all(value == pytest.approx(wanted[key][0], rel=1e-3) for key, value in measured.items())
    assert any(abs(value - wanted[key][1]) > 0.1 * value for key, value in measured.items()), "else nothing is shown"


def quality_where_one_rank_has_no_token(found):
    loss, accuracy, tokens = astuple(evaluate_quality(Foreign(), replicated.lonely(0)))
    for rank in found.ranks:
        assert rank["lonely"] == pytest.approx((loss, accuracy, tokens))


def resumed_within_an_epoch(own, found):
    """A resumed loader with a state gives every rank the batches of the uninterrupted run."""
    if not supports_exact_resume():
        pytest.skip(EXACT_RESUME_REFUSES)
    ranks = [rank["within an epoch"][own] for rank in found.ranks]
    for runs in ranks:
        assert (runs["whole"]["batches"], runs["resumed"]["batches"]) == (9, 3)
        assert same(runs["resumed"]["seen"], runs["whole"]["seen"])
        assert same(runs["resumed"]["state"], runs["whole"]["state"])
    assert ranks[0]["whole"]["seen"] != ranks[1]["whole"]["seen"]


def checks_of_replicated():
    """All of those of DDP."""
    return {
        **{f"DDP, {name}: both ranks the same": partial(same_on_both_ranks, name) for name in replicated.RUNS},
        **{f"DDP, {name}: as one process": partial(as_one_process, name) for name in replicated.RUNS},
        "DDP: importances by the formula, over tokens": scored_by_token,
        "DDP: quality where one rank has no token": quality_where_one_rank_has_no_token,
        "DDP: resumed within an epoch, own sampler": partial(resumed_within_an_epoch, True),
        "DDP: resumed within an epoch, Lightning's sampler": partial(resumed_within_an_epoch, False),
    }


def resumed_is_whole(name, shards, cut, found):
    """Bit for bit: weights, optimizer, schedule, plan, quality, and importance.csv."""
    for rank in found.ranks:
        assert same(rank["fit", name, shards, cut], rank["fit", name, shards, None])
    written = [(found.folder / f"{name}-{shards}-{step}" / "importance.csv").read_text() for step in (None, cut)]
    assert written[0] == written[1]
    assert len(written[0].splitlines()) > 1 + 12


def by_hand(shards, found):
    """Weights and importances of a run in one process, without Lightning, layershed and shards."""
    rows = sequences(2 * BATCH * sharded.STEPS)
    batches = [
        {"input_ids": torch.stack([item["input_ids"] for item in rows[rank::2][BATCH * step : BATCH * (step + 1)]])}
        for step in range(sharded.STEPS)
        for rank in (0, 1)
    ]
    hand, seen = HandRun(accumulate=2), {}
    settings = sharded.Sharded.configure_optimizers(hand.module)
    hand.optimizer, hand.schedule = settings["optimizer"], settings["lr_scheduler"]["scheduler"]
    result = found.ranks[0]["fit", "drop", shards, None]
    for step in hand.train(batches):
        seen[step] = hand.seen()
        if step == sharded.START:
            # every step has as many tokens
            window = [seen[step - back] for back in range(sharded.WINDOW)]
            scores = {key: sum(own[key] for own in window) / sharded.WINDOW for key in window[0]}
            lowest = sorted((score, key) for key, score in scores.items() if key[1] != "block")[:3]
            drops = result["plan"]["drops"]
            assert [(drop["block"], drop["kind"]) for drop in drops] == [key for _, key in lowest]
            assert [drop["score"] for drop in drops] == pytest.approx([score for score, _ in lowest], rel=1e-4)
            hand.drop([key for _, key in lowest])
    close(result["state"]["weights"], hand.module.state_dict())
    with (found.folder / f"drop-{shards}-None" / "importance.csv").open() as file:
        measured = {(int(r["step"]), (int(r["block"]), r["kind"])): float(r["value"]) for r in csv.DictReader(file)}
    assert {step for step, _ in measured} == {2, 4, 6}
    assert all(value == pytest.approx(seen[step][key], rel=1e-3) for (step, key), value in measured.items())


def adapters_by_hand(shards, found):
    """Weights of a run in one process that never saves: adapters are there from the start, off until the drop."""
    module, result = Foreign(), found.ranks[0]["fit", "lora", shards, None]
    module.log = lambda *_, **__: None
    ls.inject_lora(module.net, rank=4)
    set_enabled(module.net, False)
    for name, parameter in module.named_parameters():
        parameter.requires_grad_("lora_" not in name)
    settings = sharded.Sharded.configure_optimizers(module)
    optimizer, rows = settings["optimizer"], sequences(2 * BATCH * sharded.STEPS)
    for step in range(sharded.STEPS):
        warm = 1.0
        if step == sharded.START:
            ls.bypass(module.net, ls.DropPlan.from_dict(result["plan"]))
            for name, parameter in module.named_parameters():
                parameter.requires_grad_("lora_" in name and ".base_layer." not in name)
            set_enabled(module.net, True)
            adapters = [parameter for parameter in module.parameters() if parameter.requires_grad]
            optimizer = torch.optim.AdamW(adapters, weight_decay=0.1)
        if step >= sharded.START:
            warm = min(1.0, (step - sharded.START + 1) / 2)
        for group in optimizer.param_groups:
            group["lr"] = warm * module.lr * (1 + math.cos(math.pi * step / module.steps)) / 2
        for rank in (0, 1):
            batch = rows[rank::2][BATCH * step : BATCH * (step + 1)]
            (module.loss({"input_ids": torch.stack([item["input_ids"] for item in batch])}) / 2).backward()
        optimizer.step()
        module.zero_grad()
    close(result["state"]["weights"], module.state_dict())


def adapter_folder_holds_the_weights(shards, found):
    """The saved LoRA of the kept sublayers, in peft's format, is that of the run."""
    result = found.ranks[0]["fit", "lora", shards, None]
    trained = {
        "base_model.model." + name.removeprefix("net.").replace(".recovery.", "."): tensor
        for name, tensor in result["state"]["weights"].items()
        if ".lora_" in name and name in result["trainable"]
    }
    saved = load_file(found.folder / f"lora-{shards}-None" / "adapter" / "adapter_model.safetensors")
    assert same(saved, trained)
    assert any("lora_B" in name and tensor.any() for name, tensor in saved.items())


def strategy_as_before(name, shards, found):
    for rank in found.ranks:
        assert rank["fit", name, shards, None]["replaced"] == []


def plain_model(found, name, shards, step):
    """The model of a run at its end, from its weights alone, adapters added in by W + s B A."""
    model = build_model().eval()
    result = found.ranks[0]["fit", name, shards, None]
    weights = {key.removeprefix("net."): tensor for key, tensor in result["state"]["weights"].items()}
    if step != sharded.STEPS:  # of a step before the drop there is the file
        file = found.folder / f"{name}-False" / f"{step}.ckpt"
        weights = {
            key.removeprefix("net."): tensor
            for key, tensor in torch.load(file, weights_only=True)["state_dict"].items()
            if key.startswith("net.")
        }
    plain = {key.replace(".base_layer.", "."): tensor for key, tensor in weights.items() if "lora_" not in key}
    for key, a in weights.items():
        if ".lora_A." in key and step == sharded.STEPS:
            b = weights[key.replace(".lora_A.", ".lora_B.")]
            base = key.split(".lora_A.")[0] + ".weight"
            plain[base] = plain[base] + 16 / 4 * b @ a
    model.load_state_dict(unmarked(plain))
    if step == sharded.STEPS:
        ls.bypass(model, ls.DropPlan.from_dict(result["plan"]))
    return model


def evaluates_to(name, shards, step, found):
    """Predictions, validation and test loss of a checkpoint are those of the dropped model in one process."""
    model = plain_model(found, name, shards, step)
    items = sequences(2 * BATCH, seed=100)
    for number, rank in enumerate(found.ranks):
        result = rank["evaluate", name, shards, step]
        ids = torch.stack([item["input_ids"] for item in items[number::2]])
        with torch.no_grad():
            logits = model(input_ids=ids).logits
        torch.testing.assert_close(result["logits"][0], logits, rtol=1e-4, atol=1e-5)
        loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).item()
        assert result["val"] == pytest.approx(loss, rel=1e-5)
        assert result["test"] == pytest.approx(loss, rel=1e-5)


def exported(name, shards, found):
    """The folder that Export gathered holds the dropped model."""
    loaded = ls.load_pretrained(found.folder / f"{name}-{shards}-None" / "pruned")
    model = plain_model(found, name, shards, sharded.STEPS)
    assert ls.dropped_sublayers(loaded) == ls.dropped_sublayers(model)
    ids = torch.stack([item["input_ids"] for item in sequences(4, seed=100)])
    with torch.no_grad():
        torch.testing.assert_close(loaded(input_ids=ids).logits, model(input_ids=ids).logits, rtol=1e-4, atol=1e-5)


def read_in_one_process(name, shards, found):
    """What FSDP2 wrote is read without it: the very weights of the run, dropped and adapted alike."""
    module, result = Foreign(), found.ranks[0]["fit", name, shards, None]
    ls.load_checkpoint(module, found.folder / f"{name}-{shards}" / f"{sharded.STEPS}.ckpt")
    assert [(own.block, own.kind) for own in ls.dropped_sublayers(module.net)] == result["bypassed"]
    assert len(result["bypassed"]) == 3
    assert same(dict(module.state_dict()), result["state"]["weights"])


def read_by_one_of_two(found):
    assert same(found.ranks[0]["alone"], found.ranks[0]["fit", "drop", True, None]["state"]["weights"])


def not_loaded_densely(name, shards, step, found):
    """Lightning skips unknown keys, so a plain load misses the weights of dropped or adapted modules."""
    drops = found.ranks[0]["fit", name, shards, None]["plan"]["drops"]
    paths = {f"net.model.layers.{d['block']}.{'self_attn' if d['kind'] == 'attention' else d['kind']}" for d in drops}
    for rank in found.ranks:
        said = rank["dense", name, shards, step]
        assert said is not None, "evaluated the dense model"
        missing = re.search(
            r"(?:Missing key in checkpoint state_dict: state_dict\.|contains a key ')([\w.]+)\.weight", said
        )
        assert missing, said
        # of adapted modules the weights have other names anyhow
        assert name != "drop" or missing[1].rpartition(".")[0] in paths, said


def former_shards_are_left(folder):
    """Whoever was killed while a folder of shards was written over another: the other one is there, byte for byte."""
    path = folder / "last.ckpt"
    assert read_notes(path)["global_step"] == 1
    names = sorted(file.name for file in path.iterdir())
    assert names == sorted(file.name for file in (folder / "first").iterdir())
    assert all((path / name).read_bytes() == (folder / "first" / name).read_bytes() for name in names)


def other_adapters_are_refused(shards, found):
    for rank in found.ranks:
        assert "has no adapters" in rank["refused", shards]["lora"]
        assert "has LoRA adapters" in rank["refused", shards]["drop"]
        assert all("List the LoRARecovery" in text for text in rank["refused", shards].values())


def checks_of_sharded(which):
    """Those for the runs that were made."""
    checks = {}
    for name, shards, cuts, evaluated, densely in {"every": sharded.EVERY, "some": sharded.SOME}[which]:
        title = f"FSDP2, {name}, {'shards' if shards else 'one file'}"
        checks[f"{title}: both ranks the same"] = partial(same_on_both_ranks, ("fit", name, shards, None))
        if name == "drop":
            checks[f"{title}: weights and importances by hand"] = partial(by_hand, shards)
        if name == "lora":
            checks[f"{title}: weights by hand"] = partial(adapters_by_hand, shards)
            checks[f"{title}: adapter folder holds them"] = partial(adapter_folder_holds_the_weights, shards)
        for step in densely:
            check = partial(not_loaded_densely, name, shards, step)
            checks[f"{title}: step {step} not loaded without layershed"] = check
        checks[f"{title}: the strategy has its own methods again"] = partial(strategy_as_before, name, shards)
        for cut in cuts:
            checks[f"{title}: resumed at step {cut}"] = partial(resumed_is_whole, name, shards, cut)
        if name in sharded.RESUMED_ONLY:
            continue
        checks[f"{title}: read in one process"] = partial(read_in_one_process, name, shards)
        for step in evaluated:
            checks[f"{title}: step {step} evaluated"] = partial(evaluates_to, name, shards, step)
        checks[f"{title}: exported"] = partial(exported, name, shards)
    checks["FSDP2, drop, shards: read by one of two"] = read_by_one_of_two
    for shards in (True, False) if which == "every" else (True,):
        checks[f"FSDP2, {'shards' if shards else 'one file'}: other adapters refused"] = partial(
            other_adapters_are_refused, shards
        )
    return checks
