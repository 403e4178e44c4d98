"""The index of class folders: it gives what a scan gives, notices each change, and is worth nothing when damaged."""

import json
import os
import pickle
import re
import shutil
import stat
import subprocess
import sys
import time

import pytest

import datasets
import run_class_finetuning
from beit.data import class_folders, folder_index, unreadable
from beit.distributed import collectives
from beit.errors import UserError
from helpers import NANO, ROOT, RUN, as_nobody, free_port, photo

pytestmark = pytest.mark.current_only

HOUR_NS = 3600 * 10 ** 9


def settle(root):
    """Make the folders look an hour old, links' targets too, as those of a data set that nobody is writing."""
    for folder, _, _ in os.walk(root, followlinks=True):
        os.utime(folder, ns=(time.time_ns() - HOUR_NS,) * 2)


def touch(*paths):
    for path in paths:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path, 'wb'):
            pass


def replace_link(path, target):
    os.remove(path)
    os.symlink(target, path)


def start(root):
    return datasets.ImageFolder(root, scan=folder_index.load_or_scan)


def assert_same(found, root):
    classes, samples = class_folders.scan_classes(root)[:2]
    assert found.classes == classes and list(found.samples) == list(samples)
    assert found.samples.targets.tolist() == [label for _, label in samples]


@pytest.fixture
def scans(monkeypatch):
    """The roots that were scanned so far, a list that grows."""
    roots = []

    def scan(root, keep_alive=lambda: None, scan=class_folders.scan_classes):
        roots.append(root)
        return scan(root, keep_alive)
    monkeypatch.setattr(folder_index, 'scan_classes', scan)
    return roots


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """The folder of the indexes, which isn't there yet."""
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'cache'))
    return str(tmp_path / 'cache' / 'beit-pytorch' / 'folder_index')


@pytest.fixture
def tree(tmp_path):
    """A settled tree of everything that a scan knows: depth, links, odd names, empty and hidden folders."""
    root = os.path.join(str(tmp_path), 'data', os.fsdecode(b'ro\not \xff'))
    for name in (b'b/2.png', b'b/10.JPG', b'b/a/x.tiff', b'b/a-b/x.webp', b'b/a/deep/er/1.bmp', b'b/a/deep.png',
                 b'B/only/below/1.ppm', 'a b/\u00fc\U0001f600.jpeg'.encode(), b'a b/notes.txt', b'a b/new\nline.png',
                 b'a b/\xff\xfe\r.png', b'a b/\xee\x80\x80.png', b'a b/\xf0.png', b'x.jpg/1.png', b'10/tab\t.pgm',
                 b'cl\nass \xfe/1.tif', b'loose.png', b'.hidden/1.png', b'b/.hidden.png', b'__MACOSX/1.png',
                 b'../outside/c/1.png', b'../outside/2.png', b'../other/3.png', b'../other/d/4.png', b'../far/away/x'):
        touch(os.path.join(root, os.fsdecode(name)))
    os.makedirs(os.path.join(root, 'b', 'empty', 'emptier'))
    for link, target in (('linked class', '../outside'), ('b/more', '../../other'), ('10/gone.png', 'nowhere'),
                         ('10/file.png', '../b/2.png'), ('10/text', '../a b/notes.txt'), ('10/chain', '../b/more'),
                         ('10/.gone', 'nowhere'), ('10/far.png', '../../far/away/x')):
        os.symlink(target, os.path.join(root, link))
    settle(os.path.dirname(root))
    return root


@pytest.fixture
def plain(tmp_path):
    """A small settled tree."""
    root = str(tmp_path / 'root')
    touch(root + '/cat/1.png', root + '/cat/2.png', root + '/cat/sub/3.png', root + '/dog/4.png')
    settle(root)
    return root


