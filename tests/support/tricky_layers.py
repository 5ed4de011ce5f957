"""Llama blocks written by hand that must be refused, or left alone, or tried before a stand-in is believed."""

import torch
from torch import nn

from tests.support.written_layers import Adding, AddsInside, TwoModules, Written


class XFromElsewhere(Written):
    """The MLP's residual comes from before the attention: neither is a branch of its own."""

    def forward(self, hidden_states, **kwargs):
        return hidden_states + self.perceptron(hidden_states + self.attention(hidden_states, kwargs))


class Chained(Written):
    """The MLP reads the attention without the stream."""

    def forward(self, hidden_states, **kwargs):
        attention = self.attention(hidden_states, kwargs)
        return hidden_states + attention + self.perceptron(attention)


class Interpolated(Written):
    def forward(self, hidden_states, **kwargs):
        return hidden_states.lerp(self.attention(hidden_states, kwargs), 0.5)


class Concatenated(Written):
    def forward(self, hidden_states, **kwargs):
        out = hidden_states + self.attention(hidden_states, kwargs)
        return torch.cat([out[..., :16], out[..., 16:]], -1)


class WithoutResidual(Written):
    def forward(self, hidden_states, **kwargs):
        return self.attention(hidden_states, kwargs)


class Doubled(Written):
    def forward(self, hidden_states, **kwargs):
        return hidden_states + self.attention(hidden_states, kwargs) + hidden_states


class NormInPlace(Written):
    """Handing the stream on in the place of the norm, it is the stream that is written to."""

    def forward(self, hidden_states, **kwargs):
        hidden_states = hidden_states + self.attention(hidden_states, kwargs)
        inner = self.post_attention_layernorm(hidden_states)
        inner.mul_(2)
        return hidden_states + self.branch("mlp", self.mlp(inner))


class ActivationInPlace(TwoModules):
    def forward(self, hidden_states, **kwargs):
        hidden_states = hidden_states + self.attention(hidden_states, kwargs)
        inner = self.fc1(self.post_attention_layernorm(hidden_states)).relu_()
        return hidden_states + self.branch("mlp", self.fc2(inner))


class GatedLinearUnit(Written):
    """Halved, the stream handed on in the place of fc1 has another width than the branch."""

    def prepare(self):
        self.fc1, self.fc2 = nn.Linear(32, 96), nn.Linear(48, 32)

    def forward(self, hidden_states, **kwargs):
        hidden_states = hidden_states + self.attention(hidden_states, kwargs)
        gate, up = self.fc1(self.post_attention_layernorm(hidden_states)).chunk(2, -1)
        return hidden_states + self.branch("mlp", self.fc2(gate.sigmoid() * up))


class ScalingAdding(Adding):
    def forward(self, inner, residual):
        return super().forward(inner, 0.5 * residual)


class AddsAndScalesInside(AddsInside):
    """The stand-in returns X, but the stream continues with X / 2."""

    def prepare(self):
        self.out = ScalingAdding()


class AddsToALaterX(AddsInside):
    """The stand-in hands on X from before the attention, which is lost."""

    def forward(self, hidden_states, **kwargs):
        after = hidden_states + self.attention(hidden_states, kwargs)
        self.out.off = "mlp" in self.off
        return self.out(hidden_states, after)


class Reshaping(nn.Module):
    def __init__(self, before, after):
        super().__init__()
        self.before, self.after = before, after
        self.fc = nn.Linear(32, 32)

    def forward(self, hidden_states, like):
        return self.after(self.fc(self.before(hidden_states)), like)


class Flattened(Written):
    """Gets its tokens flattened, gives them by sequence; zeros have the shape of the former."""

    def prepare(self):
        self.mlp = Reshaping(lambda x: x, lambda y, shape: y.view(shape))

    def forward(self, hidden_states, **kwargs):
        hidden_states = hidden_states + self.attention(hidden_states, kwargs)
        flat = self.post_attention_layernorm(hidden_states).view(-1, 32)
        return hidden_states + self.branch("mlp", self.mlp(flat, hidden_states.shape))


class Transposed(Written):
    def prepare(self):
        self.mlp = Reshaping(lambda x: x, lambda y, _: y.transpose(1, 2))

    def forward(self, hidden_states, **kwargs):
        hidden_states = hidden_states + self.attention(hidden_states, kwargs)
        inner = self.mlp(self.post_attention_layernorm(hidden_states), None)
        return hidden_states + self.branch("mlp", inner.transpose(1, 2))


class DivisorOfZero(Written):
    """A zero in the denominator does not give a zero."""

    def forward(self, hidden_states, **kwargs):
        hidden_states = hidden_states + self.attention(hidden_states, kwargs)
        inner = self.post_attention_layernorm(hidden_states)
        return hidden_states + self.branch("mlp", inner / self.mlp(inner))
