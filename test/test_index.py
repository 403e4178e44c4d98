"""The index of class folders: it gives what a scan gives, notices each change, and is worth nothing when damaged."""

import contextlib
import glob
import json
import os
import pickle
import random
import re
import shutil
import subprocess
import sys
import time
import zlib

import numpy as np
import pytest

import bad_images
import datasets
import distributed
import image_files
import index_cache
import run_class_finetuning
import run_folder
from conftest import NANO, ROOT, photo
from errors import UserError
from test_bad_images import as_nobody, public_folder  # noqa: F401 (a fixture)
from test_multinode import free_port
from test_training import RUN

HOUR_NS = 3600 * 10 ** 9


def settle(root):
    """Make the folders look an hour old, links' targets too, as those of a data set that nobody is writing."""
    for folder, folders, _ in os.walk(root):
        for path in [folder] + [os.path.join(folder, each) for each in folders if not each.startswith('.')]:
            then = time.time_ns() - HOUR_NS
            if os.stat(path).st_mtime_ns > then:
                os.utime(path, ns=(then, then))


def touch(path):
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path, 'wb'):
        pass


@pytest.fixture
def scans(monkeypatch):
    """The roots that were scanned so far, a list that grows."""
    roots = []

    def scan(root, alive=lambda: None, then=image_files.scan_classes):
        roots.append(root)
        return then(root, alive)
    monkeypatch.setattr(index_cache, 'scan_classes', scan)
    return roots


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


def start(root, output_dir=''):
    return datasets.ImageFolder(root, index=index_cache.Index(output_dir))


def assert_same(found, root):
    classes, samples = image_files.scan_classes(root)[:2]
    assert found.classes == classes and list(found.samples) == list(samples)
    assert found.samples.targets.tolist() == [label for _, label in samples]


def index_of(root):
    path, = glob.glob(os.path.join(glob.escape(os.path.dirname(root)), '.beit-index-*'))
    return path


# ---- the same as a scan

def test_what_the_index_gives_is_what_a_scan_gives(tree, scans, capsys):
    first, second = start(tree), start(tree)
    assert scans == [tree] and capsys.readouterr().out == ''
    for found in (first, second):
        assert_same(found, tree)
    assert len(second) == 23 and len(second.classes) == 7
    copy = pickle.loads(pickle.dumps(second))
    assert list(copy.samples) == list(second.samples) and len(pickle.dumps(second)) < 6000
    here = os.getcwd()
    os.chdir(os.path.dirname(tree))
    try:
        for root in (os.path.basename(tree), './' + os.path.basename(tree) + '/'):  # paths begin as the user wrote it
            assert_same(start(root), root)
    finally:
        os.chdir(here)
    assert len(scans) == 1


@pytest.mark.parametrize('seed', range(12))
def test_trees_of_chance(tmp_path, scans, seed):
    rng = random.Random(seed)
    alphabet = [b'a', b'Z', b'0', b' ', b'\n', b'\xff', b'\xc3\xa9', b'\xee\x80\x80', b'-', b'"', b'\\', b'.']
    root, folders = str(tmp_path / 'root'), [b'c']
    os.makedirs(os.path.join(root, 'c'))
    touch(os.path.join(root, 'c', '0.png'))

    def name():
        return b'n' + b''.join(rng.choice(alphabet) for _ in range(rng.randrange(6)))
    for _ in range(40):
        parent = rng.choice(folders) if rng.random() < 0.8 else b''
        path = os.path.join(os.fsencode(root), parent, name())
        with contextlib.suppress(FileExistsError, IsADirectoryError):
            if rng.random() < 0.3:
                os.mkdir(path)
                touch(os.path.join(path, b'x.JPEG'))
                folders.append(os.path.relpath(path, os.fsencode(root)))
            elif rng.random() < 0.2:
                os.symlink(rng.choice([b'nowhere', b'/dev/null']), path + b'.png')
            else:
                touch(path + rng.choice([b'.png', b'.txt', b'.jpg', b'']))
    settle(root)
    start(root)
    assert_same(start(root), root)
    assert len(scans) == 1


