"""A fixed number of labelled images in every training batch, however many images have no label."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import torch

from hf_kdtl.data.indexed import RowPass


def labelled_per_batch(share: float, batch_size: int) -> int:
    """The number of labelled images in a batch: the share, rounded, and at least one image of each kind.

    >>> [labelled_per_batch(share, 32) for share in (0.25, 0.001, 0.999)]
    [8, 1, 31]

    Raises:
        ValueError: for a share outside (0, 1), or batches of one image.
    """
    if not 0 < share < 1:
        raise ValueError(f"labelled_share is {share}, expected a share between 0 and 1, such as 0.25.")
    if batch_size < 2:
        raise ValueError("labelled_share needs batches of 2 images or more; set --per_device_train_batch_size.")
    return min(max(1, round(share * batch_size)), batch_size - 1)


class LabelledShareSampler(torch.utils.data.Sampler[int]):
    """Rows of a dataset in an order in which every batch has the same number of labelled images, each with the number
    of times that it was drawn before, in all epochs (`RowPass`).

    An epoch ends when every image has been drawn at least once. Of the kind with fewer batches' worth of images, the
    images recur: all of them in a new random order, then again. Every batch is full, also the last of an epoch.

    The order depends on seed and epoch alone: a resumed run continues it, and every process has the same one, of
    which accelerate hands each complete batches.

    Args:
        labelled: (n,) whether each row has a label.
        batch_size: of one process.
        share: of the labelled images in a batch, see `labelled_per_batch`.
        seed, epoch: of the order; `epoch` is called when an epoch begins.

    Raises:
        ValueError: where all images are labelled, or none.
    """

    def __init__(self, labelled: np.ndarray, batch_size: int, share: float, seed: int, epoch: Callable[[], int]):
        self.rows = np.flatnonzero(labelled), np.flatnonzero(~labelled)
        if not all(map(len, self.rows)):
            raise ValueError(
                f"labelled_share needs images with and without labels; found {len(self.rows[0])} with and "
                f"{len(self.rows[1])} without."
            )
        number = labelled_per_batch(share, batch_size)
        self.per_batch = number, batch_size - number
        self.seed, self.epoch = seed, epoch
        self._counted = 0, np.zeros(len(labelled), np.int64)
        self.batches = max(-(-len(rows) // count) for rows, count in zip(self.rows, self.per_batch, strict=True))

    def __len__(self) -> int:
        return self.batches * sum(self.per_batch)

    def __iter__(self) -> Iterator[int]:
        epoch = self.epoch()
        order, passes = self._order(epoch), self._passes_before(epoch).copy()
        for row in order.tolist():
            yield RowPass(row, passes[row])
            passes[row] += 1

    def _passes_before(self, epoch: int) -> np.ndarray:
        """How often each row is drawn in the epochs before this one."""
        counted, passes = self._counted
        if counted > epoch:
            counted, passes = 0, np.zeros_like(passes)
        for earlier in range(counted, epoch):
            passes = passes + np.bincount(self._order(earlier), minlength=len(passes))
        self._counted = epoch, passes
        return passes

    def _order(self, epoch: int) -> np.ndarray:
        draw = np.random.default_rng([self.seed, epoch])
        kinds = [
            self._recurring(rows, count, draw).reshape(self.batches, count)
            for rows, count in zip(self.rows, self.per_batch, strict=True)
        ]
        return np.concatenate(kinds, axis=1).ravel()

    def _recurring(self, rows: np.ndarray, per_batch: int, draw: np.random.Generator) -> np.ndarray:
        wanted = self.batches * per_batch
        return np.concatenate([draw.permutation(rows) for _ in range(-(-wanted // len(rows)))])[:wanted]
