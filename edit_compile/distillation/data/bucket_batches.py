"""Shuffles groups of samples into batches of one group each, as a function of the batch's number."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache

import numpy as np

from edit_compile.distillation.data.seeding import seed_of


class BucketBatchSampler:
    """Batches of samples of one group (an aspect ratio), shuffled, none left out or seen more often than others.

    Each group is one endless stream, permutation after permutation, and is cut into batches of `size`. In `size` passes over
    the data a group of c samples gives exactly c batches, whatever c and `size`; these are spread evenly among those of the
    other groups. So nothing is dropped, padded or seen twice, and a batch is known from its number without the ones before it.
    """

    def __init__(self, groups: Sequence[Sequence[int]], seed: int) -> None:
        """
        Args:
            groups: the indices of each group's samples, none empty.
        """
        self.groups = [np.asarray(group) for group in groups]
        self.seed = seed
        self._round = lru_cache(maxsize=2)(self._spread)
        self._pass = lru_cache(maxsize=2 * len(groups))(self._shuffled)

    def batch(self, number: int, size: int) -> tuple[int, int]:
        """Return the group of a batch, and where in the group's stream the batch begins."""
        turn, rank = divmod(number, sum(map(len, self.groups)))
        groups, ranks = self._round(turn)
        group = int(groups[rank])
        return group, (turn * len(self.groups[group]) + int(ranks[rank])) * size

    def fallbacks(self, group: int, place: int) -> Iterator[int]:
        """Yield the sample at a place of a group's stream, then those to take if it cannot be read: all of the group, once."""
        turn, rank = divmod(place, len(self.groups[group]))
        shuffled = self._pass(group, turn)
        return (int(shuffled[(rank + further) % len(shuffled)]) for further in range(len(shuffled)))

    def _spread(self, turn: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the groups of a round's batches, and each batch's rank among those of its group."""
        random = np.random.default_rng(seed_of(self.seed, "round", turn))
        groups = np.repeat(np.arange(len(self.groups)), [len(group) for group in self.groups])
        ranks = np.concatenate([np.arange(len(group)) for group in self.groups])
        counts = np.array([len(group) for group in self.groups])[groups]
        order = np.argsort((ranks + random.random(len(ranks))) / counts, kind="stable")
        return groups[order], ranks[order]

    def _shuffled(self, group: int, turn: int) -> np.ndarray:
        return np.random.default_rng(seed_of(self.seed, "pass", group, turn)).permutation(self.groups[group])