def test_a_list_of_images_is_a_sequence(tree):
    samples = start(tree).samples
    pairs = list(samples)
    assert samples == pairs and samples != pairs[:-1] and samples != pairs[::-1]
    assert samples[3:-2] == pairs[3:-2] and samples[::-1] == pairs[::-1] and samples[-1] == pairs[-1]
    assert samples[np.int64(4)] == pairs[4] and pairs[5] in samples and samples.index(pairs[6]) == 6
    for index in (len(pairs), -len(pairs) - 1):
        with pytest.raises(IndexError):
            samples[index]
    assert len(image_files.ImageList('x', [''], [0], [0], b'')) == 0


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
    'a file moved': lambda tree: os.rename(tree + '/b/2.png', tree + '/x.jpg/2.png'),
    'a class more': lambda tree: touch(tree + '/new/1.png'),
    'a class less': lambda tree: shutil.rmtree(tree + '/B'),
    'a class renamed': lambda tree: os.rename(tree + '/B', tree + '/C'),
    'classes swapped': lambda tree: [os.rename(tree + '/' + a, tree + '/' + b)
                                     for a, b in (('B', 'x'), ('10', 'B'), ('x', '10'))],
    'a folder in the place of a file': lambda tree: swap_for_folder(tree + '/b/2.png'),
    'a linked class leads elsewhere': lambda tree: replace_link(tree + '/linked class', '../other'),
    'a link to nothing leads to a folder': lambda tree: touch(tree + '/10/nowhere/1.png'),
    'the target of a link to nothing appears elsewhere': lambda tree: (
        replace_link(tree + '/10/gone.png', '../../elsewhere'), touch(other(tree, 'elsewhere/1.png'))),
    'a target behind a link is replaced': lambda tree: (
        shutil.rmtree(other(tree, 'outside')), touch(other(tree, 'outside/c/5.png'))),
    'a target behind two links is replaced': lambda tree: (
        os.rename(other(tree, 'other'), other(tree, 'gone')), touch(other(tree, 'other/6.png'))),
    'a target moved, a link mended': lambda tree: (
        os.rename(other(tree, 'outside'), other(tree, 'moved')), replace_link(tree + '/linked class', '../moved')),
    'a linked file became a folder': lambda tree: swap_for_folder(tree + '/b/2.png'),
    'hidden no more': lambda tree: os.rename(tree + '/.hidden', tree + '/shown'),
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
    told, = capsys.readouterr().out.splitlines()
    assert 'looking for its images again, since ' in told and told.endswith(' changed') and told.isprintable()
    settle(os.path.dirname(tree))
    start(tree)  # may be the first that can trust the folders' times
    capsys.readouterr()
    assert_same(start(tree), tree)
    assert len(scans) <= 3 and capsys.readouterr().out == ''


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
    index = index_of(tree)
    with open(index, 'rb') as file:
        before = file.read()
    os.remove(other(tree, 'far/text'))
    for number in (2, 3):
        with pytest.raises(UserError, match='10/text: cannot look for images there'):
            start(tree)
        assert len(scans) == number, 'an error is never kept'
    with open(index, 'rb') as file:
        assert file.read() == before
    touch(other(tree, 'far/text/1.png'))
    assert_same(start(tree), tree)


def test_a_loop_that_comes_to_be(tmp_path, scans):
    """A linked folder takes in the tree itself, at a place that isn't listed."""
    root, shelf = str(tmp_path / 'root'), str(tmp_path / 'shelf')
    touch(shelf + '/.old/kept')
    touch(shelf + '/1.png')
    touch(root + '/cat/2.png')
    os.symlink(shelf, root + '/cat/more')
    os.symlink(root, str(tmp_path / 'link'))
    settle(root)
    settle(shelf)
    assert len(start(str(tmp_path / 'link'))) == 2
    os.rename(root, shelf + '/.old/root')
    replace_link(str(tmp_path / 'link'), shelf + '/.old/root')
    shutil.copy(index_of(root), shelf + '/.old/.beit-index-x')
    with pytest.raises(UserError, match='this link leads to'):
        start(str(tmp_path / 'link'))


def test_content_is_not_asked_for(tree, scans):
    start(tree)
    with open(tree + '/b/2.png', 'wb') as file:
        file.write(b'something else')
    start(tree)
    assert len(scans) == 1


