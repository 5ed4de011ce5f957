"""Which weights train, and which have gradients."""


def trainable(model):
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def frozen_with_gradient(model):
    return {name for name, p in model.named_parameters() if not p.requires_grad and p.grad is not None}


def backward(model, tokens):
    model(input_ids=tokens, labels=tokens, use_cache=False).loss.backward()
