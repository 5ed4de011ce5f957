"""Documents, packing and split against plain Python; batches of interrupted runs against uninterrupted ones."""

import hashlib
import json
import logging
import os
import tempfile
from pydoc_data.topics import topics
from types import SimpleNamespace

import datasets
import lightning.pytorch as pl
import pytest
import tokenizers
import torch
from hypothesis import given
from hypothesis import strategies as st
from lightning.pytorch.callbacks import ModelCheckpoint
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast

from layershed.errors import DataError
from layershed.training.packing import Packer, split_documents
from layershed.training.text_data import TextData
from tests.support.thinned import some_of

# No two sequences of 16 bytes are alike, so that batches can be compared as sets.
DIGESTS = [hashlib.sha256(bytes([number])).hexdigest() for number in range(30)]
DOCUMENTS = [f"{digest}\nä {digest[::-1]}" for digest in DIGESTS]


def byte_stream(documents):
    return [token for text in documents for token in [byte + 3 for byte in text.encode()] + [1]]


def blocks(stream, size):
    return [stream[start : start + size] for start in range(0, len(stream) - size + 1, size)]


def rows(dataset):
    return [item["input_ids"].tolist() for item in dataset]


def write(folder, name, documents, column="text"):
    path = folder / name
    if path.suffix.lower() == ".txt":
        path.write_text("\n\n".join(documents), encoding="utf-8")
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps({"id": 1, column: text}) + "\n" for text in documents), encoding="utf-8")
    elif path.suffix == ".json":
        path.write_text(json.dumps([{"id": 1, column: text} for text in documents]), encoding="utf-8")
    else:
        datasets.Dataset.from_dict({"id": [1] * len(documents), column: documents}).to_parquet(path)
    return str(path)


def small(source, **options):
    return TextData(source, **{"block_size": 16, "batch_size": 4, "val_fraction": 0.2, **options})


def built(source, **options):
    data = small(source, **options)
    data.setup()
    return data


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    """A temporary cache for datasets, so that a test sees writes into the user's cache."""
    cache = tmp_path / "home"
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(cache))
    return cache


@pytest.fixture
def text_file(tmp_path):
    return write(tmp_path, "text.txt", DOCUMENTS)


# --- documents, packing, split ---------------------------------------------------------------------------------------


def check_against_reference(data, documents, size):
    kept, held = split_documents(len(documents), data.val_fraction, data.seed)
    assert rows(data.train_dataset) == blocks(byte_stream(documents[index] for index in kept), size)
    assert rows(data.val_dataset) == blocks(byte_stream(documents[index] for index in held), size)


def test_pydoc_source_packs_like_plain_python():
    data = TextData()
    data.prepare_data()
    data.setup("fit")
    check_against_reference(data, list(topics.values()), 256)


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.json", "a.parquet", "A.TXT"])
def test_file_source_packs_like_plain_python(tmp_path, name):
    blank = [" \t\n "] if name.lower().endswith("txt") else ["", "  \n", None]
    path = write(tmp_path, name, DOCUMENTS[:10] + blank + DOCUMENTS[10:])
    check_against_reference(built(path), DOCUMENTS, 16)


def test_folder_source_reads_files_in_order_of_name(tmp_path):
    folder = tmp_path / "folder"
    (folder / "deeper").mkdir(parents=True)
    (folder / "README.md").write_text("not text of the source")
    write(folder, "b.json", DOCUMENTS[20:])
    write(folder, "a.jsonl", DOCUMENTS[:20])
    check_against_reference(built(str(folder)), DOCUMENTS, 16)


