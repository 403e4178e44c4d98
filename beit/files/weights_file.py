"""Reads untrusted weights files, and writes checkpoints with a checksum of their content."""

import argparse
import hashlib
import json
import os
import typing
import warnings

import numpy as np
import torch

from beit.errors import UserError, escape_text, worker_death_message
from beit.files import untrusted_pickle
from beit.files.atomic_write import atomic_write
from beit.files.untrusted_pickle import MAX_PICKLE, UnsafeFileError

EXPORTED_PROGRAM = 'an exported program, not weights; give the checkpoint that it was exported from, a .safetensors ' \
    'file or a Hugging Face folder'


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
        raise UserError('%s: reading a safetensors file needs the package safetensors; run: pip install safetensors'
                        % name) from None
    for key in content:
        untrusted_pickle.check_key(key)
    return content


def load_untrusted(path: str, flag: str = '') -> typing.Any:
    """The content of a weights file, its tensors on the CPU: of torch.save, in either format, or safetensors.

    Args:
        flag (str): the flag that named the file, for messages.

    Returns:
        Nested dicts, lists and tuples of tensors and plain values, and argparse.Namespace. The keys are printable
        strings, whole numbers or None.

    Raises:
        UserError: the file is missing, damaged, or holds other values.
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
        raise UserError('%s: it is %s' % (name, EXPORTED_PROGRAM)) from None
    except UnsafeFileError as error:
        raise UserError('%s: refused, because %s; a weights file holds tensors and plain values only'
                        % (name, error)) from None
    except Exception as error:  # a malicious file can raise anything
        reason = escape_text(' '.join(str(error).encode('utf-8', 'backslashreplace').decode().split()))[:120] \
            or type(error).__name__
        raise UserError('%s: not a weights file, or damaged (%s); fetch or copy it again' % (name, reason)) from None


def load_weights_file(path: str, flag: str = '') -> typing.Any:
    """`load_untrusted`, and a `UserError` if the file has a checksum that does not match."""
    content = load_untrusted(path, flag)
    if isinstance(content, dict) and 'checksum' in content and content.pop('checksum') != checksum(content):
        raise UserError('%s: damaged, its content does not match its checksum; use another copy (or, if you changed '
                        'it yourself, remove its "checksum")' % ('%s %s' % (flag, escape_text(path))).strip())
    return content


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
    """Write a checkpoint with torch.save and a checksum of its content, atomically. Raises `UserError` on failure."""
    content = dict(content, checksum=content.get('checksum') or checksum(content))
    try:
        with atomic_write(path) as file:
            latch = ErrorLatch(file)
            torch.save(content, typing.cast(typing.BinaryIO, latch))
            if latch.error is not None:
                raise latch.error
    except (OSError, RuntimeError) as error:
        if worker_death_message(error):  # PyTorch raises it anywhere in the main thread
            raise
        raise UserError('--output_dir: cannot write %s (%s); earlier checkpoints are intact'
                        % (escape_text(path), ' '.join(str(error).split()))) from None


class ErrorLatch:
    """A file that stores the first write error: PyTorch 1.8 aborts the process if a write raises it."""

    def __init__(self, file: typing.BinaryIO) -> None:
        self.file = file
        self.error: typing.Optional[OSError] = None

    def write(self, data: bytes) -> int:
        if self.error is None:
            try:
                return self.file.write(data)
            except OSError as error:
                self.error = error
        return len(data)

    def flush(self) -> None:
        pass  # done by `atomic_write`


def checksum(content: typing.Dict[str, typing.Any]) -> str:
    """SHA-256, in hex, of a checkpoint's names, plain values, and the tensors' types, shapes and bytes.

    It does not depend on the file format, which differs between PyTorch's versions.
    """
    digest = hashlib.sha256()

    def add(value: typing.Any) -> None:
        if torch.is_tensor(value):
            digest.update(('%s %s;' % (value.dtype, tuple(value.shape))).encode())
            value = value.detach().cpu().contiguous().reshape(-1)
            digest.update((value.float() if value.dtype == torch.bfloat16 else value).numpy().tobytes())
        elif isinstance(value, (dict, argparse.Namespace)):
            items = value if isinstance(value, dict) else vars(value)
            digest.update(b'{')
            for key in items:
                add(key)
                add(items[key])
            digest.update(b'}')
        elif isinstance(value, (list, tuple)):
            digest.update(b'[')
            for each in value:
                add(each)
            digest.update(b']')
        else:
            value = value.item() if isinstance(value, np.generic) else value
            digest.update(('%r;' % (value,)).encode('utf-8', 'surrogatepass'))

    add({key: content[key] for key in content if key != 'checksum'})
    return digest.hexdigest()
