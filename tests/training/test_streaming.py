"""Streams, against their rows read at once; interrupted ones against uninterrupted ones; ranks against each other."""

import itertools
import json
import warnings
from types import SimpleNamespace

import datasets
import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from layershed.callbacks import ExactResume
from layershed.errors import DataError
from layershed.training.causal_lm import CausalLM
from layershed.training.streaming import StreamedSequences
from layershed.training.text_data import TextData
from tests.support.chats import assistant, chat_of, user
from tests.support.small_world import TINY

ROWS, HELD = 40, 4


@pytest.fixture(scope="module")
def parquet(tmp_path_factory):
    """A folder of three files of conversations."""
    folder = tmp_path_factory.mktemp("stream")
    for part in range(3):
        numbers = range(ROWS)[part::3]
        rows = [{"messages": chat_of(number)} for number in sorted(numbers)]
        datasets.Dataset.from_list(rows).to_parquet(folder / f"{part}.parquet")
    return str(folder)


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("stream") / "text.jsonl"
    path.write_text("".join(json.dumps({"text": f"{n:02d} is {n}, " * (n % 4)}) + "\n" for n in range(ROWS)))
    return str(path)


def streamed(source, rank=0, ranks=1, **options):
    settings = {"block_size": 64, "batch_size": 2, "val_rows": HELD, "shuffle_rows": 7, "streaming": True}
    data = TextData(source, **{**settings, **options})
    share = {"num_replicas": ranks, "rank": rank}
    if ranks > 1:
        data.trainer = SimpleNamespace(distributed_sampler_kwargs=share, lightning_module=torch.nn.Linear(1, 1))
    data.setup()
    return data


def one_pass(data):
    """The sequences of the first pass, as tuples."""
    found = []
    dataset = data.train_dataset
    for item in dataset:
        if dataset.state_dict()["pass"] > 0:
            break
        found.append(tuple(map(int, item["input_ids"])))
    return found


def written(data, numbers):
    """The tokens of some conversations."""
    apply, encode = data.tokenizer.apply_chat_template, data.tokenizer
    texts = [apply(chat_of(number), tokenize=False) for number in numbers]
    return {tuple(encode(text, add_special_tokens=False)["input_ids"]) for text in texts}


def order_of_rows():
    return [number for part in range(3) for number in sorted(range(ROWS)[part::3])]


def test_stream_gives_every_row_once_a_pass_but_the_held_out_ones(parquet):
    data, numbers = streamed(parquet, block_size=256), order_of_rows()
    found = one_pass(data)
    assert len(found) == len(set(found)) == ROWS - HELD
    assert set(found) == written(data, numbers[HELD:])
    assert {tuple(map(int, item["input_ids"])) for item in data.val_dataset} == written(data, numbers[:HELD])


def test_stream_of_text_is_packed_like_the_rows_read_at_once(text):
    """Without shuffling, the sequences are the documents after the held-out ones, joined and cut."""
    data = streamed(text, shuffle_rows=1, val_rows=8)
    documents = [f"{n:02d} is {n}, " * (n % 4) for n in range(8, ROWS) if n % 4]
    joined = [token for document in documents for token in [*(byte + 3 for byte in document.encode()), 1]]
    expected = [tuple(joined[start : start + 64]) for start in range(0, len(joined) - 63, 64)]
    assert one_pass(data) == expected


def test_stream_of_the_hub_holds_out_its_validation_split(monkeypatch):
    asked = []

    def stream(numbers):
        return datasets.Dataset.from_list([{"messages": chat_of(number)} for number in numbers]).to_iterable_dataset()

    def load_dataset(*args, **options):
        asked.append((args, options))
        return {"train": stream(range(10)), "validation": stream(range(20, 30))}

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    data = streamed("hub:me/chats", block_size=256)
    assert asked == [(("me/chats", None), {"streaming": True})]
    assert set(one_pass(data)) == written(data, range(10))
    assert {tuple(map(int, item["input_ids"])) for item in data.val_dataset} == written(data, range(20, 20 + HELD))


