"""Reads untrusted files of torch.save: no code runs, and no allocation exceeds the file's size.

torch.load with `weights_only` runs no code either, but allocates any size that a file claims. This unpickler resolves
names from a short table, and compares each storage with the file's bytes before it allocates memory.
"""

import argparse
import collections
import contextlib
import ctypes
import io
import mmap
import os
import pickle
import re
import struct
import zipfile
import zlib
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from typing import Any, BinaryIO, Callable, Dict, Iterable, List, Optional, Tuple

import numpy as np
import torch

from beit.errors import escape_text

MAX_PICKLE = 4 << 20  # bytes of names and plain values; the largest BEiT's checkpoint with its optimizer has 1 MiB
MAX_DIRECTORY = 16 << 20  # bytes of a zip archive's directory: 200,000 tensors
MAX_NODES = 10 ** 6  # values in a file; shared values count once per reference
MAX_DEPTH = 100
CRC_THREADS = min(4, os.cpu_count() or 1)  # they compare checksums while other storages are read
ALIGNMENT = 64  # bytes; of the records of torch.save
CALL_BYTES = 1000  # upper bound for a tensor's memory without its values


class UnsafeFileError(Exception):
    """A file holds something that no weights file needs; its text completes 'refused, because …'."""


class ExportedProgramError(Exception):
    """A file is an archive of TorchScript or torch.export."""


PROGRAM_RECORDS = r'constants\.pkl$|code/|models/|serialized_exported_program\.json$'


def require(condition: Any, reason: str, error: type = UnsafeFileError) -> None:
    if not condition:
        raise error(reason)


def check_key(key: Any) -> None:
    """A key must be printable text, a whole number or None: their hashes cannot be forced to collide or to be slow."""
    require(type(key) is str and len(key) <= 1000 and key.isprintable()
            or key is None or type(key) in (bool, int) and abs(key) < 2 ** 63,
            'it holds a dict with a key that is neither a name nor a whole number')


# ---- the names that a pickle may refer to, as 'module name'

_Name = collections.namedtuple('_Name', 'text')  # stands for a function or class
_Storage = collections.namedtuple('_Storage', 'values')  # a tensor of one dimension

_DTYPES = {str(value).replace('.', ' '): value for value in vars(torch).values() if isinstance(value, torch.dtype)}
_STORAGES = {'torch %sStorage' % kind: _DTYPES['torch ' + dtype] for kind, dtype in (
    ('Bool', 'bool'), ('Byte', 'uint8'), ('Char', 'int8'), ('Short', 'int16'), ('Int', 'int32'), ('Long', 'int64'),
    ('Half', 'float16'), ('BFloat16', 'bfloat16'), ('Float', 'float32'), ('Double', 'float64'),
    ('ComplexFloat', 'complex64'), ('ComplexDouble', 'complex128'))}
_NUMPY_DTYPES = {code: np.dtype(code) for code in re.findall('..', 'f2f4f8i1i2i4i8u1u2u4u8b1')}


def _of(kind: type, value: Any) -> Any:
    require(type(value) is kind, 'it calls a function with a %s' % type(value).__name__)
    return value


def _is_whole(*numbers: Any) -> bool:
    return all(type(number) is int and 0 <= number < 2 ** 63 for number in numbers)


def _tensor(storage: Any, offset: Any, size: Any, stride: Any, requires_grad: Any = False, hooks: Any = None
            ) -> torch.Tensor:
    require(type(storage) is _Storage and type(size) is type(stride) is tuple and len(size) == len(stride) <= 64
            and _is_whole(offset, *size, *stride), 'it holds a tensor with an invalid shape')
    numel, last = 1, offset
    for length, step in zip(size, stride):
        numel *= length
        last += (length - 1) * step
    held = len(storage.values)
    # No element may lie outside the storage or, as in an expanded tensor, be repeated.
    require(numel <= held and (not numel or last < held) and max(size, default=0) < 2 ** 40,
            'it holds a tensor of shape (%s) and only %d values for it' % (', '.join(map(str, size[:8])), held))
    return storage.values.as_strided(size, stride, offset).requires_grad_(requires_grad)


def _scalar(dtype: Any, data: Any) -> Any:
    return np.frombuffer(_of(bytes, data), _NUMPY_DTYPES[dtype.str[1:]]).reshape(())[()]


