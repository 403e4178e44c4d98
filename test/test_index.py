"""The index of class folders: it gives what a scan gives, notices each change, and is worth nothing when damaged."""

import functools
import json
import os
import pickle
import re
import shutil
import stat
import subprocess
import sys
import time

import numpy as np
import pytest

import bad_images
import class_folders
import datasets
import image_dataset
import distributed
import index_cache
import run_class_finetuning
from helpers import NANO, ROOT, RUN, as_nobody, free_port, photo
from errors import UserError

HOUR_NS = 3600 * 10 ** 9


def settle(root):
    """Make the folders look an hour old, links' targets too, as those of a data set that nobody is writing."""
    then = time.time_ns() - HOUR_NS
    for folder, _, _ in os.walk(root, followlinks=True):
        if os.stat(folder).st_mtime_ns > then:
            os.utime(folder, ns=(then, then))


def touch(path):
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path, 'wb'):
        pass


@pytest.fixture
def scans(monkeypatch):
    """The roots that were scanned so far, a list that grows."""
    roots = []

    def scan(root, keep_alive=lambda: None, scan=class_folders.scan_classes):
        roots.append(root)
        return scan(root, keep_alive)
    monkeypatch.setattr(index_cache, 'scan_classes', scan)
    return roots


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """The folder of the indexes, which isn't there yet."""
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'cache'))
    return str(tmp_path / 'cache' / 'beit-pytorch' / 'folder_index')


@pytest.fixture
def tree(tmp_path):
    """A settled tree of everything that a scan knows: depth, links, odd names, empty and hidden folders."""
    root = os.path.join(os.fsdecode(os.fsencode(str(tmp_path))), 'data', os.fsdecode(b'ro\not \xff'))
    for name in (b'b/2.png', b'b/10.JPG', b'b/a/x.tiff', b'b/a-b/x.webp', b'b/a/deep/er/1.bmp', b'b/a/deep.png',
                 b'B/only/below/1.ppm', 'a b/\u00fc\U0001f600.jpeg'.encode(), b'a b/notes.txt', b'a b/new\nline.png',
                 b'a b/\xff\xfe\r.png', b'a b/\xee\x80\x80.png', b'a b/\xf0.png', b'x.jpg/1.png', b'10/tab\t.pgm',
                 b'cl\nass \xfe/1.tif', b'loose.png', b'.hidden/1.png', b'b/.hidden.png', b'__MACOSX/1.png',
                 b'../outside/c/1.png', b'../outside/2.png', b'../other/3.png', b'../other/d/4.png'):
        touch(os.path.join(root, os.fsdecode(name)))
    os.makedirs(os.path.join(root, 'b', 'empty', 'emptier'))
    for link, target in (('linked class', '../outside'), ('b/more', '../../other'), ('10/gone.png', 'nowhere'),
                         ('10/file.png', '../b/2.png'), ('10/text', '../a b/notes.txt'), ('10/chain', '../b/more'),
                         ('10/.gone', 'nowhere')):
        os.symlink(target, os.path.join(root, link))
    settle(os.path.dirname(root))
    return root


@pytest.fixture
def plain(tmp_path):
    """A small settled tree."""
    root = str(tmp_path / 'root')
    for name in ('cat/1.png', 'cat/2.png', 'cat/sub/3.png', 'dog/4.png'):
        touch(os.path.join(root, name))
    settle(root)
    return root


def start(root, device=None):
    return image_dataset.ImageFolder(root, scan=functools.partial(index_cache.load_or_scan, device=device))


def assert_same(found, root):
    classes, samples = class_folders.scan_classes(root)[:2]
    assert found.classes == classes and list(found.samples) == list(samples)
    assert found.samples.targets.tolist() == [label for _, label in samples]


# ---- the same as a scan

def test_what_the_index_gives_is_what_a_scan_gives(tree, scans, cache, monkeypatch, capsys):
    first = start(tree)
    with monkeypatch.context() as patch:
        patch.delattr(os, 'scandir')
        second = start(tree)
    assert scans == [tree] and capsys.readouterr().out == ''
    for found in (first, second):
        assert_same(found, tree)
    assert len(second) == 23 and len(second.classes) == 7
    copy = pickle.loads(pickle.dumps(second))
    assert list(copy.samples) == list(second.samples) and len(pickle.dumps(second)) < 6000
    monkeypatch.chdir(os.path.dirname(tree))
    for root in (os.path.basename(tree), './' + os.path.basename(tree) + '/'):  # paths begin as the user wrote it
        assert_same(start(root), root)
    assert len(scans) == 1 and stat.S_IMODE(os.stat(cache).st_mode) == 0o700 and len(os.listdir(cache)) == 1