def test_what_the_index_gives_is_what_a_scan_gives(tree, scans, cache, monkeypatch, capsys):
    first = start(tree)
    with monkeypatch.context() as patch:
        patch.delattr(os, 'scandir')
        second = start(tree)
    assert scans == [tree] and capsys.readouterr().out == ''
    for found in (first, second):
        assert_same(found, tree)
    assert len(second) == 24 and len(second.classes) == 7
    copy = pickle.loads(pickle.dumps(second))
    assert list(copy.samples) == list(second.samples) and len(pickle.dumps(second)) < 6000
    monkeypatch.chdir(os.path.dirname(tree))
    for root in (os.path.basename(tree), './' + os.path.basename(tree) + '/'):  # paths begin as the user wrote it
        assert_same(start(root), root)
    assert len(scans) == 1 and stat.S_IMODE(os.stat(cache).st_mode) == 0o700 and len(os.listdir(cache)) == 1


# ---- what is noticed

CHANGES = {  # what is done in a tree or, with .., beside it
    'a file more': lambda: touch('b/a/new.png'),
    'a file more below a link': lambda: touch('../other/d/new.png'),
    'a file less': lambda: os.remove('b/2.png'),
    'a file renamed': lambda: os.rename('b/2.png', 'b/3.png'),
    'a file moved': lambda: os.rename('b/2.png', 'x.jpg/2.png'),
    'a class more': lambda: touch('new/1.png'),
    'a class less': lambda: shutil.rmtree('B'),
    'a class renamed': lambda: os.rename('B', 'C'),
    'classes swapped': lambda: [os.rename(*names) for names in (('B', 'x'), ('10', 'B'), ('x', '10'))],
    'hidden no more': lambda: os.rename('.hidden', 'shown'),
    'permissions': lambda: os.chmod('b/a', 0o700),
    'a folder in the place of a file': lambda: (os.remove('b/2.png'), touch('b/2.png/7.png')),
    'a folder in the place of a linked file': lambda: (os.remove('../far/away/x'), touch('../far/away/x/7.png')),
    'a linked class leads elsewhere': lambda: replace_link('linked class', '../other'),
    'a link to nothing leads to a folder': lambda: touch('10/nowhere/1.png'),
    'the target of a link to nothing appears elsewhere': lambda: (
        replace_link('10/gone.png', '../../elsewhere'), touch('../elsewhere/1.png')),
    'a target behind a link is replaced': lambda: (shutil.rmtree('../outside'), touch('../outside/c/5.png')),
    'a target behind two links is replaced': lambda: (os.rename('../other', '../gone'), touch('../other/6.png')),
    'a target moved, a link mended': lambda: (
        os.rename('../outside', '../moved'), replace_link('linked class', '../moved')),
}


@pytest.mark.parametrize('put_back', [False, True], ids=['', 'modification times put back'])
@pytest.mark.parametrize('change', CHANGES)
def test_a_change_is_noticed(tree, scans, monkeypatch, capsys, change, put_back):
    start(tree)
    times = {path: os.stat(path).st_mtime_ns for path, _, _ in os.walk(os.path.dirname(tree), followlinks=True)}
    monkeypatch.chdir(tree)
    CHANGES[change]()
    if put_back:  # as tar and rsync do
        for path in filter(os.path.isdir, times):
            os.utime(path, ns=(times[path], times[path]))
    assert_same(start(tree), tree)
    assert scans == [tree] * 2
    line, = capsys.readouterr().out.splitlines()
    assert 'looking for its images again, since ' in line and line.endswith(' changed') and line.isprintable()


def test_an_error_is_never_kept_and_content_is_not_asked_for(tree, scans):
    replace_link(tree + '/10/text', '../../far/away/x')
    settle(tree)
    for content in (b'', b'something else'):
        with open(tree + '/b/2.png', 'wb') as file:
            file.write(content)
        start(tree)
    assert len(scans) == 1
    os.remove(tree + '/../far/away/x')
    for number in (2, 3):
        with pytest.raises(UserError, match='10/text: cannot look for images there'):
            start(tree)
        assert len(scans) == number


