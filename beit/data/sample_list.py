"""Stores image paths and labels in a few arrays, which loader processes share, without an object for each image."""

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
        root: the base of relative names.
        names: the names of all images, concatenated, in the file system's encoding.
        ends: int64 (images + 1,), 0 and the offset of each name's end.
        labels: int64 array, the class indices of all images, concatenated.
        label_ends: the same as `ends` for `labels`; None if each image has one.
        classes: their number; needed with several labels.
    """

    def __init__(self, root: str, names: bytes, ends: Integers, labels: Integers,
                 label_ends: Optional[Integers] = None, classes: int = 0) -> None:
        self.root, self.names, self.classes, self.spans = root, names, classes, _spans(ends)
        self.targets = np.asarray(labels, dtype=np.int64)  # (images,), if every image has one class
        self.label_spans = None if label_ends is None else _spans(label_ends)

    @classmethod
    def from_names(cls, root: str, names: Sequence[bytes], *more: Any) -> 'SampleList':
        return cls(root, b''.join(names), np.cumsum([0] + list(map(len, names))), *more)

    def __len__(self) -> int:
        return len(self.spans)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[each] for each in range(*index.indices(len(self)))]
        index = range(len(self))[index]  # for negative indices and IndexError
        if self.label_spans is None:
            return self.path(index), int(self.targets[index])
        target = torch.zeros(self.classes)
        target[torch.from_numpy(self.labels_of(index))] = 1.
        return self.path(index), target

    def name(self, index: int) -> bytes:
        """The path as listed."""
        start, end = self.spans[index].tolist()
        return self.names[start:end]

    def path(self, index: int) -> str:
        return os.path.join(self.root, os.fsdecode(self.name(index)))

    def select(self, indices: Any) -> 'SampleList':
        """A copy with only the images `indices` (int array or slice), in this order."""
        selected = copy.copy(self)
        selected.spans = self.spans[indices]
        if self.label_spans is None:
            selected.targets = self.targets[indices]
        else:
            selected.label_spans = self.label_spans[indices]
        return selected

    def relabel(self, new_labels: Sequence[int], classes: int) -> 'SampleList':
        """A copy in which label k is `new_labels[k]`, of `classes` classes."""
        changed = copy.copy(self)
        changed.targets, changed.classes = np.asarray(new_labels, dtype=np.int64)[self.targets], classes
        return changed

    def relative_names(self, start: int, stop: int) -> List[bytes]:
        """The paths of the images [start:stop], as listed."""
        return [self.names[begin:end] for begin, end in self.spans[start:stop].tolist()]

    @property
    def multi_label(self) -> bool:
        """Whether an image can have several labels, or none."""
        return self.label_spans is not None

    def labels_of(self, index: int) -> np.ndarray:
        """int64 array: the class indices of an image that can have several."""
        start, end = self.label_spans[index].tolist()  # type: ignore[index]
        return self.targets[start:end]


def _spans(ends: Integers) -> np.ndarray:
    """int64 (items, 2): start and end of each."""
    return np.stack([ends[:-1], ends[1:]], axis=1).astype(np.int64)
