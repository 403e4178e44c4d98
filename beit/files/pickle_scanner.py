"""Scans a weights file before torch.load reads it, and refuses what no weights file needs.

torch.load's allow list (or the restricted unpickler, with an older PyTorch) keeps code from running. The scan adds that
sizes agree with the file's own bytes and that nothing is large, deep or repeated beyond them. It looks nothing up,
calls nothing and allocates no tensor, and is the same with every PyTorch; that of 1.5 believes a file about its sizes.
"""

import argparse
import codecs
import collections
import contextlib
import io
import itertools
import pickle
import pickletools
import re
import struct
import tarfile
import zlib

import numpy as np
import torch

from beit.errors import escape_text

MAX_PICKLE = 64 << 20  # bytes of names and plain values; the largest BEiT's checkpoint, optimizer and all, has 1 MiB
MAX_DIRECTORY = 16 << 20  # bytes of a zip archive's directory: 200,000 tensors
MAX_STEPS = 2 * 10 ** 6  # opcodes of a pickle
MAX_NODES = 10 ** 6  # values in a file, each counted once for every way that leads to it
MAX_DEPTH = 100


class UnsafeFileError(Exception):
    """A file holds what no weights file needs; the text says what, after 'refused, because'."""


def require(condition, reason, error=UnsafeFileError):
    if not condition:
        raise error(reason)


# Bytes of an element, by how a pickle names the storage.
_STORAGES = {'torch %sStorage' % kind: size for size, kinds in (
    (1, 'Byte Char Bool'), (2, 'Short Half BFloat16'), (4, 'Int Float'), (8, 'Long Double ComplexFloat'),
    (16, 'ComplexDouble')) for kind in kinds.split()}
_DTYPES = {str(value).replace('.', ' '): value for value in vars(torch).values() if isinstance(value, torch.dtype)}
SCALARS = ('numpy.core.multiarray scalar', 'numpy._core.multiarray scalar')  # before and since NumPy 2
# All that a pickle may refer to, by module and name.
ALLOWED = {
    '_codecs encode': codecs.encode,  # how protocol 2 writes bytes, as those of a NumPy scalar
    'argparse Namespace': argparse.Namespace,
    'collections OrderedDict': collections.OrderedDict,
    'numpy dtype': np.dtype,
    'torch Size': torch.Size,
    'torch device': torch.device,
    **{'torch._utils ' + name: getattr(torch._utils, name)
       for name in ('_rebuild_parameter', '_rebuild_tensor', '_rebuild_tensor_v2')},
    **_DTYPES,
    **dict.fromkeys(SCALARS, np.float64().__reduce__()[0]),
    **{name: getattr(torch, name.split()[1]) for name in _STORAGES if hasattr(torch, name.split()[1])},
}
# What torch.save writes.
_OPCODES = set(re.findall(r'\w+', '''PROTO STOP MARK NONE NEWTRUE NEWFALSE BININT BININT1 BININT2 LONG1 BINFLOAT
    BINUNICODE SHORT_BINSTRING EMPTY_LIST EMPTY_DICT EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3 APPEND APPENDS SETITEM
    SETITEMS BINPUT LONG_BINPUT BINGET LONG_BINGET GLOBAL REDUCE NEWOBJ BUILD BINPERSID'''))
# Refused at the pickle's end only, so that the line can give a name that a foreign pickle refers to.
_FOREIGN_OPCODES = {'FRAME', 'SHORT_BINUNICODE', 'STRING', 'MEMOIZE', 'INST', 'STACK_GLOBAL'}


def check_name(name):
    require(name in ALLOWED, 'it refers to %s' % escape_text(name.replace(' ', '.'))[:100])


def check_key(key):
    """A key must be printable text, a whole number or None: none can be made to collide, or take long to hash."""
    require(type(key) is str and len(key) <= 1000 and key.isprintable()
            or key is None or type(key) in (bool, int) and abs(key) < 2 ** 63,
            'it holds a dict with a key that is not a name or whole number')


def _whole(*numbers):
    return all(type(number) is int and 0 <= number < 2 ** 63 for number in numbers)


# ---- the pickle

_Name = collections.namedtuple('_Name', 'text')
_Storage = collections.namedtuple('_Storage', 'numel itemsize')


class _Dict(dict):
    __slots__ = ('state',)

    def __init__(self):
        super().__init__()
        self.state = None

    def __setitem__(self, key, value):
        check_key(key)
        require(key not in self, 'it sets a key of a dict twice')  # else what it held would go uncounted
        super().__setitem__(key, value)


class _Call:
    __slots__ = ('name', 'arguments', 'state')

    def __init__(self, name, arguments):
        self.name, self.arguments, self.state = name, arguments, None


