"""Finds the image files of class folders."""

import array
import collections
import contextlib
import os
import unicodedata
from typing import Callable, Collection, Iterable, Iterator, List, Optional, Sequence, Tuple

import torch

from beit.data.decode import PLUGINS, is_image_name
from beit.data.sample_list import SampleList
from beit.distributed import collectives
from beit.errors import UserError, escape_text
from beit.files import archives
from beit.log import log_main

# Files and folders of file managers, archives and NAS systems, besides names that begin with a dot.
NOT_DATA = {'__MACOSX', '@eaDir', '@tmp', '@Recycle', '#recycle', '#snapshot', '$RECYCLE.BIN', 'lost+found',
            'System Volume Information', 'Thumbs.db', 'desktop.ini'}

OnSkip = Callable[[str, str], None]  # receives the path of an unused file or folder, and the reason


def scan_classes(root: str, device: Optional[torch.device] = None, depth: int = 1
                 ) -> Tuple[List[str], SampleList, List]:
    """(class names, images, [path, reason] of unused files), in the order of torchvision's `DatasetFolder`.

    Every folder in `root` is a class, with the image files in it at any depth; links are followed. A file's ending or,
    without one, its content makes it an image. Paths have surrogates for bytes that aren't text; class names are in
    `normalize`'s form. With a `depth` of 2, the classes are the folders in these, with names such as dog/husky.

    Args:
        device: this process's, if all processes of a job call this: the main process broadcasts its result. None: each
            process scans the folders.

    Raises:
        UserError: a folder can't be listed, or a link is broken or leads to one of its parents: images would be missing
            or counted twice. (A broken link named like an image is an unreadable file.)
    """
    every, unused = collectives.broadcast_from_main(lambda keep_alive: _scan(root, keep_alive), device)
    found = [(folder, files) for folder, files in every if folder.count(os.sep) >= depth - 1]
    unused += [(os.path.join(root, folder, name), 'above the folders of --class_depth %d' % depth)
               for folder, files in every if folder.count(os.sep) < depth - 1 for name in files.split('/') if name]
    filled = {folder for folder, files in found if files}
    nested = sorted(folder for folder in filled if _class_of(folder, depth) not in filled)
    if nested:
        log_main('%s: %s: subfolders hold all images of the class %s. To make them separate classes, give '
                 '--class_depth %d' % (escape_text(root), ', '.join(map(escape_text, nested[:3])),
                                       escape_text(_class_of(nested[0], depth)), nested[0].count(os.sep) + 1))
    classes = sorted(normalize(_class_of(folder, depth)) for folder, _ in found if folder.count(os.sep) == depth - 1)
    for name, following in zip(classes, classes[1:]):
        if name == following:
            raise UserError('%s: two class folders are called %s, in two Unicode forms; put their images in one'
                            % (escape_text(root), escape_text(name)))
    index_of = {name: index for index, name in enumerate(classes)}
    text, ends, labels = bytearray(), array.array('q', [0]), array.array('q')
    for label, folder, files in sorted((index_of[normalize(_class_of(folder, depth))], folder, files)
                                       for folder, files in found):
        prefix = os.fsencode(folder + os.sep)
        for name in files.split('/') if files else ():
            text += prefix + os.fsencode(name)
            ends.append(len(text))
            labels.append(label)
    return classes, SampleList(root, bytes(text), ends, labels), unused


def _class_of(folder: str, depth: int) -> str:
    """The name of the class of a folder, with / between its parts."""
    return '/'.join(folder.split(os.sep)[:depth])


def _scan(root: str, keep_alive: Callable[[], None]) -> Tuple[List[Tuple[str, str]], List[Tuple[str, str]]]:
    """[(folder relative to root, sorted names of its images joined by /)] and [(unused path, reason)]."""
    found: List[Tuple[str, str]] = []
    unused: List[Tuple[str, str]] = []
    for folder, names in walk_folders(root, lambda *item: unused.append(item)):
        found.append((folder, '/'.join(sorted(names))))
        keep_alive()
    _, beside = found.pop(0)  # root itself
    unused += [(os.path.join(root, name), 'beside the class folders') for name in beside.split('/') if name]
    return found, sorted(unused)


