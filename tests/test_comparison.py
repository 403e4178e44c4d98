"""Data fingerprints: a checkpoint identifies its images, and messages name the differences."""

import hashlib
import json
import os
import random
import re
import shutil
import subprocess
import sys
import unicodedata

import numpy as np
import pytest
import torch

import average_checkpoints
import datasets
import run_class_finetuning
from beit.checkpoint import comparison
from beit.data import fingerprint, subsets
from beit.errors import UserError
from beit.files import weights_file
from flags import without_effect
from helpers import ROOT, RUN, lines_of, photo, write_cifar

pytestmark = pytest.mark.fast
CPU = torch.device('cpu')


def write_folders(root, counts, start=0, suffix='.png'):
    """Class folders of different pictures; `counts` by class."""
    for label, (name, count) in enumerate(sorted(counts.items())):
        folder = os.path.join(str(root), name)
        os.makedirs(folder, exist_ok=True)
        for index in range(count):
            photo(start + 1000 * label + index, 32, 32).save(os.path.join(folder, '%03d%s' % (index, suffix)))
    return str(root)


def write_csv(path, rows):
    path.write_text(''.join('%s,%s\n' % row for row in rows))
    return str(path)


@pytest.fixture
def folder(tmp_path):
    """A path with train/ (12 cats, 8 dogs, 4 emus) and val/ (6, 4, 2)."""
    write_folders(tmp_path / 'my data' / 'train', {'cat': 12, 'dog': 8, 'emu': 4})
    write_folders(tmp_path / 'my data' / 'val', {'cat': 6, 'dog': 4, 'emu': 2}, start=500)
    return str(tmp_path / 'my data')


@pytest.fixture
def build(parse):
    """build(flags…): (training set, validation set, classes)."""
    return lambda *flags, **options: datasets.build_datasets(parse(*(RUN + list(flags))), **options)


@pytest.fixture
def describe(build):
    """describe(flags…): the fingerprints of the data."""
    return lambda *flags: fingerprint.of_data(*build(*flags))


def rows_of(root):
    """[(path relative to root, class)] of class folders, sorted."""
    return [('%s/%s' % (name, file), name) for name in sorted(os.listdir(root))
            for file in sorted(os.listdir(os.path.join(root, name)))]


def names_of(dataset):
    return {os.path.relpath(path, dataset.samples.root) for path, _ in dataset.samples}


# ---- the fingerprint

def test_the_hashes_are_those_of_plain_python(folder, describe):
    """An independent version: BLAKE2b of each name, sorted, SHA-256 of all."""
    found, root = describe('--data_path', folder), os.path.join(folder, 'train')
    names = [name.encode() for name, _ in rows_of(root)]
    keys = [int.from_bytes(hashlib.blake2b(name, digest_size=8).digest(), 'little') for name in names]

    def digest(*numbers):
        return hashlib.sha256(b''.join(each.to_bytes(8, 'little') for each in numbers)).hexdigest()[:32]

    def mix(value):
        for shift, factor in ((30, 0xbf58476d1ce4e5b9), (27, 0x94d049bb133111eb), (31, 1)):
            value = (value ^ value >> shift) * factor % 2 ** 64
        return value

    train = found['train']
    assert train['images'] == 24 and found['val']['images'] == 12
    assert train['names'] == digest(*sorted(keys)) and train['order'] == digest(*keys)
    labels = [int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), 'little')
              for _, name in rows_of(root)]
    assert train['labels'] == digest(*sorted((mix(key) + label) % 2 ** 64 for key, label in zip(keys, labels)))
    by_key = sorted(zip(keys, names))
    sizes = [os.path.getsize(os.path.join(root, name.decode())) for _, name in by_key]
    assert train['sizes'] == digest(*[key for key, _ in by_key] + sizes)
    assert [row[0] for row in train['sample']] == ['%016x' % key for key, _ in by_key]
    assert [row[2] for row in train['sample']] == sizes


