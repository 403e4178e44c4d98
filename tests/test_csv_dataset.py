"""CSV files, images of several classes, --loss bce, --class_weights, and additional figures of an evaluation."""

import csv
import json
import os
import pkgutil
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
import timm.loss
import torch
import torch.nn.functional as F

import datasets
import engine_for_finetuning as engine
import run_class_finetuning
from beit.checkpoint import inference_model
from beit.config import MixupConfig
from beit.data import transforms
from beit.data.loader import Batch
from beit.files import weights_file
from beit.training import metrics
from beit.training.losses import BinaryCrossEntropy, WeightedCrossEntropy, build_criterion, class_weights
from flags import config_from
from helpers import ROOT, RUN, Batches, launch, lines_of, photo

pytestmark = pytest.mark.fast

CPU = torch.device('cpu')


@pytest.fixture
def pictures(tmp_path):
    """A folder with 24 pictures and their classes: any subset of red, green and blue."""
    folder = tmp_path / 'my pictures'
    folder.mkdir()
    shown = {}
    for index in range(24):
        colours = [index & 1, index >> 1 & 1, index >> 2 & 1]
        pixels = np.asarray(photo(index, 32, 32)) // 3 + np.uint8([140 * colour for colour in colours])
        from PIL import Image
        Image.fromarray(pixels.astype(np.uint8)).save(str(folder / ('%02d.png' % index)))
        shown['%02d.png' % index] = [name for name, colour in zip(('red', 'green', 'blue'), colours) if colour]
    return folder, shown


def write(path, rows, header=('path', 'label')):
    with open(str(path), 'w', encoding='utf-8', newline='') as file:
        csv.writer(file).writerows(([header] if header else []) + rows)
    return str(path)


@pytest.fixture
def several(pictures):
    """(training CSV file, validation CSV file) with several classes per image."""
    folder, shown = pictures
    rows = [[name, ';'.join(colours)] for name, colours in shown.items()]
    return write(folder / 'train.csv', rows[:16]), write(folder / 'val.csv', rows[16:])


# ---- reading

def test_a_csv_file_gives_the_samples_of_the_folders(image_folder, tmp_path, parse):
    root = image_folder(train=5, val=3)
    flags = {}
    for split in ('train', 'val'):
        rows = [[os.path.join(split, name, image), name] for name in ('cat', 'dog')
                for image in sorted(os.listdir(os.path.join(root, split, name)))]
        flags[split] = '--%s_csv=%s' % (split, write(tmp_path / (split + '.csv'), rows, header=None))
    by_folder = datasets.build_datasets(parse('--data_path', root, *RUN))
    by_file = datasets.build_datasets(parse('--data_path', root, *(RUN + list(flags.values()))))
    assert by_file[2] == by_folder[2] == ['cat', 'dog']
    for one, other in zip(by_file[:2], by_folder[:2]):
        assert list(one.samples) == list(other.samples)
        assert one[2][1] == other[2][1] and one[2][0].shape == (32, 32, 3)


def test_paths_columns_quotes_and_encodings(pictures, parse):
    folder, _ = pictures
    text = '\ufeffid,LABEL,note,path\r\n1,"Hund, groß",x,00.png\r\n\r\n2, Käse ,"a\nb",%s\r\n' % (folder / '01.png')
    (folder / 'x.csv').write_bytes(text.encode('utf-8'))
    args = parse('--train_csv', str(folder / 'x.csv'), '--disable_eval_during_finetuning', *RUN)
    train, _, classes = datasets.build_datasets(args)
    assert classes == ['Hund, groß', 'Käse']
    assert list(train.samples) == [(str(folder / '00.png'), 0), (str(folder / '01.png'), 1)]


def test_targets_of_several_classes(several, pictures, parse):
    _, shown = pictures
    train, val, classes = datasets.build_datasets(parse('--train_csv', several[0], '--val_csv', several[1], *RUN))
    assert classes == ['blue', 'green', 'red'] and len(train) == 16 and len(val) == 8
    for path, target in list(train.samples) + list(val.samples):
        assert target.tolist() == [float(name in shown[os.path.basename(path)]) for name in classes]


def test_an_evaluation_of_several_labels_may_list_one_an_image(several, pictures, parse):
    folder, _ = pictures
    path = write(folder / 'one.csv', [['00.png', 'red'], ['01.png', 'blue']])
    for classes, multi_label, expected in ((['blue', 'green', 'red'], True, [[0., 0., 1.], [1., 0., 0.]]),
                                           (['blue', 'green', 'red'], None, [2, 0])):
        _, val, known = datasets.build_datasets(parse('--val_csv', path, '--eval', *RUN), None, classes, multi_label)
        targets = [target.tolist() if multi_label else target for _, target in val.samples]
        assert targets == expected and known == classes