# Other arguments raise a KeyError or TypeError, which becomes the message about damaged files.
_CALLS: Dict[str, Callable[..., Any]] = {
    '_codecs encode': lambda text, encoding: text.encode({'latin1': 'latin1', 'latin-1': 'latin1'}[encoding]),
    'argparse Namespace': lambda: argparse.Namespace(),
    'collections OrderedDict': lambda: OrderedDict(),
    'numpy dtype': lambda kind, align, copy: _NUMPY_DTYPES[kind],
    'numpy.core.multiarray scalar': _scalar,  # before NumPy 2
    'numpy._core.multiarray scalar': _scalar,
    'torch Size': lambda numbers: torch.Size(_of(tuple, numbers)),
    'torch device': lambda kind, *index: torch.device(_of(str, kind), *index),
    'torch._utils _rebuild_parameter': lambda tensor, requires_grad, hooks: torch.nn.Parameter(
        _of(torch.Tensor, tensor), requires_grad),
    'torch._utils _rebuild_tensor': _tensor,
    'torch._utils _rebuild_tensor_v2': _tensor,
}
ALLOWED = {*_CALLS, *_STORAGES, *_DTYPES}

# ---- the pickle

# The opcodes of torch.save, and others of foreign pickles up to the name of their function, for the error message.
_OPCODES = {getattr(pickle, name)[0] for name in re.findall(r'\w+', '''
    PROTO STOP MARK NONE NEWTRUE NEWFALSE BININT BININT1 BININT2 LONG1 BINFLOAT BINUNICODE SHORT_BINSTRING EMPTY_LIST
    EMPTY_DICT EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3 APPEND APPENDS SETITEM SETITEMS BINPUT LONG_BINPUT BINGET
    LONG_BINGET GLOBAL REDUCE NEWOBJ BUILD BINPERSID FRAME SHORT_BINUNICODE STRING MEMOIZE INST STACK_GLOBAL''')}
_PythonUnpickler: Any = vars(pickle)['_Unpickler']  # the one in C cannot be changed


