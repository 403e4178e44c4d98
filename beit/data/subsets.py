"""Which images of a training set are held out for validation, and which ones a smaller run uses.

Both depend only on the sorted list of images and the seed.
"""

import collections
from typing import Any, Tuple

import numpy as np

from beit.errors import UserError

VALIDATION, SUBSAMPLE = 1, 2  # beside the seed, so that the two draws are independent


def is_multi_label(samples: Any) -> bool:
    """Whether an image may be of several classes, or none."""
    return getattr(samples, 'multi_label', False)


def class_counts(samples: Any, classes: int) -> np.ndarray:
    """int64 (classes,): how many images are of each."""
    if is_multi_label(samples):
        counts = np.zeros(classes, dtype=np.int64)
        for index in range(len(samples)):
            counts[samples.labels_of(index)] += 1
        return counts
    return np.bincount(np.asarray(samples.targets), minlength=classes)


def split(samples: Any, share: float, seed: int) -> Tuple[np.ndarray, np.ndarray]:
    """(indices of the training images, of the validation images), each in order.

    Stratified: every class gives its share, rounded so that all together give `share` of all. Each keeps at least one
    image for training. Where an image may be of several classes, they are drawn at random, but for those without which
    a class would have none left.

    Raises:
        UserError: so no image is left for validation.
    """
    rng = np.random.default_rng([seed, 0, VALIDATION])
    wanted = max(1, int(round(share * len(samples))))
    if is_multi_label(samples):
        chosen = _without_loss_of_a_class(samples, wanted, rng)
    else:
        counts = np.bincount(samples.targets)
        chosen = _from_each(samples.targets, _in_proportion(counts, wanted, 0, np.maximum(counts - 1, 0), rng), rng)
    if not len(chosen):
        raise UserError('--val_split %g: each class has one image only, and needs it for training; add images, or give '
                        '--eval_data_path' % share)
    held_out = np.zeros(len(samples), dtype=bool)
    held_out[chosen] = True
    return np.flatnonzero(~held_out), np.flatnonzero(held_out)


def subsample(samples: Any, most: int, seed: int) -> np.ndarray:
    """The indices of `most` images, in order, each class in proportion and, if possible, present."""
    rng = np.random.default_rng([seed, 0, SUBSAMPLE])
    if most >= len(samples):
        return np.arange(len(samples))
    if is_multi_label(samples):
        return np.sort(rng.permutation(len(samples))[:most])
    targets = np.asarray(samples.targets)
    counts = np.bincount(targets)
    least = (counts > 0).astype(np.int64) if most >= np.count_nonzero(counts) else np.zeros_like(counts)
    return np.sort(_from_each(targets, _in_proportion(counts, most, least, counts, rng), rng))


def _in_proportion(counts, wanted, least, most, rng):
    """int64 (classes,): how many to take of each, from least to most; the largest remainders are rounded up."""
    rest = counts - least
    exact = least + rest * ((wanted - np.sum(least)) / max(rest.sum(), 1))
    taken = np.minimum(np.floor(exact + 1e-9).astype(np.int64), most)
    while taken.sum() < wanted and (taken < most).any():
        order = rng.permutation(len(counts))  # equal remainders: chance decides
        order = order[taken[order] < most[order]]
        order = order[np.argsort((taken - exact)[order], kind='stable')]
        taken[order[:wanted - taken.sum()]] += 1
    return taken


def _from_each(targets, taken, rng):
    by_class = np.split(np.argsort(targets, kind='stable'), np.cumsum(np.bincount(targets))[:-1])
    return np.concatenate([rng.permutation(indices)[:number] for indices, number in zip(by_class, taken)])


def _without_loss_of_a_class(samples, wanted, rng):
    left, chosen = collections.Counter(), []
    for index in range(len(samples)):
        left.update(samples.labels_of(index).tolist())
    for index in rng.permutation(len(samples)).tolist():
        labels = samples.labels_of(index).tolist()
        if len(chosen) < wanted and all(left[label] > 1 for label in labels):
            left.subtract(labels)
            chosen.append(index)
    return np.array(chosen, dtype=np.int64)
