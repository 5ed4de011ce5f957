"""TextData on conversations: what a run trains on, and what is wrong with the rows, with number and file."""

import json
import warnings

import datasets
import lightning.pytorch as pl
import pytest
import torch
from torch.nn.functional import cross_entropy

from layershed.errors import ChatTemplateError, DataError
from layershed.training.causal_lm import CausalLM
from layershed.training.packing import split_documents
from layershed.training.text_data import TextData
from layershed.training.tokenizer import load_tokenizer
from tests.support.chats import CHATML, FORGETFUL, assistant, chat_of, fast_tokenizer, user
from tests.support.small_world import TINY

COUNT, SIZE = 30, 160
MODEL = {**TINY, "max_position_embeddings": SIZE}


def write(path, rows):
    if path.suffix == ".parquet":
        datasets.Dataset.from_list(rows).to_parquet(path)
    else:
        path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return str(path)


@pytest.fixture(scope="module")
def chats(tmp_path_factory):
    return write(tmp_path_factory.mktemp("chats") / "chats.jsonl", [{"messages": chat_of(n)} for n in range(COUNT)])


def small(source, **options):
    return TextData(source, **{"block_size": SIZE, "batch_size": 2, "val_fraction": 0.2, **options})


def built(source, **options):
    data = small(source, **options)
    data.setup()
    return data


def decoded(tokenizer, ids):
    return tokenizer.decode([token for token in ids if token != -100])


@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet"])
@pytest.mark.parametrize("columns", ["messages", "prompt response", "prompt completion", "lists"])
def test_rows_of_every_form_are_padded_conversations_with_labels_on_the_answers(tmp_path, name, columns):
    turns = [[user(f"{n} + 1?"), assistant(f"{n + 1}.")] for n in range(10)]
    keys = columns.split() if " " in columns else ["prompt", "completion"]
    rows = [{"messages": turn} for turn in turns]
    if columns != "messages":
        texts = columns != "lists"
        rows = [{keys[i]: part["content"] if texts else [part] for i, part in enumerate(turn)} for turn in turns]
    data = built(write(tmp_path / name, rows))
    batches = [*data.train_dataloader(), *data.val_dataloader()]
    found = set()
    for batch in batches:
        assert set(batch) == {"input_ids", "labels", "attention_mask"}
        for ids, labels, mask in zip(*batch.values(), strict=True):
            assert not mask[len(ids[ids != 0]) :].any()
            found.add((decoded(data.tokenizer, ids[mask.bool()]), decoded(data.tokenizer, labels[mask.bool()])))
    # the byte tokenizer takes the line end after an answer with the end of text
    assert found == {(f"user: {n} + 1?\nassistant: {n + 1}.</s>", f"{n + 1}.</s>") for n in range(10)}


def test_prompts_have_labels_too_if_asked(chats):
    batch = next(iter(built(chats, mask_prompts=False).train_dataloader()))
    assert torch.equal(batch["labels"] == -100, batch["attention_mask"] == 0)


def test_long_conversations_keep_their_answers_and_are_counted(tmp_path):
    rows = [{"messages": [user("x" * 300), assistant(f"{n}.")]} for n in range(4)]
    data = small(write(tmp_path / "a.jsonl", [*rows, {"messages": chat_of(1)}]), batch_size=1)
    with pytest.warns(UserWarning, match=r"4 of 5 conversations are longer than block_size=160 .* last answers stay"):
        data.setup()
    items = [*data.train_dataset, *data.val_dataset]
    assert max(len(item["input_ids"]) for item in items) == SIZE
    assert sorted(decoded(data.tokenizer, item["labels"]) for item in items)[:4] == [f"{n}.</s>" for n in range(4)]


def test_max_tokens_limits_the_conversations(chats):
    few = built(chats, max_tokens=2 * SIZE)
    assert sum(len(item["input_ids"]) for item in few.train_dataset) <= 2 * SIZE
    assert len(few.val_dataset) == 6