def walk_folders(root: str, on_skip: OnSkip, exclude: Collection[str] = ()) -> Iterator[Tuple[str, Iterator[str]]]:
    """Yield (path relative to `root`, names of the images in it) for `root`, as '', and for every folder below it.

    Folders come depth first, sorted. A folder's names come unsorted, during its listing; the caller must take them all.
    Links are followed. Errors: see `scan_classes`.

    Args:
        on_skip: called for hidden files and files that are no images.
        exclude: real paths of folders to skip.
    """
    pending: List[Tuple[str, Tuple[str, ...]]] = [('', (os.path.realpath(root),))]
    while pending:
        folder, ancestors = pending.pop()
        path = os.path.join(root, folder) if folder else root
        ancestors = _resolve_link(path, ancestors) if folder else ancestors
        if ancestors[-1] in exclude:
            continue
        folders: List[str] = []
        with _listing(path), archives.scandir(path) as entries:
            yield folder, _image_names(entries, path, folders, on_skip)
        pending += [(os.path.join(folder, name), ancestors) for name in sorted(folders, reverse=True)]


def _image_names(entries: Iterable[os.DirEntry], path: str, folders: List[str], on_skip: OnSkip) -> Iterator[str]:
    """Yield the names of images among a folder's entries; append names of folders, also linked ones, to `folders`."""
    with _listing(path):
        for entry in entries:
            if entry.name.startswith('.') or entry.name in NOT_DATA:
                on_skip(entry.path, 'hidden')
            elif os.path.isdir(entry.path) if entry.is_symlink() else entry.is_dir():
                folders.append(entry.name)
            elif is_image_name(entry.name, entry.path):
                yield entry.name
            else:
                if entry.is_symlink():
                    os.stat(entry.path)  # an OSError for a broken link: its target may be a folder of images
                on_skip(entry.path, extension_of(entry.name))


@contextlib.contextmanager
def _listing(path: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError('%s: cannot be listed (%s); repair or remove it, or let this user read it'
                        % (escape_text(error.filename or path), error.strerror)) from None


def extension_of(path: str) -> str:
    return os.path.splitext(path)[1].lower() or 'without an ending'


def describe_unused(reasons: Iterable[str]) -> str:
    """'12 files or folders are not used (7 .txt, 5 hidden)'; printable."""
    counts = collections.Counter(reasons)
    kinds = ['%d %s' % (count, escape_text(reason)) for reason, count in counts.most_common(6)]
    total = sum(counts.values())
    packages = sorted({PLUGINS[reason] for reason in counts if reason in PLUGINS})
    return '%d file%s or folder%s not used (%s)%s' % (
        total, *(('s', 's are') if total > 1 else ('', ' is')), ', '.join(kinds + ['…'] * (len(counts) > 6)),
        '; pip install %s reads more of them' % ' '.join(packages) if packages else '')


def log_similar_names(classes: Sequence[str]) -> None:
    """Log classes whose names differ only in case or blanks: they are usually one class."""
    groups = collections.defaultdict(list)
    for name in classes:
        groups[''.join(name.casefold().split())].append(escape_text(name))
    similar = [group for group in groups.values() if len(group) > 1]
    if similar:
        log_main('Classes whose names differ only in case or blanks: %s%s' % (
            '; '.join(map(', '.join, similar[:3])), ' …' if len(similar) > 3 else ''))


def normalize(name: str) -> str:
    """A class name in Unicode's NFC form, for comparisons: macOS writes accents as separate characters."""
    return unicodedata.normalize('NFC', name)


def _resolve_link(folder: str, ancestors: Tuple[str, ...]) -> Tuple[str, ...]:
    """The real paths to compare links with: the last folder before each link on the way, and `folder` itself."""
    if not os.path.islink(folder):
        return ancestors[:-1] + (os.path.join(ancestors[-1], os.path.basename(folder)),)
    target = os.path.realpath(folder)
    if any(os.path.join(each, '').startswith(os.path.join(target, '')) for each in ancestors):
        raise UserError('%s: this link leads to %s, one of its parent folders; remove it'
                        % (escape_text(folder), escape_text(target)))
    return ancestors + (target,)
