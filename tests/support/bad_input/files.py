"""Half the table of benchmarks/bad_input.py: models, dropped folders and plans, damaged or contradicting themselves.

Each case says what is wrong, how it is asked for, and what the sentence must contain.
"""

from __future__ import annotations

import json
import pickle
from collections.abc import Mapping
from typing import Any

import torch

from tests.support.bad_input.damage import (
    DROPPED,
    MODEL,
    ON,
    SCORE,
    SPEED,
    UP,
    WEIGHTS,
    Case,
    both,
    cut,
    dropped_with,
    fields,
    gone,
    plan_with,
    weights,
    written,
)


def _config(says: str, *more: str, **changes: Any) -> Case:
    return Case(SCORE, (says, *more), fields("model/config.json", **changes))


def _weights(says: str, content: bytes) -> Case:
    return Case(SCORE, ("pretrained='model'", says), written(f"model/{WEIGHTS}", content))


MODELS: Mapping[str, Case] = {
    "no config": Case(SCORE, ("config.json",), gone("model/config.json")),
    "config cut": Case(SCORE, ("config.json",), cut("model/config.json")),
    "config empty": Case(SCORE, ("config.json",), written("model/config.json", "")),
    "config binary": Case(SCORE, ("config.json",), written("model/config.json", bytes(range(256)))),
    "config a list": Case(SCORE, ("config.json", "mapping"), written("model/config.json", "[1, 2]")),
    "config a number": Case(SCORE, ("config.json", "mapping"), written("model/config.json", "7")),
    "config too deep": Case(SCORE, ("config.json",), written("model/config.json", "[" * 100_000)),
    "config a folder": Case(
        SCORE, ("config.json",), both(gone("model/config.json"), lambda f: (f / "model/config.json").mkdir())
    ),
    "hidden_size a word": _config("hidden_size", hidden_size="many"),
    "hidden_size negative": _config("hidden_size", "-16", hidden_size=-16),
    "hidden_size 0": _config("hidden_size=0", hidden_size=0),
    "vocab_size negative": _config("vocab_size", "-259", vocab_size=-259),
    "vocab_size of another model": _config("shape", vocab_size=300),
    "heads that do not divide": _config("attention heads (3)", num_attention_heads=3, head_dim=None),
    "heads 0": _config("num_attention_heads", num_attention_heads=0),
    "key-value heads that do not divide": _config(
        "num_key_value_heads=3", num_attention_heads=4, num_key_value_heads=3
    ),
    "key-value heads 0": _config("num_key_value_heads", num_key_value_heads=0),
    "no blocks": _config("num_hidden_layers", num_hidden_layers=0),
    "a billion blocks": _config("num_hidden_layers=1000000000", num_hidden_layers=10**9),
    "more blocks than weights": _config("missing", "model.layers.2.", num_hidden_layers=3),
    "fewer blocks than weights": _config("model.layers.1.", num_hidden_layers=1),
    "unknown activation": _config("'gelusilu'", hidden_act="gelusilu"),
    "unknown dtype": _config("float7", dtype="float7"),
    "unknown model_type": _config("lama", model_type="lama"),
    "model_type a number": _config("model type `5`", model_type=5),
    "no model_type": _config("model_type", model_type=None),
    "another model_type": _config("missing", model_type="gpt2"),
    "no language model": _config("vit", model_type="vit"),
    "no weights": Case(SCORE, ("pretrained='model'", WEIGHTS), gone(f"model/{WEIGHTS}")),
    "weights empty": _weights("header", b""),
    "weights a header alone": _weights("header", (8).to_bytes(8, "little")),
    "weights whose header lies about its length": _weights("header", (1 << 62).to_bytes(8, "little") + b"{}"),
    "weights whose header is no JSON": _weights("header", (4).to_bytes(8, "little") + b"xxxx"),
    "weights whose offsets lie": _weights(
        "header",
        len(lie := b'{"a":{"dtype":"F32","shape":[4],"data_offsets":[0,999]}}').to_bytes(8, "little") + lie + bytes(16),
    ),
    "weights a pickle": _weights("header", pickle.dumps({"a": 1})),
    "weights cut": Case(SCORE, ("pretrained='model'", "incomplete"), cut(f"model/{WEIGHTS}")),
    "a weight missing": Case(SCORE, ("missing", UP), weights("model", lambda w: w.pop(UP))),
    "a weight of another shape": Case(SCORE, ("shape", UP), weights("model", lambda w: w.update({UP: w[UP][:3]}))),
    "index no JSON": Case(
        SCORE, ("index",), both(gone(f"model/{WEIGHTS}"), written(f"model/{WEIGHTS}.index.json", "{"))
    ),
    "index without a weight_map": Case(
        SCORE, ("weight_map",), both(gone(f"model/{WEIGHTS}"), written(f"model/{WEIGHTS}.index.json", "{}"))
    ),
    "index that names no file": Case(
        SCORE,
        ("part-9.safetensors",),
        both(
            gone(f"model/{WEIGHTS}"),
            written(
                f"model/{WEIGHTS}.index.json", json.dumps({"metadata": {}, "weight_map": {UP: "part-9.safetensors"}})
            ),
        ),
    ),
    "tokenizer damaged": Case(
        SCORE, ("./model", "tokenizer"), written("model/tokenizer_config.json", '{"tokenizer_class": "ByT5')
    ),
    "tokenizer a list": Case(SCORE, ("./model", "tokenizer"), written("model/tokenizer_config.json", "[]")),
    "tokenizer unknown": Case(
        SCORE, ("./model", "tokenizer"), written("model/tokenizer_config.json", '{"tokenizer_class": "Nope"}')
    ),
    "gguf empty": Case(["score", "--model.pretrained=a.gguf", *ON], ("a.gguf", "empty"), written("a.gguf", "")),
    "gguf of noise": Case(
        ["score", "--model.pretrained=a.gguf", *ON], ("a.gguf", "GGUF"), written("a.gguf", b"GGML" + bytes(99))
    ),
    "gguf a header alone": Case(
        ["score", "--model.pretrained=a.gguf", *ON], ("a.gguf",), written("a.gguf", b"GGUF\x03\x00\x00\x00" + b"\x05")
    ),
    "gguf cut": Case(["score", "--model.pretrained=model.gguf", *ON], ("model.gguf",), cut("model.gguf")),
    "gguf without most weights": Case(
        ["score", "--model.pretrained=model.gguf", "--data.tokenizer=bytes", *ON], ("model.gguf", "missing")
    ),
    "gguf as a folder": Case(
        ["score", "--model.pretrained=a.gguf", *ON], ("a.gguf", "no such GGUF file"), lambda f: (f / "a.gguf").mkdir()
    ),
}