def test_folders_that_changed_just_now_are_not_trusted(tree, scans, capsys):
    os.utime(tree + '/b/a')  # now
    for number in (1, 2):
        start(tree)
        assert len(scans) == number and not os.path.exists(other(tree, index_cache.Index().name or '.none'))
    with pytest.raises(ValueError):
        index_of(tree)
    ages = [(1.5, False), (-60, False), (3, True)]  # seconds; the second is of a file server whose clock is ahead
    for age, trusted in ages:
        then = time.time_ns() - int(age * 1e9)
        os.utime(tree + '/b/a', ns=(then, then))
        start(tree)
        assert bool(glob.glob(other(glob.escape(tree), '.beit-index-*'))) == trusted, age
    os.remove(index_of(tree))
    os.utime(tree + '/b/a', ns=(0, 0))  # a file system that keeps no times
    start(tree)
    with pytest.raises(ValueError):
        index_of(tree)
    assert capsys.readouterr().out == ''


def test_a_change_while_it_is_looked_at(tree, monkeypatch):
    """What comes into a folder after it was listed is found the next time."""
    def late(root, folder, then=image_files._list_folder):
        result = then(root, folder)
        if folder == 'b':
            touch(os.path.join(root, 'b', 'late.png'))
        return result
    with monkeypatch.context() as patch:
        patch.setattr(image_files, '_list_folder', late)
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


# ---- a file that is damaged, or made for it

def test_a_damaged_index_is_passed_over(tree, scans, capsys):
    for index in range(300):
        touch(tree + '/many/%s%03d.png' % ('n' * 20, index))
    settle(tree)
    expected = list(start(tree).samples)
    path = index_of(tree)
    with open(path, 'rb') as file:
        good = file.read()
    assert len(good) > 8000
    spoilt = []
    for place in list(range(0, len(good), 500)) + [5, 15, 30, len(good) - 1]:
        for mask in (0x01, 0x80):
            spoilt.append(good[:place] + bytes([good[place] ^ mask]) + good[place + 1:])
        spoilt += [good[:place], good[:place] + bytes(len(good) - place), good[:place] + good[place + 1:]]
    spoilt += [good + b'x', b'', b'\n', good[22:], b'\x80\x04.', good.replace(b'index 1', b'index 2', 1)]
    for number, data in enumerate((each for each in spoilt if each != good), 2):
        with open(path, 'wb') as file:
            file.write(data)
        assert list(start(tree).samples) == expected and len(scans) == number
        with open(path, 'rb') as file:
            assert file.read() == good
    told = capsys.readouterr().out.splitlines()
    assert told and all(line.endswith('is damaged') and path.rpartition('-')[2] in line for line in told)


def forge(good, folders=None, names=None, **header):
    """An index with other contents and a right checksum."""
    start = len(index_cache.MAGIC) + 10
    end = good.index(b'\n', start) + 1
    facts = json.loads(good[start:end].decode())
    count, images, length = facts['folders'], facts['images'], facts['bytes']
    middle = end + 28 * count + 2 * images
    old, lengths = good[middle + length:], good[middle - 2 * images:middle]
    folders = good[middle:middle + length] if folders is None else folders(good[middle:middle + length])
    names = old if names is None else names(old)
    if names != old:
        ends = np.flatnonzero(np.frombuffer(names, dtype=np.uint8) == 0)
        lengths = np.diff(ends, prepend=-1).astype('<u2').tobytes()
        facts['images'] = len(ends)
    facts.update(bytes=len(folders), **header)
    rest = json.dumps(facts).encode() + b'\n' + good[end:end + 28 * count] + lengths + folders + names
    return index_cache.MAGIC + b' %08x\n' % zlib.crc32(rest) + rest


@pytest.fixture
def plain(tmp_path):
    """(root, its index) of a small tree."""
    root = str(tmp_path / 'root')
    for name in ('cat/1.png', 'cat/2.png', 'cat/sub/3.png', 'dog/4.png'):
        touch(os.path.join(root, name))
    settle(root)
    start(root)
    with open(index_of(root), 'rb') as file:
        return root, file.read()


