"""What a batch of text is: a mapping with ``input_ids``, or the token ids themselves."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from layershed.errors import BatchError


def iterate(batches: Any, max_batches: int | None = None) -> Iterator[Any]:
    """The first batches of an iterable.

    Raises:
        BatchError: If it is one batch, or no iterable.
    """
    if isinstance(batches, str | bytes | Mapping):
        raise BatchError(f"batches is {describe(batches)}, not an iterable of batches. Give a DataLoader, or [batch].")
    try:
        return islice(iter(batches), max_batches)
    except TypeError:
        raise BatchError(
            f"batches is {describe(batches)}, which cannot be iterated. Give a DataLoader, or a list of batches."
        ) from None


def as_inputs(batch: Any, main: str = "input_ids") -> dict[str, Any] | None:
    """The batch as keyword arguments of a transformer, or None if it is no batch.

    Arrays of numpy and lists of numbers become tensors.

    Args:
        batch: A mapping with the model's main input, or that input alone, such as token ids of shape (batch, tokens).
        main: Name of the main input; ``input_ids`` of text, ``pixel_values`` of pictures.
    """
    if isinstance(batch, Mapping):
        return {name: as_tensor(value) for name, value in batch.items()} if main in batch else None
    batch = as_tensor(batch)
    if isinstance(batch, Tensor) and main != "input_ids":
        return {main: batch}
    if isinstance(batch, Tensor) and batch.ndim == 2 and batch.dtype in (torch.int64, torch.int32):
        return {"input_ids": batch}
    return None


def as_tensor(value: Any) -> Any:
    """An array, or a list of numbers, as a tensor; anything else as it is."""
    if isinstance(value, Tensor) or not (isinstance(value, list | tuple) or hasattr(value, "__array__")):
        return value
    if isinstance(value, list | tuple) and value and all(isinstance(row, Tensor) for row in value):
        same = len({row.shape for row in value}) == 1 and value[0].ndim == 1
        return torch.stack(list(value)) if same else value
    try:
        return torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError):
        return value


def select(inputs: Mapping[str, Any], names: Iterable[str], device: torch.device) -> dict[str, Any]:
    """The inputs that have one of the names; tensors are moved to the device."""
    wanted = set(names)
    return {
        name: value.to(device) if isinstance(value, Tensor) else value
        for name, value in inputs.items()
        if name in wanted
    }


def describe(batch: Any) -> str:
    """A description of a wrong batch, for an error."""
    if isinstance(batch, Mapping):
        return f"a mapping with the keys {', '.join(sorted(map(str, batch))) or 'none'}"
    if isinstance(batch, Tensor):
        return f"a tensor of shape {tuple(batch.shape)} and type {batch.dtype}"
    return f"a {type(batch).__name__}"


def device_of(model: nn.Module) -> torch.device:
    """The device of a model's inputs; for weights that accelerate offloads, the device on which they run."""
    first = next(model.parameters(), None)
    if first is None or not first.is_meta:
        return torch.device("cpu") if first is None else first.device
    places = (hook.execution_device for hook in _offloading(model))
    return next((torch.device(place) for place in places if place is not None), first.device)


def is_offloaded(model: nn.Module) -> bool:
    """Whether accelerate keeps weights elsewhere, and brings them only while their module runs."""
    return any(True for _ in _offloading(model))


def _offloading(model: nn.Module) -> Iterator[Any]:
    """The hooks of accelerate that offload."""
    for module in model.modules():
        hook = module.__dict__.get("_hf_hook")
        yield from (each for each in getattr(hook, "hooks", (hook,)) if getattr(each, "offload", False) is True)


def refuse_skeleton(transformer: nn.Module) -> None:
    """Refuse a model without weights.

    Raises:
        BatchError: If it is on the meta device.
    """
    if device_of(transformer).type == "meta":
        raise BatchError(
            f"{type(transformer).__name__} is a skeleton on the meta device, so it cannot read batches. Load weights."
        )


class TokenIdRange:
    """The lowest and the highest token id of all batches that were read, kept on their device.

    Reading them makes the host wait for the device, so it is done once, after all batches.

    Args:
        transformer: The transformer that reads the batches.

    Attributes:
        ends: The highest of the negative ids and of the ids, shape (2); None if no id was on an accelerator.
    """

    def __init__(self, transformer: nn.Module) -> None:
        self._transformer = transformer
        self.ends: Tensor | None = None

    def take(self, ids: Tensor) -> Tensor:
        """Note the range of ids, shape (batch, tokens).

        Returns:
            The ids, each in range. A GPU's process does not survive others.

        Raises:
            BatchError: At once, if ids of a CPU are out of range.
        """
        size = _embeddings(self._transformer)
        if size is None or not ids.numel():
            return ids
        low, high = ids.aminmax()
        if ids.device.type == "cpu":
            self.check(int(low), int(high))
            return ids
        ends = torch.stack([-low, high])
        self.ends = ends if self.ends is None else torch.maximum(self.ends, ends.to(self.ends.device))
        return ids.clamp(0, size - 1)

    def read(self) -> None:
        """Wait for the device, and check the range of all ids that were taken.

        Raises:
            BatchError: If an id is out of range.
        """
        if self.ends is not None:
            low, high = self.ends.tolist()
            self.check(-low, high)

    def check(self, low: int, high: int) -> None:
        """Check the lowest and the highest id.

        Raises:
            BatchError: If one is out of range.
        """
        size = _embeddings(self._transformer)
        if size is not None and (low < 0 or high >= size):
            raise BatchError(
                f"input_ids of a batch hold {low if low < 0 else high}, but {type(self._transformer).__name__} has "
                f"{size} embeddings. Use the model's own tokenizer."
            )


