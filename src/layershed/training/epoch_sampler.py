"""A sampler whose order survives an interruption: it depends on seed and epoch only."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch.utils.data import DistributedSampler


class EpochSampler(DistributedSampler[Any]):
    """Samples full batches for one rank, in an order that depends on seed and epoch only.

    Lightning does not replace a DistributedSampler, and sets its epoch. The torchdata samplers lose the epoch on a
    resume: their order depends on the number of draws from a generator, or on an epoch set after workers prefetch.

    Args:
        dataset: Anything with a length.
        batch_size: Sequences per batch. Sequences that do not fill a batch on every rank are left out.
        seed: Seed of the orders.
        num_replicas: Number of ranks.
        rank: Index of this rank.
    """

    def __init__(self, dataset: Any, batch_size: int, seed: int, num_replicas: int, rank: int) -> None:
        super().__init__(dataset, num_replicas=num_replicas, rank=rank, seed=seed, drop_last=True)
        self.num_samples = len(dataset) // (num_replicas * batch_size) * batch_size
        self.total_size = self.num_samples * num_replicas

    def __iter__(self) -> Iterator[int]:
        return _Position(self)

    def order(self, epoch: int) -> list[int]:
        """The indices of an epoch."""
        self.set_epoch(epoch)
        return list(super().__iter__())


class _Position(Iterator[int]):
    """Position in a pass over an :class:`EpochSampler`: the epoch and the number of indices given."""

    def __init__(self, sampler: EpochSampler) -> None:
        self.sampler, self.epoch, self.given = sampler, sampler.epoch, 0
        self.order = sampler.order(self.epoch)

    def __next__(self) -> int:
        if self.given == len(self.order):
            raise StopIteration
        self.given += 1
        return self.order[self.given - 1]

    def state_dict(self) -> dict[str, int]:
        """Epoch and position, for torchdata's StatefulDataLoader."""
        return {"epoch": self.epoch, "given": self.given}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Restore the epoch and the position."""
        self.epoch, self.given = state["epoch"], state["given"]
        # The state was saved after the last batch of an epoch: Lightning fetches the next epoch.
        if self.given == len(self.order):
            self.epoch, self.given = self.epoch + 1, 0
        self.order = self.sampler.order(self.epoch)