HOSTILE = {
    'a name with a slash': dict(names=lambda names: names.replace(b'1.png', b'/.png')),
    'a path for a name': dict(names=lambda names: names.replace(b'1.png', b'../../x')),
    'a name that is ..': dict(names=lambda names: names.replace(b'1.png', b'..')),
    'a later name that is ..': dict(names=lambda names: names.replace(b'2.png', b'..')),
    'a hidden name': dict(names=lambda names: names.replace(b'4.png', b'.4.png')),
    'an empty name': dict(names=lambda names: names.replace(b'2.png', b'')),
    'a first name that is empty': dict(names=lambda names: names.replace(b'1.png', b'')),
    'a name without an end': dict(names=lambda names: names[:-1]),
    'a name too many': dict(names=lambda names: names + b'5.png\0'),
    'a name too few': dict(names=lambda names: names[6:]),
    'no names': dict(names=lambda names: b''),
    'a folder above': dict(folders=lambda folders: folders.replace(b'cat', b'..')),
    'a folder above a folder': dict(folders=lambda folders: folders.replace(b'cat/sub', b'cat/..')),
    'a folder far above': dict(folders=lambda folders: folders.replace(b'cat/sub', b'cat/../../x')),
    'a folder from the top': dict(folders=lambda folders: folders.replace(b'cat/sub', b'/etc')),
    'a folder with no name in it': dict(folders=lambda folders: folders.replace(b'cat/sub', b'cat//sub')),
    'a folder that ends in a slash': dict(folders=lambda folders: folders.replace(b'cat/sub', b'cat/sub/')),
    'a folder of another class': dict(folders=lambda folders: folders.replace(b'cat/sub', b'dog/sub')),
    'a class twice': dict(folders=lambda folders: folders.replace(b'dog', b'cat')),
    'classes in no order': dict(folders=lambda folders: folders.replace(b'dog', b'ant')),
    'the root is elsewhere': dict(folders=lambda folders: b'x' + folders),
    'a folder too many': dict(folders=lambda folders: folders + b'x\0'),
    'no folders': dict(folders=lambda folders: b''),
    'more folders than bytes': dict(folders=None, names=None, more=10 ** 12),
    'fewer than none': dict(folders=None, names=None, more=-10),
    'more images than bytes': dict(images=10 ** 12),
    'fewer images than none': dict(images=-3),
    'images that are no number': dict(images='x'),
    'links that are numbers': dict(links=[1]),
    'links that are no list': dict(links=3),
    'a link above': dict(links=['../x']),
    'a link to all': dict(links=['/etc/passwd']),
    'real paths that are none': dict(real=[]),
    'a real path that is a number': dict(real={'': 3}),
    'no real path': dict(real={}),
    'a real path of no folder': dict(real={'': '/', 'x': '/'}),
    'other endings': dict(extensions=['.png']),
    'no user': dict(user={}),
}


@pytest.mark.parametrize('kind', HOSTILE)
def test_a_hostile_index_leads_nowhere(plain, scans, kind):
    root, good = plain
    change = dict(HOSTILE[kind])
    if 'more' in change:
        change['folders'], change['names'] = None, None
        data = forge(good)
        more, count = change['more'], json.loads(data[22:data.index(b'\n', 22)].decode())['folders']
        rest = data[22:].replace(b'"folders": %d' % count, b'"folders": %d' % (count + more), 1)
        data = index_cache.MAGIC + b' %08x\n' % zlib.crc32(rest) + rest
    else:
        data = forge(good, **change)
    assert forge(good) == good and data != good
    scans.clear()
    with open(index_of(root), 'wb') as file:
        file.write(data)
    before = set(sys.modules)
    assert_same(start(root), root)
    assert scans == [root] * (kind != 'no user') and set(sys.modules) == before
    assert all(os.path.realpath(path).startswith(root + '/') for path, _ in start(root).samples)


def test_no_index_is_waited_for_or_read_without_an_end(plain, scans):
    root, good = plain
    path = index_of(root)
    scans.clear()
    for number, make in enumerate((os.mkfifo, os.mkdir, lambda path: os.symlink('/dev/zero', path),
                                   lambda path: os.symlink(path, path)), 1):
        if os.path.isdir(path):
            os.rmdir(path)
        elif os.path.lexists(path):
            os.remove(path)
        make(path)
        assert len(start(root)) == 4 and len(scans) == number
    with open(path, 'wb') as file:
        file.write(good[:22])
        file.truncate(index_cache.MAX_BYTES + 1)  # takes no room on the disk
    assert len(start(root)) == 4 and len(scans) == 5


# ---- where it lies

