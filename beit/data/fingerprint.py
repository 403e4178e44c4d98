"""What identifies the images of a run: their number, names, labels, the sizes and the first bytes of some of the files.

A checkpoint holds the fingerprints of its run's data (`beit.checkpoint.comparison` compares them). They are the same on
every machine and in every process that has the same data, wherever that lies: names are relative to the folder of the
set, see `subsets.portable_names`.

A fingerprint must not take long, so not every file is looked at: 1.3 M sizes take 3 s on a local disk, and minutes on
a network's. `SIZES` files are asked for their size, and `CONTENTS` of these are read, chosen by the hashes of their
names. Where one file in a hundred was replaced by one of another size, the chance to miss that is 2e-9.
"""

import collections
import hashlib
import json
import os
from typing import Any, Callable, Dict, List, Optional, Sequence, Set, Tuple

import numpy as np
import torch

from beit.data import subsets
from beit.data.image_dataset import label_source
from beit.distributed import collectives
from beit.files.regular_file import open_file
from beit.log import log_main

SIZES, CONTENTS = 2000, 64  # files of a set whose size is asked for, and whose first bytes are read
FIRST_BYTES = 1 << 16
CANDIDATES = 10000  # files that `count_known` looks at, at most

Row = Tuple[str, str, int, str]  # of a sample: hashes of the name and of its last part, bytes, hash of the first ones


def of_data(train: Any, val: Any, classes: Sequence[str], device: Optional[torch.device] = None) -> Dict[str, Any]:
    """{'train': the fingerprint of the training set or None, 'val': that of the validation set}: plain values.

    Args:
        train, val: data sets, or None.
        classes: the names of the classes.
        device: of this process, where all of a job call this; then the first one looks at the files.
    """
    def make(keep_alive):
        return json.dumps({name: None if part is None else of_set(part, classes, keep_alive)
                           for name, part in (('train', train), ('val', val))}).encode()

    return json.loads(collectives.broadcast_from_main(make, device).decode())


def of_set(dataset: Any, classes: Sequence[str], keep_alive: Callable[[], None] = lambda: None) -> Dict[str, Any]:
    """The fingerprint of a data set.

    Returns:
        images (int): how many there are.
        names (str): a hash of the images' names, in whatever order; order (str): of the same names in their order.
        labels (str): of the pairs of name and label; labels count by their class's name.
        sizes (str): of the sizes of `SIZES` files, or of all.
        sample (list of `Row`): of `CONTENTS` files, or of all.
    """
    samples = label_source(dataset)
    keys = subsets.name_keys(samples)
    keep_alive()
    chosen = np.argsort(keys, kind='stable')[:SIZES]
    sizes = []
    for index in chosen.tolist():
        sizes.append(_size(dataset, index))
        keep_alive()
    return {'images': len(keys), 'names': _hash(np.sort(keys)), 'order': _hash(keys),
            'labels': _hash(np.sort(subsets.mix_bits(keys) + _label_keys(samples, classes))),
            'sizes': _hash(keys[chosen], np.array(sizes, dtype=np.int64)),
            'sample': [_row(dataset, index, keys[index], size, keep_alive)
                       for index, size in zip(chosen.tolist()[:CONTENTS], sizes)]}


def _hash(*arrays):
    """SHA-256, 32 digits of it, of arrays of numbers as little-endian bytes."""
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(array.astype(array.dtype.newbyteorder('<')).tobytes())
    return digest.hexdigest()[:32]


def _label_keys(samples, classes):
    """uint64 (images,): the hash of each image's class name, or the sum of those of its classes."""
    of_class = subsets.hash_names([subsets.portable_text(name) for name in classes])
    if not subsets.is_multi_label(samples):
        return of_class[np.asarray(samples.targets, dtype=np.int64)]
    return np.array([of_class[samples.labels_of(index)].sum(dtype=np.uint64) for index in range(len(samples))],
                    dtype=np.uint64)


# ---- files

def _array(dataset, index):
    """The pixels of an image that has no file of its own (CIFAR), or None."""
    if hasattr(dataset, 'indices'):  # torch's Subset
        return _array(dataset.dataset, dataset.indices[index])
    return None if hasattr(dataset, 'samples') else np.ascontiguousarray(dataset.data[index])


def _size(dataset, index):
    """Bytes; -1 where the file isn't there."""
    pixels = _array(dataset, index)
    try:
        return pixels.nbytes if pixels is not None else os.stat(dataset.samples[index][0]).st_size
    except (OSError, ValueError):
        return -1