class PickleScanner(pickle._Unpickler):
    """An unpickler that makes lists, tuples and dicts, and a stand-in wherever the pickle names, calls or builds.

    All that the pickle makes is in the result of `load`, uncopied, so that `count_nodes` can judge the whole of it.

    Args:
        storages (dict): receives the storages that the pickle refers to, by key.
        storage_bytes (dict): {key: bytes in the file}; None where the sizes stand behind the pickle.
    """

    def __init__(self, file, storages, storage_bytes=None):
        super().__init__(file)
        self.storages, self.storage_bytes, self.steps, self.foreign = storages, storage_bytes, 0, ''

    def load(self):
        content = super().load()
        require(not self.foreign, 'it uses the pickle opcode %s' % self.foreign)
        require(not self.stack and not self.metastack, 'its pickle leaves values behind')
        # The unpickler in C makes room for all the lower ones too.
        require(max(self.memo, default=0) <= self.steps, 'its pickle memo has gaps')
        return content

    def find_class(self, module, name):
        check_name('%s %s' % (module, name))
        return _Name('%s %s' % (module, name))

    def persistent_load(self, reference):
        kind, storage, key, location, numel, *view = reference
        require(kind == 'storage' and view in ([], [None]) and type(storage) is _Name and storage.text in _STORAGES
                and type(location) is str and type(key) is str and re.match(r'[0-9]{1,30}\Z', key) and _whole(numel),
                'it refers to something beside it that is not a storage')
        found = _Storage(numel, _STORAGES[storage.text])
        require(self.storages.setdefault(key, found) == found, 'it gives storage %s two sizes' % key)
        require(self.storage_bytes is None or self.storage_bytes[key] == numel * found.itemsize,
                'storage %s does not have %d values of %d bytes' % ((key,) + found), ValueError)
        return found

    def load_frame(self):
        self.read(8)

    def load_empty_dict(self):
        self.stack.append(_Dict())

    def load_setitem(self):
        require(type(self.stack[-3]) is _Dict, 'it sets the items of what is not a dict')
        super().load_setitem()

    def load_setitems(self):
        require(type(self.metastack[-1][-1]) is _Dict, 'it sets the items of what is not a dict')
        super().load_setitems()

    def load_reduce(self):
        arguments, function = self.stack.pop(), self.stack.pop()
        require(type(function) is _Name and type(arguments) is tuple, 'it calls what is not to be called')
        self.stack.append(_Dict(*arguments) if function.text == 'collections OrderedDict'
                          else _Call(function.text, arguments))

    load_newobj = load_reduce

    def load_build(self):
        state, target = self.stack.pop(), self.stack[-1]
        require(type(target) in (_Dict, _Call) and target.state is None, 'it sets the state of an object')
        target.state = state


def _counted(opcode):
    load = vars(PickleScanner).get('load_' + opcode.name.lower(), pickle._Unpickler.dispatch.get(ord(opcode.code)))

    def step(scanner):
        scanner.steps += 1
        if scanner.steps > MAX_STEPS:
            raise UnsafeFileError('its pickle takes more than %d steps' % MAX_STEPS)
        if opcode.name not in _OPCODES:
            scanner.foreign = scanner.foreign or opcode.name
            require(opcode.name in _FOREIGN_OPCODES, 'it uses the pickle opcode %s' % opcode.name)
        load(scanner)
    return step


PickleScanner.dispatch = {ord(opcode.code): _counted(opcode) for opcode in pickletools.opcodes}


# ---- what a pickle may hold

def _tensor_bytes(storage, offset, size, stride, requires_grad=False, hooks=None):
    require(type(storage) is _Storage and type(size) is type(stride) is tuple and len(size) == len(stride) <= 64
            and type(requires_grad) is bool and _whole(offset, *size, *stride), 'it holds a tensor whose shape is none')
    require(hooks is None or type(hooks) is _Dict and not hooks, 'it holds a tensor with hooks')
    numel, last = 1, offset
    for length, step in zip(size, stride):
        numel *= length
        last += (length - 1) * step
    # No element may lie outside the storage or, as one that is expanded would, be there twice and more.
    require(numel <= storage.numel and (not numel or last < storage.numel) and max(size, default=0) < 2 ** 40,
            'it holds a tensor of shape (%s) and only %d values for it'
            % (', '.join(map(str, size[:8])), storage.numel))
    return 8 + numel * storage.itemsize


def _is_number(dtype, data):
    return type(dtype) is type(data) is _Call and (dtype.name, data.name) == ('numpy dtype', '_codecs encode') \
        and _CALLS[data.name](*data.arguments) == 8 + int(dtype.arguments[0][1])


