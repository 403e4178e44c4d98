"""A hostile file or server causes one error line: it runs no code, allocates no memory, and leaves no file.

The hostile files are written opcode by opcode; hypothesis damages valid files for the others. BEIT_SOAK=1 tries ten
times as many.
"""

import argparse
import collections
import copyreg
import hashlib
import http.server
import io
import itertools
import json
import math
import os
import pickle
import re
import ssl
import struct
import subprocess
import sys
import textwrap
import threading
import time
import types
import zipfile

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

import flags
import modeling_finetune
from beit.checkpoint import comparison, discovery, pretrained, training_state
from beit.distributed import process_group
from beit.errors import UserError, one_line
from beit.files import download, untrusted_pickle, weights_file
from beit.training import loss_scaler
from helpers import ROOT, cannot_run

SOAK = 10 if os.environ.get('BEIT_SOAK') == '1' else 1
TRIED = collections.Counter()


def fuzz(examples):
    """Settings for hypothesis: the same examples in every run, and failed examples are not shrunk."""
    return settings(max_examples=examples * SOAK, derandomize=True, deadline=None, database=None,
                    phases=[Phase.generate], suppress_health_check=list(HealthCheck))


def attempt(data, path, what):
    """(content, '') of these bytes, or (None, line) if they are refused. Any other error fails."""
    TRIED[what] += 1
    with open(path, 'wb') as file:
        file.write(data)
    start = time.monotonic()
    try:
        return weights_file.load_weights_file(path, '--finetune'), ''
    except UserError as error:
        line = str(error)
        assert line.startswith('--finetune %s: ' % path) and line.isprintable() and len(line) < len(path) + 300, line
        assert re.search('refused, because |not a weights file, or damaged|safetensors|bfloat16', line), line
        return None, line
    finally:
        assert time.monotonic() - start < 20


def read(data, path):
    """The content of a good file."""
    content, line = attempt(data, path, 'good')
    assert not line, line
    return content


def refusal(data, path, what='hostile'):
    """The error line of a refused file."""
    content, line = attempt(data, path, what)
    assert content is None and line
    return line


# ---- pickles written by hand

def text(string):
    encoded = string.encode('utf-8', 'surrogatepass')
    return b'X' + struct.pack('<I', len(encoded)) + encoded


def number(value):
    encoded = pickle.encode_long(value)
    return b'\x8a' + bytes([len(encoded)]) + encoded


def name(module, attribute):
    return ('c%s\n%s\n' % (module, attribute)).encode()


def tuple_of(*parts):
    return b'(' + b''.join(parts) + b't'


def numbers(*values):
    return tuple_of(*map(number, values))


def dict_of(*keys_and_values):
    return b'}(' + b''.join(keys_and_values) + b'u'


def call(function, *arguments):
    return function + tuple_of(*arguments) + b'R'


ORDERED = call(name('collections', 'OrderedDict'))
REBUILD = name('torch._utils', '_rebuild_tensor_v2')
VIEW = b'<none in the older format>'


def storage(numel=4, key='0', kind='FloatStorage'):
    return tuple_of(text('storage'), name('torch', kind), text(key), text('cpu'), number(numel), VIEW) + b'Q'


FOUR, ONE, ZERO = numbers(4), numbers(1), number(0)


def tensor(size=FOUR, stride=ONE, offset=ZERO, held=None, hooks=ORDERED):
    return call(REBUILD, held or storage(), offset, size, stride, b'\x89', hooks)


def pickled(body):
    return b'\x80\x02' + body + b'.'


def as_zip(body, records=(('data/0', bytes(16)),), compression=zipfile.ZIP_STORED, pickle_name='data.pkl'):
    file = io.BytesIO()
    with zipfile.ZipFile(file, 'w', compression) as archive:
        for record, data in ((pickle_name, pickled(body.replace(VIEW, b''))), ('version', b'3\n')) + tuple(records):
            archive.writestr(zipfile.ZipInfo('archive/' + record), data, compression)  # the same at any time of day
    return file.getvalue()


def as_legacy(body, data=b'\4' + bytes(7 + 16), sys_info=b'}'):
    keys = b'](' + b''.join(text('0') for _ in range(VIEW in body)) + b'e'
    return b''.join(map(pickled, (number(torch.serialization.MAGIC_NUMBER), number(1001), sys_info,
                                  body.replace(VIEW, b'N'), keys))) + (data if VIEW in body else b'')


def as_pickle(body):
    return pickled(body.replace(VIEW, b'N'))


def model_of(body):
    """A weights file's outermost dict with `body` instead of the weights."""
    return dict_of(text('model'), body)


def test_good_files_written_by_hand_are_read(tmp_path):
    """Otherwise the files below could be refused for another reason."""
    body = dict_of(text('weight'), tensor(numbers(2, 2), numbers(2, 1)), text('epoch'), number(3), text('a'), b'N',
                   text('args'), name('argparse', 'Namespace') + b')\x81' + dict_of(text('lr'), b'G' + bytes(8)) + b'b')
    for data in (as_zip(body), as_legacy(body)):
        content = read(data, str(tmp_path / 'w.pth'))
        assert torch.equal(content['weight'], torch.zeros(2, 2))
        assert content['epoch'] == 3 and content['a'] is None and content['args'] == argparse.Namespace(lr=0.)


# ---- known tricks

COMMAND = 'touch MARKER'
RUN = text(COMMAND)


def called(module, attribute, *arguments):
    return call(name(module, attribute), *(arguments or (RUN,)))


def stack_global(module, attribute, *arguments):
    return text(module) + text(attribute) + b'\x93' + tuple_of(*(arguments or (RUN,))) + b'R'


PYTHON = text('__import__("os").system("%s")' % COMMAND)
INNER = b'cos\nsystem\n(S\'%s\'\ntR.' % COMMAND.encode()
# {module and name: arguments}: each is refused, and the line has the name.
CALLED = {
    **dict.fromkeys((
        'os system', 'posix system', 'nt system', 'os popen', 'subprocess getoutput', 'marshal loads',
        'webbrowser open', 'argparse _os.system', 'collections _sys', 'collections OrderedDict.__init__.__globals__',
        'torch _utils._rebuild_tensor_v2', 'torch serialization.os.system', 'code InteractiveInterpreter'), (RUN,)),
    **dict.fromkeys((
        'builtins eval', 'builtins exec', '__builtin__ eval', 'timeit timeit', 'cProfile run', 'pdb run'), (PYTHON,)),
    **dict.fromkeys((
        'runpy run_path', 'shutil rmtree', 'numpy load', 'torch load', 'torch.serialization load', 'torch.jit load',
        'torch.ops load_library'), (text('MARKER'),)),
    'os execvp': (text('touch'), tuple_of(text('touch'), text('MARKER'))),
    'subprocess Popen': (tuple_of(text('touch'), text('MARKER')),), 'pty spawn': (tuple_of(text('touch'), RUN),),
    'builtins compile': (PYTHON, text(''), text('exec')), 'builtins open': (text('MARKER'), text('w')),
    'builtins __import__': (text('antigravity'),), 'importlib import_module': (text('antigravity'),),
    'runpy _run_code': (PYTHON, b'}'), 'types CodeType': (number(0),), 'types FunctionType': (b'N', b'}'),
    'ctypes CDLL': (text('libc.so.6'),), 'socket create_connection': (tuple_of(text('localhost'), number(9)),),
    'logging.config dictConfig': (b'}',), 'operator methodcaller': (text('system'), RUN),
    'functools reduce': (name('os', 'system'), tuple_of(RUN)), 'builtins map': (name('os', 'system'), tuple_of(RUN)),
    'copyreg _reconstructor': (name('os', 'system'),), 'copy_reg _reconstructor': (name('os', 'system'),),
    'copyreg __newobj__': (name('subprocess', 'Popen'), RUN),
    '_pickle loads': (called('_codecs', 'encode', text(INNER.decode()), text('latin1')),),
    'numpy.core.multiarray _reconstruct': (name('numpy', 'ndarray'), numbers(0)),
    'numpy.testing._private.utils runstring': (PYTHON, b'}'),
    'torch.storage _load_from_bytes': (called('_codecs', 'encode', text(INNER.decode()), text('latin1')),),
    'torch._utils _rebuild_device_tensor_from_numpy': (b'N', b'N', text('cpu'), b'\x89'),
    'torch._tensor _rebuild_from_type_v2': (name('os', 'system'), b'N', tuple_of(RUN), b'}'),
    'torch._utils _rebuild_parameter_with_state': (tensor(), b'\x89', ORDERED, b'}'),
    'torch._utils _rebuild_wrapper_subclass': (name('os', 'system'),),
    'torch.hub load': (text('MARKER'), text('x')),
    'torch.hub download_url_to_file': (text('https://localhost'), text('MARKER')),
    'torch.utils.cpp_extension load_inline': (text('x'), PYTHON),
    'torch FloatTensor': (number(2 ** 40),), 'torch zeros': (number(2 ** 40),),
}
# Other ways to call: (pickle, the name that the line must have).
NAMED = {
    'getattr': (call(called('builtins', 'getattr', called('builtins', '__import__', text('os')), text('system')), RUN),
                'builtins.getattr'),
    'attrgetter': (call(called('operator', 'attrgetter', text('system')), name('os', 'path')), 'operator.attrgetter'),
    'partial': (call(called('functools', 'partial', name('os', 'system')), RUN), 'functools.partial'),
    'a module': (name('torch.nn.modules.linear', 'Linear') + b')\x81' + dict_of(text('forward'), RUN) + b'b',
                 'torch.nn.modules.linear.Linear'),
    '__setstate__': (name('random', 'Random') + b')\x81' + tuple_of(b'N') + b'b', 'random.Random'),
    'INST': (b"(S'%s'\nios\nsystem\n" % COMMAND.encode(), 'os.system'),
    'OBJ': (b'(' + name('os', 'system') + RUN + b'o', 'os.system'),
    'STACK_GLOBAL': (stack_global('os', 'system'), 'os.system'),
    'STACK_GLOBAL, dotted': (stack_global('collections', 'OrderedDict.__init__.__globals__'),
                             'collections.OrderedDict.__init__.__globals__'),
    'protocol 4': (pickle.dumps(os.system, protocol=4)[2:-1] + tuple_of(RUN) + b'R', 'posix.system'),
    'after a harmless beginning': (dict_of(text('a'), tensor(), text('b'), called('os', 'system')), 'os.system'),
    'thrown away again': (called('os', 'system') + b'0N', 'os.system'),
    'only named': (name('os', 'system'), 'os.system'),
    'terminal codes': (called('os', '\x1b[2Jsystem'), r'os.\x1b[2Jsystem'),
    'a name without end': (called('os', 'x' * 10 ** 5), 'os.xxx'),
}
NAMED.update((each, (called(*each.split(' '), *arguments), each.replace(' ', '.')))
             for each, arguments in CALLED.items())