@pytest.mark.parametrize('content, words', (
    (b'', ('it is empty',)), (b'\n', ('lists no image',)), (b'path,label\n', ('lists no image',)),
    (b'00.png,cat\n01.png\n', ('line 2', '1 column, not 2')), (b'00.png,cat\n01.png,a,b\n', ('line 2', '3 columns')),
    (b'00.png,cat\n01.png,"dog\n', ('line 2', 'not CSV')), (b'00.png,cat\n\xff.png,cat\n', ('line 2', 'not UTF-8')),
    (b'00.png,cat\n0\x001.png,cat\n', ('line 2', 'NUL')), ('00.png,cat\n'.encode('utf-16'), ('line 1', 'NUL')),
    (b'00.png,cat\n,dog\n', ('line 2', 'path is empty')), (b'00.png,cat\n01.png,\n', ('line 2', 'label is empty')),
    (b'00.png,cat;dog\n01.png,cat;;dog\n', ('line 2', 'label is empty')),
    (b'00.png,cat;dog\n01.png,cat;cat\n', ('line 2', 'cat', 'twice')),
    (b'00.png,cat\n01.png,dog\n00.png,dog\n', ('line 3', '00.png', 'line 1')),
    (b'00.png,cat\nhere/not.png,dog\n', ('line 2', 'there is no file', 'here/not.png')),
    (b'00.png,cat\n01.png,do\x07g\n', ('line 2', 'unprintable')),
    (b'00.png,' + b'x' * 200000 + b'\n', ('line 1', 'not CSV'))))
def test_a_wrong_csv_file_is_refused_with_its_line(refused, pictures, content, words):  # noqa: F811
    path = pictures[0] / 'wrong.csv'
    path.write_bytes(content)
    refused(RUN + ['--train_csv', str(path), '--disable_eval_during_finetuning', '--epochs=1'], '--train_csv', *words)


def test_csv_files_that_contradict_each_other(refused, pictures, several, image_folder):  # noqa: F811
    folder, shown = pictures
    one = write(folder / 'one.csv', [['00.png', 'green'], ['01.png', 'red']])
    base = RUN + ['--epochs=1', '--batch_size=2']
    two = write(folder / 'two.csv', [['00.png', 'green'], ['01.png', 'red;green']])
    refused(base + ['--train_csv', one, '--val_csv', two], 'two.csv, line 3', 'red;green are several labels')
    wrong = write(folder / 'wrong.csv', [['00.png', 'green'], ['01.png', 'rde']])
    refused(base + ['--train_csv', one, '--val_csv', wrong], 'wrong.csv, line 3', 'rde', 'did you mean red?')
    refused(base + ['--train_csv', several[0], '--val_csv', several[1], '--loss=ce'], '--loss ce', '--loss bce')
    refused(base + ['--train_csv', one], '--val_csv, or --val_split')
    refused(base + ['--train_csv', str(folder / 'no.csv')], 'no such file')
    refused(base + ['--train_csv', one, '--val_csv', one, '--val_split=0.5'], '--val_split', '--val_csv')
    refused(base + ['--train_csv', one, '--val_csv', one, '--eval_data_path', str(folder)], '--eval_data_path')
    refused(base + ['--train_csv', several[0], '--data_path', image_folder(classes=('blue', 'green', 'red'))],
            'line 2', 'there is no file')


@pytest.mark.parametrize('labels, says', [('red', '1 of the 2 classes (green)'), ('red;green', '')])
def test_a_training_names_the_classes_without_a_validation_image(pictures, capsys, labels, says):
    folder, _ = pictures
    train = write(folder / 'train.csv', [['%02d.png' % index, ('red', 'green')[index % 2]] for index in range(8)])
    val = write(folder / 'val.csv', [['1%d.png' % index, label] for index, label in enumerate(labels.split(';'))])
    assert run_class_finetuning.run(RUN + ['--train_csv', train, '--val_csv', val, '--epochs=1', '--batch_size=4']
                                    + ['--topk', '1', '99'][:3 * bool(says)]) == 0
    out = capsys.readouterr().out
    assert ('--topk 99: not shown, because it is always 100 % with 2 classes\n' in out) == bool(says)
    assert bool(says) == ('not shown' in out)
    lines = [line for line in out.splitlines() if 'no validation image' in line]
    assert lines == ['Evaluated on all logits: there is no validation image of ' + says][:bool(says)]


