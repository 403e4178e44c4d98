"""Zip and tar archives of class folders, read in place, give what the folders give; nested class folders."""

import gzip
import io
import os
import shutil
import struct
import subprocess
import tarfile
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image

import datasets
import run_class_finetuning
import run_predict
from beit.data import fingerprint, locations
from beit.data.decode import UnreadableImage, load_image
from beit.errors import UserError
from beit.files import archives
from beit.files.archives import open_file
from helpers import NANO, as_nobody, launch, lines_of, photo

TRAINING = NANO + ['--batch_size=4', '--epochs=2', '--warmup_epochs=0', '--aa=none', '--lr=1e-3']


@pytest.fixture(autouse=True)
def _forget_archives():
    yield
    archives._archives.clear()


def make_archive(folder, path, top='.', **options):
    """Pack a folder; `top` is the name of its uppermost folder."""
    if str(path).endswith('.tar'):
        with tarfile.open(str(path), 'w', **options) as archive:
            archive.add(str(folder), top)
        return
    with zipfile.ZipFile(str(path), 'w', **options) as archive:
        for where, _, names in sorted(os.walk(str(folder))):
            for name in names:
                inside = os.path.relpath(os.path.join(where, name), str(folder))
                archive.write(os.path.join(where, name), os.path.normpath(os.path.join(top, inside)))


PACKED = {'stored.zip': dict(compression=zipfile.ZIP_STORED), 'deflated.zip': dict(compression=zipfile.ZIP_DEFLATED),
          'gnu.tar': dict(format=tarfile.GNU_FORMAT), 'pax.tar': dict(format=tarfile.PAX_FORMAT),
          'ustar.TAR': dict(format=tarfile.USTAR_FORMAT)}


def pack(root, tmp_path, kind):
    path = tmp_path / kind.replace('TAR', 'tar')
    make_archive(root, path, **PACKED[kind])
    if kind.endswith('TAR'):
        os.rename(str(path), str(tmp_path / kind))
    return str(tmp_path / kind)


def samples_of(root, parse, *flags):
    train, val, classes = datasets.build_datasets(parse('--data_path', root, *NANO, *flags))
    return train, val, classes


@pytest.mark.parametrize('kind', sorted(PACKED))
def test_an_archive_gives_what_its_folders_give(image_folder, parse, tmp_path, kind, capsys):
    root = image_folder(classes=('cat', 'ros\u00e9 wine', 'x'))
    for part in ('train', 'val'):
        os.makedirs(os.path.join(root, part, 'x', 'deep', '.hidden'))
        photo(99, 32, 32).save(os.path.join(root, part, 'x', 'deep', 'more.png'))
        photo(98, 32, 32).save(os.path.join(root, part, 'x', 'deep', '.hidden', 'not.png'))
    with open(os.path.join(root, 'train', 'note.txt'), 'w') as file:
        file.write('no image')
    packed = pack(root, tmp_path, kind)
    expected = samples_of(root, parse)
    capsys.readouterr()
    found = samples_of(packed, parse)
    assert '2 files or folders are not used (1 hidden, 1 .txt)' in capsys.readouterr().out.replace(
        '1 .txt, 1 hidden', '1 hidden, 1 .txt') or kind
    assert found[2] == expected[2]
    for mine, theirs in zip(found[:2], expected[:2]):
        assert len(mine) == len(theirs)
        for index, (path, label) in enumerate(mine.samples):
            other, expected_label = theirs.samples[index]
            assert path[len(packed):] == other[len(root):] and label == expected_label
            with open_file(path) as file, open(other, 'rb') as plain:
                assert file.read() == plain.read()
    assert fingerprint.of_data(*found) == fingerprint.of_data(*expected)
    split = [samples_of(os.path.join(each, 'train'), parse, '--data_set=image_folder', '--val_split=0.3')
             for each in (packed, root)]
    for mine, theirs in zip(*(each[:2] for each in split)):
        assert [path[len(packed):] for path, _ in mine.samples] == [path[len(root):] for path, _ in theirs.samples]


