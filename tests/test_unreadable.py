"""Files that cannot be read as images: each kind while training and evaluating, odd names, the list, --check_data."""

import collections
import contextlib
import faulthandler
import fcntl
import os
import pickle
import pty
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import termios
import time
import traceback
import zipfile
import zlib

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data._utils.pin_memory import pin_memory

import datasets
import run_class_finetuning
from beit.data import class_folders, decode, locations, transforms
from beit.data import unreadable as unreadable_module
from beit.data.image_dataset import ImageFolder, image_name
from beit.data.loader import Batch, Sample, Unreadable, collate
from beit.data.unreadable import UnreadableFiles
from beit.distributed import process_group
from beit.errors import UserError, one_line
from beit.files import weights_file
from helpers import NANO, ROOT, as_nobody, photo, python, write_cifar

SMALL = ('--batch_size=4',) + tuple(NANO)


@contextlib.contextmanager
def within(seconds):
    """Fail after this many seconds, even during a system call."""
    def too_long(*_):
        raise TimeoutError('not done after %d s' % seconds)
    before = signal.signal(signal.SIGALRM, too_long)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


# ---- kinds of bad files

def content(suffix):
    """A good image file's bytes."""
    with tempfile.TemporaryDirectory() as folder:
        photo(1, 64, 64).save(os.path.join(folder, 'a' + suffix))
        with open(os.path.join(folder, 'a' + suffix), 'rb') as file:
            return file.read()


def png(width, height, pixels):
    """A one-bit PNG file whose header gives this size."""
    def chunk(kind, data):
        return (len(data).to_bytes(4, 'big') + kind + data
                + zlib.crc32(kind + data).to_bytes(4, 'big'))
    header = width.to_bytes(4, 'big') + height.to_bytes(4, 'big') + bytes([1, 0, 0, 0, 0])
    return b'\x89PNG\r\n\x1a\n' + chunk(b'IHDR', header) + chunk(b'IDAT', zlib.compress(pixels)) + chunk(b'IEND', b'')


def write(data):
    def make(path):
        with open(path, 'wb') as file:
            file.write(data() if callable(data) else data)
    return make


def cut(suffix, share=0.5):
    def data():
        whole = content(suffix)
        return whole[:int(len(whole) * share)]
    return write(data)


def broken_stream():
    whole = bytearray(content('.png'))
    middle = len(whole) // 2
    whole[middle:middle + 64] = bytes(64)
    return bytes(whole)


def archive(path):
    with zipfile.ZipFile(path, 'w') as file:
        file.writestr('a.jpg', content('.jpg'))


def listen(path):
    folder, name = os.path.split(path)
    before = os.getcwd()
    os.chdir(folder)  # a socket's path has 108 bytes at most
    try:
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(name)
    finally:
        os.chdir(before)


KINDS = {  # name: (function that writes such a file, text in its error)
    'empty': (write(b''), 'it is empty'),
    'text': (write(b'no picture\n'), 'cannot identify image file'),
    'a page': (write(b'<!DOCTYPE html><html><body>404</body></html>'), 'cannot identify image file'),
    'archive': (archive, 'cannot identify image file'),
    'zeros': (write(bytes(5000)), 'cannot identify image file'),
    'half a jpeg': (cut('.jpg'), 'truncated'),
    'all but the end of a jpeg': (cut('.jpg', 0.95), 'truncated'),
    'half a png': (cut('.png'), ''),
    'half a bmp': (cut('.bmp'), 'truncated'),
    'the start of a jpeg': (write(lambda: content('.jpg')[:12]), ''),
    'a damaged png': (write(broken_stream), ''),
    'bomb': (write(png(40000, 40000, b'')), 'decompression bomb'),
    'no pixels': (write(b'P6\n0 0\n255\n'), ''),
    'gone': (lambda path: None, 'No such file or directory'),
    'dangling link': (lambda path: os.symlink('no\nwhere', path), 'link to no\\nwhere'),
    'link to itself': (lambda path: os.symlink(os.path.basename(path), path), 'symbolic links'),
    'folder': (os.mkdir, 'it is a folder'),
    'pipe': (os.mkfifo, 'it is a pipe'),
    'device': (lambda path: os.symlink('/dev/zero', path), 'it is a device'),
    'socket': (listen, 'No such device or address'),
}


@pytest.fixture
def sets(image_folder, parse):
    """sets('--bad_images=skip'): (arguments, training set, validation set) of 12 images each."""
    root = image_folder(train=6, val=6)

    def build(*flags):
        args = parse('--data_path', root, *SMALL, *flags)
        return (args,) + datasets.build_datasets(args)[:2]
    return build


