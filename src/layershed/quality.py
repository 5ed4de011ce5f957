"""Quality of a language model on batches: mean loss and next-token accuracy."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Quality:
    """What :func:`evaluate_quality` measured.

    Args:
        loss: Mean cross-entropy per predicted token, in nats.
        accuracy: Share of tokens whose most likely prediction is right, in [0, 1].
        tokens: Number of predicted tokens.
    """

    loss: float
    accuracy: float
    tokens: int
