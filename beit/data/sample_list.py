"""Image paths and their labels in a few arrays, which loader processes share: there is no object for each image."""

import collections.abc
import copy
import os
from typing import Any, List, Optional, Sequence, Union

import numpy as np
import torch

Integers = Union[Sequence[int], np.ndarray]


class SampleList(collections.abc.Sequence):
    """(path, class index) of every image; with several labels (path, float32 (classes,) of ones and zeros).

    Args:
        root: what names begin at, unless they are absolute.
        names: of all images, one after another, in the file system's encoding.
        ends: int64 (images + 1,), 0 and the offset of each name's end.
        labels: int64 array, the class index of each image; with several labels those of one image after another.
        label_ends: likewise of `labels`; None where each image has one.
        classes: how many there are; needed with several labels.
    """

    def __init__(self, root: str, names: bytes, ends: Integers, labels: Integers,
                 label_ends: Optional[Integers] = None, classes: int = 0) -> None:
        self.root, self.names, self.classes, self.spans = root, names, classes, _spans(ends)
        self.labels = np.asarray(labels, dtype=np.int64)
        self.label_spans = None if label_ends is None else _spans(label_ends)

    @classmethod
    def from_names(cls, root: str, names: Sequence[bytes], *more: Any) -> 'SampleList':
        """With a list of names."""
        return cls(root, b''.join(names), np.cumsum([0] + list(map(len, names))), *more)

    def __len__(self) -> int:
        return len(self.spans)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[each] for each in range(*index.indices(len(self)))]
        index = range(len(self))[index]  # negative ones count from the end, and there is an IndexError
        if self.label_spans is None:
            return self.path(index), int(self.labels[index])
        target = torch.zeros(self.classes)
        target[torch.from_numpy(self.labels_of(index))] = 1.
        return self.path(index), target

    def name(self, index: int) -> bytes:
        """The path as it was listed."""
        start, end = self.spans[index].tolist()
        return self.names[start:end]

    def path(self, index: int) -> str:
        return os.path.join(self.root, os.fsdecode(self.name(index)))

    def select(self, indices: Any) -> 'SampleList':
        """Those images only, in the order of `indices` (int array)."""
        selected = copy.copy(self)
        selected.spans = self.spans[indices]
        if self.label_spans is None:
            selected.labels = self.labels[indices]
        else:
            selected.label_spans = self.label_spans[indices]
        return selected

    def relabel(self, places: Sequence[int], classes: int) -> 'SampleList':
        """The same images, in which class k is `places[k]` of `classes` others."""
        changed = copy.copy(self)
        changed.labels, changed.classes = np.asarray(places, dtype=np.int64)[self.labels], classes
        return changed

    def relative_names(self, start: int, stop: int) -> List[bytes]:
        """The paths as they were listed, of the images from start up to stop."""
        return [self.names[begin:end] for begin, end in self.spans[start:stop].tolist()]

    @property
    def multi_label(self) -> bool:
        """Whether an image may have several labels, or none."""
        return self.label_spans is not None

    @property
    def targets(self) -> np.ndarray:
        """int64 (images,): the class of each, where every image has one."""
        return self.labels

    def labels_of(self, index: int) -> np.ndarray:
        """int64 array: the class indices of an image that may have several."""
        start, end = self.label_spans[index].tolist()  # type: ignore[index]
        return self.labels[start:end]


def _spans(ends: Integers) -> np.ndarray:
    """int64 (items, 2): start and end of each."""
    return np.stack([ends[:-1], ends[1:]], axis=1).astype(np.int64)