def test_source_path_expands_the_home_folder(tmp_path, text_file, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    check_against_reference(built("~/text.txt"), DOCUMENTS, 16)


def test_text_column_selects_the_column(tmp_path):
    check_against_reference(
        built(write(tmp_path, "a.jsonl", DOCUMENTS, column="body"), text_column="body"), DOCUMENTS, 16
    )


@given(st.lists(st.text(st.characters(codec="utf-8"), max_size=30), max_size=12), st.integers(1, 5), st.integers(2, 9))
def test_packing_does_not_depend_on_how_documents_are_batched(documents, batch, size):
    documents = [text.replace("<", "") for text in documents]  # "</s>" in a text is the token, not its bytes
    packer, limited = (Packer(ByT5Tokenizer(extra_ids=0), size, limit) for limit in (None, 3))
    packed, prefix = [], []
    for start in range(0, len(documents), batch):
        packed += packer(documents[start : start + batch])["input_ids"]
        prefix += limited(documents[start : start + batch])["input_ids"]
    expected = byte_stream(documents)
    assert packed == blocks(expected, size)
    assert prefix == packed[:3]
    assert packer.tokens == len(expected)


@given(st.integers(2, 200), st.floats(0.001, 0.999), st.integers(0, 5))
def test_document_split_is_an_ordered_partition(count, fraction, seed):
    kept, held = split_documents(count, fraction, seed)
    assert sorted(kept + held) == list(range(count))
    assert (kept, held) == (sorted(kept), sorted(held))
    assert kept
    assert held
    assert len(held) == pytest.approx(min(max(count * fraction, 1), count - 1), abs=0.5)
    assert split_documents(count, fraction, seed) == (kept, held)


def test_document_split_depends_on_the_seed():
    assert split_documents(100, 0.1, 0) != split_documents(100, 0.1, 1)


def test_single_document_is_split_by_sequences(tmp_path):
    text = "one document, " * 40
    data = built(write(tmp_path, "one.txt", [text]), val_fraction=0.25)
    expected = blocks(byte_stream([text]), 16)
    held = round(len(expected) * 0.25)
    assert rows(data.train_dataset) == expected[:-held]
    assert rows(data.val_dataset) == expected[-held:]


@pytest.mark.parametrize("documents", [DOCUMENTS, ["one document, " * 40]], ids=["many", "one"])
def test_max_tokens_keeps_the_first_training_sequences(tmp_path, documents):
    path = write(tmp_path, "a.txt", documents)
    whole, capped = built(path), built(path, max_tokens=100)
    assert rows(capped.train_dataset) == rows(whole.train_dataset)[:6]  # 100 // 16
    assert rows(capped.val_dataset) == rows(whole.val_dataset)


def test_max_tokens_stops_tokenizing_early():
    seen = []

    class Spy:
        eos_token_id = None

        def __call__(self, texts, **options):
            seen.extend(texts)
            return {"input_ids": [[0] * len(text) for text in texts]}

    packer = Packer(Spy(), 2, limit=2)
    assert [packer([text])["input_ids"] for text in ("abc", "defgh", "ijk")] == [[[0, 0]], [[0, 0]], []]
    assert seen == ["abc", "defgh"]


def test_second_setup_keeps_the_datasets(text_file):
    data = built(text_file)
    train, val = data.train_dataset, data.val_dataset
    data.setup("validate")
    assert data.train_dataset is train
    assert data.val_dataset is val


def test_text_data_leaves_no_files_on_disk(text_file, tmp_path, home, monkeypatch):
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(scratch))
    built(text_file)
    built("pydoc")
    assert not home.exists()
    assert not list(scratch.iterdir())


