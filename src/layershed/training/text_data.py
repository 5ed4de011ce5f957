"""Text for causal language modelling: documents, packed sequences, loaders that resume exactly."""

from __future__ import annotations

import importlib
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import AutoTokenizer, ByT5Tokenizer

from layershed.errors import DataError
from layershed.extras import needs
from layershed.integration.lightning_private import epoch_in_progress
from layershed.integration.namespaces import InheritedDataModule
from layershed.training.epoch_sampler import EpochSampler
from layershed.training.packing import Packer, held_out_count, split_documents
from layershed.training.sources import BUILDERS, local_files, parse_hub

with needs("data", "TextData"):
    from torchdata.stateful_dataloader import StatefulDataLoader


class TextData(InheritedDataModule):
    """Text as batches ``{"input_ids": (B, T), "labels": (B, T)}`` of int64 token ids; labels equal the inputs.

    Documents are split into training and validation, tokenized, ended with the tokenizer's eos, concatenated and cut
    into sequences of ``block_size`` tokens. An incomplete last sequence is left out. The same arguments give the same
    batches. A resumed run sees the batches of the uninterrupted run, for the same ``num_workers``.

    Packed tokens are held in memory, 4 bytes each. Only ``"hub:..."`` writes to disk. The training loader shares the
    sequences among the devices; Lightning adds no sampler. The order depends on the epoch, which Lightning sets; in
    your own loop call ``loader.sampler.set_epoch(epoch)``.

    Args:
        source: The text: ``"pydoc"``, the English of Python's help topics (0.5 MB, offline); a .txt file (a document
            is a paragraph), or a .jsonl, .json or .parquet file (a document is a row); a folder of such files of one
            type; ``"hub:<name>"`` or ``"hub:<name>:<config>"``, a dataset of the Hugging Face hub.
        tokenizer: None or ``"bytes"`` for one token per byte (a vocabulary of 259); else a local folder, a hub id, or
            the path of a .gguf file.
        text_column: Column of the text, in .jsonl, .json, .parquet and hub sources.
        block_size: Tokens per sequence, T; at least 2.
        batch_size: Sequences per batch and device, B.
        val_fraction: Share of the documents to hold out, in (0, 1); of the sequences if there is only one document.
            Not used if a hub dataset has a split named "validation".
        max_tokens: Largest number of training tokens, for quick runs; None for all.
        num_workers: Processes that load batches; 0 for none.
        seed: Seed of the split and of the shuffling.

    Raises:
        DataError: At once, if an argument is invalid, or a file is missing, empty or of an unknown type. In
            ``prepare_data`` and ``setup``, if the text cannot be read or is too short.

    Example:
        >>> data = TextData("pydoc", block_size=128)
        >>> data.vocab_size
        259
    """

    def __init__(
        self,
        source: str = "pydoc",
        tokenizer: str | None = None,
        text_column: str = "text",
        block_size: int = 256,
        batch_size: int = 16,
        val_fraction: float = 0.05,
        max_tokens: int | None = None,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        for name, value, least in (
            ("block_size", block_size, 2),
            ("batch_size", batch_size, 1),
            ("num_workers", num_workers, 0),
        ):
            if value < least:
                raise DataError(f"TextData({name}={value}): {name} must be at least {least}.")
        if not 0 < val_fraction < 1:
            raise DataError(f"TextData(val_fraction={val_fraction}): val_fraction must be in (0, 1).")
        if max_tokens is not None and max_tokens < batch_size * block_size:
            raise DataError(
                f"TextData(max_tokens={max_tokens}): max_tokens must be at least "
                f"batch_size * block_size = {batch_size * block_size}, the tokens of one batch."
            )
        if tokenizer is not None and tokenizer.endswith(".gguf") and not Path(tokenizer).expanduser().is_file():
            raise DataError(f"TextData(tokenizer={tokenizer!r}): there is no such file; give the path of a .gguf file.")
        self.source, self.text_column, self.seed = source, text_column, seed
        self.block_size, self.batch_size, self.num_workers = block_size, batch_size, num_workers
        self.val_fraction, self.max_tokens = val_fraction, max_tokens
        self.train_dataset: Any = None
        self.val_dataset: Any = None
        self._hub = parse_hub(source)
        self._files = [] if self._hub or source == "pydoc" else local_files(source)
        self._tokenizer_name, self._tokenizer = tokenizer, None

    @property
    def tokenizer(self) -> Any:
        """The transformers tokenizer, loaded at first use.

        Raises:
            DataError: If it cannot be loaded.
        """
        if self._tokenizer is None:
            self._tokenizer = _load_tokenizer(self._tokenizer_name)
        return self._tokenizer

    @property
    def vocab_size(self) -> int:
        """Number of token ids, ``len(tokenizer)``; the model needs at least as many embeddings."""
        return len(self.tokenizer)

    def prepare_data(self) -> None:
        """Download from the hub. Lightning calls it in one process of each machine.

        Raises:
            DataError: If the dataset or the tokenizer cannot be loaded.
        """
        _ = self.tokenizer
        if self._hub:
            self._load_hub(*self._hub)

    def setup(self, stage: str | None = None) -> None:
        """Build ``train_dataset`` and ``val_dataset``, once; items are ``{"input_ids": (T,)}``.

        Args:
            stage: Not used; every stage needs the same data.

        Raises:
            DataError: If the text cannot be read, lacks the column, or is too short for one training batch on every
                device and one validation sequence.
        """
        if self.train_dataset is not None:
            return
        # Each call has its own cache, so that an edited file is read again.
        with _no_progress_bars(), tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as cache:
            train, val = self._packed(*self._load(cache))
        self.train_dataset, self.val_dataset = train, val

    def train_dataloader(self) -> StatefulDataLoader:
        """Shuffled full batches of this device's share. The state is epoch and position, on every rank."""
        self.setup()
        sampler = EpochSampler(self.train_dataset, self.batch_size, self.seed, **self._share())
        if self.trainer is not None:
            # Resuming at the end of an epoch, Lightning iterates the loader before it sets the epoch.
            sampler.set_epoch(epoch_in_progress(self.trainer))
        with warnings.catch_warnings():
            # torchdata 0.11 calls torch.set_vital, which torch 2.13 deprecates.
            warnings.filterwarnings("ignore", message="'set_vital' is deprecated")
            return StatefulDataLoader(self.train_dataset, sampler=sampler, drop_last=True, **self._loader_options())

    def val_dataloader(self) -> DataLoader[Any]:
        """The held-out sequences in order. The last batch can be smaller."""
        self.setup()
        return DataLoader(self.val_dataset, shuffle=False, **self._loader_options())

    def test_dataloader(self) -> DataLoader[Any]:
        """The same as :meth:`val_dataloader`."""
        return self.val_dataloader()

    def predict_dataloader(self) -> DataLoader[Any]:
        """The same as :meth:`val_dataloader`."""
        return self.val_dataloader()

    def _loader_options(self) -> dict[str, Any]:
        # Its own generator: reading batches must not change the global random state, which dropout uses.
        own = torch.Generator().manual_seed(self.seed)
        sizes = {"batch_size": self.batch_size, "num_workers": self.num_workers}
        return {**sizes, "collate_fn": _collate, "generator": own}

    def _share(self) -> dict[str, int]:
        distributed = None if self.trainer is None else self.trainer.distributed_sampler_kwargs
        return distributed or {"num_replicas": 1, "rank": 0}

    def _load(self, cache: str) -> tuple[Any, Any]:
        """Documents for training, and for validation if the source has such a split, else None."""
        if self._hub:
            splits = self._load_hub(*self._hub)
            if "train" not in splits:
                raise DataError(
                    f"{self._where}: there is no split 'train' among {', '.join(splits)}; give another dataset."
                )
            own = splits.get("validation")
            return self._texts(splits["train"]), None if own is None else self._texts(own)
        with needs("data", "TextData"):
            import datasets  # here because it takes half a second

        if self.source == "pydoc":
            topics = importlib.import_module("pydoc_data.topics").topics
            return self._texts(datasets.Dataset.from_dict({"text": list(topics.values())})), None
        builder = BUILDERS[self._files[0].suffix.lower()]
        options = {"sample_by": "paragraph"} if builder == "text" else {}
        files = {"train": [str(file) for file in self._files]}
        with _as_data_error(f"{self._where}: the text could not be read"):
            splits = datasets.load_dataset(builder, data_files=files, cache_dir=cache, **options)
        return self._texts(splits["train"]), None

    def _load_hub(self, name: str, config: str | None) -> Any:
        import datasets

        with _as_data_error(f"{self._where}: the dataset could not be loaded from the hub"):
            return datasets.load_dataset(name, config)

    def _texts(self, rows: Any) -> Any:
        """The rows with text, reduced to the text column."""
        if self.text_column not in rows.column_names:
            raise DataError(
                f"{self._where}: there is no column {self.text_column!r}; set text_column to one of "
                f"{', '.join(rows.column_names) or '(no columns)'}."
            )
        kind = getattr(rows.features[self.text_column], "dtype", "nested")
        if kind not in ("string", "large_string"):
            raise DataError(
                f"{self._where}: the column {self.text_column!r} must hold text, but its type is {kind}; name another."
            )
        texts = rows.select_columns(self.text_column).filter(
            _have_text, batched=True, input_columns=self.text_column, keep_in_memory=True, load_from_cache_file=False
        )
        if len(texts) == 0:
            raise DataError(f"{self._where}: there is no text in it; give a source with text.")
        return texts

    def _packed(self, documents: Any, held_out: Any) -> tuple[Any, Any]:
        """Packed training and validation sequences, checked for size."""
        limit = None if self.max_tokens is None else self.max_tokens // self.block_size
        if held_out is None and len(documents) == 1:
            sequences, tokens = self._pack(documents, None)
            last = held_out_count(len(sequences), self.val_fraction) if len(sequences) > 1 else 0
            first = len(sequences) - last
            val, val_tokens = sequences.select(range(first, len(sequences))), last * self.block_size
            train = sequences.select(range(first if limit is None else min(limit, first)))
            train_tokens = tokens - val_tokens
        else:
            if held_out is None:
                kept, held = split_documents(len(documents), self.val_fraction, self.seed)
                documents, held_out = documents.select(kept), documents.select(held)
            train, train_tokens = self._pack(documents, limit)
            val, val_tokens = self._pack(held_out, None)
        self._check_size(train, min(train_tokens, self.max_tokens or train_tokens), val, val_tokens)
        return train, val

    def _pack(self, documents: Any, limit: int | None) -> tuple[Any, int]:
        """At most ``limit`` sequences, and the number of tokens they were packed from."""
        from datasets import Features, List, Value

        packer = Packer(self.tokenizer, self.block_size, limit)
        packed = documents.map(
            packer,
            batched=True,
            batch_size=100,
            input_columns=self.text_column,
            remove_columns=documents.column_names,
            features=Features({"input_ids": List(Value("int32"), length=self.block_size)}),
            keep_in_memory=True,
            load_from_cache_file=False,
        )
        return packed.with_format("torch"), packer.tokens

    def _check_size(self, train: Any, train_tokens: int, val: Any, val_tokens: int) -> None:
        devices = self._share()["num_replicas"]
        if len(train) < self.batch_size * devices:
            raise DataError(
                f"{self._where}: there are {train_tokens} training tokens, but one batch needs "
                f"{self.batch_size * devices * self.block_size} (batch_size={self.batch_size} times "
                f"block_size={self.block_size} times {devices} device(s)); give more text, or lower one of them."
            )
        if len(val) == 0:
            raise DataError(
                f"{self._where}: there are {val_tokens} validation tokens, but one sequence needs "
                f"block_size={self.block_size}; give more text, raise val_fraction or lower block_size."
            )

    @property
    def _where(self) -> str:
        return f"TextData(source={self.source!r})"


def _collate(items: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    input_ids = torch.stack([item["input_ids"] for item in items])  # (B, T)
    return {"input_ids": input_ids, "labels": input_ids.clone()}


def _have_text(texts: Sequence[str | None]) -> list[bool]:
    return [bool(text and text.strip()) for text in texts]


def _load_tokenizer(name: str | None) -> Any:
    if name is None or name == "bytes":
        return ByT5Tokenizer(extra_ids=0)
    path = Path(name).expanduser()
    remedy = "; set data.tokenizer to another folder, or to bytes"
    with _as_data_error(f"TextData(tokenizer={name!r}): the tokenizer could not be loaded", remedy):
        if path.suffix == ".gguf":
            return AutoTokenizer.from_pretrained(str(path.parent), gguf_file=path.name, trust_remote_code=False)
        return AutoTokenizer.from_pretrained(str(path) if path.exists() else name, trust_remote_code=False)


@contextmanager
def _as_data_error(what: str, remedy: str = "") -> Iterator[None]:
    """Turn an error of the Hugging Face libraries into a DataError of one sentence."""
    try:
        yield
    except Exception as error:  # their back ends raise anything: tokenizers raises a bare Exception
        # for a broken file, the message of datasets gives no reason; its cause does
        reason = next(iter(str(error.__cause__ or error).splitlines()), type(error).__name__)
        raise DataError(f"{what} ({reason.rstrip('.')}){remedy}.") from error


@contextmanager
def _no_progress_bars() -> Iterator[None]:
    """Hide the progress bars of datasets, unless the environment asks for them, and restore them."""
    import datasets

    hide = datasets.config.HF_DATASETS_DISABLE_PROGRESS_BARS is None and not datasets.are_progress_bars_disabled()
    if hide:
        datasets.disable_progress_bars()
    try:
        yield
    finally:
        if hide:
            datasets.enable_progress_bars()
