"""Copies batches to the device as bytes, ahead of their use, and there converts, normalises and erases them."""

import contextlib
import random
import signal
import time
from typing import Any, Iterator, List, Sequence

import numpy as np
import torch
from timm.data.random_erasing import RandomErasing

from beit.data import device_randaugment
from beit.devices import accelerator
from beit.log import log_main


class RandomErasingBoxes(RandomErasing):
    """Draws timm's boxes to erase, in a loader's worker; the device applies them."""

    def __init__(self, probability: float, max_count: int = 1) -> None:
        # const draws no numbers for pixels
        super().__init__(probability, mode='const', max_count=max_count, device='cpu')

    def __call__(self, height: int, width: int) -> tuple:  # type: ignore[override]
        """(seed of the noise, [(top, left, height, width)]), or () for no erasing."""
        boxes = _Boxes()
        self._erase(boxes, 3, height, width, torch.float32)
        return (random.getrandbits(63), list(boxes)) if boxes else ()


class _Boxes(list):
    """Stands for an image and records where timm writes."""

    def __setitem__(self, index: Any, _: Any) -> None:
        _, rows, columns = index
        self.append((rows.start, columns.start, rows.stop - rows.start, columns.stop - columns.start))


class PrefetchLoader:
    """Yields a DataLoader's batches on `device`, with images in float32, normalised and erased.

    Its other attributes are the DataLoader's. On a CPU and on CUDA images have the same bits as torchvision's ToTensor
    and Normalize. The noise of an erased image depends only on its seed and the kind of device.

    Args:
        loader (DataLoader): gives `loader.Batch`es of uint8 (B, 3, H, W).
        mean, std (sequence of float): of each channel of images between 0 and 1.
        remode (str): erases with 'const' 0, 'rand' one normal colour per box, 'pixel' normal noise.
    """

    logged_first_page = False  # in this process

    def __init__(self, loader: Any, device: torch.device, mean: Sequence[float],
                 std: Sequence[float], remode: str = 'pixel') -> None:
        self.loader, self.device, self.remode = loader, device, remode
        self.generator = accelerator.noise_generator(device)
        # 255 too is a tensor: CUDA divides by a Python number by multiplying with 1/255, which rounds differently.
        self.white, self.mean, self.std = (torch.tensor(value, dtype=torch.float32, device=device).view(1, -1, 1, 1)
                                           for value in ([255.], mean, std))

    def __getattr__(self, name: str) -> Any:
        return getattr(self.loader, name)

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator:
        with _block_signals():
            batches = iter(self.loader)
        try:
            yield from accelerator.prefetch(_detect_worker_death(batches), self.prepare, self.device)
        finally:  # PyTorch 1.5 hangs if the garbage collector ends the workers
            if hasattr(batches, '_shutdown_workers') and not getattr(self.loader, 'persistent_workers', False):
                batches._shutdown_workers()

    def prepare(self, batch: Any) -> Any:
        """Copy a batch to the device and convert it there, without waiting."""
        if batch.first_page_only and not PrefetchLoader.logged_first_page:
            PrefetchLoader.logged_first_page = True
            log_main('%s has several pages or frames: only the first of such files is used' % batch.first_page_only[0])
        images = batch.images if len(batch.images) else batch.images[:, :1].expand(-1, self.mean.shape[1], -1, -1)
        images = images.permute(0, 2, 3, 1).to(self.device, non_blocking=True)  # in memory order: one plain copy
        images = images.permute(0, 3, 1, 2).contiguous()
        device_randaugment.apply(images, batch.augmenting)
        images = self.normalize(images)
        for index, seed, boxes in batch.erasing:
            self.generator.manual_seed(seed)
            for top, left, height, width in boxes:
                images[index, :, top:top + height, left:left + width] = self.pixels(height, width)
        return batch._replace(images=images, targets=batch.targets.to(self.device, non_blocking=True), erasing=[],
                              augmenting=[])

    def normalize(self, images: torch.Tensor) -> torch.Tensor:
        """((images / 255) - mean) / std, float32, of uint8 (B, C, H, W).

        On a CPU by NumPy: it uses one core, since the workers use the others, and its memory has large pages; to get
        new small ones takes longer than to compute.
        """
        if images.device.type != 'cpu':
            return images.float().div_(self.white).sub_(self.mean).div_(self.std)
        white, mean, std = (value[0].numpy() for value in (self.white, self.mean, self.std))
        normalized = np.empty(images.shape, np.float32)
        for image, result in zip(images.numpy(), normalized):
            np.divide(image, white, out=result)
            result -= mean
            result /= std
        return torch.from_numpy(normalized)

    def denormalize(self, images: torch.Tensor) -> torch.Tensor:
        """The pixels of images from `prepare`, as uint8 (B, H, W, 3) on the CPU."""
        pixels = ((images * self.std + self.mean) * self.white).clamp(0, 255).round().byte()
        return as_rgb(pixels.permute(0, 2, 3, 1).cpu())

    def pixels(self, height: int, width: int) -> torch.Tensor:
        """The pixels that erase a box: (C, height, width), or (C, 1, 1)."""
        channels = self.mean.shape[1]
        if self.remode == 'const':
            return torch.zeros(channels, 1, 1, device=self.device)
        shape = (channels, height, width) if self.remode == 'pixel' else (channels, 1, 1)
        noise = torch.empty(shape, device=self.generator.device).normal_(generator=self.generator)
        return noise.to(self.device)


def as_rgb(pixels: Any) -> Any:
    """Pixels (…, C) of a picture to show, (…, 3): grey in each channel, or without alpha."""
    return pixels[..., [0, 1, 2] if pixels.shape[-1] > 2 else [0, 0, 0]]


def _detect_worker_death(batches: Iterator) -> Iterator:
    """Yield the batches. If a worker was killed while it sent one, raise PyTorch's error for a killed worker."""
    try:
        yield from batches
    except (EOFError, ConnectionError, FileNotFoundError) as error:
        dead: List[str] = []
        until = time.monotonic() + 2  # the connection may end before the worker counts as dead
        while not dead and 'Caught ' not in str(error) and time.monotonic() < until:  # Caught: by a living worker
            dead = [str(worker.pid) for worker in getattr(batches, '_workers', ()) if not worker.is_alive()]
            time.sleep(0.05)
        if not dead:
            raise
        raise RuntimeError('DataLoader worker (pid(s) %s) exited unexpectedly' % ', '.join(dead)) from error


@contextlib.contextmanager
def _block_signals() -> Iterator[None]:
    """Protect workers that start inside from signals to all processes of a job; see `loader.worker_init`."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM, signal.SIGINT])
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