def _digest(dataset, index):
    """A hash of an image's first bytes; '' where it can't be read."""
    pixels = _array(dataset, index)
    try:
        if pixels is not None:
            data = pixels.tobytes()
        else:
            with open_file(dataset.samples[index][0]) as file:
                data = file.read(FIRST_BYTES)
    except (OSError, ValueError):
        return ''
    return hashlib.blake2b(data, digest_size=8).hexdigest()


def _row(dataset, index, key, size, keep_alive):
    keep_alive()
    name, = subsets.portable_names(label_source(dataset), index, index + 1)
    return ['%016x' % key, '%016x' % _tail_keys([name])[0], size, _digest(dataset, index)]


def _tail_keys(names):
    return subsets.hash_names([name.rpartition(b'/')[2] for name in names])


# ---- what two sets have in common

def count_known(dataset: Any, sample: Sequence[Row]) -> int:
    """How many images of another set's sample are in this one: files of the same last name, size and first bytes.

    The folders may be others, as where one set was given by folders and the other by a CSV file.
    """
    rows: Dict[int, List[Row]] = {}
    for row in sample:
        rows.setdefault(int(row[1], 16), []).append(row)
    samples, tails = label_source(dataset), np.array(sorted(rows), dtype=np.uint64)
    found: Set[str] = set()
    looked_at = 0
    for start in range(0, len(samples), subsets.NAMES_AT_ONCE):
        names = subsets.portable_names(samples, start, min(start + subsets.NAMES_AT_ONCE, len(samples)))
        keys = _tail_keys(names)
        for index in np.flatnonzero(np.isin(keys, tails)).tolist():
            looked_at += 1
            if looked_at > CANDIDATES:
                return len(found)
            size, digest = _size(dataset, start + index), None
            for row in rows[int(keys[index])]:
                if row[2] == size >= 0 and row[0] not in found:
                    digest = _digest(dataset, start + index) if digest is None else digest
                    if digest and digest == row[3]:
                        found.add(row[0])
    return len(found)


def count_shared_files(train: Any, val: Any) -> int:
    """How many validation images are training images, too: the same files, by their real paths.

    Links to folders are followed; links to files where the first image of their folder is one.
    """
    if not (hasattr(train, 'samples') and hasattr(val, 'samples')):
        return 0
    folders = [_folders(part.samples) for part in (train, val)]
    real = [{path for path, _ in part.values()} for part in folders]
    linked = any(has_links for part in folders for _, has_links in part.values())
    if not linked and (not real[0] & real[1] or _is_one_list(train.samples, val.samples, *folders)):
        return 0
    evaluated = collections.Counter(_real_paths(val.samples, folders[1], None if linked else real[0]))
    trained = {path for path in _real_paths(train.samples, folders[0], None if linked else real[1])
               if path in evaluated}
    return sum(evaluated[path] for path in trained)


def report_shared_files(train: Any, val: Any) -> None:
    """Say how many images are evaluated although they are trained on, if there are any."""
    shared = count_shared_files(train, val) if train is not None and val is not None else 0
    if shared:
        log_main('The same files: %d of the %d validation images are training images, too; the figures are too good '
                 'for new images' % (shared, len(val)))


def _names(samples):
    """(folder, name in it) of every image, bytes; the folder is as it was given, relative or not."""
    for start in range(0, len(samples), subsets.NAMES_AT_ONCE):
        for path in samples.relative_names(start, min(start + subsets.NAMES_AT_ONCE, len(samples))):
            folder, _, name = path.rpartition(b'/')
            yield folder, name


def _folders(samples):
    """{folder: (its real path, whether its first image is a link)} of all images."""
    root, found = os.fsencode(samples.root), {}
    for folder, name in _names(samples):
        if folder not in found:
            path = os.path.join(root, folder)
            found[folder] = os.path.realpath(path), os.path.islink(os.path.join(path, name))
    return found


def _is_one_list(train, val, *folders):
    """Whether both are parts of one list in which no folder stands twice: then no file does."""
    if getattr(train, 'samples', train) is not getattr(val, 'samples', val):
        return False
    real = {folder: path for part in folders for folder, (path, _) in part.items()}
    return len(set(real.values())) == len(real)


def _real_paths(samples, folders, wanted):
    """The real path of every image whose folder's real path is in `wanted` (None: of all)."""
    for folder, name in _names(samples):
        real, linked = folders[folder]
        if wanted is None or real in wanted:
            path = real + b'/' + name
            yield os.path.realpath(path) if linked else path