def test_the_fingerprint_does_not_depend_on_the_location(folder, describe, tmp_path):
    expected = describe('--data_path', folder)
    for other in (str(tmp_path / 'copy'), str(tmp_path / 'link')):
        shutil.copytree(folder, other) if other.endswith('copy') else os.symlink(folder, other)
        assert describe('--data_path', other) == expected
    listed = {part: write_csv(tmp_path / (part + '.csv'), rows_of(os.path.join(folder, part)))
              for part in ('train', 'val')}
    assert describe('--data_path', os.path.join(folder, 'train'), '--train_csv', listed['train'], '--val_csv',
                    listed['train'])['train'] == expected['train']
    from_above = {part: write_csv(tmp_path / ('above_%s.csv' % part), [
        (os.path.join(part, name), label) for name, label in rows_of(os.path.join(folder, part))])
        for part in ('train', 'val')}
    assert describe('--data_path', folder, '--train_csv', from_above['train'], '--val_csv', from_above['val']
                    ) == expected
    absolute = [(os.path.join(folder, 'train', '.', name), label)
                for name, label in rows_of(os.path.join(folder, 'train'))]
    path = write_csv(tmp_path / 'absolute.csv', absolute)
    assert describe('--data_path', os.path.join(folder, 'train'), '--train_csv', path,
                    '--val_csv', path)['train'] == expected['train']


def test_the_fingerprint_depends_on_neither_process_nor_unicode_form(tmp_path, describe):
    for form in ('NFC', 'NFD'):
        for part, count in (('train', 3), ('val', 2)):
            root = tmp_path / form / part
            write_folders(root, {unicodedata.normalize(form, 'rosé'): count, 'cat': count})
            os.rename(str(root / 'cat' / '001.png'), str(root / 'cat' / unicodedata.normalize(form, 'né.png')))
    expected = describe('--data_path', str(tmp_path / 'NFC'))
    assert describe('--data_path', str(tmp_path / 'NFD')) == expected
    code = ('import datasets, flags, json, sys; from beit.data import fingerprint; print(json.dumps('
            'fingerprint.of_data(*datasets.build_datasets(flags.build_parser().parse_args(sys.argv[1:])))))')
    for locale, name in (('C', 'NFC'), ('C.UTF-8', 'NFD')):
        out = subprocess.run([sys.executable, '-c', code] + RUN + ['--data_path', str(tmp_path / name)], cwd=ROOT,
                             env=dict(os.environ, LC_ALL=locale, PYTHONHASHSEED='7'), check=True,
                             stdout=subprocess.PIPE, universal_newlines=True).stdout
        assert json.loads(out) == expected


def test_only_the_changed_part_differs(folder, describe, tmp_path):
    root, csv_file = os.path.join(folder, 'train'), tmp_path / 'list.csv'
    rows = rows_of(root)

    def changed(rows):
        flags = ['--data_path', root, '--train_csv', write_csv(csv_file, rows), '--val_csv', str(csv_file)]
        return {key for key, value in describe(*flags)['train'].items() if value != expected[key]}

    expected = describe('--data_path', folder)['train']
    assert changed(rows) == set()
    assert changed(rows[::-1]) == {'order'}
    assert changed(rows[:-1]) == {'images', 'names', 'order', 'labels', 'sizes', 'sample'}
    labels = [label for _, label in rows]
    random.Random(0).shuffle(labels)
    assert changed([(name, label) for (name, _), label in zip(rows, labels)]) == {'labels'}
    assert changed([(name, label.replace('cat', 'lion')) for name, label in rows]) == {'labels'}
    photo(77, 40, 40).save(os.path.join(root, 'emu', '000.png'))
    assert changed(rows) == {'sizes', 'sample'}