# Attacks that use only allowed names and opcodes.
TERABYTES = called('torch', 'FloatStorage', number(2 ** 40))
UNNAMED = {
    'EXT1': b'\x82\xf0' + tuple_of(RUN) + b'R',
    'a string called': call(RUN, RUN),
    'a tensor called': call(tensor(), RUN),
    'a storage type called': TERABYTES,
    'a dtype called': called('torch', 'float32', number(1)),
    'arguments that are no tuple': REBUILD + RUN + b'R',
    'a function as value': REBUILD,
    'a class as value': name('argparse', 'Namespace'),
    'a storage as value': storage(),
    'a call that an item of a list hides': b'](' + TERABYTES + b'e' + ZERO + b'Ns',
    'a call that a key hides': dict_of(text('a'), TERABYTES, text('a'), b'N'),
    'a call left on the stack': TERABYTES + b'N',
    'a call in a NumPy type': called('numpy.core.multiarray', 'scalar', called(
        'numpy', 'dtype', text('f8'), TERABYTES, ZERO), called('_codecs', 'encode', text('x' * 8), text('latin1'))),
    'a call in a state': name('argparse', 'Namespace') + b')\x81' + dict_of(text('a'), TERABYTES) + b'b',
    'a call in an argument': called('torch', 'device', TERABYTES),
    'a function with defaults': REBUILD + tuple_of(b'N', dict_of(text('__defaults__'), b')')) + b'b',
    'a class with methods': name('argparse', 'Namespace') + tuple_of(b'N', dict_of(text('__init__'), REBUILD)) + b'b',
    'a tensor with state': tensor() + tuple_of(storage(), number(0), numbers(2 ** 40), numbers(1)) + b'b',
    'an OrderedDict without items()': ORDERED + dict_of(text('items'), number(5)) + b'b',
    'a Namespace with __setstate__': name('argparse', 'Namespace') + b')\x81' + dict_of(
        text('__setstate__'), REBUILD) + b'b',
    'a Namespace with another class': name('argparse', 'Namespace') + b')\x81' + dict_of(
        text('__class__'), number(5)) + b'b',
    'a Namespace with a number as name': name('argparse', 'Namespace') + b')\x81' + dict_of(number(5), b'N') + b'b',
    'a Namespace with slots': name('argparse', 'Namespace') + b')\x81' + tuple_of(b'N', b'}') + b'b',
    'a Namespace of arguments': name('argparse', 'Namespace') + tuple_of(RUN) + b'\x81',
    'an object of a function': REBUILD + b')\x81',
    'a codec': called('_codecs', 'encode', text('AAAA'), text('base64')),
    'a NumPy object': called('numpy.core.multiarray', 'scalar', called('numpy', 'dtype', text('O8'), b'\x89', b'\x88'),
                             RUN),
    'a NumPy dtype of fields': called('numpy', 'dtype', text('f8'), b'\x89', b'\x88') + tuple_of(
        number(3), text('|'), b'N', tuple_of(text('f')), b'}', number(8), number(1), number(16)) + b'b',
    'a NumPy scalar that is short': called(
        'numpy.core.multiarray', 'scalar', called('numpy', 'dtype', text('f8'), b'\x89', b'\x88'),
        called('_codecs', 'encode', text('x'), text('latin1'))),
    'hooks': tensor(hooks=ORDERED + dict_of(number(0), RUN)),
    'hooks, filled later': tuple_of(tensor(hooks=ORDERED + b'q\x00'), b'h\x00' + b'(' + number(0) + RUN + b'u'),
    'a module that patches files': tuple_of(text('module'), name('argparse', 'Namespace'), text('MARKER'), RUN) + b'Q',
    'PERSID': b'Pstorage\n',
    'a storage of another place': tuple_of(text('storage'), name('torch', 'FloatStorage'), text('../../version'),
                                           text('cpu'), number(4), VIEW) + b'Q',
    'items of a tensor': tensor() + b'(' + number(0) + number(1) + b'u',
    'an append to a dict': b'}' + number(1) + b'a',
    'an append to a tensor': tensor() + number(1) + b'a',
    'memo gaps': b'Nr' + struct.pack('<I', 2 ** 32 - 1),
    'memo gaps in text': b'Np4294967295\n',
    'a memo never filled': b'h\x07',
    'a string of 4 GiB': b'X' + struct.pack('<I', 2 ** 32 - 1) + b'x',
    'a string of 2**60': b'\x8d' + struct.pack('<Q', 2 ** 60) + b'x',
    'bytes of 2**60': b'\x8e' + struct.pack('<Q', 2 ** 60) + b'x',
    'a bytearray of 2**60': b'\x96' + struct.pack('<Q', 2 ** 60) + b'x',
    'a number of 2 GiB': b'\x8b' + struct.pack('<i', 2 ** 31 - 1) + b'x',
    'a number of 250 bytes': b'\x8a\xfa' + b'x' * 250,
    'a number in text': b'I' + b'9' * 10 ** 6 + b'\n',
    'a frame of 2**60': b'\x95' + struct.pack('<Q', 2 ** 60) + b'N',
    'an empty stack': b'',
    'an empty stack to reduce': b'R',
    'no mark': b'u',
    'a thousand marks': b'(' * 1000,
    'lists that double': b']q\x00' + b''.join(b'](h%ch%ceq%c' % (i, i, i + 1) for i in range(100)),
    'tuples that double': b'Nq\x00' + b''.join(b'h%ch%c\x86q%c' % (i, i, i + 1) for i in range(100)),
    'dicts that double': b'}q\x00' + b''.join(b'}(' + text('a') + b'h%c' % i + text('b') + b'h%cuq%c' % (i, i + 1)
                                              for i in range(100)),
    'a tensor a million times': tensor() + b'q\x01' + b']' + b'(' + b'h\x01' * 10 ** 5 + b'eq\x02](' + b'h\x02' * 11
                                + b'e',
    'a long string a thousand times': text('x' * 10 ** 6) + b'q\x01](' + b'h\x01' * 1000 + b'e',
    'a list in itself': b']q\x00h\x00a',
    'a dict in itself': b'}q\x00' + text('a') + b'h\x00s',
    'a list 100,000 deep': b']' * 10 ** 5 + b'a' * (10 ** 5 - 1),
    'a shared list 60 deep, 60 deep': b'](' + b']' * 60 + b'a' * 59 + b'q\x01' + b']' * 60 + b'h\x01' + b'a' * 60
                                      + b'e',
    'tuples 100,000 deep': b'N' + b'\x85' * 10 ** 5,
    'a large dict made again and again': b'](' + b''.join(number(i) + b'N\x86' for i in range(10 ** 4)) + b'eq\x01' +
                                         (name('collections', 'OrderedDict') + b'h\x01\x85R0') * 10 ** 4,
    'a long text encoded again and again': text('x' * 10 ** 6) + b'q\x01' + text('latin1') + b'q\x02' +
                                           (name('_codecs', 'encode') + b'h\x01h\x02\x86R') * 10 ** 4,
    'a large state set again and again': dict_of(*(text(str(i)) + b'N' for i in range(10 ** 4))) + b'q\x01' + name(
        'argparse', 'Namespace') + b')\x81' + b'h\x01b' * 10 ** 4,
    'keys that are tuples': dict_of(numbers(-1, -2), b'N'),
    'keys that are not numbers': dict_of(b'G' + struct.pack('>d', math.nan), b'N'),
    'keys that are tensors': dict_of(tensor(), b'N'),
    'a key that cannot be hashed': dict_of(b']', b'N'),
    'a key with a line end': dict_of(text('two\nlines'), b'N'),
    'a key with terminal codes': dict_of(text('\x1b[2J'), b'N'),
    'a key with half a character': dict_of(text('\ud800'), b'N'),
    'a key of a megabyte': dict_of(text('x' * 10 ** 6), b'N'),
    'a value with half a character': text('\udc80'),
    'pairs that are none': called('collections', 'OrderedDict', number(5)),
    'a set': b'\x8f',
    'a pickle with a view': tuple_of(text('storage'), name('torch', 'FloatStorage'), text('0'), text('cpu'), number(4),
                                     tuple_of(text('1'), number(0), number(2 ** 40))) + b'Q',
}
WATCHED = ('os.system', 'os.exec', 'os.fork', 'os.posix_spawn', 'os.spawn', 'subprocess.Popen', 'pty.spawn',
           'shutil.rmtree', 'socket.connect', 'ctypes.dlopen', 'pickle.find_class', 'webbrowser.open')
