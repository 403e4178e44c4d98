"""Selects the images to hold out for validation, and the images of a smaller run.

Both selections depend only on the names of the images, their classes and the seed: each class's images are sorted by a
hash of their names, and the first are selected. An added or removed image moves the others of its class by one place
at most, so it changes a split by few images.
"""

import hashlib
import os
import unicodedata
from typing import Any, List, Optional, Tuple

import numpy as np

from beit.errors import UserError

VALIDATION, SUBSAMPLE = 1, 2  # they make the two draws of a seed independent
NAMES_AT_ONCE = 1 << 14  # in memory as Python objects


def class_counts(samples: Any, classes: int) -> np.ndarray:
    """int64 (classes,): the number of images of each."""
    labels = np.concatenate([samples.labels_of(index) for index in range(len(samples))]) \
        if samples.multi_label else samples.targets
    return np.bincount(labels, minlength=classes)


# ---- names

def portable_names(samples: Any, start: int, stop: int) -> List[bytes]:
    """The names of the images [start:stop], in UTF-8, the same on every machine with the same data.

    They are relative to the folder of the data set, in Unicode's NFC form, with / between folders.
    """
    root = os.path.abspath(os.fsencode(samples.root))
    return [_portable(name, root) for name in samples.relative_names(start, stop)]


def _portable(name, root):
    if name[:1] == b'/' or b'./' in name or b'//' in name:  # only CSV files have such names
        path = os.path.normpath(os.path.join(root, name))
        inside = path.startswith(os.path.join(root, b''))
        name = path[len(os.path.join(root, b'')):] if inside else path if name[:1] == b'/' else os.path.relpath(
            path, root)
    return name if name.isascii() else portable_text(name.decode('utf-8', 'surrogateescape'))


def portable_text(text: str) -> bytes:
    """UTF-8 of the text's NFC form; bytes that aren't text stay unchanged."""
    return unicodedata.normalize('NFC', text).encode('utf-8', 'surrogateescape')


def name_keys(samples: Any, skip: int = 0) -> np.ndarray:
    """uint64 (images,): a hash of each image's portable name from byte `skip` on. It takes 1.3 s for 1.3 M images."""
    keys = np.empty(len(samples), dtype=np.uint64)
    for start in range(0, len(samples), NAMES_AT_ONCE):
        names = portable_names(samples, start, start + NAMES_AT_ONCE)
        keys[start:start + len(names)] = hash_names([name[skip:] for name in names])
    return keys


def hash_names(names: List[bytes]) -> np.ndarray:
    """uint64 (names,): 8 bytes of each name's BLAKE2b, as a little-endian number."""
    return np.frombuffer(b''.join([hashlib.blake2b(name, digest_size=8).digest() for name in names]), dtype='<u8')


def mix_bits(values: np.ndarray) -> np.ndarray:
    """uint64: the finaliser of SplitMix64 (Steele, Lea and Flood 2014), a bijection."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xbf58476d1ce4e5b9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94d049bb133111eb)
    return values ^ (values >> np.uint64(31))


def _hash_order(keys, seed, purpose):
    """The indices of all images, sorted by their names' hashes under this seed."""
    salt = np.random.SeedSequence([seed, 0, purpose]).generate_state(1, np.uint64)
    return np.argsort(mix_bits(keys ^ salt), kind='stable')


# ---- subsets

def split(samples: Any, share: float, seed: int, keys: Optional[np.ndarray] = None) -> Tuple[np.ndarray, np.ndarray]:
    """(indices of the training images, of the validation images), each in order.

    Stratified: every class gives its share, rounded to a total of `share` of all images. Each keeps at least one image
    for training and, if the share is large enough, gives at least one. With several classes per image, images are
    drawn at random; the last training image of a class is never drawn. Raises a `UserError` if no image is left for
    validation. `keys` are the `name_keys` of the samples.
    """
    order = _hash_order(name_keys(samples) if keys is None else keys, seed, VALIDATION)
    wanted = max(1, int(round(share * len(samples))))
    if samples.multi_label:
        chosen = _without_loss_of_a_class(samples, wanted, order)
    else:
        chosen = _from_each_class(samples.targets, wanted, order, np.random.default_rng([seed, 0, VALIDATION]), kept=1)
    if not len(chosen):
        raise UserError('--val_split %g: each class has one image only, which training needs; add images, or give '
                        '--eval_data_path' % share)
    held_out = np.zeros(len(samples), dtype=bool)
    held_out[chosen] = True
    return np.flatnonzero(~held_out), np.flatnonzero(held_out)


def split_as_recorded(keys: np.ndarray, held_out: np.ndarray, share: float) -> Tuple[np.ndarray, np.ndarray]:
    """(indices of the training images, of the validation images), as in a checkpoint's run.

    New images go to training, so no training image is ever evaluated. `keys` are the `name_keys` of all images,
    `held_out` the keys of the images that the run held out: a `UserError` if these are all or none.
    """
    chosen = np.isin(keys, held_out)
    if not chosen.any() or chosen.all():
        raise UserError('--val_split %g: the checkpoint held out %d images: %s; its data or their names were others: '
                        'start from its weights with --finetune, or name images to evaluate with --eval_data_path or '
                        '--val_csv' % (share, len(held_out), 'none is among these %d' % len(keys)
                                       if not chosen.any() else 'the data has no others'))
    return np.flatnonzero(~chosen), np.flatnonzero(chosen)


def subsample(samples: Any, most: int, seed: int) -> np.ndarray:
    """The indices of `most` images, in order, stratified; every class is present if `most` allows it."""
    if most >= len(samples):
        return np.arange(len(samples))
    order = _hash_order(name_keys(samples), seed, SUBSAMPLE)
    if samples.multi_label:
        return np.sort(order[:most])
    return np.sort(_from_each_class(samples.targets, most, order, np.random.default_rng([seed, 0, SUBSAMPLE])))


def _from_each_class(targets, wanted, order, rng, kept=0):
    """`wanted` images, the first of each class in this order: at most all but `kept`, and at least one if possible."""
    counts = np.bincount(targets)
    most = np.maximum(counts - kept, 0)
    least = np.minimum(most, 1) if wanted >= np.count_nonzero(most) else np.zeros_like(most)
    by_class = np.split(order[np.argsort(targets[order], kind='stable')], np.cumsum(counts)[:-1])
    taken = _in_proportion(counts, wanted, least, most, rng)
    return np.concatenate([indices[:number] for indices, number in zip(by_class, taken)])


def _in_proportion(counts, wanted, least, most, rng):
    """int64 (classes,): the number to take of each, between least and most; the largest remainders are rounded up."""
    exact = counts * (wanted / max(counts.sum(), 1))
    taken = np.clip(np.floor(exact + 1e-9).astype(np.int64), least, most)
    while taken.sum() != wanted:
        step = 1 if taken.sum() < wanted else -1
        order = rng.permutation(len(counts))  # a random order for equal remainders
        order = order[(taken < most)[order] if step > 0 else (taken > least)[order]]
        if not len(order):
            break
        order = order[np.argsort(step * (taken - exact)[order], kind='stable')]
        taken[order[:abs(wanted - taken.sum())]] += step
    return taken


def _without_loss_of_a_class(samples, wanted, order):
    left, chosen = class_counts(samples, samples.classes), []
    for index in order.tolist():
        labels = samples.labels_of(index)
        if len(chosen) < wanted and (left[labels] > 1).all():
            left[labels] -= 1
            chosen.append(index)
    return np.array(chosen, dtype=np.int64)
