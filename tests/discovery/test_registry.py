"""A transformer that is not from Hugging Face, in the manner of nanoGPT, against branches switched off by hand."""

import copy
import re
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader
from transformers import DynamicCache

import layershed
from layershed.discovery import registry as adapters
from layershed.discovery.find import dissect, find_sublayers, find_transformer
from layershed.discovery.registry import SublayerAdapter, register_adapter, registered_adapter
from layershed.errors import AdapterError, NoSublayersFoundError
from layershed.integration.gathered import model_name
from layershed.planning.plan import Sublayer
from layershed.spellings import cache_name
from layershed.surgery import bypass, bypassed_sublayers, removed_sublayers, restore
from tests.support.hand_written import GPT, Block
from tests.support.models import build_model


class Larger(GPT):
    pass


ADAPTER = SublayerAdapter(lambda model: {"idx": torch.arange(4)[None]})
TOKENS = torch.tensor([[3, 1, 4, 1, 5], [9, 2, 6, 5, 3]])


@pytest.fixture(autouse=True)
def registry(monkeypatch):
    monkeypatch.setattr(adapters, "_REGISTERED", {})


def build(model_class=GPT):
    torch.manual_seed(0)
    return model_class()


def expected(prefixes=("h.0", "h.1", "h.2", "more.0")):
    return tuple(
        Sublayer(i, kind, f"{prefix}.{name}")
        for i, prefix in enumerate(prefixes)
        for kind, name in (("attention", "attn"), ("mlp", "mlp"))
    )


def test_sublayers_of_a_registered_class_are_found():
    register_adapter(GPT, ADAPTER)
    model = build()
    assert find_transformer(model) is model
    assert find_sublayers(model) == expected()
    assert {(b.topology, b.scale) for b in dissect(model).branches} == {("sequential", 1.0)}
    assert dissect(model).plain == {0, 1, 2, 3}


@pytest.mark.parametrize("training", [True, False])
def test_bypass_in_a_registered_model_equals_the_branch_times_zero_and_is_undone_by_restore(training):
    register_adapter(GPT, ADAPTER)
    model, reference = build().train(training), build()
    before = model(TOKENS)[0]
    for sublayer in expected():
        block = reference.get_submodule(sublayer.path.rpartition(".")[0])
        block.off = {sublayer.kind}
        bypass(model, [sublayer])
        assert bypassed_sublayers(model) == (sublayer,)
        assert torch.equal(model(TOKENS)[0], reference(TOKENS)[0])
        assert not torch.allclose(model(TOKENS)[0], before, atol=1e-3)
        restore(model)
        block.off = frozenset()
    assert torch.equal(model(TOKENS)[0], before)
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_registered_model_on_the_meta_device_has_the_same_sublayers():
    register_adapter(GPT, ADAPTER)
    with torch.device("meta"):
        model = GPT()
    assert find_sublayers(model) == expected()


def test_adapter_of_a_subclass_is_preferred_over_that_of_its_base_class():
    register_adapter(GPT, ADAPTER)
    assert find_sublayers(build(Larger)) == expected()
    register_adapter(Larger, own := SublayerAdapter(ADAPTER.inputs, blocks=("more",)))
    assert registered_adapter(build(Larger)) is own
    assert registered_adapter(build(GPT)) is ADAPTER
    assert find_sublayers(build(GPT)) == expected()


def test_adapter_registered_last_replaces_the_former_one():
    register_adapter(GPT, ADAPTER)
    register_adapter(GPT, last := SublayerAdapter(ADAPTER.inputs, ("h",)))
    assert registered_adapter(build()) is last


@pytest.mark.parametrize(
    ("blocks", "prefixes"),
    [
        (("h",), ("h.0", "h.1", "h.2")),
        (("more",), ("more.0",)),
        (("more", "h"), ("h.0", "h.1", "h.2", "more.0")),  # in the order in which they run
    ],
)
def test_registered_blocks_are_found_at_the_adapters_path(blocks, prefixes):
    register_adapter(GPT, SublayerAdapter(ADAPTER.inputs, blocks=blocks))
    assert find_sublayers(build()) == expected(prefixes)