def test_a_list_of_images_is_a_sequence(tree):
    samples = start(tree).samples
    pairs = list(samples)
    assert samples == pairs and samples != pairs[:-1] and samples != pairs[::-1]
    assert samples[3:-2] == pairs[3:-2] and samples[::-1] == pairs[::-1] and samples[-1] == pairs[-1]
    assert samples[np.int64(4)] == pairs[4] and pairs[5] in samples and samples.index(pairs[6]) == 6
    for index in (len(pairs), -len(pairs) - 1):
        with pytest.raises(IndexError):
            samples[index]
    assert len(class_folders.ImageList('x', [''], [0], [0], b'')) == 0


# ---- what is noticed

def other(tree, name):
    return os.path.join(os.path.dirname(tree), name)


def replace_link(path, target):
    os.remove(path)
    os.symlink(target, path)


def swap_for_folder(path):
    os.remove(path)
    touch(os.path.join(path, '7.png'))


CHANGES = {  # what is done to a tree, whose folders then look as old as before
    'a file more': lambda tree: touch(tree + '/b/a/new.png'),
    'a file more below a link': lambda tree: touch(other(tree, 'other/d/new.png')),
    'a file less': lambda tree: os.remove(tree + '/b/2.png'),
    'a file renamed': lambda tree: os.rename(tree + '/b/2.png', tree + '/b/3.png'),
    'a class more': lambda tree: touch(tree + '/new/1.png'),
    'a class less': lambda tree: shutil.rmtree(tree + '/B'),
    'classes swapped': lambda tree: [os.rename(tree + '/' + a, tree + '/' + b)
                                     for a, b in (('B', 'x'), ('10', 'B'), ('x', '10'))],
    'permissions': lambda tree: os.chmod(tree + '/b/a', 0o700),
    'a linked class leads elsewhere': lambda tree: replace_link(tree + '/linked class', '../other'),
    'a link to nothing leads to a folder': lambda tree: touch(tree + '/10/nowhere/1.png'),
    'a target behind two links is replaced': lambda tree: (
        os.rename(other(tree, 'other'), other(tree, 'gone')), touch(other(tree, 'other/6.png'))),
    'a target moved, a link mended': lambda tree: (
        os.rename(other(tree, 'outside'), other(tree, 'moved')), replace_link(tree + '/linked class', '../moved')),
    'a linked file became a folder': lambda tree: swap_for_folder(tree + '/b/2.png'),
}


@pytest.mark.parametrize('put_back', [False, True], ids=['', 'modification times put back'])
@pytest.mark.parametrize('change', CHANGES)
def test_a_change_is_noticed(tree, scans, capsys, change, put_back):
    start(tree)
    times = {path: os.stat(path).st_mtime_ns for path, _, _ in os.walk(os.path.dirname(tree), followlinks=True)}
    CHANGES[change](tree)
    if put_back:  # as tar and rsync do
        for path in filter(os.path.isdir, times):
            os.utime(path, ns=(times[path], times[path]))
    assert_same(start(tree), tree)
    assert scans == [tree] * 2
    line, = capsys.readouterr().out.splitlines()
    assert 'looking for its images again, since ' in line and line.endswith(' changed') and line.isprintable()


def test_the_file_behind_a_link_becomes_a_folder(tmp_path, scans):
    """None of the tree's own folders knows of it."""
    root, target = str(tmp_path / 'root'), str(tmp_path / 'elsewhere' / 'target')
    touch(root + '/cat/1.png')
    touch(target)
    os.symlink(target, root + '/cat/2.png')
    settle(root)
    assert len(start(root)) == len(start(root)) == 2 and len(scans) == 1
    os.remove(target)
    assert len(start(root)) == 2 and len(scans) == 1, 'the link is an image that cannot be read'
    for name in ('a', 'b'):
        touch(os.path.join(target, name + '.png'))
    assert_same(start(root), root)
    assert len(start(root)) == 3


def test_what_a_scan_refuses_is_refused_with_an_index_too(tree, scans):
    touch(other(tree, 'far/text'))
    replace_link(tree + '/10/text', '../../far/text')
    settle(tree)
    start(tree)
    start(tree)
    assert len(scans) == 1
    os.remove(other(tree, 'far/text'))
    for number in (2, 3):
        with pytest.raises(UserError, match='10/text: cannot look for images there'):
            start(tree)
        assert len(scans) == number, 'an error is never kept'
    touch(other(tree, 'far/text/1.png'))
    assert_same(start(tree), tree)