KEPT = "model.layers.1.mlp.up_proj.weight"
BASE = ["benchmark", DROPPED, "--base=./model", *ON, *SPEED, "--data.tokenizer=bytes"]
LACKING: Mapping[str, Case] = {
    "skip contradicts dropped_modules": Case(
        BASE,
        ("contradicts", "'mlp' of block 0"),
        fields("dropped/config.json", per_layer_config={"0": {"skip": ["mlp"]}}),
    ),
    "dropped_modules names no module": Case(
        BASE,
        ("'model.nowhere'", "no such module"),
        fields(
            "dropped/config.json",
            per_layer_config=None,
            dropped_modules={
                "model.nowhere": {"sublayer": {"block": 1, "kind": "mlp", "path": "model.nowhere"}, "zero": True}
            },
        ),
    ),
    "dropped_modules a list": Case(BASE, ("dropped_modules",), fields("dropped/config.json", dropped_modules=["x"])),
    "dropped_modules of words": Case(
        BASE, ("dropped_modules",), fields("dropped/config.json", dropped_modules={"model.layers.1.mlp": "x"})
    ),
    "stand-in with an unknown field": Case(BASE, ("dropped_modules", "evil"), dropped_with(evil=1)),
    "stand-in of a wrong type": Case(BASE, ("dropped_modules", "core"), dropped_with(core="yes")),
    "stand-in of an unknown kind": Case(
        BASE, ("kind", "conv"), dropped_with(sublayer={"block": 1, "kind": "conv", "path": "x"})
    ),
    "stand-in of a negative block": Case(
        BASE, ("block", "-1"), dropped_with(sublayer={"block": -1, "kind": "mlp", "path": "x"})
    ),
    "stand-in of echoes that are none": Case(BASE, ("dropped_modules", "echoes=5"), dropped_with(echoes=5)),
    "stand-in of a wrong type, to plan": Case(
        ["plan", DROPPED, "--prompt_tokens=4", "--new_tokens=2", "--device=a100"],
        ("dropped_modules", "core"),
        dropped_with(core="yes"),
    ),
    "skip of a block that is not there": Case(
        BASE,
        ("[7]",),
        fields("dropped/config.json", dropped_modules=None, per_layer_config={"7": {"skip": ["mlp"]}}),
    ),
    "skip of an unknown kind": Case(
        BASE,
        ("'conv'",),
        fields("dropped/config.json", dropped_modules=None, per_layer_config={"1": {"skip": ["conv"]}}),
    ),
    "skip that is no list": Case(
        BASE, ("skip",), fields("dropped/config.json", dropped_modules=None, per_layer_config={"1": {"skip": 5}})
    ),
    "per_layer_config of words": Case(
        BASE, ("per_layer_config",), fields("dropped/config.json", per_layer_config=["x", "y"])
    ),
    "weights of what is dropped": Case(
        BASE,
        ("unexpected", "model.layers.1.self_attn.q_proj.weight"),
        weights("dropped", lambda w: w.update({"model.layers.1.self_attn.q_proj.weight": torch.ones(16, 16)})),
    ),
    "a kept weight missing": Case(BASE, ("missing", KEPT), weights("dropped", lambda w: w.pop(KEPT))),
    "a config that forgot the drop": Case(
        BASE,
        ("missing", "model.layers.1.self_attn"),
        fields("dropped/config.json", dropped_modules=None, per_layer_config=None),
    ),
    "fields to override in a dropped folder": Case(
        ["score", DROPPED, "--model.config={hidden_size: 32}", *ON], ("lacks dropped sublayers", "hidden_size")
    ),
    "a dropped base": Case(
        ["benchmark", DROPPED, "--base=./dropped", *ON, *SPEED, "--data.tokenizer=bytes"],
        ("base='./dropped'", "not dense"),
    ),
    "pruning what is pruned": Case(
        ["prune", DROPPED, "--count=1", *ON, *SPEED, "--data.tokenizer=bytes"], ("already lacks", "attention.1")
    ),
}