@pytest.mark.current_only
@pytest.mark.parametrize('kind', ('deflated.zip', 'gnu.tar'))
def test_a_run_on_an_archive_is_that_on_its_folders(image_folder, tmp_path, capsys, kind):
    """The log, to the last digit, with other numbers of workers, and after a resume within an epoch."""
    root = image_folder(train=13, val=5)
    packed = pack(root, tmp_path, kind)
    out = [str(tmp_path / name) for name in ('folders', 'archive', 'resumed')]
    for data, where, flags in ((root, out[0], ()), (packed, out[1], ('--num_workers=2', '--report')),
                               (packed, out[2], ('--maxstep=3', '--num_workers=3')),
                               (packed, out[2], ('--auto_resume',))):
        assert run_class_finetuning.run(TRAINING + ['--data_path', data, '--output_dir', where, *flags]) == 0, \
            capsys.readouterr().err
    assert 'Resumes exactly as if it had not been stopped' in capsys.readouterr().out
    logs = [[{name: value for name, value in line.items() if name.startswith(('train_loss', 'test_'))}
             for line in lines_of(each)] for each in out]
    assert logs[0] == logs[1] and logs[0][-1] == logs[2][-1]
    with open(os.path.join(out[1], 'report.html'), encoding='utf-8') as file:
        assert file.read().count('data:image') > 10
    answers = []
    for data in (packed + '/val', os.path.join(root, 'val')):
        where = tmp_path / 'answers.csv'
        assert run_predict.run(['--resume', out[0], '--num_workers=0', '--output', str(where), data]) == 0
        answers.append(where.read_text().replace(packed, root))
    assert answers[0] == answers[1] and len(answers[0].splitlines()) == 11


@pytest.mark.current_only
def test_two_processes_read_one_archive(image_folder, tmp_path):
    root = image_folder(train=16, val=5)
    packed = pack(root, tmp_path, 'deflated.zip')
    logs = []
    for data, out in ((root, 'folders'), (packed, 'archive')):
        run = launch(2, '--data_path', data, '--output_dir', str(tmp_path / out), '--dist_eval', '--num_workers=1')
        assert run[0] == 0, run
        logs.append([(line['train_loss'], line['test_loss']) for line in lines_of(str(tmp_path / out))])
    assert logs[0] == logs[1]


def test_workers_do_not_share_a_position(image_folder, tmp_path, parse):
    """Many processes read the same archive at once after a fork; each byte is right."""
    packed = pack(image_folder(train=40), tmp_path, 'stored.zip')
    train = samples_of(packed, parse)[0]
    load_image(train.samples[0][0])  # opens the file before the fork
    loader = torch.utils.data.DataLoader(train, batch_size=5, num_workers=6)
    expected = [np.asarray(load_image(path)) for path, _ in train.samples]
    for _ in range(3):
        seen = 0
        train.transform = lambda image: torch.from_numpy(np.array(image))
        for batch, _labels in loader:
            for image in batch:
                assert np.array_equal(image.numpy(), expected[seen])
                seen += 1
        assert seen == len(train)


# ---- where archives lie

@pytest.mark.parametrize('ending, tops', (('.zip', ('.', '.')), ('.tar', ('train', 'val')), ('.tar', ('.', 'val'))))
def test_an_archive_for_each_part(image_folder, parse, tmp_path, ending, tops):
    root = image_folder()
    both = tmp_path / 'both'
    both.mkdir()
    for part, top in zip(('train', 'val'), tops):
        make_archive(os.path.join(root, part), both / (part + ending), top)
    found, expected = samples_of(str(both), parse), samples_of(root, parse)
    assert [len(each) for each in found] == [len(each) for each in expected]
    named = parse('--data_set=image_folder', '--data_path', str(both / ('train' + ending)), '--eval_data_path',
                  str(both / ('val' + ending)), *NANO)
    if tops == ('.', '.'):
        assert datasets.build_datasets(named)[2] == expected[2]
    with pytest.raises(UserError, match='--val_split 0.5: there is a folder .*val'):
        locations.check_paths(parse('--data_path', str(both), '--val_split=0.5'))


def test_an_archive_of_a_folder_names_it(image_folder, tmp_path, refused):
    make_archive(image_folder(), tmp_path / 'a.zip', 'photos')
    refused(TRAINING + ['--data_path', str(tmp_path / 'a.zip')], 'a.zip/train', 'give %s' % (tmp_path / 'a.zip/photos'))
    assert run_class_finetuning.run(TRAINING + ['--data_path', str(tmp_path / 'a.zip/photos'), '--epochs=1']) == 0