def test_edited_text_file_is_read_again(text_file, tmp_path):
    before = os.stat(text_file)
    first = rows(built(text_file).train_dataset)
    write(tmp_path, "text.txt", [text.replace("0", "1") for text in DOCUMENTS])
    os.utime(text_file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert rows(built(text_file).train_dataset) != first


@pytest.mark.parametrize("shown", [True, False], ids=["shown", "hidden"])
def test_datasets_progress_bars_are_hidden_and_restored(text_file, tmp_path, shown, capfd):
    empty = write(tmp_path, "blank.txt", [" "])
    (datasets.enable_progress_bars if shown else datasets.disable_progress_bars)()
    try:
        built(text_file)
        with pytest.raises(DataError):
            built(empty)
        assert datasets.are_progress_bars_disabled() is not shown
    finally:
        datasets.enable_progress_bars()
    assert capfd.readouterr().err == ""


def test_datasets_progress_bars_stay_if_the_environment_asks(text_file, monkeypatch, capfd):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_DISABLE_PROGRESS_BARS", False)
    built(text_file)
    assert "Map" in capfd.readouterr().err


# --- tokenizers ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [None, "bytes"])
def test_byte_tokenizer_gives_one_id_per_byte(name):
    data = TextData(tokenizer=name)
    assert data.vocab_size == 259
    assert data.tokenizer is data.tokenizer
    assert data.tokenizer("é", add_special_tokens=False)["input_ids"] == [0xC3 + 3, 0xA9 + 3]


def test_local_tokenizer_without_eos_packs_long_documents_without_warnings(text_file, tmp_path, caplog):
    logging.getLogger("transformers").addHandler(caplog.handler)  # its records do not reach the root
    words = sorted({word for text in DOCUMENTS for word in text.split()})
    model = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({word: index for index, word in enumerate(words)}, words[0])
    )
    model.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=model, model_max_length=2).save_pretrained(tmp_path / "words")
    data = built(text_file, tokenizer=str(tmp_path / "words"), block_size=5)
    kept, _ = split_documents(len(DOCUMENTS), 0.2, 0)
    expected = [words.index(word) for index in kept for word in DOCUMENTS[index].split()]
    assert data.vocab_size == len(words)
    assert rows(data.train_dataset) == blocks(expected, 5)
    logging.getLogger("transformers").removeHandler(caplog.handler)
    assert not caplog.records  # no word of documents longer than the model's context


@pytest.mark.pretrained
def test_gguf_tokenizer_round_trips_the_first_document():
    data = TextData("pydoc", tokenizer=os.environ["LAYERSHED_SMOLLM2"])
    data.setup()
    assert data.vocab_size == 49152
    kept, _ = split_documents(len(topics), 0.05, 0)
    stream = [token for block in rows(data.train_dataset) for token in block]
    first = stream[: stream.index(data.tokenizer.eos_token_id)]
    assert data.tokenizer.decode(first) == list(topics.values())[kept[0]]


# --- the hub ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def hub(monkeypatch):
    """A hub that serves the content of ``splits`` and records its calls."""
    served = SimpleNamespace(splits=datasets.DatasetDict(), calls=[])

    def load_dataset(*args, **options):
        served.calls.append((args, options))
        if isinstance(served.splits, Exception):
            raise served.splits
        return served.splits

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return served


@pytest.mark.parametrize(
    ("source", "asked"),
    [("hub:me/text", ("me/text", None)), ("hub:text:v1", ("text", "v1"))],
    ids=["name", "name and config"],
)
def test_hub_validation_split_becomes_the_held_out_text(hub, source, asked):
    hub.splits = datasets.DatasetDict(
        train=datasets.Dataset.from_dict({"text": DOCUMENTS[:25]}),
        validation=datasets.Dataset.from_dict({"text": DOCUMENTS[25:]}),
    )
    data = small(source)
    data.prepare_data()
    assert hub.calls == [(asked, {})]  # and so never trust_remote_code
    data.setup()
    assert rows(data.train_dataset) == blocks(byte_stream(DOCUMENTS[:25]), 16)
    assert rows(data.val_dataset) == blocks(byte_stream(DOCUMENTS[25:]), 16)


def test_hub_dataset_without_a_validation_split_is_split_here(hub):
    hub.splits = datasets.DatasetDict(train=datasets.Dataset.from_dict({"text": DOCUMENTS}))
    check_against_reference(built("hub:text"), DOCUMENTS, 16)


