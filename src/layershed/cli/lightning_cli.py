"""The parsers of the commands: those of LightningCLI, and layershed's score, prune, benchmark and plan.

Importing this module takes seconds, because the options are those of Lightning's Trainer.
"""

from __future__ import annotations

import inspect
import io
from collections.abc import Sequence
from contextlib import nullcontext, redirect_stderr
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.utilities import rank_zero_only

from layershed.cli.commands import DESCRIPTION, OVERVIEW, PROGRAM, PURPOSES, USAGE
from layershed.cli.config_check import check_configs
from layershed.cli.control import prepare_control, run_control
from layershed.cli.evaluation import COMMANDS, options_of_run
from layershed.cli.generate_config import check_generation, model_from_checkpoint
from layershed.cli.last_checkpoint import resolve_last
from layershed.cli.own_callbacks import with_own
from layershed.cli.parsers import SEE_HELP, CommandParser, HelpFormatter, describe
from layershed.cli.progress_bars import ProgressBars
from layershed.cli.quiet import quiet
from layershed.cli.run_folder import check_seed
from layershed.cli.save_config import SaveWholeConfig
from layershed.cli.shortened_run import check_steps
from layershed.cli.text_fit import check_before_loading, check_fit
from layershed.cli.trainer import Trainer
from layershed.errors import CheckpointError
from layershed.files.checkpoint_file import check_checkpoint, read_options
from layershed.progress import listening
from layershed.saving.load_model import check_source
from layershed.training.causal_lm import CausalLM
from layershed.training.text_data import TextData

_CHECKPOINT_WORDS = ("hpc", "registry")
_TOKENIZER_ALONE = ("generate", "evaluate")  # commands that need a tokenizer and no text
_LIMITS = {"test": "limit_test_batches", "predict": "limit_predict_batches"}