def test_images_of_one_size_are_distinguished_by_content(tmp_path, describe):
    for name, start in (('one', 0), ('other', 50)):
        for part in ('train', 'val'):
            write_folders(tmp_path / name / part, {'cat': 3, 'dog': 3}, start, '.bmp')
    found = [describe('--data_path', str(tmp_path / name))['train'] for name in ('one', 'other')]
    assert {key for key in found[0] if found[0][key] != found[1][key]} == {'sample'}


def test_deleted_images_are_no_error(folder, build, tmp_path):
    train, val, classes = build('--data_path', folder)
    before = fingerprint.of_data(train, val, classes)['train']
    os.remove(train.samples[0][0])
    after = fingerprint.of_data(train, val, classes)['train']
    assert {key for key in before if before[key] != after[key]} == {'sizes', 'sample'}


def test_parts_and_cifar_have_fingerprints(folder, describe, tmp_path, monkeypatch):
    whole = describe('--data_path', folder)['train']
    part = describe('--data_path', folder, '--max_train_samples=9')['train']
    assert part['images'] == 9 and part['names'] != whole['names']
    assert {row[0] for row in part['sample']} < {row[0] for row in whole['sample']}
    (tmp_path / 'cifar').mkdir()
    content = write_cifar(tmp_path / 'cifar', monkeypatch)
    flags = ['--data_set=CIFAR', '--data_path', str(tmp_path / 'cifar')]
    found = describe(*flags)
    assert found['train']['images'] == 12 and found['val']['images'] == 7
    assert found['train']['sample'][0][2] == 3072 and describe(*flags) == found
    some = describe('--max_train_samples=5', *flags)['train']
    assert some['images'] == 5 and {row[0] for row in some['sample']} < {row[0] for row in found['train']['sample']}
    assert all(row in found['train']['sample'] for row in some['sample'])
    assert len(content['train']['data']) == 12


def test_several_labels_count_in_any_order(folder, describe, tmp_path):
    names = [name for name, _ in rows_of(os.path.join(folder, 'train'))]

    def labels(*cells):
        path = write_csv(tmp_path / 'several.csv', list(zip(names, cells * len(names))))
        return describe('--data_path', os.path.join(folder, 'train'), '--train_csv', path, '--val_csv',
                        path)['train']['labels']

    assert labels('a;b', 'b', 'a;c') == labels('b;a', 'b', 'c;a') != labels('a;b', 'b', 'b;c')


# ---- the split

class Named(list):
    """Samples with names and classes: [(name, class)]."""

    root, multi_label = '/data', False

    def relative_names(self, start, stop):
        return [name.encode() for name, _ in self[start:stop]]

    @property
    def targets(self):
        return np.array([label for _, label in self])


def random_set(rng):
    return Named(('%d/%06d.jpg' % (label, rng.randrange(10 ** 6)), label)
                 for label in range(5) for _ in range(rng.randrange(2, 40)))


def held_out(samples, share, seed=0):
    return {samples[index][0] for index in subsets.split(samples, share, seed)[1]}


def test_an_added_file_moves_only_as_many_images_as_the_counts_require():
    for trial in range(60):
        rng = random.Random(trial)
        samples = random_set(rng)
        before = held_out(samples, 0.2, trial)
        label = rng.randrange(5)
        more = Named(sorted(samples + [('%d/new-%d.jpg' % (label, trial), label)]))
        after = held_out(more, 0.2, trial)
        counts = [np.bincount([int(name.partition('/')[0]) for name in names], minlength=5)
                  for names in (before, after)]
        assert len((before ^ after) - {'%d/new-%d.jpg' % (label, trial)}) <= 1 + np.abs(counts[0] - counts[1]).sum()
        assert held_out(Named(rng.sample(samples, len(samples))), 0.2, trial) == before  # in any order


