"""Identifies the images of a set by their number, names, labels, and the sizes and first bytes of some files.

A checkpoint holds the fingerprints of its run's data (`beit.checkpoint.comparison` compares them). They do not depend
on the machine or the path of the data: names are relative to the innermost folder that holds the whole set.

A fingerprint must be fast: 1.3 M file sizes take 3 s on a local disk, and minutes on a network's. So it reads the sizes
of `SIZES` files, and the contents of `CONTENTS` of these, chosen by the hashes of their names. If one file in a hundred
is replaced by one of another size, the chance to miss that is 2e-9.
"""

import collections
import contextlib
import hashlib
import os
from typing import Any, Callable, Dict, List, Optional, Sequence, Set, Tuple

import numpy as np
import torch
from PIL import Image

from beit.data import subsets
from beit.data.decode import has_alpha
from beit.data.image_dataset import ArrayDataset
from beit.distributed import collectives, process_group
from beit.files import archives
from beit.log import log_main

SIZES, CONTENTS = 2000, 64  # files of a set whose sizes and first bytes are read
FIRST_BYTES = 1 << 16
CANDIDATES = 10000  # files that `count_known` reads at most

Row = Tuple[str, str, int, str]  # of a sample: hashes of name and base name, size in bytes, hash of the first bytes


def of_data(train: Any, val: Any, classes: Sequence[str], device: Optional[torch.device] = None) -> Dict[str, Any]:
    """{'train': fingerprint or None, 'val': fingerprint or None}, of plain values.

    If all processes of a job call this with their `device`, only the first one reads the files.
    """
    return collectives.broadcast_from_main(
        lambda keep_alive: {name: None if part is None else of_set(part, classes, keep_alive)
                            for name, part in (('train', train), ('val', val))}, device)


def of_set(dataset: Any, classes: Sequence[str], keep_alive: Callable[[], None]) -> Dict[str, Any]:
    """The fingerprint of a data set.

    Returns:
        images (int): their number.
        names (str): a hash of the images' names, independent of their order; order (str): one that depends on it.
        labels (str): a hash of the pairs of name and class name.
        sizes (str): a hash of the sizes of at most `SIZES` files.
        sample (list of `Row`): of at most `CONTENTS` files.
    """
    samples = dataset.samples
    keys = subsets.name_keys(samples, len(_common_folder(samples)))
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


def _common_folder(samples):
    """The folder, with its slash, in which all portable names lie: a CSV file may list a folder's images from above."""
    starts = range(0, len(samples), subsets.NAMES_AT_ONCE)
    chunks = (subsets.portable_names(samples, start, start + subsets.NAMES_AT_ONCE) for start in starts)
    folder, slash, _ = os.path.commonprefix([os.path.commonprefix(names) for names in chunks]).rpartition(b'/')
    return folder + slash


def _hash(*arrays):
    """32 hex digits of the SHA-256 of numeric arrays as little-endian bytes."""
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(array.astype(array.dtype.newbyteorder('<')).tobytes())
    return digest.hexdigest()[:32]


def _label_keys(samples, classes):
    """uint64 (images,): the hash of each image's class name, or the sum of its classes' hashes."""
    of_class = subsets.hash_names([subsets.portable_text(name) for name in classes])
    if not samples.multi_label:
        return of_class[np.asarray(samples.targets, dtype=np.int64)]
    return np.array([of_class[samples.labels_of(index)].sum(dtype=np.uint64) for index in range(len(samples))],
                    dtype=np.uint64)


# ---- files

def _size(dataset, index):
    """Bytes; -1 if the file is missing."""
    with contextlib.suppress(OSError, ValueError):
        return dataset.size(dataset.samples[index][0])
    return -1


def _digest(dataset, index):
    """A hash of an image's first bytes; '' if the file can't be read."""
    with contextlib.suppress(OSError, ValueError), dataset.open(dataset.samples[index][0]) as file:
        return hashlib.blake2b(file.read(FIRST_BYTES), digest_size=8).hexdigest()
    return ''