def test_text_column_wins_unless_the_columns_of_conversations_are_named(tmp_path):
    path = write(
        tmp_path / "a.jsonl", [{"text": "t" * 99, "messages": chat_of(n), "q": "a", "a": "b"} for n in range(9)]
    )
    assert "labels" not in built(path, batch_size=1).train_dataset[0]
    named = built(path, text_column="messages"), built(path, prompt_column="q", response_column="a")
    assert all("labels" in data.train_dataset[0] for data in named)


# --- a run ------------------------------------------------------------------------------------------------------------


class Seen(pl.Callback):
    """Keeps the batches."""

    def __init__(self):
        self.batches = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.batches.append(batch)


def fitted(data, model=None, **trainer):
    seen = Seen()
    settings = {"max_steps": 3, "limit_val_batches": 2, "num_sanity_val_steps": 0, "accelerator": "cpu"}
    quiet = {
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
    }
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*does not have many workers")
        warnings.filterwarnings("ignore", ".*isinstance.treespec, LeafSpec")
        warnings.filterwarnings("ignore", ".*number of training batches")
        run = pl.Trainer(callbacks=[seen], **{**settings, **quiet, **trainer})
        run.fit(CausalLM(config=MODEL) if model is None else model, datamodule=data)
    return seen.batches, run


def test_run_packs_conversations_and_its_validation_loss_is_the_mean_over_answer_tokens(chats):
    every = {"check_val_every_n_epoch": None, "val_check_interval": 7, "limit_val_batches": 1.0}
    batches, run = fitted(small(chats), max_steps=7, max_epochs=-1, **every)
    model = run.lightning_module.model.eval()
    assert all(set(batch) == {"input_ids", "labels", "position_ids"} for batch in batches)
    assert all(batch["input_ids"].shape == (2, SIZE) for batch in batches)
    assert any((batch["position_ids"][:, 1:] == 0).any() for batch in batches), "several in a sequence"
    _, held = split_documents(COUNT, 0.2, 0)
    tokenizer, losses = load_tokenizer(None), []
    for index in held:
        text = tokenizer.apply_chat_template(chat_of(index), tokenize=False)
        ids = torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"])
        answers, learned = (
            [m["content"] for m in chat_of(index) if m["role"] == "assistant"],
            torch.zeros(len(ids)).bool(),
        )
        for answer in answers:
            start = len(
                tokenizer(text[: text.index(f"assistant: {answer}") + 11], add_special_tokens=False)["input_ids"]
            )
            learned[start : start + len(answer.encode()) + 1] = True
        with torch.no_grad():
            logits = model(ids[None]).logits[0, :-1]
        losses.append(cross_entropy(logits[learned[1:]], ids[1:][learned[1:]], reduction="none"))
    assert float(run.callback_metrics["val_loss"]) == pytest.approx(float(torch.cat(losses).mean()), rel=1e-5)


def test_model_that_mixes_conversations_gets_padded_rows_and_one_sentence(chats):
    model = CausalLM(config=MODEL)
    inner = model.model.model.forward
    model.model.model.forward = lambda *args, position_ids=None, **more: inner(*args, **more)
    with pytest.warns(UserWarning, match="is padded to a row of its own, because CausalLM lets the tokens") as told:
        batches, _ = fitted(small(chats), model)
    assert sum("row of its own" in str(warning.message) for warning in told) == 1
    assert all("attention_mask" in batch for batch in batches)


def test_interval_of_validation_longer_than_an_epoch_is_one_sentence(chats):
    with pytest.raises(
        DataError, match=r"an epoch has 5 training batches, but val_check_interval=50; .*_epoch to null"
    ):
        fitted(small(chats), val_check_interval=50)
    with pytest.raises(DataError, match=r"an epoch has 2 training batches, but val_check_interval=3"):
        fitted(small(chats), val_check_interval=3, limit_train_batches=2)
    fitted(small(chats), val_check_interval=50, check_val_every_n_epoch=None)
    fitted(small(chats), val_check_interval=50, limit_val_batches=0)


