"""``train.py generate``: text by a dropped model, and by the dense one beside it, while it is generated."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass
from typing import Any

import lightning.pytorch as pl
import torch
from rich.console import Console
from rich.text import Text
from transformers import PreTrainedModel, TextStreamer

from layershed.cli.prompts import Message, Prompt, as_chat, check_template, encode
from layershed.cli.run_folder import load_base, name_of
from layershed.cli.sampling import generation_config, new_tokens
from layershed.errors import GenerationError, LayershedError
from layershed.formatting import counts_of, printable
from layershed.performance.benchmark import lifted_base
from layershed.recovery.lora import adapters_off
from layershed.saving.checkpoint import load_checkpoint
from layershed.saving.model_card import base_of
from layershed.surgery import dense as lifted
from layershed.surgery import dropped_sublayers, removed_sublayers
from layershed.training.causal_lm import CausalLM
from layershed.training.text_data import TextData


@dataclass(frozen=True)
class Voice:
    """One of the models that answer: its title, the model, and the context in which it runs."""

    title: str
    model: PreTrainedModel
    context: Any = nullcontext

    def within(self) -> AbstractContextManager[Any]:
        """The context."""
        entered: AbstractContextManager[Any] = self.context()
        return entered


class _Terminal(TextStreamer):
    """Writes words as they come, without control codes: the text may be a stranger's."""

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Write the next words."""
        write(text + ("\n" if stream_end else ""))


def generate(
    trainer: pl.Trainer,
    model: CausalLM,
    data: TextData,
    *,
    prompts: Sequence[Prompt],
    system: str | None,
    ckpt_path: str | None,
    dense: bool | str,
    options: Mapping[str, Any],
) -> list[dict[str, str]]:
    """Generate and print. Arguments: see :meth:`layershed.cli.trainer.Trainer.generate`.

    Returns:
        For each prompt the texts, by the title of the model.

    Raises:
        GenerationError: Before generating, if a conversation or the dense model is impossible.
    """
    tokenizer = data.tokenizer
    if not prompts or any(prompt.messages for prompt in prompts):
        check_template(tokenizer, str(model.hparams.get("pretrained") or "bytes"))
    make_ready(trainer, model, ckpt_path, "generate", GenerationError)
    voices = list(voices_of(trainer, model, data, dense))
    answers: list[dict[str, str]] = []
    told = prompts or _conversation(system, answers)
    torch_seed = torch.initial_seed()
    for number, prompt in enumerate(told):
        if len(prompts) > 1:
            _title(f"prompt {number + 1} of {len(prompts)}: {prompt.text}")
        inputs, texts = encode(prompt, tokenizer), {}
        for voice in voices:
            if len(voices) > 1:
                _title(voice.title)
            if not prompt.messages:
                write(prompt.text)
            with voice.within(), trainer.precision_plugin.forward_context():
                # every model, and every prompt whatever came before it, draws the same random numbers
                torch.manual_seed((torch_seed + number) % 2**63)
                texts[voice.title] = _answer(voice.model, tokenizer, inputs, options)
        answers.append(texts)
    return answers


def make_ready(
    trainer: pl.Trainer, model: CausalLM, ckpt_path: str | None, command: str, error: type[LayershedError]
) -> None:
    """Load the checkpoint if one is given, and put the model into the Trainer's precision and on its device.

    Raises:
        LayershedError: If there are only random weights.
    """
    if ckpt_path is not None:
        load_checkpoint(model, ckpt_path)
    elif model.hparams.get("pretrained") is None:
        raise error(
            f"{command}: there is no model, only random weights. Give --model.pretrained: a folder, a checkpoint of "
            "fit, last, best, a hub id or a .gguf file."
        )
    trainer.precision_plugin.convert_module(model)
    model.to(trainer.strategy.root_device).eval()


def _answer(model: PreTrainedModel, tokenizer: Any, inputs: Mapping[str, Any], options: Mapping[str, Any]) -> str:
    length = inputs["input_ids"].shape[1]
    tokens = new_tokens(model, length, options.get("max_new_tokens"))
    more: dict[str, Any] = {}
    try:
        config = generation_config(model, tokenizer, {**options, "max_new_tokens": tokens})
        streams = (config.num_beams or 1) == 1  # beams are known at the end only
        if config.stop_strings:
            more["tokenizer"] = tokenizer
        if streams:
            more["streamer"] = _Terminal(tokenizer, skip_prompt=True, skip_special_tokens=True)
        with torch.inference_mode():
            there = {name: value.to(model.device) for name, value in inputs.items()}
            found = model.generate(**there, generation_config=config, **more)
    except (ValueError, TypeError) as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise GenerationError(f"generate: transformers refuses these options ({reason.rstrip('.')}).") from error
    text: str = tokenizer.decode(found[0, length:], skip_special_tokens=True)
    if not streams:
        write(f"{text}\n")
    return text


def voices_of(trainer: pl.Trainer, model: CausalLM, data: TextData, dense: bool | str) -> Iterator[Voice]:
    """The models that answer: first the given one, then the dense one.

    Raises:
        LayershedError: If there is no dense model.
    """
    transformer = model.model
    dropped = dropped_sublayers(transformer)
    yield Voice(f"dropped: without {counts_of(dropped)}" if dropped else f"model: {name_of(model)}", transformer)
    if isinstance(dense, str):
        base = load_base(trainer, dense, model, data, option="dense")
        yield Voice(f"dense: {dense}", base.eval())
    elif dense:
        if gone := removed_sublayers(transformer):
            source = base_of(str(transformer.config.name_or_path))
            known = "BASE" if source == str(model.hparams.get("pretrained")) else source
            advice = f"Give the model before the drop: --dense {known}"
            if not known:
                advice = (
                    "It was trained from scratch. A checkpoint of its run has them: --model.pretrained last --dense"
                )
            raise GenerationError(
                f"generate: there is no dense model beside it, as the weights of {counts_of(gone)} sublayers were "
                f"removed. {advice}"
            )
        if not dropped:
            raise GenerationError("generate: nothing is dropped from this model, so it is dense. Leave out --dense.")

        def without_drops() -> ExitStack:
            stack = ExitStack()
            stack.enter_context(lifted(transformer))
            stack.enter_context(adapters_off(transformer))  # they were trained for the dropped model
            return stack

        yield Voice(f"dense: {lifted_base(model)}", transformer, without_drops)


def _conversation(system: str | None, answers: list[dict[str, str]]) -> Iterator[Prompt]:
    """A conversation at the terminal, until its input ends. The model remembers what was said."""
    said: list[Message] = []
    while True:
        try:
            text = input("> " if sys.stdin.isatty() else "")
        except EOFError:
            return
        if not text.strip():
            continue
        prompt = as_chat(Prompt(text), system, said)
        yield prompt
        said = [*prompt.messages, {"role": "assistant", "content": next(iter(answers[-1].values()))}]


def write(text: str) -> None:
    """Write to the terminal at once, without control codes."""
    sys.stdout.write("".join(letter if letter in "\n\t" else printable(letter) for letter in text))
    sys.stdout.flush()


def _title(text: str) -> None:
    Console().rule(Text(printable(" ".join(text.split()))), align="left", characters="-")