def spoil(path, kind):
    os.remove(path)
    KINDS[kind][0](path)


def by_index(loader):
    """({index: (image, class)}, [unreadable]) of a loader."""
    samples, unreadable = {}, []
    for batch in loader:
        assert len(batch.images) == len(batch.targets) == len(batch.indices)
        assert not set(samples) & set(batch.indices.tolist())
        samples.update(zip(batch.indices.tolist(), zip(batch.images, batch.targets)))
        unreadable += batch.unreadable
    return samples, unreadable


def error_of(loader):
    """The line of the error that ends reading a whole loader."""
    batches = iter(loader)
    with pytest.raises(UserError) as caught:
        collections.deque(batches, maxlen=0)
    traceback.clear_frames(caught.tb)  # else the exception holds the iterator and keeps the workers alive
    return one_line(caught.value)


def assert_same_samples(mine, theirs, without=()):
    assert sorted(mine) == sorted(set(theirs) - set(without))
    for index in mine:
        assert torch.equal(mine[index][0], theirs[index][0]) and mine[index][1] == theirs[index][1]


@pytest.mark.parametrize('which', ['training', 'validation'])
@pytest.mark.parametrize('kind', KINDS)
def test_a_bad_file_stops_the_run_or_is_skipped(sets, kind, which):
    args, *parts = sets('--bad_images=skip')
    part = parts[which == 'validation']
    path = part.samples[3][0]
    expected, none = by_index(datasets.build_loaders(args, *parts)[which == 'validation'])
    assert none == [] and sorted(expected) == list(range(12))
    spoil(path, kind)

    with within(20):
        samples, unreadable = by_index(datasets.build_loaders(args, *parts)[which == 'validation'])
    assert_same_samples(samples, expected, without=[3])
    (bad_path, reason), = unreadable
    assert bad_path == path and KINDS[kind][1] in reason and reason.isprintable() and reason
    assert '_io.' not in reason

    for workers in (0, 1) if kind in ('half a jpeg', 'pipe') else (0,):
        args, *parts = sets('--bad_images=error', '--num_workers=%d' % workers)
        parts[which == 'validation'].samples = [(path, 0)] * 12
        with within(20):
            message = error_of(datasets.build_loaders(args, *parts)[which == 'validation'])
        assert message.startswith('%s: cannot be read as an image (%s)' % (path, reason))
        assert '--bad_images skip' in message



def test_out_of_memory_is_named(sets, monkeypatch):
    _, train, _ = sets()

    def full(*_):
        raise MemoryError
    monkeypatch.setattr(Image, 'open', full)
    with pytest.raises(decode.UnreadableImage, match='%s: .*MemoryError' % os.path.basename(train.samples[0][0])):
        train.load(train.samples[0][0])


