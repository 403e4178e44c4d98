"""Files that are read without trusting them, and written so that they are whole or not there.

Nothing in a file is run, and nothing is allocated on its word. A name never holds half a file.
"""

import argparse
import contextlib
import errno
import hashlib
import http.client
import inspect
import io
import os
import pickle
import re
import types
import urllib.parse
import warnings
import zipfile

import numpy as np
import torch
import torch.hub

import distributed
from errors import UserError, printable


# ---- reading

# ---- reading

class _RestrictedUnpickler(pickle.Unpickler):
    """Finds the handful of harmless names that a checkpoint needs, and refuses every other."""

    ALLOWED = {
        '_codecs': {'encode'},  # how protocol 2 writes the bytes of a NumPy scalar
        'collections': {'OrderedDict', 'defaultdict'},
        'argparse': {'Namespace'},
        'torch._utils': {'_rebuild_tensor', '_rebuild_tensor_v2', '_rebuild_parameter'},
        'torch.serialization': {'_get_layout'},
        'numpy': {'dtype', 'float64', 'float32', 'int64', 'int32', 'bool_'},
        'numpy.core.multiarray': {'scalar'},
        'numpy._core.multiarray': {'scalar'},
    }

    def find_class(self, module, name):
        if name in self.ALLOWED.get(module, ()):
            return super().find_class(module, name)
        if module == 'torch' and (name.endswith('Storage') or name == 'Size'
                                  or isinstance(getattr(torch, name, None), torch.dtype)):
            return getattr(torch, name)
        if module == 'torch.nn.parameter' and name == 'Parameter':
            return torch.nn.Parameter
        raise pickle.UnpicklingError('it refers to %s.%s, which a weights file has no use for' % (module, name))


def _restricted_pickle():
    """A module for torch.load's `pickle_module`, for the PyTorch that has no `weights_only` with an allow list."""
    module = types.ModuleType('restricted_pickle')
    module.Unpickler = _RestrictedUnpickler
    module.load = lambda file, **options: _RestrictedUnpickler(file, **options).load()
    return module


class _PaddedReader(io.BufferedReader):
    """A file that goes on with zeros behind its end, and remembers it: a short read crashes PyTorch 1.5 later on."""

    ended_early = False

    def fileno(self):
        raise io.UnsupportedOperation('fileno')  # else torch reads past this class

    def read(self, size=-1):
        data = super().read(size)
        if size is not None and len(data) < size:
            self.ended_early = True
            data += bytes(size - len(data))
        return data

    def readinto(self, buffer):
        count = super().readinto(buffer)
        if count < len(buffer):
            self.ended_early = True
            buffer[count:] = bytes(len(buffer) - count)
        return len(buffer)


def _numpy_scalar_types():
    multiarray = getattr(np, '_core', None) or np.core
    dtypes = [type(np.dtype(kind)) for kind in ('float64', 'float32', 'int64', 'int32', 'bool')]
    return [multiarray.multiarray.scalar, np.dtype] + dtypes


def read(path, flag=''):
    """What a weights file holds, its tensors on the CPU. Nothing in the file is run.

    Args:
        flag (str): the flag that named it, for the error's line.

    Raises:
        UserError: the file is missing, damaged, or holds anything but tensors and plain values.
    """
    name = ('%s %s' % (flag, path)).strip()
    if not os.path.isfile(path):
        raise UserError('%s: no such file' % name)
    try:
        with warnings.catch_warnings(), open(path, 'rb') as file:
            if file.read(4) == b'PK\x03\x04':
                zipfile.ZipFile(file).infolist()  # raises on a truncated file, on which PyTorch 1.5 would abort
            file.seek(0)
            warnings.simplefilter('ignore')  # what is wrong with a file is said once, below
            if hasattr(torch.serialization, 'safe_globals'):
                with torch.serialization.safe_globals([argparse.Namespace] + _numpy_scalar_types()):
                    return torch.load(file, map_location='cpu', weights_only=True)
            options = {}
            if 'weights_only' in inspect.signature(torch.load).parameters:
                options['weights_only'] = False  # there it has no allow list; the restricted unpickler is as strict
            with _PaddedReader(open(path, 'rb', buffering=0)) as padded:
                content = torch.load(padded, map_location='cpu', pickle_module=_restricted_pickle(), **options)
            if padded.ended_early:
                raise EOFError('the file ends early')
            return content
    except pickle.UnpicklingError as error:
        found = re.search(r'it refers to (\S+),|GLOBAL (\S+) |Unsupported (?:global|class|type)\S* (\S+)', str(error))
        if found:
            raise UserError('%s: refused, because it refers to %s; a weights file holds tensors and plain values only'
                            % (name, next(filter(None, found.groups())))) from None
        raise UserError('%s: not a weights file, or damaged; fetch or copy it again' % name) from None
    except (RuntimeError, EOFError, OSError, ValueError, KeyError, IndexError, AttributeError, TypeError,
            UnicodeDecodeError, zipfile.BadZipFile, AssertionError, ImportError) as error:
        reason = ' '.join(str(error).split())[:120] or type(error).__name__
        raise UserError('%s: not a weights file, or truncated (%s); fetch or copy it again' % (name, reason)) from None


