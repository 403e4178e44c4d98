"""Image files of strangers: reading one, and finding those of class folders."""

import collections.abc
import os
import re
import stat
import typing
import warnings

import numpy as np
from PIL import Image

from errors import UserError, escape_text

EXTENSIONS = ('.jpg', '.jpeg', '.png', '.webp', '.bmp', '.ppm', '.pgm', '.tif', '.tiff')

# Pillow refuses images of more than twice MAX_IMAGE_PIXELS (179 million). Between once and twice they are read, without
# its warning, which each worker would print and which doesn't name the file.
warnings.filterwarnings('ignore', category=Image.DecompressionBombWarning)

KINDS = ((stat.S_ISDIR, 'a folder'), (stat.S_ISFIFO, 'a pipe'), (stat.S_ISCHR, 'a device'), (stat.S_ISBLK, 'a device'))


class UnreadableImage(UserError):
    """A file that can't be read as an image: `path`, printable, and `reason`, both of one line."""

    def __init__(self, path, reason):
        self.path, self.reason = escape_text(path), escape_text(' '.join(reason.split()))
        super().__init__('%s: cannot be read as an image (%s); mend or remove it, or leave such files out with '
                         '--bad_images skip' % (self.path, self.reason))


def load_image(path):
    """The image as RGB, 8 bits a channel, whatever the file holds. Transparency is dropped, as the reference does.

    Raises:
        UnreadableImage: the file can't be read as an image.
    """
    try:
        with open_file(path) as file:
            image = Image.open(file)
            if 0 in image.size:
                raise ValueError('it has no pixels')
            if image.mode.startswith('I'):  # 16 bits: Pillow would cut at 255 instead of scaling
                pixels = np.asarray(image).astype(np.float64)
                image = Image.fromarray(np.uint8(np.clip(pixels / 257. + 0.5, 0, 255)))
            elif image.mode == 'P' and 'transparency' in image.info:
                image = image.convert('RGBA')
            image.load()
            return image if image.mode == 'RGB' else image.convert('RGB')  # which would copy it
    except Exception as error:  # Pillow's decoders raise nearly anything on a damaged file
        reason = getattr(error, 'strerror', None) or re.sub(r' <_io\.[^>]*>', '', str(error)) or type(error).__name__
        if isinstance(error, FileNotFoundError) and os.path.islink(path):
            reason = 'it is a link to %s, which is not there' % escape_text(os.readlink(path))
        raise UnreadableImage(path, reason) from None


def open_file(path):
    """Open a regular file that isn't empty for reading. A pipe doesn't make it wait, nor a device fill the memory."""
    handle = os.open(path, os.O_RDONLY | getattr(os, 'O_NONBLOCK', 0) | getattr(os, 'O_NOCTTY', 0))
    try:
        status = os.fstat(handle)
        if not stat.S_ISREG(status.st_mode):
            raise ValueError('it is %s' % next((name for is_kind, name in KINDS if is_kind(status.st_mode)), 'no file'))
        if status.st_size == 0:
            raise ValueError('it is empty')
        return os.fdopen(handle, 'rb')
    except BaseException:
        os.close(handle)
        raise


# ---- class folders

class ImageList(collections.abc.Sequence):
    """(path, class index) of every image; each pair is made when it is asked for.

    In memory these are a few arrays, which loader processes share with the main one, and no string for each image.

    Args:
        root (str): what every path begins with, as the user gave it.
        folders (list of str): relative to root.
        labels, counts (array of int): of each folder, its class index and how many images it has.
        names (bytes): the images' names, folder after folder, a NUL behind each.
        begin (int): where in `names` they begin.
        ends (array of int): where each one's NUL is, for who knows it.
    """

    def __init__(self, root, folders, labels, counts, names, begin=0, ends=None):
        self.root, self.folders, self.names, self.begin = root, folders, names, begin
        self.labels, self.counts = np.asarray(labels, dtype=np.int64), np.asarray(counts, dtype=np.int64)
        self.before = np.concatenate([[0], np.cumsum(self.counts)])  # the place of each folder's first image
        self.ends = np.flatnonzero(np.frombuffer(names, dtype=np.uint8) == 0) if ends is None else ends

    def __len__(self):
        return len(self.ends)

    def __getitem__(self, index):
        if isinstance(index, slice):
            return [self[each] for each in range(*index.indices(len(self)))]
        index = range(len(self))[index]  # negative ones count from the end, and there is an IndexError
        folder = int(np.searchsorted(self.before, index, side='right')) - 1
        name = self.names[int(self.ends[index - 1]) + 1 if index else self.begin:int(self.ends[index])]
        return os.path.join(self.root, self.folders[folder], os.fsdecode(name)), int(self.labels[folder])

    def __eq__(self, other):
        return len(self) == len(other) and all(mine == theirs for mine, theirs in zip(self, other))

    __hash__ = None

    @property
    def targets(self):
        """int64 (images,): the class index of each."""
        return np.repeat(self.labels, self.counts)


