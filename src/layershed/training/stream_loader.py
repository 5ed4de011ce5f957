"""A loader of a stream: an epoch is as long as the run, and a further one goes on where the last one ended."""

from __future__ import annotations

from typing import Any

from layershed.extras import needs

with needs("data", "TextData"):
    from torchdata.stateful_dataloader import StatefulDataLoader


class StreamLoader(StatefulDataLoader[Any]):
    """A StatefulDataLoader over :class:`layershed.training.streaming.StreamedSequences`.

    It has a length: from a loader without one Lightning fetches a batch ahead, and the state in a checkpoint would be
    that of the next batch.

    Args:
        dataset: The sequences.
        batches: Batches in an epoch; None in a loop without a Trainer, in which the loader has no length.
        options: Those of StatefulDataLoader.
    """

    def __init__(self, dataset: Any, batches: int | None, **options: Any) -> None:
        super().__init__(dataset, **options)
        self.batches = batches
        self._latest: Any = None

    def __len__(self) -> int:
        """Batches in an epoch."""
        if self.batches is None:
            raise TypeError("a stream has no length")
        return self.batches

    def __iter__(self) -> Any:
        """Go on after the last batch that was given, or from a state that was loaded."""
        if self._latest is not None and self.next_iter_state is None:
            self.load_state_dict(self._latest.state_dict())
        self._latest = super().__iter__()
        return self._latest

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a state."""
        self._latest = None
        super().load_state_dict(state_dict)