def read_rows(path, *flags):
    """{file name: class} of a training CSV file."""
    from run_class_finetuning import build_parser
    args = build_parser().parse_args(['--train_csv', str(path), '--disable_eval_during_finetuning', *RUN, *flags])
    train, _, classes = datasets.build_datasets(args)
    assert [train.load(file).size for file, _ in train.samples] == [(32, 32)] * len(train)
    return {os.path.basename(file): classes[label] for file, label in train.samples}


@pytest.mark.parametrize('text', [
    '00.png;cat\n01.png;big dog\n', '00.png\tcat\n01.png\tbig dog\n', 'image;class\n00.png;cat\n01.png;big dog\n',
    '"00.png", "cat"\n"01.png", "big dog"\n', 'label\tnote\tpath\ncat\ta,b\t00.png\nbig dog\tc;d\t01.png\n',
    '00.png,cat\n01.png, big dog\n,\n  \n', 'id;note;label;path\n1;a, b;cat;00.png\n2;c, d;big dog;01.png\n'])
def test_separators_and_quotes_are_found(pictures, text):
    path = pictures[0] / 'x.csv'
    path.write_text(text)
    assert read_rows(path) == {'00.png': 'cat', '01.png': 'big dog'}


@pytest.mark.parametrize('text, words', [
    ('image_id,label\n00.png,cat\n', ('line 1', 'image_id,label', 'neither an image nor a header')),
    ('path;species\n00.png;cat\n', ('line 1', 'path;species', 'category')),
    ('path,red,green\n00.png,1,0\n01.png,0,1\n', ('line 1', 'path,red,green', 'path,label;label')),
    ('cat,00.png\ndog,01.png\n', ('line 1', 'cat,00.png', 'label,path')),
    ('00.png,cat\n01.png,nan\n', ('line 2', 'label nan')),
    ('00.png,cat\n01.png,<NA>\n', ('line 2', '<NA>')),
    ('path,label,split\n00.png,cat,train\n01.png,dog,3\n', ('line 3', "'3'", 'split', 'train, val or test')),
    ('path,label,split\n00.png,cat,val\n', ('column split', 'no row has the split train'))])
@pytest.mark.parametrize('mode', ['error', 'skip'])
def test_a_header_or_label_that_is_not_understood_is_quoted(refused, pictures, text, words, mode):
    path = pictures[0] / 'x.csv'
    path.write_text(text)
    refused(RUN + ['--train_csv', str(path), '--disable_eval_during_finetuning', '--epochs=1', '--bad_images', mode],
            '--train_csv %s' % path, *words)


def test_a_header_gives_the_order_and_a_class_may_be_called_nan(pictures, image_folder, parse):
    folder, _ = pictures
    (folder / 'x.csv').write_text('label,path\ncat,00.png\ndog,01.png\n')
    assert read_rows(folder / 'x.csv') == {'00.png': 'cat', '01.png': 'dog'}
    root = image_folder(train=2, val=1, classes=('nan', 'roti'))
    val = write(folder / 'val.csv', [[os.path.join('val', name, '000.png'), name] for name in ('roti', 'nan')])
    _, val, classes = datasets.build_datasets(parse('--data_path', root, '--val_csv', val, *RUN))
    assert [classes[label] for _, label in val.samples] == ['roti', 'nan']


def test_paths_of_windows_and_of_macos_are_found_and_reported(pictures, capsys):
    folder, _ = pictures
    (folder / 'ros\u00e9').mkdir()
    (folder / 'e\u0301te\u0301').mkdir()
    for index, name in enumerate(('ros\u00e9/a.png', 'e\u0301te\u0301/b.png', 'plain.png')):
        photo(index, 32, 32).save(str(folder / name))
    write(folder / 'x.csv', [['rose\u0301\\a.png', 'rose\u0301'], ['\u00e9t\u00e9\\b.png', 'ros\u00e9'],
                             ['plain.png', 'other']])
    assert read_rows(folder / 'x.csv') == {'a.png': 'ros\u00e9', 'b.png': 'ros\u00e9', 'plain.png': 'other'}
    line, = [line for line in capsys.readouterr().out.splitlines() if 'spelling' in line]
    assert '--train_csv %s: 2 paths' % (folder / 'x.csv') in line
    if os.sep == '/':  # a backslash may also be part of a name
        photo(3, 32, 32).save(str(folder / 'c\\d.png'))
        write(folder / 'x.csv', [['c\\d.png', 'x']])
        assert read_rows(folder / 'x.csv') == {'c\\d.png': 'x'} and 'spelling' not in capsys.readouterr().out