# From a call's arguments, the bytes that it allocates, or False where no weights file calls it so. Wrong numbers of
# arguments end in a TypeError, and so in the message about damaged files.
_CALLS = {
    '_codecs encode': lambda text, encoding: type(text) is str and encoding in ('latin1', 'latin-1') and 8 + len(text),
    'argparse Namespace': lambda: 8,
    'numpy dtype': lambda kind, align, copy: (
        type(kind) is str and re.match(r'(f[248]|[iu][1248]|b1)\Z', kind) and 8),
    'torch Size': lambda numbers: type(numbers) is tuple and _whole(*numbers) and 8 + 8 * len(numbers),
    'torch device': lambda kind, index=0: type(kind) is str and _whole(index) and 8,
    'torch._utils _rebuild_parameter': lambda tensor, requires_grad, hooks: (
        type(tensor) is _Call and '_rebuild_' in tensor.name and type(requires_grad) is bool
        and type(hooks) is _Dict and not hooks and 8),
    'torch._utils _rebuild_tensor': _tensor_bytes,
    'torch._utils _rebuild_tensor_v2': _tensor_bytes,
    **dict.fromkeys(SCALARS, lambda dtype, data: _is_number(dtype, data) and 8),
}


def _may_be_set(target, state):
    if type(target) is _Call and target.name == 'numpy dtype':
        return type(state) is tuple and state[:2] in ((3, '<'), (3, '|'), (3, '=')) \
            and state[2:] == (None, None, None, -1, -1, 0)
    if type(target) is _Dict:
        return type(state) is _Dict and list(state) == ['_metadata']
    # A name with underscores could replace an object's methods.
    return target.name == 'argparse Namespace' and type(state) is _Dict \
        and all(type(name) is str and not name.startswith('__') for name in state)


def _parts(value):
    """(bytes of its own, values inside) of a list, dict, call, text or name."""
    kind, inside = type(value), []
    if kind in (list, tuple):
        return 0, value
    if kind is str:
        return len(value.encode('utf-8')), ()  # raises for half a character, which nothing could print
    if kind is _Name:
        require(value.text in _DTYPES, 'it holds %s itself' % value.text.replace(' ', '.'))
        return 8, ()
    require(kind in (_Dict, _Call), 'it holds %s' % kind.__name__.strip('_'))
    if kind is _Dict:
        size, inside = 0, [value, value.values()]
    else:
        size = value.name in _CALLS and _CALLS[value.name](*value.arguments)
        require(size, 'it calls %s as no weights file does' % value.name.replace(' ', '.'))
        inside = [value.arguments['_rebuild_tensor' in value.name:]]  # all but the storage
    if value.state is not None:
        require(_may_be_set(value, value.state), 'it sets the state of an object')
        inside.append([value.state])
    return size, itertools.chain(*inside)


def count_nodes(value, known, depth=0):
    """(values, bytes, height) of what a pickle holds, as a walk finds it that comes past what is shared each time anew.

    Args:
        known (dict): the results for values that were met before, by id.

    Raises:
        UnsafeFileError: it holds anything but tensors and plain values, or such a walk would take too long.
    """
    if type(value) in (type(None), bool, int, float):
        require(type(value) is not int or abs(value) < 2 ** 64, 'it holds a number of more than 64 bits')
        return 1, 8, 0
    if id(value) not in known:
        require(depth <= MAX_DEPTH, 'it is nested more than %d deep' % MAX_DEPTH)
        nodes, height, (size, inside) = 1, 0, _parts(value)
        for each in inside:
            more = count_nodes(each, known, depth + 1)
            nodes, size, height = nodes + more[0], size + more[1], max(height, more[2] + 1)
            require(nodes <= MAX_NODES, 'it holds more than %d values, or some of them again and again' % MAX_NODES)
        known[id(value)] = nodes, size, height
    require(depth + known[id(value)][2] <= MAX_DEPTH, 'it is nested more than %d deep' % MAX_DEPTH)
    return known[id(value)]


# ---- the file