def test_a_larger_share_contains_the_smaller_one_and_every_class():
    for trial in range(30):
        samples = random_set(random.Random(trial))
        parts = [held_out(samples, share, trial) for share in (0.15, 0.3, 0.6)]
        names = [name for name, _ in samples]
        assert len(parts[0]) == max(1, round(0.15 * len(samples))) and len(set(names)) == len(names)
        for part in parts:
            for label in range(5):
                of_class = [name in part for name, each in samples if each == label]
                assert not all(of_class) and (any(of_class) or len(part) < 5)
        for label in '01234':
            few, more, most = ({name for name in part if name[0] == label} for part in parts)
            assert few <= more <= most


def test_the_split_of_a_checkpoint_is_reused(folder, build, tmp_path):
    flags = ['--data_path', folder, '--data_set=image_folder', '--val_split=0.25']
    flags[1] = os.path.join(folder, 'train')
    train, val, _ = build(*flags)
    before = names_of(val)
    assert set(subsets.name_keys(val.samples)) == set(train.held_out) and len(before) == 6
    write_folders(os.path.join(folder, 'train'), {'cat': 30, 'dog': 30, 'emu': 30})
    train, val, _ = build(*flags, held_out=train.held_out)
    assert names_of(val) == before and len(train) == 84
    os.remove(os.path.join(folder, 'train', sorted(before)[0]))
    kept = train.held_out
    train, val, _ = build(*flags, held_out=kept)
    assert names_of(val) == before - {sorted(before)[0]} and np.array_equal(train.held_out, kept)
    with pytest.raises(UserError, match='--val_split 0.25: .* 6 images: none is among'):
        build(*flags, held_out=np.arange(6, dtype=np.uint64))
    with pytest.raises(UserError, match='has no others'):
        build(*flags, held_out=np.concatenate([subsets.name_keys(train.samples), kept]))


# ---- a resumed run names each difference

@pytest.fixture
def differences(parse, folder):
    """differences(change, flags…, then=flags…): all differences after `change()` and a resume."""
    def compare(change, *flags, then=()):
        runs = []
        for more in ((), then):
            if runs:
                change()
            args = parse(*(RUN + ['--data_path', folder] + list(flags) + list(more)))
            data = datasets.build_datasets(args)
            run = comparison.Run(vars(args), CPU, fingerprint.of_data(*data))
            runs.append((run, {'args': dict(vars(args)), 'progress': {'run': comparison.facts_of(run)},
                               'data': comparison.data_to_save(run.data, data[0].held_out)}))
        found = comparison.resume_differences(runs[0][1], runs[1][0], without_effect())
        assert comparison.resume_differences(runs[1][1], runs[1][0], without_effect()) == []
        return found
    return compare


def texts(found):
    return '; '.join(each.text for each in found)


def test_unchanged_data_has_no_difference(differences):
    assert comparison.resume_message(differences(lambda: None)).endswith(' exactly as if it had not been stopped')


def test_replaced_training_images_are_named(differences, folder):
    found = differences(lambda: write_folders(os.path.join(folder, 'train'), {'cat': 12, 'dog': 8, 'emu': 4}, 7000))
    assert texts(found) == 'training images: other files of the same names, by their sizes'
    assert 'in the same order of the data, but not' in comparison.resume_message(found)


def test_replaced_images_of_one_size_are_named(differences, folder):
    root = os.path.join(folder, 'train')
    shutil.rmtree(root)
    write_folders(root, {'cat': 3, 'dog': 3, 'emu': 3}, suffix='.bmp')
    found = differences(lambda: write_folders(root, {'cat': 3, 'dog': 3, 'emu': 3}, 7000, '.bmp'))
    assert texts(found) == 'training images: other files of the same names, by their content'


def test_shuffled_labels_of_a_csv_file_are_named(differences, folder, tmp_path):
    rows = rows_of(os.path.join(folder, 'train'))
    labels = [label for _, label in rows]
    random.Random(1).shuffle(labels)
    path = write_csv(tmp_path / 'train.csv', [(os.path.join('train', name), label) for name, label in rows])
    val = write_csv(tmp_path / 'val.csv', [(os.path.join('val', name), label)
                                           for name, label in rows_of(os.path.join(folder, 'val'))])
    found = differences(lambda: write_csv(tmp_path / 'train.csv', [
        (os.path.join('train', name), label) for (name, _), label in zip(rows, labels)]),
        '--train_csv', path, '--val_csv', val)
    assert texts(found) == 'training images: other labels'