def test_sublayer_paths_start_at_the_registered_module_inside_another():
    register_adapter(GPT, ADAPTER)
    outer = nn.ModuleDict({"net": build(), "other": nn.Linear(2, 2)})
    assert find_transformer(outer) is outer["net"]
    assert find_sublayers(outer) == expected()


def test_adapter_inputs_are_called_with_the_model():
    seen = []
    register_adapter(GPT, SublayerAdapter(lambda model: seen.append(model) or {"idx": torch.arange(4)[None]}))
    find_sublayers(model := build())
    assert len(seen) == 1
    assert seen[0] is model


@pytest.mark.parametrize("wrong", ["GPT", None, int, nn.Linear(2, 2), GPT(), list[int]])
def test_registering_a_class_that_is_no_module_is_refused(wrong):
    with pytest.raises(AdapterError, match=r"not a subclass of nn\.Module\. Give the class of the model"):
        register_adapter(wrong, ADAPTER)
    assert adapters._REGISTERED == {}


def test_unregistered_class_is_refused():
    with pytest.raises(NoSublayersFoundError, match=r"GPT holds no Hugging Face transformer.*SublayerAdapter"):
        find_sublayers(build())


def test_own_models_documentation_runs_as_written(monkeypatch, tmp_path):
    """docs/own_models.md, with the GPT above for the reader's own."""
    monkeypatch.setattr(adapters, "_REGISTERED", {})
    text = (Path(__file__).parents[2] / "docs" / "own_models.md").read_text(encoding="utf-8")
    first, second, third = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    gpt = GPT().eval()
    batches = [{"idx": torch.randint(11, (2, 6), generator=torch.Generator().manual_seed(i))} for i in range(3)]
    exec(first.replace("count=4", "count=2"), {"GPT": GPT, "gpt": gpt, "batches": batches})
    assert [sublayer.kind for sublayer in bypassed_sublayers(gpt)] == ["attention", "attention"]
    names = {"torch": torch, "ls": layershed}
    exec(second, names)
    assert len(find_sublayers(names["encoder"])) == 12
    layershed.save_weights(gpt, tmp_path / "gpt")
    names = {"GPT": GPT, "ls": layershed, "folder": tmp_path / "gpt"}
    exec(third, names)
    assert bypassed_sublayers(gpt) == removed_sublayers(names["fresh"])
    assert torch.equal(names["fresh"].eval()(**batches[0])[0], gpt(**batches[0])[0])


