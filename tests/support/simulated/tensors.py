"""Tensors of a device ``sim`` that this machine does not have: they compute on the CPU and behave as on a GPU.

- They say that they are on sim:0, and refuse to mix with CPU tensors where a GPU refuses.
- Everything that the host of a GPU would wait for is noted in ``WAITS``.
- ``install`` cannot be undone: call it in a process of its own (tests/simulated/conftest.py forks one for each test).
"""

from __future__ import annotations

import copy
import sys
import weakref
from collections import Counter
from contextlib import contextmanager

import torch
from torch._utils import _rebuild_device_tensor_from_cpu_tensor, _rebuild_parameter
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

SIM = "sim"
# Kinds of waits: "read" copies to the host, "sent" copies from it, "shape" asks for a size that depends on the data,
# "queue" waits for an event or for everything.
WAITS: Counter[str] = Counter()
PLACES: list[str] = []  # where the host waited, for the message of a failed test
ALLOCATED: dict[int, int] = {}  # bytes by storage
PEAK = [0]

_SHAPES = {"nonzero", "masked_select", "_unique", "_unique2", "unique_dim", "unique_consecutive", "bincount"}
_READS = {"_local_scalar_dense", "equal"}
_COPIES = {"copy_", "copy", "_to_copy", "_copy_from"}
_BY_INDEX = {"index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index", "_unsafe_index_put"}
_NO_NUMBERS = {"cat", "stack"}  # take no number of the CPU beside tensors of a GPU
_CHANGES_OF_FORM = {"resize_", "set_", "squeeze_", "unsqueeze_", "t_", "transpose_", "as_strided_"}


def wait(kind):
    """Note that the host waits."""
    WAITS[kind] += 1
    place, frame = [], sys._getframe(1)
    while frame is not None and len(place) < 3:
        if not any(part in frame.f_code.co_filename for part in ("/torch/", "support/simulated")):
            place.append(f"{frame.f_code.co_filename[-40:]}:{frame.f_lineno}")
        frame = frame.f_back
    PLACES.append(f"{kind}: " + " < ".join(place))


@contextmanager
def waits():
    """Yields a Counter that holds the waits within the context, by kind, after it."""
    before, noted = Counter(WAITS), Counter()
    yield noted
    noted.update(Counter(WAITS) - before)


class Simulated(torch.Tensor):
    """A tensor on sim:0; ``held`` is the CPU tensor with its numbers."""

    @staticmethod
    def __new__(cls, held):
        outer = torch.Tensor._make_wrapper_subclass(
            cls,
            held.shape,
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            layout=held.layout,
            device=f"{SIM}:0",
        )
        outer.held = held
        _note_storage(held)
        return outer

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return dispatch(func, args, kwargs or {})

    def __getitem__(self, index):
        return super().__getitem__(_without_lists(index))

    def __setitem__(self, index, value):
        super().__setitem__(_without_lists(index), value)

    def tolist(self):
        return self.cpu().tolist()

    def numpy(self, *, force=False):
        if not force:
            raise TypeError(f"can't convert {self.device} device type tensor to numpy. Use Tensor.cpu() first.")
        return self.detach().cpu().numpy()

    def __array__(self, *args, **kwargs):
        return self.numpy()

    def data_ptr(self):
        return self.held.data_ptr()

    def untyped_storage(self):
        return self.held.untyped_storage()

    @property
    def data(self):
        with torch._C.DisableTorchFunctionSubclass():
            return torch.Tensor.data.__get__(self)

    @data.setter
    def data(self, other):
        with torch._C.DisableTorchFunctionSubclass():
            torch.Tensor.data.__set__(self, other)
        self.held = other.held

    def __repr__(self, **_):
        return f"{self.held!r} on {self.device}"

    def __format__(self, spec):
        return format(self.item() if self.dim() == 0 else repr(self), spec)

    def __deepcopy__(self, memo):
        if id(self) in memo:
            return memo[id(self)]
        if not self.is_leaf:
            raise RuntimeError("Only Tensors created explicitly by the user support the deepcopy protocol")
        other = memo[id(self)] = Simulated(copy.deepcopy(self.held, memo))
        other.requires_grad_(self.requires_grad)
        for name, value in self.__dict__.items():
            if name != "held":
                setattr(other, name, copy.deepcopy(value, memo))
        other.grad = copy.deepcopy(self.grad, memo)
        return other

    def __reduce_ex__(self, protocol):
        # one that torch.load allows with weights_only=True, and that heeds its map_location
        plain = getattr(self, "_is_param", False)
        held = self.detach().cpu()
        wants = self.requires_grad and not plain
        made = (_rebuild_device_tensor_from_cpu_tensor, (held, self.dtype, str(self.device), wants))
        return (_rebuild_parameter, (self.detach(), self.requires_grad, {})) if plain else made