def _embeddings(transformer: nn.Module) -> int | None:
    """The number of token ids that a transformer knows; None if that cannot be said."""
    embeddings = getattr(transformer, "get_input_embeddings", lambda: None)()
    return embeddings.num_embeddings if type(embeddings) is nn.Embedding else None


def text_inputs(
    batch: Any, transformer: nn.Module, main: str = "input_ids", ids: TokenIdRange | None = None
) -> dict[str, Any]:
    """As :func:`as_inputs`, checked against what a transformer can read.

    Args:
        batch: The batch.
        transformer: The transformer.
        main: Name of its main input.
        ids: Where to note the range of token ids on an accelerator, so that the caller reads it later; None reads it at
            once.

    Raises:
        BatchError: If the batch does not fit; names the key.
    """
    refuse_skeleton(transformer)
    inputs = as_inputs(batch, main)
    if inputs is None:
        what = "token ids of shape (batch, tokens)" if main == "input_ids" else "that tensor itself"
        raise BatchError(f"A batch must be a mapping with {main}, or {what}; got {describe(batch)}.")
    if not isinstance(inputs[main], Tensor):
        raise BatchError(
            f"{main} of a batch must be a tensor, or rows of numbers of equal length; got {describe(inputs[main])}. "
            "Pad the rows."
        )
    if main == "input_ids":
        _check_ids(inputs)
        later = ids or TokenIdRange(transformer)
        inputs[main] = later.take(inputs[main])
        if ids is None:
            later.read()
    return inputs


def _check_ids(inputs: Mapping[str, Any]) -> None:
    ids = inputs["input_ids"]
    if ids.ndim < 2:
        raise BatchError(
            f"input_ids of a batch must have the shape (batch, tokens); got {describe(ids)}. Batch the items of a "
            "dataset with a DataLoader."
        )
    if ids.dtype not in (torch.int64, torch.int32):
        raise BatchError(f"input_ids of a batch must be integers (int64); got {describe(ids)}.")
    for name in ("attention_mask", "labels"):
        value = inputs.get(name)
        if value is None or (name == "attention_mask" and isinstance(value, Mapping)):
            continue
        if not isinstance(value, Tensor):
            raise BatchError(f"{name} of a batch must be a tensor, or rows of equal length; got {describe(value)}.")


def same_shape(inputs: Mapping[str, Any], name: str) -> None:
    """Refuse labels or a mask of another shape than the token ids.

    Raises:
        BatchError: If the shapes differ.
    """
    value, ids = inputs.get(name), inputs["input_ids"]
    if value is not None and value.shape != ids.shape:
        raise BatchError(
            f"{name} of a batch must have the shape of input_ids, {tuple(ids.shape)}; got {describe(value)}."
        )


def model_inputs(batch: Any, transformer: nn.Module, ids: TokenIdRange | None = None) -> dict[str, Any]:
    """The inputs that a transformer takes from a batch, on its device, with its cache switched off.

    Args:
        batch: The batch.
        transformer: The transformer.
        ids: As in :func:`text_inputs`.

    Raises:
        BatchError: If the batch does not hold what the transformer reads.
    """
    names = list(inspect.signature(transformer.forward).parameters)
    main = getattr(transformer, "main_input_name", names[0])
    inputs = text_inputs(batch, transformer, main, ids)
    if "decoder_input_ids" in names and "decoder_input_ids" not in inputs:
        inputs = {**inputs, **_decoder_inputs(inputs, transformer)}
    without_cache = {"use_cache": False} if "use_cache" in names else {}
    known = set(names) - {"labels", "logits_to_keep", "use_cache"}
    return {**select(inputs, known, device_of(transformer)), **without_cache}


def _decoder_inputs(inputs: Mapping[str, Any], transformer: nn.Module) -> dict[str, Any]:
    """The inputs of a decoder in training: its labels, shifted by one."""
    labels = inputs.get("labels")
    shift = getattr(transformer, "prepare_decoder_input_ids_from_labels", None)
    if labels is None or shift is None:
        raise BatchError(
            f"{type(transformer).__name__} has a decoder: a batch must also hold decoder_input_ids, or labels."
        )
    return {"decoder_input_ids": shift(labels=labels), "decoder_attention_mask": labels != -100}
