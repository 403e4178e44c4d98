"""Files that are read without trusting them, and written so that they are whole or not there.

Nothing in a file is run, and nothing is allocated on its word. A name never holds half a file.
"""

import argparse
import contextlib
import errno
import hashlib
import http.client
import inspect
import json
import os
import pickle
import re
import shutil
import types
import urllib.request
import warnings

import numpy as np
import torch

import distributed
import dry_run
from dry_run import ALLOWED, MAX_PICKLE, SCALARS, Refused, refers_to, with_plain_keys
from errors import UserError, escape_text, worker_death_message

MAX_DOWNLOAD = 16 << 30  # bytes
SILENCE = 60  # seconds that a server may take for its next bytes


# ---- reading

class _RestrictedUnpickler(pickle.Unpickler):
    """Finds the handful of harmless names that a checkpoint needs, and refuses every other."""

    def find_class(self, module, name):
        if '%s %s' % (module, name) not in ALLOWED:
            raise pickle.UnpicklingError(refers_to('%s %s' % (module, name)))
        return ALLOWED['%s %s' % (module, name)]


def _restricted_pickle():
    """A module for torch.load's `pickle_module`, for the PyTorch that has no `weights_only` with an allow list."""
    module = types.ModuleType('restricted_pickle')
    module.Unpickler = _RestrictedUnpickler
    module.load = lambda file, **options: _RestrictedUnpickler(file, **options).load()
    return module


def _numpy_scalar_types():
    """For torch's allow list, which goes by the names that things have: NumPy's before and since its version 2."""
    def scalar(module):
        def scalar(dtype, data):
            return ALLOWED[SCALARS[0]](dtype, data)
        scalar.__module__, scalar.__qualname__ = module, 'scalar'
        return scalar

    codes = ['f2', 'f4', 'f8', 'i1', 'i2', 'i4', 'i8', 'u1', 'u2', 'u4', 'u8', 'b1']
    return [scalar(name.split()[0]) for name in SCALARS] + [np.dtype] + [type(np.dtype(code)) for code in codes]


def _load(file):
    file.seek(0)
    if hasattr(torch.serialization, 'safe_globals'):
        with torch.serialization.safe_globals([argparse.Namespace] + _numpy_scalar_types()):
            return torch.load(file, map_location='cpu', weights_only=True)
    options = {}
    if 'weights_only' in inspect.signature(torch.load).parameters:
        options['weights_only'] = False  # there it has no allow list; the restricted unpickler is as strict
    return torch.load(file, map_location='cpu', pickle_module=_restricted_pickle(), **options)


def _read_safetensors(path, header, name):
    # The package checks that shapes, offsets and the file's length agree before it makes a tensor.
    try:
        if hasattr(torch, 'frombuffer'):
            from safetensors.torch import load_file
            content = load_file(path)
        elif b'"BF16"' in header:
            raise UserError('%s: holds bfloat16 tensors, which need PyTorch 1.10 or newer in this format; store them '
                            'as float32' % name)
        else:
            from safetensors.numpy import load_file
            content = {name: torch.from_numpy(array) for name, array in load_file(path).items()}
    except ImportError:
        raise UserError('%s: a safetensors file, and the package that reads it is missing; run: pip install '
                        'safetensors' % name) from None
    with_plain_keys(content.items())
    return content


def read(path, flag=''):
    """What a weights file holds, its tensors on the CPU: one of torch.save, in either format, or safetensors.

    Nothing in the file is run. What it says of itself is checked against its bytes before anything is allocated: first
    it goes through a dry run, the same with every PyTorch, then to torch.load with an allow list.

    Args:
        flag (str): the flag that named it, for the error's line.

    Returns:
        Nested dicts, lists and tuples of tensors and plain values, with an argparse.Namespace where one was saved. The
        keys are strings that can be printed, whole numbers or None.

    Raises:
        UserError: the file is missing, damaged, or holds anything but tensors and plain values.
    """
    name = ('%s %s' % (flag, escape_text(path))).strip()
    if not os.path.isfile(path):
        raise UserError('%s: %s' % (name, 'a folder or device, not a file' if os.path.exists(path) else 'no such file'))
    try:
        with warnings.catch_warnings(), open(path, 'rb') as file:
            warnings.simplefilter('ignore')  # what is wrong with a file is said once, below
            size = os.fstat(file.fileno()).st_size
            start = file.read(9)
            header_size = int.from_bytes(start[:8], 'little')
            if start[8:] == b'{' and header_size < min(size, MAX_PICKLE):
                file.seek(8)
                return _read_safetensors(path, file.read(header_size), name)
            dry_run.check(file, size, start)
            return _load(file)
    except UserError:
        raise
    except Refused as error:
        raise UserError('%s: refused, because %s; a weights file holds tensors and plain values only'
                        % (name, error)) from None
    except Exception as error:  # a file made for it can raise anything
        reason = escape_text(' '.join(str(error).encode('utf-8', 'backslashreplace').decode().split()))[:120] \
            or type(error).__name__
        raise UserError('%s: not a weights file, or damaged (%s); fetch or copy it again' % (name, reason)) from None


