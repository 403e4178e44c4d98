"""Finding the image files of class folders."""

import json
import os
from typing import Callable, Collection, Iterable, Iterator, List, Optional, Tuple

import torch

from beit.data.sample_list import SampleList
from beit.distributed import collectives
from beit.errors import UserError, escape_text

EXTENSIONS = ('.jpg', '.jpeg', '.png', '.webp', '.bmp', '.ppm', '.pgm', '.tif', '.tiff')


def scan_classes(root: str, device: Optional[torch.device] = None) -> Tuple[List[str], SampleList]:
    """(class names, images) of `root`, as torchvision's `DatasetFolder` finds and orders them, without hidden names.

    Every folder in `root` is a class, with the image files in it at any depth; links are followed. A file counts by its
    name's ending alone. Names are as the operating system gives them, with surrogates for bytes that aren't text.

    Args:
        device: of this process, if all of a job call this: the main process broadcasts what it found. None: each looks.

    Raises:
        UserError: a folder can't be listed, a link leads nowhere or to a folder that it lies in. Each would silently
            lose images or add some twice. (A link named like an image is a file that can't be read.)
    """
    found = json.loads(collectives.broadcast_from_main(lambda keep_alive: _scan(root, keep_alive), device).decode())
    classes = sorted(folder for folder, _ in found if os.sep not in folder)
    index_of = {name: index for index, name in enumerate(classes)}
    names, labels = [], []
    for label, folder, files in sorted((index_of[folder.split(os.sep)[0]], folder, files) for folder, files in found):
        prefix = os.fsencode(folder + os.sep)
        names += [prefix + os.fsencode(name) for name in files]
        labels += [label] * len(files)
    return classes, SampleList.from_names(root, names, labels)


def _scan(root: str, keep_alive: Callable[[], None]) -> bytes:
    """JSON of [(folder relative to root, sorted names of its images)], without root itself."""
    found = []
    for folder, names in walk_folders(root):
        found.append((folder, sorted(names)))
        keep_alive()
    return json.dumps(found[1:]).encode()


def walk_folders(root: str, exclude: Collection[str] = ()) -> Iterator[Tuple[str, Iterator[str]]]:
    """Yield (path relative to `root`, names of the images in it) of `root`, as '', and of every folder below it.

    Folders come depth first, sorted; a folder's names come unsorted, while it is listed, and all must be taken. Hidden
    files and folders are skipped, links are followed.

    Args:
        exclude: real paths of folders to pass over.

    Raises:
        UserError: see `scan_classes`.
    """
    pending: List[Tuple[str, Tuple[str, ...]]] = [('', (os.path.realpath(root),))]
    while pending:
        folder, ancestors = pending.pop()
        path = os.path.join(root, folder) if folder else root
        ancestors = _resolve_link(path, ancestors) if folder else ancestors
        if ancestors[-1] in exclude:
            continue
        folders: List[str] = []
        try:
            with os.scandir(path) as entries:
                yield folder, _image_names(entries, path, folders)
        except OSError as error:
            raise _listing_error(error, path) from None
        pending += [(os.path.join(folder, name), ancestors) for name in sorted(folders, reverse=True)]


def _image_names(entries: Iterable[os.DirEntry], path: str, folders: List[str]) -> Iterator[str]:
    """Yield the names of images among a folder's entries; add names of folders, and of links to such, to `folders`."""
    try:
        for entry in entries:
            if is_hidden(entry.name):
                continue
            if os.path.isdir(entry.path) if entry.is_symlink() else entry.is_dir():
                folders.append(entry.name)
            elif is_image_name(entry.name):
                yield entry.name
            elif entry.is_symlink():
                os.stat(entry.path)  # a link that leads nowhere may be to a folder of images
    except OSError as error:
        raise _listing_error(error, path) from None


def is_image_name(name: str) -> bool:
    return name.lower().endswith(EXTENSIONS)


def is_hidden(name: str) -> bool:
    """.ipynb_checkpoints, ._photo.jpg, __MACOSX: never meant as data."""
    return name.startswith('.') or name == '__MACOSX'


def _listing_error(error: OSError, path: str) -> UserError:
    return UserError('%s: cannot look for images there (%s); mend or remove it, or let this user read it'
                     % (escape_text(error.filename or path), error.strerror))


def _resolve_link(folder: str, ancestors: Tuple[str, ...]) -> Tuple[str, ...]:
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