def test_hub_dataset_cache_is_not_written(hub, tmp_path):
    cache = tmp_path / "hub"
    train = datasets.Dataset.from_json(write(tmp_path, "a.jsonl", DOCUMENTS), cache_dir=str(cache))
    hub.splits = datasets.DatasetDict(train=train)
    before = sorted(cache.rglob("*"))
    check_against_reference(built("hub:text"), DOCUMENTS, 16)
    assert sorted(cache.rglob("*")) == before != []


def test_hub_dataset_without_a_training_split_is_an_error(hub):
    hub.splits = datasets.DatasetDict(test=datasets.Dataset.from_dict({"text": DOCUMENTS}))
    with pytest.raises(DataError, match=r"'hub:text'.*no split 'train' among test; give another dataset\.$"):
        built("hub:text")


def test_unreachable_hub_is_a_data_error(hub):
    hub.splits = ConnectionError("Couldn't reach the Hub.\nsecond line")
    with pytest.raises(DataError, match=r"'hub:text'.*hub \(Couldn't reach the Hub\)\.$") as raised:
        small("hub:text").prepare_data()
    assert raised.value.__cause__ is hub.splits


def test_pydoc_source_downloads_nothing(hub):
    small("pydoc").prepare_data()
    assert hub.calls == []


# --- errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"block_size": 1}, r"block_size=1\): block_size must be at least 2"),
        ({"batch_size": 0}, r"batch_size=0\): batch_size must be at least 1"),
        ({"num_workers": -1}, r"num_workers=-1\): num_workers must be at least 0"),
        ({"val_fraction": 0}, r"val_fraction=0\): val_fraction must be in \(0, 1\)"),
        ({"val_fraction": 1.0}, r"val_fraction=1.0\): val_fraction must be in \(0, 1\)"),
        ({"max_tokens": 4095}, r"max_tokens=4095\): .* at least batch_size \* block_size = 4096"),
        ({"tokenizer": "no/such.gguf"}, r"tokenizer='no/such.gguf'\): there is no such file"),
        ({"source": "hub:"}, r"source='hub:'\): write \"hub:<name>\" or \"hub:<name>:<config>\""),
        ({"source": "hub:a:b:c"}, r"write \"hub:<name>\" or \"hub:<name>:<config>\""),
        ({"source": "wikitext"}, r"'wikitext'.*\"pydoc\", a .txt, .jsonl, .json or .parquet file, a folder.*\"hub:"),
        ({"source": "no/such.txt"}, r"'no/such.txt'\): there is no such file or folder; source must be \"pydoc\""),
    ],
    ids=[
        "block_size 1",
        "batch_size 0",
        "num_workers -1",
        "val_fraction 0",
        "val_fraction 1",
        "max_tokens below a batch",
        "missing gguf tokenizer",
        "hub without a name",
        "hub with three parts",
        "unknown source",
        "missing file",
    ],
)
def test_text_data_refuses_invalid_arguments_at_once(options, message):
    with pytest.raises(DataError, match=message):
        TextData(**options)


