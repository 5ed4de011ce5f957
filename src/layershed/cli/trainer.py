"""The Trainer of the command line: a Lightning Trainer with commands that do not train.

``train.py COMMAND --help`` shows the signatures and docstrings of its methods.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from layershed.cli.benchmark import benchmark
from layershed.cli.evaluate import evaluate
from layershed.cli.generate import generate
from layershed.cli.plan import predict_plan
from layershed.cli.prompts import read_prompts
from layershed.cli.prune import prune
from layershed.cli.run_trainer import RunTrainer
from layershed.cli.sampling import check_sampling
from layershed.cli.score import score
from layershed.drop import MethodName, Replacement, Search, method_of
from layershed.evaluation.results import TaskResults
from layershed.performance.benchmark import Benchmark, QualityName
from layershed.performance.prediction import Prediction
from layershed.performance.stopwatch import SpeedSettings
from layershed.planning.plan import DropPlan, ImportanceScores, Scope
from layershed.planning.selection import Objective
from layershed.training.causal_lm import CausalLM
from layershed.training.text_data import TextData


class Trainer(RunTrainer):
    """The Trainer of the command line: it has commands that do not train."""

    def score(
        self, model: CausalLM, datamodule: TextData, metric: str = "cosine", batches: int = 16
    ) -> ImportanceScores:
        """Measure the importance of every sublayer of a pretrained model: a table and bars, no training.

        Writes ``importance.csv`` and ``importance.png`` into the run directory.

        Args:
            model: The model to score.
            datamodule: The text; the training split is scored.
            metric: cosine, relative_magnitude or angular; or, with passes without each sublayer, kl or loss.
            batches: Number of batches to score.

        Returns:
            The importances.

        Raises:
            LayershedError: Before measuring, if an argument is invalid.
        """
        return score(self, model, datamodule, metric, batches)

    def prune(
        self,
        model: CausalLM,
        datamodule: TextData,
        scope: Scope = "joint",
        count: int | None = None,
        ratio: float | None = None,
        metric: str = "cosine",
        search: Search = "one-shot",
        replace: Replacement | None = None,
        rank: int | None = None,
        method: MethodName | None = None,
        objective: Objective = "importance",
        protect: Sequence[int] = (),
        batches: int = 16,
        quality_batches: int = 16,
        prompt_tokens: int = 128,
        new_tokens: int = 32,
        runs: int = 9,
        output: str = "pruned",
        standalone: bool = False,
    ) -> DropPlan:
        """Drop sublayers of a pretrained model without training: score, drop, measure, save.

        Writes ``importance.csv``, ``drop_plan.json``, ``speed.json``, ``quality.json``, the dropped model and
        ``report.html``.

        Args:
            model: The model to prune.
            datamodule: The text; the training split is scored, the held-out split measures quality.
            scope: What to rank and drop: attention, mlp, block, or joint (attention and MLP in one ranking).
            count: Number to drop: blocks with scope block, else sublayers. Give this or ratio.
            ratio: Share to drop, in (0, 1): of the blocks with scope block, else of the sublayers. Give this or count.
            metric: cosine, relative_magnitude or angular; or, with passes without each sublayer, kl or loss.
            search: one-shot (the least important, measured once) or greedy (one after the other, by the damage of the
                set; metric kl or loss).
            replace: linear, for a linear map of its norm's output in place of each sublayer; fold, for changed weights
                of the sublayers behind it; left out, nothing makes up for it.
            rank: Rank of the linear maps; left out, they are full matrices.
            method: paper (cosine, one-shot, nothing in their place) or best (kl, greedy, linear: the best we know
                without training). It sets metric, search and replace.
            objective: importance (drop the least important first) or speed (drop the least importance per measured
                millisecond of decoding first).
            protect: Indices of blocks to keep whole, such as [0, -1]; negative indices count from the end.
            batches: Number of batches to score.
            quality_batches: Number of held-out batches for loss and accuracy.
            prompt_tokens: Tokens per prompt of the speed measurement.
            new_tokens: Tokens decoded by the speed measurement.
            runs: Pairs of dense and dropped runs of the speed measurement.
            output: Folder for the dropped model. A relative path is inside the run directory.
            standalone: Add a small modelling file, so that transformers alone loads the folder, with
                trust_remote_code=True.

        Returns:
            The drop plan.

        Raises:
            LayershedError: Before measuring, if the sublayers cannot be dropped, or the model not measured or saved.
        """
        return prune(
            self,
            model,
            datamodule,
            scope=scope,
            count=count,
            ratio=ratio,
            method=method_of(method, metric, search, replace, rank),
            objective=objective,
            protect=protect,
            batches=batches,
            quality_batches=quality_batches,
            speed=SpeedSettings(prompt_tokens, new_tokens, runs=runs),
            output=output,
            standalone=standalone,
        )

    def benchmark(
        self,
        model: CausalLM,
        datamodule: TextData,
        base: str | None = None,
        ckpt_path: str | None = None,
        counts: Sequence[int] = (),
        scopes: Sequence[Scope] = ("attention", "mlp", "joint", "block"),
        metric: str = "cosine",
        objective: Objective = "importance",
        batches: int = 16,
        quality_batches: int = 16,
        quality: QualityName = "accuracy",
        prompt_tokens: int = 128,
        new_tokens: int = 32,
        batch_size: int = 1,
        runs: int = 9,
    ) -> Benchmark:
        """Measure quality and speed of a dropped model against its dense base, or sweep over drops of a dense model.

        Writes ``benchmark.json``; a sweep also writes ``frontier.png`` and ``importance.csv``.

        Args:
            model: The dropped model; for a sweep the dense model.
            datamodule: The text; the held-out split measures quality.
            base: The dense model to compare with: a folder, a hub id or a GGUF file. null compares a checkpoint with
                its own weights, the bypass lifted.
            ckpt_path: A checkpoint of fit. It also sets the options of the model.
            counts: For a sweep, the numbers to drop, such as [2, 4, 8]: blocks with scope block, else sublayers.
            scopes: For a sweep, what to rank. Every scope is measured with every count.
            metric: For a sweep: cosine, relative_magnitude or angular.
            objective: For a sweep: importance (drop the least important first) or speed (drop the least importance per
                measured millisecond of decoding first).
            batches: For a sweep, number of batches to score.
            quality_batches: Number of held-out batches for loss and accuracy.
            quality: The quality in the picture and in the SDR: accuracy, loss or perplexity.
            prompt_tokens: Tokens per prompt of the speed measurement.
            new_tokens: Tokens decoded by the speed measurement.
            batch_size: Sequences per batch of the speed measurement.
            runs: Pairs of dense and dropped runs of the speed measurement.

        Returns:
            The measurements.

        Raises:
            LayershedError: Before measuring, if there is nothing to compare or too few sublayers can be dropped.
        """
        return benchmark(
            self,
            model,
            datamodule,
            base=base,
            ckpt_path=ckpt_path,
            counts=counts,
            scopes=scopes,
            metric=metric,
            objective=objective,
            batches=batches,
            quality_batches=quality_batches,
            quality=quality,
            speed=SpeedSettings(prompt_tokens, new_tokens, batch_size, runs),
        )

    def evaluate(
        self,
        model: CausalLM,
        datamodule: TextData,
        tasks: Sequence[str] = (),
        passkey: Sequence[int] = (),
        keys: int = 1,
        limit: int | None = None,
        shots: int | None = None,
        batch_size: int = 8,
        run_generated_code: bool = False,
        dense: bool | str = False,
        ckpt_path: str | None = None,
        output: str | None = None,
    ) -> dict[str, TaskResults]:
        """Score a model on tasks of lm-evaluation-harness and on long contexts: a table, no training.

        Args:
            model: The model.
            datamodule: Not used, but for its tokenizer.
            tasks: Names of tasks, YAML files of the harness, files of requests (.jsonl, .jsonl.gz), or the presets
                paper and generative.
            passkey: Lengths of contexts, in tokens, in which a pass key must be found again.
            keys: Number of pass keys in each context, of which one is asked for.
            limit: Most questions of each task and length; null takes all, and ten of each length.
            shots: Examples before each question; null takes the task's own.
            batch_size: Sequences in a forward pass.
            run_generated_code: Allow tasks that run the code that the model writes (humaneval), on this machine.
            dense: Score the dense model, too; as of generate.
            ckpt_path: A checkpoint of fit; the same as model.pretrained FILE.ckpt.
            output: A file for the results as JSON.

        Returns:
            The results, by model.

        Raises:
            LayershedError: Before evaluating, if there is nothing to evaluate, or no dense model.
        """
        options: dict[str, Any] = {"limit": limit, "shots": shots, "batch_size": batch_size, "dense": dense}
        options |= {"ckpt_path": ckpt_path, "output": output, "run_generated_code": run_generated_code}
        return evaluate(self, model, datamodule, tasks=tasks, passkey=passkey, keys=keys, **options)

    def generate(
        self,
        model: CausalLM,
        datamodule: TextData,
        prompt: str | None = None,
        prompts: str | None = None,
        chat: bool = False,
        system: str | None = None,
        dense: bool | str = False,
        ckpt_path: str | None = None,
        max_new_tokens: int | None = None,
        do_sample: bool | None = None,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        repetition_penalty: float | None = None,
        num_beams: int | None = None,
        generation: dict[str, Any] | None = None,
    ) -> list[dict[str, str]]:
        """Continue prompts, or answer them, by a dropped model; the text appears while it is generated.

        Without options of sampling it does what the model's own generation_config.json says. With one of them it
        samples. The same seed_everything gives the same text.

        Args:
            model: The model.
            datamodule: Not used, but for its tokenizer.
            prompt: A prompt.
            prompts: A file of prompts: .txt with one on each line, or .jsonl with rows of prompt or of messages (a list
                of role and content).
            chat: Write each prompt with the tokenizer's chat template, as a message of the user. Without a prompt, talk
                at the terminal.
            system: The first message of each conversation.
            dense: Show the dense model's text, too. Alone, it lifts the bypass of a checkpoint; a saved folder has lost
                the dropped weights, so name the model before the drop: a folder, a hub id or a .gguf file.
            ckpt_path: A checkpoint of fit; the same as model.pretrained FILE.ckpt.
            max_new_tokens: Most tokens to generate; null is 100, or what fits into the model's positions.
            do_sample: Draw tokens at random; false takes the most likely ones.
            temperature: Below 1, likely tokens become likelier; above, less likely.
            top_k: Draw from the k most likely tokens only.
            top_p: Draw from the fewest tokens whose probabilities add up to p.
            min_p: Draw from tokens at least min_p times as likely as the most likely one.
            repetition_penalty: Above 1, tokens that are there already become less likely.
            num_beams: Beams of a beam search; with more than 1, the text appears at its end.
            generation: Other fields of transformers' GenerationConfig, such as {"no_repeat_ngram_size": 3}.

        Returns:
            For each prompt the texts, by model.

        Raises:
            GenerationError: Before generating, if there is no prompt, an option is out of range, or there is no chat
                template or no dense model.
        """
        own = {"max_new_tokens": max_new_tokens, "do_sample": do_sample, "temperature": temperature, "top_k": top_k}
        own |= {"top_p": top_p, "min_p": min_p, "repetition_penalty": repetition_penalty, "num_beams": num_beams}
        options = {**own, **(generation or {})}
        check_sampling(options)
        given = read_prompts(prompt, prompts, chat=chat, system=system)
        settings: dict[str, Any] = {"system": system, "ckpt_path": ckpt_path, "dense": dense, "options": options}
        return generate(self, model, datamodule, prompts=given, **settings)

    def plan(
        self,
        model: CausalLM,
        datamodule: TextData,
        scope: Scope = "attention",
        count: int | None = None,
        ratio: float | None = None,
        plan: str | None = None,
        device: str = "this",
        batch_size: int = 1,
        prompt_tokens: int = 256,
        new_tokens: int = 64,
    ) -> Prediction:
        """Predict size and speed after a drop on a device. Reads the model's config only and allocates no weights.

        Writes ``prediction.json`` into the run directory.

        Args:
            model: A skeleton on the meta device.
            datamodule: Not used; no text is needed.
            scope: What to drop: attention, mlp or block. The deepest go first, because there are no importances. For
                joint give a plan.
            count: Number to drop: blocks with scope block, else sublayers. Give this, ratio or plan. Without any, half
                of the attention is dropped; for a dropped model, what it already lacks.
            ratio: Share to drop, in (0, 1).
            plan: A drop_plan.json of a run, instead of scope, count and ratio.
            device: this (ceilings are measured) or the name of a device with published ceilings (DEVICES).
            batch_size: Sequences per batch.
            prompt_tokens: Tokens per prompt.
            new_tokens: Tokens to decode; the KV cache holds prompt and new tokens.

        Returns:
            The prediction.

        Raises:
            LayershedError: If the drop is impossible or cannot be predicted.
        """
        speed = SpeedSettings(prompt_tokens, new_tokens, batch_size)
        return predict_plan(self, model, scope=scope, count=count, ratio=ratio, plan=plan, device=device, speed=speed)
