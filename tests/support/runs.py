"""Runs that the callbacks are tried in: our own module, and one that knows nothing of layershed."""

import copy

import lightning.pytorch as pl
import torch
from torch.utils.data import DataLoader, IterableDataset

from layershed.stand_ins.install import MARK
from layershed.training.causal_lm import CausalLM
from tests.support.models import SIZES, build_model

TOKENS, BATCH = 16, 2
FILES = {"importance.csv", "drop_plan.json", "speed.json", "pruned", "report.html"}  # what all callbacks write


class Interrupted(Exception):
    """What stops a run."""


class Interrupt(pl.Callback):
    """Kills the run at the start of the batch with this number, counted over the whole run from 0."""

    def __init__(self, batch):
        self.batch = batch

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.fit_loop.epoch_loop.total_batch_idx == self.batch:
            raise Interrupted


class Save(pl.Callback):
    """Writes a checkpoint once that many optimizer steps are done; after every callback in the list."""

    def __init__(self, path, step):
        self.path, self.step = path, step

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_step == self.step and not self.path.exists():
            trainer.save_checkpoint(self.path)


class Watch(pl.Callback):
    """Notes weights, learning rates and other values at the end of every batch, in the order of the run."""

    def __init__(self, note):
        self.note, self.seen = note, []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.seen.append((trainer.global_step, self.note(trainer, pl_module)))


class Foreign(pl.LightningModule):
    """A plain module of somebody else's: its own attribute name, loss, optimizer and schedule."""

    def __init__(self, steps=12, lr=1e-2, **overrides):
        super().__init__()
        self.net = build_model(**overrides).train()
        self.steps, self.lr = steps, lr

    def loss(self, batch):
        mask = batch.get("attention_mask")
        logits = self.net(input_ids=batch["input_ids"], attention_mask=mask, use_cache=False).logits
        return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), batch["input_ids"][:, 1:].flatten())

    def training_step(self, batch, batch_idx):
        loss = self.loss(batch)
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self.loss(batch), batch_size=len(batch["input_ids"]))

    def test_step(self, batch, batch_idx):
        self.log("test_loss", self.loss(batch), batch_size=len(batch["input_ids"]))

    def predict_step(self, batch, batch_idx):
        return self.net(input_ids=batch["input_ids"], use_cache=False).logits

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.lr, weight_decay=0.1)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=self.steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class HeadLoss:
    """The loss of a module with a linear head of its own after the transformer."""

    def loss(self, batch):
        logits = self.net(input_ids=batch["input_ids"], use_cache=False).logits
        logits = logits + self.head(logits)
        return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), batch["input_ids"][:, 1:].flatten())


