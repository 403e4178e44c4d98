"""Goes through a weights file without making anything of it, and refuses what no weights file needs.

Nothing is looked up, called or allocated on the file's word. It is the same with every PyTorch, whose own readers
differ in what they believe; what has passed here holds no surprise for them.
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

from errors import escape_text

MAX_PICKLE = 64 << 20  # bytes of names and plain values; the largest BEiT's checkpoint, optimizer and all, has 1 MiB
MAX_DIRECTORY = 16 << 20  # bytes of a zip archive's directory: 200,000 tensors
MAX_STEPS = 2 * 10 ** 6  # opcodes of its pickles
MAX_NODES = 10 ** 6  # values in a file, each counted as often as a walk through the content comes past it
MAX_DEPTH = 100


class Refused(Exception):
    """A file holds what no weights file needs; the text says what, after 'refused, because'."""


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
    'torch._utils _rebuild_parameter': torch._utils._rebuild_parameter,
    'torch._utils _rebuild_tensor': torch._utils._rebuild_tensor,
    'torch._utils _rebuild_tensor_v2': torch._utils._rebuild_tensor_v2,
}
ALLOWED.update(_DTYPES)
ALLOWED.update((name, np.float64().__reduce__()[0]) for name in SCALARS)
ALLOWED.update((name, getattr(torch, name.split()[1])) for name in _STORAGES if hasattr(torch, name.split()[1]))


# What the dry run has in place of what it doesn't make.
_Name = collections.namedtuple('_Name', 'text')
_Storage = collections.namedtuple('_Storage', 'numel itemsize')
_Tensor = collections.namedtuple('_Tensor', 'bytes hooks')
_NumpyType = collections.namedtuple('_NumpyType', 'itemsize')
_Other = collections.namedtuple('_Other', 'what')  # a size, a device, a NumPy scalar


def _whole(number):
    return type(number) is int and 0 <= number < 2 ** 63


def _ordered_dict(pairs=()):
    if type(pairs) not in (tuple, list) or any(type(pair) not in (tuple, list) or len(pair) != 2 for pair in pairs):
        raise Refused('it makes a dict of what is not pairs')
    return collections.OrderedDict(with_plain_keys(pairs))


def _encoded(text, encoding):
    if type(text) is not str or encoding not in ('latin1', 'latin-1'):
        raise Refused('it encodes what is not the text of bytes')
    return text.encode('latin1')


def _numpy_type(code, _align, _copy):
    if type(code) is not str or not re.match(r'(f[248]|[iu][1248]|b1)\Z', code):
        raise Refused('it holds a NumPy value that is not a number')
    return _NumpyType(int(code[1]))


def _numpy_scalar(kind, data):
    if type(kind) is not _NumpyType or type(data) is not bytes or len(data) != kind.itemsize:
        raise Refused('it holds a NumPy value that is not a number')
    return _Other('NumPy scalar')


def _size(numbers):
    if type(numbers) is not tuple or not all(map(_whole, numbers)):
        raise Refused('it holds a torch.Size of what is not whole numbers')
    return _Other('torch.Size')


def _device(kind, index=0):
    if type(kind) is not str or not _whole(index):
        raise Refused('it holds a torch.device that is none')
    return _Other('torch.device')


def _tensor(storage, offset, size, stride, requires_grad=False, hooks=None):
    if type(storage) is not _Storage or type(size) is not tuple or type(stride) is not tuple \
            or len(size) != len(stride) or len(size) > 64 or type(requires_grad) is not bool \
            or not (hooks is None or type(hooks) is collections.OrderedDict) \
            or not all(map(_whole, (offset,) + size + stride)):
        raise Refused('it holds a tensor whose shape is none')
    numel, last = 1, offset
    for length, step in zip(size, stride):
        numel *= length
        last += (length - 1) * step
    # No element may lie outside the storage or, as one that is expanded would, be there twice and more.
    if numel > storage.numel or numel and last >= storage.numel or max(size, default=0) >= 2 ** 40:
        raise Refused('it holds a tensor of shape (%s) and only %d values for it'
                       % (', '.join(map(str, size[:8])), storage.numel))
    return _Tensor(numel * storage.itemsize, (hooks,))


def _parameter(tensor, requires_grad, hooks):
    if type(tensor) is not _Tensor or type(requires_grad) is not bool or type(hooks) is not collections.OrderedDict:
        raise Refused('it holds a parameter that is no tensor')
    return _Tensor(tensor.bytes, tensor.hooks + (hooks,))


# Wrong numbers of arguments end in a TypeError, and so in the message about damaged files.
_CALLS = {
    '_codecs encode': _encoded,
    'collections OrderedDict': _ordered_dict,
    'numpy dtype': _numpy_type,
    'torch Size': _size,
    'torch device': _device,
    'torch._utils _rebuild_parameter': _parameter,
    'torch._utils _rebuild_tensor': _tensor,
    'torch._utils _rebuild_tensor_v2': _tensor,
}
_CALLS.update(dict.fromkeys(SCALARS, _numpy_scalar))


def with_plain_keys(pairs):
    """The pairs, if their keys are text that can be shown in a line, or whole numbers; none can be made to collide."""
    for key, _ in pairs:
        if not (type(key) is str and len(key) <= 1000 and key.isprintable()
                or key is None or type(key) in (bool, int) and abs(key) < 2 ** 63):
            raise Refused('it holds a dict with a key that is not a name or whole number')
    return pairs


def refers_to(name):
    return 'it refers to %s' % escape_text(name.replace(' ', '.'))[:100]


def _foreign_name(file):
    """'it refers to …', with the first name in a pickle that a weights file has no use for; '' where there's none."""
    texts = []
    for opcode, argument, _ in itertools.islice(pickletools.genops(file), MAX_STEPS):
        name = ' '.join(texts[-2:]) if opcode.name == 'STACK_GLOBAL' else argument
        if opcode.name in ('GLOBAL', 'INST', 'STACK_GLOBAL') and name not in ALLOWED:
            return refers_to(name)
        if isinstance(argument, str):
            texts.append(argument)
    return ''