def test_a_csv_file_in_another_order_is_named(differences, folder, tmp_path):
    rows = [(os.path.join('train', name), label) for name, label in rows_of(os.path.join(folder, 'train'))]
    path = write_csv(tmp_path / 'train.csv', rows)
    found = differences(lambda: write_csv(tmp_path / 'train.csv', rows[::-1]), '--train_csv', path, '--val_csv', path)
    assert texts(found) == 'training images: the same files in another order'
    assert 'in another order of the data' in comparison.resume_message(found)


def test_a_renamed_class_is_named(differences, folder):
    def rename():
        for part in ('train', 'val'):
            os.rename(os.path.join(folder, part, 'cat'), os.path.join(folder, part, 'lion'))

    found = differences(rename)
    assert texts(found) == ('training images: other files, by their names; '
                            'validation images: other files, by their names')


def test_a_smaller_validation_set_is_named(differences, folder):
    def cut():
        for name in ('cat', 'dog', 'emu'):
            for file in sorted(os.listdir(os.path.join(folder, 'val', name)))[1:]:
                os.remove(os.path.join(folder, 'val', name, file))

    found = differences(cut)
    assert texts(found) == 'validation images: 3 (was 12)'
    assert 'in the same order of the data, but not' in comparison.resume_message(found)


def test_replaced_validation_images_are_named(differences, folder):
    found = differences(lambda: write_folders(os.path.join(folder, 'val'), {'cat': 6, 'dog': 4, 'emu': 2}, 7000))
    assert texts(found) == 'validation images: other files of the same names, by their sizes'


def test_another_number_of_training_images_is_named(differences, folder):
    found = differences(lambda: os.remove(os.path.join(folder, 'train', 'cat', '000.png')))
    assert texts(found) == 'training images: 23 (was 24)' and found[0].changes_order
    assert 'training images: 9 (was 12)' in texts(differences(
        lambda: None, '--max_train_samples=12', then=['--max_train_samples=9']))


def test_the_arithmetic_of_a_batch_is_named(differences):
    """Mixup pairs the images of a micro-step, and dropout draws random numbers for each micro-step."""
    found = differences(lambda: None, '--mixup=0.8', '--batch_size=4', '--update_freq=2',
                        then=['--batch_size=8', '--update_freq=1'])
    assert texts(found) == '--batch_size: 8 (was 4); --update_freq: 1 (was 2)'
    assert 'in the same order of the data, but not' in comparison.resume_message(found)
    found = differences(lambda: None, then=['--batch_size=4'])
    assert texts(found) == '--batch_size: 4 (was 8); images an update: 4 (was 8)' and found[1].changes_order


@pytest.mark.parametrize('where, value, expected', (
    ('torch.__version__', '1.0', 'version of torch: 1.0 (was %s)' % torch.__version__),
    ('torch.get_num_threads', lambda: 99, 'device: CPU, 99 threads (was '),
    ('beit.checkpoint.comparison.RNG_VERSION', 77, 'version of the random numbers: 77 (was '),
    ('beit.distributed.process_group.world_size', lambda: 2, 'processes: 2 (was 1); images an update: 16 (was 8)')))
def test_another_version_device_or_process_count_is_named(differences, monkeypatch, where, value, expected):
    assert expected in texts(differences(lambda: monkeypatch.setattr(where, value)))