def test_a_split_column_assigns_the_rows(pictures, parse, capsys):
    folder, _ = pictures
    rows = [['%02d.png' % index, 'ab'[index % 2], ('train', 'Validation', 'test')[index // 8]] for index in range(24)]
    path = write(folder / 'all.csv', rows, ('path', 'label', 'split'))
    train, val, _ = datasets.build_datasets(parse('--train_csv', path, '--val_csv', path, *RUN))
    names = [[os.path.basename(name) for name, _ in part.samples] for part in (train, val)]
    assert names == [[row[0] for row in rows[:8]], [row[0] for row in rows[8:16]]]
    out = capsys.readouterr().out
    assert 'using 8 of its 24 images, whose split is train' in out and 'whose split is val' in out
    only_test = write(folder / 'test.csv', rows[:8] + rows[16:], ('path', 'label', 'split'))
    _, val, _ = datasets.build_datasets(parse('--train_csv', path, '--val_csv', only_test, *RUN))
    assert len(val) == 8 and 'whose split is test' in capsys.readouterr().out


def test_a_class_name_may_hold_a_semicolon(pictures, image_folder, parse, capsys):
    folder, _ = pictures
    write(folder / 'x.csv', [['00.png', 'AC\\;DC'], ['01.png', 'plain']])
    assert read_rows(folder / 'x.csv') == {'00.png': 'AC;DC', '01.png': 'plain'}
    assert 'several labels' not in capsys.readouterr().out
    root = image_folder(train=2, val=1, classes=('AC;DC', 'AC'))
    val = write(folder / 'val.csv', [[os.path.join('val', name, '000.png'), name] for name in ('AC;DC', 'AC')])
    _, val, classes = datasets.build_datasets(parse('--data_path', root, '--val_csv', val, *RUN))
    assert [classes[label] for _, label in val.samples] == ['AC;DC', 'AC']
    several = write(folder / 'y.csv', [['00.png', 'a;b'], ['01.png', 'a'], ['02.png', '']])
    datasets.build_datasets(parse('--train_csv', several, '--disable_eval_during_finetuning', *RUN))
    assert '1 images have several labels' in capsys.readouterr().out


MEMORY = '''
import os, resource, sys
sys.path.insert(0, %r)
from beit.data import csv_dataset
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
before = peak()
samples, classes = csv_dataset.read('--train_csv', sys.argv[1], '', 'auto', missing=sys.argv[2])
print('GREW', peak() - before, len(samples), samples[len(samples) - 1][1], len(classes))
'''


@pytest.mark.needs('linux', sys.platform.startswith('linux'), 'peaks of memory are in other units elsewhere')
def test_a_long_list_takes_the_memory_of_its_text(tmp_path):
    rows = ['a rather long folder name, as they are/%07d.png' % index for index in range(200000)]
    with open(str(tmp_path / 'x.csv'), 'w', encoding='utf-8') as file:
        file.writelines('"%s",class %d\n' % (row, index % 1000) for index, row in enumerate(rows))
    out = subprocess.run([sys.executable, '-c', MEMORY % ROOT, str(tmp_path / 'x.csv'), 'unreadable'], check=True,
                         stdout=subprocess.PIPE, universal_newlines=True).stdout
    grew, count, label, classes = map(int, re.search(r'GREW (.*)', out).group(1).split())
    # Text, names, 2 x 8 bytes of offsets, and labels; 3 x 8 bytes more while files are looked up.
    assert (count, label, classes) == (200000, 999, 1000) and grew < 6 * os.path.getsize(str(tmp_path / 'x.csv')), grew


def test_a_missing_image_can_be_left_out(pictures, capsys):
    folder, _ = pictures
    rows = [['%02d.png' % index, 'ab'[index % 2]] for index in range(16)] + [['gone.png', 'a']]
    path = write(folder / 'some.csv', rows)
    assert run_class_finetuning.run(RUN + ['--train_csv', path, '--disable_eval_during_finetuning', '--epochs=1',
                                           '--bad_images=skip', '--max_bad_images=0.5', '--batch_size=17']) == 0
    assert 'gone.png cannot be read' in capsys.readouterr().out
    assert run_class_finetuning.run(RUN + ['--train_csv', path, '--disable_eval_during_finetuning',
                                           '--check_data']) == 2
    assert 'Checked 17 images: 1 cannot be read' in capsys.readouterr().out


def test_a_split_of_images_with_several_classes(several, parse):
    args = parse('--train_csv', several[0], '--val_split=0.3', *RUN)
    train, val, classes = datasets.build_datasets(args)
    assert len(val) == 5 and len(train) == 11
    assert torch.stack([target for _, target in train.samples]).sum(0).min() >= 1
    again = datasets.build_datasets(args)
    assert [path for path, _ in again[1].samples] == [path for path, _ in val.samples]


# ---- losses

@pytest.mark.needs('current', hasattr(timm.loss, 'BinaryCrossEntropy'), 'this timm has no BinaryCrossEntropy')
def test_binary_cross_entropy_is_timms():
    torch.manual_seed(0)
    logits, indices, dense = torch.randn(6, 4), torch.randint(0, 4, (6,)), torch.rand(6, 4).round()
    for smoothing in (0., 0.1):
        for pos_weight in (None, torch.tensor([1., 2., .5, 3.])):
            ours = BinaryCrossEntropy(smoothing, pos_weight, smooths_dense=False)
            theirs = timm.loss.BinaryCrossEntropy(smoothing, pos_weight=pos_weight)
            assert torch.allclose(ours(logits, indices), theirs(logits, indices))
            assert torch.allclose(ours(logits, dense), theirs(logits, dense))


def test_binary_cross_entropy_by_hand():
    torch.manual_seed(0)
    logits, dense, weight = torch.randn(6, 4), torch.rand(6, 4).round(), torch.tensor([1., 2., .5, 3.])
    by_hand = dense * 0.9 + 0.05
    expected = -(weight * by_hand * F.logsigmoid(logits) + (1 - by_hand) * F.logsigmoid(-logits)).mean()
    assert torch.allclose(BinaryCrossEntropy(0.1, weight)(logits, dense), expected)


def test_weighted_cross_entropy_is_pytorchs():
    torch.manual_seed(0)
    logits, indices, weight = torch.randn(6, 4), torch.randint(0, 4, (6,)), torch.tensor([1., 2., .5, 3.])
    plain = WeightedCrossEntropy(0., weight)
    assert torch.allclose(plain(logits, indices), F.cross_entropy(logits, indices, weight, reduction='none').mean())
    soft = torch.softmax(torch.randn(6, 4), 1)
    expected = sum(-float(weight[label] * soft[row, label] * torch.log_softmax(logits[row].double(), 0)[label])
                   for row in range(6) for label in range(4)) / 6
    assert float(plain(logits, soft)) == pytest.approx(expected, rel=1e-5)
    from timm.loss import LabelSmoothingCrossEntropy
    assert torch.allclose(WeightedCrossEntropy(0.1, torch.ones(4))(logits, indices),
                          LabelSmoothingCrossEntropy(0.1)(logits, indices))


def test_mixup_of_several_classes(parse):
    args = parse('--mixup=0.8', '--smoothing=0.1')
    for mode in ('batch', 'pair', 'elem'):
        np.random.seed(0)
        images, dense = torch.rand(5, 3, 8, 8), torch.rand(5, 3).round()
        before = images.clone()
        mixed, soft = transforms.build_mixup(config_from(args, MixupConfig, mixup_mode=mode), 3)(images, dense)
        smooth = dense * 0.9 + 0.05
        assert soft.shape == (5, 3) and torch.allclose(soft[4], smooth[4]) and torch.equal(mixed[4], before[4])
        for row, other in ((0, 3), (1, 2)):
            share = float(((mixed[row] - before[other]) / (before[row] - before[other])).median())
            assert torch.allclose(soft[row], smooth[row] * share + smooth[other] * (1 - share), atol=1e-4)


def test_balanced_weights_are_scikit_learns():
    from sklearn.utils.class_weight import compute_class_weight
    targets = np.repeat(np.arange(4), (3, 50, 7, 11))
    weights = class_weights('balanced', list('abcd'), np.bincount(targets))
    assert np.allclose(weights, compute_class_weight('balanced', classes=np.arange(4), y=targets))


def test_weights_reach_the_loss(image_folder, tmp_path, monkeypatch, capsys, refused):  # noqa: F811
    root = image_folder()
    os.remove(os.path.join(root, 'train', 'cat', '000.png'))
    base = RUN + ['--data_path', root, '--epochs=1']
    seen = []
    monkeypatch.setattr(run_class_finetuning, 'build_criterion', lambda *how: seen.append(how[3]) or
                        build_criterion(*how))
    assert run_class_finetuning.run(base + ['--class_weights=balanced']) == 0
    assert 'Class weights: dog 0.9688, cat 1.033' in capsys.readouterr().out
    files = {'w.csv': 'class,weight\ncat,2\ndog,0.5\n', 'w.json': '{"dog": 0.5, "cat": 2}'}
    for name, text in files.items():
        (tmp_path / name).write_text(text)
        for more in ([], ['--loss=bce'], ['--mixup=0.8'], ['--smoothing=0']):
            assert run_class_finetuning.run(base + ['--class_weights', str(tmp_path / name)] + more) == 0
            assert seen[-1].tolist() == [2., .5]
    for text, words in (('cat,1\n', ('no weight for class dog',)), ('cat,1\ndgo,2\n', ('no class dgo', 'mean dog?')),
                        ('cat,1\ndog,-2\n', ('entry 2', '-2')), ('cat,1\ndog,x\n', ('entry 2',)),
                        ('cat,0\ndog,0\n', ('all weights are 0',)), ('cat,1\ndog,nan\n', ('entry 2',)),
                        ('{"cat": [1]}', ('entry 1',)), ('{"cat"', ('neither CSV nor JSON',)),
                        ('cat,1\ndog,1e39\n', ('too large',)), ('cat,1\ncat,2\n', ('entry 2', 'new class'))):
        (tmp_path / 'w.csv').write_text(text)
        refused(base + ['--class_weights', str(tmp_path / 'w.csv')], '--class_weights', *words)
    refused(base + ['--class_weights=balenced'], 'no such file; give balanced')


# ---- evaluation

def test_mean_average_precision_is_scikit_learns():
    from sklearn.metrics import average_precision_score
    torch.manual_seed(0)
    targets = (torch.rand(40, 5) < 0.3).float()
    targets[:, 3] = 0.  # a class without a positive is not counted
    images = torch.randn(40, 3, 32, 32)
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3072, 5))
    loader = Batches([Batch(images[part], targets[part], torch.arange(40)[part], [])
                      for part in (slice(20, 40), slice(0, 20))])
    stats = engine.evaluate(loader, model, CPU, metrics=[metrics.Loss(), metrics.MeanAveragePrecision()])
    outputs = model(images).detach()
    expected = np.mean([average_precision_score(targets[:, label], outputs[:, label]) for label in (0, 1, 2, 4)])
    assert stats['mAP'] == pytest.approx(100 * expected) and 'acc1' not in stats and stats['images'] == 40
    assert stats['loss'] == pytest.approx(float(F.binary_cross_entropy_with_logits(outputs, targets)), rel=1e-5)
    named = engine.evaluate(loader, model, CPU,
                            metrics=[metrics.Loss(), metrics.MeanAveragePrecision(list('abcde'))])
    assert named['mAP'] == stats['mAP'] and [each['class'] for each in named['classes']] == list('abcde')
    assert [each['images'] for each in named['classes']] == targets.sum(0).int().tolist()
    assert named['classes'][3]['average_precision'] is None
    assert named['classes'][4]['average_precision'] == pytest.approx(
        100 * average_precision_score(targets[:, 4], outputs[:, 4]))


def test_a_run_with_several_classes_learns_resumes_and_is_evaluated(several, tmp_path, capsys):
    output = str(tmp_path / 'out')
    base = RUN + ['--train_csv', several[0], '--val_csv', several[1], '--batch_size=8', '--lr=1e-3', '--hflip=0',
                  '--reprob=0', '--mixup=0.1', '--class_weights=balanced', '--output_dir', output]
    assert run_class_finetuning.run(base + ['--epochs=12', '--maxstep=15', '--save_ckpt_freq=1', '--log_dir',
                                            str(tmp_path / 'tb')]) == 0
    assert run_class_finetuning.run(base + ['--epochs=12', '--auto_resume']) == 0
    out = capsys.readouterr().out
    assert weights_file.load_weights_file(os.path.join(output, 'checkpoint-best.pth'))['activation'] == 'sigmoid'
    assert 'exactly as if it had not been stopped' in out and 'Max mAP' in out
    figures = [line['test_mAP'] for line in lines_of(output)]
    assert len(figures) == 12 and max(figures) > 80.
    best = weights_file.load_weights_file(os.path.join(output, 'checkpoint-best.pth'))
    assert best['epoch'] == figures.index(max(figures)) and best['classes'] == ['blue', 'green', 'red']
    assert run_class_finetuning.run(RUN + ['--val_csv', several[1], '--eval', '--resume', output]) == 0
    out = capsys.readouterr().out
    assert 'mAP of the network on the 8 test images: %.3f%%' % max(figures) in out
    assert 'accuracy n/a' not in out and 'mAP %.3f' % max(figures) in out


def test_an_evaluation_file_with_few_classes_is_read_with_the_checkpoints(pictures, tmp_path, capsys):
    folder, _ = pictures
    rows = [['%02d.png' % index, 'abc'[index % 3]] for index in range(24)]
    train, output = write(folder / 'train.csv', rows), str(tmp_path / 'out')
    assert run_class_finetuning.run(RUN + ['--train_csv', train, '--val_split=0.2', '--loss=bce', '--epochs=1',
                                           '--output_dir', output]) == 0
    assert 'Max accuracy' in capsys.readouterr().out
    only_c = write(folder / 'c.csv', [row for row in rows if row[1] == 'c'])
    for more in ([], ['--train_csv', train]):
        assert run_class_finetuning.run(RUN + ['--val_csv', only_c, '--eval', '--resume', output] + more) == 0
        assert '3 classes' in capsys.readouterr().out


@pytest.fixture
def imagenet_like(tmp_path):
    """val/ with 12 images of three classes, named as in ImageNet."""
    for index in range(12):
        folder = tmp_path / 'imagenet' / 'val' / 'abc'[index % 3]
        folder.mkdir(parents=True, exist_ok=True)
        photo(index, 32, 32).save(str(folder / ('ILSVRC2012_val_%08d.png' % (index + 1))))
    os.rename(str(tmp_path / 'imagenet' / 'val'), str(tmp_path / 'imagenet' / 'train'))
    shutil.copytree(str(tmp_path / 'imagenet' / 'train'), str(tmp_path / 'imagenet' / 'val'))
    return str(tmp_path / 'imagenet')


def test_results_real_labels_and_flips(imagenet_like, tmp_path, capsys, parse, refused):  # noqa: F811
    output, real = str(tmp_path / 'out'), [[index % 3] if index % 4 else [] for index in range(12)]
    real[5] = [0, 1, 2]
    (tmp_path / 'real.json').write_text(json.dumps(real))
    assert run_class_finetuning.run(RUN + ['--data_path', imagenet_like, '--epochs=2', '--lr=1e-3', '--model_ema',
                                           '--output_dir', output]) == 0
    base = RUN + ['--data_path', imagenet_like, '--eval', '--resume', output, '--model_ema']
    capsys.readouterr()
    for suffix in ('.json', '.csv'):
        assert run_class_finetuning.run(base + ['--results_file', str(tmp_path / 'new' / ('r' + suffix)), '--test_flip',
                                                '--real_labels', str(tmp_path / 'real.json')]) == 0
    out = capsys.readouterr().out
    with open(str(tmp_path / 'new' / 'r.json')) as file:
        rows = json.load(file)
    with open(str(tmp_path / 'new' / 'r.csv'), newline='') as file:
        table = list(csv.DictReader(file))
    assert [row['weights'] for row in rows] == [row['weights'] for row in table] == ['model', 'model_ema']

    trained, args = inference_model.load_for_inference(output), parse('--data_path', imagenet_like, *RUN)
    _, loader = datasets.build_loaders(args, None, datasets.build_dataset(False, args))
    right = {name: [0, 0] for name in 'abc'}
    real_right, loss = [], 0.
    with torch.no_grad():
        for batch in loader:
            logits = (trained.model(batch.images) + trained.model(torch.flip(batch.images, [3]))) / 2
            for index, target, row in zip(batch.indices.tolist(), batch.targets.tolist(), logits):
                best = int(row.argmax())
                right['abc'[target]][0] += best == target
                right['abc'[target]][1] += 1
                loss += float(F.cross_entropy(row[None], torch.tensor([target])))
                number = int(loader.dataset.dataset.samples[index][0][-12:-4]) - 1
                if real[number]:
                    real_right.append(best in real[number])
    assert rows[0]['acc1'] == pytest.approx(100 * sum(each[0] for each in right.values()) / 12)
    assert rows[0]['loss'] == pytest.approx(loss / 12, rel=1e-5) == float(table[0]['loss'])
    assert {each['class']: each['acc1'] for each in rows[0]['classes']} == pytest.approx(
        {name: 100 * hits / images for name, (hits, images) in right.items()})
    assert rows[0]['real_acc1'] == pytest.approx(100 * np.mean(real_right)) and rows[0]['real_images'] == 9
    assert 'By real labels: top-1 %.3f%%' % rows[0]['real_acc1'] in out
    assert rows[0]['img_size'] == 32 and rows[0]['param_count'] == sum(p.numel() for p in trained.model.parameters())
    assert table[0]['model'] == 'beit_nano_patch8_32' and 'classes' not in table[0]

    refused(base + ['--results_file=r.txt'], '--results_file r.txt', '.csv or .json')
    refused(RUN + ['--data_path', imagenet_like, '--results_file=r.csv'], 'belongs to --eval')
    for content, words in (('{', 'JSON'), ('{}', 'list'), ('[[7]]', 'image 1'), ('[[0], 3]', 'image 2'),
                           ('[[0], [1]]', 'ILSVRC2012_val_00000001.JPEG to _00000002.JPEG')):
        path = tmp_path / 'real.json'
        path.write_text(content)
        refused(base + ['--real_labels', str(path)], '--real_labels %s' % path, words)


def timms_real_labels():
    """The labels that come with timm, or None."""
    try:
        return pkgutil.get_data('timm.data.real_labels', '_info/imagenet_real_labels.json')
    except (OSError, ImportError):
        return None


@pytest.mark.needs('current', timms_real_labels() is not None, 'this timm has no real labels')
def test_real_labels_are_timms():
    from timm.data.real_labels import RealLabelsImagenet
    data = timms_real_labels()
    labels = [frozenset(each) for each in json.loads(data.decode())]
    names = ['ILSVRC2012_val_%08d.JPEG' % number for number in range(1, 50001)]
    theirs, ours = RealLabelsImagenet(names), metrics.RealLabels(labels, [(name, 0) for name in names])
    torch.manual_seed(0)
    for first in range(0, 1000, 250):
        output = torch.randn(250, 1000)
        for row in range(0, 250, 2):
            output[row, sorted(labels[first + row])[:1]] = 9.
        theirs.add_result(output)
        ours.update((None, None, torch.arange(first, first + 250)), output)
    result = ours.compute(False, CPU)
    assert result['real_acc1'] == pytest.approx(theirs.get_accuracy(1))
    assert result['real_acc5'] == pytest.approx(theirs.get_accuracy(5))


@pytest.mark.slow
def test_mean_average_precision_is_the_same_on_two_processes(several, tmp_path):
    output = str(tmp_path / 'out')
    data = ['--train_csv', several[0], '--val_csv', several[1]]
    assert run_class_finetuning.run(RUN + data + ['--epochs=1', '--output_dir', output]) == 0
    base = data + ['--eval', '--dist_eval', '--resume', output, '--batch_size=2', '--results_file']
    assert run_class_finetuning.run(RUN + base + [output + '/1.json']) == 0
    status, _, err = launch(2, *(base + [output + '/2.json']))
    assert status == 0, err
    results = []
    for number in (1, 2):
        with open(output + '/%d.json' % number, encoding='utf-8') as file:
            results.append(json.load(file)[0])
    losses = [each.pop('loss') for each in results]
    assert losses[0] == pytest.approx(losses[1], rel=0, abs=1e-7)  # an image's float32 loss may differ in its last bit
    assert results[0] == results[1] and 'mAP' in results[0]


def test_counts_of_three_processes_are_added_up(monkeypatch):
    outputs, targets = torch.randn(31, 4), torch.randint(0, 4, (31,))
    samples = [('ILSVRC2012_val_%08d.JPEG' % (index + 1), 0) for index in range(31)]
    labels = [frozenset([index % 4, 3][:index % 3]) for index in range(31)]

    def make():
        return metrics.PerClass(list('abcd')), metrics.RealLabels(labels, samples)

    alone, parts = make(), [make() for _ in range(3)]
    for first, each in [(0, alone)] + list(enumerate(parts)):
        for score in each:
            places = torch.arange(31)[first::1 if each is alone else 3]
            score.update((None, targets[places], places), outputs[places])
    for kind, score in enumerate(alone):
        monkeypatch.setattr(metrics.collectives, 'all_gather_json', lambda value, device: [
            each[kind].counts.tolist() for each in parts])  # noqa: B023
        monkeypatch.setattr(metrics.collectives, 'all_gather_rows', lambda columns, device: [
            torch.cat([pairs for each in parts for pairs in each[kind].pairs])])  # noqa: B023
        assert parts[0][kind].compute(True, CPU) == score.compute(False, CPU)