def _without_lists(index):
    """An index whose lists are tensors of the CPU, which torch would not make for this device."""
    if isinstance(index, tuple):
        return tuple(map(_without_lists, index))
    return torch.tensor(index) if isinstance(index, list) else index


def _note_storage(held):
    """Count the bytes of a storage until it is freed."""
    storage = held.untyped_storage()
    key = storage._cdata
    if key not in ALLOCATED:
        ALLOCATED[key] = storage.nbytes()
        weakref.finalize(storage, ALLOCATED.pop, key, None)
        PEAK[0] = max(PEAK[0], sum(ALLOCATED.values()))


def is_sim(device):
    """Whether this names the simulated device."""
    return device is not None and torch.device(device).type == SIM


def _to_host(leaf):
    """The same argument for the CPU."""
    if isinstance(leaf, Simulated):
        return leaf.held
    return torch.device("cpu") if isinstance(leaf, torch.device) and leaf.type == SIM else leaf


def dispatch(func, args, kwargs):
    """Run one operator as a GPU would."""
    name = func._schema.name.removeprefix("aten::")
    leaves = tree_leaves((args, kwargs))
    ours = [leaf for leaf in leaves if isinstance(leaf, Simulated)]
    if name in _CHANGES_OF_FORM:
        raise NotImplementedError(f"{func} on the simulated device: it would change the form of a tensor in place")
    if ours and name not in _COPIES:
        _refuse_to_mix(name, args, leaves, func)
    _note_waits(name, args, kwargs)
    device = kwargs.get("device")
    out = func(*tree_map(_to_host, args), **tree_map(_to_host, kwargs))
    if name in ("copy_", "_copy_from"):
        return args[0]
    stays = is_sim(device) if device is not None else bool(ours)
    if not stays:
        return out
    known = {id(tensor.held): tensor for tensor in ours}

    def back(leaf):
        if not isinstance(leaf, torch.Tensor):
            return leaf
        return known[id(leaf)] if id(leaf) in known else Simulated(leaf)

    return tree_map(back, out)


def _refuse_to_mix(name, args, leaves, func):
    theirs = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor) and not isinstance(leaf, Simulated)]
    if name in _BY_INDEX and isinstance(args[0], Simulated):
        theirs = [leaf for leaf in args[2:3] if isinstance(leaf, torch.Tensor) and not isinstance(leaf, Simulated)]
    changes = name.endswith("_") and isinstance(args[0], torch.Tensor) and not isinstance(args[0], Simulated)
    if changes or any(tensor.dim() or name in _NO_NUMBERS for tensor in theirs):
        raise RuntimeError(f"Expected all tensors to be on the same device, but found {SIM}:0 and cpu in {func}")


def _note_waits(name, args, kwargs):
    first = args[0] if args else None
    if name in ("copy_", "_to_copy"):
        _note_copy(name, args, kwargs)
    elif name in _READS:
        wait("read")
    elif name in _SHAPES or (name == "repeat_interleave" and _output_size(args, kwargs) is None):
        wait("shape")
    elif name in _BY_INDEX and isinstance(first, Simulated):
        indices = [index for index in args[1] if isinstance(index, torch.Tensor)]
        for index in indices:
            if not isinstance(index, Simulated):
                wait("sent")
        fills = "put" in name and args[2].numel() == 1  # torch fills by the mask itself
        if not fills and any(index.dtype in (torch.bool, torch.uint8) for index in indices):
            wait("shape")


def _output_size(args, kwargs):
    return kwargs.get("output_size", args[2] if len(args) > 2 else None)


def _note_copy(name, args, kwargs):
    if name == "_to_copy":
        if kwargs.get("device") is not None and not is_sim(kwargs["device"]):
            wait("read")
        return
    target, source = args[:2]
    lazy = kwargs.get("non_blocking", args[2] if len(args) > 2 else False)
    if isinstance(source, Simulated) and not isinstance(target, Simulated):
        wait("read")
    elif isinstance(target, Simulated) and not isinstance(source, Simulated) and not lazy:
        wait("sent")


class Makers(TorchFunctionMode):
    """torch.tensor(..., device="sim") reaches no operator that Python can stand in for: made on the CPU, then moved."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if func not in (torch.tensor, torch.as_tensor, torch.asarray, torch.Tensor.new_tensor):
            return func(*args, **kwargs)
        if args and isinstance(args[0], Simulated) and func in (torch.as_tensor, torch.asarray):
            return args[0].to(**{name: value for name, value in kwargs.items() if value is not None})
        device = kwargs.pop("device", None)
        if func is torch.Tensor.new_tensor:
            device = args[0].device if device is None else device
            kwargs = {"dtype": args[0].dtype, **kwargs}
            func, args = torch.tensor, args[1:]
        if not is_sim(device):
            return func(*args, **kwargs, **({} if device is None else {"device": device}))
        return func(*args, **kwargs).to(SIM)