def test_folders_that_changed_just_now_are_not_trusted(tree, scans, capsys):
    """Nor those of a file server whose clock is ahead, or of a file system that keeps no times."""
    for number, (seconds, trusted) in enumerate(((0, False), (1.5, False), (-60, False), (1e10, False), (3, True)), 1):
        then = max(0, time.time_ns() - int(seconds * 1e9))
        os.utime(tree + '/b/a', ns=(then, then))
        start(tree)
        assert os.path.exists(index_cache.index_path(tree)) == trusted and len(scans) == number
    assert capsys.readouterr().out == ''


def test_a_change_while_it_is_looked_at(tree, monkeypatch):
    """What comes into a folder after it was listed is found the next time."""
    def late(root, folder, then=class_folders._list_folder):
        result = then(root, folder)
        if folder == 'b':
            touch(os.path.join(root, 'b', 'late.png'))
        return result
    with monkeypatch.context() as patch:
        patch.setattr(class_folders, '_list_folder', late)
        assert 'late.png' not in str(list(start(tree).samples))
    assert 'late.png' in str(list(start(tree).samples))


def test_another_user_who_may_not_list_a_folder(public_folder, scans):  # noqa: F811
    root = public_folder + '/root'
    touch(root + '/cat/1.png')
    touch(root + '/dog/1.png')
    if os.geteuid() == 0:
        os.chown(root + '/cat', 0, 0)
    os.chmod(root + '/cat', 0o711)
    settle(root)
    start(root)
    start(root)
    assert len(scans) == 1
    if os.geteuid() == 0:
        with as_nobody(), pytest.raises(UserError, match='cat: cannot look for images there .Permission denied'):
            start(root)


# ---- a file that is damaged, or somebody else's

def test_a_damaged_index_is_ignored(plain, scans):
    expected, path = list(start(plain).samples), index_cache.index_path(plain)
    with open(path, 'rb') as file:
        good = file.read()
    damaged = [good + b'x', b'', b'\n', bytes(4), bytes(9), good[22:]]
    for offset in list(range(0, len(good), 50)) + [5, len(good) - 1]:
        damaged += [good[:offset] + bytes([good[offset] ^ mask]) + good[offset + 1:] for mask in (0x01, 0x80)]
        damaged += [good[:offset], good[:offset] + b'\xaa' * (len(good) - offset), good[:offset] + good[offset + 1:]]
    for number, data in enumerate(damaged, 2):
        with open(path, 'wb') as file:
            file.write(data)
        assert list(start(plain).samples) == expected and len(scans) == number
        with open(path, 'rb') as file:
            assert file.read() == good


def move_and_link(path):
    os.rename(path, path + '.moved')
    os.symlink(path + '.moved', path)


PLANTED = {
    'a link': move_and_link,
    'a pipe': lambda path: (os.remove(path), os.mkfifo(path)),
    'a folder': lambda path: (os.remove(path), os.mkdir(path)),
    'of another user': lambda path: os.chown(path, 65534, -1),
    'in a folder of another user': lambda path: os.chown(os.path.dirname(path), 65534, -1),
    'in a folder that others can write': lambda path: os.chmod(os.path.dirname(path), 0o777),
    'in a linked folder': lambda path: move_and_link(os.path.dirname(path)),
}


@pytest.mark.parametrize('kind', PLANTED)
def test_an_index_that_others_may_have_planted_is_ignored(plain, scans, kind):
    if kind.endswith('another user') and os.geteuid():
        pytest.skip('NOT RUN: only root can give a file away')
    start(plain)
    PLANTED[kind](index_cache.index_path(plain))
    assert_same(start(plain), plain)
    assert len(scans) == 2


def test_an_index_of_another_tree_or_version_is_ignored(plain, scans, monkeypatch):
    start(plain)
    renamed, path = plain + '2', index_cache.index_path(plain)
    os.rename(plain, renamed)
    os.rename(path, index_cache.index_path(renamed))
    assert_same(start(renamed), renamed)
    assert len(scans) == 2
    for name, value in (('VERSION', 0), ('EXTENSIONS', ('.png',))):
        monkeypatch.setattr(index_cache, name, value)
        start(renamed)
    assert len(scans) == 4


# ---- where it is