SEEN = None


def watch(event, arguments):
    if SEEN is not None and (event in WATCHED or event == 'open' and arguments[1] and set(arguments[1]) & set('wax+')):
        SEEN.append((event, arguments))


@pytest.fixture(scope='module')
def auditing():
    sys.addaudithook(watch)  # an audit hook records executed code; it can't be removed


@pytest.fixture
def harmless(auditing, tmp_path, monkeypatch):
    """harmless(body): the refusals of a pickle in each of the three formats; none of them ran or loaded anything."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch, 'load', lambda *_, **__: pytest.fail('the file came as far as torch.load'))
    path = str(tmp_path / 'weights.pth')

    def refused(body):
        global SEEN
        lines = []
        for data in (as_zip(body), as_legacy(body), as_pickle(body),
                     as_legacy(b'N', sys_info=body.replace(VIEW, b'N'))):
            SEEN = []
            try:
                lines.append(refusal(data, path, 'tricks'))
            finally:
                seen, SEEN = SEEN, None
            assert [each for each in seen if each[1][:1] != (path,)] == []  # the test writes this file
        assert os.listdir(str(tmp_path)) == ['weights.pth']
        return lines
    return refused


@pytest.mark.parametrize('trick', NAMED)
def test_known_tricks_are_refused_by_name(harmless, trick):
    body, says = NAMED[trick]
    for outer in (body, model_of(body)):
        for line in harmless(outer):
            assert 'refused, because it refers to ' in line and says in line
            assert line.endswith('; a weights file holds tensors and plain values only')


def test_the_unpickler_needs_no_check_of_the_file_around_it(tmp_path):
    for body, _ in NAMED.values():
        data = as_pickle(body.replace(b'MARKER', str(tmp_path / 'ran').encode()))
        with pytest.raises(untrusted_pickle.UnsafeFileError, match='it refers to '):
            untrusted_pickle.Unpickler(io.BytesIO(data), len(data), {}).load()
    assert os.listdir(str(tmp_path)) == []


# ---- absurd shapes and zip bombs

SHAPES = {
    '2**50 elements': tensor(numbers(2 ** 25, 2 ** 25), numbers(2 ** 25, 1)),
    '2**50 elements of an expanded one': tensor(numbers(2 ** 25, 2 ** 25), numbers(0, 0)),
    '10**12 by a stride of 0': tensor(numbers(10 ** 12), numbers(0)),
    'a hundred times the first': tensor(numbers(100), numbers(0)),
    '5 of 4': tensor(numbers(5)),
    '4 from the second': tensor(offset=number(1)),
    'a stride too far': tensor(numbers(2, 2), numbers(3, 1)),
    'a negative size': tensor(numbers(-4)),
    'two negative sizes': tensor(numbers(-2, -2), numbers(1, 1)),
    'a negative stride': tensor(stride=numbers(-1)),
    'a negative offset': tensor(offset=number(-4)),
    'an offset of 2**62': tensor(offset=number(2 ** 62)),
    'a size of 2**64': tensor(numbers(2 ** 64)),
    'none of 2**62': tensor(numbers(0, 2 ** 62), numbers(1, 1)),
    '100 dimensions': tensor(numbers(*[1] * 100), numbers(*[1] * 100)),
    'a stride missing': tensor(numbers(2, 2)),
    'a size in text': tensor(tuple_of(text('4'))),
    'a size that is true': tensor(tuple_of(b'\x88')),
    'a size that is a number': tensor(number(4)),
    'a size in a list': tensor(b'](' + number(4) + b'e'),
    'no storage': tensor(held=number(4)),
    'a tensor as storage': tensor(held=tensor()),
    'a parameter of none': called('torch._utils', '_rebuild_parameter', b'N', b'\x88', ORDERED),
    'an old tensor of 2**50': called('torch._utils', '_rebuild_tensor', storage(), number(0), numbers(2 ** 50),
                                     numbers(0)),
    'too many arguments': call(REBUILD, storage(), *[number(0)] * 9),
    'a storage of 2**40': tensor(held=storage(2 ** 40)),
    'a storage of 2**61': tensor(held=storage(2 ** 61, kind='DoubleStorage')),
    'a storage of less than nothing': tensor(held=storage(-1)),
    'a storage that is too short': tensor(held=storage(3)),
    'a storage of other numbers': tensor(held=storage(kind='DoubleStorage')),
    'a storage that is not there': tensor(held=storage(key='1')),
    'a storage of two sizes': tuple_of(tensor(), tensor(numbers(2), held=storage(2))),
    'a torch.Size of text': called('torch', 'Size', tuple_of(text('4'))),
}


HOSTILE = dict(UNNAMED, **{shape: model_of(body) for shape, body in SHAPES.items()})


@pytest.mark.parametrize('trick', HOSTILE)
def test_tricks_without_a_name_and_absurd_shapes_never_reach_torch(harmless, monkeypatch, trick):
    monkeypatch.setitem(copyreg._inverted_registry, 240, ('os', 'system'))
    harmless(HOSTILE[trick])


def directory_of(data):
    """(offset of the directory, offset of the end record) of an archive by zipfile."""
    end = data.rindex(b'PK\5\6')
    return struct.unpack_from('<L', data, end + 16)[0], end


def patched(data, *changes):
    data = bytearray(data)
    for offset, form, value in changes:
        struct.pack_into(form, data, offset, value)
    return bytes(data)


def zip64(data, offset_of_end=None, **fields):
    """An archive with torch.save's 64-bit end records, changed by `fields`."""
    start, end = directory_of(data)
    count, = struct.unpack_from('<H', data, end + 10)
    length = fields.get('length', end - start)
    start = fields.get('start', start)
    return data[:end] + struct.pack('<4sQ2H2L4Q', b'PK\6\6', 44, 0x31e, 45, 0, 0, fields.get('count', count),
                                    fields.get('count', count), length, start) + struct.pack(
        '<4sLQL', b'PK\6\7', 0, end if offset_of_end is None else offset_of_end, 1) + data[end:]