class _DryRun:
    """Goes through a pickle as an unpickler does, but looks nothing up, calls nothing and makes no tensor.

    It takes the opcodes that torch.save writes, the names of ALLOWED with arguments such as torch.save gives them,
    and storages as long as their bytes in the file. So the load that follows meets nothing unforeseen, whichever the
    PyTorch; that of 1.5 believes a file about its sizes.
    """

    def __init__(self, storage_bytes=None):
        self.storage_bytes = storage_bytes  # by key; None where the sizes stand behind the pickle
        self.storages = {}
        self.steps = 0

    def load(self, file):
        """What the pickle that starts here holds, with stand-ins for its tensors. Leaves `file` behind its end."""
        start = file.tell()
        self.stack, self.below, self.memo = [], [], {}
        for opcode, argument, _ in pickletools.genops(file):
            self.count(1)
            step = getattr(self, 'op_' + opcode.name.lower(), None)
            if step is None:
                file.seek(start)
                raise Refused(_foreign_name(file) or 'it uses the pickle opcode %s' % opcode.name)
            step(argument)
        return self.stack.pop()

    def count(self, steps):
        self.steps += steps
        if self.steps > MAX_STEPS:
            raise Refused('its pickle takes more than %d steps' % MAX_STEPS)

    def push(self, value):
        self.stack.append(value)

    op_binint = op_binint1 = op_binint2 = op_long1 = op_binfloat = op_binunicode = push

    def op_short_binstring(self, text):  # written by Python 2
        text.encode('ascii')
        self.push(text)

    def op_proto(self, _):
        pass

    op_stop = op_proto

    def op_none(self, _):
        self.push(None)

    def op_newtrue(self, _):
        self.push(True)

    def op_newfalse(self, _):
        self.push(False)

    def op_empty_list(self, _):
        self.push([])

    def op_empty_dict(self, _):
        self.push({})

    def op_mark(self, _):
        self.below.append(self.stack)
        self.stack = []

    def since_mark(self):
        items, self.stack = self.stack, self.below.pop()
        return items

    def op_tuple(self, _):
        self.push(tuple(self.since_mark()))

    def join(self, count):
        self.push(tuple([self.stack.pop() for _ in range(count)][::-1]))

    def op_empty_tuple(self, _):
        self.join(0)

    def op_tuple1(self, _):
        self.join(1)

    def op_tuple2(self, _):
        self.join(2)

    def op_tuple3(self, _):
        self.join(3)

    def op_binput(self, index):
        if index > self.steps:  # an unpickler makes room for all the lower ones too
            raise Refused('its pickle memo has gaps')
        self.memo[index] = self.stack[-1]

    op_long_binput = op_binput

    def op_binget(self, index):
        self.push(self.memo[index])

    op_long_binget = op_binget

    def op_append(self, _):
        self.extend([self.stack.pop()])

    def op_appends(self, _):
        self.extend(self.since_mark())

    def extend(self, items):
        if type(self.stack[-1]) is not list:
            raise Refused('it appends to what is not a list')
        self.stack[-1].extend(items)

    def op_setitem(self, _):
        value = self.stack.pop()
        self.update([(self.stack.pop(), value)])

    def op_setitems(self, _):
        items = self.since_mark()
        if len(items) % 2:
            raise ValueError('a dict with a key that has no value')
        self.update(list(zip(items[::2], items[1::2])))

    def update(self, pairs):
        if type(self.stack[-1]) not in (dict, collections.OrderedDict):
            raise Refused('it sets the items of what is not a dict')
        self.stack[-1].update(with_plain_keys(pairs))

    def op_global(self, name):
        if name not in ALLOWED:
            raise Refused(refers_to(name))
        self.push(_Name(name))

    def op_reduce(self, _):
        arguments, function = self.stack.pop(), self.stack.pop()
        if type(function) is not _Name or type(arguments) is not tuple or function.text not in _CALLS:
            raise Refused('it calls what is not to be called')
        # A call copies what it is given, and a few bytes give it the same things again.
        self.count(sum(len(each) for each in arguments if type(each) in (str, list, tuple)))
        self.push(_CALLS[function.text](*arguments))

    def op_newobj(self, _):
        arguments, made = self.stack.pop(), self.stack.pop()
        if type(made) is not _Name or made.text != 'argparse Namespace' or arguments != ():
            raise Refused('it makes an object of its own')
        self.push(argparse.Namespace())

    def op_build(self, _):
        state, target = self.stack.pop(), self.stack[-1]
        if type(target) is _NumpyType:
            known = type(state) is tuple and state[:1] == (3,) and state[2:] == (None, None, None, -1, -1, 0) \
                and state[1] in ('<', '|', '=')
        else:  # names with underscores could replace an object's methods
            known = type(state) is dict and (
                type(target) is collections.OrderedDict and list(state) == ['_metadata']
                or type(target) is argparse.Namespace and all(
                    type(name) is str and not name.startswith('__') for name in state))
        if not known:
            raise Refused('it sets the state of an object')
        if type(state) is dict:
            self.count(len(state))
            vars(target).update(state)

    def op_binpersid(self, _):
        kind, storage, key, location, numel, *view = self.stack.pop()
        if kind != 'storage' or view not in ([], [None]) or type(storage) is not _Name \
                or storage.text not in _STORAGES or type(location) is not str or type(key) is not str \
                or not re.match(r'[0-9]{1,30}\Z', key) or not _whole(numel):
            raise Refused('it refers to something beside it that is not a storage')
        found = _Storage(numel, _STORAGES[storage.text])
        if self.storages.setdefault(key, found) != found:
            raise Refused('it gives storage %s two sizes' % key)
        if self.storage_bytes is not None and self.storage_bytes[key] != found.numel * found.itemsize:
            raise ValueError('storage %s has %d bytes where %d values of %d bytes should be'
                             % ((key, self.storage_bytes[key]) + found))
        self.push(found)


