"""The damage of sublayers by whole passes: a reference without reuse and without stand-ins."""

import copy

import torch

WRITERS = {"attention": "o_proj", "mlp": "down_proj"}


def make_batches():
    """Two batches, one of them with padding."""
    generator = torch.Generator().manual_seed(3)
    batches = [{"input_ids": torch.randint(3, 97, (2, 9), generator=generator)} for _ in range(2)]
    mask = torch.ones(2, 9, dtype=torch.long)
    mask[0, :4] = 0
    batches[1]["attention_mask"] = mask
    return batches


def without(model, sublayers):
    """A copy of a Llama whose sublayers write zeros."""
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for sublayer in sublayers:
            getattr(twin.get_submodule(sublayer.path), WRITERS[sublayer.kind]).weight.zero_()
    return twin


def damage(dense, dropped, metric, batches):
    """Mean over the predicted tokens of the divergence, or of the rise of the loss, in float64."""
    total = tokens = 0
    for batch in batches:
        mask = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool()
        counts = mask[:, 1:] & mask[:, :-1]
        with torch.no_grad():
            log_p, log_q = (model(**batch).logits[:, :-1].double().log_softmax(-1) for model in (dense, dropped))
        if metric == "kl":
            values = (log_p.exp() * (log_p - log_q)).sum(-1)
        else:
            values = (log_p - log_q).gather(-1, batch["input_ids"][:, 1:, None])[..., 0]
        total += float(values[counts].sum())
        tokens += int(counts.sum())
    return total / tokens