def test_it_lies_beside_the_tree_or_in_output_dir_or_nowhere(plain, scans, tmp_path, monkeypatch):
    root, _ = plain
    os.remove(index_of(root))
    scans.clear()
    output, write = str(tmp_path / 'out'), index_cache.safe_files.write_bytes

    def read_only(path, data):
        if os.path.dirname(path) == str(tmp_path):
            raise UserError('cannot write')
        write(path, data)
    monkeypatch.setattr(index_cache.safe_files, 'write_bytes', read_only)
    for number, output_dir in ((1, ''), (2, None), (3, output)):
        found = start(root, output_dir)
        assert len(scans) == number and not os.path.exists(output)
    os.mkdir(output)  # as the run does, once nothing can be wrong any more
    index_cache.write_late(None, found, [0])
    name, = os.listdir(output)
    assert re.match(r'\.beit-index-[0-9a-f]{16}$', name)
    assert start(root, output) and len(scans) == 3
    assert run_folder.run_outputs(output) == []
    touch(os.path.join(output, name + '.tmp-12'))
    run_folder.prepare_folder(output)
    assert os.listdir(output) == [name] and not glob.glob(output + '-*')
    monkeypatch.undo()
    assert start(root, output) and not glob.glob(str(tmp_path / '.beit-index-*'))


def test_a_full_disk_is_no_error(plain, scans, monkeypatch, capsys):
    root, _ = plain
    os.remove(index_of(root))

    def full(handle):
        raise OSError(28, 'No space left on device')
    monkeypatch.setattr(index_cache.safe_files.os, 'fsync', full)
    assert len(start(root)) == 4 and capsys.readouterr().out == ''
    assert os.listdir(os.path.dirname(root)) == ['root']


def test_half_indices_of_killed_processes_go(plain):
    root, _ = plain
    path = index_of(root)
    os.remove(path)
    for number, age in ((1, 2 * index_cache.ABANDONED_SECONDS), (2, 0)):
        touch('%s.tmp-%d' % (path, number))
        os.utime('%s.tmp-%d' % (path, number), (time.time() - age, time.time() - age))
    start(root)
    names = sorted(os.listdir(os.path.dirname(root)))
    assert names == [os.path.basename(path), os.path.basename(path) + '.tmp-2', 'root']


def test_training_and_validation_have_an_index_each_and_a_run_uses_them(image_folder, tmp_path, scans, capsys, parse):
    data, output = image_folder(), str(tmp_path / 'out')
    settle(data)
    base = RUN + ['--data_path=' + data, '--epochs=1', '--maxstep=1', '--output_dir=' + output]
    assert run_class_finetuning.run(base + ['--no_index_cache']) == 0
    assert scans == [] and not glob.glob(data + '/.beit*')
    assert run_class_finetuning.run(base) == 0
    assert scans == [data + '/train', data + '/val'] and len(glob.glob(data + '/.beit-index-*')) == 2
    assert run_class_finetuning.run(base + ['--eval', '--resume=' + output, '--output_dir=%s' % (tmp_path / 'no')]) == 0
    assert bad_images.check_data(parse('--data_path=' + data, *NANO)) == 0
    assert len(scans) == 2 and not list(tmp_path.glob('no/.beit-index*'))
    photo(1, 32, 32).save(data + '/val/cat/new.png')
    capsys.readouterr()
    assert bad_images.check_data(parse('--data_path=' + data, *NANO)) == 0
    out = capsys.readouterr().out
    assert 'since %s/val/cat changed' % data in out and 'Checked 45 images' in out and len(scans) == 3


# ---- several processes

SEVERAL = '''
import argparse, json, os, sys
sys.path.insert(0, %r)
import datasets, distributed, image_files, index_cache
from errors import UserError
args = argparse.Namespace(device='cpu', dist_on_itp=False, local_rank=-1, dist_url='env://', dist_timeout=60.)
device = distributed.init_distributed_mode(args)
distributed.ALIVE_SECONDS = 0  # a sign of life after every folder
scans, results = [], []
def scan(root, alive, then=image_files.scan_classes):
    scans.append(root)
    return then(root, alive)
index_cache.scan_classes = scan
for root in sys.argv[1:]:
    for distributed.BLOCK in (64, 1 << 26):
        scans.clear()
        try:
            found = datasets.ImageFolder(root, index=index_cache.Index('', device))
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
    classes, samples = image_files.scan_classes(tree)[:2]
    every = [classes, [list(pair) for pair in samples]]
    one = [['cat'], [[settled + '/cat/1.png', 0]]]
    error = first[4][1]
    assert error.startswith('%s/cat/link: cannot look for images there' % lost)
    assert first == [[1, every], [1, every], [1, one], [0, one], [1, error], [1, error]]
    assert second == [[0, result] for _, result in first]


def test_without_other_processes_nobody_is_asked():
    assert distributed.from_first(lambda alive: alive() or b'x', None) == b'x'
