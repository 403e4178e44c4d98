"""Finding the image files of class folders, and keeping their list in little memory."""

import collections.abc
import os
from typing import Any, Callable, Dict, List, NamedTuple, Sequence, Tuple, Union

import numpy as np

from beit.errors import UserError, escape_text

EXTENSIONS = ('.jpg', '.jpeg', '.png', '.webp', '.bmp', '.ppm', '.pgm', '.tif', '.tiff')
_64_BITS = 2 ** 64 - 1

Fingerprint = Tuple[int, int, int]


class ImageList(collections.abc.Sequence):
    """(path, class index) of every image; each pair is made when it is asked for.

    In memory these are a few arrays, which loader processes share with the main one, and no string for each image.

    Args:
        root: what every path begins with, as the user gave it.
        folders: relative to root.
        labels, counts (int): of each folder, its class index and how many images it has.
        names (bytes or uint8 array): the images' names, folder after folder, a NUL behind each.
    """

    def __init__(self, root: str, folders: List[str], labels: Sequence[int], counts: Sequence[int],
                 names: Union[bytes, np.ndarray]) -> None:
        self.root, self.folders, self.names = root, folders, np.frombuffer(names, dtype=np.uint8)
        self.labels, self.counts = np.asarray(labels, dtype=np.int64), np.asarray(counts, dtype=np.int64)
        self.starts = np.concatenate([[0], np.cumsum(self.counts)])  # the index of each folder's first image
        self.ends = np.flatnonzero(self.names == 0)  # the offset of each name's NUL

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, index):
        if isinstance(index, slice):
            return [self[each] for each in range(*index.indices(len(self)))]
        index = range(len(self))[index]  # negative ones count from the end, and there is an IndexError
        folder = int(np.searchsorted(self.starts, index, side='right')) - 1
        name = self.names[int(self.ends[index - 1]) + 1 if index else 0:int(self.ends[index])].tobytes()
        return os.path.join(self.root, self.folders[folder], os.fsdecode(name)), int(self.labels[folder])

    def __eq__(self, other: Any) -> bool:
        return len(self) == len(other) and all(mine == theirs for mine, theirs in zip(self, other))

    __hash__ = None  # type: ignore[assignment]

    @property
    def targets(self) -> np.ndarray:
        """int64 (images,): the class index of each."""
        return np.repeat(self.labels, self.counts)

    def relative_names(self, start: int, stop: int) -> List[bytes]:
        """The paths, relative to root, of the images from start up to stop."""
        begin, end = (int(self.ends[index - 1]) + 1 if index else 0 for index in (start, stop))
        numbers = (np.searchsorted(self.starts, np.arange(start, stop), side='right') - 1).tolist()
        folders = {number: os.fsencode(os.path.join(self.folders[number], '')) for number in set(numbers)}
        names = self.names[begin:end].tobytes().split(b'\0')
        return [folders[number] + name for number, name in zip(numbers, names)]


class FolderScan(NamedTuple):
    """What `scan_classes` found, and all that this depends on: while that stays, another scan finds the same."""
    classes: List[str]
    samples: ImageList  # whose `folders` are all that were listed, first root itself, as ''
    fingerprints: List[Fingerprint]  # of each folder, before it was listed
    real_paths: Dict[str, str]  # of the folders that are links, and of root, as ''
    links: List[str]  # those that lead to no folder, relative to root