@pytest.mark.parametrize('pixels, is_bomb', [(64 * 64, False), (64 * 64 // 2, False), (64 * 64 // 2 - 1, True)])
def test_large_images_are_read_up_to_the_size_that_pillow_refuses(tmp_path, monkeypatch, recwarn, pixels, is_bomb):
    path = str(tmp_path / 'a.png')
    photo(1, 64, 64).save(path)
    monkeypatch.setattr(Image, 'MAX_IMAGE_PIXELS', pixels)
    if is_bomb:
        with pytest.raises(decode.UnreadableImage, match='decompression bomb.*--max_pixels raises the limit'):
            decode.load_image(path)
        read = transforms.EvalTransform().reader('exact', 64 * 64)
        assert pickle.loads(pickle.dumps(read))(path).size == (64, 64)
        with pytest.raises(decode.UnreadableImage, match='bomb'):
            transforms.EvalTransform().reader('exact', 64 * 64 - 2)(path)
        assert pixels == Image.MAX_IMAGE_PIXELS
    else:
        assert decode.load_image(path).size == (64, 64)


def test_a_large_image_is_read_without_a_warning(tmp_path):
    path = str(tmp_path / 'a.png')
    photo(1, 64, 64).save(path)
    code = ('import sys; sys.path.insert(0, %r); from beit.data import decode; from PIL import Image; '
            'Image.MAX_IMAGE_PIXELS = 3000; print(decode.load_image(%r).size)' % (ROOT, path))
    result = subprocess.run([sys.executable, '-W', 'always::Warning:PIL', '-c', code], stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, universal_newlines=True, timeout=120)
    assert result.stdout == '(64, 64)\n' and 'DecompressionBomb' not in result.stderr


def test_files_without_read_permission(public_folder, parse):
    for split in ('train', 'val'):
        for name in ('cat', 'dog'):
            folder = os.path.join(public_folder, split, name)
            os.makedirs(folder)
            for index in range(3):
                photo(index, 32, 32).save(os.path.join(folder, '%d.png' % index))
    locked_file, locked_folder = (os.path.join(public_folder, *parts) for parts in (('train', 'cat', '1.png'),
                                                                                    ('val', 'dog')))
    os.chmod(locked_file, 0)
    with as_nobody():
        args = parse('--data_path', public_folder, '--bad_images=skip', '--batch_size=3', *NANO)
        train, val, _ = datasets.build_datasets(args)
        samples, unreadable = by_index(datasets.build_loaders(args, train, val)[0])
        assert sorted(samples) == [0, 2, 3, 4, 5] and unreadable == [(locked_file, 'Permission denied')]
    for mode in (0o300, 0o400):  # a folder that can't be listed; whose files can be listed, but not opened
        os.chmod(locked_folder, mode)
        if os.geteuid() == 0:
            os.chown(locked_folder, 65534, 65534)
        with as_nobody():
            if mode == 0o300:
                with pytest.raises(UserError) as caught:
                    datasets.build_datasets(args)
                assert str(caught.value).startswith(locked_folder + ': ') and 'Permission denied' in str(caught.value)
            else:
                val = datasets.build_datasets(args)[1]
                samples, unreadable = by_index(datasets.build_loaders(args, None, val)[1])
                assert sorted(samples) == [0, 1, 2] and len(unreadable) == 3
    os.chmod(locked_folder, 0o700)


@pytest.mark.parametrize('mode', ['error', 'skip'])
@pytest.mark.parametrize('is_train, side', [(True, 20), (False, 30)])
def test_a_wrong_size_is_an_error_in_both_modes(sets, mode, is_train, side):
    args, *parts = sets('--bad_images=' + mode)
    path = parts[not is_train].samples[2][0]
    photo(1, side, 40).save(path)
    message = error_of(datasets.build_loaders(args, *parts)[not is_train])
    assert message.startswith('%s is %dx40' % (path, side)) and '--input_size' in message


@pytest.mark.parametrize('workers', [0, 2])
def test_a_batch_without_readable_images(sets, workers):
    args, train, val = sets('--bad_images=skip', '--num_workers=%d' % workers, '--dist_eval')
    for index in range(6):
        spoil(val.samples[index][0], 'text')
    for path, _ in train.samples:
        spoil(path, 'empty')
    train_loader, val_loader = datasets.build_loaders(args, train, val)
    for loader, sizes, left_out in ((val_loader, [0, 6], [6, 0]), (train_loader, [0, 0, 0], [4, 4, 4])):
        batches = list(loader)
        assert [len(batch.unreadable) for batch in batches] == left_out
        for batch, size in zip(batches, sizes):
            assert batch.images.shape == (size, 3, 32, 32) and batch.images.dtype == torch.float32
            assert batch.targets.shape == batch.indices.shape == (size,)
            assert batch.targets.dtype == batch.indices.dtype == torch.int64


def test_skipped_files_do_not_depend_on_the_workers(sets):
    """Neither does the augmentation of the other images, with every default augmentation."""
    results = {}
    for number, kind in enumerate(('text', 'half a jpeg', 'dangling link')):
        spoil(sets()[1].samples[2 * number + 1][0], kind)
        spoil(sets()[2].samples[2 * number + 1][0], kind)
    for workers in (0, 1, 2):
        args, train, val = sets('--bad_images=skip', '--num_workers=%d' % workers)
        for is_train, loader in zip((True, False), datasets.build_loaders(args, train, val)):
            for epoch in (0, 1) if is_train else (0,):
                if is_train:
                    loader.sampler.set_epoch(epoch)
                results[workers, is_train, epoch] = list(loader)
    for (_, is_train, epoch), batches in results.items():
        assert sum(len(batch.unreadable) for batch in batches) == 3
        for mine, theirs in zip(batches, results[0, is_train, epoch]):
            assert all(torch.equal(*pair) for pair in zip(mine[:3], theirs[:3]))
            assert mine.unreadable == theirs.unreadable
    assert not torch.equal(results[0, True, 0][0].images, results[0, True, 1][0].images)


def test_batches_survive_page_locking(monkeypatch):
    """As in the loader's thread; the page locking itself needs a device."""
    locked = []
    monkeypatch.setattr(torch.Tensor, 'pin_memory', lambda tensor, *_: locked.append(tensor.shape) or tensor)
    item = torch.zeros(8, 8, 3, dtype=torch.uint8)
    items = [Sample(item, 1, 5), Unreadable('a.png', 'it is empty'),
             Sample(item, 0, 7, (3, [(1, 2, 3, 4)]))]
    for batch in (collate(items, 8), collate(items[1:2], 8)):
        pinned = pin_memory(batch)
        assert isinstance(pinned, Batch)
        assert pinned.unreadable == [('a.png', 'it is empty')]
        assert isinstance(pinned.unreadable[0], Unreadable)
        assert len(pinned.erasing) == (len(batch.images) == 2)
    assert locked == [(2, 3, 8, 8), (2,), (2,), (0, 3, 8, 8), (0,), (0,)]


# ---- names and folders

ODD_NAMES = [b'new\nline.png', b'tab\t.png', b'return\r.png', b'\xff\xfe.png', 'gr\u00fc\u00df.png'.encode(), b' .png',
             b'back\\slash.png', b'bell\x07.png', b'\xe2\x80\xa8.png', b"'quoted\".png", b'-rf.png', b'%s.png']


def odd_folder(root):
    """A data set with odd names of class folders and files; every file is the same picture."""
    for split in (b'train', b'val'):
        for folder in (b'cl\nass \xff', b'cat'):
            path = os.path.join(os.fsencode(str(root)), split, folder)
            os.makedirs(path)
            for index, name in enumerate(ODD_NAMES):
                with open(os.path.join(path, name), 'wb') as file:
                    photo(index, 32, 32).save(file, format='png')
    return os.fsdecode(os.fsencode(str(root)))


@pytest.mark.parametrize('workers', [0, 2])
def test_odd_names_are_read(tmp_path, parse, workers):
    root = odd_folder(tmp_path / os.fsdecode(b'ro\not\xfe'))
    args = parse('--data_path', root, *SMALL, '--num_workers=%d' % workers)
    locations.check_paths(args)
    train, val, classes = datasets.build_datasets(args)
    assert [os.fsencode(name) for name in classes] == [b'cat', b'cl\nass \xff']
    samples, _ = by_index(datasets.build_loaders(args, train, val)[1])
    assert len(samples) == 2 * len(ODD_NAMES)
    names = sorted(os.fsdecode(name) for name in ODD_NAMES)
    for index, (image, label) in samples.items():
        number = ODD_NAMES.index(os.fsencode(names[index % len(names)]))
        assert np.array_equal(np.rint((image.numpy() * 0.5 + 0.5) * 255).transpose(1, 2, 0),
                              np.asarray(photo(number, 32, 32)))
        assert label == index // len(names)


@pytest.mark.parametrize('workers', [0, 2])
def test_odd_names_are_reported_on_one_line(tmp_path, parse, capsys, workers):
    root = odd_folder(tmp_path / 'root')
    args = parse('--data_path', root, *SMALL, '--num_workers=%d' % workers, '--bad_images=skip')
    train, val, _ = datasets.build_datasets(args)
    for path, _ in val.samples:
        spoil(path, 'text')
    _, unreadable = by_index(datasets.build_loaders(args, None, val)[1])
    assert [path for path, _ in unreadable] == [image_name(val, index) for index in range(len(val))]
    assert len({path for path, _ in unreadable}) == 2 * len(ODD_NAMES)
    record = UnreadableFiles(str(tmp_path / 'out'), 1.)
    record.report(unreadable, len(val), 'validation')
    with open(str(tmp_path / 'out' / 'bad_images.txt'), 'rb') as file:
        lines = file.read().decode('ascii', 'backslashreplace').splitlines()
    assert len(lines) == len(unreadable) == len(capsys.readouterr().out.splitlines())
    assert lines[0].count('\t') == 1
    assert any('/cl\\nass \\xff/bell\\x07.png\t' in line for line in lines)
    args.bad_images = 'error'
    message = error_of(datasets.build_loaders(args, None, val)[1])
    assert message.isprintable() and message.startswith(image_name(val, 0) + ': cannot be read as an image')


def test_a_nul_in_a_name(parse, tmp_path):
    with pytest.raises(decode.UnreadableImage, match='a\\\\x00b.png: cannot be read as an image .*null'):
        decode.load_image('a\0b.png')
    with pytest.raises(UserError, match='x\\\\x00y'):
        locations.check_paths(parse('--data_path', str(tmp_path / 'x\0y'), *NANO))
    with pytest.raises(UserError, match='x\\\\x00y'):
        ImageFolder('x\0y')


def test_names_that_the_locale_cannot_encode(monkeypatch):
    monkeypatch.setattr(os, 'fsencode', lambda path: path.encode('ascii', 'surrogateescape'))
    with pytest.raises(UserError, match='my photos ü/nein.pth: no such file'):
        weights_file.load_weights_file('my photos ü/nein.pth')


def test_samples_have_names(sets):
    _, train, _ = sets()
    assert image_name(train, 4) == train.samples[4][0]
    assert image_name([0] * 20, 17) == 'image 17'


def test_a_folder_named_like_an_image_is_entered(tmp_path):
    (tmp_path / 'cat' / 'x.jpg').mkdir(parents=True)
    photo(1, 32, 32).save(str(tmp_path / 'cat' / 'x.jpg' / 'y.png'))
    folder = ImageFolder(str(tmp_path))
    assert list(folder.samples) == [(str(tmp_path / 'cat' / 'x.jpg' / 'y.png'), 0)]
    assert folder[0][0].size == (32, 32)


LOOPS = {  # the link in photos/cat/deep or elsewhere, and its target
    'to its folder': ('photos/cat/deep/loop', '.'),
    'up': ('photos/cat/deep/loop', '..'),
    'to the top': ('photos/cat/deep/loop', '../..'),
    'above the top': ('photos/cat/deep/loop', '../../..'),
    'to everything': ('photos/cat/deep/loop', '/'),
    'named like an image': ('photos/cat/deep/loop.png', '..'),
    'a class': ('photos/loop', '.'),
    'by another folder': ('other/back', '../photos/cat'),
}


@pytest.mark.parametrize('kind', LOOPS)
def test_a_loop_of_links_is_named(tmp_path, kind):
    for folder in ('photos/cat/deep', 'photos/dog', 'other'):
        (tmp_path / folder).mkdir(parents=True)
    for name in ('photos/cat/deep/a.png', 'photos/dog/a.png', 'other/a.png'):
        photo(1, 32, 32).save(str(tmp_path / name))
    (tmp_path / 'photos/cat/deep/other').symlink_to(str(tmp_path / 'other'))  # leads out of the folder, without a loop
    assert len(ImageFolder(str(tmp_path / 'photos'))) == 3
    link, target = LOOPS[kind]
    (tmp_path / link).symlink_to(target)
    named = str(tmp_path / link).replace('/other/back', '/photos/cat/deep/other/back')
    with within(20), pytest.raises(UserError) as caught:
        ImageFolder(str(tmp_path / 'photos'))
    assert str(caught.value).startswith(named + ': this link leads to ')


@pytest.mark.parametrize('target', ['nowhere', 'link'])
@pytest.mark.parametrize('where', ['', 'cat'])
def test_a_broken_link_may_be_a_folder_of_images(tmp_path, where, target):
    (tmp_path / 'cat').mkdir()
    photo(1, 32, 32).save(str(tmp_path / 'cat' / 'a.png'))
    (tmp_path / where / '.hidden').symlink_to('nowhere')
    (tmp_path / where / 'lost.png').symlink_to(target.replace('link', 'lost.png'))
    expected = 2 if where else 1  # an unreadable file; beside the class folders it is ignored
    assert len(class_folders.scan_classes(str(tmp_path))[1]) == expected
    (tmp_path / where / 'link').symlink_to(target)
    with pytest.raises(UserError) as caught:
        class_folders.scan_classes(str(tmp_path))
    assert str(caught.value).startswith(str(tmp_path / where / 'link') + ': ')


def test_a_very_deep_folder(tmp_path):
    folder = str(tmp_path / 'cat' / os.path.join(*['d'] * 1200))  # deeper than Python's stack
    try:
        subprocess.run(['mkdir', '-p', folder], check=True)
        photo(1, 32, 32).save(os.path.join(folder, 'a.png'))
        classes, samples, _ = class_folders.scan_classes(str(tmp_path))
        assert classes == ['cat'] and list(samples) == [(os.path.join(folder, 'a.png'), 0)]
    finally:
        subprocess.run(['rm', '-rf', str(tmp_path / 'cat')], check=True)  # pytest can't


# ---- the list and the limit

def check_data(args):
    return unreadable_module.check_data(datasets.build_datasets(args)[:2], args.num_workers, args.output_dir)[0]


def lines_of(folder):
    with open(os.path.join(str(folder), 'bad_images.txt'), encoding='utf-8') as file:
        return file.read().splitlines()


def test_each_path_is_reported_and_listed_once(tmp_path, capsys):
    record = UnreadableFiles(str(tmp_path), 0.5)
    record.report([], 10, 'training')
    assert os.listdir(str(tmp_path)) == []
    record.report([['b.png', 'it is empty'], ('a.png', 'cut')], 10, 'training')
    record.report([('b.png', 'it is empty'), ('b.png', 'it is empty')], 10, 'training')
    record.report([('c.png', 'it is empty')], 10, 'validation')
    assert os.listdir(str(tmp_path)) == ['bad_images.txt']
    assert lines_of(tmp_path) == ['b.png\tit is empty', 'a.png\tcut', 'c.png\tit is empty']
    told = capsys.readouterr().out.splitlines()
    assert len(told) == 3 and all(line.split('\t')[0] in told[index] for index, line in enumerate(lines_of(tmp_path)))


@pytest.mark.parametrize('share, total, allowed', [(0.001, 1000, 1), (0.001, 999, 0), (0.001, 3000, 3), (0.29, 100, 29),
                                                   (0., 50, 0), (0.07, 100, 7), (1., 4, 4)])
def test_the_limit_is_a_share_of_the_set(tmp_path, share, total, allowed):
    record = UnreadableFiles(str(tmp_path), share)
    bad = [('%d.png' % index, 'it is empty') for index in range(allowed + 1)]
    for _ in range(3):
        record.report(bad[:allowed], total, 'training')
        record.report(bad[:allowed], total, 'validation')  # counted separately
    if allowed == total:
        return
    with pytest.raises(UserError) as caught:
        record.report(bad[allowed:], total, 'training')
    for word in ('--max_bad_images %g' % share, '%d of the %d training images' % (allowed + 1, total),
                 str(tmp_path / 'bad_images.txt')):
        assert word in str(caught.value)
    assert len(lines_of(tmp_path)) == allowed + 1, 'the list is written before the stop'


def test_a_resumed_run_counts_known_files_without_reporting_them(tmp_path, capsys):
    UnreadableFiles(str(tmp_path), 0.1).report([('a.png', 'it is empty'), ('b\\n.png', 'x')], 20, 'training')
    capsys.readouterr()
    resumed = UnreadableFiles(str(tmp_path), 0.1)
    resumed.report([('a.png', 'it is empty')], 20, 'training')
    assert capsys.readouterr().out == ''
    resumed.report([('c.png', 'y')], 20, 'training')  # the second in this run; b may have been repaired
    assert len(capsys.readouterr().out.splitlines()) == 1
    assert lines_of(tmp_path) == ['a.png\tit is empty', 'b\\n.png\tx', 'c.png\ty']
    with pytest.raises(UserError, match='3 of the 20 training images'):
        resumed.report([('b\\n.png', 'x')], 20, 'training')


def test_only_the_first_process_writes_but_all_stop(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(process_group, 'rank', lambda: 1)
    with pytest.raises(UserError, match='1 of the 10 validation images'):
        UnreadableFiles(str(tmp_path), 0.01).report([('a.png', 'x')], 10, 'validation')
    assert os.listdir(str(tmp_path)) == [] and capsys.readouterr().out == ''


def test_without_a_folder_there_is_no_list(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match='cannot be read'):
        UnreadableFiles('', 0.01).report([('a.png', 'x')], 10, 'training')
    assert os.listdir(str(tmp_path)) == [] and 'a.png' in capsys.readouterr().out


# ---- --check_data

def spoil_some(sets):
    """{path: part of its error} of files of every kind, more than one worker gets at once."""
    _, train, val = sets()
    for kind, (path, _) in zip(KINDS, train.samples[::2] + val.samples[:]):
        spoil(path, kind)
    # The next listing has neither deleted files nor files that became folders.
    return {path: KINDS[kind][1] for kind, (path, _) in zip(KINDS, train.samples[::2] + val.samples[:])
            if kind not in ('gone', 'folder')}


@pytest.mark.parametrize('flags', [(), ('--eval',), ('--disable_eval_during_finetuning',)], ids=str)
def test_check_data_finds_every_bad_file(image_folder, parse, tmp_path, capsys, monkeypatch, flags):
    monkeypatch.setattr(unreadable_module, 'FILES_AT_ONCE', 3)
    root = image_folder(train=15, val=8)
    args = parse('--data_path', root, *SMALL)
    expected = spoil_some(lambda: (args,) + datasets.build_datasets(args)[:2])
    splits = {'--eval': ['val'], '--disable_eval_during_finetuning': ['train']}.get(flags[0] if flags else '',
                                                                                    ['train', 'val'])
    expected = {path: reason for path, reason in expected.items() if path.split(os.sep)[-3] in splits}
    count = sum(len(class_folders.scan_classes(os.path.join(root, split))[1]) for split in splits)
    assert len(expected) >= 3 and count > 2 * len(expected) or '--eval' in flags
    results = []
    for workers in (0, 1, 3):
        out = str(tmp_path / ('out %d' % workers))
        with within(60):
            found = check_data(parse('--data_path', root, '--output_dir', out, *SMALL, '--num_workers=%d' % workers,
                                     *flags))
        told, progress = capsys.readouterr()
        told = told.splitlines()
        assert told[-1] == 'Checked %d images: %d cannot be read' % (count, found)
        assert sorted(told[:-1]) == sorted(lines_of(out)) and progress == ''
        results.append((found, lines_of(out)))
    assert results[1:] == results[:1] * 2
    listed = [line.split('\t') for line in results[0][1]]
    assert found == len(expected) == len(listed)
    assert sorted(path for path, _ in listed) == sorted(expected)
    assert [path for path, _ in listed] == sorted((path for path, _ in listed))
    wrong = [(expected[path], reason) for path, reason in listed if expected[path] not in reason]
    assert not wrong


def test_check_data_applies_the_size_rule_of_small_inputs(sets, parse, tmp_path, capsys):
    args, train, val = sets('--output_dir', str(tmp_path / 'out'))
    photo(1, 30, 32).save(val.samples[4][0])
    photo(1, 30, 32).save(train.samples[4][0])  # padding enlarges it
    assert check_data(args) == 1
    line, = lines_of(tmp_path / 'out')
    assert line.startswith(val.samples[4][0] + '\tit is 30x32; with --input_size')
    photo(1, 32, 32).save(val.samples[4][0])
    assert check_data(args) == 0
    assert not (tmp_path / 'out' / 'bad_images.txt').exists(), 'an earlier list would be wrong now'


def test_check_data_lists_empty_class_folders_and_goes_on(image_folder, tmp_path, capsys):
    root, out = image_folder(), tmp_path / 'out'
    os.mkdir(os.path.join(root, 'train', 'owl'))
    spoil(os.path.join(root, 'val', 'dog', os.listdir(os.path.join(root, 'val', 'dog'))[0]), 'text')
    flags = ['--data_path', root, '--output_dir', str(out), *SMALL, '--num_workers=0']
    assert run_class_finetuning.run(flags) == 2
    assert 'no image in the class folder' in capsys.readouterr().err  # a training stops there
    flags.append('--check_data')
    assert run_class_finetuning.run(flags) == 2
    done = capsys.readouterr()
    assert '%s\tno image in this class folder' % os.path.join(root, 'train', 'owl') in done.out
    assert '1 cannot be read; no image in 1 class folder' in done.out and '1 image cannot be read' in done.err
    os.remove(lines_of(out)[0].split('\t')[0])
    assert run_class_finetuning.run(flags) == 2
    assert '--check_data: 1 class folder without an image' in capsys.readouterr().err
    assert not (out / 'bad_images.txt').exists()


@pytest.mark.parametrize('workers', [1, 2])
def test_check_data_survives_a_crashing_file(sets, tmp_path, capsys, monkeypatch, workers):
    """As if a decoder crashed, or the system killed a process for its memory."""
    monkeypatch.setattr(unreadable_module, 'FILES_AT_ONCE', 4)
    args, train, val = sets('--num_workers=%d' % workers, '--output_dir', str(tmp_path / 'out'))
    deadly = [train.samples[1][0], train.samples[2][0], val.samples[11][0]]
    spoil(val.samples[0][0], 'text')

    class Crashing(ImageFolder):
        def load(self, path):
            if path in deadly:
                faulthandler.disable()  # pytest's handler; keep its trace out of the tests' output
                os.kill(os.getpid(), signal.SIGSEGV if path == deadly[0] else signal.SIGKILL)
            return super().load(path)
    monkeypatch.setattr(datasets, 'ImageFolder', Crashing)
    with within(60):
        assert check_data(args) == 4
    assert [line.split('\t')[0] for line in lines_of(tmp_path / 'out')] == deadly[:2] + [val.samples[0][0], deadly[2]]
    assert sum('died' in line for line in lines_of(tmp_path / 'out')) == 3


def test_check_data_retries_the_files_of_a_killed_worker(sets, tmp_path, monkeypatch):
    monkeypatch.setattr(unreadable_module, 'FILES_AT_ONCE', 2)
    args, train, _ = sets('--num_workers=2')
    flag = str(tmp_path / 'killed once')

    class Once(ImageFolder):
        def load(self, path):
            if path == train.samples[5][0] and not os.path.exists(flag):
                with open(flag, 'w', encoding='utf-8'):
                    os.kill(os.getpid(), signal.SIGKILL)
            return super().load(path)
    monkeypatch.setattr(datasets, 'ImageFolder', Once)
    with within(60):
        assert check_data(args) == 0
    assert os.path.exists(flag)


def test_check_data_counts_the_images_of_cifar(tmp_path, monkeypatch, parse, capsys):
    write_cifar(tmp_path, monkeypatch)
    args = parse('--data_set=CIFAR', '--data_path', str(tmp_path), *NANO)
    assert check_data(args) == 0
    assert capsys.readouterr().out.splitlines()[-1] == 'Checked 19 images: 0 cannot be read'


def test_there_is_a_progress_bar_on_a_terminal(sets, monkeypatch, capsys):
    args, _, _ = sets()
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack('4H', 25, 100, 0, 0))
    with within(60), os.fdopen(theirs, 'w') as terminal:
        monkeypatch.setattr(sys, 'stderr', terminal)
        check_data(args)
        terminal.flush()
        shown = ''
        while '24/24' not in shown:  # a terminal may return the output in parts
            shown += os.read(ours, 65536).decode()
    os.close(ours)
    assert 'Checking' in shown
    assert capsys.readouterr().out == 'Checked 24 images: 0 cannot be read\n'


# ---- the workers of loaders and signals

LOADING = '''
import os, signal, sys, time
sys.path.insert(0, %r)
import torch
from beit.data.loader import worker_init

class Slow(torch.utils.data.Dataset):
    def __len__(self):
        return 12
    def __getitem__(self, index):
        time.sleep(0.05)
        return torch.tensor(index)

loader = torch.utils.data.DataLoader(Slow(), batch_size=2, num_workers=2, worker_init_fn=worker_init)
batches = iter(loader)
seen = next(batches).tolist()
for number in (signal.SIGTERM, signal.SIGINT):
    signal.signal(number, lambda *_: None)
print(' '.join(str(worker.pid) for worker in batches._workers), flush=True)
sys.stdin.readline()
for batch in batches:
    seen += batch.tolist()
print(sorted(seen) == list(range(12)), flush=True)
if 'leave' in sys.argv:
    kept = iter(loader)
    next(kept)
    raise RuntimeError('with the workers still there')
''' % ROOT


@contextlib.contextmanager
def loading(*arguments):
    """A process in a new group that has begun to load, and the ids of its two workers."""
    process = subprocess.Popen([sys.executable, '-c', LOADING] + list(arguments), stdin=subprocess.PIPE,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, universal_newlines=True,
                               start_new_session=True)
    try:
        with within(60):
            workers = [int(word) for word in process.stdout.readline().split()]
            assert len(workers) == 2
            yield process, workers
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def is_alive(pid):
    try:
        with open('/proc/%d/stat' % pid, encoding='utf-8') as file:
            return file.read().rpartition(')')[2].split()[0] != 'Z'
    except FileNotFoundError:
        return False


def test_workers_leave_a_group_signal_to_the_main_process():
    with loading() as (process, workers):
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGTERM):
            os.killpg(process.pid, number)
            time.sleep(0.1)
        out, err = process.communicate('continue\n')
        assert process.returncode == 0 and out == 'True\n', err
        assert not any(map(is_alive, workers))


@pytest.mark.needs('linux', sys.platform.startswith('linux'), 'only Linux signals the end of a parent')
def test_workers_exit_when_the_main_process_is_killed():
    with loading() as (process, workers):
        time.sleep(0.5)  # they have read every requested batch, and wait
        assert all(map(is_alive, workers))
        process.kill()
        process.wait()
        time.sleep(1)  # PyTorch's own check takes 5 seconds
        assert not any(map(is_alive, workers))


HOOKED = '''
import sys
sys.path.insert(0, %r)
import torch
from beit.data.loader import worker_init

class Failing(torch.utils.data.Dataset):
    def __len__(self):
        return 1
    def __getitem__(self, index):
        for error in (EOFError('a'), ConnectionResetError('b'), ValueError('reported')):
            sys.excepthook(type(error), error, None)
        return index

print(len(list(torch.utils.data.DataLoader(Failing(), num_workers=1, worker_init_fn=worker_init))))
''' % ROOT


def test_a_worker_is_quiet_when_the_main_process_is_killed():
    """One in 600 kills hit a worker's multiprocessing thread while it sent a batch, and printed a traceback."""
    done = subprocess.run([python(), '-c', HOOKED], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                          universal_newlines=True, timeout=60)
    assert (done.stdout, done.stderr) == ('1\n', 'ValueError: reported\n')


def test_a_main_process_that_fails_does_not_wait_for_its_workers():
    with loading('leave') as (process, _):
        started = time.time()
        out, err = process.communicate('continue\n')
        assert out == 'True\n' and 'with the workers still there' in err and process.returncode == 1
        assert time.time() - started < 40
