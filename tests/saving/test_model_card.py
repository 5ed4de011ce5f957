"""The model card of a saved folder: read by huggingface_hub, true to the model, never over a user's own text."""

import json

import pytest
import torch
from huggingface_hub import ModelCard
from transformers import AutoModelForCausalLM, LlamaForCausalLM, dynamic_module_utils

import layershed as ls
from layershed.callbacks import Export, LoRARecovery, SublayerDrop
from layershed.errors import ExportError
from layershed.integration.facts import usage_of
from layershed.saving import model_card
from layershed.saving.model_card import MARK, base_of, licence_of
from tests.support.runs import Foreign, fit_foreign


def dropped(model, count=2):
    scores = {sublayer: 0.1 * rank for rank, sublayer in enumerate(ls.find_sublayers(model), start=1)}
    plan = ls.select_sublayers(scores, scope="joint", count=count)
    ls.bypass(model, plan)
    return plan


def card_of(folder):
    return ModelCard.load(folder / "README.md")


def write_card(folder, header):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "README.md").write_text(f"---\n{header}\n---\n# somebody's model\n")
    return str(folder)


def test_card_names_base_plan_figures_licence_and_how_to_load(llama, tmp_path):
    base = write_card(tmp_path / "base", "license: mit")
    llama.config.name_or_path = base
    plan = dropped(llama)
    ls.save_pretrained(llama, tmp_path / "out", plan=plan, figures={"Loss | before": "1.25 <b>"})
    card = card_of(tmp_path / "out")
    assert (card.data.license, card.data.library_name, card.data.pipeline_tag) == (
        "mit",
        "transformers",
        "text-generation",
    )
    assert card.data.base_model is None, "a folder of this machine is no model of the hub"
    assert tmp_path.name not in card.text, "nor are its paths anybody's business"
    rows = [line.split("|")[2:6] for line in card.text.splitlines() if line.startswith("| ") and line[2].isdigit()]
    found = [(int(block), kind.strip(), float(score)) for block, kind, _, score in rows]
    assert {what.strip() for _, _, what, _ in rows} == {"nothing"}
    assert found == [(drop.sublayer.block, drop.sublayer.kind, pytest.approx(drop.score)) for drop in plan.drops]
    kept = sum(p.numel() for p in ls.load_pretrained(tmp_path / "out").parameters())
    assert f"{kept:,} parameters are left" in card.text
    assert "| Loss \\| before | 1.25 &lt;b> |" in card.text
    assert "ls.load_pretrained(" in card.text
    assert "trust_remote_code" not in card.text
    assert "mit, as the base says" in card.text


def test_card_of_a_quantized_model_counts_unpacked_weights_and_says_how_it_is_quantized(llama, tmp_path):
    dropped(llama)
    counted = card_of(ls.save_pretrained(llama, tmp_path / "full")).text.split(" parameters are left")[0]
    ls.quantize(llama, "nf4")
    text = card_of(ls.save_pretrained(llama, tmp_path / "nf4")).text
    assert text.split(" parameters are left")[0].splitlines()[-1] == counted.splitlines()[-1]
    assert "quantized to nf4" in text


def test_folder_without_a_drop_gets_no_card(llama, tmp_path):
    ls.save_pretrained(llama, tmp_path / "out")
    assert not (tmp_path / "out" / "README.md").exists()


@pytest.mark.parametrize("drops", [True, False], ids=["dropped", "dense"])
def test_users_own_card_survives_a_save_and_ours_is_written_anew(drops, llama, tmp_path):
    if drops:
        dropped(llama, 1)
    out = ls.save_pretrained(llama, tmp_path / "out")
    (out / "README.md").write_text("my own words")
    ls.save_pretrained(llama, out, figures={"Loss": "1"})
    assert (out / "README.md").read_text() == "my own words"
    (out / "README.md").write_text(f"<!-- {MARK} -->\nold")
    ls.save_pretrained(llama, out, figures={"Loss": "1"})
    assert (out / "README.md").is_file() == drops
    if drops:
        assert "| Loss | 1 |" in card_of(out).text


BROKEN = ["license: [", "license: {a: 1}", "- 1\n- 2", "license: ", "x: &a [*a]"]


@pytest.mark.parametrize(
    ("given", "text"),
    [
        (None, "Unknown: this model was trained from scratch, and its config names no"),
        ("mit", "mit, as the config says"),
    ],
)
def test_licence_of_a_model_from_scratch_is_not_that_of_a_base(given, text, llama, tmp_path):
    dropped(llama)
    llama.config.name_or_path, llama.config.license = "", given
    card = card_of(ls.save_pretrained(llama, tmp_path / "out")).text
    assert text in card
    assert "base" not in card.partition("## Licence")[2]