def scan_classes(root: str, keep_alive: Callable[[], None] = lambda: None) -> FolderScan:
    """Find the images in `root` as torchvision's `DatasetFolder` does, in its order, but without hidden names.

    Every folder in `root` is a class, with the image files in it at any depth; links are followed. A file counts by its
    name's ending alone. Names are as the operating system gives them, with surrogates for bytes that aren't text.

    Args:
        keep_alive: called after every folder.

    Raises:
        UserError: a folder can't be listed, a link leads nowhere or to a folder that it lies in. Each would silently
            lose images or add some twice. (A link named like an image is a file that can't be read.)
    """
    real_paths = {'': os.path.realpath(root)}
    _, classes, links, root_fingerprint = _list_folder(root, '')
    listed: List[Tuple[str, int, List[str], Fingerprint]] = [('', 0, [], root_fingerprint)]
    for label, name in enumerate(sorted(classes)):
        found: List[Tuple[str, int, List[str], Fingerprint]] = []
        pending: List[Tuple[str, Tuple[str, ...]]] = [(name, (real_paths[''],))]
        while pending:
            folder, ancestors = pending.pop()
            ancestors = resolve_link(os.path.join(root, folder), ancestors)
            if os.path.islink(os.path.join(root, folder)):
                real_paths[folder] = ancestors[-1]
            files, folders, more_links, folder_fingerprint = _list_folder(root, folder)
            found.append((folder, label, sorted(filter(is_image_name, files)), folder_fingerprint))
            pending += [(os.path.join(folder, each), ancestors) for each in folders]
            links += more_links
            keep_alive()
        listed += sorted(found)
    folders, labels, files, fingerprints = zip(*listed)
    names = os.fsencode(''.join(name + '\0' for names in files for name in names))
    samples = ImageList(root, list(folders), labels, [len(names) for names in files], names)
    return FolderScan(sorted(classes), samples, list(fingerprints), real_paths, links)


def fingerprint(status: os.stat_result) -> Fingerprint:
    """(inode, modification time, change time) of a folder: they change whenever its names do.

    The change time shows where a modification time was put back (tar, rsync) and where permissions changed. The device
    is left out: those of network disks and containers have another number after each mount. Each is below 2^64.
    """
    return status.st_ino & _64_BITS, status.st_mtime_ns & _64_BITS, status.st_ctime_ns & _64_BITS


def is_image_name(name: str) -> bool:
    return name.lower().endswith(EXTENSIONS)


def is_hidden(name: str) -> bool:
    """.ipynb_checkpoints, ._photo.jpg, __MACOSX: never meant as data."""
    return name.startswith('.') or name == '__MACOSX'


def _list_folder(root, folder):
    """(names of files, names of folders, paths of links, fingerprint) of a folder, without what is hidden.

    Links to folders are among the folders; other links are among the files, and listed again, relative to root.
    """
    files, folders, links = [], [], []
    path = os.path.join(root, folder) if folder else root
    try:
        before = fingerprint(os.stat(path))
        with os.scandir(path) as entries:
            for entry in entries:
                if is_hidden(entry.name):
                    continue
                if os.path.isdir(entry.path) if entry.is_symlink() else entry.is_dir():
                    folders.append(entry.name)
                    continue
                files.append(entry.name)
                if entry.is_symlink():
                    links.append(os.path.join(folder, entry.name))
                    check_link(entry.path)
    except OSError as error:
        raise listing_error(error, path) from None
    return files, folders, links, before


def listing_error(error: OSError, path: str) -> UserError:
    return UserError('%s: cannot look for images there (%s); mend or remove it, or let this user read it'
                     % (escape_text(error.filename or path), error.strerror))


# ---- links

def check_link(path: str) -> None:
    """Raise an `OSError` for a link that may be to a folder of images which can't be reached."""
    if not is_image_name(path):
        os.stat(path)


def resolve_link(folder: str, ancestors: Tuple[str, ...]) -> Tuple[str, ...]:
    """The real folders on the way to `folder` and it: the last before each link, and where it is now.

    Raises:
        UserError: the link leads to one of its ancestors.
    """
    if not os.path.islink(folder):
        return ancestors[:-1] + (os.path.join(ancestors[-1], os.path.basename(folder)),)
    target = os.path.realpath(folder)
    if any(os.path.join(each, '').startswith(os.path.join(target, '')) for each in ancestors):
        raise UserError('%s: this link leads to %s, a folder that it lies in, round and round; remove it'
                        % (escape_text(folder), escape_text(target)))
    return ancestors + (target,)
