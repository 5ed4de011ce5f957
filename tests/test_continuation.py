"""Prompts and continuations, against the chat template, conversations alone, and decoding without a cache."""

import json
import warnings

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from layershed.cli.run_trainer import RunTrainer
from layershed.continuation import greedy_continuations, passages_in
from layershed.errors import DataError
from layershed.training.causal_lm import CausalLM
from layershed.training.chat import encode_conversation, prompt_ids
from layershed.training.collate import collate
from layershed.training.conversations import Conversation
from layershed.training.packing import pack_conversations
from layershed.training.text_data import TextData
from layershed.training.tokenizer import load_tokenizer
from tests.support.chats import CHATML, MARKED, chat_of, fast_tokenizer
from tests.support.small_world import TINY

SIZE = 160
MODEL = {**TINY, "max_position_embeddings": SIZE}
TOKENIZERS = {
    "chatml": lambda: fast_tokenizer(CHATML),
    "marked": lambda: fast_tokenizer(MARKED),
    "bytes": lambda: load_tokenizer(None),
}
both_forms = pytest.mark.parametrize("packed", [True, False], ids=["packed", "padded"])


@pytest.fixture
def model():
    torch.manual_seed(0)
    return CausalLM(config=MODEL).model.train()


@pytest.fixture(scope="module")
def chats(tmp_path_factory):
    path = tmp_path_factory.mktemp("chats") / "chats.jsonl"
    path.write_text("".join(json.dumps({"messages": chat_of(number)}) + "\n" for number in range(12)))
    return str(path)


def batch_of(tokenizer, chats, packed, mask_prompts=True):
    encoded = [encode_conversation(tokenizer, Conversation(chat)) for chat in chats]
    pairs = [(np.array(one.input_ids), np.array(one.labels(mask_prompts))) for one in encoded]
    if packed:
        return collate(pack_conversations(pairs, 400, padding=0), padding=0)
    return collate([{"input_ids": ids, "labels": labels} for ids, labels in pairs], padding=0)


@both_forms
@pytest.mark.parametrize("name", TOKENIZERS)
def test_prompt_of_a_conversation_is_what_the_template_writes_before_its_last_answer(name, packed):
    tokenizer = TOKENIZERS[name]()
    chats = [chat_of(number) for number in range(7)]
    found = passages_in(batch_of(tokenizer, chats, packed))
    assert all(one.answered for one in found)
    prompts = [prompt_ids(tokenizer, Conversation(chat[:-1])) for chat in chats]
    assert sorted(one.ids[: one.begin] for one in found) == sorted(prompts)
    answers = [tokenizer.decode(one.ids[one.begin : one.end], skip_special_tokens=True).strip() for one in found]
    assert sorted(answers) == sorted(chat[-1]["content"] for chat in chats)


@both_forms
def test_conversation_whose_answers_are_not_marked_is_continued_from_its_middle(packed):
    tokenizer = load_tokenizer(None)
    chats = [chat_of(number) for number in range(5)]
    whole = sorted(encode_conversation(tokenizer, Conversation(chat)).input_ids for chat in chats)
    found = sorted(passages_in(batch_of(tokenizer, chats, packed, mask_prompts=False)), key=lambda one: one.ids)
    assert [(one.ids, one.begin, one.end) for one in found] == [(ids, len(ids) // 2, len(ids)) for ids in whole]


def test_rows_padded_on_the_left_and_rows_of_ids_alone_are_whole_texts():
    ids = torch.tensor([[0, 0, 5, 6], [7, 8, 9, 10]])
    assert [one.ids for one in passages_in({"input_ids": ids})] == ids.tolist()
    padded = {"input_ids": ids, "attention_mask": torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])}
    assert [(one.ids, one.begin) for one in passages_in(padded)] == [([5, 6], 1), ([7, 8, 9, 10], 2)]