def test_a_csv_file_lists_images_in_an_archive(image_folder, tmp_path, parse, refused):
    root = image_folder(train=4, val=2)
    make_archive(root, tmp_path / 'a.zip')
    table = tmp_path / 'a.csv'
    table.write_text(''.join('train/%s/%s,%s\n' % (name, file, name) for name in ('cat', 'dog')
                             for file in sorted(os.listdir(os.path.join(root, 'train', name)))))
    flags = ['--data_path', str(tmp_path / 'a.zip'), '--train_csv', str(table)]
    assert len(datasets.build_datasets(parse(*flags, *NANO))[0]) == 8
    table.write_text(table.read_text() + 'train/cat/none.png,cat\n')
    refused(TRAINING + flags, 'line 9: there is no file', 'none.png')


# ---- hostile and damaged archives

def zip_of(path, *members, **options):
    with zipfile.ZipFile(str(path), 'w', **options) as archive:
        for name, content in members:
            archive.writestr(name, content)


def clear_flags(path):
    """Clear the flag of UTF-8 in each header of a zip."""
    with zipfile.ZipFile(path) as archive:
        infos, position = archive.infolist(), archive.start_dir
    with open(path, 'rb') as file:
        data = bytearray(file.read())
    for info in infos:
        data[info.header_offset + 7] &= 0xf7
        position = data.index(b'PK\1\2', position)
        data[position + 9] &= 0xf7
        position += 4
    with open(path, 'wb') as file:
        file.write(data)


def image_bytes():
    content = io.BytesIO()
    photo(1, 32, 32).save(content, 'PNG')
    return content.getvalue()


def tar_with(path, name, kind=tarfile.REGTYPE, size=None, link=''):
    with tarfile.open(str(path), 'w') as archive:
        for each in (name, 'b/1.png'):
            info = tarfile.TarInfo(each)
            info.size, info.type, info.linkname = len(image_bytes()), kind if each == name else tarfile.REGTYPE, link
            archive.addfile(info, io.BytesIO(image_bytes()))


def make_hostile(path, kind):
    content, name = image_bytes(), str(path)
    if kind == 'parent':
        zip_of(path, ('a/../../b/1.png', content))
    elif kind == 'absolute':
        zip_of(path, ('/etc/1.png', content))
    elif kind == 'backslash':
        zip_of(path, ('a\\1.png', content))
    elif kind == 'twice':
        zip_of(path, ('a/1.png', content), ('b/1.png', content), ('a/1.png', content))
    elif kind == 'both':
        zip_of(path, ('a/1.png', content), ('a/1.png/x.png', content))
    elif kind == 'both, at the top':
        zip_of(path, ('a/', b''), ('b/1.png', content), ('a', content))
    elif kind == 'a tar':
        tar_with(path, 'a/1.png')
    elif kind == 'tar that is a zip':
        zip_of(path, ('a/1.png', content))
    elif kind == 'tar empty':
        path.write_bytes(b'')
    elif kind == 'tar twice':
        tar_with(path, 'b/1.png')
    elif kind == 'tar both':
        tar_with(path, 'b/1.png/x.png')
    elif kind in ('tar joined, small', 'tar joined of whole records'):
        tar_with(path, 'a/1.png')
        first = path.read_bytes()
        tar_with(path, 'a/2.png')
        path.write_bytes(first + path.read_bytes() + bytes(3 << 20) * ('whole' in kind))
    elif kind == 'joined':
        zip_of(path, ('b/1.png', content))
        first = path.read_bytes()
        path.unlink()
        zip_of(path, ('a/1.png', content))
        path.write_bytes(first + path.read_bytes())
    elif kind == 'method':
        zip_of(path, ('a/1.png', content), compression=zipfile.ZIP_LZMA)
    elif kind == 'encrypted':
        zip_of(path, ('a/1.png', content))
        data = bytearray(path.read_bytes())
        data[6] |= 1
        data[data.rindex(b'PK\1\2') + 8] |= 1
        path.write_bytes(bytes(data))
    elif kind == 'truncated':
        zip_of(path, ('a/1.png', content))
        path.write_bytes(path.read_bytes()[:-30])
    elif kind == 'empty':
        path.write_bytes(b'')
    elif kind == 'tar parent':
        tar_with(path, '../a/1.png')
    elif kind == 'tar link':
        tar_with(path, 'a/1.png', tarfile.SYMTYPE, link='/etc/passwd')
    elif kind == 'tar device':
        tar_with(path, 'a/1.png', tarfile.CHRTYPE)
    elif kind == 'tar truncated':
        tar_with(path, 'a/1.png')
        path.write_bytes(path.read_bytes()[:1536])
    elif kind == 'tar without end':
        tar_with(path, 'a/1.png')
        path.write_bytes(path.read_bytes().rstrip(b'\0') + bytes(300))
    elif kind == 'tar broken header':
        tar_with(path, 'a/1.png')
        data = path.read_bytes()
        position = data.index(b'b/1.png')
        path.write_bytes(data[:position] + b'x' * 300 + data[position + 300:])
    elif kind == 'tar joined':
        tar_with(path, 'a/1.png')
        path.write_bytes(path.read_bytes() + os.urandom(2 << 20))
    elif kind == 'tar negative':
        tar_with(path, 'a/1.png')
        data = bytearray(path.read_bytes())
        data[124:136] = b'\xff' * 11 + b'\0'
        info = sum(data[:148]) + 8 * 32 + sum(data[156:512])
        data[148:156] = b'%06o\0 ' % info
        path.write_bytes(bytes(data))
    else:
        path.write_bytes(gzip.compress(b'x' * 10000))
    return name


