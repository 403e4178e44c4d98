"""Weights files: untrusted ones are read safely, checkpoints are written atomically.

The zip archive of torch.save holds a checksum of each tensor; reading compares it.
"""

import concurrent.futures
import json
import os
import typing
import warnings

import torch

from beit import startup
from beit.config import PROGRAM_ENDINGS
from beit.errors import EXPORTED_PROGRAM, UserError, escape_text, one_line, worker_death_message
from beit.files import untrusted_pickle
from beit.files.atomic_write import atomic_write, link_atomic
from beit.files.untrusted_pickle import MAX_PICKLE, UnsafeFileError

CACHED_BYTES = 32 << 20  # of a file that is written, in the system's cache


def _read_safetensors(path: str, header: bytes, name: str) -> typing.Dict[str, torch.Tensor]:
    # The package compares shapes, offsets and the file's length before it allocates a tensor.
    try:
        if hasattr(torch, 'frombuffer'):
            from safetensors.torch import load_file
            content = load_file(path)
        elif b'"BF16"' in header:
            raise UserError('%s: bfloat16 tensors in this format need PyTorch 1.10 or newer; store them as float32'
                            % name)
        else:
            from safetensors.numpy import load_file as load_arrays
            content = {name: torch.from_numpy(array) for name, array in load_arrays(path).items()}
    except ImportError:
        raise UserError('%s: reading a safetensors file needs the package safetensors; %s'
                        % (name, startup.pip_install('safetensors'))) from None
    for key in content:
        untrusted_pickle.check_key(key)
    return content


def load_weights_file(path: str, flag: str = '') -> typing.Any:
    """The content of a weights file, its tensors on the CPU: of torch.save, in either format, or safetensors.

    It consists of nested dicts, lists and tuples of tensors and plain values, and argparse.Namespace. The keys are
    printable strings, whole numbers or None. Raises a `UserError`, which begins with `flag` and the path, for a missing
    or damaged file, or other values.
    """
    name = ('%s %s' % (flag, escape_text(path))).strip()
    if not os.path.isfile(path):
        raise UserError('%s: %s' % (name, 'a folder or device, not a file' if os.path.exists(path) else 'no such file'))
    try:
        with warnings.catch_warnings(), open(path, 'rb') as file:
            warnings.simplefilter('ignore')  # errors are reported below
            size = os.fstat(file.fileno()).st_size
            start = file.read(9)
            header_size = int.from_bytes(start[:8], 'little')
            if start[8:] == b'{' and header_size < min(size, MAX_PICKLE):
                file.seek(8)
                return _read_safetensors(path, file.read(header_size), name)
            return untrusted_pickle.load(file, size)
    except UserError:
        raise
    except untrusted_pickle.ExportedProgramError:
        raise UserError('%s: it is %s. Evaluation and prediction run it if its name ends in %s or %s; rename it' % (
            name, EXPORTED_PROGRAM, PROGRAM_ENDINGS['torchscript'], PROGRAM_ENDINGS['torch_export'])) from None
    except UnsafeFileError as error:
        raise UserError('%s: refused, because %s; a weights file holds tensors and plain values only'
                        % (name, error)) from None
    except Exception as error:  # a malicious file can raise anything
        reason = escape_text(one_line(error))[:120] or type(error).__name__
        raise UserError('%s: not a weights file, or damaged (%s); fetch or copy it again' % (name, reason)) from None


def read_metadata(path: str) -> typing.Dict[str, str]:
    """The metadata of a safetensors file; {} for none, or for another file."""
    try:
        with open(path, 'rb') as file:
            start = file.read(8)
            size = int.from_bytes(start, 'little')
            found = json.loads(file.read(size).decode()).get('__metadata__') if size < MAX_PICKLE else None
    except (OSError, ValueError, AttributeError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def save(path: str, content: typing.Dict[str, typing.Any]) -> None:
    """Write a checkpoint with torch.save, atomically. Raises `UserError` on failure."""
    try:
        with atomic_write(path) as file:
            latch = ErrorLatch(file)
            torch.save(content, typing.cast(typing.BinaryIO, latch), _use_new_zipfile_serialization=True)
            if latch.error is not None:
                raise latch.error
    except (OSError, RuntimeError) as error:
        if worker_death_message(error):  # PyTorch raises it anywhere in the main thread
            raise
        raise UserError('--output_dir: cannot write %s (%s); earlier checkpoints are intact'
                        % (escape_text(path), one_line(error))) from None


def save_copy(path: str, original: str, content: typing.Dict[str, typing.Any]) -> None:
    """Give the checkpoint `original` a second name: a hard link, or a second file where the disk has no links."""
    try:
        link_atomic(original, path)
    except OSError:
        save(path, content)


class BackgroundSave:
    """Writes one checkpoint at a time in a thread, while training continues.

    The next call of `start`, `wait` or `check` raises the error of a failed write.
    """

    def __init__(self) -> None:
        self.written: typing.Optional[concurrent.futures.Future] = None

    def start(self, write: typing.Callable[[], None]) -> None:
        """Call `write` in a thread, after the previous write has ended."""
        self.wait()
        pool = concurrent.futures.ThreadPoolExecutor(1)
        self.written = pool.submit(write)
        pool.shutdown(wait=False)

    def join(self) -> None:
        """Wait until the file is complete; raises nothing."""
        if self.written is not None:
            concurrent.futures.wait([self.written])

    def wait(self) -> None:
        """Wait until the file is complete."""
        self.join()
        written, self.written = self.written, None
        if written is not None:
            written.result()

    def check(self) -> None:
        """Raise the error of a save that failed, if any."""
        if self.written is not None and self.written.done():
            self.wait()


class ErrorLatch:
    """A file that stores the first write error: PyTorch 1.8 aborts the process if a write raises it.

    Written data goes to the disk in parts, and leaves the system's file cache: the few pages of the cache that a save
    then uses cost half the processor time of new ones, and the images of the data set stay there.
    """

    def __init__(self, file: typing.BinaryIO) -> None:
        self.file = file
        self.error: typing.Optional[OSError] = None
        self.cached = 0  # bytes

    def write(self, data: bytes) -> int:
        if self.error is None:
            try:
                self.file.write(data)
                self.cached += len(data)
                if self.cached >= CACHED_BYTES and hasattr(os, 'posix_fadvise'):
                    self.file.flush()
                    os.fdatasync(self.file.fileno())
                    os.posix_fadvise(self.file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
                    self.cached = 0
            except OSError as error:
                self.error = error
        return len(data)

    def flush(self) -> None:
        pass  # done by `atomic_write`