def hostile_archives():
    good = as_zip(model_of(tensor()))
    start, end = directory_of(good)
    first = start  # data.pkl's entry; version's and data/0's follow
    second = first + 46 + len('archive/data.pkl')
    third = second + 46 + len('archive/version')
    length, = struct.unpack_from('<L', good, first + 20)
    names = as_zip(model_of(tensor()), (('data/0', bytes(16)), ('DATA.PKL', pickled(called('os', 'system')))))
    header, = struct.unpack_from('<L', good, third + 42)
    hidden = good[header:header + 30 + len('archive/data/0')] + bytes(16)  # overlapping records
    nested = as_zip(model_of(tensor()), (('data/0', bytes(16)), ('pad', hidden)))
    place = directory_of(nested)[0] + third - start + 42
    return {
        'deflated': as_zip(model_of(tensor()), compression=zipfile.ZIP_DEFLATED),
        'deflated, 80 MiB of zeros': lambda: as_zip(dict_of(text('a'), text('\0' * (80 << 20))),
                                                    compression=zipfile.ZIP_DEFLATED),
        'bzip2': as_zip(model_of(tensor()), compression=zipfile.ZIP_BZIP2),
        'one record over another': patched(good, (third + 42, '<L', struct.unpack_from('<L', good, second + 42)[0]),
                                           (third + 20, '<L', 2), (third + 24, '<L', 2)),
        'one record inside another': patched(nested, (place, '<L', nested.index(hidden, header + 1))),
        'a gap before its end': good[:end] + b'gap' + good[end:],
        'the pickle over all': patched(good, (first + 20, '<L', start - 60), (first + 24, '<L', start - 60)),
        'a record after the end': patched(good, (third + 20, '<L', 2 ** 31), (third + 24, '<L', 2 ** 31)),
        'a record of 2**32 - 1': patched(good, (third + 20, '<L', 2 ** 32 - 1), (third + 24, '<L', 2 ** 32 - 1)),
        'a record longer than packed': patched(good, (third + 24, '<L', 2 ** 31)),
        'a pickle longer than packed': patched(good, (first + 24, '<L', 2 ** 31)),
        'a pickle cut short': patched(good, (first + 20, '<L', length - 9), (first + 24, '<L', length - 9)),
        'a record shorter than its storage': patched(good, (third + 20, '<L', 8), (third + 24, '<L', 8)),
        'encrypted': patched(good, (first + 8, '<H', 1)),
        'a header elsewhere': patched(good, (third + 42, '<L', 3)),
        'a header of another name': good.replace(b'archive/data/0', b'archive/data/1', 1),
        'a directory elsewhere': patched(good, (end + 16, '<L', 0)),
        'a directory of 4 GiB': patched(good, (end + 12, '<L', 2 ** 32 - 1)),
        '65,535 records': patched(good, (end + 10, '<H', 65535)),
        'one record fewer': patched(good, (end + 10, '<H', 2)),
        'no record': patched(good, (end + 10, '<H', 0)),
        'text before it': b'PK\3\4' + good,
        'text after it': good + b'text',
        'a comment': patched(good, (end + 20, '<H', 4)) + b'text',
        'two archives': good + as_zip(called('os', 'system')),
        'a directory of 2**62, in 64 bits': zip64(good, length=2 ** 62),
        '2**62 records, in 64 bits': zip64(good, count=2 ** 62),
        'a directory at 2**62, in 64 bits': zip64(good, start=2 ** 62),
        'two 64-bit directories': zip64(good, offset_of_end=0),
        'two names, by their case': names,
        'two folders': good.replace(b'archive/data/0', b'brchive/data/0'),
        'no pickle': good.replace(b'archive/data.pkl', b'archive/dat4.pkl'),
        'a name with a zero': good.replace(b'archive/data/0', b'archive/data/\0'),
        'a name that is no text': good.replace(b'archive/data/0', b'archive/data\xff0'),
        'a pickle that was changed': good.replace(b'model', b'modes'),
        'TorchScript': as_zip(model_of(tensor()), (('data/0', bytes(16)), ('constants.pkl', pickled(b'N')))),
        'TorchScript code': as_zip(model_of(tensor()), (('data/0', bytes(16)), ('code/__torch__.py', b'import os'))),
        'a pickle of 65 MiB': lambda: as_zip(dict_of(text('a'), text('\0' * (65 << 20)))),
        'a pickle of 3,000,000 steps': lambda: as_zip(b'](' + b'N' * (3 * 10 ** 6) + b'e'),
        'only its beginning': b'PK\3\4',
        'only its end': good[end:],
    }


ARCHIVES = hostile_archives()


@pytest.mark.parametrize('archive', ARCHIVES)
def test_zip_bombs_never_reach_torch(tmp_path, monkeypatch, archive):
    monkeypatch.setattr(torch, 'load', lambda *_, **__: pytest.fail('the file came as far as torch.load'))
    data = ARCHIVES[archive]
    line = refusal(data() if callable(data) else data, str(tmp_path / 'w.pth'))
    if archive.startswith('TorchScript'):
        assert 'an exported program' in line and 'give the checkpoint' in line
    if archive.startswith('deflated'):
        assert 'is compressed' in line


def test_zip_archives_of_64_bits_are_read(tmp_path):
    content = read(zip64(as_zip(model_of(tensor()))), str(tmp_path / 'w.pth'))
    assert torch.equal(content['model'], torch.zeros(4))


def test_old_files_with_wrong_storages(harmless, tmp_path):
    body, path = model_of(tensor()), str(tmp_path / 'weights.pth')
    good = as_legacy(body)
    for data in (
            as_legacy(body, b''), as_legacy(body, struct.pack('<q', 4) + bytes(15)),
            as_legacy(body, struct.pack('<q', 2 ** 40) + bytes(16)), as_legacy(body, struct.pack('<q', -1) + bytes(16)),
            as_legacy(model_of(tensor(held=storage(2 ** 40))), struct.pack('<q', 2 ** 40) + bytes(16)),
            good.replace(text('0') + b'e.', b'e.'), good.replace(text('0') + b'e.', text('0') * 2 + b'e.'),
            good.replace(text('0') + b'e.', text('1') + b'e.'), good.replace(text('0') + b'e.', number(0) + b'e.'),
            good.replace(number(1001), number(1002)), good.replace(number(1001), b']')):
        line = refusal(data, path)
        assert 'not a weights file, or damaged' in line, line


def test_a_tar_archive_is_not_unpacked(tmp_path, monkeypatch):
    """torch.load treats a tar archive as its oldest format, and unpacks it."""
    import tarfile
    start = len(pickled(number(torch.serialization.MAGIC_NUMBER)) + pickled(number(1001))) + 2 + 5
    header = bytearray(512)
    for offset, field in ((100, b'0000644\0'), (108, b'0000000\0'), (116, b'0000000\0'), (124, b'00000000000\0'),
                          (136, b'00000000000\0'), (148, b' ' * 8), (156, b'0'), (257, b'ustar\x0000')):
        header[offset:offset + len(field)] = field
    text_length = 600
    front = as_legacy(b'N', sys_info=text('\0' * text_length))[:start]
    header[:start] = front
    header[148:156] = b'%06o\0 ' % sum(header)
    data = as_legacy(b'N', sys_info=b'X' + struct.pack('<I', text_length) + bytes(header[start:]) + bytes(
        text_length - 512 + start))
    path = str(tmp_path / 'w.pth')
    with open(path, 'wb') as file:
        file.write(data)
    assert tarfile.is_tarfile(path)
    monkeypatch.setattr(torch, 'load', lambda *_, **__: pytest.fail('the file came as far as torch.load'))
    assert read(data, path) is None and os.listdir(str(tmp_path)) == ['w.pth']
    plain = str(tmp_path / 'plain.tar')
    with tarfile.open(plain, 'w') as archive:
        archive.add(path, 'storages')
    with open(plain, 'rb') as file:
        assert 'not a weights file' in refusal(file.read(), plain)


BOMBS = """
    import json, resource, sys
    import torch
    sys.path[:0] = [%r, %r]
    from beit.files import weights_file
    import test_untrusted
    from beit.errors import UserError; from beit.errors import one_line

    path = sys.argv[1]
    with open(path, 'wb') as file:
        file.write(test_untrusted.as_zip(test_untrusted.model_of(test_untrusted.tensor())))
    weights_file.load_weights_file(path)
    held = int(next(line for line in open('/proc/self/status') if line.startswith('VmSize')).split()[1]) << 10
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    resource.setrlimit(resource.RLIMIT_AS, (held + (400 << 20),) * 2)
    lines = []
    for body in test_untrusted.HOSTILE.values():
        lines += [test_untrusted.as_zip(body), test_untrusted.as_legacy(body)]
    lines += [data for data in test_untrusted.ARCHIVES.values() if not callable(data)]
    for index, data in enumerate(lines):
        with open(path, 'wb') as file:
            file.write(data)
        try:
            weights_file.load_weights_file(path)
            lines[index] = 'read'
        except UserError as error:
            lines[index] = str(error)[len(path):]
    print(json.dumps([resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before, lines]))
"""


