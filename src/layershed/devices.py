"""What an accelerator offers beside its tensors: a queue, events, figures of its memory, random states.

Everything comes from torch's module of the device, such as ``torch.cuda``, so that it holds for any accelerator whose
module has the same functions.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor


def module_of(device: torch.device, *names: str) -> Any:
    """Return torch's module of an accelerator, such as ``torch.cuda``.

    Args:
        device: The device.
        names: Functions that the caller needs.

    Returns:
        The module; None for a CPU, or if a function is missing.
    """
    if device.type in ("cpu", "meta"):
        return None
    try:
        module = torch.get_device_module(device)
    except RuntimeError:  # torch knows the device's name only
        return None
    return module if all(hasattr(module, name) for name in names) else None


class Clock(Protocol):
    """Marks points in time and computes the seconds between them."""

    def mark(self) -> Any:
        """Mark the time after all earlier work of the device."""

    def seconds(self, start: Any, end: Any) -> float:
        """Return the seconds between two marks."""


class WallClock:
    """Clock for a CPU, and for any device that can be synchronised.

    Args:
        device: The device. Any device but a CPU is synchronised at every mark.
        now: Function that returns seconds.
    """

    def __init__(self, device: torch.device, now: Callable[[], float] = time.perf_counter) -> None:
        self.device, self.now = device, now

    def mark(self) -> float:
        """Return the time after the device's queue is empty."""
        if self.device.type != "cpu":
            torch.accelerator.synchronize(self.device)
        return self.now()

    def seconds(self, start: float, end: float) -> float:
        """Return the seconds between two marks."""
        return end - start


class EventClock:
    """Clock for CUDA and its like. It records events in the stream, so the host never waits between two marks.

    Args:
        device: A device whose module has events and streams.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def mark(self) -> Any:
        """Record an event after all work in the stream."""
        module = torch.get_device_module(self.device)
        event = module.Event(enable_timing=True)
        event.record(module.current_stream(self.device))
        return event

    def seconds(self, start: Any, end: Any) -> float:
        """Wait for the later event and return the seconds between both."""
        end.synchronize()
        return start.elapsed_time(end) / 1000


def has_events(device: torch.device) -> bool:
    """Whether the device can note the time without a wait of the host."""
    return module_of(device, "Event", "current_stream") is not None


def clock_for(device: torch.device) -> Clock:
    """Return an :class:`EventClock` for a device with events, such as CUDA, else a :class:`WallClock`."""
    return EventClock(device) if has_events(device) else WallClock(device)


def device_random_states() -> dict[str, list[Tensor]]:
    """Return the random states of all devices of the accelerator, under its name; empty without one."""
    device, module = _generators()
    if module is None:
        return {}
    every = hasattr(module, "get_rng_state_all")  # Apple's module has one device
    return {device: module.get_rng_state_all() if every else [module.get_rng_state()]}


def set_device_random_states(states: Mapping[str, list[Tensor]]) -> None:
    """Set the random states of the accelerator; with another number of devices, they stay as they are."""
    device, module = _generators()
    own = [state.cpu() for state in states.get(device, ())]
    if module is None or len(own) != module.device_count():
        return
    if hasattr(module, "set_rng_state_all"):
        module.set_rng_state_all(own)
    else:
        module.set_rng_state(own[0])


def _generators() -> tuple[str, Any]:
    """Return the name and the module of the accelerator, or no module if there is none with random states."""
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return ("", None) if device is None else (device.type, module_of(device, "get_rng_state", "device_count"))