def test_order_of_a_stream_depends_on_seed_and_pass(parquet):
    def passes(count, **options):
        data = streamed(parquet, block_size=256, **options)
        items = itertools.islice(data.train_dataset, count * (ROWS - HELD))
        found = [tuple(map(int, item["input_ids"])) for item in items]
        return [found[start : start + ROWS - HELD] for start in range(0, len(found), ROWS - HELD)]

    first, second = passes(2)
    assert first != second
    assert sorted(first) == sorted(second)
    assert passes(1) == [first]
    assert passes(1, seed=1) != [first]


@pytest.mark.parametrize("ranks", [2, 3])
def test_ranks_share_the_rows_of_a_stream(parquet, ranks):
    shares = [one_pass(streamed(parquet, rank, ranks, block_size=256, packing=False)) for rank in range(ranks)]
    everything = [row for share in shares for row in share]
    assert len(everything) == len(set(everything)) == ROWS - HELD
    assert set(everything) == set(one_pass(streamed(parquet, block_size=256)))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


@pytest.mark.default_cases(2)
@pytest.mark.parametrize("kind", ["parquet", "text"])
@pytest.mark.parametrize("workers", [0, 1])
def test_stream_interrupted_anywhere_goes_on_with_the_next_batch(request, kind, workers):
    source = request.getfixturevalue(kind)

    def loader():
        return streamed(source, num_workers=workers, val_rows=8).train_dataloader()

    def batches(some, count):
        return [batch["input_ids"].tolist() for batch in itertools.islice(some, count)]

    whole = batches(loader(), 24)
    assert len({str(batch) for batch in whole}) > 12
    for cut in (1, 4, 13, 23) if workers == 0 else (5,):
        first = loader()
        iterator = iter(first)
        seen = batches(iterator, cut)
        state = json.loads(json.dumps(first.state_dict()))
        del iterator
        again = loader()
        again.load_state_dict(state)
        assert [*seen, *batches(again, 24 - cut)] == whole


# --- runs -------------------------------------------------------------------------------------------------------------


def run(source, folder, resume=None, *, steps=9, num_workers=0, **trainer):
    """Weights, metrics and seen batches of a run of a stream."""
    seen = []

    class Seen(pl.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            seen.append(batch["input_ids"].tolist())

    torch.manual_seed(0)
    settings = {"max_steps": steps, "val_check_interval": 3, "max_epochs": -1, "check_val_every_n_epoch": None}
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    save = ModelCheckpoint(folder, filename="{step}", every_n_train_steps=4, save_top_k=-1)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*does not have many workers")
        warnings.filterwarnings("ignore", ".*isinstance.treespec, LeafSpec")
        warnings.filterwarnings("ignore", ".*dirpath has changed")
        warnings.filterwarnings("ignore", ".*has `__len__` defined")
        fit = pl.Trainer(callbacks=[Seen(), ExactResume(), save], **{**settings, **quiet, **trainer})
        model = CausalLM(config=TINY, warmup_steps=2)
        sizes = {"block_size": 64, "batch_size": 2, "val_rows": HELD, "shuffle_rows": 7}
        data = TextData(source, streaming=True, num_workers=num_workers, **sizes)
        fit.fit(model, data, ckpt_path=resume)
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}, dict(fit.callback_metrics), seen


@pytest.mark.parametrize(
    ("workers", "limit"),
    [
        pytest.param(0, 1.0, id="alone"),
        pytest.param(1, 1.0, id="worker", marks=pytest.mark.slow),
        pytest.param(1, 4, id="between epochs", marks=pytest.mark.slow),
    ],
)
def test_resumed_run_of_a_stream_equals_the_uninterrupted_one(parquet, tmp_path, workers, limit):
    options = {"num_workers": workers, "limit_train_batches": limit}
    weights, metrics, seen = run(parquet, tmp_path / "whole", **options)
    again, same_metrics, later = run(parquet, tmp_path / "resumed", tmp_path / "whole" / "step=4.ckpt", **options)
    assert seen[4:] == later
    assert all(torch.equal(tensor, again[name]) for name, tensor in weights.items())
    assert metrics == same_metrics
    assert "val_loss" in metrics