def test_bombs_take_no_memory(tmp_path):
    """In a process limited to 400 MiB of additional memory; a larger allocation raises an error."""
    if not os.path.isfile('/proc/self/status'):
        cannot_run('linux', 'no /proc to learn the size of a process from')
    done = subprocess.run([sys.executable, '-c', textwrap.dedent(BOMBS % (ROOT, os.path.join(ROOT, 'tests'))),
                           str(tmp_path / 'w.pth')], stdout=subprocess.PIPE, stderr=subprocess.PIPE, timeout=300,
                          universal_newlines=True, env=dict(os.environ, OMP_NUM_THREADS='1'))
    assert done.returncode == 0, done.stderr
    grown, lines = json.loads(done.stdout)
    assert len(lines) > 200 and 'read' not in lines
    assert not [line for line in lines if re.search('memory|alloc', line, re.IGNORECASE)]
    assert grown < 300 << 10, '%d MiB' % (grown >> 10)


# ---- files of other formats

def test_pipes_devices_and_folders(tmp_path):
    pipe = str(tmp_path / 'pipe')
    os.mkfifo(pipe)
    for path in (pipe, '/dev/zero', '/dev/null', str(tmp_path)):
        with pytest.raises(UserError, match='%s: a folder or device, not a file' % path):
            weights_file.load_weights_file(path)
    with pytest.raises(UserError, match='nothing: no such file'):
        weights_file.load_weights_file(str(tmp_path / 'nothing'))
    os.symlink(str(tmp_path / 'nowhere'), str(tmp_path / 'link'))
    with pytest.raises(UserError, match='link: no such file'):
        weights_file.load_weights_file(str(tmp_path / 'link'))
    odd = str(tmp_path / 'two\nlines')
    with pytest.raises(UserError, match=r'two\\nlines: not a weights file'):
        with open(odd, 'wb'):
            pass
        weights_file.load_weights_file(odd)


@pytest.mark.parametrize('data', [b'', b'\0', b'\x80', b'\x80\x02', b'PK', b'{}', b'hello, world\n', b'\x1f\x8b\x08',
                                  b'\x89PNG\r\n\x1a\n', b'\xff' * 1000, bytes(1000), b'GGUF', b'\x93NUMPY'])
def test_other_files(tmp_path, data):
    assert 'not a weights file, or damaged' in refusal(data, str(tmp_path / 'w.pth'), 'others')


# ---- valid files

def everything():
    """One object of each kind in checkpoints of the reference, of timm and of this project."""
    model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    model(torch.randn(4, 3)).sum().backward()
    optimizer.step()
    base = torch.arange(24.)
    return {
        'model': model.state_dict(), 'optimizer': optimizer.state_dict(), 'epoch': 'best', 'scaler': None,
        'args': argparse.Namespace(lr=np.float64(1e-3), on=np.bool_(True), n=np.int64(3), half=np.float16(2),
                                   size=(1, [2, {'a': None}]), dtype=torch.float32, shape=torch.Size([1, 2]),
                                   device=torch.device('cpu'), data=b'\x00\xff', name='Köln', big=2 ** 63),
        'parameter': torch.nn.Parameter(torch.ones(2)), 'half': torch.ones(3).half(), 'empty': torch.ones(0, 2),
        'bfloat16': torch.ones(3, dtype=torch.bfloat16), 'whole': torch.tensor(3), 'bool': torch.tensor([True]),
        'bytes': torch.arange(5, dtype=torch.uint8), 'view': base.reshape(4, 6).t()[1:], 'other view': base[3:9:2],
        'again': base, 1: {2: None}, 'numbers': [1, -1, 2 ** 40, 1.5, math.inf],
    }


@pytest.mark.parametrize('legacy', (False, True))
def test_good_files_are_read_whole(tmp_path, legacy):
    content, path = everything(), str(tmp_path / 'w.pth')
    torch.save(content, path, _use_new_zipfile_serialization=not legacy)
    found = weights_file.load_weights_file(path)
    assert found.keys() == content.keys() and vars(found['args']) == vars(content['args'])
    for each, value in vars(content['args']).items():
        assert type(getattr(found['args'], each)) is type(value)
    for key, value in content.items():
        if torch.is_tensor(value):
            assert found[key].dtype == value.dtype and torch.equal(found[key].float(), value.float())
    assert isinstance(found['parameter'], torch.nn.Parameter)
    assert found['model'].keys() == content['model'].keys() and found['model']._metadata == content['model']._metadata
    assert found['optimizer']['param_groups'] == content['optimizer']['param_groups']
    assert [found[key] for key in ('epoch', 'scaler', 1, 'numbers')] \
        == [content[key] for key in ('epoch', 'scaler', 1, 'numbers')]
    assert found['view'].stride() == content['view'].stride()
    found['again'][3] = 7.
    assert found['view'][2, 0] == found['other view'][0] == 7.  # a shared storage stays shared


def test_files_with_any_name_are_read(tmp_path):
    """PyTorch 1.6 to 2.0 name the folder in the archive after the file."""
    for each in ('Größe 1.pth', 'a.b.c', '模型.pth', 'UPPER.PTH', '\'quoted\'.pth'):
        path = str(tmp_path / each)
        torch.save({'weight': torch.ones(2)}, path, _use_new_zipfile_serialization=True)
        assert torch.equal(weights_file.load_weights_file(path)['weight'], torch.ones(2))


def test_numpy_scalars_of_either_numpy_are_read(tmp_path):
    for module in ('numpy.core.multiarray', 'numpy._core.multiarray'):
        kind = called('numpy', 'dtype', text('f8'), number(0), number(1)) + tuple_of(
            number(3), text('<'), b'N', b'N', b'N', number(-1), number(-1), number(0)) + b'b'
        data = called('_codecs', 'encode', text(struct.pack('<d', 2.5).decode('latin1')), text('latin1'))
        for form in (as_zip, as_legacy):
            found = read(form(model_of(called(module, 'scalar', kind, data))), str(tmp_path / 'w.pth'))
            assert found['model'] == 2.5 and isinstance(found['model'], np.float64)


def test_numbers_in_the_other_byte_order_are_refused(tmp_path):
    """A big-endian machine writes them; they would be read as other numbers."""
    swapped = as_zip(model_of(tensor()), (('data/0', bytes(16)), ('byteorder', b'big')))
    assert 'its bytes are swapped' in refusal(swapped, str(tmp_path / 'w.pth'))
    read(as_zip(model_of(tensor()), (('data/0', bytes(16)), ('byteorder', b'little'))), str(tmp_path / 'w.pth'))


def test_an_archive_without_checksums_is_read(tmp_path):
    data = as_zip(model_of(tensor()))
    crc = struct.unpack_from('<L', data, directory_of(data)[0] + 16)[0]
    data = data.replace(struct.pack('<L', crc), bytes(4))
    assert read(data, str(tmp_path / 'w.pth')) is not None


# ---- safetensors

def safetensors(header, data=b''):
    encoded = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack('<Q', len(encoded)) + encoded + data


def one(dtype='F32', shape=(4,), offsets=(0, 16), name='weight'):
    return {name: {'dtype': dtype, 'shape': list(shape), 'data_offsets': list(offsets)}}


def test_safetensors_are_read(tmp_path):
    path = str(tmp_path / 'w.safetensors')
    for dtype, data in (('F32', np.arange(4, dtype=np.float32)), ('F16', np.arange(8, dtype=np.float16)),
                        ('I64', np.arange(2)), ('BOOL', np.ones(16, dtype=bool))):
        found = read(safetensors(dict(one(dtype, data.shape), __metadata__={'format': 'pt'}), data.tobytes()), path)
        assert list(found) == ['weight'] and np.array_equal(found['weight'].numpy(), data)
    half = safetensors(one('BF16', (8,)), struct.pack('<8H', *[0x3f80] * 8))
    if hasattr(torch, 'frombuffer'):
        assert torch.equal(read(half, path)['weight'], torch.ones(8, dtype=torch.bfloat16))
    else:
        assert 'bfloat16 tensors in this format need PyTorch 1.10 or newer' in refusal(half, path)