REPACK, AGAIN = 'unpack it, or pack a .zip or a .tar that is not compressed', '; fetch or copy it again'
HOSTILE = {
    'parent': ('is no name', REPACK), 'absolute': ('is no name', REPACK), 'backslash': ('is no name', REPACK),
    'twice': ('a/1.png is in it 2 times); ', REPACK),
    'both': ('(a/1.png is in it 2 times, as a file and as a folder)',),
    'both, at the top': ('(a is in it 2 times, as a file and as a folder)',),
    'joined': ('joined of several',),
    'a tar': ('; its content is a .tar; rename it',), 'method': ('neither stored nor deflated', REPACK),
    'encrypted': ('is encrypted', REPACK), 'truncated': ('cannot be read', AGAIN), 'empty': ('; it is empty' + AGAIN,),
    'tar that is a zip': ('; its content is a .zip; rename it',), 'tar empty': ('; it is empty' + AGAIN,),
    'tar twice': ('(b/1.png is in it 2 times); ', REPACK), 'tar both': ('(b/1.png is in it 2 times, as a file and',),
    'tar joined, small': ('joined of several at byte', 'tar --ignore-zeros'),
    'tar joined of whole records': ('joined of several at byte',),
    'tar parent': ('is no name', REPACK), 'tar link': ('is a link or special',),
    'tar device': ('is a link or special',),
    'tar truncated': ('cannot be read', AGAIN), 'tar without end': ('truncated', AGAIN),
    'tar broken header': ('damaged', AGAIN), 'tar joined': ('joined of several',), 'tar negative': ('cannot be read',),
    'tar compressed': ('not compressed', REPACK)}


@pytest.mark.filterwarnings('ignore:Duplicate name')
@pytest.mark.parametrize('kind', sorted(HOSTILE))
def test_hostile_archives_are_one_line(tmp_path, kind, refused):
    path = make_hostile(tmp_path / ('a.tar' if kind.startswith('tar') else 'a.zip'), kind)
    refused(TRAINING + ['--data_path', path], '--data_path ' + path, *HOSTILE[kind])


def test_a_missing_archive_is_no_file(tmp_path, refused):
    refused(TRAINING + ['--data_path', str(tmp_path / 'none.zip')], 'none.zip: no such file or folder')


@pytest.mark.parametrize('name', ['a.zip', 'a.tar'])
def test_an_archive_without_read_permission_need_not_be_unpacked(public_folder, name):
    path = os.path.join(public_folder, name)
    with open(path, 'wb'):
        os.chmod(path, 0)
    with as_nobody(), pytest.raises(UserError, match='Permission denied.*; allow this user to read it$'):
        archives.Archive(path)