def test_folders_that_changed_just_now_are_not_trusted(tree, scans, capsys):
    """Nor those of a file server whose clock is ahead, or of a file system that keeps no times."""
    for number, (seconds, trusted) in enumerate(((0, False), (1.5, False), (-60, False), (1e10, False), (3, True)), 1):
        os.utime(tree + '/b/a', ns=(max(0, time.time_ns() - int(seconds * 1e9)),) * 2)
        start(tree)
        assert os.path.exists(folder_index.index_path(tree)) == trusted and len(scans) == number
    assert capsys.readouterr().out == ''


def test_a_file_that_comes_into_a_folder_after_it_was_listed(tree, monkeypatch):
    def list_folder(root, folder, then=class_folders._list_folder):
        result = then(root, folder)
        if folder == 'b':
            touch(os.path.join(root, 'b', 'late.png'))
        return result
    with monkeypatch.context() as patch:
        patch.setattr(class_folders, '_list_folder', list_folder)
        assert 'late.png' not in str(list(start(tree).samples))
    assert 'late.png' in str(list(start(tree).samples))


def test_another_user_who_may_not_list_a_folder(public_folder, scans, monkeypatch):  # noqa: F811
    root = public_folder + '/root'
    monkeypatch.setenv('XDG_CACHE_HOME', public_folder + '/cache')
    touch(root + '/cat/1.png', root + '/dog/1.png')
    os.chmod(root + '/cat', 0o711)
    settle(root)
    start(root)
    start(root)
    assert len(scans) == 1
    if os.geteuid() == 0:
        os.chmod(os.path.dirname(folder_index.index_path(root)), 0o755)
        with as_nobody(), pytest.raises(UserError, match='cat: cannot look for images there .Permission denied'):
            start(root)


# ---- a file that is damaged, or somebody else's

def test_a_damaged_index_is_ignored(plain, scans):
    expected, path = list(start(plain).samples), folder_index.index_path(plain)
    with open(path, 'rb') as file:
        good = file.read()
    damaged = [good + b'x', b'', b'\n', bytes(4), bytes(9), good[22:]]
    for offset in list(range(0, len(good), 100)) + [5, len(good) - 1]:
        damaged += [good[:offset] + bytes([good[offset] ^ mask]) + good[offset + 1:] for mask in (0x01, 0x80)]
        damaged += [good[:offset], good[:offset] + b'\xaa' * (len(good) - offset), good[:offset] + good[offset + 1:]]
    for number, data in enumerate((each for each in damaged if each != good), 2):
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
    PLANTED[kind](folder_index.index_path(plain))
    assert_same(start(plain), plain)
    assert len(scans) == 2


def test_an_index_of_another_tree_or_version_is_ignored(plain, scans, monkeypatch):
    start(plain)
    renamed, path = plain + '2', folder_index.index_path(plain)
    os.rename(plain, renamed)
    os.rename(path, folder_index.index_path(renamed))
    assert_same(start(renamed), renamed)
    for name, value in (('VERSION', 0), ('EXTENSIONS', ('.png',))):
        monkeypatch.setattr(folder_index, name, value)
        start(renamed)
    assert len(scans) == 4


# ---- where it is

def test_a_cache_that_cannot_be_written_is_not_missed(plain, scans, cache, tmp_path, monkeypatch, capsys):
    def full(handle):
        raise OSError(28, 'No space left on device')
    with monkeypatch.context() as patch:
        patch.setattr(folder_index.atomic_write.os, 'fsync', full)
        assert len(start(plain)) == 4 and os.listdir(cache) == []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv('HOME', '/dev/null')
    for number, folder in enumerate(('/dev/null', '/proc/none', 'relative'), 2):
        monkeypatch.setenv('XDG_CACHE_HOME', folder)
        assert len(start(plain)) == 4 and len(scans) == number
    assert sorted(os.listdir(str(tmp_path))) == ['cache', 'root'] and capsys.readouterr().out == ''
    monkeypatch.setenv('HOME', str(tmp_path / 'home'))
    for _ in range(2):
        assert len(start(plain)) == 4 and len(scans) == 5
    assert folder_index.index_path(plain).startswith(str(tmp_path / 'home' / '.cache' / 'beit-pytorch'))