def _weigh(value, known, depth=0):
    """(values, bytes, height) of what a dry run found, for a walk that comes past what is shared each time anew.

    Raises:
        Refused: it holds anything but tensors and plain values, or such a walk would take too long.
    """
    kind = type(value)
    if kind in (list, tuple):
        inside = value
    elif kind in (dict, collections.OrderedDict):
        inside = itertools.chain(value, value.values(), getattr(value, '__dict__', {}).values())
    elif kind is argparse.Namespace:
        inside = itertools.chain(vars(value), vars(value).values())
    else:
        return 1, _leaf_bytes(value), 0
    if id(value) not in known:
        values, size, height = 1, 0, 0
        if depth > MAX_DEPTH:
            raise Refused('it is nested more than %d deep' % MAX_DEPTH)
        for each in inside:
            more = _weigh(each, known, depth + 1)
            values, size, height = values + more[0], size + more[1], max(height, more[2])
            if values > MAX_NODES:
                raise Refused('it holds more than %d values, or some of them again and again' % MAX_NODES)
        known[id(value)] = values, size, height + 1
    if depth + known[id(value)][2] > MAX_DEPTH + 1:
        raise Refused('it is nested more than %d deep' % MAX_DEPTH)
    return known[id(value)]


def _leaf_bytes(value):
    kind = type(value)
    if kind is _Tensor:
        if any(value.hooks):
            raise Refused('it holds a tensor with hooks')
        return value.bytes
    if kind is str:
        return len(value.encode('utf-8'))  # raises for half a character, which nothing could print
    if kind is bytes:
        return len(value)
    if kind is int and abs(value) >= 2 ** 64:
        raise Refused('it holds a number of more than 64 bits')
    if kind is _Name and value.text not in _DTYPES:
        raise Refused(refers_to(value.text))
    if kind not in (type(None), bool, int, float, _Name, _Other):
        raise Refused('it holds %s' % kind.__name__.strip('_'))
    return 8