def test_packing_false_pads_without_a_word(chats):
    batches, _ = fitted(small(chats, packing=False))
    assert all("attention_mask" in batch for batch in batches)


# --- errors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        ({"messages": [user("a"), {"role": "bot", "content": "b"}]}, "message 2 has the role 'bot'"),
        ({"messages": [user("a"), assistant("")]}, "the answer in message 2 is empty"),
        ({"messages": [user("a")]}, "no message is the assistant's"),
        ({"messages": "hello"}, "'messages' must be a list of messages"),
        ({"other": 1}, "'messages' is missing"),
    ],
    ids=["role", "empty", "no answer", "string", "missing"],
)
@pytest.mark.parametrize("streaming", [False, True])
def test_bad_row_is_named_with_its_file_before_there_is_a_tokenizer(tmp_path, bad, reason, streaming):
    write(tmp_path / "a.jsonl", [{"messages": chat_of(n)} for n in range(3)])
    write(tmp_path / "b.jsonl", [{"messages": chat_of(3)}, bad, {"messages": chat_of(5)}])
    # datasets 4 does not read types that change; it counts rows from 0
    unread = r"b\.jsonl'\): .* changed from array to string in row 1"
    with pytest.raises(DataError, match=rf"row 2 of b\.jsonl: .*{reason}|{unread}") as raised:
        TextData(str(tmp_path), tokenizer="no/such/folder", streaming=streaming).check()
    assert str(raised.value).count("\n") == 0


def test_line_that_is_no_json_is_an_error_with_its_row(tmp_path):
    with pytest.raises(DataError, match="row 1"):
        small(write(tmp_path / "a.jsonl", [{"messages": chat_of(0)}, "{bad json"])).check()


@pytest.mark.parametrize(
    ("rows", "options", "reason"),
    [
        ([{"question": "a", "answer": "b"}], {}, "no column 'text'; set text_column to one of question, answer; conv"),
        ([{"q": "a"}], {"prompt_column": "q"}, "no columns 'q' and 'response'; set prompt_column and response_column"),
        (
            [{"messages": [{"role": "user"}]}],
            {"text_column": "body"},
            r"no column 'body'; set text_column to one of messages\.$",
        ),
        ([{"messages": chat_of(1)}], {}, "there is only 1 conversation, and one is held out"),
        ([{"messages": chat_of(n)} for n in range(5)], {}, "there are 4 training conversations, but one batch needs 8"),
    ],
    ids=["no columns", "half a pair", "named column", "one row", "too few"],
)
def test_data_that_cannot_be_trained_on_is_an_error(tmp_path, rows, options, reason):
    with pytest.raises(DataError, match=reason):
        built(write(tmp_path / "a.jsonl", rows), batch_size=8, **options)


def test_missing_and_unstable_templates_are_errors_that_say_what_to_do(tmp_path, chats):
    fast_tokenizer(None).save_pretrained(tmp_path / "base")
    with pytest.raises(ChatTemplateError, match=r"base' has no chat template.*data\.chat_template to a Jinja file"):
        small(chats, tokenizer=str(tmp_path / "base")).check()
    (tmp_path / "bad.jinja").write_text(FORGETFUL)
    with pytest.raises(ChatTemplateError, match=r"row 1 of chats\.jsonl: .* writes message 2 differently"):
        built(chats, tokenizer=str(tmp_path / "base"), chat_template=str(tmp_path / "bad.jinja"))
    (tmp_path / "good.jinja").write_text(CHATML)
    data = built(chats, tokenizer=str(tmp_path / "base"), chat_template=str(tmp_path / "good.jinja"))
    assert decoded(data.tokenizer, data.train_dataset[0]["labels"]).endswith("<|im_end|>\n")
    with pytest.raises(DataError, match=r"chat_template='none.jinja'\): there is no such file; .* Jinja file"):
        small(chats, chat_template="none.jinja")