def test_every_fact_is_compared(differences):
    """A checkpoint that differs in any of `FACTS` is not resumed "exactly"."""
    assert [fact.name for fact in comparison.FACTS] == [
        'batch_size', 'update_freq', 'processes', 'total_batch', 'device', 'device_name', 'random_numbers',
        'class_weights', 'torch', 'torchvision', 'timm', 'numpy', 'PIL', 'train.images', 'train.names', 'train.labels',
        'train.sizes', 'train.sample', 'train.order', 'val.images', 'val.names', 'val.labels', 'val.sizes',
        'val.sample']
    run = comparison.Run({'batch_size': 8, 'update_freq': 1}, CPU, {
        part: dict.fromkeys(('images', 'names', 'order', 'labels', 'sizes', 'sample'), 1) for part in ('train', 'val')})
    for fact in comparison.FACTS:
        content = {'args': {'lr': 1}, 'progress': {'run': comparison.facts_of(run)},
                   'data': {part: dict(values) for part, values in run.data.items()}}
        assert comparison.resume_differences(content, run, ()) == []
        part, _, key = fact.name.partition('.')
        if fact.now is None:
            content['data'][part][key] = 2
        else:
            content['progress']['run'][fact.name] = 'another'
        found, = comparison.resume_differences(content, run, ())
        assert (fact.says or fact.title) in found.text and found.changes_order == fact.changes_order


def test_a_checkpoint_of_an_earlier_version_is_not_called_exact():
    run = comparison.Run({'batch_size': 8, 'update_freq': 1, 'lr': 1.}, CPU, {'train': {'images': 5}, 'val': None})
    found = comparison.resume_differences({'args': {'lr': 1.}, 'progress': {'run': comparison.facts_of(run)}}, run, ())
    assert len(found) == 1 and 'training images' in texts(found)
    assert 'in perhaps another order of the data' in comparison.resume_message(found)
    assert 'its flags' in texts(comparison.resume_differences({'model': {}}, run, ()))


def test_the_tests_that_the_page_names_exist():
    with open(os.path.join(ROOT, 'docs', 'reliability.md'), encoding='utf-8') as file:
        page = file.read()
    for fact in comparison.FACTS[:-5]:  # the page has one row for the validation images
        assert (fact.says or fact.title).replace('PIL', 'Pillow').replace('numpy', 'NumPy').split(' of ')[-1] in page
    named = set(re.findall(r'`(?:tests/)?(test_\w+\.py)`', page))
    assert len(named) > 5 and named <= set(os.listdir(os.path.join(ROOT, 'tests')))


# ---- whole runs

@pytest.fixture(scope='module')
def split_run(tmp_path_factory):
    """(class folders, output folder, flags) of a run with --val_split that stopped in its second epoch."""
    root = tmp_path_factory.mktemp('split')
    data = write_folders(root / 'photos', {'cat': 16, 'dog': 12})
    flags = RUN + ['--data_set=image_folder', '--data_path', data, '--epochs=2', '--lr=1e-3', '--save_ckpt_freq=1',
                   '--val_split=0.25', '--seed=3']
    assert run_class_finetuning.run(flags + ['--output_dir', str(root / 'out'), '--maxstep=3']) == 0
    return data, str(root / 'out'), flags