@pytest.mark.parametrize("header", BROKEN)
def test_unreadable_or_empty_licence_is_unknown(header, tmp_path):
    assert licence_of(write_card(tmp_path / "base", header)) == "unknown"


def test_licence_comes_from_config_card_cache_or_gguf_and_from_nowhere_else(llama, tmp_path, monkeypatch):
    from gguf import GGUFWriter

    assert licence_of(write_card(tmp_path / "base", "license: gpl-3.0\ntags: [a]")) == "gpl-3.0"
    llama.config.license = "cc-by-4.0"
    assert licence_of(str(tmp_path / "base"), llama.config) == "cc-by-4.0", "the config is nearest to the weights"
    writer = GGUFWriter(tmp_path / "model.gguf", "llama")
    writer.add_license("apache-2.0")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert licence_of(str(tmp_path / "model.gguf")) == "apache-2.0"
    (tmp_path / "torn.gguf").write_bytes(b"GGUF")
    asked = []
    monkeypatch.setattr(
        model_card, "try_to_load_from_cache", lambda *names: asked.append(names) or str(tmp_path / "base" / "README.md")
    )
    assert licence_of("org/model") == "gpl-3.0"
    assert asked == [("org/model", "README.md")]
    for nowhere in ("", str(tmp_path / "torn.gguf"), str(tmp_path / "none.gguf"), str(tmp_path)):
        assert licence_of(nowhere) == "unknown"


def test_model_pruned_twice_names_the_first_base(llama, tmp_path):
    llama.config.name_or_path = "org/first"
    dropped(llama, 1)
    once = ls.save_pretrained(llama, tmp_path / "once")
    assert card_of(once).data.base_model == "org/first"
    model = ls.load_pretrained(once)
    ls.bypass(model, [ls.find_sublayers(model)[0]])
    assert card_of(ls.save_pretrained(model, tmp_path / "twice")).data.base_model == "org/first"
    model.config.name_or_path = str(tmp_path / "mine")
    assert base_of(str(ls.save_pretrained(model, tmp_path / "local"))) == "mine"
    # what somebody else's card says of its own base is not what ours was dropped from
    assert base_of(write_card(tmp_path / "tuned", "base_model: org/other")) == str(tmp_path / "tuned")


def test_hostile_name_of_a_base_does_no_harm(llama, tmp_path):
    llama.config.name_or_path = "a|b`<script>\x1b[31m\n---\nlicense: mit"
    dropped(llama, 1)
    card = card_of(ls.save_pretrained(llama, tmp_path / "out"))
    assert card.data.license == "unknown"
    assert "<script>" not in card.text
    assert "\x1b" not in card.text


# ---- standalone ----


def test_exported_standalone_folder_loads_by_transformers_and_its_card_says_how(make_trainer, tmp_path, monkeypatch):
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    drop = SublayerDrop(3, count=2, calibration_batches=1, quality_batches=1)
    trainer = make_trainer(drop, Export(standalone=True), name="run", max_steps=5)
    fit_foreign(trainer)
    folder = tmp_path / "run" / "pruned"
    text = card_of(folder).text
    config = json.loads((folder / "config.json").read_text())
    assert config["auto_map"]["AutoModelForCausalLM"].endswith(".DroppedLlamaForCausalLM")
    assert "AutoModelForCausalLM.from_pretrained(" in text
    logged = {name: value.item() for name, value in trainer.callback_metrics.items()}
    for when, words in (("before", "before the drop"), ("after", "right after the drop"), ("end", "at the end")):
        assert f"| Validation loss {words} | {logged[f'drop/loss_{when}']:.4f} |" in text
    alone = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
    tokens = torch.arange(8)[None]
    with torch.no_grad():
        logits = ls.load_pretrained(folder)(tokens).logits
        assert torch.equal(alone(tokens).logits, logits)
        label, code = usage_of(trainer, folder.parent)[1]  # of the report
        assert "standalone=True" not in code
        assert "modeling_dropped.py" in label
        exec(code, namespace := {})
        assert torch.equal(namespace["model"].eval()(tokens).logits, logits)


class Own(LlamaForCausalLM):
    """A class that transformers does not have."""


def own_module():
    module = Foreign()
    module.net = Own(module.net.config)
    return module


REFUSED = {
    "adapters that stay": (Foreign, [LoRARecovery(finish="adapter")], "LoRA stays in the model"),
    "a class of the user": (own_module, [], "Own is not a class of transformers"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_impossible_standalone_is_refused_before_training(case, make_trainer):
    module, others, message = REFUSED[case]
    module = module()
    drop = SublayerDrop(3, count=2, calibration_batches=1, quality_batches=0)
    with pytest.raises(ExportError, match=message):
        fit_foreign(make_trainer(drop, *others, Export(standalone=True), name="run", max_steps=5), module)
    assert module.trainer.global_step == 0