def _check_content(content, size):
    # What one file holds is there once, or a few times: as 'model' and as 'module', say.
    if _weigh(content, {})[1] > 16 * size + (64 << 20):
        raise Refused('it holds the same values again and again')


def _zip_records(file, size):
    """{name: (offset, length)} of a zip archive as torch.save writes it, read as PyTorch reads it.

    Python's zipfile forgives more: text before the archive, a comment behind it, names that differ in case only. What
    the two took for different things would escape the check.
    """
    def part(offset, form):
        file.seek(offset)
        return struct.unpack(form, file.read(struct.calcsize(form)))

    end = size - 22
    signature, _, _, _, count, length, start, comment = part(end, '<4s4H2LH')
    if signature != b'PK\5\6' or comment:
        raise ValueError('its end is missing')
    if end >= 76 and part(end - 20, '<4s')[0] == b'PK\6\7':
        end -= 76
        if part(end + 56, '<4sLQL')[2] != end:
            raise ValueError('its directory is not at its end')
        signature, _, _, _, _, _, _, count, length, start = part(end, '<4sQ2H2L4Q')
        if signature != b'PK\6\6':
            raise ValueError('its directory is not at its end')
    if start + length != end or length > MAX_DIRECTORY:
        raise ValueError('its directory is not at its end, or too large')
    file.seek(start)
    directory = file.read(length)
    records, taken, at = {}, [], 0
    for _ in range(count):
        (signature, _, _, flags, method, _, _, crc, packed, length, name_length, extra_length, comment_length, _, _, _,
         offset) = struct.unpack_from('<4s6H3L5H2L', directory, at)
        name = directory[at + 46:at + 46 + name_length]
        extra = directory[at + 46 + name_length:at + 46 + name_length + extra_length]
        at += 46 + name_length + extra_length + comment_length
        if 0xffffffff in (packed, length, offset):  # then, and only then, those are in 64 bits, in this order
            wide = iter(struct.unpack_from('<HH%dQ' % [packed, length, offset].count(0xffffffff), extra)[2:])
            length, packed, offset = (next(wide) if each == 0xffffffff else each for each in (length, packed, offset))
            if extra[:2] != b'\1\0':
                raise ValueError('its directory is damaged')
        if signature != b'PK\1\2' or b'\0' in name:
            raise ValueError('its directory is damaged')
        if method or packed != length or flags & ~0x808:
            raise Refused('its record %s is compressed or encrypted, as torch.save never does'
                           % escape_text(name.decode('utf-8', 'replace'))[:100])
        local = part(offset, '<4s5H3L2H')
        if local[0] != b'PK\3\4' or file.read(name_length) != name:
            raise ValueError('its directory is damaged')
        data = offset + 30 + local[-2] + local[-1]
        taken.append((offset, data + length))
        records[name.lower().decode('utf-8', 'backslashreplace')] = data, length, crc
    if at != len(directory) or len(records) != count:
        raise ValueError('its directory is damaged, or names a record twice')
    taken.append((start, end))
    if any(here[1] > following[0] for here, following in zip(sorted(taken), sorted(taken)[1:])):
        raise Refused('records in it lie over one another')
    return records