def count_transparent(dataset: Any) -> Tuple[int, int]:
    """(images with an alpha channel, images looked at) of `CONTENTS` at equal distances, on the first process."""
    if isinstance(dataset, ArrayDataset) or not process_group.is_main_process():
        return 0, 0
    indices, found = np.unique(np.linspace(0, len(dataset) - 1, CONTENTS).astype(int)).tolist(), 0
    for index in indices:
        with contextlib.suppress(Exception), archives.open_file(dataset.samples[index][0]) as file:  # see `load_image`
            found += has_alpha(Image.open(file))
    return found, len(indices)


def _row(dataset, index, key, size, keep_alive):
    keep_alive()
    name, = subsets.portable_names(dataset.samples, index, index + 1)
    return ['%016x' % key, '%016x' % _tail_keys([name])[0], size, _digest(dataset, index)]


def _tail_keys(names):
    return subsets.hash_names([name.rpartition(b'/')[2] for name in names])


# ---- images in two sets

def count_known(dataset: Any, sample: Sequence[Row]) -> int:
    """The number of images of another set's sample in this one: the same base name, size and first bytes."""
    rows: Dict[int, List[Row]] = {}
    for row in sample:
        rows.setdefault(int(row[1], 16), []).append(row)
    samples, tails = dataset.samples, np.array(sorted(rows), dtype=np.uint64)
    found: Set[str] = set()
    candidates = 0
    for start in range(0, len(samples), subsets.NAMES_AT_ONCE):
        keys = _tail_keys(subsets.portable_names(samples, start, start + subsets.NAMES_AT_ONCE))
        for index in np.flatnonzero(np.isin(keys, tails)).tolist():
            candidates += 1
            if candidates > CANDIDATES:
                return len(found)
            size = _size(dataset, start + index)
            similar = [row for row in rows[int(keys[index])] if row[2] == size >= 0 and row[0] not in found]
            digest = _digest(dataset, start + index) if similar else ''
            found.update(row[0] for row in similar if digest and row[3] == digest)
    return len(found)


def count_shared_files(train: Any, val: Any) -> int:
    """The number of validation images that are training images too: the same files, by their real paths.

    Links to folders are followed; links to files only if the first image of their folder is a link.
    """
    if isinstance(train, ArrayDataset) or isinstance(val, ArrayDataset):
        return 0
    folders = [_folders(part.samples) for part in (train, val)]
    real = [{path for path, _ in part.values()} for part in folders]
    linked = any(has_links for part in folders for _, has_links in part.values())
    wanted = real[0] | real[1] if linked else real[0] & real[1]
    if not wanted:
        return 0
    evaluated = collections.Counter(_real_paths(val.samples, folders[1], wanted))
    trained = {path for path in _real_paths(train.samples, folders[0], wanted) if path in evaluated}
    return sum(evaluated[path] for path in trained)


def report_shared_files(train: Any, val: Any) -> None:
    """Log the number of validation images that are training images too, if any."""
    shared = count_shared_files(train, val) if train is not None and val is not None else 0
    if shared:
        log_main('The same files: %d of the %d validation images are training images, too; the figures will be too '
                 'good' % (shared, len(val)))


def _names(samples):
    """(folder, name in it) of every image, bytes; the folder is relative or absolute, as listed."""
    for start in range(0, len(samples), subsets.NAMES_AT_ONCE):
        for path in samples.relative_names(start, start + subsets.NAMES_AT_ONCE):
            folder, _, name = path.rpartition(b'/')
            yield folder, name


def _folders(samples):
    """{folder: (its real path, whether its first image is a link)}."""
    root, found = os.fsencode(samples.root), {}
    for folder, name in _names(samples):
        if folder not in found:
            path = os.path.join(root, folder)
            found[folder] = os.path.realpath(path), os.path.islink(os.path.join(path, name))
    return found


def _real_paths(samples, folders, wanted):
    """Yield the real path of every image whose folder's real path is in `wanted`."""
    for folder, name in _names(samples):
        real, linked = folders[folder]
        if real in wanted:
            path = real + b'/' + name
            yield os.path.realpath(path) if linked else path