class Unpickler(_PythonUnpickler):
    """Unpickles tensors and plain values, and refuses everything else.

    Args:
        size: the file's, in bytes.
        storages: receives tensors of one dimension, by key.
        record_sizes: {key: bytes in the file}; None if the sizes follow the pickle.
        read: a storage's values, of (key, length, dtype); None leaves them uninitialized.
    """

    dispatch = {code: step for code, step in _PythonUnpickler.dispatch.items() if code in _OPCODES}

    def __init__(self, file: BinaryIO, size: int, storages: Dict[str, torch.Tensor],
                 record_sizes: Optional[Dict[str, int]] = None, read: Optional[Callable] = None) -> None:
        super().__init__(file)
        self.storages, self.record_sizes, self.unread, self.read_values = storages, record_sizes, size, read
        self.max_bytes, self.called_bytes = _max_bytes(size), 0
        self.hooks: List[Any] = []

    def load(self) -> Any:
        content = super().load()
        require(max(self.memo, default=0) <= MAX_PICKLE, 'its pickle memo has gaps')
        require(not any(self.hooks), 'it holds a tensor with hooks')
        return content

    def find_class(self, module: str, name: str) -> Any:
        name = '%s %s' % (module, name)
        require(name in ALLOWED, 'it refers to %s' % escape_text(name.replace(' ', '.'))[:100])
        return _DTYPES.get(name) or _Name(name)

    def persistent_load(self, reference: Any) -> _Storage:
        kind, storage, key, _, numel, *view = reference
        require(kind == 'storage' and view in ([], [None]) and type(storage) is _Name and storage.text in _STORAGES
                and type(key) is str and re.match(r'[0-9]{1,30}\Z', key) and _is_whole(numel),
                'it refers to something other than a storage')
        dtype = _STORAGES[storage.text]
        if key not in self.storages:
            length = numel * torch.empty(0, dtype=dtype).element_size()
            self.unread -= length
            require(self.unread >= 0 if self.record_sizes is None else self.record_sizes[key] == length,
                    'storage %s does not have its %d bytes' % (key, length), ValueError)
            self.storages[key] = self.read_values(key, numel, dtype) if self.read_values and numel else \
                torch.empty(numel, dtype=dtype)
        values = self.storages[key]
        require((values.dtype, len(values)) == (dtype, numel), 'storage %s has two sizes' % key)
        return _Storage(values)

    def load_frame(self) -> None:
        require(struct.unpack('<Q', self.read(8))[0] <= MAX_PICKLE, 'it has an oversized frame')

    def load_reduce(self) -> None:
        arguments, function = self.stack.pop(), self.stack.pop()
        require(type(function) is _Name and function.text in _CALLS and type(arguments) is tuple,
                'it calls an unknown function')
        self.hooks += [each for each in arguments if type(each) is OrderedDict]
        self.called_bytes += CALL_BYTES + sum(len(each) for each in arguments if type(each) in (str, tuple))
        require(self.called_bytes <= self.max_bytes, 'it creates too many values for its size')
        self.stack.append(_CALLS[function.text](*arguments))

    def set_items(self, items: List[Any]) -> None:
        target = self.stack[-1]
        require(type(target) in (dict, OrderedDict), 'it sets items of something other than a dict')
        for key, value in zip(items[::2], items[1::2]):
            check_key(key)
            target[key] = value

    def load_setitem(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self.set_items([key, value])

    def load_setitems(self) -> None:
        self.set_items(self.pop_mark())

    def load_build(self) -> None:
        state, target = self.stack.pop(), self.stack[-1]
        if isinstance(target, np.dtype):
            require(state in [(3, order, None, None, None, -1, -1, 0) for order in '<|='], 'it changes a NumPy type')
            return
        # A name with double underscores could replace an object's methods.
        require(type(target) in (OrderedDict, argparse.Namespace) and not vars(target) and type(state) is dict and all(
            name == '_metadata' if type(target) is OrderedDict else type(name) is str and not name.startswith('__')
            for name in state), 'it sets the state of an object')
        vars(target).update(state)

    dispatch.update({pickle.FRAME[0]: load_frame, pickle.REDUCE[0]: load_reduce, pickle.NEWOBJ[0]: load_reduce,
                     pickle.SETITEM[0]: load_setitem, pickle.SETITEMS[0]: load_setitems, pickle.BUILD[0]: load_build})


def count_nodes(value: Any, known: Dict[int, Tuple[int, int, int]], depth: int = 0) -> Tuple[int, int, int]:
    """(values, bytes, height) of an unpickled value; shared ones count at every reference. `known`: results by id."""
    if id(value) not in known:
        require(depth <= MAX_DEPTH, 'it is nested more than %d deep' % MAX_DEPTH)
        nodes, height, (size, inside) = 1, 0, _size_and_parts(value)
        for each in inside:
            more = count_nodes(each, known, depth + 1)
            nodes, size, height = nodes + more[0], size + more[1], max(height, more[2] + 1)
            require(nodes <= MAX_NODES, 'it holds more than %d values, or repeats some too often' % MAX_NODES)
        known[id(value)] = nodes, size, height
    require(depth + known[id(value)][2] <= MAX_DEPTH, 'it is nested more than %d deep' % MAX_DEPTH)
    return known[id(value)]


def _size_and_parts(value: Any) -> Tuple[int, Iterable[Any]]:
    kind = type(value)
    if kind in (list, tuple):
        return 0, value
    if kind in (dict, OrderedDict):
        return 0, [*value, *value.values(), *getattr(value, '__dict__', {}).values()]
    if kind is argparse.Namespace:
        return 0, vars(value).values()
    if kind in (str, bytes):  # encoding a lone surrogate, which cannot be printed, raises an error
        return len(value if kind is bytes else value.encode('utf-8')), ()
    if isinstance(value, torch.Tensor):
        return _nbytes(value), ()
    require(value is None or isinstance(value, (bool, float, np.generic, np.dtype, torch.Size, torch.dtype,
                                                torch.device)) or kind is int and abs(value) < 2 ** 64,
            'it holds %s' % getattr(value, 'text', 'a value of type ' + kind.__name__).replace(' ', '.'))
    return 8, ()


def _max_bytes(size: int) -> int:
    return 16 * size + (64 << 20)  # a file can refer to its values several times, such as under 'model' and 'module'


def _nbytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()


# ---- the file

def _open_zip(file: BinaryIO, size: int) -> Tuple[zipfile.ZipFile, Dict[str, Any]]:
    """(zipfile.ZipFile, {name inside its folder: ZipInfo}) of an archive in torch.save's form.

    It refuses bytes before and after the archive, wrong counts and overlapping records, which Python's zipfile accepts.
    """
    file.seek(size - 42)
    locator, end_64, signature, count, length, start, comment = struct.unpack('<4s4xQ4x4s6xH2LH', file.read(42))
    end = size - 22
    if locator == b'PK\6\7':  # zip64
        end = size - 98
        file.seek(end)
        count, length, start = struct.unpack('<32x3Q', file.read(56))
    require(signature == b'PK\5\6' and not comment and start + length == end and length <= MAX_DIRECTORY
            and (end == size - 22 or end == end_64), 'its directory is not at its end, or too large', ValueError)
    archive = zipfile.ZipFile(file)
    infos = sorted(archive.infolist(), key=lambda info: info.header_offset)
    names = {info.filename.lower() for info in infos}
    folder = infos[0].filename.partition('/')[0] + '/'
    require(len(infos) == len(names) == count and all(name.startswith(folder.lower()) for name in names),
            'its directory is damaged, or names a record twice', ValueError)
    if any(re.match(PROGRAM_RECORDS, info.filename[len(folder):]) for info in infos):
        raise ExportedProgramError()
    for info, end in zip(infos, [info.header_offset for info in infos[1:]] + [start]):
        require(info.compress_type == zipfile.ZIP_STORED and info.compress_size == info.file_size
                and not info.flag_bits & ~0x808, 'its record %s is compressed or encrypted, which torch.save never does'
                % escape_text(info.filename)[:100])
        require(info.header_offset + 30 + info.file_size <= end, 'its records overlap')
    return archive, {info.filename[len(folder):]: info for info in infos}


def _load_zip(file: BinaryIO, size: int) -> List[Any]:
    archive, records = _open_zip(file, size)
    require(records['data.pkl'].file_size <= MAX_PICKLE, 'its pickle has %d bytes' % records['data.pkl'].file_size)
    require('byteorder' not in records or archive.read(records['byteorder']) == b'little', 'its bytes are swapped')
    for info in records.values():
        info.CRC = info.CRC or None  # 0: not written
    sizes = {name[len('data/'):]: info.file_size for name, info in records.items() if name.startswith('data/')}
    checks, mapped = [], None  # the file as memory: pages are read when they are used, and copied when changed
    if hasattr(torch, 'frombuffer'):
        with contextlib.suppress(OSError):  # a file system without such memory
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    with ThreadPoolExecutor(CRC_THREADS) as pool:
        def read(key: str, numel: int, dtype: torch.dtype) -> torch.Tensor:
            info = records['data/' + key]
            archive.open(info).close()  # compares the directory with the record's header
            file.seek(info.header_offset + 26)
            start = info.header_offset + 30 + sum(struct.unpack('<2H', file.read(4)))  # after name and padding
            if mapped is not None and not start % ALIGNMENT:
                values = torch.frombuffer(mapped, dtype=dtype, count=numel, offset=start)
                buffer: Any = memoryview(mapped)[start:start + info.file_size]
            else:
                file.seek(start)
                values = torch.empty(numel, dtype=dtype)
                buffer = _read_values(file, values, key)
            if info.CRC is not None:
                checks.append((key, info.CRC, pool.submit(zlib.crc32, buffer)))
            return values

        content = Unpickler(io.BytesIO(archive.read(records['data.pkl'])), size, {}, sizes, read).load()
        for key, expected, found in checks:
            require(found.result() == expected, 'storage %s does not match its checksum' % key, ValueError)
    return [content]


def _load_legacy(file: BinaryIO, size: int) -> List[Any]:
    """Read the format up to PyTorch 1.5: five pickles, the last with the keys of the storages that follow."""
    file.seek(0)
    head = io.BytesIO(file.read(2 * MAX_PICKLE))
    storages: Dict[str, torch.Tensor] = {}
    magic, version, system, content, keys = (Unpickler(head, size, storages).load() for _ in range(5))
    require(magic == torch.serialization.MAGIC_NUMBER, 'it is a pickle, but not of torch.save', ValueError)
    require(version == torch.serialization.PROTOCOL_VERSION, 'its version is unknown', ValueError)
    require(type(keys) is list and all(type(key) is str for key in keys) and sorted(keys) == sorted(storages),
            'its list of storages is wrong', ValueError)
    file.seek(head.tell())
    for key in keys:
        require(struct.unpack('<q', file.read(8))[0] == len(storages[key]), 'storage %s is cut' % key, ValueError)
        if len(storages[key]):
            _read_values(file, storages[key], key)
    return [content, system]


def _read_values(file: Any, values: torch.Tensor, key: str) -> Any:
    """Read a storage's values, not none, from the file's position; returns their memory."""
    buffer = (ctypes.c_char * _nbytes(values)).from_address(values.data_ptr())
    require(file.readinto(buffer) == _nbytes(values), 'storage %s is cut' % key, ValueError)
    return buffer


def load(file: BinaryIO, size: int) -> Any:
    """The content of an open file of torch.save, `size` bytes long, its tensors on the CPU.

    Raises `UnsafeFileError` for values other than tensors and plain ones, or more than its size allows; ValueError and
    others for a damaged file.
    """
    file.seek(0)
    start = file.read(4)
    require(start == b'PK\3\4' or start[:1] == b'\x80', 'unknown format', ValueError)
    contents = _load_zip(file, size) if start[:1] == b'P' else _load_legacy(file, size)
    require(count_nodes(contents, {})[1] <= _max_bytes(size), 'it repeats the same values too often')
    return contents[0]
