"""Images of files, folders and patterns, one after another: what `run_predict.py` reads.

Folders of any size begin at once and take no more memory than small ones: nothing is listed before it is needed.
"""

import collections
import glob
import itertools
import os
import zlib
from typing import Collection, Deque, Iterable, Iterator, List, Sequence, Tuple

import torch

from beit.data.class_folders import PassOver, describe_unused, extension_of, is_image_name, walk_folders
from beit.data.transforms import EvalTransform, image_reader
from beit.errors import UserError, escape_text
from beit.log import log_main

SORTED_AT_ONCE = 1 << 16  # names; they bound the memory


def walk_images(root: str, exclude: Collection[str] = (),
                pass_over: PassOver = lambda path, reason: None) -> Iterator[str]:
    """Yield the path of every image in a folder, at any depth: a folder's files, then its folders.

    Names come sorted; a folder with more than `SORTED_AT_ONCE` is sorted in parts of that size. For errors see
    `walk_folders`.
    """
    for folder, names in walk_folders(root, pass_over, exclude):
        for name in in_order(names):
            yield os.path.join(root, folder, name)


def in_order(names: Iterable[str]) -> Iterator[str]:
    """Yield them sorted, `SORTED_AT_ONCE` at a time."""
    names = iter(names)
    while True:
        chunk = sorted(itertools.islice(names, SORTED_AT_ONCE))
        yield from chunk
        if len(chunk) < SORTED_AT_ONCE:
            return


def check_inputs(inputs: Sequence[str]) -> None:
    """Raise a `UserError` for one that names nothing."""
    for name in inputs:
        if not os.path.lexists(name) and next(glob.iglob(name, recursive=True), None) is None:
            raise UserError('%s: %s' % (escape_text(name), 'no file has such a name' if glob.has_magic(name) else
                                        'no such file or folder'))


def find_images(inputs: Sequence[str], exclude: Collection[str] = (),
                pass_over: PassOver = lambda path, reason: None) -> Iterator[str]:
    """Yield the path of each image that files, folders and patterns name, in their order.

    A named file counts as an image whatever its ending. A pattern's files count by their endings, and its folders with
    all images in them, unless the pattern itself is recursive (**).
    """
    for name in inputs:
        if os.path.isdir(name):
            yield from walk_images(name, exclude, pass_over)
        elif os.path.lexists(name):
            yield name
        else:
            for path in in_order(glob.iglob(name, recursive=True)):
                if any(os.path.join(os.path.realpath(path), '').startswith(os.path.join(each, '')) for each in exclude):
                    continue
                if os.path.isdir(path):
                    yield from () if '**' in name else walk_images(path, exclude, pass_over)
                elif is_image_name(path, path):
                    yield path
                else:
                    pass_over(path, extension_of(path))


def common_folder(inputs: Sequence[str]) -> str:
    """The innermost folder, an absolute path, that holds all that the inputs name."""
    folders = []
    for name in inputs:
        path = os.path.abspath(name)
        if os.path.lexists(name):
            folders.append(path if os.path.isdir(path) else os.path.dirname(path))
            continue
        while glob.has_magic(path):
            path = os.path.dirname(path)
        folders.append(path)
    return os.path.commonpath(folders)


class PathSampler(torch.utils.data.Sampler):
    """This process's share of the images, every `processes`-th, as (number, path); it has no length.

    Attributes:
        requested (deque): images that the loader asked for and `take` did not return yet, in order.
        state (list): how many images of all processes were passed, and a checksum of their paths. Processes that
            passed the same ones have the same.
    """

    def __init__(self, inputs: Sequence[str], exclude: Collection[str] = (), rank: int = 0, processes: int = 1) -> None:
        self.inputs, self.exclude, self.rank, self.processes = inputs, exclude, rank, processes
        self.requested: Deque[Tuple[int, str]] = collections.deque()
        self.state = [0, 0]

    def __iter__(self) -> Iterator[Tuple[int, str]]:
        unused: collections.Counter = collections.Counter()
        for number, path in enumerate(find_images(self.inputs, self.exclude, lambda _, why: unused.update([why]))):
            self.state = [number + 1, zlib.crc32(os.fsencode(path), self.state[1])]
            if number % self.processes == self.rank:
                self.requested.append((number, path))
                yield number, path
        if unused:
            log_main(describe_unused(unused.elements()))

    def take(self, count: int) -> List[Tuple[int, str]]:
        """The next `count` that were requested."""
        return [self.requested.popleft() for _ in range(count)]

    def first(self, count: int) -> int:
        """How many images there are, `count` at most.

        Raises:
            UserError: there's none.
        """
        unused: collections.Counter = collections.Counter()
        images = find_images(self.inputs, self.exclude, lambda _, why: unused.update([why]))
        found = sum(1 for _ in itertools.islice(images, count))
        if not found:
            raise UserError('%s: there is no image in it%s' % (
                ', '.join(map(escape_text, self.inputs[:3])) + (' …' if len(self.inputs) > 3 else ''),
                '; ' + describe_unused(unused.elements()) if unused else ''))
        return found


class PathDataset(torch.utils.data.Dataset):
    """(image uint8 (size, size, 3), whether it was resized although training resizes none) by (number, path).

    A model for small inputs was trained on images of exactly that size. The shorter side of others is resized, and the
    centre cropped.
    """

    def __init__(self, evaluation: EvalTransform, data_backend: str = 'exact', max_pixels: int = 0) -> None:
        self.evaluation, self.transform = evaluation, evaluation.build(data_backend)
        self.read = image_reader(evaluation.is_fast(data_backend), max_pixels)
        self.make_fit = evaluation.resize_and_crop()

    def __getitem__(self, key: Tuple[int, str]) -> Tuple[torch.Tensor, int]:
        image = self.read(key[1])
        resized = not (self.evaluation.resizes or self.evaluation.fits(*image.size))
        return self.transform(self.make_fit(image) if resized else image), int(resized)
