"""What commands should write, by plain formulas, and readers of what they wrote."""

from itertools import islice

import torch
from torch.nn.functional import cosine_similarity, cross_entropy

from layershed.training.text_data import TextData


def batches_of(folder, split, count, **kwargs):
    """The batches that a command reads."""
    data = TextData("text.txt", tokenizer=str(folder), block_size=16, batch_size=2, max_tokens=512, **kwargs)
    data.setup()
    return list(islice(getattr(data, f"{split}_dataloader")(), count))


@torch.no_grad()
def plain_importance(model, batches):
    """The paper's formula on stored hidden states, in float64."""
    stored = {}

    def note(name, of_input=False):
        def hook(_, args, kwargs, output):
            value = (args[0] if args else kwargs["hidden_states"]) if of_input else output
            stored.setdefault(name, []).append((value[0] if isinstance(value, tuple) else value).double().flatten(0, 1))

        return hook

    handles = []
    for index, layer in enumerate(model.model.layers):
        for name, module, of_input in (
            ("x", layer, True),
            ("y", layer, False),
            ("attention", layer.self_attn, False),
        ):
            handles.append(module.register_forward_hook(note((name, index), of_input), with_kwargs=True))
    for batch in batches:
        model(input_ids=batch["input_ids"])
    for handle in handles:
        handle.remove()
    values = {key: torch.cat(tensors) for key, tensors in stored.items()}
    importance = {}
    for index in range(len(model.model.layers)):
        x, y, middle = values["x", index], values["y", index], values["x", index] + values["attention", index]
        for kind, before, after in (("attention", x, middle), ("mlp", middle, y), ("block", x, y)):
            importance[index, kind] = 1 - cosine_similarity(before, after, dim=-1).mean().item()
    return importance


def read_importance(path):
    rows = [line.split(",") for line in path.read_text().splitlines()]
    assert rows[0] == ["step", "block", "kind", "metric", "value"]
    assert {(row[0], row[3]) for row in rows[1:]} == {("0", "cosine")}
    return {(int(block), kind): float(value) for _, block, kind, _, value in rows[1:]}


@torch.no_grad()
def plain_quality(model, batches):
    """Mean loss and accuracy over all next tokens."""
    logits = torch.cat([model(input_ids=batch["input_ids"]).logits[:, :-1].flatten(0, 1) for batch in batches])
    targets = torch.cat([batch["input_ids"][:, 1:].flatten() for batch in batches])
    return cross_entropy(logits, targets).item(), (logits.argmax(-1) == targets).double().mean().item()