def test_safetensors_of_a_model_are_loaded(tmp_path):
    model, other = nano(), nano()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    from safetensors.numpy import save_file
    path = str(tmp_path / 'named like another.pth')
    save_file({key: value.numpy() for key, value in model.state_dict().items()}, path)
    pretrained.load_pretrained(other, path)
    for key, value in model.state_dict().items():
        assert torch.equal(other.state_dict()[key], value), key


def test_hostile_safetensors(tmp_path):
    path, data = str(tmp_path / 'w.safetensors'), bytes(16)
    deep = b'{"a":' + b'[' * 10 ** 5 + b']' * 10 ** 5 + b'}'
    for content in (
            safetensors(one(), data[:-1]), safetensors(one(), data + b'x'), safetensors(one(), b''),
            safetensors(one(shape=(2 ** 40,)), data), safetensors(one(shape=(2 ** 32, 2 ** 32)), data),
            safetensors(one(shape=(2 ** 63, 2)), data), safetensors(one(shape=(-4,)), data),
            safetensors(one(offsets=(0, 2 ** 62)), data), safetensors(one(offsets=(16, 0)), data),
            safetensors(one(offsets=(-16, 0)), data), safetensors(one(dtype='F31'), data),
            safetensors(one(shape=('4',)), data), safetensors(one(shape=(4.5,)), data),
            safetensors(dict(one(), other=one()['weight']), data), safetensors({'weight': 5}, data),
            safetensors({'__metadata__': {'a': 5}}), safetensors(b'{' + b'x' * 50), safetensors(deep),
            safetensors(b'{"\\ud800":5}'), safetensors(b'{\xff\xfe}'), struct.pack('<Q', 2 ** 62) + b'{}',
            struct.pack('<Q', 200 << 20) + b'{}', struct.pack('<Q', 0) + b'{}', struct.pack('<Q', 3) + b'{}',
            safetensors(one(name='\x1b[2J'), data), safetensors(one(name='two\nlines'), data),
            safetensors(one(name='x' * 10 ** 5), data)):
        refusal(content, path, 'safetensors')


def test_safetensors_without_the_package(tmp_path, monkeypatch):
    for module in ('safetensors', 'safetensors.torch', 'safetensors.numpy'):
        monkeypatch.setitem(sys.modules, module, None)
    line = refusal(safetensors(one(), bytes(16)), str(tmp_path / 'w.safetensors'))
    assert line.endswith('reading a safetensors file needs the package safetensors; run: %s -m pip install '
                         'safetensors' % sys.executable)


# ---- fuzz

def nano(depth=2):
    torch.manual_seed(0)
    return modeling_finetune.beit_nano_patch8_32(num_classes=5, use_abs_pos_emb=False, use_rel_pos_bias=True,
                                                 init_values=0.1, depth=depth, embed_dim=32)


def adamw(model):
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    return optimizer


def state_of(model):
    """The content of a small checkpoint of this project after one update."""
    optimizer = adamw(model)
    optimizer.step()
    flags = dict(model='beit_nano_patch8_32', input_size=32, lr=1e-3, opt='adamw')
    run_state = training_state.RunState(epoch=4, best={'accuracy': 81.5},
                                        run={'processes': 1, 'total_batch': 8, 'device': 'cpu'})
    run_state.data = comparison.data_to_save(data_of_a_run(), np.arange(4, dtype=np.uint64))
    return training_state.build_checkpoint(flags, run_state, model, optimizer, loss_scaler.LossScaler())


def data_of_a_run():
    """In the form of `fingerprint.of_data`."""
    each = {'images': 16, 'names': 'a' * 32, 'order': 'b' * 32, 'labels': 'c' * 32, 'sizes': 'd' * 32,
            'sample': [['e' * 16, 'f' * 16, 500, '0' * 16]]}
    return {'train': dict(each), 'val': dict(each, images=4)}


@pytest.fixture(scope='module')
def whole():
    """A checkpoint's file, in the newer and in the older format."""
    files, content = [], state_of(nano())
    for zipped in (True, False):
        file = io.BytesIO()
        torch.save(content, file, _use_new_zipfile_serialization=zipped)
        files.append(file.getvalue())
    assert all(100 << 10 < len(data) < 500 << 10 for data in files)
    return files


@pytest.fixture
def fuzzed(tmp_path):
    """fuzzed(data, what): reads damaged bytes. Content that passes must load into a model or be refused."""
    path, model = str(tmp_path / 'w.pth'), nano()

    def check(data, what):
        if attempt(data, path, what)[0] is not None:
            try:
                pretrained.load_pretrained(model, path)
            except UserError as error:
                assert str(error).startswith('--finetune %s: ' % path)
    return check


def test_files_cut_off_at_every_kilobyte(whole, tmp_path):
    for data in whole:
        for length in itertools.chain(range(0, len(data), 1024), range(len(data) - 100, len(data), 7)):
            assert 'not a weights file' in refusal(data[:length], str(tmp_path / 'w.pth'), 'truncations')


def places(data):
    """Positions to damage: anywhere; pickle, headers and directory as often as all tensors together."""
    return st.one_of(st.integers(0, len(data) - 1), st.integers(0, min(len(data), 20000) - 1),
                     st.integers(max(0, len(data) - 4000), len(data) - 1))


@pytest.mark.parametrize('form', (0, 1), ids=('zip', 'legacy'))
def test_flipped_bits(whole, fuzzed, form):
    @fuzz(200)
    @given(st.lists(st.tuples(places(whole[form]), st.integers(0, 7)), min_size=1, max_size=3))
    def run(flips):
        damaged = bytearray(whole[form])
        for place, bit in flips:
            damaged[place] ^= 1 << bit
        fuzzed(bytes(damaged), 'bit flips')
    run()


@pytest.mark.parametrize('form', (0, 1), ids=('zip', 'legacy'))
def test_spliced_bytes(whole, fuzzed, form):
    """Pieces are removed, doubled, swapped, zeroed or replaced."""
    data = whole[form]

    @fuzz(150)
    @given(places(data), st.integers(0, 3000), places(data), st.binary(max_size=12), st.integers(0, 4))
    def run(start, length, other, new, how):
        stop, piece = start + length, data[other:other + length]
        fuzzed(data[:start] + (b'', data[start:stop] * 2, piece, bytes(length), new)[how]
               + data[stop if how != 4 else start + len(new):], 'splices')
    run()


WORDS = ('os', 'system', 'model', 'storage', 'cpu', '0', '', '_metadata', 'latin1', '__setstate__', 'f8', COMMAND)
NAMES = [tuple(each.split(' ', 1)) for each in sorted(untrusted_pickle.ALLOWED)] + [
    ('os', 'system'), ('builtins', 'eval'), ('torch', 'load'), ('collections', 'defaultdict')]
PIECES = st.one_of(
    st.sampled_from([ORDERED, storage(), storage(), tensor(), FOUR, numbers(2, 2), b'h\x00', b'q\x00', b'h\x01',
                     b'q\x01', b'}', b']', b')', b'(', b't', b'\x85', b'\x86', b'\x87', b'R', b'R', b'b', b'\x81', b'u',
                     b's', b'a', b'e', b'Q', b'N', b'\x88', b'\x89', b'0', b'1', b'2', b'o', b'l', b'd', b'\x93',
                     b'\x94', b'\x8f', b'\x90', b'\x91', b'\x82\x01', b'j\xff\xff\xff\x7f', b'r\xff\xff\xff\xff',
                     b'p9999\n']),
    st.sampled_from(WORDS).map(text),
    st.sampled_from(NAMES).map(lambda pair: name(*pair)),
    st.sampled_from([-1, 0, 1, 2, 4, 5, 255, 2 ** 31, 2 ** 62, 2 ** 63, 2 ** 64, -2 ** 63]).map(number),
    st.floats().map(lambda value: b'G' + struct.pack('>d', value)),
    st.binary(min_size=1, max_size=3))


@pytest.mark.parametrize('form', (as_zip, as_legacy, as_pickle))
def test_random_pickles(tmp_path, form):
    path = str(tmp_path / 'w.pth')

    @fuzz(300)
    @given(st.lists(PIECES, max_size=25))
    def run(pieces):
        attempt(form(b''.join(pieces)), path, 'pickle programs')
    run()
    assert os.listdir(str(tmp_path)) == ['w.pth']


