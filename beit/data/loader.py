"""The order of images, their random seeds, the collation of batches, and the set-up of loader workers.

A sample depends only on the seed, the epoch and the image's index, not on the number of workers or processes.
"""

import functools
import inspect
import multiprocessing.queues
import os
import random
import signal
import sys
import threading
from typing import Any, Iterator, NamedTuple, Optional, Sequence, Tuple, Union

import numpy as np
import torch
from torch._utils import ExceptionWrapper
from torch.utils.data.dataloader import default_collate

from beit.data import device_randaugment
from beit.data.decode import UnreadableImage, take_first_page_only
from beit.data.device_loader import PrefetchLoader, RandomErasingBoxes
from beit.distributed import process_group
from beit.errors import UserError


class EpochSampler(torch.utils.data.Sampler):
    """This process's share of one permutation per epoch; yields (epoch, index) pairs.

    Process r of w takes positions r, r+w, r+2w, …: the k-th batches of all processes together are the k-th batch of one
    process with w times the batch size. The last len % w positions are dropped.
    """

    def __init__(self, length: int, rank: int = 0, world_size: int = 1, seed: int = 0) -> None:
        self.length, self.rank, self.world_size, self.seed = length, rank, world_size, seed
        self.set_epoch(0)

    def set_epoch(self, epoch: int, start: int = 0) -> None:
        """Continue with this epoch, from this process's `start`-th sample."""
        self.epoch, self.start = epoch, start

    def __len__(self) -> int:
        """The number of remaining samples of the epoch."""
        return max(self.length // self.world_size - self.start, 0)

    def __iter__(self) -> Iterator[Tuple[int, int]]:
        order = np.random.default_rng([self.seed, self.epoch]).permutation(self.length)
        share = order[:self.length // self.world_size * self.world_size][self.rank::self.world_size]
        for index in share[self.start:]:
            yield self.epoch, int(index)


class OrderedDistributedSampler(torch.utils.data.Sampler):
    """This process's share of a validation set: every image in exactly one process, none twice."""

    def __init__(self, length: int, rank: int = 0, world_size: int = 1) -> None:
        self.indices = range(rank, length, world_size)

    def __len__(self) -> int:
        return len(self.indices)

    def __iter__(self) -> Iterator[int]:
        return iter(self.indices)


class Unreadable(NamedTuple):
    """A file that was left out; its path is escaped."""
    path: str
    reason: str


class Batch(NamedTuple):
    """A batch of the loaders. Files that were left out reduce B, down to 0."""
    images: torch.Tensor  # float32 (B, 3, H, W), normalised; from a worker uint8
    targets: torch.Tensor  # int64 (B,), class indices
    indices: torch.Tensor  # int64 (B,), of the data set; see `image_dataset.image_name`
    unreadable: list  # of Unreadable
    erasing: Sequence = ()  # pending: (position in the batch, seed, boxes), see `RandomErasingBoxes`
    augmenting: Sequence = ()  # pending operations, see `device_randaugment.collate_ops`
    first_page_only: Sequence = ()  # escaped paths, see `decode.take_first_page_only`


class Sample(NamedTuple):
    """The worker's result for an image, for `collate`."""
    image: torch.Tensor  # uint8 (H, W, 3)
    target: int
    index: int  # type: ignore[assignment]  # hides tuple.index
    erasing: tuple = ()  # boxes to erase
    operations: Sequence = ()  # left to the device, see `device_randaugment`


class SampleDataset(torch.utils.data.Dataset):
    """A `Sample` by index; with `skip_unreadable`, an `Unreadable` for a bad file. `erasing` draws last."""

    def __init__(self, dataset: Any, skip_unreadable: bool = False,
                 erasing: Optional[RandomErasingBoxes] = None) -> None:
        self.dataset, self.skip_unreadable, self.erasing = dataset, skip_unreadable, erasing

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: Any) -> Union[Sample, Unreadable]:
        try:
            image, target = self.dataset[index]
            image, operations = image if isinstance(image, device_randaugment.DeferredImage) else (image, [])
            return Sample(image, target, index, self.erasing(*image.shape[:2]) if self.erasing else (), operations)
        except UnreadableImage as error:
            if self.skip_unreadable:
                return Unreadable(error.path, error.reason)
            raise UserError(str(error)) from None  # `one_line` searches for this name in a worker's traceback


class SeededDataset(SampleDataset):
    """Samples by (epoch, index); the augmentation is seeded with (seed, epoch, index)."""

    def __init__(self, dataset: Any, seed: int = 0, *options: Any) -> None:
        super().__init__(dataset, *options)
        self.seed = seed

    def __getitem__(self, key: Tuple[int, int]) -> Union[Sample, Unreadable]:
        epoch, index = key
        in_worker = torch.utils.data.get_worker_info() is not None
        saved = None if in_worker else (random.getstate(), np.random.get_state(), torch.get_rng_state())
        try:
            seeds = np.random.SeedSequence([self.seed, epoch, index]).generate_state(3).tolist()
            random.seed(seeds[0])
            np.random.seed(seeds[1])
            torch.default_generator.manual_seed(seeds[2])  # torch.manual_seed would seed every device too
            return super().__getitem__(index)
        finally:
            if saved is not None:  # the training loop's random numbers
                random.setstate(saved[0])
                np.random.set_state(saved[1])
                torch.set_rng_state(saved[2])


def collate(items: Sequence, size: int) -> Batch:
    """A `Batch` of bytes from a `SampleDataset`'s results, images of size x size."""
    unreadable = [item for item in items if isinstance(item, Unreadable)]
    read = [item for item in items if not isinstance(item, Unreadable)]
    if not read:
        empty = torch.zeros(0, dtype=torch.int64)
        return Batch(torch.zeros(0, 3, size, size, dtype=torch.uint8), empty, empty.clone(), unreadable)
    images, targets, indices = default_collate([sample[:3] for sample in read])
    erasing = [(position,) + sample.erasing for position, sample in enumerate(read) if sample.erasing]
    augmenting = device_randaugment.collate_ops([sample.operations for sample in read])
    return Batch(images.permute(0, 3, 1, 2), targets, indices, unreadable, erasing, augmenting, take_first_page_only())


def worker_init(_: int) -> None:
    """Let only the main process end a worker: by SIGTERM, as PyTorch does, or by its own end.

    A main process that is about to save needs its workers, so they ignore signals to all processes of the job.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    sys.excepthook = _hide_lost_connection
    multiprocessing.queues.Queue._on_queue_feeder_error = _send_error  # type: ignore[attr-defined]
    process_group.end_with_parent()
    if hasattr(signal, 'sigwaitinfo'):  # Linux; a signal handler does not get the sender
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
        threading.Thread(target=_exit_on_sigterm_of, args=(os.getppid(),), daemon=True).start()


def _send_error(queue: Any, error: Exception, item: Tuple[int, Any]) -> None:
    """If /dev/shm is too full to send a batch, send the error; otherwise the main process waits forever."""
    queue.put((item[0], ExceptionWrapper(where='in a loader process')))


def _hide_lost_connection(kind: Any, error: BaseException, traceback: Any) -> None:
    """A worker's excepthook: if the main process is killed, the thread that sends batches loses its connection."""
    if not isinstance(error, (EOFError, ConnectionError)):
        sys.__excepthook__(kind, error, traceback)


def _exit_on_sigterm_of(parent: int) -> None:
    while signal.sigwaitinfo([signal.SIGTERM]).si_pid != parent:
        pass
    os._exit(0)


def make_loader(samples: SampleDataset, evaluation: Any, device: torch.device, num_workers: int, pin_mem: bool,
                remode: str = 'pixel', **options: Any) -> PrefetchLoader:
    """A loader of `Batch`es for an `EvalTransform`; `options` are a DataLoader's, as far as this PyTorch has them."""
    options.update(
        num_workers=num_workers, pin_memory=pin_mem and device.type != 'cpu',
        worker_init_fn=worker_init, collate_fn=functools.partial(collate, size=evaluation.input_size),
        generator=torch.Generator())  # seeds of new workers must not use the run's random numbers
    known = inspect.signature(torch.utils.data.DataLoader.__init__).parameters
    loader = torch.utils.data.DataLoader(samples, **{name: options[name] for name in options if name in known})
    return PrefetchLoader(loader, device, evaluation.mean, evaluation.std, remode)
