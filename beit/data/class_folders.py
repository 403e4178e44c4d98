"""Finding the image files of class folders."""

import array
import collections
import json
import os
import re
import unicodedata
from typing import Callable, Collection, Iterable, Iterator, List, Optional, Sequence, Tuple

import torch

from beit.data.decode import image_extensions, is_image_file
from beit.data.sample_list import SampleList
from beit.distributed import collectives
from beit.errors import UserError, escape_text
from beit.log import log_main

# What file managers, archives and NAS systems put beside files, besides names that begin with a dot.
NOT_DATA = {'__MACOSX', '@eaDir', '@tmp', '@Recycle', '#recycle', '#snapshot', '$RECYCLE.BIN', 'lost+found',
            'System Volume Information', 'Thumbs.db', 'desktop.ini'}

PassOver = Callable[[str, str], None]  # of the path of a file or folder that is not used, and why


def scan_classes(root: str, device: Optional[torch.device] = None) -> Tuple[List[str], SampleList, List]:
    """(class names, images, [path, reason] of what is not used), in the order of torchvision's `DatasetFolder`.

    Every folder in `root` is a class, with the image files in it at any depth; links are followed. A file is an image
    by its name's ending or, without one, by its content. Paths are as the operating system gives them, with surrogates
    for bytes that aren't text; class names are in `normalize`'s form.

    Args:
        device: of this process, if all of a job call this: the main process broadcasts what it found. None: each looks.

    Raises:
        UserError: a folder can't be listed, a link leads nowhere or to a folder that it lies in. Each would silently
            lose images or add some twice. (A link named like an image is a file that can't be read.)
    """
    packed = collectives.broadcast_from_main(lambda keep_alive: _scan(root, keep_alive), device)
    found, unused = json.loads(packed.decode())
    filled = {folder for folder, files in found if files}
    nested = sorted(folder for folder in filled if os.sep in folder and folder.split(os.sep)[0] not in filled)
    if nested:
        log_main('%s: %s: all images of the class %s lie in folders below it. For classes of their own, list them in a '
                 'CSV file (--train_csv, --val_csv)' % (escape_text(root), ', '.join(map(escape_text, nested[:3])),
                                                         escape_text(nested[0].split(os.sep)[0])))
    classes = sorted(normalize(folder) for folder, _ in found if os.sep not in folder)
    for name, following in zip(classes, classes[1:]):
        if name == following:
            raise UserError('%s: two class folders are called %s, in two Unicode forms; put their images in one'
                            % (escape_text(root), escape_text(name)))
    index_of = {name: index for index, name in enumerate(classes)}
    text, ends, labels = bytearray(), array.array('q', [0]), array.array('q')
    for label, folder, files in sorted((index_of[normalize(folder.split(os.sep)[0])], folder, files)
                                       for folder, files in found):
        prefix = os.fsencode(folder + os.sep)
        for name in files.split('/') if files else ():
            text += prefix + os.fsencode(name)
            ends.append(len(text))
            labels.append(label)
    return classes, SampleList(root, bytes(text), ends, labels), unused


def _scan(root: str, keep_alive: Callable[[], None]) -> bytes:
    """JSON of [(folder relative to root, sorted names of its images with / between)] and of what is not used."""
    found, unused = [], []  # type: List[Tuple[str, str]], List[Tuple[str, str]]
    for folder, names in walk_folders(root, lambda *item: unused.append(item)):
        found.append((folder, '/'.join(sorted(names))))
        keep_alive()
    _, beside = found.pop(0)  # root itself
    unused += [(os.path.join(root, name), 'beside the class folders') for name in beside.split('/') if name]
    return json.dumps([found, sorted(unused)]).encode()


def walk_folders(root: str, pass_over: PassOver, exclude: Collection[str] = ()) -> Iterator[Tuple[str, Iterator[str]]]:
    """Yield (path relative to `root`, names of the images in it) of `root`, as '', and of every folder below it.

    Folders come depth first, sorted; a folder's names come unsorted, while it is listed, and all must be taken. Links
    are followed.

    Args:
        pass_over: called for what is no image or hidden.
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
                yield folder, _image_names(entries, path, folders, pass_over)
        except OSError as error:
            raise _listing_error(error, path) from None
        pending += [(os.path.join(folder, name), ancestors) for name in sorted(folders, reverse=True)]


def _image_names(entries: Iterable[os.DirEntry], path: str, folders: List[str], pass_over: PassOver) -> Iterator[str]:
    """Yield the names of images among a folder's entries; add names of folders, and of links to such, to `folders`."""
    try:
        for entry in entries:
            if entry.name.startswith('.') or entry.name in NOT_DATA:
                pass_over(entry.path, 'hidden')
            elif os.path.isdir(entry.path) if entry.is_symlink() else entry.is_dir():
                folders.append(entry.name)
            elif is_image_name(entry.name, entry.path):
                yield entry.name
            else:
                if entry.is_symlink():
                    os.stat(entry.path)  # a link that leads nowhere may be to a folder of images
                pass_over(entry.path, extension_of(entry.name))
    except OSError as error:
        raise _listing_error(error, path) from None


def is_image_name(name: str, path: str = '') -> bool:
    """Whether a name's ending is an image's or, where there is none, the content of `path`."""
    extension = os.path.splitext(name)[1].lower()
    return extension in image_extensions() if extension else bool(path) and is_image_file(path)


def extension_of(path: str) -> str:
    return os.path.splitext(path)[1].lower() or 'without an ending'


def describe_unused(reasons: Iterable[str]) -> str:
    """'12 files or folders are not used (7 .txt, 5 hidden)'; printable."""
    counts = collections.Counter(reasons)
    kinds = ['%d %s' % (count, escape_text(reason)) for reason, count in counts.most_common(6)]
    total = sum(counts.values())
    return '%d file%s or folder%s not used (%s)' % (
        total, *(('s', 's are') if total > 1 else ('', ' is')), ', '.join(kinds + ['…'] * (len(counts) > 6)))


def tell_similar_names(classes: Sequence[str]) -> None:
    """Log a line where names differ in upper and lower case or blanks only: most often they are one class."""
    groups = collections.defaultdict(list)
    for name in classes:
        groups[''.join(name.casefold().split())].append(escape_text(name))
    similar = [group for group in groups.values() if len(group) > 1]
    if similar:
        log_main('Classes whose names differ in upper and lower case or blanks only: %s%s' % (
            '; '.join(map(', '.join, similar[:3])), ' …' if len(similar) > 3 else ''))


def normalize(name: str) -> str:
    """The Unicode form that class names are compared in: macOS writes accents as characters of their own."""
    return unicodedata.normalize('NFC', name)


def numeric_order(classes: Sequence[str]) -> Optional[List[int]]:
    """Where the classes are named 0 … N-1, in any order and with leading zeros or without: the index of each number."""
    numbers = {int(name): index for index, name in enumerate(classes) if re.fullmatch('[0-9]{1,9}', name)}
    return [numbers[number] for number in range(len(classes))] if set(numbers) == set(range(len(classes))) else None


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