def test_an_added_file_does_not_enter_the_validation_set_of_a_resumed_run(split_run, tmp_path, capsys, refused):
    data, output, flags = str(tmp_path / 'photos'), str(tmp_path / 'out'), list(split_run[2])
    shutil.copytree(split_run[0], data)
    shutil.copytree(split_run[1], output)
    flags[flags.index(split_run[0])] = data
    resume = flags + ['--output_dir', output, '--auto_resume', '--batch_size=4', '--update_freq=2']
    before = comparison.held_out_keys(weights_file.load_weights_file(os.path.join(output, 'checkpoint-1-step1.pth')))
    assert len(before) == 7
    write_folders(tmp_path / 'photos', {'cat': 40, 'dog': 12})  # 24 additional files
    assert run_class_finetuning.run(resume) == 0
    out = capsys.readouterr().out
    assert '45 training and 7 validation images' in out and 'exactly' not in out
    assert 'training images: 45 (was 21)' in out and '--batch_size: 4 (was 8)' in out
    last = os.path.join(output, 'checkpoint-1.pth')
    content = weights_file.load_weights_file(last)
    assert np.array_equal(comparison.held_out_keys(content), before)
    assert run_class_finetuning.run(flags + ['--eval', '--resume', last]) == 0
    out = capsys.readouterr().out
    assert 'on the 7 test images: %.3f%%' % lines_of(output)[-1]['test_acc1'] in out
    assert 'Not the validation' not in out and 'Trained on' not in out
    # Without --val_split all images would be evaluated, including the training images.
    everything = [flag for flag in flags if 'val_split' not in flag] + ['--eval', '--resume', last]
    listed = write_csv(tmp_path / 'photos.csv', [('photos/' + name, label) for name, label in rows_of(data)])
    for more in (['--eval_data_path', data], ['--data_set=IMNET', '--data_path', '', '--val_csv', listed]):
        assert run_class_finetuning.run(everything + more) == 0
        out = capsys.readouterr().out
        assert 'Trained on: 45 of 45 training images' in out and 'with --val_split 0.25 --seed 3' in out
    # New images belong to no split: they are evaluated, and a line reports the difference.
    new = write_folders(tmp_path / 'new', {'cat': 3, 'dog': 3}, start=9000)
    assert run_class_finetuning.run(everything + ['--eval_data_path', new]) == 0
    assert 'validation images: 6 (was 7)' in capsys.readouterr().out
    # A checkpoint of an earlier version has another split.
    old = str(tmp_path / 'old.pth')
    torch.save({key: value for key, value in content.items() if key != 'data'}, old)
    refused(flags + ['--eval', '--resume', old], 'earlier version', '--eval_data_path')
    refused(flags + ['--epochs=3', '--resume', old], 'earlier version')


def test_a_split_with_duplicate_images_resumes(tmp_path, build):
    root = write_folders(tmp_path / 'photos', {'cat': 6})
    shutil.copytree(os.path.join(root, 'cat'), os.path.join(root, 'dog'))
    train, val, classes = build('--data_set=image_folder', '--data_path', root, '--val_split=0.5')
    content = {'data': comparison.data_to_save(fingerprint.of_data(train, val, classes), train.held_out)}
    assert fingerprint.count_known(val, content['data']['train']['sample']) > 0
    comparison.check_unseen('out', content, val, 0.5)
    del content['data']['held_out']
    with pytest.raises(UserError, match='--val_split 0.5'):
        comparison.check_unseen('out', content, val, 0.5)


def test_averages_of_two_splits_are_refused(split_run, tmp_path, capsys):
    path = os.path.join(split_run[1], 'checkpoint-0.pth')
    content, other, output = weights_file.load_weights_file(path), str(tmp_path / 'other.pth'), str(tmp_path / 'a.pth')

    def average(**changes):
        torch.save(dict(content, **changes), other)
        return average_checkpoints.run(['--inputs', path, other, '--output', output])

    moved = content['data']['held_out'].clone()
    moved[0] += 1
    for changes in (dict(data=dict(content['data'], held_out=moved)),
                    dict(args=dict(content['args'], seed=4)),
                    dict(args=dict(content['args'], val_split=0.5)),
                    dict(args=dict(content['args'], val_split=0.), data={key: content['data'][key]
                                                                        for key in ('train', 'val')})):
        assert average(**changes) == 2
        err = capsys.readouterr().err
        assert len(err.splitlines()) == 1 and 'other.pth' in err and 'held out' in err and '--val_split 0.25' in err
    assert not os.path.exists(output)
    train = dict(content['data']['train'], images=22, names='0' * 32)
    assert average(data=dict(content['data'], train=train)) == 0
    assert 'training images: 22 (was 21)' in capsys.readouterr().out
    assert torch.equal(weights_file.load_weights_file(output)['data']['held_out'], content['data']['held_out'])


