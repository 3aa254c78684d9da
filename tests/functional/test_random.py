"""Draws belong to an image: independent between images, steps, seeds and purposes, whatever the split."""

import torch

from hf_kdtl.functional.random import Draws, select_images

LIKE = torch.zeros(())


def first_numbers(draws, purpose="a"):
    return draws.normal((1,), purpose, LIKE)[:, 0]


def test_no_two_images_share_a_direction():
    every = [first_numbers(Draws(seed, step, tuple(range(1024)))) for seed in (0, 1) for step in (0, 1)]
    every.append(first_numbers(Draws(0, 0, tuple(range(1024))), "b"))
    numbers = torch.cat(every)
    assert len(numbers.unique()) >= len(numbers) - 2  # float32 has room for an accident, not for more
    assert abs(numbers.mean()) < 4 / len(numbers) ** 0.5 and abs(numbers.std() - 1) < 0.05


def test_neighbours_are_not_correlated():
    a = Draws(3, 7, tuple(range(4096))).uniform((), "fraction", LIKE)
    assert abs(torch.corrcoef(torch.stack([a[:-1], a[1:]]))[0, 1]) < 4 / 64
    assert abs(select_images(Draws(3, 7, tuple(range(4096))), 0.25, LIKE).float().mean() - 0.25) < 4 * 0.433 / 64


def test_the_split_changes_nothing():
    full = Draws(1, 2, (0, 1, 2, 3)).rademacher((2, 3), "p", LIKE)
    parts = [Draws(1, 2, positions).rademacher((2, 3), "p", LIKE) for positions in ((0, 1), (2, 3))]
    assert torch.equal(full, torch.cat(parts)) and set(full.flatten().tolist()) == {-1.0, 1.0}


def test_an_image_takes_part_below_the_fraction_or_when_all_do(monkeypatch):
    monkeypatch.setattr(Draws, "uniform", lambda self, shape, purpose, like: torch.tensor([0.0, 0.25, 0.5]))
    some, every = Draws(0, 0, (0, 1, 2)), Draws(0, 0, (0, 1, 2), include_all=True)
    assert select_images(some, 0.25, LIKE).tolist() == [True, False, False]
    assert select_images(some, 0.0, LIKE).tolist() == [False, False, False]
    assert select_images(every, 0.25, LIKE).tolist() == [True, True, True]
    assert every.permuted(torch.tensor([2, 0, 1])).include_all
