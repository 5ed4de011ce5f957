"""The extra outputs (attention weights, router logits) that transformers collects with hooks on modules.

A model class names them (``_can_record_outputs``): by output, the class of the modules that give its entries.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn
from transformers import PreTrainedModel

from layershed.discovery.configured import configs_of, configured
from layershed.discovery.recording import Call, Tape
from layershed.spellings import OutputRecorder, recordable_outputs
from layershed.stand_ins.stand_in import Capture


@contextmanager
def without_requests(transformer: nn.Module) -> Iterator[None]:
    """Within the context, configs request no extra outputs, and outputs by name.

    A request changes what a model returns, not what it computes: it is an option of each call, and the config holds its
    default. But what computes with extra outputs (a load-balancing loss) would look like a reader of a branch.
    """
    names = {"output_attentions", "output_hidden_states"}
    for module in transformer.modules():
        if isinstance(module, PreTrainedModel):
            names.update(f"output_{key}" for key in recordable_outputs(module))
    wanted = {f"{dash}{name}": False for name in names for dash in ("", "_")} | {"return_dict": True}
    with configured(configs_of(transformer), wanted):
        yield


class Captures:
    """What transformers collects from the modules of one model.

    Args:
        model: The model that the tape was made of.
        tape: The recording.
    """

    def __init__(self, model: nn.Module, tape: Tape) -> None:
        self._tape = tape
        self._by_path = {path: found for path, found in _recorders(model, "", []) if found}

    def of(self, outer: Call) -> tuple[Capture, ...]:
        """The entries that a call gives, without those that its stand-in still gives by itself."""
        found: list[Capture] = []
        for call in (outer, *self._tape.within(outer)):
            for key, index in self._by_path.get(call.path, ()):
                if call is outer and (call.container is None or index == 0):
                    continue  # the hidden states
                place = 0 if call.container is None else index
                value = call.outputs[place] if place < len(call.outputs) else None
                shape = () if value is None else self._tape.tensors[value].shape
                found.append((key, len(shape), shape[-1] if shape else 0))
        return tuple(found)


def _recorders(
    module: nn.Module, path: str, tasks: list[tuple[str, OutputRecorder]]
) -> Iterator[tuple[str, list[tuple[str, int]]]]:
    """By path, the outputs that a hook on a module collects, with the place in what the module returns."""
    if isinstance(module, PreTrainedModel):
        tasks = list(_tasks(module))
    yield path, [(key, spec.index) for key, spec in tasks if _matches(module, f".{path}", spec)]
    for name, child in module.named_children():
        yield from _recorders(child, f"{path}.{name}" if path else name, tasks)


def _tasks(model: PreTrainedModel) -> Iterator[tuple[str, OutputRecorder]]:
    """As transformers reads ``_can_record_outputs``; hidden states come from whole blocks, which keep running."""
    for key, specs in recordable_outputs(model).items():
        for spec in specs if isinstance(specs, list) else [specs]:
            if "hidden_states" in key:
                continue
            if not isinstance(spec, OutputRecorder):
                named = isinstance(spec, str)
                spec = OutputRecorder(None if named else spec, index=1, class_name=spec if named else None)
            yield key, spec


def _matches(module: nn.Module, path: str, spec: OutputRecorder) -> bool:
    by_class = spec.target_class is not None and isinstance(module, spec.target_class)
    if not by_class and not (spec.class_name is not None and path.endswith(spec.class_name)):
        return False
    return spec.layer_name is None or f".{spec.layer_name.strip('.')}." in f"{path}."