def test_random_calls_of_allowed_names(tmp_path):
    """Complete pickle programs: nested calls of the allowed names with arguments of every type."""
    path = str(tmp_path / 'w.pth')
    plain = st.one_of(PIECES.filter(lambda piece: piece[:1] in b'XG\x8aN}]' and piece[-1:] not in b'uesb'),
                      st.sampled_from([storage(), tensor(), ORDERED, numbers(4), numbers(1), number(0), b'\x89']))
    values = st.recursive(plain, lambda inside: st.one_of(
        st.tuples(st.sampled_from(NAMES), st.lists(inside, max_size=6)).map(lambda each: called(*each[0], *each[1])
                                                                            if each[1] else name(*each[0]) + b')R'),
        st.lists(inside, max_size=4).map(lambda each: tuple_of(*each)),
        st.lists(st.tuples(st.sampled_from(WORDS).map(text), inside), max_size=3).map(
            lambda pairs: dict_of(*(part for pair in pairs for part in pair))),
        st.tuples(inside, inside).map(lambda pair: pair[0] + pair[1] + b'b')), max_leaves=12)

    @fuzz(300)
    @given(values)
    def run(body):
        for form in (as_zip, as_legacy):
            attempt(form(model_of(body)), path, 'pickle programs')
    run()


def test_damaged_safetensors(tmp_path, fuzzed):
    data = safetensors(dict(one(), other=one('F16', (2, 4), (16, 32))['weight']), bytes(32))
    for length in range(len(data)):
        refusal(data[:length], str(tmp_path / 'w.pth'), 'safetensors')

    @fuzz(300)
    @given(st.integers(0, len(data) - 1), st.integers(0, 255))
    def run(place, value):
        fuzzed(data[:place] + bytes([value]) + data[place + 1:], 'safetensors')
    run()


# ---- wrong types

WRONG = [None, True, 5, -1, 2 ** 63, -2 ** 63, 0.5, math.nan, math.inf, 'text', 'two\nlines', b'bytes', [], [1], {}, (),
         {'a': 1}, {1: 2}, {'weight': 'text'}, [[1, 2]], {'state': 5, 'param_groups': 5}, argparse.Namespace(model=[1]),
         {'state': {}, 'param_groups': []}, {'state': {0: 5}, 'param_groups': [5]}, {'steps': 'x', 'meters': 5},
         {'steps': 1, 'meters': [{}]}, torch.tensor(1.), torch.zeros(0), torch.zeros(5, 5), torch.tensor([True])]


@pytest.fixture(scope='module')
def good():
    return state_of(nano(depth=1))


@pytest.fixture
def take_up(tmp_path, parse):
    """take_up(content): use a file's content as the program does, up to the first update. Returns the error lines.
    """
    path, model, args = str(tmp_path / 'checkpoint-3.pth'), nano(depth=1), parse()

    def check(content, tuning=True):
        TRIED['wrong types'] += 1
        loads, lines = (resume, tune) if tuning else (resume,), []
        torch.save(content, path)
        for load in loads:  # each function reads the file as the program does
            try:
                load()
            except UserError as error:
                lines.append(one_line(error))
                assert lines[-1].isprintable() and len(lines[-1]) < 2000, lines
        return lines

    def tune():
        pretrained.load_pretrained(model, path)

    def resume():
        found, content = discovery.load_best_or_latest(path)
        optimizer = adamw(model)
        progress = training_state.resume_training(found, content, model, optimizer, loss_scaler.LossScaler())
        assert isinstance(progress.epoch, int) and isinstance(progress.steps, int)
        run = comparison.Run(vars(args), torch.device('cpu'), data_of_a_run())
        comparison.resume_message(comparison.resume_differences(content, run, flags.without_effect()))
        comparison.held_out_before(found, content, 0.25, 0)
        comparison.check_unseen(found, content, types.SimpleNamespace(samples=[]), 0.)
        comparison.check_same_data(found, content, found, content)
        progress.meters_of(0, 1)
        optimizer.step()
    return check


@pytest.mark.parametrize('key', ['model', 'optimizer', 'epoch', 'scaler', 'args', 'accuracy', 'progress', 'model_ema',
                                 'random_state', 'data'])
def test_wrong_types_are_one_line(good, take_up, key):
    for value in WRONG:
        take_up(dict(good, **{key: value}), tuning=key == 'model')
    take_up({other: value for other, value in good.items() if other != key})


@pytest.mark.parametrize('key', ['train', 'val', 'held_out', 'images', 'names', 'sample', 'row', 'val_split', 'seed'])
def test_wrong_types_in_the_fingerprints_are_one_line(good, take_up, key):
    args = dict(good['args'], val_split=0.25, seed=0)
    for value in WRONG:
        data, train = good['data'], good['data']['train']
        if key in data:
            data = dict(data, **{key: value})
        elif key == 'row':
            data = dict(data, train=dict(train, sample=[value] + [[value] * 4]))
        elif key in train:
            data = dict(data, train=dict(train, **{key: value}))
        take_up(dict(good, data=data, args=dict(args, **({key: value} if key in args else {}))), tuning=False)


def test_wrong_types_instead_of_the_content(good, take_up):
    assert take_up(good) == []  # otherwise the others would prove nothing
    for value in WRONG:
        assert len(take_up(value)) == 2


def everywhere(value, path=()):
    """The path of every nested value, outermost first."""
    yield path
    if isinstance(value, (dict, list, tuple)):
        for key, each in value.items() if isinstance(value, dict) else enumerate(value):
            yield from everywhere(each, path + (key,))


def replaced(value, path, new):
    if not path:
        return new
    if isinstance(value, dict):
        changed = value.copy()
        changed[path[0]] = replaced(value[path[0]], path[1:], new)
        return changed
    return type(value)(replaced(each, path[1:], new) if index == path[0] else each for index, each in enumerate(value))


def test_wrong_types_anywhere(good, take_up):
    inside = {key: [(key,) + path for path in everywhere(good[key]) if path] for key in good if key != 'model'}
    # The parameters have equal types, so one is enough.
    inside['optimizer'] = [path for path in inside['optimizer'] if path[1:2] != ('state',) or path[2:3] in ((), (0,))]
    inside['model'] = [('model', each) for each in list(good['model'])[:8]]
    changes = st.tuples(st.one_of([st.sampled_from(paths) for paths in inside.values() if paths]),
                        st.sampled_from(WRONG))

    @fuzz(500)
    @given(changes)
    def run(change):
        take_up(replaced(good, *change), tuning=change[0][0] == 'model')
    run()


# ---- downloading

