"""Llama blocks written by hand whose sublayers can be found and dropped."""

import torch
from torch import nn
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from tests.support.models import build_model


class Written(LlamaDecoderLayer):
    """Layers written by hand; each takes a branch out itself, by multiplying it with zero."""

    off = frozenset()

    def prepare(self):
        """More modules, before the first forward pass."""

    def branch(self, kind, output):
        return 0 * output if kind in self.off else output

    def attention(self, hidden, kwargs, norm="input_layernorm"):
        return self.branch("attention", self.self_attn(hidden_states=getattr(self, norm)(hidden), **kwargs)[0])

    def perceptron(self, hidden):
        return self.branch("mlp", self.mlp(self.post_attention_layernorm(hidden)))


class Faithful(Written):
    def forward(self, hidden_states, **kwargs):
        hidden_states = hidden_states + self.attention(hidden_states, kwargs)
        return hidden_states + self.perceptron(hidden_states)


class ScaledMlp(Written):
    def forward(self, hidden_states, **kwargs):
        hidden_states = hidden_states + self.attention(hidden_states, kwargs)
        return hidden_states + 0.9 * self.perceptron(hidden_states)


class ScaledX(Written):
    def forward(self, hidden_states, **kwargs):
        hidden_states = 1.01 * hidden_states
        hidden_states = hidden_states + self.attention(hidden_states, kwargs)
        return hidden_states + self.perceptron(hidden_states)


class Subtracted(Written):
    def forward(self, hidden_states, **kwargs):
        hidden_states = hidden_states - self.attention(hidden_states, kwargs)
        return hidden_states - self.perceptron(hidden_states)


class InPlace(Written):
    def forward(self, hidden_states, **kwargs):
        attention = self.attention(hidden_states, kwargs)
        attention += hidden_states
        perceptron = self.perceptron(attention)
        perceptron += attention
        return perceptron


class ScaledByTensor(Written):
    """As Doge: what is read at the exit is Y."""

    def forward(self, hidden_states, **kwargs):
        hidden_states = hidden_states + self.attention(hidden_states, kwargs)
        return hidden_states + self.input_layernorm.weight * self.perceptron(hidden_states)


class Gated(Written):
    def forward(self, hidden_states, **kwargs):
        hidden_states = hidden_states + self.attention(hidden_states, kwargs)
        return hidden_states + torch.sigmoid(hidden_states) * self.perceptron(hidden_states)


class Parallel(Written):
    def forward(self, hidden_states, **kwargs):
        return hidden_states + 0.5 * (self.attention(hidden_states, kwargs) + self.perceptron(hidden_states))


class MlpFirst(Written):
    def forward(self, hidden_states, **kwargs):
        hidden_states = hidden_states + self.perceptron(hidden_states)
        return hidden_states + self.attention(hidden_states, kwargs)


class WithoutMlp(Written):
    def forward(self, hidden_states, **kwargs):
        return hidden_states + self.attention(hidden_states, kwargs)


class MlpTwice(Written):
    def forward(self, hidden_states, **kwargs):
        hidden_states = hidden_states + self.attention(hidden_states, kwargs)
        for _ in range(2):
            hidden_states = hidden_states + self.perceptron(hidden_states)
        return hidden_states


class NormTwice(Written):
    """One norm for both: it must stay for the MLP when the attention goes."""

    def forward(self, hidden_states, **kwargs):
        hidden_states = hidden_states + self.attention(hidden_states, kwargs, norm="post_attention_layernorm")
        return hidden_states + self.perceptron(hidden_states)


class Exponential(Written):
    """Of a zero it makes ones."""

    def forward(self, hidden_states, **kwargs):
        hidden_states = hidden_states + self.attention(hidden_states, kwargs)
        return hidden_states + self.perceptron(hidden_states).exp()


class SecondMlp(Written):
    def prepare(self):
        self.adapter = nn.Linear(32, 32)

    def forward(self, hidden_states, **kwargs):
        hidden_states = hidden_states + self.attention(hidden_states, kwargs)
        hidden_states = hidden_states + self.perceptron(hidden_states)
        return hidden_states + self.adapter(hidden_states)


class SideBySide(SecondMlp):
    """Experts and a shared expert are one MLP."""

    def forward(self, hidden_states, **kwargs):
        hidden_states = hidden_states + self.attention(hidden_states, kwargs)
        more = self.branch("mlp", self.adapter(hidden_states))
        return hidden_states + self.perceptron(hidden_states) + more


class TwoModules(Written):
    def prepare(self):
        self.fc1, self.fc2 = nn.Linear(32, 48), nn.Linear(48, 32)

    def forward(self, hidden_states, **kwargs):
        hidden_states = hidden_states + self.attention(hidden_states, kwargs)
        inner = self.fc1(self.post_attention_layernorm(hidden_states)).relu()
        return hidden_states + self.branch("mlp", self.fc2(inner))


class Shift(nn.Module):
    """An MLP by its name, yet every token reads the one before it."""

    def __init__(self, hidden=32):
        super().__init__()
        self.mix = nn.Linear(hidden, hidden)

    def forward(self, hidden_states):
        return self.mix(hidden_states + hidden_states.roll(1, dims=1))


class Mixer(Faithful):
    def prepare(self):
        self.mlp = Shift()


class InnerSum(Written):
    """The norm after the MLP sees more than the MLP."""

    def prepare(self):
        self.after = nn.LayerNorm(32)

    def forward(self, hidden_states, **kwargs):
        hidden_states = hidden_states + self.attention(hidden_states, kwargs)
        inner = self.post_attention_layernorm(hidden_states)
        return hidden_states + self.branch("mlp", self.after(inner + self.mlp(inner)))


class Adding(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(32, 32)
        self.off = False

    def forward(self, inner, residual):
        return residual + self.fc(inner) * (0 if self.off else 1)


class AddsInside(Written):
    """BLOOM's modules add their branch to the stream themselves."""

    def prepare(self):
        self.out = Adding()

    def forward(self, hidden_states, **kwargs):
        hidden_states = hidden_states + self.attention(hidden_states, kwargs)
        self.out.off = "mlp" in self.off
        return self.out(self.post_attention_layernorm(hidden_states), hidden_states)


class PostNorm(Written):
    """The norms stand in the stream and go along with the branch before them."""

    def forward(self, hidden_states, **kwargs):
        if "attention" not in self.off:
            attention, _ = self.self_attn(hidden_states=hidden_states, **kwargs)
            hidden_states = self.input_layernorm(hidden_states + attention)
        if "mlp" not in self.off:
            hidden_states = self.post_attention_layernorm(hidden_states + self.mlp(hidden_states))
        return hidden_states


class PostNormForTwo(Written):
    """A norm after two branches belongs to neither."""

    def forward(self, hidden_states, **kwargs):
        attention = self.branch("attention", self.self_attn(hidden_states=hidden_states, **kwargs)[0])
        perceptron = self.branch("mlp", self.mlp(hidden_states))
        return self.input_layernorm(hidden_states + attention + perceptron)


BLOCKS = 2


def written(layer_class):
    model = build_model("llama", num_hidden_layers=BLOCKS)
    torch.manual_seed(0)
    for layer in model.model.layers:
        layer.__class__ = layer_class
        layer.prepare()
    return model.eval()


def logits(model, tokens):
    with torch.no_grad():
        return model(input_ids=tokens, use_cache=False).logits
