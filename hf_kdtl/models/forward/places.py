"""Where a model's tokens stand: the grid of its patches, and what comes before them."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def halves_changed(image: Tensor) -> Tensor:
    """(5, C, h, w): the image (1, C, h, w), and it with noise added to its top, bottom, left and right half."""
    noise = torch.randn(image.shape, generator=torch.Generator().manual_seed(0)).to(image)
    rows, columns = image.shape[-2] // 2, image.shape[-1] // 2
    where = image.new_zeros(5, 1, *image.shape[-2:])
    where[1, :, :rows] = where[2, :, -rows:] = where[3, :, :, :columns] = where[4, :, :, -columns:] = 1
    return image + where * noise


def row_by_row(hidden: Tensor, image: tuple[int, int], roles: tuple[str, ...]) -> bool:
    """Whether the patches' tokens stand on their grid row by row; `hidden` is of the images of `halves_changed`.

    A ratio that does not depend on how strongly each token answers: about 1 for tokens in another order or of no
    place, in the hundreds or infinite for those in order.
    """
    if hidden.ndim == 4:
        return True
    prefix, grid = places(hidden.shape[1], image, roles)
    if grid is None:
        return False
    change = (hidden[1:] - hidden[:1]).float().norm(dim=-1)[:, len(prefix) :].unflatten(1, grid)
    for first, last in ((change[0], change[1]), (change[2].T, change[3].T)):
        if half := len(first) // 2:
            own = first[:half].mean() * last[-half:].mean()
            other = first[-half:].mean() * last[:half].mean()
            if own < 2 * other:
                return False
    return True


def prefix_roles(model: nn.Module) -> tuple[str, ...]:
    """Roles of the special tokens, in the order they are put before the patches: class, distillation, registers."""
    roles: list[str] = []
    shapes = {name.split(".")[-1]: tuple(p.shape) for name, p in model.named_parameters()}
    for role, words in (("class", ("cls_token", "class_embedding")), ("distillation", ("distillation_token",))):
        roles += [role for word in words if word in shapes]
    roles += ["register"] * shapes.get("register_tokens", (1, 0, 1))[1]
    return tuple(roles)


def places(
    tokens: int, image: tuple[int, int], roles: tuple[str, ...]
) -> tuple[tuple[str, ...], tuple[int, int] | None]:
    """Which of that many tokens come before the patches, and the patches' grid."""
    # A stage before the class token joins (PVT, CvT) has none.
    prefix = next((p for p in (roles, ()) if grid_of(tokens - len(p), image)), ())
    return prefix, grid_of(tokens - len(prefix), image)


def grid_of(patches: int, image: tuple[int, int]) -> tuple[int, int] | None:
    """The grid of that many patches with the image's aspect ratio, None if there is none."""
    if patches < 1:
        return None
    rows = round((patches * image[0] / image[1]) ** 0.5)
    if rows and patches % rows == 0 and abs(rows / (patches // rows) - image[0] / image[1]) < 0.26:
        return rows, patches // rows
    return None
