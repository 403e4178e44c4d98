"""Images of files, folders and patterns, one after another: what `run_predict.py` reads.

Folders of any size begin at once and take no more memory than small ones: nothing is listed before it is needed.
"""

import collections
import glob
import itertools
import os
import zlib

import torch

import augmentation
import fast_images
from errors import UserError, escape_text
from image_files import EXTENSIONS, check_link, follow, is_hidden, is_image_name, load_image

AT_ONCE = 1 << 16  # names that are put in order together; they bound the memory


def walk_images(root, without=()):
    """Yield the path of every image in a folder, at any depth: a folder's files, then what is in its folders.

    Names come sorted; those of a folder with more than `AT_ONCE` so many at a time, as the system gives them. Hidden
    names are passed over, links are followed.

    Args:
        without (collection of str): real paths of folders to pass over.

    Raises:
        UserError: a folder can't be listed, a link leads nowhere or to a folder that it lies in.
    """
    waiting = [(root, (os.path.realpath(root),))]
    while waiting:
        folder, led_here = waiting.pop()
        led_here = follow(folder, led_here) if folder != root else led_here
        if led_here[-1] in without:
            continue
        folders = []
        try:
            with os.scandir(folder) as entries:
                for name in in_order(_images(entries, folders)):
                    yield os.path.join(folder, name)
        except OSError as error:
            raise UserError('%s: cannot look for images there (%s); mend or remove it, or let this user read it'
                            % (escape_text(error.filename or folder), error.strerror)) from None
        waiting += [(os.path.join(folder, name), led_here) for name in sorted(folders, reverse=True)]


def _images(entries, folders):
    """The names of images among a folder's entries; those of folders are added to `folders`."""
    for entry in entries:
        if is_hidden(entry.name):
            continue
        if os.path.isdir(entry.path) if entry.is_symlink() else entry.is_dir():
            folders.append(entry.name)
        elif is_image_name(entry.name):
            yield entry.name
        elif entry.is_symlink():
            check_link(entry.path)


def in_order(names):
    """Yield them sorted, `AT_ONCE` at a time."""
    names = iter(names)
    while True:
        some = sorted(itertools.islice(names, AT_ONCE))
        yield from some
        if len(some) < AT_ONCE:
            return


def check_inputs(inputs):
    """Raise a `UserError` for one that names nothing."""
    for given in inputs:
        if not os.path.lexists(given) and next(glob.iglob(given, recursive=True), None) is None:
            raise UserError('%s: %s' % (escape_text(given), 'no file has such a name' if glob.has_magic(given) else
                                        'no such file or folder'))


def find_images(inputs, without=()):
    """Yield the path of each image that files, folders and patterns name, in their order.

    A file that is named counts as an image whatever its ending. A pattern's files count by their endings, and its
    folders with all that is in them, unless it goes into folders by itself (**).
    """
    for given in inputs:
        if os.path.isdir(given):
            yield from walk_images(given, without)
        elif os.path.lexists(given):
            yield given
        else:
            for path in in_order(glob.iglob(given, recursive=True)):
                if any(os.path.join(os.path.realpath(path), '').startswith(os.path.join(each, '')) for each in without):
                    continue
                if os.path.isdir(path):
                    yield from () if '**' in given else walk_images(path, without)
                elif is_image_name(path):
                    yield path


def common_folder(inputs):
    """The innermost folder, an absolute path, that holds all that the inputs name."""
    folders = []
    for given in inputs:
        path = os.path.abspath(given)
        if os.path.lexists(given):
            folders.append(path if os.path.isdir(path) else os.path.dirname(path))
            continue
        while glob.has_magic(path):
            path = os.path.dirname(path)
        folders.append(path)
    return os.path.commonpath(folders)


class ImageStream(torch.utils.data.Sampler):
    """This process's share of the images, every `processes`-th, as (number, path); without a length.

    Attributes:
        given (deque): those that were asked for and not taken out again, in their order.
        state (list): how many images of all processes were passed, and a checksum of their paths. Processes that
            passed the same ones have the same.
    """

    def __init__(self, inputs, without=(), rank=0, processes=1):
        self.inputs, self.without, self.rank, self.processes = inputs, without, rank, processes
        self.given, self.state = collections.deque(), [0, 0]

    def __iter__(self):
        for number, path in enumerate(find_images(self.inputs, self.without)):
            self.state = [number + 1, zlib.crc32(os.fsencode(path), self.state[1])]
            if number % self.processes == self.rank:
                self.given.append((number, path))
                yield number, path

    def take(self, count):
        """The next so many that were given."""
        return [self.given.popleft() for _ in range(count)]

    def first(self, count):
        """How many images there are, `count` at most.

        Raises:
            UserError: there's none.
        """
        found = sum(1 for _ in itertools.islice(find_images(self.inputs, self.without), count))
        if not found:
            raise UserError('%s: there is no image (%s) in it' % (
                ', '.join(map(escape_text, self.inputs[:3])) + (' …' if len(self.inputs) > 3 else ''),
                ' '.join(EXTENSIONS)))
        return found


class Pictures(torch.utils.data.Dataset):
    """(image uint8 (size, size, 3), whether it was resized against the training's custom) by (number, path).

    A model for small inputs was trained on images of just that size. Others are made to fit: the shorter side is
    resized, the centre cropped.
    """

    def __init__(self, args):
        self.transform = augmentation.build_transform(False, args)
        self.read = fast_images.load_bytes if augmentation.is_fast(False, args) else load_image
        self.fits = augmentation.small_input_rule(False, args.input_size)
        self.make_fit = augmentation.centre_crop(args.input_size, args.input_size)

    def __getitem__(self, key):
        image = self.read(key[1])
        resized = self.fits is not None and not self.fits(*image.size)
        return self.transform(self.make_fit(image) if resized else image), int(resized)
