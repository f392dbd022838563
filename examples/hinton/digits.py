"""Images of digits, split at random; each seed is a split of its own.

Legend: S seeds, N training images, K test images, D = 64 pixels.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

SIDE = 8  # pixels
TEST_IMAGES = 600
TRAINING_IMAGES = 1797 - TEST_IMAGES


@dataclass(frozen=True, eq=False)  # compared by identity, so that what was trained on it can be kept under it
class Splits:
    """Hold S random splits of the same images.

    Attributes:
        images (Tensor): ``[S, N, D]``, from 0 to 1, to train on.
        labels (Tensor): ``[S, N]``.
        test_images (Tensor): ``[S, K, D]``.
        test_labels (Tensor): ``[S, K]``.
    """

    images: Tensor
    labels: Tensor
    test_images: Tensor
    test_labels: Tensor


def load_splits(seeds: int) -> Splits:
    """Split scikit-learn's digits into 1,197 training and 600 test images, once for each seed."""
    from sklearn.datasets import load_digits

    pixels, digits = load_digits(return_X_y=True)
    images, labels = torch.tensor(pixels, dtype=torch.float32) / 16, torch.tensor(digits)
    orders = torch.stack(
        [torch.randperm(len(labels), generator=torch.Generator().manual_seed(s)) for s in range(seeds)]
    )
    test, training = orders[:, :TEST_IMAGES], orders[:, TEST_IMAGES:]
    return Splits(images[training], labels[training], images[test], labels[test])


def in_four_rotations(splits: Splits, seeds: int) -> Splits:
    """Turn every image by 0, 90, 180 and 270 degrees: 40 classes, many of them alike, of the first ``seeds`` splits.

    An image and its turned copies are all in the training set or all in the test set.
    """

    def turned(images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        squares = images[:seeds].unflatten(-1, (SIDE, SIDE))
        copies = [squares.rot90(quarter, (-2, -1)).flatten(-2) for quarter in range(4)]
        return torch.cat(copies, 1), torch.cat([labels[:seeds] + 10 * quarter for quarter in range(4)], 1)

    return Splits(*turned(splits.images, splits.labels), *turned(splits.test_images, splits.test_labels))


def _shift_table() -> Tensor:
    """Return the pixel that moves to each place, ``[9, D]``, for the nine shifts by up to one pixel.

    Place D stands for the blank outside of the image.
    """
    framed = torch.nn.functional.pad(torch.arange(SIDE * SIDE).view(SIDE, SIDE), (1, 1, 1, 1), value=SIDE * SIDE)
    return torch.stack([framed[y : y + SIDE, x : x + SIDE].flatten() for y in range(3) for x in range(3)])


SHIFTS = _shift_table()


def shift_at_random(images: Tensor) -> Tensor:
    """Shift each image of ``[..., D]`` by -1, 0 or 1 pixel in both directions, as the paper does by up to two."""
    moves = SHIFTS[torch.randint(len(SHIFTS), images.shape[:-1])]
    return torch.nn.functional.pad(images, (0, 1)).gather(-1, moves)