def _zip_records(file, size):
    """{name: (offset, length, checksum)} of a zip archive as torch.save writes it, read as PyTorch reads it.

    Python's zipfile forgives more: text before the archive, a comment behind it, names that differ in case only. What
    the two took for different things would escape the check.
    """
    def part(offset, form):
        file.seek(offset)
        return struct.unpack(form, file.read(struct.calcsize(form)))

    def demand(condition, reason='its directory is damaged'):
        require(condition, reason, ValueError)

    end = size - 22
    signature, _, count, length, start, comment = part(end, '<4s6sH2LH')
    demand(signature == b'PK\5\6' and not comment, 'its end is missing')
    if end >= 76 and part(end - 20, '<4s')[0] == b'PK\6\7':
        end -= 76
        signature, _, count, length, start, _, _, found, _ = part(end, '<4s28s3Q4sLQL')
        demand(signature == b'PK\6\6' and found == end, 'its directory is not at its end')
    demand(start + length == end and length <= MAX_DIRECTORY, 'its directory is not at its end, or too large')
    directory, = part(start, '%ds' % length)
    records, taken, at = {}, [(start, end)], 0
    for _ in range(count):
        signature, flags, method, _, crc, packed, length, name_length, extra_length, comment_length, _, offset = \
            struct.unpack_from('<4s4x2H4s3L3H8sL', directory, at)
        name, extra = struct.unpack_from('%ds%ds' % (name_length, extra_length), directory, at + 46)
        at += 46 + name_length + extra_length + comment_length
        if 0xffffffff in (packed, length, offset):  # then, and only then, those are in 64 bits, in this order
            tag, *wide = struct.unpack_from('<2s2x%dQ' % [packed, length, offset].count(0xffffffff), extra)
            demand(tag == b'\1\0')
            length, packed, offset = (wide.pop(0) if each == 0xffffffff else each for each in (length, packed, offset))
        demand(signature == b'PK\1\2' and b'\0' not in name)
        require(not method and packed == length and not flags & ~0x808,
                'its record %s is compressed or encrypted, as torch.save never does'
                % escape_text(name.decode('utf-8', 'replace'))[:100])
        signature, local_name_length, local_extra_length = part(offset, '<4s22x2H')
        demand(signature == b'PK\3\4' and file.read(name_length) == name)
        data = offset + 30 + local_name_length + local_extra_length
        taken.append((offset, data + length))
        records[name.lower().decode('utf-8', 'backslashreplace')] = data, length, crc
    demand(at == len(directory) and len(records) == count, 'its directory is damaged, or names a record twice')
    taken.sort()
    require(all(before[1] <= after[0] for before, after in zip(taken, taken[1:])), 'records in it lie over one another')
    return records


def _scan_zip(file, size):
    records = _zip_records(file, size)
    folder = next(iter(records), '').partition('/')[0] + '/'
    require(all(name.startswith(folder) for name in records), 'its records are not in one folder', ValueError)
    inside = {name[len(folder):]: record for name, record in records.items()}
    require('constants.pkl' not in inside and not any(name.startswith('code/') for name in inside),
            'it is a TorchScript archive, a program')
    offset, length, crc = inside['data.pkl']
    require(length <= MAX_PICKLE, 'its pickle has %d bytes' % length)
    file.seek(offset)
    pickled = file.read(length)
    require(crc in (0, zlib.crc32(pickled)), 'its data.pkl does not match its checksum', ValueError)  # 0: left out
    sizes = {name[len('data/'):]: record[1] for name, record in inside.items() if name.startswith('data/')}
    return PickleScanner(io.BytesIO(pickled), {}, sizes).load()


def _scan_legacy(file, size):
    """What torch.save wrote up to PyTorch 1.5: five pickles, the last with the keys of the storages behind it."""
    file.seek(0)
    head, storages = io.BytesIO(file.read(MAX_PICKLE)), {}

    def load():
        return PickleScanner(head, storages).load()

    require(load() == torch.serialization.MAGIC_NUMBER, 'it is a pickle, and not one of torch.save', ValueError)
    require(load() == torch.serialization.PROTOCOL_VERSION, 'its version is unknown', ValueError)
    with contextlib.suppress(tarfile.TarError):
        tarfile.TarInfo.frombuf(head.getvalue()[:512], 'utf-8', 'surrogateescape')
        raise UnsafeFileError('it is a tar archive as well')  # torch.load would unpack that
    system, content, keys = load(), load(), load()
    require(type(keys) is list and all(type(key) is str for key in keys) and sorted(keys) == sorted(storages),
            'its list of storages is not of those that it uses', ValueError)
    offset = head.tell()
    for key in keys:
        file.seek(offset)
        numel, = struct.unpack('<q', file.read(8))
        offset += 8 + storages[key].numel * storages[key].itemsize
        require(numel == storages[key].numel and offset <= size, 'storage %s is not whole' % key, ValueError)
    return system, content


def scan(file, size, start):
    """Scan an open file of torch.save, `size` bytes long, whose first bytes are `start`.

    Raises:
        UnsafeFileError: it holds anything but tensors and plain values, or more of them than its bytes can be.
        ValueError and others: it is damaged.
    """
    require(start[:4] == b'PK\3\4' or start[:1] == b'\x80', 'it starts like none', ValueError)
    content = _scan_zip(file, size) if start[:1] == b'P' else _scan_legacy(file, size)
    # What one file holds is there once, or a few times: as 'model' and as 'module', say.
    require(count_nodes(content, {})[1] <= 16 * size + (64 << 20), 'it holds the same values again and again')