def test_a_tar_can_end_with_many_zeros(tmp_path):
    tar_with(tmp_path / 'a.tar', 'a/1.png')
    with open(str(tmp_path / 'a.tar'), 'ab') as file:
        file.write(bytes(3 << 20))
    assert archives.isdir(str(tmp_path / 'a.tar/a')) and archives.isdir(str(tmp_path / 'a.tar/b'))


def test_a_compressed_tar_is_refused(tmp_path, refused):
    (tmp_path / 'a.tar.gz').write_bytes(gzip.compress(b'x'))
    refused(TRAINING + ['--data_path', str(tmp_path / 'a.tar.gz')], 'not compressed')


def damaged_members(path):
    """a/0.png has a wrong checksum, a/1.png claims a size it has not, a/2.png claims 2 GiB; a/3.png is good."""
    zip_of(path, *(('a/%d.png' % index, image_bytes()) for index in range(4)), compression=zipfile.ZIP_DEFLATED)
    data = bytearray(path.read_bytes())
    entries, position = [], data.index(b'PK\1\2')
    while position >= 0:
        entries.append(position)
        position = data.find(b'PK\1\2', position + 4)
    data[entries[0] + 16] ^= 1
    for index, size in ((1, 10), (2, 1 << 31)):
        data[entries[index] + 24:entries[index] + 28] = struct.pack('<I', size)
    path.write_bytes(bytes(data))


def test_damaged_members_are_unreadable_images(tmp_path, capsys):
    (tmp_path / 'data').mkdir()
    for part in ('train', 'val'):
        damaged_members(tmp_path / 'data' / (part + '.zip'))
    root = str(tmp_path / 'data')
    reasons = {}
    for index in range(3):
        with pytest.raises(UnreadableImage) as error:
            load_image('%s/train.zip/a/%d.png' % (root, index))
        reasons[index] = error.value.reason
    assert 'checksum' in reasons[0] and 'checksum' in reasons[1] and '2.0 GiB' in reasons[2]
    assert load_image(root + '/train.zip/a/3.png').size == (32, 32)
    with pytest.raises(UnreadableImage, match='no such file in the archive'):
        load_image(root + '/train.zip/a/4.png')
    out = tmp_path / 'out'
    assert run_class_finetuning.run(TRAINING + ['--data_path', root, '--check_data', '--num_workers=2', '--output_dir',
                                                str(out)]) == 2
    listed = (out / 'bad_images.txt').read_text().splitlines()
    assert [line.split('\t')[0] for line in listed] == ['%s/%s.zip/a/%d.png' % (root, part, index)
                                                       for part in ('train', 'val') for index in range(3)]
    assert 'Checked 8 images: 6 cannot be read' in capsys.readouterr().out


def test_an_archive_that_changes_is_noticed(tmp_path):
    path = tmp_path / 'a.zip'
    zip_of(path, ('a/1.png', image_bytes()))
    assert archives.size(str(path) + '/a/1.png') == len(image_bytes())
    zip_of(path, ('a/1.png', image_bytes()), ('a/2.png', image_bytes()))
    with pytest.raises(UnreadableImage, match='changed since the start'):
        load_image(str(path) + '/a/1.png')


def test_a_folder_can_have_the_name_of_an_archive(image_folder, parse):
    root = image_folder(name='my.zip')
    assert len(samples_of(root, parse)[0]) == 32


@pytest.mark.skipif(shutil.which('zip') is None, reason='needs zip')
def test_infozip_writes_what_is_read(image_folder, parse, tmp_path):
    root, path = image_folder(), str(tmp_path / 'a.zip')
    subprocess.check_call(['zip', '-qr', path, '.'], cwd=root)
    assert [len(each) for each in samples_of(path, parse)] == [32, 12, 2]


# ---- names of a zip without the flag of UTF-8