class LayershedCLI(LightningCLI):
    """LightningCLI with the commands of :class:`Trainer`, and a tokenizer that follows the model."""

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """The commands of LightningCLI and those of :class:`Trainer`."""
        return {**LightningCLI.subcommands(), **{name: {"model", "datamodule"} for name in ("predict", *USAGE)}}

    def setup_parser(self, *args: Any, **kwargs: Any) -> None:
        """Build the parsers, with layershed's help for commands and groups of options."""
        super().setup_parser(*args, **kwargs)
        self.parser.usage = OVERVIEW
        subcommands = self.parser._subcommands_action
        for choice in subcommands._choices_actions if subcommands else ():
            choice.help = PURPOSES[choice.dest]
        for name, parser in self._subcommand_parsers.items():
            describe(parser, name, self.parser.prog)

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Set the default seed, and add ``--control``."""
        parser.set_defaults({"seed_everything": 0})
        parser.add_argument("--control", type=bool | str, default=False)

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse, find the last checkpoint, and refuse an unreadable one.

        Lightning's own method warns if ``sys.argv`` and ``args`` are both given; here ``args`` come from ``sys.argv``.
        """
        self.config = parser.parse_args(args)
        command = self.config.subcommand
        config = self.config[command]
        check_seed(config.seed_everything)
        if command in _TOKENIZER_ALONE:
            model_from_checkpoint(config)
        path = str(config.get("ckpt_path") or "")
        if config.get("ckpt_path") is None and (asked := _asked_checkpoint(args)):
            raise CheckpointError(
                f"ckpt_path={asked!r}: a later --config resets ckpt_path to null. Put --config before --ckpt_path."
            )
        alone = command in COMMANDS and args[:1] == [command] and not config.get("config")
        if path in ("last", "best"):
            found = resolve_last(command, config.trainer, path, below=alone or command in _TOKENIZER_ALONE)
            config.ckpt_path = None if found is None else str(found)
        elif path and path.split(":")[0] not in _CHECKPOINT_WORDS and "://" not in path:
            try:
                check_checkpoint(Path(path), resumed=command == "fit")
            except OSError as error:
                reason = error.strerror or error
                raise CheckpointError(
                    f"ckpt_path={path!r} cannot be read ({reason}); let this user read it."
                ) from error
        found = Path(config.ckpt_path or "") if alone else None
        if found is not None and found.is_file() and (options := options_of_run(found)):
            self.config = parser.parse_args([command, f"--config={options}", *args[1:]])
            config = self.config[command]
            config.config, config.ckpt_path = [], str(found)  # no file holds these options

    def _parse_ckpt_path(self) -> None:
        """Take the model's options from the checkpoint, as Lightning does, but no class: it may be a stranger's."""
        subcommand = self.config.subcommand
        path = Path(self.config[subcommand].get("ckpt_path") or "")
        if not path.is_file():
            return
        options = read_options(path, {*inspect.signature(CausalLM).parameters} - {"optimizer"})
        try:
            with redirect_stderr(io.StringIO()) as told:
                self.config = self.parser.parse_object({subcommand: {"model": options}}, self.config)
        except SystemExit:
            reason = told.getvalue().strip().removeprefix("error: ").removesuffix(SEE_HELP)
            raise CheckpointError(
                f"ckpt_path={str(path)!r}: the options of its model do not fit ({reason}); give another checkpoint."
            ) from None

    def before_instantiate_classes(self) -> None:
        """Refuse a run in which a callback never acts, and take the model's tokenizer unless another is given."""
        config = self.config[self.subcommand]
        if self.subcommand == "fit":
            for note in check_steps(config.trainer):
                rank_zero_only(print)(f"note: {note}")
        limit = _LIMITS.get(str(self.subcommand))
        if limit is not None and config.trainer[limit] is None:
            config.trainer[limit] = config.trainer.limit_val_batches  # the same text
        if self.subcommand == "plan":
            config.data.source, config.data.tokenizer = "pydoc", None  # plan needs no text
        elif config.data.tokenizer is None:
            config.data.tokenizer = config.model.pretrained
        if self.subcommand == "generate":
            check_generation(config)

    def instantiate_classes(self) -> None:
        """Check the text before the model is built. Build the model without weights for ``plan``."""
        config = self.config[self.subcommand]
        if config.model.pretrained is not None:
            check_source(config.model.pretrained)  # its tokenizer is missing, too, but that is not the error
        data = None if self.subcommand == "plan" else TextData(**config.data.as_dict())
        if data is not None:
            if data.is_local:
                data.check()
            check_before_loading(data, config.model, packed=self.subcommand not in _TOKENIZER_ALONE)
            if data.is_local and self.subcommand not in _TOKENIZER_ALONE:
                data.check_amount()
        with torch.device("meta") if self.subcommand == "plan" else nullcontext():
            super().instantiate_classes()
        self.datamodule = data or self.datamodule  # with the rows and the tokenizer that were read

    def instantiate_trainer(self, **kwargs: Any) -> Any:
        """Add a bar and a line about the model; to ``fit`` a checkpoint if stopped, exact resuming, time and rate."""
        config = self.config_init[self.subcommand]
        text = self.config[self.subcommand].data.as_dict()
        listed = with_own(config.trainer, self.subcommand, config.get("ckpt_path"), text)
        return super().instantiate_trainer(**kwargs, callbacks=listed)

    def before_fit(self) -> None:
        """Check what ``--control`` asks for, before training."""
        config = self.config[self.subcommand]
        prepare_control(self.trainer, config.get("control"), lambda: self._parser(self.subcommand).dump(config))

    def after_fit(self) -> None:
        """Run the control, with the same options."""
        if self.config[self.subcommand].get("control") is True:
            run_control(self, _start)

    def after_instantiate_classes(self) -> None:
        """Refuse text for which the model has too few embeddings or positions."""
        if self.subcommand == "plan":
            return
        check_fit(self.datamodule, self.model.model.config, packed=self.subcommand not in _TOKENIZER_ALONE)


def _asked_checkpoint(words: Sequence[str]) -> str | None:
    """The value of --ckpt_path in a command line."""
    for word, following in zip(words, [*words[1:], ""], strict=True):
        option, equals, value = word.partition("=")
        if option == "--ckpt_path":
            asked = value if equals else following
            return None if asked == "null" else asked
    return None


def run_command(words: Sequence[str]) -> None:
    """Parse a command line and run its command.

    Raises:
        SystemExit: With 0 after a help text, with 2 after wrong usage.
        LayershedError: If an input of the command is missing or wrong.
    """
    check_configs(words)
    # If --config comes first, the config may name the command, so all commands need a parser.
    cli = _only(words[0]) if words[:1] and words[0] in PURPOSES else LayershedCLI
    bars = ProgressBars(bars=bool(set(words) & set(USAGE)))
    with quiet(evaluating=bool(set(words) & set(COMMANDS))), listening(bars):
        _start(cli, list(words))


def _start(cli: type[LightningCLI], arguments: Any) -> LightningCLI:
    return cli(
        CausalLM,
        TextData,
        trainer_class=Trainer,
        save_config_callback=SaveWholeConfig,
        save_config_kwargs={"overwrite": True},
        auto_configure_optimizers=False,
        parser_class=CommandParser,
        parser_kwargs={"prog": PROGRAM, "description": DESCRIPTION, "formatter_class": HelpFormatter},
        args=arguments,
    )


def _only(command: str) -> type[LayershedCLI]:
    """The command line with one command only: building the parsers of all eight takes half a second."""

    class OneCommand(LayershedCLI):
        @staticmethod
        def subcommands() -> dict[str, set[str]]:
            return {command: LayershedCLI.subcommands()[command]}

    return OneCommand