def read_metadata(path):
    """The metadata of a safetensors file, str by str; {} where it has none, or is another file."""
    try:
        with open(path, 'rb') as file:
            start = file.read(8)
            size = int.from_bytes(start, 'little')
            found = json.loads(file.read(size).decode()).get('__metadata__') if size < MAX_PICKLE else None
    except (OSError, ValueError, AttributeError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


# ---- downloading

class _HttpsOnly(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, request, response, code, message, headers, address):
        if not address.lower().startswith('https://'):
            raise ValueError('it is redirected to %s, and only https:// addresses are followed' % address)
        return super().redirect_request(request, response, code, message, headers, address)


def fetch(source, flag=''):
    """The local path of a file or an https URL; a URL is downloaded once, by the first process.

    A URL may end in #sha256=<64 hex digits>; a file that differs is refused. Without it a hash in the file's name, as
    in weights-8a3f5b21.pth, is checked like PyTorch does. `flag` is what errors name.

    Raises:
        UserError: the address isn't https, the server fails, or what it sent isn't what was asked for.
    """
    if not re.match(r'[a-z]+://', source):
        return source
    shown = ('%s %s' % (flag, escape_text(source))).strip()
    address, _, fragment = source.partition('#')
    if not address.startswith('https://'):
        raise UserError('%s: only https:// addresses are downloaded; fetch the file yourself and give its path' % shown)
    if not re.match(r'(sha256=[0-9a-fA-F]{64})?\Z', fragment):
        raise UserError('%s: behind the # must stand sha256= and 64 hex digits' % shown)
    wanted = fragment[len('sha256='):].lower()
    home = os.environ.get('TORCH_HOME') or os.path.join(
        os.environ.get('XDG_CACHE_HOME') or os.path.join(os.path.expanduser('~'), '.cache'), 'torch')
    name = address.partition('?')[0].rpartition('/')[2].strip('.') or 'weights'
    folder = 'beit-' + hashlib.sha256(address.encode('utf-8', 'surrogateescape')).hexdigest()[:12]
    path = os.path.join(home, 'hub', 'checkpoints', folder, name)  # two addresses may end in the same name
    if distributed.is_main_process() and not os.path.isfile(path):
        distributed.say('Downloading %s to %s' % (escape_text(address), path))
        in_name = re.search(r'-([0-9a-f]{8,})\.', name)
        _download(address, path, wanted or (in_name.group(1) if in_name else ''), shown)
    distributed.barrier()
    if not os.path.isfile(path):
        raise UserError('%s: the first process downloaded it to %s, which this machine does not have; set TORCH_HOME '
                        'to a folder that all machines share' % (shown, path))
    if wanted:
        digest = hashlib.sha256()
        with open(path, 'rb') as file:
            for block in iter(lambda: file.read(1 << 20), b''):
                digest.update(block)
        if digest.hexdigest() != wanted:
            raise UserError('%s: %s has sha256 %s, not the one asked for; delete it and try again'
                            % (shown, path, digest.hexdigest()))
    return path


def _download(address, path, wanted, shown):
    """Fetch an address to `path`, which appears only when all of it is there and its sha256 begins with `wanted`."""
    too_large = UserError('%s: larger than %d GiB, and so no weights of these models' % (shown, MAX_DOWNLOAD >> 30))
    digest, received = hashlib.sha256(), 0
    try:
        request = urllib.request.Request(address, headers={'User-Agent': 'torch.hub'})  # some servers shun urllib
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with urllib.request.build_opener(_HttpsOnly).open(request, timeout=SILENCE) as response, \
                replacing(path) as file:
            length = response.headers.get('Content-Length')
            if length is None and not response.chunked and not wanted:
                raise ValueError('the server does not say how long it is; add its #sha256=')
            if length is not None and int(length) > MAX_DOWNLOAD:
                raise too_large
            for block in iter(lambda: response.read(1 << 16), b''):
                received += len(block)
                if received > MAX_DOWNLOAD:
                    raise too_large
                digest.update(block)
                file.write(block)
            if length is not None and received != int(length):
                raise ValueError('it broke off after %d of %d bytes' % (received, int(length)))
            if not digest.hexdigest().startswith(wanted):
                raise UserError('%s: the server sent a file with sha256 %s, not the one asked for'
                                % (shown, digest.hexdigest()))
    except (OSError, ValueError, http.client.HTTPException) as error:
        reason = escape_text(str(error)) or type(error).__name__
        raise UserError('%s: download failed (%s); fetch the file yourself and give its path'
                        % (shown, reason)) from None


# ---- writing

@contextlib.contextmanager
def replacing(path, is_given=False):
    """A file to write bytes to, which takes the name `path` only when it is whole and on the disk.

    Temporary name in the same folder, flush, fsync, rename, fsync of the folder. Whatever goes wrong, and whenever the
    process is killed, the name holds what it held before or all of the new; a kill can leave <path>.tmp-<process>.

    Args:
        is_given (bool): the user chose the name. A link then stays, and what it leads to is replaced; a pipe or a
            device stays, and is written to.
    """
    if is_given:
        path = os.path.realpath(path) if os.path.islink(path) else path
        if os.path.exists(path) and not os.path.isfile(path) and not os.path.isdir(path):
            with open(path, 'wb') as file:
                yield file
            return
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


@contextlib.contextmanager
def replacing_folder(path):
    """A new folder to write files to, which takes the name `path` only when all of them are whole and on the disk.

    What goes wrong before leaves `path` as it was. A folder that stood there is then set aside and removed: a kill
    between the two renames leaves it whole, as <path>.old-<process>, and none under the name.
    """
    path = path.rstrip(os.sep)
    temporary, old = '%s.tmp-%d' % (path, os.getpid()), '%s.old-%d' % (path, os.getpid())
    try:
        os.mkdir(temporary)
        yield temporary
        for name in os.listdir(temporary):
            with open(os.path.join(temporary, name), 'rb+') as file:
                os.fsync(file.fileno())
        _fsync_folder(temporary)
        if os.path.isdir(path):
            os.replace(path, old)
        try:
            os.replace(temporary, path)
        except OSError:
            if os.path.isdir(old):
                os.replace(old, path)
            raise
        _fsync_folder(os.path.dirname(path) or '.')
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


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


def write_bytes(path, data, is_given=False):
    """Write a small file whole or not at all; for `is_given` see `replacing`.

    Raises:
        UserError: the disk is full or the folder can't be written; what stood there before is whole.
    """
    try:
        with replacing(path, is_given) as file:
            file.write(data)
    except OSError as error:
        raise UserError('cannot write %s (%s); is the disk full, or its folder gone?'
                        % (escape_text(path), error.strerror or error)) from None


def save(path, content):
    """Write a checkpoint, a dict, with torch.save and a checksum of its content; whole or not at all.

    Raises:
        UserError: the disk is full or the folder can't be written; what stood there before is whole.
    """
    content = dict(content, checksum=content.get('checksum') or checksum(content))
    try:
        with replacing(path) as file:
            patient = _Patient(file)
            torch.save(content, patient)
            if patient.error is not None:
                raise patient.error
    except (OSError, RuntimeError) as error:
        if worker_death_message(error):  # PyTorch raises that in whatever the main thread is doing
            raise
        raise UserError('--output_dir: cannot write %s (%s); earlier checkpoints are whole'
                        % (escape_text(path), ' '.join(str(error).split()))) from None


class _Patient:
    """A file to write to that keeps its error to itself: PyTorch 1.8 aborts the process where a write fails."""

    def __init__(self, file):
        self.file, self.error = file, None

    def write(self, data):
        if self.error is None:
            try:
                return self.file.write(data)
            except OSError as error:
                self.error = error
        return len(data)

    def flush(self):
        pass  # `replacing` does it


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


def read_checked(path, flag=''):
    """`read`, and compare the checksum where the file has one.

    Raises:
        UserError: as `read`, or the content isn't what was written.
    """
    content = read(path, flag)
    if isinstance(content, dict) and 'checksum' in content and content.pop('checksum') != checksum(content):
        raise UserError('%s: damaged, its content does not match its checksum; take another copy (or, where you '
                        'changed it yourself, leave its "checksum" out)'
                        % ('%s %s' % (flag, escape_text(path))).strip())
    return content