def _dry_run_of_zip(file, size):
    records = _zip_records(file, size)
    folder = next(iter(records), '').partition('/')[0] + '/'
    if not all(name.startswith(folder) for name in records):
        raise ValueError('its records are not in one folder')
    inside = {name[len(folder):]: place for name, place in records.items()}
    if 'constants.pkl' in inside or any(name.startswith('code/') for name in inside):
        raise Refused('it is a TorchScript archive, a program')
    offset, length, crc = inside['data.pkl']
    if length > MAX_PICKLE:
        raise Refused('its pickle has %d bytes' % length)
    file.seek(offset)
    pickled = file.read(length)
    if crc not in (0, zlib.crc32(pickled)):  # torch.save can be told to leave it out
        raise ValueError('its data.pkl does not match its checksum')
    run = _DryRun({name[len('data/'):]: place[1] for name, place in inside.items() if name.startswith('data/')})
    return run.load(io.BytesIO(pickled))


def _dry_run_of_legacy(file, size):
    """Of what torch.save wrote up to PyTorch 1.5: five pickles, the last with the keys of the storages behind it."""
    file.seek(0)
    head = io.BytesIO(file.read(MAX_PICKLE))
    magic = pickle.dumps(torch.serialization.MAGIC_NUMBER, protocol=2)
    if head.read(len(magic)) != magic:
        head.seek(0)
        foreign = _foreign_name(head)
        if foreign:
            raise Refused(foreign)
        raise ValueError('it is a pickle, and not one of torch.save')
    run = _DryRun()
    if run.load(head) != torch.serialization.PROTOCOL_VERSION:
        raise ValueError('its version is unknown')
    with contextlib.suppress(tarfile.TarError):
        tarfile.TarInfo.frombuf(head.getvalue()[:512], 'utf-8', 'surrogateescape')
        raise Refused('it is a tar archive as well')  # torch.load would unpack that
    run.load(head)
    content, keys = run.load(head), run.load(head)
    if type(keys) is not list or any(type(key) is not str for key in keys) or sorted(keys) != sorted(run.storages):
        raise ValueError('its list of storages is not of those that it uses')
    offset = head.tell()
    for key in keys:
        storage = run.storages[key]
        file.seek(offset)
        numel, = struct.unpack('<q', file.read(8))
        offset += 8 + storage.numel * storage.itemsize
        if numel != storage.numel or offset > size:
            raise ValueError('storage %s is not there, or not whole' % key)
    return content

def check(file, size, start):
    """Go through an open file of torch.save, `size` bytes long, whose first bytes are `start`.

    Raises:
        Refused: it holds anything but tensors and plain values, or more of them than its bytes can be.
        ValueError and others: it is damaged.
    """
    if start[:4] == b'PK\3\4':
        content = _dry_run_of_zip(file, size)
    elif start[:1] == b'\x80':
        content = _dry_run_of_legacy(file, size)
    else:
        raise ValueError('it starts like none')
    _check_content(content, size)