def test_run_without_an_end_is_refused_before_training(parquet, tmp_path):
    with pytest.raises(DataError, match=r"a stream has no end, so the run has none; set trainer\.max_steps\.$"):
        run(parquet, tmp_path, steps=-1)


@pytest.mark.default_cases(1)
@pytest.mark.parametrize("workers", [0, 1])
def test_epochs_of_a_stream_go_on_where_the_last_one_ended(parquet, tmp_path, workers):
    _, _, whole = run(parquet, tmp_path / "one", steps=6, limit_val_batches=0, num_workers=workers)
    _, _, seen = run(
        parquet, tmp_path / "three", steps=6, limit_val_batches=0, limit_train_batches=2, num_workers=workers
    )
    assert seen == whole


# --- errors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"num_workers": 2}, r"num_workers=2\): one process reads a stream for each device; set num_workers to 0 or 1"),
        ({"max_tokens": 10**6}, r"max_tokens=1000000\): a stream has no end; set trainer.max_steps"),
        ({"val_rows": 0}, "val_rows must be at least 1"),
        ({"shuffle_rows": 0}, "shuffle_rows must be at least 1"),
    ],
)
def test_options_that_do_not_go_with_a_stream_are_refused_at_once(options, reason):
    with pytest.raises(DataError, match=reason):
        TextData("pydoc", streaming=True, **options)


def test_bad_row_in_mid_stream_is_left_out_with_one_warning(tmp_path):
    rows = [{"messages": chat_of(number)} for number in range(12)]
    rows[8] = rows[10] = {"messages": [user("a"), assistant("")]}
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = streamed(str(path), block_size=256)
    with pytest.warns(UserWarning, match=r"row 9 of a\.jsonl: the answer in message 2 is empty.* is left out") as told:
        found = one_pass(data)
    assert len(told) == 1
    assert set(found) == written(data, [4, 5, 6, 7, 9, 11])


def test_text_of_another_type_in_mid_stream_is_left_out_with_one_warning(monkeypatch):
    """As a row that is no conversation is; the sequences are those of the stream without it."""

    def one(rows):
        load = datasets.IterableDataset.from_generator(lambda: iter([{"text": text} for text in rows]))
        monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: {"train": load})
        return streamed("hub:me/text", block_size=16, val_rows=2, shuffle_rows=1)

    texts = [f"{number} is not {number + 1}, and never will be." for number in range(8)]
    expected = one_pass(one(texts))
    with pytest.warns(UserWarning, match=r"row 6: the column 'text' must hold text.* is left out") as told:
        found = one_pass(one([*texts[:5], 3, texts[5], ["a"], *texts[6:]]))
    assert len(told) == 1
    assert found == expected


@pytest.mark.parametrize("kind", ["parquet", "text"])
def test_stream_whose_rows_are_all_held_out_is_refused_before_there_is_a_model(request, kind):
    source = request.getfixturevalue(kind)
    TextData(source, streaming=True, val_rows=ROWS - 1).check()
    with pytest.raises(DataError, match=rf"has {ROWS} rows, and the first {ROWS} are held out .* lower val_rows"):
        TextData(source, streaming=True, val_rows=ROWS).check()


def test_stream_without_sequences_is_an_error_and_no_endless_loop(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": "much text " * 10}) + "\n" for _ in range(4)) + '{"text": "x"}\n')
    with pytest.raises(DataError, match="rank 0 no sequence in a whole pass; give more rows"):
        next(iter(streamed(str(path)).train_dataset))
    with pytest.raises(DataError, match="hold no validation sequence of block_size=64; raise val_rows"):
        streamed(_short(tmp_path), val_rows=2)


def _short(folder):
    path = folder / "b.jsonl"
    path.write_text('{"text": "x"}\n' * 9)
    return str(path)


def test_state_of_a_stream_is_a_copy():
    stream = StreamedSequences(None, None, skip=0, size=1, seed=0, rank=0, ranks=1, where="here")
    stream.state_dict()["rest"].append(1)
    assert stream.state_dict()["rest"] == []