def fetch(source):
    """The local path of a file or an https URL; a URL is downloaded once, to a temporary name first.

    A URL may end in #sha256=<hex>; a file that differs is refused. Without it a hash in the file's name, as in
    weights-8a3f5b21.pth, is checked like PyTorch does.
    """
    if not re.match(r'[a-z]+://', source):
        return source
    address, _, fragment = source.partition('#')
    if not address.startswith('https://'):
        raise UserError('%s: only https:// addresses are downloaded; fetch the file yourself and give its path'
                        % source)
    home = os.environ.get('TORCH_HOME') or os.path.join(
        os.environ.get('XDG_CACHE_HOME') or os.path.join(os.path.expanduser('~'), '.cache'), 'torch')
    name = os.path.basename(urllib.parse.urlparse(address).path)
    folder = 'beit-' + hashlib.sha256(address.encode()).hexdigest()[:12]  # two addresses may end in the same name
    path = os.path.join(home, 'hub', 'checkpoints', folder, name)
    if distributed.is_main_process() and not os.path.isfile(path):
        distributed.say('Downloading %s to %s' % (address, path))
        in_name = re.search(r'-([0-9a-f]{8,})\.', name)
        try:
            os.makedirs(os.path.dirname(path), exist_ok=True)
            torch.hub.download_url_to_file(address, path, in_name.group(1) if in_name else None)
        except (OSError, RuntimeError, ValueError, http.client.HTTPException) as error:
            raise UserError('%s: download failed (%s); fetch the file yourself and give its path' % (source, error)) \
                from None
    distributed.barrier()
    if fragment.startswith('sha256='):
        digest = hashlib.sha256()
        with open(path, 'rb') as file:
            for block in iter(lambda: file.read(1 << 20), b''):
                digest.update(block)
        if digest.hexdigest() != fragment[len('sha256='):].lower():
            raise UserError('%s: %s has sha256 %s, not the one asked for; delete it and try again'
                            % (source, path, digest.hexdigest()))
    return path


# ---- writing

@contextlib.contextmanager
def replacing(path):
    """A file to write bytes to, which takes the name `path` only when it is whole and on the disk.

    Temporary name in the same folder, flush, fsync, rename, fsync of the folder. Whatever goes wrong, and whenever the
    process is killed, the name holds what it held before or all of the new; a kill can leave <path>.tmp-<process>.
    """
    temporary = '%s.tmp-%d' % (path, os.getpid())
    try:
        with open(temporary, 'wb') as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        _fsync_folder(os.path.dirname(path) or '.')
    finally:
        with contextlib.suppress(OSError):
            os.remove(temporary)  # still there only where something failed, or the user interrupted


def _fsync_folder(folder):
    if hasattr(os, 'O_DIRECTORY'):
        handle = os.open(folder, os.O_DIRECTORY)
        try:
            os.fsync(handle)
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network file systems can't
                raise
        finally:
            os.close(handle)


def write_bytes(path, data):
    """Write a small file whole or not at all.

    Raises:
        UserError: the disk is full or the folder can't be written; what stood there before is whole.
    """
    try:
        with replacing(path) as file:
            file.write(data)
    except OSError as error:
        raise UserError('cannot write %s (%s); is the disk full, or its folder gone?'
                        % (printable(path), error.strerror or error)) from None


def save(path, content):
    """Write a checkpoint, a dict, with torch.save and a checksum of its content; whole or not at all.

    Raises:
        UserError: the disk is full or the folder can't be written; what stood there before is whole.
    """
    content = dict(content, checksum=content.get('checksum') or checksum(content))
    try:
        with replacing(path) as file:
            torch.save(content, file)
    except (OSError, RuntimeError) as error:
        raise UserError('--output_dir: cannot write %s (%s); earlier checkpoints are whole'
                        % (printable(path), ' '.join(str(error).split()))) from None


def checksum(content):
    """SHA-256, in hex, of what a checkpoint holds: names, plain values, and the tensors' types, shapes and bytes.

    It is of the content, not of the file, so that it survives another PyTorch's way of writing.
    """
    digest = hashlib.sha256()

    def add(value):
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


def check_sum(content, name):
    """Take the checksum out of what was read, and compare. Raises `UserError` where it differs."""
    if isinstance(content, dict) and 'checksum' in content and content.pop('checksum') != checksum(content):
        raise UserError('%s: damaged, its content does not match its checksum; take another copy (or, where you '
                        'changed it yourself, leave its "checksum" out)' % name)
    return content
