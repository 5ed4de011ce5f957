r"""How far a model's predictions are from those of the dense model: the KL divergence, and the rise of the loss.

.. math:: \mathrm{KL}(p \,\|\, q) = \sum_v p_v \log (p_v / q_v)

per token, in nats, with p of the dense model. Only its k most likely tokens are kept, and all others as one: the result
is at most the exact divergence, and much nearer to it than candidates differ.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from torch.nn.functional import cross_entropy

TOP = 128


@dataclass(frozen=True)
class Reference:
    """What the dense model predicts on one batch, at the tokens that count.

    Args:
        counted: Which positions count, shape (batch, tokens).
        targets: The next tokens there, shape (counted,).
        likely: The k most likely tokens, shape (counted, k).
        log_p: Their log probabilities, shape (counted, k).
        log_rest: The log probability of all others together, shape (counted,); None if there are no others.
    """

    counted: Tensor
    targets: Tensor
    likely: Tensor
    log_p: Tensor
    log_rest: Tensor | None

    @classmethod
    def of(cls, logits: Tensor, targets: Tensor, counted: Tensor, top: int = TOP) -> Reference:
        """Keep what is needed of a dense pass.

        Args:
            logits: Shape (batch, tokens, vocabulary).
            targets: The next tokens, shape (batch, tokens).
            counted: True where a position counts, shape (batch, tokens).
            top: k.
        """
        log_p = logits[counted].float().log_softmax(-1)
        kept, likely = log_p.topk(min(top, log_p.shape[-1]), dim=-1)
        rest = None if kept.shape == log_p.shape else _log_rest(kept)
        return cls(counted, targets[counted], likely, kept, rest)


def divergence(reference: Reference, logits: Tensor) -> Tensor:
    """Sum of KL(dense || model) over the tokens that count, a scalar in float64.

    Args:
        reference: What the dense model predicts.
        logits: Of the model, shape (batch, tokens, vocabulary).
    """
    own = logits[reference.counted].float()
    log_q = own.gather(-1, reference.likely) - own.logsumexp(-1, keepdim=True)
    terms = (reference.log_p.exp() * (reference.log_p - log_q)).sum(-1)
    total = terms.double().sum()
    if reference.log_rest is None:
        return total
    return total + (reference.log_rest.exp() * (reference.log_rest - _log_rest(log_q))).sum()


def loss_of(reference: Reference, logits: Tensor) -> Tensor:
    """Sum of the next-token loss over the tokens that count, a scalar in float64."""
    return cross_entropy(logits[reference.counted].float(), reference.targets, reduction="sum").double()


def _log_rest(log_p: Tensor) -> Tensor:
    """The log of what probabilities in float32 leave over, shape (counted,), down to their rounding."""
    return (1 - log_p.double().exp().sum(-1)).clamp(min=1e-7).log()