def test_a_run_uses_an_index_of_training_and_of_validation(image_folder, tmp_path, scans, cache, capsys, parse):
    data, output = image_folder(), str(tmp_path / 'out')
    settle(data)
    flags = RUN + ['--data_path=' + data, '--epochs=1', '--maxstep=1', '--output_dir=' + output]
    assert run_class_finetuning.run(flags + ['--no_index_cache']) == 0
    assert scans == [] and not os.path.exists(cache)
    assert run_class_finetuning.run(flags) == 0
    assert scans == [data + '/train', data + '/val'] and len(os.listdir(cache)) == 2
    assert run_class_finetuning.run(flags + ['--eval', '--resume=' + output, '--output_dir=']) == 0
    assert len(scans) == 2
    photo(1, 32, 32).save(data + '/val/cat/new.png')
    capsys.readouterr()
    parts = datasets.build_datasets(parse('--data_path=' + data, *NANO))[:2]
    assert unreadable.check_data(parts, 0, '') == 0
    out = capsys.readouterr().out
    assert 'since %s/val/cat changed' % data in out and 'Checked 45 images' in out and len(scans) == 3


# ---- several processes

SEVERAL = '''
import functools, json, sys
sys.path.insert(0, %r)
import datasets
from beit.config import DistributedConfig
from beit.data import class_folders, folder_index
from beit.distributed import collectives, process_group
from beit.errors import UserError
device = process_group.init_distributed_mode(DistributedConfig(device='cpu', dist_timeout=60.))
collectives.ALIVE_SECONDS = 0  # a sign of life after every folder
scans, results = [], []
def scan(root, keep_alive, scan=class_folders.scan_classes):
    scans.append(root)
    return scan(root, keep_alive)
folder_index.scan_classes = scan
for root in sys.argv[1:]:
    for collectives.BLOCK in (64, 1 << 26):
        scans.clear()
        try:
            found = datasets.ImageFolder(root, scan=functools.partial(folder_index.load_or_scan, device=device))
            result = [found.classes, list(found.samples)]
        except UserError as error:
            result = str(error)
        results.append([len(scans), result])
print('RESULTS ' + json.dumps(results))
process_group.shutdown()
'''


def test_one_process_looks_and_broadcasts(tree, plain, tmp_path):
    """With an index, without one, and an error; the numbers are those of scans."""
    lost = str(tmp_path / 'lost')
    touch(lost + '/cat/1.png')
    os.symlink('nowhere', lost + '/cat/link')
    os.utime(tree, ns=(time.time_ns() + HOUR_NS,) * 2)  # it gets no index
    port = free_port()
    started = [subprocess.Popen(
        [sys.executable, '-c', SEVERAL % ROOT, tree, plain, lost], stdout=subprocess.PIPE, universal_newlines=True,
        env=dict(os.environ, RANK=str(rank), WORLD_SIZE='2', LOCAL_RANK=str(rank), OMP_NUM_THREADS='1',
                 MASTER_ADDR='127.0.0.1', MASTER_PORT=str(port))) for rank in range(2)]
    outputs = [process.communicate(timeout=240)[0] for process in started]
    assert not any(process.returncode for process in started)
    main, other = (json.loads(re.search('RESULTS (.*)', out).group(1)) for out in outputs)
    expected = [[found.classes, [list(pair) for pair in found.samples]]
                for found in map(class_folders.scan_classes, (tree, plain))]
    error = main[4][1]
    assert error.startswith('%s/cat/link: cannot look for images there' % lost)
    assert main == [[1, expected[0]], [1, expected[0]], [1, expected[1]], [0, expected[1]], [1, error], [1, error]]
    assert other == [[0, result] for _, result in main]


def test_without_other_processes_nothing_is_broadcast():
    assert collectives.broadcast_from_main(lambda keep_alive: keep_alive() or b'x', None) == b'x'
