"""Centred kernel alignment: how alike two models' features are, block by block, whatever their widths."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

FEWEST = 4  # images of a batch: the estimator divides by n - 3


class CKA:
    """Linear CKA of every block of a teacher with every block of a student, from one batch after the other.

    CKA = sum_b n_b HSIC_b(K, L) / sqrt(sum_b n_b HSIC_b(K, K) sum_b n_b HSIC_b(L, L)), with K = X X' and L = Y Y' the
    Gram matrices of a batch of n_b images and HSIC the unbiased estimator (a U-statistic)

        HSIC(K, L) = [tr(K L) + (1'K 1)(1'L 1) / ((n - 1)(n - 2)) - 2 / (n - 2) 1'K L 1] / (n (n - 3)),

    K and L with zero diagonals. In [-1, 1]: 1 for features that are the same up to rotation, one factor and a shift,
    0 on average for unrelated ones (so about half of those are a little negative). The unbiased estimator, because
    the biased one grows towards 1 as batches get smaller than the features are wide. A mean over batches of equal size
    in the source; here batches count by their images.

    A block whose feature is the same for all images has no CKA: nan.

    Cost: O(n^2 (D + L_S L_T)) a batch, and (L_S + L_T) n^2 float64 for the time of a batch.

    Source: Nguyen, Raghu, Kornblith 2021, arXiv 2010.15327 [review]; the estimator is that of Song et al. 2012,
    JMLR 13 [review]; the weights by images are [ours].
    """

    def __init__(self):
        self.images = 0
        self._cross: Tensor | float = 0.0
        self._student: Tensor | float = 0.0
        self._teacher: Tensor | float = 0.0

    def update(self, student: Sequence[Tensor], teacher: Sequence[Tensor]) -> None:
        """Add a batch.

        Args:
            student, teacher: (n, D) a block, of the same n >= 4 images in the same order. D may differ.

        Raises:
            ValueError: for fewer than 4 images, or different numbers of them.
        """
        numbers = {len(features) for features in (*student, *teacher)}
        if len(numbers) > 1 or min(numbers) < FEWEST:
            raise ValueError(
                f"a batch of {' and '.join(map(str, sorted(numbers)))} images; expected the same {FEWEST} or more in "
                "every block: unbiased CKA divides by n - 3. Use a larger batch, and leave a smaller last one out."
            )
        (n,) = numbers
        s, t = (torch.stack([centered_gram(x).flatten() for x in features]) for features in (student, teacher))
        weight = 1 / (n - 3)  # n times 1 / (n (n - 3))
        self.images += n
        self._cross = self._cross + weight * t @ s.T
        self._student = self._student + weight * s.square().sum(1)
        self._teacher = self._teacher + weight * t.square().sum(1)

    def value(self) -> Tensor:
        """(L_T, L_S) float64. Raises ValueError when nothing was added."""
        if not self.images:
            raise ValueError(f"no batch was added; expected at least one of {FEWEST} images or more.")
        assert isinstance(self._cross, Tensor) and isinstance(self._student, Tensor)
        assert isinstance(self._teacher, Tensor)
        # The roots apart: the product of two small numbers would underflow first.
        found = self._cross / self._teacher.sqrt()[:, None] / self._student.sqrt()
        return found.clamp(-1, 1)  # leaves nan


def centered_gram(features: Tensor) -> Tensor:
    """X X' with zero diagonal, U-centred: every row and column sums to 0. (n, D) -> (n, n) float64, n >= 3.

    K_ij - sum_k K_ik / (n - 2) - sum_k K_kj / (n - 2) + sum_kl K_kl / ((n - 1)(n - 2)). The sum of the products of two
    such matrices is n (n - 3) times the unbiased HSIC. A shift of all features does not change it.

    >>> centered_gram(torch.tensor([[0.0], [1.0], [0.0], [1.0]]))
    tensor([[ 0.0000, -0.1667,  0.3333, -0.1667],
            [-0.1667,  0.0000, -0.1667,  0.3333],
            [ 0.3333, -0.1667,  0.0000, -0.1667],
            [-0.1667,  0.3333, -0.1667,  0.0000]], dtype=torch.float64)
    """
    x = features.double()
    x = x - x[:1]  # first, so that a large mean costs no digits and equal features are exactly 0
    gram = (x @ x.T).fill_diagonal_(0)
    n, rows = len(gram), gram.sum(1)
    centred = gram - (rows[:, None] + rows) / (n - 2) + rows.sum() / ((n - 1) * (n - 2))
    return centred.fill_diagonal_(0)
