"""Which images of a training set are put aside for validation, and which a smaller run takes.

Both follow from the sorted list of images and the seed alone: not from epochs, processes or workers.
"""

import collections.abc

import numpy as np

from errors import UserError

VALIDATION, FEWER = 1, 2  # numbers of their own beside the seed: the two draws have nothing in common


class Chosen(collections.abc.Sequence):
    """Some of a data set's samples, in order. What it doesn't know itself it asks of them.

    Args:
        samples: `class_folders.ImageList` or `manifests.Manifest`.
        places (array of int): into `samples`.
    """

    def __init__(self, samples, places):
        self.samples, self.places = samples, np.asarray(places, dtype=np.int64)

    def __len__(self):
        return len(self.places)

    def __getitem__(self, index):
        if isinstance(index, slice):
            return [self.samples[int(place)] for place in self.places[index]]
        return self.samples[int(self.places[index])]

    @property
    def targets(self):
        return self.samples.targets[self.places]

    def labels_of(self, index):
        return self.samples.labels_of(int(self.places[index]))

    @property
    def multi_label(self):
        return is_multi_label(self.samples)


def is_multi_label(samples):
    """Whether an image may be of several classes, or none."""
    return getattr(samples, 'multi_label', False)


def class_counts(samples, classes):
    """int64 (classes,): how many images are of each."""
    if is_multi_label(samples):
        counts = np.zeros(classes, dtype=np.int64)
        for index in range(len(samples)):
            counts[samples.labels_of(index)] += 1
        return counts
    return np.bincount(np.asarray(samples.targets), minlength=classes)


def split(samples, share, seed):
    """(places of the training images, places of the validation images), each in order.

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
    aside = np.zeros(len(samples), dtype=bool)
    aside[chosen] = True
    return np.flatnonzero(~aside), np.flatnonzero(aside)


def fewer(samples, most, seed):
    """The places of `most` images, in order, each class in proportion; of every class one at least, where that goes."""
    rng = np.random.default_rng([seed, 0, FEWER])
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
    return np.concatenate([rng.permutation(places)[:number] for places, number in zip(by_class, taken)])


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