def tls_files(folder):
    certificate, key = str(folder / 'cert.pem'), str(folder / 'key.pem')
    try:
        subprocess.run(['openssl', 'req', '-x509', '-newkey', 'rsa:2048', '-nodes', '-keyout', key, '-out', certificate,
                        '-days', '2', '-subj', '/CN=localhost', '-addext', 'subjectAltName=DNS:localhost'],
                       check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    except OSError:
        cannot_run('openssl', 'no openssl to make a certificate with')
    return certificate, key


BODY = as_zip(model_of(tensor()))
DIGEST = hashlib.sha256(BODY).hexdigest()


def chunk(data):
    return b'%x\r\n%s\r\n' % (len(data), data)


LENGTH, CHUNKED = {'Content-Length': len(BODY)}, {'Transfer-Encoding': 'chunked'}
# {name in the URL: (status, headers, body) of the answer}
ANSWERS = {
    'whole': (200, LENGTH, [BODY]), 'broken': (200, LENGTH, [BODY[:-10]]), 'silent': (200, LENGTH, [BODY[:-10]]),
    'chunked': (200, CHUNKED, [chunk(BODY[:100]), chunk(BODY[100:]), chunk(b'')]),
    'endless': (200, CHUNKED, [chunk(bytes(1 << 16))] * 10 ** 4), 'halfchunk': (200, CHUNKED, [chunk(BODY)[:-12]]),
    'busy': (503, {'Content-Length': 0}, []),
    'lengthless': (200, {}, [BODY]), 'large': (200, {'Content-Length': 2 ** 40}, []),
    'absurd': (200, {'Content-Length': 'many'}, []), 'garbage': (None, {}, [b'\0\1\2\3' * 100]),
    'onward': (302, {'Location': '/whole.pth', 'Content-Length': 0}, []),
    'unsafe': (302, {'Location': 'http://localhost:1/whole.pth', 'Content-Length': 0}, []),
    'local': (302, {'Location': 'file:///etc/passwd', 'Content-Length': 0}, []),
    'circle': (302, {'Location': '/circle.pth', 'Content-Length': 0}, []),
}


class Server(http.server.BaseHTTPRequestHandler):
    """Serves BODY with every kind of fault, and records the requests in `asked`."""

    protocol_version = 'HTTP/1.1'

    def log_message(self, *_):
        pass

    def do_GET(self):
        self.server.asked.append(self.path)
        self.close_connection = True
        way = self.path.partition('.')[0].strip('/').partition('-')[0]
        status, headers, body = ANSWERS.get(way, (404, {'Content-Length': 0}, []))
        if status:
            self.send_response(status)
            for key, value in headers.items():
                self.send_header(key, str(value))
            self.end_headers()
        for data in body:
            self.wfile.write(data)
        time.sleep(3 if way == 'silent' else 0)


class Quiet(http.server.ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, *_):
        pass  # these tests disconnect clients


@pytest.fixture(scope='module')
def server(tmp_path_factory):
    certificate, key = tls_files(tmp_path_factory.mktemp('tls'))
    server = Quiet(('localhost', 0), Server)
    server.asked, server.certificate = [], certificate
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    server.socket = context.wrap_socket(server.socket, server_side=True)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def address(server, tmp_path, monkeypatch):
    """address('whole.pth'): the URL of that answer."""
    monkeypatch.setenv('SSL_CERT_FILE', server.certificate)
    monkeypatch.setenv('TORCH_HOME', str(tmp_path / 'home'))
    monkeypatch.setattr(download, 'TIMEOUT', 1.)
    monkeypatch.setattr(download, 'MAX_DOWNLOAD', 1 << 20)
    server.asked.clear()
    return lambda path: 'https://localhost:%d/%s' % (server.server_port, path)


def files_below(folder):
    return [os.path.join(place, each) for place, _, names in os.walk(str(folder)) for each in names]


@pytest.mark.parametrize('path', ['whole.pth', 'whole.pth?token=1', 'chunked.pth', 'onward.pth', 'whole', 'whole/',
                                  'whole.pth#sha256=' + DIGEST, 'whole.pth#sha256=' + DIGEST.upper(),
                                  'lengthless.pth#sha256=' + DIGEST, 'whole-%s.pth' % DIGEST[:8],
                                  'lengthless-%s.pth' % DIGEST[:16]])
def test_downloads_are_cached(server, address, tmp_path, path, capsys):
    for _ in range(2):
        found = download.resolve_url(address(path))
        with open(found, 'rb') as file:
            assert file.read() == BODY
    assert files_below(tmp_path / 'home') == [found]
    assert len(server.asked) == (2 if path == 'onward.pth' else 1)
    assert capsys.readouterr().out.count('Downloading https://') == 1
    assert os.stat(found).st_mode & 0o444 == 0o444 & ~current_umask()


def test_pretrained_weights_are_downloaded(address, tmp_path, monkeypatch):
    model, file = nano(), io.BytesIO()
    torch.save({'model': model.state_dict()}, file)
    data = file.getvalue()
    monkeypatch.setitem(ANSWERS, 'model', (200, {'Content-Length': len(data)}, [data]))
    target = nano()
    torch.nn.init.zeros_(target.head.weight)
    pretrained.load_pretrained(target, address('model.pth'))
    assert torch.equal(target.head.weight, model.head.weight)


def test_a_name_takes_no_sha256(address, tmp_path):
    with pytest.raises(UserError, match=r'--finetune NAME: .*how long it is\); fetch the file yourself'):
        download.fetch(address('lengthless.pth'), str(tmp_path / 'x.pth'), '--finetune NAME', check=lambda path: None)


def current_umask():
    mask = os.umask(0)
    os.umask(mask)
    return mask


@pytest.mark.parametrize('path, says', [
    ('missing.pth', r'404: [^;]*\); fetch'),
    ('busy.pth', r'503: [^;]*\); try again later, or fetch the file'),
    ('broken.pth', r'after \d+ of %d bytes' % len(BODY)),
    ('halfchunk.pth', 'download failed'),
    ('silent.pth', 'timed out'),
    ('lengthless.pth', '#sha256='),
    ('large.pth', 'larger than'),
    ('endless.pth', 'larger than'),
    ('endless.pth#sha256=' + DIGEST, 'larger than'),
    ('absurd.pth', 'download failed'),
    ('unsafe.pth', 'redirects to http://localhost.*not to an https:// address'),
    ('local.pth', 'download failed.*file:///etc/passwd'),
    ('circle.pth', 'download failed'),
    ('garbage.pth', 'download failed'),
    ('whole.pth#sha256=' + '0' * 64, 'sha256, %s' % DIGEST),
    ('broken.pth#sha256=' + DIGEST, r'after \d+ of %d bytes' % len(BODY)),
    ('whole-00000000.pth', 'sha256, %s' % DIGEST),
    ('whole.pth#sha256=1234', 'sha256= and 64 hex digits'),
    ('whole.pth#md5=' + '0' * 64, 'sha256= and 64 hex digits'),
    ('who le\x01.pth', 'download failed'),
    ('whole%s.pth' % ('e' * 300), 'download failed'),
])
def test_a_failed_download_leaves_nothing(address, tmp_path, path, says):
    TRIED['downloads'] += 1
    start = time.monotonic()
    with pytest.raises(UserError, match=says) as caught:
        download.resolve_url(address(path))
    assert str(caught.value).isprintable() and time.monotonic() - start < 20
    assert files_below(tmp_path / 'home') == []


@pytest.mark.parametrize('source, says', [
    (each, 'only https:// addresses are downloaded') for each in (
        'http://localhost/w.pth', 'ftp://localhost/w.pth', 'file:///etc/passwd', 'data://x',
        'httpsx://localhost/w.pth')] + [(each, 'download failed') for each in (
        'https://', 'https://[', 'https://[::1', 'https://localhost:x/w', 'https:///w.pth', 'https://localhost:1/..',
        'https://localhost:1/w.pth', 'https://ü\udcff/w', 'https://a b/w', 'https://localhost:1/\0')])
def test_addresses_that_are_not_downloaded(tmp_path, monkeypatch, source, says):
    monkeypatch.setenv('TORCH_HOME', str(tmp_path))
    if says.startswith('only'):
        monkeypatch.setattr(download, '_download', lambda *_: pytest.fail('it was downloaded'))
    with pytest.raises(UserError, match=says):
        download.resolve_url(source)
    assert files_below(tmp_path) == []


def test_a_certificate_that_is_not_trusted(address, tmp_path, monkeypatch):
    monkeypatch.delenv('SSL_CERT_FILE')
    with pytest.raises(UserError, match='download failed.*certificate'):
        download.resolve_url(address('whole.pth'))
    assert files_below(tmp_path / 'home') == []


def test_an_interrupted_download_leaves_nothing(address, tmp_path, monkeypatch):
    class Interrupted:
        def update(self, _):
            raise KeyboardInterrupt

    monkeypatch.setattr(download.hashlib, 'sha256', lambda *data: hashlib.new('sha256', *data) if data
                        else Interrupted())
    with pytest.raises(KeyboardInterrupt):
        download.resolve_url(address('whole.pth'))
    assert files_below(tmp_path / 'home') == []


def test_a_cached_file_is_checked_too(address, tmp_path):
    found = download.resolve_url(address('whole.pth'))
    with open(found, 'ab') as file:
        file.write(b'more')
    with pytest.raises(UserError, match='has another sha256, .*; delete it'):
        download.resolve_url(address('whole.pth#sha256=' + DIGEST))


def test_the_other_processes_wait_for_the_first(server, address, monkeypatch, tmp_path):
    monkeypatch.setattr(process_group, 'is_main_process', lambda: False)
    monkeypatch.setattr(process_group, 'barrier', lambda: None)
    with pytest.raises(UserError, match='set TORCH_HOME to a folder that all machines share'):
        download.resolve_url(address('whole.pth'))
    assert server.asked == []

    def first():
        monkeypatch.setattr(process_group, 'is_main_process', lambda: True)
        monkeypatch.setattr(process_group, 'barrier', lambda: None)
        download.resolve_url(address('whole.pth'))

    monkeypatch.setattr(process_group, 'barrier', first)
    with open(download.resolve_url(address('whole.pth')), 'rb') as file:
        assert file.read() == BODY
    assert server.asked == ['/whole.pth']


def test_number_of_tried_files(record_property, capsys):
    """The last test of this file prints how many files the others made."""
    TRIED.pop('good', None)
    tried = sum(TRIED.values())
    record_property('files tried', tried)
    with capsys.disabled():  # only standard error of a pytest-xdist worker reaches the terminal
        print('\ncheckpoint reader: %d damaged or hostile files tried (%s)' % (
            tried, ', '.join('%d %s' % (count, what) for what, count in TRIED.most_common())), file=sys.stderr)