PLAN = [
    "plan",
    MODEL,
    "--plan=plan.json",
    "--prompt_tokens=4",
    "--new_tokens=2",
    "--trainer.accelerator=cpu",
    "--device=a100",
]
PLANS: Mapping[str, Case] = {
    "plan missing": Case(PLAN, ("plan.json", "no file"), gone("plan.json")),
    "plan a folder": Case(
        ["--plan=model" if word.startswith("--plan=") else word for word in PLAN], ("'model'", "no file")
    ),
    "plan empty": Case(PLAN, ("plan.json", "not JSON"), written("plan.json", "")),
    "plan no JSON": Case(PLAN, ("plan.json", "not JSON"), written("plan.json", "drop them all")),
    "plan binary": Case(PLAN, ("plan.json",), written("plan.json", b"\xff\xfe\x00\x81")),
    "plan too deep": Case(PLAN, ("plan.json", "not JSON"), written("plan.json", "[" * 100_000)),
    "plan a list": Case(PLAN, ("plan.json", "dict"), written("plan.json", "[]")),
    "plan of another version": Case(
        PLAN, ("layershed.drop_plan.v9",), fields("plan.json", format="layershed.drop_plan.v9")
    ),
    "plan of an unknown scope": Case(PLAN, ("scope='all'",), fields("plan.json", scope="all")),
    "plan without drops": Case(PLAN, ("plan.json", "drops"), fields("plan.json", drops=None)),
    "plan with an unknown kind": Case(PLAN, ("'conv'",), plan_with(kind="conv")),
    "plan with a negative block": Case(PLAN, ("-1",), plan_with(block=-1)),
    "plan with a block that is a word": Case(PLAN, ("block", "'one'"), plan_with(block="one")),
    "plan of another model": Case(
        PLAN, ("transformer.h.1.attn", "another model"), plan_with(path="transformer.h.1.attn")
    ),
    "plan of a larger model": Case(
        PLAN, ("attention.9", "another model"), plan_with(block=9, path="model.layers.9.self_attn")
    ),
    "plan with a score that is no number": Case(PLAN, ("score", "nan"), plan_with(score=float("nan"))),
    "plan with a score that is a word": Case(PLAN, ("score", "'low'"), plan_with(score="low")),
    "plan with a negative step": Case(PLAN, ("step", "-3"), plan_with(step=-3)),
    "plan that drops twice": Case(
        PLAN, ("attention.1", "twice"), fields("plan.json", drops=2 * [{"block": 1, "kind": "attention", "path": "x"}])
    ),
    "plan that drops nothing": Case(PLAN, ("plan",), fields("plan.json", drops=[])),
    "plan and count": Case([*PLAN, "--count=1"], ("plan='plan.json'", "count=1")),
}