class Tree(typing.NamedTuple):
    """What `scan_classes` found, and all that it hangs on: where none of it changes, another scan finds the same."""
    classes: list  # their names
    samples: ImageList  # whose `folders` are all that were listed, first root itself, as ''
    stamps: list  # of each folder, what `stamp` said before it was listed
    real: dict  # {folder that is a link, or '' for root: its real path}
    links: list  # of those that lead to no folder: paths relative to root


def scan_classes(root, alive=lambda: None):
    """The `Tree` in `root`, as torchvision's `DatasetFolder` finds it but without hidden names, and in its order.

    Every folder in `root` is a class, with the image files in it at any depth; links are followed. A file counts by its
    name's ending alone. Names are as the operating system gives them, with surrogates for bytes that aren't text.

    Args:
        alive (function): called after every folder.

    Raises:
        UserError: a folder can't be listed, a link leads nowhere or to a folder that it lies in. Each would take images
            away, or add some twice, without a word. (A link named like an image is a file that can't be read.)
    """
    real = {'': os.path.realpath(root)}
    _, classes, links, root_stamp = _list_folder(root, '')
    listed = [('', 0, [], root_stamp)]
    for label, name in enumerate(sorted(classes)):
        found, waiting = [], [(name, (real[''],))]
        while waiting:
            folder, led_here = waiting.pop()
            led_here = follow(os.path.join(root, folder), led_here)
            if os.path.islink(os.path.join(root, folder)):
                real[folder] = led_here[-1]
            files, folders, more_links, its_stamp = _list_folder(root, folder)
            found.append((folder, label, sorted(filter(is_image_name, files)), its_stamp))
            waiting += [(os.path.join(folder, each), led_here) for each in folders]
            links += more_links
            alive()
        listed += sorted(found)
    folders, labels, files, stamps = zip(*listed)
    names = os.fsencode(''.join(name + '\0' for names in files for name in names))
    samples = ImageList(root, list(folders), labels, [len(names) for names in files], names)
    return Tree(sorted(classes), samples, list(stamps), real, links)


def stamp(status):
    """(inode, modification time, change time) of a folder, from os.stat: other ones where its names are others.

    The change time tells where a modification time was put back (tar, rsync) and where permissions are others. The
    device is left out: those of network disks and containers have another number after each mount. Each is below 2^64.
    """
    return status.st_ino & _64_BITS, status.st_mtime_ns & _64_BITS, status.st_ctime_ns & _64_BITS


_64_BITS = 2 ** 64 - 1


def is_image_name(name):
    return name.lower().endswith(EXTENSIONS)


def _list_folder(root, folder):
    """(names of files, names of folders, paths of links, stamp) of a folder, without what is hidden.

    Folders that links lead to are among the folders; links that lead to none are among the files, and given by
    themselves, relative to root.
    """
    files, folders, links = [], [], []
    path = os.path.join(root, folder) if folder else root
    try:
        its_stamp = stamp(os.stat(path))
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
        raise UserError('%s: cannot look for images there (%s); mend or remove it, or let this user read it'
                        % (escape_text(error.filename or path), error.strerror)) from None
    return files, folders, links, its_stamp


def check_link(path):
    """Raise an `OSError` for a link that may be to a folder of images which can't be reached."""
    if not is_image_name(path):
        os.stat(path)


def follow(folder, led_here):
    """The real folders on the way to `folder` and it: the last before each link, and where it is now."""
    if not os.path.islink(folder):
        return led_here[:-1] + (os.path.join(led_here[-1], os.path.basename(folder)),)
    target = os.path.realpath(folder)
    if any(os.path.join(each, '').startswith(os.path.join(target, '')) for each in led_here):
        raise UserError('%s: this link leads to %s, a folder that it lies in, round and round; remove it'
                        % (escape_text(folder), escape_text(target)))
    return led_here + (target,)


def is_hidden(name):
    """.ipynb_checkpoints, ._photo.jpg, __MACOSX: never meant as data."""
    return name.startswith('.') or name == '__MACOSX'