def test_an_evaluation_on_training_images_is_reported(folder, tmp_path, capsys, refused):
    output = str(tmp_path / 'out')
    flags = RUN + ['--data_path', folder]
    assert run_class_finetuning.run(flags + ['--epochs=1', '--output_dir', output]) == 0
    assert 'too good' not in capsys.readouterr().out
    assert run_class_finetuning.run(flags + ['--eval', '--resume', output]) == 0
    out = capsys.readouterr().out
    assert 'Not ' not in out and 'Trained on' not in out
    assert run_class_finetuning.run(flags + ['--eval', '--resume', output, '--eval_data_path',
                                             os.path.join(folder, 'train')]) == 0
    out = capsys.readouterr().out
    assert 'Trained on: 24 of 24 training images' in out and 'too good for new images' in out
    assert 'validation images: 24 (was 12)' in out
    # A new split would evaluate training images.
    shutil.rmtree(os.path.join(folder, 'val'))
    for more in (['--eval'], ['--epochs=2']):
        refused(flags + ['--val_split=0.5', '--resume', output] + more, '--val_split 0.5', '12 of 24', '--finetune')


# ---- files in both lists

def test_files_in_both_lists_are_counted_by_their_real_paths(folder, build, tmp_path, capsys):
    train_root, rows = os.path.join(folder, 'train'), rows_of(os.path.join(folder, 'train'))
    train, val, _ = build('--data_path', folder)
    assert fingerprint.count_shared_files(train, val) == 0
    fingerprint.report_shared_files(train, val)
    assert capsys.readouterr().out == ''
    listed = write_csv(tmp_path / 'train.csv', rows)
    some = write_csv(tmp_path / 'val.csv', [('./' + name, label) for name, label in rows[:5]] + [
        (os.path.join(folder, 'val', name), label) for name, label in rows_of(os.path.join(folder, 'val'))])
    train, val, _ = build('--data_path', train_root, '--train_csv', listed, '--val_csv', some)
    assert fingerprint.count_shared_files(train, val) == 5
    fingerprint.report_shared_files(train, val)
    assert '5 of the 17 validation images are training images' in capsys.readouterr().out
    # Links to folders, and to files.
    os.symlink(os.path.join(train_root, 'emu'), os.path.join(folder, 'val', 'emu', 'more'))
    assert fingerprint.count_shared_files(*build('--data_path', folder)[:2]) == 4
    os.remove(os.path.join(folder, 'val', 'emu', 'more'))
    linked = tmp_path / 'linked' / 'val' / 'cat'
    linked.mkdir(parents=True)
    os.symlink(train_root, str(tmp_path / 'linked' / 'train'))
    for name in ('dog', 'emu'):
        shutil.copytree(os.path.join(folder, 'val', name), str(linked.parent / name))
    for name in sorted(os.listdir(os.path.join(train_root, 'cat')))[:3]:
        os.symlink(os.path.join(train_root, 'cat', name), str(linked / name))
    assert fingerprint.count_shared_files(*build('--data_path', str(tmp_path / 'linked'))[:2]) == 3
    # Parts of one list share no file, unless a folder is in the list twice.
    flags = ['--data_set=image_folder', '--data_path', train_root, '--val_split=0.5']
    assert fingerprint.count_shared_files(*build(*flags)[:2]) == 0
    os.symlink(os.path.join(train_root, 'cat'), os.path.join(train_root, 'fox'))
    train, val, _ = build(*flags)
    pairs = [{os.path.realpath(path) for path, _ in part.samples} for part in (train, val)]
    assert fingerprint.count_shared_files(train, val) >= len(pairs[0] & pairs[1]) > 0


def test_cifar_shares_no_files(tmp_path, build, monkeypatch):
    write_cifar(tmp_path, monkeypatch)
    train, val, _ = build('--data_set=CIFAR', '--data_path', str(tmp_path))
    assert fingerprint.count_shared_files(train, val) == 0