def test_text_data_refuses_unusable_files_at_once(tmp_path):
    (tmp_path / "a.csv").write_text("text\nfine\n")
    with pytest.raises(DataError, match=r"a.csv'\): its name does not end in .txt, .jsonl, .json or .parquet; source"):
        TextData(str(tmp_path / "a.csv"))
    with pytest.raises(DataError, match=r"no file in it ends in .txt, .jsonl, .json or .parquet; source"):
        TextData(str(tmp_path))
    (tmp_path / "a.txt").touch()
    with pytest.raises(DataError, match=r"the file 'a.txt' is empty \(0 bytes\); remove it or fill it"):
        TextData(str(tmp_path / "a.txt"))
    write(tmp_path, "b.jsonl", DOCUMENTS)
    with pytest.raises(DataError, match=r"its files end in .jsonl, .txt; keep files of one type in a folder"):
        TextData(str(tmp_path))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"body": "x", "id": 1}\n', "no column 'text'; set text_column to one of body, id"),
        ("a.jsonl", b'{"text": 1}\n', "'text' must hold text, but its type is int64"),
        ("a.jsonl", b'{"text": ["a"]}\n', "'text' must hold text, but its type is nested"),
        ("a.jsonl", b'{"text": " "}\n', "there is no text in it"),
        ("a.txt", b"\n\n \n\n", "there is no text in it"),
        ("a.txt", b"\xff\xfe", r"could not be read \('utf-8' codec can't decode byte 0xff"),
        ("a.parquet", b"no parquet", r"could not be read \(Parquet "),
        ("a.txt", b"short", r"there are 6 training tokens, but one batch needs 64 \(batch_size=4 times block_size=16"),
        ("a.txt", b"x" * 70, r"there are 55 training tokens, but one batch needs 64"),  # 71 less one held-out sequence
    ],
    ids=[
        "no column",
        "numbers",
        "lists",
        "blank row",
        "blank paragraphs",
        "not UTF-8",
        "not parquet",
        "short",
        "short without the held-out text",
    ],
)
def test_unusable_text_file_is_a_data_error(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        built(str(tmp_path / name))


def test_too_little_held_out_text_is_an_error(tmp_path):
    path = write(tmp_path, "a.txt", ["short"] * 100)
    with pytest.raises(
        DataError, match=r"there are 6 validation tokens, but one sequence needs block_size=16; .* val_fraction"
    ):
        built(path, val_fraction=0.01)


def test_tokenizer_that_cannot_be_loaded_is_a_data_error(tmp_path):
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(DataError, match=r"tokenizer could not be loaded .*; set data\.tokenizer") as raised:
        TextData(tokenizer=str(tmp_path)).prepare_data()
    assert raised.value.__cause__ is not None


# --- loaders ---------------------------------------------------------------------------------------------------------


def sequences(batches):
    return [row for batch in batches for row in batch["input_ids"].tolist()]


def test_training_batches_are_shuffled_and_depend_on_seed_and_epoch(text_file):
    data = small(text_file, seed=3)  # the loaders call setup, as there is no Trainer here
    loader = data.train_dataloader()
    epochs = []
    for epoch in range(2):
        loader.sampler.set_epoch(epoch)
        batches = list(loader)
        assert len(batches) == len(loader) == len(data.train_dataset) // 4
        for batch in batches:
            assert batch["input_ids"].shape == batch["labels"].shape == (4, 16)
            assert batch["input_ids"].dtype == torch.int64
            assert torch.equal(batch["input_ids"], batch["labels"])
            batch["labels"].fill_(-100)
            assert not torch.equal(batch["input_ids"], batch["labels"])
        epochs.append(sequences(batches))
    every = {tuple(row) for row in rows(data.train_dataset)}
    assert all(len({*map(tuple, epoch)}) == len(epoch) and {*map(tuple, epoch)} <= every for epoch in epochs)
    assert epochs[0] != epochs[1]
    assert sequences(small(text_file, seed=3).train_dataloader()) == epochs[0]
    assert sequences(small(text_file, seed=3, num_workers=1).train_dataloader()) == epochs[0]
    assert sequences(small(text_file, seed=4).train_dataloader()) != epochs[0]


def test_held_out_loaders_give_every_sequence_in_order(text_file):
    data = small(text_file)
    for loader in (data.val_dataloader(), data.test_dataloader(), data.predict_dataloader()):
        assert sequences(loader) == rows(data.val_dataset)
    assert len(data.val_dataset) % 4  # so that the last batch was a smaller one


def test_reading_batches_leaves_the_global_random_state_alone(text_file):
    data = small(text_file)
    state = torch.get_rng_state()
    list(data.train_dataloader())
    list(data.val_dataloader())
    assert torch.equal(torch.get_rng_state(), state)


def on_rank(rank, text_file, **options):
    data = small(text_file, **options)
    progress = SimpleNamespace(current=SimpleNamespace(processed=0))
    share = {"num_replicas": 2, "rank": rank}
    data.trainer = SimpleNamespace(distributed_sampler_kwargs=share, fit_loop=SimpleNamespace(epoch_progress=progress))
    return data


def test_two_devices_get_disjoint_sequences_and_one_state(text_file):
    first, second = (on_rank(rank, text_file).train_dataloader() for rank in range(2))
    seen = [[*map(tuple, sequences(loader))] for loader in (first, second)]
    assert len(seen[0]) == len(seen[1]) == len(first) * 4
    assert not {*seen[0]} & {*seen[1]}
    assert first.state_dict() == second.state_dict()


def test_too_little_text_for_one_batch_per_device_is_an_error(text_file):
    with pytest.raises(DataError, match=r"one batch needs 4800 \(batch_size=150 times block_size=16 times 2 device"):
        on_rank(0, text_file, batch_size=150).setup()
    with pytest.raises(DataError, match="there are 70 training tokens, but one batch needs 128"):
        on_rank(0, text_file, max_tokens=70).setup()


# --- resuming --------------------------------------------------------------------------------------------------------

lightning_is_quiet = pytest.mark.filterwarnings(
    "ignore:.*does not have many workers:UserWarning",  # two cores here, and batches of 64 tokens
    "ignore:The dirpath has changed:UserWarning",  # on purpose, so that no run overwrites another's checkpoints
    "ignore:.*isinstance.treespec, LeafSpec:FutureWarning",  # Lightning 2.6 with torch 2.13
)


class Recorder(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen = []

    def training_step(self, batch, index):
        self.seen.append(batch["input_ids"].tolist())
        return self.weight * batch["input_ids"].float().mean()

    def validation_step(self, batch, index):
        pass

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def batches_of_run(text_file, folder, resume=None, workers=0, trainer=None, **checkpoint):
    model, data = Recorder(), small(text_file, max_tokens=400, num_workers=workers)
    pl.Trainer(
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[ModelCheckpoint(folder, filename="{step}", save_top_k=-1, **checkpoint)],
        **{"max_epochs": 2, **(trainer or {})},
    ).fit(model, data, ckpt_path=resume)
    return model.seen


@pytest.fixture
def whole(text_file, tmp_path):
    return batches_of_run(text_file, tmp_path / "whole", every_n_epochs=1, save_on_train_epoch_end=True)


@lightning_is_quiet
def test_training_text_is_shuffled_differently_in_each_epoch(whole):
    assert len(whole) == 12
    assert whole[:6] != whole[6:]


@pytest.mark.default_cases(1)
@lightning_is_quiet
@pytest.mark.parametrize(("cut", "workers"), some_of([*((step, 0) for step in range(1, 12)), (3, 1), (9, 1)], 3))
def test_interrupted_run_resumes_at_the_next_batch(whole, text_file, tmp_path, cut, workers):
    options = {"workers": workers, "every_n_train_steps": cut}
    first = batches_of_run(text_file, tmp_path / "cut", trainer={"max_steps": cut}, **options)
    second = batches_of_run(text_file, tmp_path / "resumed", resume=tmp_path / "cut" / f"step={cut}.ckpt", **options)
    assert first == whole[:cut]
    assert second == whole[cut:]


@pytest.mark.default_cases(1)
@lightning_is_quiet
@pytest.mark.parametrize("workers", [0, 1])
def test_run_resumed_at_an_epoch_end_sees_the_next_epoch(whole, text_file, tmp_path, workers):
    checkpoint = tmp_path / "whole" / "step=6.ckpt"
    assert batches_of_run(text_file, tmp_path / "resumed", resume=checkpoint, workers=workers) == whole[6:]