@pytest.mark.parametrize('packer', ('python', 'zip'))
def test_names_in_utf8_without_the_flag(image_folder, parse, tmp_path, packer):
    """Info-ZIP writes UTF-8 and no flag (0x800) that says so."""
    root, path = image_folder(classes=('käse', '猫')), str(tmp_path / 'a.zip')
    for part in ('train', 'val'):
        photo(99, 32, 32).save(os.path.join(root, part, 'käse', 'übung.png'))
    if packer == 'python':
        make_archive(root, path)
        clear_flags(path)
    elif shutil.which('zip') is None:
        pytest.skip('needs zip')
    else:
        subprocess.check_call(['zip', '-qr', path, '.'], cwd=root)
    with zipfile.ZipFile(path) as archive:
        assert not any(info.flag_bits & 0x800 for info in archive.infolist())
    for flags, inside in (((), ''), (('--data_set=image_folder', '--val_split=0.3'), '/train')):
        found, expected = (samples_of(each + inside, parse, *flags) for each in (path, root))
        assert found[2] == expected[2] == ['käse', '猫']
        for mine, theirs in zip(found[:2], expected[:2]):
            assert [name[len(path):] for name, _ in mine.samples] == [name[len(root):] for name, _ in theirs.samples]
            for (name, _), (other, _) in zip(mine.samples, theirs.samples):
                with open_file(name) as file, open(other, 'rb') as plain:
                    assert file.read() == plain.read()


def test_names_that_are_not_utf8_are_cp437(tmp_path):
    path = tmp_path / 'a.zip'
    zip_of(path, ('kXse/1.png', image_bytes()), ('gr\u00fcn/1.png', image_bytes()))  # the second has the flag
    path.write_bytes(path.read_bytes().replace(b'kXse', b'k\x84se'))
    with archives.scandir(str(path)) as entries:
        assert sorted(entry.name for entry in entries) == ['gr\u00fcn', 'k\u00e4se']
    assert load_image(str(path) + '/k\u00e4se/1.png').size == (32, 32)


# ---- --class_depth

def nested_folders(root):
    for part, count in (('train', 4), ('val', 2)):
        for name in ('cat/tabby', 'dog/husky', 'dog/pug'):
            where = root / part / name / 'deep'
            where.mkdir(parents=True)
            for index in range(count):
                photo(index, 32, 32).save(str(where / ('%d.png' % index)))
        photo(7, 32, 32).save(str(root / part / 'dog' / 'no class.png'))
    return str(root)


def test_nested_class_folders(tmp_path, parse, capsys, refused):
    root = nested_folders(tmp_path / 'data')
    train, val, classes = samples_of(root, parse, '--class_depth=2')
    assert classes == ['cat/tabby', 'dog/husky', 'dog/pug'] and (len(train), len(val)) == (12, 6)
    for path, label in train.samples:
        assert '/%s/' % classes[label] in path
    assert '1 file or folder is not used (1 above the folders of --class_depth 2)' in capsys.readouterr().out
    assert samples_of(root, parse)[2] == ['cat', 'dog']
    assert '--class_depth 3' in capsys.readouterr().out  # all of cat's images are in tabby/deep
    refused(TRAINING + ['--data_path', root, '--class_depth=4'], 'no class folders at --class_depth 4')
    make_archive(root, tmp_path / 'a.tar')
    assert samples_of(str(tmp_path / 'a.tar'), parse, '--class_depth=2')[2] == classes


def test_an_evaluation_takes_the_depth_from_the_checkpoint(tmp_path, capsys):
    root, out = nested_folders(tmp_path / 'data'), str(tmp_path / 'out')
    assert run_class_finetuning.run(TRAINING + ['--data_path', root, '--class_depth=2', '--output_dir', out]) == 0
    trained = lines_of(out)[-1]
    assert run_class_finetuning.run(['--eval', '--resume', out, '--data_path', root, '--num_workers=0',
                                     '--device=cpu']) == 0
    assert '%.3f' % trained['test_acc1'] in capsys.readouterr().out
    os.makedirs(os.path.join(root, 'train', 'dog', 'empty'))
    assert run_class_finetuning.run(TRAINING + ['--data_path', root, '--class_depth=2', '--check_data']) == 2
    assert 'no image in 1 class folder' in capsys.readouterr().out


def test_folders_are_pillows(tmp_path):
    """An image read from an archive is Pillow's image of the file."""
    image = photo(5, 30, 20)
    image.save(str(tmp_path / 'a.jpg'))
    zip_of(tmp_path / 'a.zip', ('x/a.jpg', (tmp_path / 'a.jpg').read_bytes()))
    with Image.open(str(tmp_path / 'a.jpg')) as file:
        assert np.array_equal(np.asarray(file), np.asarray(load_image(str(tmp_path / 'a.zip/x/a.jpg'))))