def test_a_cache_that_cannot_be_written_is_not_missed(plain, scans, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv('HOME', '/dev/null')
    for number, folder in enumerate(('/dev/null', '/proc/none', 'relative'), 1):
        monkeypatch.setenv('XDG_CACHE_HOME', folder)
        assert len(start(plain)) == 4 and len(scans) == number
    assert os.listdir(str(tmp_path)) == ['root'] and capsys.readouterr().out == ''
    monkeypatch.setenv('HOME', str(tmp_path / 'home'))
    for _ in range(2):
        assert len(start(plain)) == 4 and len(scans) == 4
    assert index_cache.index_path(plain).startswith(str(tmp_path / 'home' / '.cache' / 'beit-pytorch'))


def test_a_full_disk_is_no_error(plain, cache, monkeypatch, capsys):
    def full(handle):
        raise OSError(28, 'No space left on device')
    monkeypatch.setattr(index_cache.safe_files.os, 'fsync', full)
    assert len(start(plain)) == 4 and capsys.readouterr().out == '' and os.listdir(cache) == []


def test_a_run_uses_an_index_of_training_and_of_validation(image_folder, tmp_path, scans, cache, capsys, parse):
    data, output = image_folder(), str(tmp_path / 'out')
    settle(data)
    base = RUN + ['--data_path=' + data, '--epochs=1', '--maxstep=1', '--output_dir=' + output]
    assert run_class_finetuning.run(base + ['--no_index_cache']) == 0
    assert scans == [] and not os.path.exists(cache)
    assert run_class_finetuning.run(base) == 0
    assert scans == [data + '/train', data + '/val'] and len(os.listdir(cache)) == 2
    assert run_class_finetuning.run(base + ['--eval', '--resume=' + output, '--output_dir=%s' % (tmp_path / 'no')]) == 0
    assert bad_images.check_data(datasets.build_datasets(parse('--data_path=' + data, *NANO))[:2], 0, '') == 0
    assert len(scans) == 2
    photo(1, 32, 32).save(data + '/val/cat/new.png')
    capsys.readouterr()
    assert bad_images.check_data(datasets.build_datasets(parse('--data_path=' + data, *NANO))[:2], 0, '') == 0
    out = capsys.readouterr().out
    assert 'since %s/val/cat changed' % data in out and 'Checked 45 images' in out and len(scans) == 3


# ---- several processes

SEVERAL = '''
import argparse, functools, json, os, sys
sys.path.insert(0, %r)
import class_folders, distributed, image_dataset, index_cache
from errors import UserError
args = argparse.Namespace(device='cpu', dist_on_itp=False, local_rank=-1, dist_url='env://', dist_timeout=60.)
device = distributed.init_distributed_mode(args)
distributed.ALIVE_SECONDS = 0  # a sign of life after every folder
scans, results = [], []
def scan(root, keep_alive, scan=class_folders.scan_classes):
    scans.append(root)
    return scan(root, keep_alive)
index_cache.scan_classes = scan
for root in sys.argv[1:]:
    for distributed.BLOCK in (64, 1 << 26):
        scans.clear()
        try:
            found = image_dataset.ImageFolder(root, scan=functools.partial(index_cache.load_or_scan, device=device))
            result = [found.classes, list(found.samples)]
        except UserError as error:
            result = str(error)
        results.append([len(scans), result])
print('RESULTS ' + json.dumps(results))
distributed.leave_processes()
'''


def test_one_process_looks_and_the_others_are_told(tree, tmp_path):
    """Where there is an index, where there can't be one, and of an error; the numbers are those of scans."""
    settled, lost = str(tmp_path / 'settled' / 'root'), str(tmp_path / 'lost')
    touch(settled + '/cat/1.png')
    settle(settled)
    touch(lost + '/cat/1.png')
    os.symlink('nowhere', lost + '/cat/link')
    later = time.time_ns() + HOUR_NS
    os.utime(tree, ns=(later, later))
    port = free_port()
    started = [subprocess.Popen(
        [sys.executable, '-c', SEVERAL % ROOT, tree, settled, lost], stdout=subprocess.PIPE, universal_newlines=True,
        env=dict(os.environ, RANK=str(rank), WORLD_SIZE='2', LOCAL_RANK=str(rank), OMP_NUM_THREADS='1',
                 MASTER_ADDR='127.0.0.1', MASTER_PORT=str(port))) for rank in range(2)]
    outputs = [process.communicate(timeout=240)[0] for process in started]
    assert not any(process.returncode for process in started)
    first, second = (json.loads(re.search('RESULTS (.*)', out).group(1)) for out in outputs)
    classes, samples = class_folders.scan_classes(tree)[:2]
    every = [classes, [list(pair) for pair in samples]]
    one = [['cat'], [[settled + '/cat/1.png', 0]]]
    error = first[4][1]
    assert error.startswith('%s/cat/link: cannot look for images there' % lost)
    assert first == [[1, every], [1, every], [1, one], [0, one], [1, error], [1, error]]
    assert second == [[0, result] for _, result in first]


def test_without_other_processes_nobody_is_asked():
    assert distributed.broadcast_from_main(lambda keep_alive: keep_alive() or b'x', None) == b'x'
