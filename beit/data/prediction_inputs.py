"""Reads the images of files, folders and patterns for `run_predict.py`.

Folders of any size start at once and need no more memory than small ones: they are listed while the images are read.
"""

import collections
import glob
import itertools
import os
import zlib
from typing import Collection, Deque, Iterable, Iterator, List, Sequence, Tuple

import torch

from beit.data.class_folders import OnSkip, describe_unused, extension_of, walk_folders
from beit.data.decode import is_image_name
from beit.data.transforms import EvalTransform
from beit.errors import UserError, escape_text
from beit.files import archives
from beit.log import log_main

SORTED_AT_ONCE = 1 << 16  # names; they bound the memory


def in_order(names: Iterable[str]) -> Iterator[str]:
    """Yield them sorted, `SORTED_AT_ONCE` at a time."""
    names = iter(names)
    while True:
        chunk = sorted(itertools.islice(names, SORTED_AT_ONCE))
        yield from chunk
        if len(chunk) < SORTED_AT_ONCE:
            return


def find_images(inputs: Sequence[str], exclude: Collection[str] = (),
                on_skip: OnSkip = lambda path, reason: None) -> Iterator[str]:
    """Yield the path of each image of files, folders and patterns, in their order; of a folder its files, then folders.

    A file that the user names counts as an image with any ending. The files of a pattern count by their endings; its
    folders count with all images in them, unless the pattern is recursive (**). Errors: see `walk_folders`.
    """
    for name in inputs:
        if archives.isdir(name):
            for folder, names in walk_folders(name, on_skip, exclude):
                for file in in_order(names):
                    yield os.path.join(name, folder, file)
        elif os.path.lexists(name):
            yield name
        else:
            for path in in_order(glob.iglob(name, recursive=True)):
                if any(os.path.join(os.path.realpath(path), '').startswith(os.path.join(each, '')) for each in exclude):
                    continue
                if os.path.isdir(path):
                    yield from find_images([] if '**' in name else [path], exclude, on_skip)
                elif is_image_name(path, path):
                    yield path
                else:
                    on_skip(path, extension_of(path))


def common_folder(inputs: Sequence[str]) -> str:
    """The innermost folder, an absolute path, that holds all inputs."""
    folders = []
    for path in map(os.path.abspath, inputs):
        while os.path.isfile(path) or not archives.isdir(path):  # a file, also an archive, or a pattern
            path = os.path.dirname(path)
        folders.append(path)
    return os.path.commonpath(folders)


class PathSampler(torch.utils.data.Sampler):
    """This process's share of the images, every `processes`-th, as (number, path); it has no length.

    Attributes:
        requested (deque): images requested by the loader and not yet returned by `take`, in order.
        state (list): the number of images of all processes so far, and a checksum of their paths, to compare processes.
    """

    def __init__(self, inputs: Sequence[str], exclude: Collection[str] = (), rank: int = 0, processes: int = 1) -> None:
        self.inputs, self.exclude, self.rank, self.processes = inputs, exclude, rank, processes
        self.requested: Deque[Tuple[int, str]] = collections.deque()
        self.state = [0, 0]

    def __iter__(self) -> Iterator[Tuple[int, str]]:
        for number, path in enumerate(self._find()):
            self.state = [number + 1, zlib.crc32(os.fsencode(path), self.state[1])]
            if number % self.processes == self.rank:
                self.requested.append((number, path))
                yield number, path
        if self.unused:
            log_main(describe_unused(self.unused))

    def _find(self) -> Iterator[str]:
        self.unused: collections.Counter = collections.Counter()
        return find_images(self.inputs, self.exclude, lambda _, why: self.unused.update([why]))

    def take(self, count: int) -> List[Tuple[int, str]]:
        """The next `count` requested images."""
        return [self.requested.popleft() for _ in range(count)]

    def first(self, count: int) -> int:
        """The number of images, at most `count`. Raises a `UserError` if there is none."""
        found = sum(1 for _ in itertools.islice(self._find(), count))
        if not found:
            raise UserError('%s: there is no image in it%s; name image files or folders with images' % (
                ', '.join(map(escape_text, self.inputs[:3])) + (' …' if len(self.inputs) > 3 else ''),
                '; ' + describe_unused(self.unused) if self.unused else ''))
        return found


class PathDataset(torch.utils.data.Dataset):
    """(image uint8 (size, size, 3), whether it was resized for a model that was trained without resizing) by (number,
    path). For such a model of small inputs, the shorter side of larger images is resized and the centre cropped.
    """

    def __init__(self, evaluation: EvalTransform, data_backend: str = 'exact', max_pixels: int = 0) -> None:
        self.evaluation, self.transform = evaluation, evaluation.build(data_backend)
        self.read = evaluation.reader(data_backend, max_pixels)
        self.make_fit = evaluation.resize_and_crop()

    def __getitem__(self, key: Tuple[int, str]) -> Tuple[torch.Tensor, int]:
        image = self.read(key[1])
        resized = not (self.evaluation.resizes or self.evaluation.fits(*image.size))
        return self.transform(self.make_fit(image) if resized else image), int(resized)