class Manual(Foreign):
    """Two optimizers, stepped by hand: global_step moves by two with every batch."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.automatic_optimization = False
        self.scale = torch.nn.Parameter(torch.ones(()))

    def training_step(self, batch, batch_idx):
        first, second = self.optimizers()
        first.zero_grad()
        second.zero_grad()
        self.manual_backward(self.loss(batch) * self.scale)
        first.step()
        second.step()

    def configure_optimizers(self):
        return [torch.optim.AdamW(self.net.parameters(), lr=1e-2), torch.optim.SGD([self.scale], lr=1e-3)]


class Broken(Foreign):
    """In these batches, counted from 0, its training step first runs the model on NaN, which has no part in the loss.

    Args:
        beside: Batches whose own forward pass follows.
        alone: Batches in which it is the only one.
    """

    NAN = 95  # a token that no batch holds

    def __init__(self, beside=(), alone=(), **kwargs):
        super().__init__(**kwargs)
        self.beside, self.alone = beside, alone
        with torch.no_grad():
            self.net.get_input_embeddings().weight[self.NAN] = torch.nan

    def training_step(self, batch, batch_idx):
        number = self.trainer.fit_loop.epoch_loop.total_batch_idx
        if number in (*self.beside, *self.alone):
            with torch.no_grad():
                self.net(input_ids=torch.full_like(batch["input_ids"], self.NAN), use_cache=False)
        if number in self.alone:
            return 0 * self.net.model.norm.weight.sum()
        return super().training_step(batch, batch_idx)


def sequences(count, seed=0):
    """Counting by a step of its own in every row: something a tiny model can learn."""
    generator = torch.Generator().manual_seed(seed)
    start, stride = (torch.randint(1, 9, (count, 1), generator=generator) for _ in range(2))
    rows = (start + stride * torch.arange(TOKENS)) % 90 + 3
    return [{"input_ids": row, "labels": row} for row in rows]


class Lengthless(IterableDataset):
    """Sequences that come one after the other, nobody knows how many."""

    def __iter__(self):
        return iter(sequences(6, seed=100))


def loader(batches=6, seed=0, **kwargs):
    return DataLoader(sequences(BATCH * batches, seed), batch_size=BATCH, **kwargs)


def val_loader(batches=3):
    return loader(batches, seed=100)


def logits_of(net):
    """Of the validation batches, in eval mode."""
    net.eval()
    with torch.no_grad():
        return torch.cat([net(input_ids=batch["input_ids"], use_cache=False).logits for batch in val_loader()])


def causal_lm(**kwargs):
    """Our own module, the same weights every time."""
    torch.manual_seed(0)
    config = {"model_type": "llama", **SIZES, "vocab_size": 259, "pad_token_id": 0, "eos_token_id": 1}
    module = CausalLM(**{"config": config, "optimizer": adamw, **kwargs})
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return module


def adamw(parameters):
    return torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0.1)


def fit_foreign(trainer, module=None, train=None, val=None, **kwargs):
    """Fit a foreign module, from the same seed every time."""
    module = module or Foreign(**kwargs)
    torch.manual_seed(7)
    trainer.fit(module, loader() if train is None else train, val_loader() if val is None else val)
    return module


def unmarked(weights):
    """A state dict without the keys that say what is dropped."""
    return {name: tensor for name, tensor in weights.items() if not str(name).endswith(MARK)}


def same(left, right):
    """Whether two nests of dicts, lists, tensors and numbers are equal to the last bit, marks of drops aside."""
    if isinstance(left, torch.Tensor):
        return isinstance(right, torch.Tensor) and torch.equal(left, right)
    if isinstance(left, dict):
        if not isinstance(right, dict):
            return False
        left, right = unmarked(left), unmarked(right)
        return left.keys() == right.keys() and all(same(left[key], right[key]) for key in left)
    if isinstance(left, list | tuple):
        return len(left) == len(right) and all(map(same, left, right))
    return left == right


def state_of(trainer, module):
    """Everything of a run that the next step would depend on."""
    return copy.deepcopy(
        {
            "weights": module.state_dict(),
            "optimizer": [optimizer.state_dict() for optimizer in trainer.optimizers],
            "schedule": [config.scheduler.state_dict() for config in trainer.lr_scheduler_configs],
            "step": trainer.global_step,
        }
    )


FORMULAS = {
    "cosine": lambda x, y: 1 - torch.cosine_similarity(x, y, dim=-1),
    "relative_magnitude": lambda x, y: (y - x).norm(dim=-1) / x.norm(dim=-1),
    "angular": lambda x, y: torch.cosine_similarity(x, y, dim=-1).clamp(-1, 1).arccos() / torch.pi,
}


class Captured:
    """X and Y of every sublayer and block of a Llama, caught by hooks of our own; importances in float64.

    Args:
        net: A Llama.
    """

    def __init__(self, net):
        self.pairs = {}
        self.handles = []
        for block, layer in enumerate(net.model.layers):
            for kind, norm in (("attention", layer.input_layernorm), ("mlp", layer.post_attention_layernorm)):
                self.handles.append(norm.register_forward_pre_hook(self._entered(block, kind)))
            self.handles.append(layer.register_forward_hook(self._left(block)))

    def _entered(self, block, kind):
        def hook(_module, args):
            x = args[0].detach().double()
            if kind == "attention":
                self.start = x
            else:
                self._note(block, "attention", self.x, x)
            self.x = x

        return hook

    def _left(self, block):
        def hook(_module, _args, output):
            y = (output[0] if isinstance(output, tuple) else output).detach().double()
            self._note(block, "mlp", self.x, y)
            self._note(block, "block", self.start, y)

        return hook

    def _note(self, block, kind, x, y):
        self.pairs.setdefault((block, kind), []).append((x, y))

    def importances(self, metric="cosine", mask=None):
        """Mean over all tokens seen since the last call, by (block, kind)."""
        pairs, self.pairs = self.pairs, {}
        values = {}
        for key, passes in pairs.items():
            tokens = torch.cat([FORMULAS[metric](x, y)[slice(None) if mask is None else mask] for x, y in passes])
            values[key] = tokens.mean().item()
        return values

    def remove(self):
        for handle in self.handles:
            handle.remove()


def ranked(values, scope, count):
    """The lowest of (block, kind) -> importance, in the order of dropping; a block means both its sublayers."""
    kinds = {"joint": ("attention", "mlp")}.get(scope, (scope,))
    lowest = sorted((value, key) for key, value in values.items() if key[1] in kinds)[:count]
    if scope != "block":
        return [key for _, key in lowest]
    return [(block, kind) for _, (block, _) in lowest for kind in ("attention", "mlp")]


class HandRun:
    """A training run without Lightning and without layershed, on the same data with the same arithmetic.

    Args:
        accumulate: Micro-batches per optimizer step.
        overrides: Of the foreign module's model.
    """

    def __init__(self, accumulate=1, **overrides):
        self.module = Foreign(**overrides)
        self.module.log = lambda *_, **__: None
        self.accumulate = accumulate
        self.captured = Captured(self.module.net)
        settings = self.module.configure_optimizers()
        self.optimizer, self.schedule = settings["optimizer"], settings["lr_scheduler"]["scheduler"]
        self.dropped, self.frozen = [], []

    def train(self, batches):
        """Yields the number of every optimizer step that was taken."""
        for index, batch in enumerate(batches):
            (self.module.loss(batch) / self.accumulate).backward()
            if (index + 1) % self.accumulate == 0:
                for parameter in self.frozen:
                    parameter.grad = None  # which every torch optimizer passes over
                self.optimizer.step()
                self.schedule.step()
                self.optimizer.zero_grad()
                yield (index + 1) // self.accumulate

    def drop(self, keys):
        """Multiply branches by zero, and keep their weights and those of their norms as they are."""
        for block, kind in keys:
            layer = self.module.net.model.layers[block]
            branch, norm = {
                "attention": (layer.self_attn, layer.input_layernorm),
                "mlp": (layer.mlp, layer.post_attention_layernorm),
            }[kind]
            branch.register_forward_hook(_zero)
            self.frozen += [*branch.parameters(), *norm.parameters()]
        self.dropped += keys

    def importances(self, batches, metric="cosine"):
        """Importance of the kept sublayers over batches, in eval mode."""
        self.captured.importances()
        self.module.net.eval()
        with torch.no_grad():
            for batch in batches:
                self.module.net(input_ids=batch["input_ids"])
        self.module.net.train()
        return self.seen(metric)

    def seen(self, metric="cosine"):
        """Importance of the kept sublayers over every forward pass since the last call."""
        values = self.captured.importances(metric)
        gone = {*self.dropped}
        empty = {(b, "block") for b, _ in gone if {(b, "attention"), (b, "mlp")} <= gone}
        return {key: value for key, value in values.items() if key not in gone | empty}

    def quality(self, batches):
        """Loss and accuracy per token, in float64."""
        self.module.net.eval()
        losses, hits = [], []
        with torch.no_grad():
            for batch in batches:
                logits = self.module.net(input_ids=batch["input_ids"]).logits[:, :-1].double()
                targets = batch["input_ids"][:, 1:]
                losses.append(-logits.log_softmax(-1).gather(-1, targets[..., None]).flatten())
                hits.append((logits.argmax(-1) == targets).double().flatten())
        self.module.net.train()
        return torch.cat(losses).mean().item(), torch.cat(hits).mean().item()


def _zero(_module, _args, output):
    return (output[0] * 0, *output[1:]) if isinstance(output, tuple) else output * 0