def test_callbacks_take_a_registered_model(monkeypatch, tmp_path):
    from layershed.callbacks import RedundancyMonitor, SublayerDrop

    monkeypatch.setattr(adapters, "_REGISTERED", {})
    register_adapter(GPT, SublayerAdapter(lambda model: {"idx": torch.arange(4)[None]}))

    class Task(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.gpt = GPT()

        def training_step(self, batch, _):
            return nn.functional.cross_entropy(self.gpt(batch)[0][:, :-1].flatten(0, 1), batch[:, 1:].flatten())

        def configure_optimizers(self):
            return torch.optim.AdamW(self.parameters(), lr=1e-3)

    torch.manual_seed(0)
    loader = DataLoader(torch.randint(11, (24, 6)), batch_size=4)
    drop = SublayerDrop(start=3, scope="attention", count=2, quality_batches=0)
    trainer = pl.Trainer(
        max_steps=6,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        default_root_dir=tmp_path,
        callbacks=[RedundancyMonitor(every_n_steps=2), drop],
    )
    task = Task()
    trainer.fit(task, loader)
    assert set(bypassed_sublayers(task)) == set(drop.plan)
    assert len(drop.plan) == 2
    rows = (tmp_path / "importance.csv").read_text().splitlines()
    assert {row.split(",")[0] for row in rows[1:]} == {"2", "4", "6"}


def test_adapter_of_a_hugging_face_class_keeps_cached_decoding_exact(monkeypatch, tokens):
    """Such as one whose forward pass must be fed something special."""
    monkeypatch.setattr(adapters, "_REGISTERED", {})
    model = build_model("gpt2")
    model.__class__ = type("Mine", (type(model),), {})
    register_adapter(type(model), SublayerAdapter(lambda model: {"input_ids": torch.arange(4)[None]}))
    bypass(model, find_sublayers(model)[:1])
    cache = DynamicCache(config=model.config)
    given = {cache_name(model.forward): cache}
    with torch.no_grad():
        model(tokens[:, :6], **given)
        cached = model(tokens[:, 6:], **given).logits
        torch.testing.assert_close(cached, model(tokens, use_cache=False).logits[:, 6:])


class InPlaceBlock(Block):
    def forward(self, x):
        x += self.branch("attention", self.attn(self.ln_1(x)))
        x += self.branch("mlp", self.mlp(self.ln_2(x)))
        return x


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_block_that_overwrites_its_stream_is_proven_and_measured(dtype, monkeypatch):
    monkeypatch.setattr(adapters, "_REGISTERED", {})
    monkeypatch.setitem(GPT.__init__.__globals__, "Block", InPlaceBlock)
    register_adapter(GPT, SublayerAdapter(lambda model: {"idx": torch.arange(4)[None]}))
    torch.manual_seed(0)
    model, ids = GPT().eval().to(dtype), torch.arange(8)[None]
    found = find_sublayers(model)
    assert len(found) == 8
    seen = {}
    for i, block in enumerate((*model.h, *model.more)):
        block.register_forward_pre_hook(lambda _, args, i=i: seen.update({i: args[0].clone()}))
        block.register_forward_hook(lambda _m, _a, y, i=i: seen.update({i: (seen[i], y.clone())}))
    scores = layershed.estimate_importance(model, [{"idx": ids}])
    for i, (x, y) in seen.items():
        plain = 1 - nn.functional.cosine_similarity(x.double(), y.double(), dim=-1).mean().item()
        assert scores.blocks[i] == pytest.approx(plain, abs=1e-6 if dtype is torch.float32 else 5e-3)
        assert scores.blocks[i] > 1e-3
    for sublayer in found:
        reference = copy.deepcopy(model)
        (*reference.h, *reference.more)[sublayer.block].off = {sublayer.kind}
        bypass(model, [sublayer])
        with torch.no_grad():
            assert torch.equal(model(ids)[0], reference(ids)[0]), sublayer
        restore(model)


def test_torch_key_padding_mask_leaves_padding_out_of_the_importance(monkeypatch):
    monkeypatch.setattr(adapters, "_REGISTERED", {})
    register_adapter(nn.TransformerEncoder, SublayerAdapter(lambda model: {"src": torch.randn(1, 4, 16)}))
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()
    padding = torch.tensor([[False] * 6, [False] * 4 + [True] * 2])
    batch = {"src": torch.randn(2, 6, 16), "src_key_padding_mask": padding}
    seen = []
    model.layers[0].register_forward_hook(lambda _m, args, y: seen.append((args[0], y)))
    scores = layershed.estimate_importance(model, [batch])
    x, y = seen[-1]
    plain = 1 - nn.functional.cosine_similarity(x, y, dim=-1)[~padding].mean().item()
    assert scores.tokens == 10
    assert scores.blocks[0] == pytest.approx(plain, abs=1e-6)


def test_report_of_a_model_without_a_config_names_its_class(monkeypatch):
    monkeypatch.setattr(adapters, "_REGISTERED", {})
    register_adapter(GPT, SublayerAdapter(lambda model: {"idx": torch.arange(4)[None]}))

    class Task(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.gpt = GPT()

    assert model_name(Task()) == "GPT"
