"""Text and conversations for causal language modelling: sequences of tokens, and loaders that resume exactly."""

from __future__ import annotations

import warnings
from contextlib import suppress
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader

from layershed.errors import DataError
from layershed.extras import needs
from layershed.integration.lightning_private import epoch_in_progress
from layershed.integration.namespaces import InheritedDataModule
from layershed.training.as_data_error import UnreadableError, as_data_error
from layershed.training.chat_rows import ChatRows
from layershed.training.collate import collate
from layershed.training.data_checks import (
    batches_of_run,
    check_files,
    check_numbers,
    check_rows_left,
    check_split,
    check_stream,
    check_validation,
)
from layershed.training.epoch_sampler import EpochSampler
from layershed.training.isolation import packs
from layershed.training.packing import Made
from layershed.training.row_kinds import rows_of
from layershed.training.sources import Source, no_progress_bars
from layershed.training.stream_loader import StreamLoader
from layershed.training.streaming import StreamedSequences
from layershed.training.text_rows import TextRows
from layershed.training.tokenizer import check_chat_template, load_tokenizer, padding_id

with needs("data", "TextData"):
    from torchdata.stateful_dataloader import StatefulDataLoader


class TextData(InheritedDataModule):
    """Text or conversations as batches of int64 token ids: ``{"input_ids": (B, T), "labels": (B, T), ...}``.

    Text (a column of text): documents are tokenized, ended with the tokenizer's eos, concatenated and cut into
    sequences of ``block_size`` tokens. Labels equal the inputs. An incomplete last sequence is left out.

    Conversations (a column ``messages``, or a pair ``prompt`` and ``response``): the tokenizer's chat template writes
    them, and only the answers of the assistant have labels. Whole conversations share a sequence of ``block_size``
    tokens, with ``position_ids`` that begin again at 0, if the model of the Trainer keeps them apart, which is tried
    before training. Otherwise, and without a Trainer, each is a row, padded to the longest of its batch, with an
    ``attention_mask``. Of a longer conversation the beginning is cut; its last answer stays.

    Rows are split into training and validation. The same arguments give the same batches. A resumed run sees the
    batches of the uninterrupted run, for the same ``num_workers``.

    Tokens are held in memory, 4 bytes each, unless the source is streamed. Only ``"hub:..."`` writes to disk. The
    training loader shares the sequences among the devices; Lightning adds no sampler. The order depends on the epoch,
    which Lightning sets; in your own loop call ``loader.sampler.set_epoch(epoch)``.

    Args:
        source: The text: ``"pydoc"``, the English of Python's help topics (0.5 MB, offline); a .txt file (a document
            is a paragraph), or a .jsonl, .json or .parquet file (a document or conversation is a row); a folder of such
            files of one type; ``"hub:<name>"`` or ``"hub:<name>:<config>"``, a dataset of the Hugging Face hub.
        tokenizer: None or ``"bytes"`` for one token per byte (a vocabulary of 259); else a local folder, a hub id, or
            the path of a .gguf file.
        text_column: Column of the text, in .jsonl, .json, .parquet and hub sources. Without a column ``text``, rows
            with ``messages``, or with a prompt and a response, are conversations.
        prompt_column: Column of questions: text, or lists of messages.
        response_column: Column of answers; None for ``response`` or ``completion``.
        chat_template: Path of a Jinja file, the chat template; None for the tokenizer's own.
        mask_prompts: Whether only the answers in conversations have labels; otherwise every token has one.
        packing: Whether conversations may share a sequence.
        block_size: Tokens per sequence, T; at least 2.
        batch_size: Sequences per batch and device, B.
        val_fraction: Share of the rows to hold out, in (0, 1); of the sequences if there is only one document.
            Not used if a hub dataset has a split named "validation", or for a stream.
        max_tokens: Largest number of training tokens, for quick runs; None for all.
        num_workers: Processes that load batches; 0 for none. At most 1 for a stream.
        seed: Seed of the split and of the shuffling.
        streaming: Read the source while training, for data larger than memory. The stream begins again at its end, so
            the run needs ``max_steps``, and is one epoch. Every rank reads all rows and tokenizes its own share.
        val_rows: First rows of a stream that are held out for validation, at least 1.
        shuffle_rows: Rows of a stream that are shuffled together, held in memory; 1 keeps their order.

    Raises:
        DataError: At once, if an argument is invalid, or a file is missing, empty or of an unknown type. In ``check``,
            ``prepare_data`` and ``setup``, if the rows cannot be read, are wrong or too few. Names the row.
        ChatTemplateError: In ``check`` or ``setup``, if conversations cannot be written by the tokenizer's template.

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
        prompt_column: str = "prompt",
        response_column: str | None = None,
        chat_template: str | None = None,
        mask_prompts: bool = True,
        packing: bool = True,
        streaming: bool = False,
        val_rows: int = 100,
        shuffle_rows: int = 1000,
    ) -> None:
        super().__init__()
        check_numbers(block_size=(block_size, 2), batch_size=(batch_size, 1), num_workers=(num_workers, 0))
        check_numbers(val_rows=(val_rows, 1), shuffle_rows=(shuffle_rows, 1))
        check_split(val_fraction, max_tokens, batch_size * block_size)
        check_files(tokenizer, chat_template)
        if streaming:
            check_stream(num_workers, max_tokens)
        self.source, self.text_column, self.seed = source, text_column, seed
        self.block_size, self.batch_size, self.num_workers = block_size, batch_size, num_workers
        self.val_fraction, self.max_tokens = val_fraction, max_tokens
        self.prompt_column, self.response_column = prompt_column, response_column
        self.mask_prompts, self.packing = mask_prompts, packing
        self.streaming, self.val_rows, self.shuffle_rows = streaming, val_rows, shuffle_rows
        self.train_dataset: Any = None
        self.val_dataset: Any = None
        self._source = Source(source, streaming)
        self._checked: tuple[TextRows | ChatRows, Any, Any] | None = None
        self._made: tuple[Made, Made] | None = None  # the sequences of texts, which depend on no model
        self._tokenizer_name, self._chat_template = tokenizer, chat_template
        self._tokenizer: Any = None

    @property
    def tokenizer(self) -> Any:
        """The transformers tokenizer, loaded at first use.

        Raises:
            DataError: If it cannot be loaded.
        """
        if self._tokenizer is None:
            self._tokenizer = load_tokenizer(self._tokenizer_name, self._chat_template)
        return self._tokenizer

    @property
    def vocab_size(self) -> int:
        """Number of token ids, ``len(tokenizer)``; the model needs at least as many embeddings."""
        return len(self.tokenizer)

    @property
    def is_local(self) -> bool:
        """Whether the source is read without a network."""
        return self._source.is_local

    def check(self) -> None:
        """Read the source and check its rows, before there is a model. ``setup`` uses what was read.

        Raises:
            DataError: If the rows cannot be read, or one of them is wrong. Of a stream, only the held-out rows and the
                first one after them are read.
            ChatTemplateError: If there are conversations, and a tokenizer on disk has no chat template.
        """
        if self._checked is not None:
            return
        with no_progress_bars():
            try:
                self._checked = self._read(self._source)
            except UnreadableError:
                for part in self._source.parts():
                    self._read(part)  # names the file and the row
                raise
        rows, name = self._checked[0], self._tokenizer_name
        if rows.is_chat and (name in (None, "bytes") or Path(str(name)).expanduser().exists()):
            with suppress(DataError):  # the model's own error is clearer
                _ = self.tokenizer
            if self._tokenizer is not None:
                check_chat_template(self._tokenizer, name)

    def check_amount(self) -> None:
        """Tokenize, and refuse rows that give no batch or no validation sequence, before there is a model.

        A stream is not read. Conversations are tokenized again in ``setup``, where the model says if they are packed.

        Raises:
            DataError: If they are too few even for one device.
        """
        self.check()
        with suppress(DataError):  # the model's own error is clearer
            _ = self.tokenizer
        if self._checked is None or self._tokenizer is None or self.streaming:
            return
        rows, train, held_out = self._checked
        if isinstance(rows, ChatRows):
            check_chat_template(self.tokenizer, self._tokenizer_name)
        with no_progress_bars(), warnings.catch_warnings():
            if isinstance(rows, ChatRows):
                warnings.simplefilter("ignore")  # setup warns of the same
            made = rows.sequences(self.tokenizer, train, held_out, self.max_tokens)
            rows.check_size(*made, self.batch_size, 1)
        if not isinstance(rows, ChatRows):
            self._made = made

    def prepare_data(self) -> None:
        """Download from the hub. Lightning calls it in one process of each machine.

        Raises:
            DataError: If the dataset or the tokenizer cannot be loaded.
        """
        _ = self.tokenizer
        if not self.is_local:
            self._source.load_hub()

    def setup(self, stage: str | None = None) -> None:
        """Build ``train_dataset`` and ``val_dataset``, once. Their items hold ``input_ids``, and ``labels`` of chats.

        Args:
            stage: Every stage needs the same data; ``"fit"`` of a stream also needs a run that ends.

        Raises:
            DataError: If the rows cannot be read, are wrong, or are too few for one training batch on every device and
                one validation sequence.
        """
        if stage == "fit" and self.streaming and self.trainer is not None:
            check_validation(self.trainer, self._source, batches_of_run(self.trainer, self._source))
        if self.train_dataset is not None:
            return
        self.check()
        assert self._checked is not None
        rows, train, held_out = self._checked
        if isinstance(rows, ChatRows):
            check_chat_template(self.tokenizer, self._tokenizer_name)
            known = None if self.trainer is None else self.trainer.lightning_module
            rows.packed = self.packing and known is not None and packs(known, str(self._source))
        devices = self._share()["num_replicas"]
        with no_progress_bars():
            if self.streaming:
                self.train_dataset, self.val_dataset = self._streamed(rows, train, held_out)
            else:
                made = self._made or rows.sequences(self.tokenizer, train, held_out, self.max_tokens)
                rows.check_size(*made, self.batch_size, devices)
                self.train_dataset, self.val_dataset = made[0].sequences, made[1].sequences
        self._checked = self._made = None  # the text is no longer needed
        if stage == "fit" and self.trainer is not None and not self.streaming:
            check_validation(self.trainer, self._source, len(self.train_dataset) // (self.batch_size * devices))

    def train_dataloader(self) -> StatefulDataLoader[Any]:
        """Shuffled full batches of this device's share. The state is epoch and position, on every rank."""
        self.setup()
        options = {"drop_last": True, **self._loader_options()}
        with warnings.catch_warnings():
            # torchdata 0.11 calls torch.set_vital, which torch 2.13 deprecates.
            warnings.filterwarnings("ignore", message="'set_vital' is deprecated")
            if self.streaming:
                batches = None if self.trainer is None else batches_of_run(self.trainer, self._source)
                return StreamLoader(self.train_dataset, batches, **options)
            sampler = EpochSampler(self.train_dataset, self.batch_size, self.seed, **self._share())
            if self.trainer is not None:
                # Resuming at the end of an epoch, Lightning iterates the loader before it sets the epoch.
                sampler.set_epoch(epoch_in_progress(self.trainer))
            return StatefulDataLoader(self.train_dataset, sampler=sampler, **options)

    def val_dataloader(self) -> DataLoader[Any]:
        """The held-out sequences in order. The last batch can be smaller."""
        self.setup()
        return DataLoader(self.val_dataset, shuffle=False, **self._loader_options())

    test_dataloader = predict_dataloader = val_dataloader

    def _loader_options(self) -> dict[str, Any]:
        # Its own generator: reading batches must not change the global random state, which dropout uses.
        own = torch.Generator().manual_seed(self.seed)
        sizes = {"batch_size": self.batch_size, "num_workers": self.num_workers}
        return {**sizes, "collate_fn": partial(collate, padding=padding_id(self.tokenizer)), "generator": own}

    def _share(self) -> dict[str, int]:
        distributed = None if self.trainer is None else self.trainer.distributed_sampler_kwargs
        return distributed or {"num_replicas": 1, "rank": 0}

    def _read(self, source: Source) -> tuple[TextRows | ChatRows, Any, Any]:
        """What the rows are, those for training, and those held out, or None; checked."""
        train, held_out = source.load()
        rows = rows_of(
            source,
            train,
            (self.text_column, self.prompt_column, self.response_column),
            (self.val_fraction, self.seed),
            block_size=self.block_size,
            mask_prompts=self.mask_prompts,
        )
        if not source.streaming:
            return rows, rows.check(train), None if held_out is None else rows.check(held_out)
        with as_data_error(f"{source}: the rows could not be read"):
            first = list(islice(train, self.val_rows + 1))
        for index, row in enumerate(first):
            rows.check_row(row, index)
        check_rows_left(source, len(first), self.val_rows if held_out is None else 0)
        return rows, train, held_out

    def _streamed(self, rows: TextRows | ChatRows, train: Any, held_out: Any) -> tuple[Any, Any]:
        """Endless training sequences, and the held-out ones in memory."""
        window, share = partial(rows.window, self.tokenizer), self._share()
        first = list(enumerate(islice(train if held_out is None else held_out, self.val_rows)))
        val, _ = window(first, [])
        if not val:
            raise DataError(
                f"{self._source}: the first {len(first)} rows of the stream hold no validation sequence of "
                f"block_size={self.block_size}; raise val_rows or lower block_size."
            )
        return StreamedSequences(
            train,
            window,
            skip=len(first) if held_out is None else 0,
            size=self.shuffle_rows,
            seed=self.seed,
            rank=share["rank"],
            ranks=share["num_replicas"],
            where=str(self._source),
        ), val
