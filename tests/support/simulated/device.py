"""The device module ``torch.sim``, in the manner of ``torch.cuda``, and its registration."""

from __future__ import annotations

import time
from types import SimpleNamespace

import torch
from torch.utils import backend_registration

from tests.support.simulated.tensors import ALLOCATED, PEAK, SIM, Makers, dispatch, wait

available = hasattr(backend_registration, "_setup_privateuseone_for_python_backend")
CALLS: list[str] = []  # names of the functions that were called, in their order
MEMORY = 2**34
NAME = "A simulated GPU"


class Event:
    """An event in the stream; the stream of a CPU has always finished."""

    def __init__(self, enable_timing=False):
        self.timed, self.at = enable_timing, None

    def record(self, stream=None):
        CALLS.append("Event.record")
        assert stream is None or stream.device == torch.device(SIM, 0)
        self.at = time.perf_counter()

    def synchronize(self):
        CALLS.append("Event.synchronize")
        assert self.at is not None, "never recorded"
        wait("queue")

    def elapsed_time(self, end):
        CALLS.append("Event.elapsed_time")
        assert self.timed
        assert end.timed
        return 1000 * (end.at - self.at)


class Module:
    """What torch asks of a device, and what layershed asks of a GPU."""

    Event = Event

    def __init__(self):
        self.state = torch.Generator().manual_seed(0).get_state()

    def is_initialized(self):
        return True

    def is_available(self):
        return True

    def current_device(self):
        return 0

    def device_count(self):
        return 1

    def _is_in_bad_fork(self):
        return False

    def get_amp_supported_dtype(self):
        return [torch.bfloat16, torch.float16]

    def manual_seed_all(self, seed):
        self.state = torch.Generator().manual_seed(seed).get_state()

    def current_stream(self, device=None):
        return SimpleNamespace(device=torch.device(SIM, 0))

    def synchronize(self, device=None):
        CALLS.append("synchronize")
        wait("queue")

    def memory_allocated(self, device=None):
        CALLS.append("memory_allocated")
        return sum(ALLOCATED.values())

    def reset_peak_memory_stats(self, device=None):
        CALLS.append("reset_peak_memory_stats")
        PEAK[0] = sum(ALLOCATED.values())

    def max_memory_allocated(self, device=None):
        CALLS.append("max_memory_allocated")
        return PEAK[0]

    def get_device_name(self, device=None):
        return NAME

    def get_device_properties(self, device=None):
        return SimpleNamespace(name=NAME, total_memory=MEMORY)

    def get_rng_state(self, device=None):
        return self.state.clone()

    def set_rng_state(self, state, device=None):
        assert state.device.type != SIM
        self.state = state.clone()

    def get_rng_state_all(self):
        CALLS.append("get_rng_state_all")
        return [self.get_rng_state()]

    def set_rng_state_all(self, states):
        CALLS.append("set_rng_state_all")
        [state] = states
        self.set_rng_state(state)


def _swap(one, other):
    """As torch's own, also where a graph or an optimizer still holds one of them."""
    one.__class__, other.__class__ = other.__class__, one.__class__
    one.__dict__, other.__dict__ = other.__dict__, one.__dict__
    torch._C._swap_tensor_impl(one, other)


def _restore_location(device, of_torch=torch._utils._get_restore_location):
    """As torch's own, which knows no function as map_location for a tensor without storage."""
    place = torch.serialization._serialization_tls.map_location
    if not callable(place):
        return of_torch(device)
    storage = place(torch.UntypedStorage(0), device)
    return device if storage is None else storage.device


_KEPT: list[object] = []


def install():
    """Register the device in this process, for good."""
    if _KEPT:
        return
    backend_registration._setup_privateuseone_for_python_backend(SIM, Module())
    library = torch.library.Library("_", "IMPL")
    library.fallback(lambda op, *args, **kwargs: dispatch(op, args, kwargs), "PrivateUse1")
    makers = Makers()
    makers.__enter__()
    _KEPT.extend((library, makers))
    torch.accelerator.synchronize = torch.sim.synchronize  # which has no way to a device made in Python
    torch._utils._get_restore_location = _restore_location
    # a move replaces what a Parameter holds, as on a GPU, so that ties and optimizers keep it
    torch.__future__.set_swap_module_params_on_conversion(True)
    torch.utils.swap_tensors = _swap
    torch.get_device_module.cache_clear()