def test_continuations_of_prompts_of_several_lengths_are_those_of_each_alone_and_uncached(model):
    prompts = [list(range(5, 5 + length)) for length in (6, 3, 6, 9)]
    prompts[2] = prompts[2][::-1]
    model.generation_config.eos_token_id = None
    found = greedy_continuations(model, prompts, 5)
    assert model.training
    for prompt, made in zip(prompts, found, strict=True):
        ids = torch.tensor([prompt])
        for _ in range(5):
            ids = torch.cat([ids, model.eval()(input_ids=ids, use_cache=False).logits[:, -1:].argmax(-1)], 1)
        assert made == ids[0, len(prompt) :].tolist()
    for ends in (found[0][1], [258, found[0][1]]):
        model.generation_config.eos_token_id = ends
        first = found[0].index(found[0][1]) + 1
        assert greedy_continuations(model, prompts, 5)[0] == found[0][:first], "nothing after the end"


def predicted(module, source, folder, packing=True, **options):
    trainer = RunTrainer(
        logger=False, default_root_dir=folder, accelerator="cpu", enable_progress_bar=False, enable_model_summary=False
    )
    data = TextData(source, block_size=SIZE, batch_size=2, val_fraction=0.5, packing=packing)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*does not have many workers")
        trainer.predict(module, datamodule=data, **options)
    return data


@both_forms
def test_logits_and_predicted_tokens_of_conversations_are_those_of_each_alone(model, chats, tmp_path, packed):
    module = CausalLM(config=MODEL)
    data = predicted(module, chats, tmp_path, packing=packed, what="logits")
    files = sorted(tmp_path.glob("logits/*.safetensors"))
    assert files
    for batch, path in zip(data.val_dataloader(), files, strict=True):
        module.predicted = None
        written, most_likely = load_file(path), module.eval().predict_step(batch, 0)
        assert set(written) == {*batch, "logits"} - {"labels"}
        for row, passages in enumerate(
            passages_in({k: v[None, row] for k, v in batch.items()}) for row in range(len(batch["labels"]))
        ):
            start = 0
            for one in passages:
                with torch.no_grad():
                    alone = module.model(input_ids=torch.tensor([one.ids]), use_cache=False).logits[0]
                place = slice(start, start + len(one.ids))
                torch.testing.assert_close(written["logits"][row, place], alone, rtol=1e-4, atol=1e-5)
                assert torch.equal(most_likely[row, place], written["logits"][row, place].argmax(-1))
                start += len(one.ids)
        assert packed == any((row[1:] == 0).any() for row in batch.get("position_ids", ()))


@both_forms
def test_predict_writes_the_last_answer_of_every_held_out_conversation(chats, tmp_path, packed, capsys):
    module = CausalLM(config=MODEL)
    data = predicted(module, chats, tmp_path, packing=packed, new_tokens=4)
    lines = [json.loads(line) for line in (tmp_path / "predictions.jsonl").read_text().splitlines()]
    assert len(lines) == 6
    asked = {}
    for chat in map(chat_of, range(12)):
        ids = prompt_ids(data.tokenizer, Conversation(chat[:-1]))
        asked[data.tokenizer.decode(ids, skip_special_tokens=True)] = (ids, chat[-1]["content"])
    for line in lines:
        ids, answer = asked[line["prompt"]]
        assert line["true"] == answer[:4]
        (made,) = greedy_continuations(module.model, [ids], 4)
        assert line["generated"] == data.tokenizer.decode(made, skip_special_tokens=True)
    assert "left out" not in capsys.readouterr().out


def test_conversations_no_longer_than_the_prompt_are_left_out_and_counted(chats, tmp_path, capsys):
    predicted(CausalLM(config=MODEL), chats, tmp_path, new_tokens=2, prompt_tokens=60)
    lines = (tmp_path / "predictions.jsonl").read_text().splitlines()
    assert 0 < len(lines) < 6
    assert all(len(json.loads(line)["prompt"].encode()) <= 60 for line in lines)
    assert f"left out: {6 - len(lines)} of at most 60 tokens" in capsys.readouterr().out


def test_prompt_as_long_as_the_rows_is_refused(chats, tmp_path):
    with pytest.raises(DataError, match=rf"prompt_tokens={SIZE}: .* only {SIZE} tokens"):
        predicted(CausalLM(config=MODEL), chats, tmp_path, prompt_tokens=SIZE)
