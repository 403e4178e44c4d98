"""Each figure, wherever it is written, printed or drawn, equals an independent computation."""

import contextlib
import copy
import csv
import html
import json
import math
import os
import re
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.metrics import accuracy_score, average_precision_score, log_loss, top_k_accuracy_score

import engine_for_finetuning as engine
import run_class_finetuning
import utils
from beit.checkpoint import inference_model
from beit.data.loader import Batch, Unreadable
from beit.devices import half_precision, kernels
from beit.training import confusion, loss_scaler, metrics
from helpers import CPU, ROOT, RUN, Batches, Listener, free_port, lines_of, photo, scalars, toy

pytestmark = pytest.mark.computes


# ---- means over the images that were read

def batches_of(sizes, size=4, classes=3):
    """(Batches of `size` images with `sizes` readable ones each, all readable images)."""
    generator = torch.Generator().manual_seed(5)
    read = sum(sizes)
    images = torch.randn(read, 3, 32, 32, generator=generator)
    targets = torch.randint(0, classes, (read,), generator=generator)
    batches, first = Batches(), 0
    for count in sizes:
        part = slice(first, first + count)
        batches.append(Batch(images[part], targets[part], torch.arange(first, first + count),
                             [Unreadable('bad-%d.png' % number, 'it is empty') for number in range(size - count)]))
        first += count
    return batches, images, targets


def gradients_by_hand(model, images, targets):
    """{name: gradient} of the mean loss over these images."""
    twin = copy.deepcopy(model).train()
    torch.nn.functional.cross_entropy(twin(images), targets).backward()
    return {name: parameter.grad for name, parameter in twin.named_parameters()}


def norm_of(gradients):
    return math.sqrt(sum(float((each.double() ** 2).sum()) for each in gradients.values()))


def train(model, batches, optimizer=None, scaler=None, **options):
    optimizer = optimizer or torch.optim.SGD(model.parameters(), lr=1.)
    return engine.train_one_epoch(model, torch.nn.CrossEntropyLoss(), batches, optimizer, CPU, 0, scaler,
                                  monitor=Listener('stop'), **options)


class Amp:
    """The part of apex.amp in a step, with a static scale of 4."""

    def __init__(self, model):
        self.parameters = list(model.parameters())

    @contextlib.contextmanager
    def scale_loss(self, loss, optimizer, delay_unscale):
        yield loss * 4
        for parameter in () if delay_unscale else self.parameters:
            parameter.grad /= 4

    def master_params(self, optimizer):
        return self.parameters

    def state_dict(self):
        return {'loss_scaler0': {'loss_scale': 4.}}


def test_half_of_the_files_bad_at_batch_one():
    """A zero head gives ten classes equal probabilities: ln 10 = 2.303 per image, not 1.151."""
    model, _ = toy(classes=10)
    torch.nn.init.zeros_(model.head.weight)
    batches, images, targets = batches_of((1, 0) * 4, size=1, classes=10)
    stats = train(model, batches, torch.optim.SGD(model.parameters(), lr=0.))
    assert stats['loss'] == pytest.approx(math.log(10))
    assert stats['grad_norm'] == pytest.approx(np.mean([
        norm_of(gradients_by_hand(model, images[row:row + 1], targets[row:row + 1])) for row in range(4)]), rel=1e-5)
    assert stats['skipped_steps'] == 4


@pytest.mark.parametrize('sizes, size', [((1, 0) * 4, 1), ((4, 1), 4), ((3, 0, 4, 2), 4), ((0, 0, 0, 1), 4)])
@pytest.mark.parametrize('scale', (1., 128., 'dynamic', 'fused', 'apex'))
def test_an_accumulated_update_uses_the_mean_over_the_images(sizes, size, scale):
    model, _ = toy()
    batches, images, targets = batches_of(sizes, size)
    expected, before = gradients_by_hand(model, images, targets), copy.deepcopy(model.state_dict())
    optimizer, scaler = torch.optim.SGD(model.parameters(), lr=1.), None
    if scale == 'dynamic':
        scaler = loss_scaler.LossScaler(2. ** 10, dynamic=True)
    elif scale == 'fused':
        optimizer = kernels.build_optimizer(torch.optim.SGD, list(model.parameters()), lr=1.)
        scaler = loss_scaler.LossScaler(128.)
    elif scale == 'apex':
        scaler = loss_scaler.AmpLibraryScaler(Amp(model), [], scale=4.)
    else:
        scaler = loss_scaler.LossScaler(scale)
    stats = train(model, batches, optimizer, scaler, update_freq=len(sizes))
    assert stats['grad_norm'] == pytest.approx(norm_of(expected), rel=1e-4)
    output = toy()[0].train()(images).detach()
    assert stats['loss'] == pytest.approx(float(torch.nn.functional.cross_entropy(output, targets)), rel=1e-5)
    assert stats['class_acc'] == pytest.approx(float((output.argmax(1) == targets).float().mean()))
    for name, gradient in expected.items():
        assert torch.allclose(before[name] - model.state_dict()[name], gradient, 1e-3, 1e-6), name


@pytest.mark.needs('current', half_precision._half_precision_problem(CPU, torch.bfloat16) is None,
                   'this PyTorch has no bfloat16 training on a CPU')
def test_half_precision_uses_the_same_mean():
    model, _ = toy()
    batches, images, targets = batches_of((3, 0, 4, 2))
    expected = norm_of(gradients_by_hand(model, images, targets))
    optimizer = torch.optim.SGD(model.parameters(), lr=1.)
    model, scaler = loss_scaler.initialize_amp(model, optimizer, CPU, torch.bfloat16, 'O2', 64.)
    before = {name: value.clone() for name, value in scaler.fp32_state_dict(model).items()}
    assert train(model, batches, optimizer, scaler, update_freq=4)['grad_norm'] == pytest.approx(expected, rel=0.03)
    after = scaler.fp32_state_dict(model)
    moved = {name: before[name] - after[name] for name in before if before[name].is_floating_point()}
    assert norm_of(moved) == pytest.approx(expected, rel=0.03)


def test_clipping_uses_the_mean_over_the_images():
    model, _ = toy()
    batches, images, targets = batches_of((3, 1))
    expected, before = gradients_by_hand(model, images, targets), copy.deepcopy(model.state_dict())
    norm = norm_of(expected)
    train(model, batches, update_freq=2, max_norm=norm / 2)
    for name, gradient in expected.items():
        assert torch.allclose(before[name] - model.state_dict()[name], gradient / 2, 1e-3, 1e-6), name


def test_an_update_without_an_image_is_skipped(capsys):
    """Weights, moments and average don't change; the update is counted and reported, and is no overflow."""
    model, _ = toy()
    finals = []
    for sizes in ((4, 4, 2, 2), (4, 4, 0, 0, 2, 2) + (0,) * 46):
        twin = copy.deepcopy(model)
        optimizer, average = torch.optim.AdamW(twin.parameters(), lr=1e-3, weight_decay=0.1), utils.ModelEma(twin, 0.5)
        stats = train(twin, batches_of(sizes)[0], optimizer, update_freq=2, model_ema=average)
        finals.append((stats, twin.state_dict(), average.ema.state_dict(), optimizer.state_dict()['state']))
    (without, *one), (stats, *other) = finals
    assert (without['skipped_steps'], stats['skipped_steps']) == (0, 24)
    assert stats['loss'] == without['loss'] and stats['grad_norm'] == without['grad_norm']
    assert 'Update step 1 skipped: none of its images could be read' in capsys.readouterr().out
    for mine, theirs in zip(one[:2], other[:2]):
        assert all(torch.equal(mine[name], theirs[name]) for name in mine)
    for mine, theirs in zip(one[2].values(), other[2].values()):
        assert all(torch.equal(torch.as_tensor(mine[name]), torch.as_tensor(theirs[name])) for name in mine)


# Trains two updates on each process's share of the same 24 files, many of them unreadable, and prints the weights.
TRAIN_WITH_GAPS = '''
import argparse, json, sys
sys.path[:0] = [%r, %r]
import torch
import test_figures
from beit.devices import accelerator
from beit.distributed import process_group
torch.set_num_threads(1)
args = argparse.Namespace(device='cpu', dist_on_itp=False, local_rank=-1, dist_url='env://', dist_timeout=60.)
device = process_group.init_distributed_mode(args)
model, batches = test_figures.share_of(process_group.rank(), process_group.world_size())
wrapped = accelerator.wrap_ddp(model, device) if process_group.world_size() > 1 else model
stats = test_figures.train(wrapped, batches, torch.optim.SGD(model.parameters(), lr=0.1), update_freq=2)
if process_group.is_main_process():
    print('RESULTS ' + json.dumps([stats['loss'], stats['grad_norm'], stats['class_acc'], stats['skipped_steps'], [
        value.double().sum().item() for value in model.parameters()]]))
process_group.shutdown()
'''
BAD = {1, 2, 3, 6, 7, 9, 11, 12, 14, 15, 20, 22, 23}  # of 24 files


def share_of(rank, processes):
    """(model, this process's batches of every processes-th file): three updates of eight files."""
    model, _ = toy()
    generator = torch.Generator().manual_seed(5)
    images, targets = torch.randn(24, 3, 32, 32, generator=generator), torch.randint(0, 3, (24,), generator=generator)
    batches, size = Batches(), 4 // processes
    mine = list(range(rank, 24, processes))
    for first in range(0, len(mine), size):
        read = [index for index in mine[first:first + size] if index not in BAD]
        batches.append(Batch(images[read], targets[read], torch.tensor(read, dtype=torch.int64),
                             [Unreadable('%d.png' % index, 'empty') for index in mine[first:first + size]
                              if index in BAD]))
    return model, batches


def test_two_and_four_processes_train_as_one():
    found = {}
    for processes in (1, 2, 4):
        port = free_port()
        started = [subprocess.Popen(
            [sys.executable, '-c', TRAIN_WITH_GAPS % (ROOT, os.path.join(ROOT, 'tests'))], stdout=subprocess.PIPE,
            universal_newlines=True,
            env=dict(os.environ, RANK=str(rank), WORLD_SIZE=str(processes), LOCAL_RANK=str(rank), OMP_NUM_THREADS='1',
                     MASTER_ADDR='127.0.0.1', MASTER_PORT=str(port))) for rank in range(processes)]
        outputs = [process.communicate(timeout=240)[0] for process in started]
        assert not any(process.returncode for process in started)
        found[processes] = json.loads(re.search('RESULTS (.*)', outputs[0]).group(1))
    for processes in (2, 4):
        for mine, theirs in zip(found[processes], found[1]):
            assert mine == pytest.approx(theirs, rel=1e-5, abs=1e-5)


# ---- ties

def test_ties_go_to_the_first_class_everywhere():
    """A zero head gives equal logits: top-1 is the share of class 0, top-5 the share of classes 0 to 4."""
    targets = torch.arange(40) % 8
    output = torch.zeros(40, 8)
    batch = Batch(None, targets, torch.arange(40), [])
    samples = [('ILSVRC2012_val_%08d.JPEG' % (index + 1), 0) for index in range(40)]
    kinds = [metrics.TopAccuracy(), metrics.PerClass(list('abcdefgh')), confusion.ConfusionMatrix(8),
             metrics.RealLabels([frozenset([int(target)]) for target in targets], samples)]
    stats = {}
    for metric in kinds:
        metric.update(batch, output)
        stats.update(metric.compute(False, CPU))
    assert (stats['acc1'], stats['acc5']) == (stats['real_acc1'], stats['real_acc5']) == (12.5, 62.5)
    assert [each['acc1'] for each in stats['classes']] == [100.] + [0.] * 7
    assert np.mean([each['acc1'] for each in stats['classes']]) == stats['acc1']
    assert kinds[2].matrix().sum(axis=0).tolist() == [40] + [0] * 7


def test_the_order_of_classes_by_a_stable_sort():
    generator = np.random.default_rng(0)
    output = generator.integers(0, 4, (200, 9)).astype(np.float32)
    output[0, 3:] = -np.inf
    output[1] = np.inf
    found = metrics.top_classes(torch.from_numpy(output), 5)
    assert found.tolist() == np.argsort(-output, axis=1, kind='stable')[:, :5].tolist()
    assert metrics.top_classes(torch.zeros(2, 3), 5).tolist() == [[0, 1, 2]] * 2


# ---- the training loss and its probabilities

def test_the_validation_loss_of_a_binary_criterion_is_binary():
    output, targets = torch.randn(20, 5), torch.randint(0, 5, (20,))
    shares = 1 / (1 + np.exp(-output.numpy().astype(float)))
    ones = np.eye(5)[targets.numpy()]
    expected = -(ones * np.log(shares) + (1 - ones) * np.log(1 - shares)).mean()
    loss = metrics.Loss(activation='sigmoid')
    loss.update(Batch(None, targets, torch.arange(20), []), output)
    assert loss.compute(False, CPU)['loss'] == pytest.approx(expected, rel=1e-6)
    matrix = confusion.ConfusionMatrix(5, activation='sigmoid')
    matrix.update(Batch(None, targets, torch.arange(20), []), output)
    matrix.compute(False, CPU)
    images = matrix.hardest + matrix.most_confident
    assert len(images) == 20
    for image in images:
        assert image.probability == pytest.approx(shares[image.index].max(), rel=1e-5)
        assert image.target_probability == pytest.approx(shares[image.index][image.target], rel=1e-5)


def test_a_multi_label_model_turns_class_indices_into_multi_label_targets():
    """A list without a ';': its targets are class indices."""
    torch.manual_seed(0)
    output, targets = torch.randn(30, 4), torch.randint(0, 4, (30,))

    class Data:
        classes = list('abcd')

    found = metrics.build_metrics(metrics.Evaluation(Data(), multi_label=True, activation='sigmoid'))
    assert [type(each) for each in found] == [metrics.MeanAveragePrecision, metrics.Loss, metrics.Calibration]
    stats = {}
    for metric in found:
        metric.update(Batch(None, targets, torch.arange(30), []), output)
        stats.update(metric.compute(False, CPU))
    ones = np.eye(4)[targets.numpy()]
    assert stats['mAP'] == pytest.approx(100 * np.mean([
        average_precision_score(ones[:, label], output[:, label]) for label in range(4)]))
    assert stats['loss'] == pytest.approx(float(torch.nn.functional.binary_cross_entropy_with_logits(
        output, torch.from_numpy(ones).float())), rel=1e-6)


# ---- the same figure everywhere

@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp('figures')
    for split, count in (('train', 8), ('val', 7)):
        for label, name in enumerate('abcdef'):
            (root / split / name).mkdir(parents=True)
            for index in range(count):
                photo(100 * label + index + (50 if split == 'val' else 0), 32, 32).save(
                    str(root / split / name / ('%d.png' % index)))
    return str(root)


def logits_by_hand(output, data):
    """(float64 logits, class indices) of the validation images: the best weights, Pillow and the model alone."""
    trained = inference_model.load_for_inference(os.path.join(output, 'checkpoint-best.pth'))
    paths = [os.path.join(data, 'val', name, '%d.png' % index) for name in trained.classes for index in range(7)]
    images = torch.from_numpy(np.stack([np.asarray(Image.open(path).convert('RGB'), dtype=np.float32).transpose(2, 0, 1)
                                        for path in paths]) / 255)
    with torch.no_grad():
        logits = trained.model((images - 0.5) / 0.5).double().numpy()
    return logits, np.repeat(np.arange(len(trained.classes)), 7)


def expected_figures(logits, targets, loss):
    labels = range(logits.shape[1])
    shares = 1 / (1 + np.exp(-logits)) if loss == 'bce' else \
        np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    ones = np.eye(len(labels))[targets]
    return {'acc1': 100 * accuracy_score(targets, logits.argmax(axis=1)),
            'acc5': 100 * top_k_accuracy_score(targets, logits, k=5, labels=labels),
            'loss': np.mean([log_loss(ones[:, label], shares[:, label], labels=[0, 1]) for label in labels])
            if loss == 'bce' else log_loss(targets, shares, labels=labels)}, shares


def tiles_of(page):
    return {html.unescape(name): text for name, text in re.findall(r'<dt>(.*?)</dt><dd>(.*?)</dd>', page)}


@pytest.mark.parametrize('loss', ('ce', 'bce'))
def test_every_figure_is_the_same_everywhere(folder, tmp_path, capsys, loss):
    """log.txt, printed lines, TensorBoard, --results_file, summary.json and both reports of the same weights agree."""
    output, board, results = str(tmp_path / 'out'), str(tmp_path / 'tb'), str(tmp_path / 'results')
    base = RUN + ['--data_path', folder, '--output_dir', output, '--loss', loss, '--report', '--log_dir', board]
    assert run_class_finetuning.run(base + ['--epochs=3', '--lr=2e-3']) == 0
    trained, log = capsys.readouterr().out, lines_of(output)
    best = max(range(3), key=lambda epoch: log[epoch]['test_acc1'])
    expected, shares = expected_figures(*logits_by_hand(output, folder), loss)

    def check(found, names=None, tolerance=1e-5):
        for name, value in expected.items():
            assert found[(names or {}).get(name, name)] == pytest.approx(value, rel=tolerance, abs=tolerance), name

    check(log[best], {name: 'test_' + name for name in expected})
    curves = scalars(board)
    check({name: curves['perf/test_' + name][best] for name in expected})
    number = re.findall(r'^\* Acc@1 (\S+) Acc@5 (\S+) loss (\S+)$', trained, re.M)[best]
    check(dict(zip(('acc1', 'acc5', 'loss'), map(float, number))), tolerance=5.1e-4)
    with open(os.path.join(output, 'summary.json'), encoding='utf-8') as file:
        assert json.load(file)['accuracy'] == log[best]['test_acc1']
    for suffix in ('.csv', '.json'):
        assert run_class_finetuning.run(base + ['--eval', '--resume', output, '--results_file', results + suffix]) == 0
    evaluated = capsys.readouterr().out
    with open(results + '.json', encoding='utf-8') as file:
        row = json.load(file)[0]
    check(row)
    assert row['acc1'] == pytest.approx(np.average([each['acc1'] for each in row['classes']],
                                                   weights=[each['images'] for each in row['classes']]))
    with open(results + '.csv', newline='') as file:
        check({name: float(value) for name, value in list(csv.DictReader(file))[0].items() if name in expected})
    with open(os.path.join(output, 'eval-summary.json'), encoding='utf-8') as file:
        check(json.load(file), {'acc1': 'accuracy', 'acc5': 'top5'})
    assert 'Accuracy of the network on the 42 test images: %.3f%%' % expected['acc1'] in evaluated
    assert ' accuracy %.3f loss %.4f' % (expected['acc1'], expected['loss']) in evaluated
    for name, suffix in (('report.html', ', best epoch'), ('eval-report.html', '')):
        with open(os.path.join(output, name), encoding='utf-8') as file:
            page = file.read()
        tiles = tiles_of(page)
        assert (tiles['Accuracy' + suffix], tiles['Top-5' + suffix], tiles['Loss' + suffix]) == (
            '%.2f %%' % expected['acc1'], '%.2f %%' % expected['acc5'], '%.4f' % expected['loss'])
        shown = [float(each) for each in re.findall(r'<span class="(?:right|wrong)">\w</span> \((\S+)\s%\)', page)]
        assert shown and set(shown) <= {round(100 * share, 1) for share in shares.max(axis=1)} | {
            round(100 * share, 3) for share in shares.max(axis=1)}


def test_a_multi_label_model_is_evaluated_on_a_single_label_list(folder, tmp_path, capsys):
    """No row of the validation list has a ';': mAP is still computed over the checkpoint's classes."""
    rows = {'train': [['a', 'b', 'a;b', 'c;a', '', 'c'][index % 6] for index in range(24)],
            'val': ['abc'[index % 3] for index in range(12)]}
    for name, labels in rows.items():
        (tmp_path / (name + '.csv')).write_text(''.join('%s/%s/%s/%d.png,%s\n' % (
            folder, name, 'abcdef'[index % 6], index // 6, label) for index, label in enumerate(labels)))
    output = str(tmp_path / 'out')
    assert run_class_finetuning.run(RUN + ['--train_csv=%s' % (tmp_path / 'train.csv'), '--output_dir', output,
                                           '--val_csv=%s' % (tmp_path / 'val.csv'), '--epochs=1']) == 0
    capsys.readouterr()
    assert run_class_finetuning.run(RUN + ['--val_csv=%s' % (tmp_path / 'val.csv'), '--eval', '--resume', output,
                                           '--results_file=%s' % (tmp_path / 'r.json')]) == 0
    trained = inference_model.load_for_inference(output)
    assert trained.classes == ['a', 'b', 'c'] and trained.activation == 'sigmoid'
    images = torch.from_numpy(np.stack([np.asarray(Image.open(
        '%s/val/%s/%d.png' % (folder, 'abcdef'[index % 6], index // 6)).convert('RGB'), dtype=np.float32).transpose(
            2, 0, 1) for index in range(12)]) / 255)
    with torch.no_grad():
        logits = trained.model((images - 0.5) / 0.5).numpy()
    ones = np.eye(3)[np.arange(12) % 3]
    expected = 100 * np.mean([average_precision_score(ones[:, label], logits[:, label]) for label in range(3)])
    assert 'mAP of the network on the 12 test images: %.3f%%' % expected in capsys.readouterr().out
    with open(str(tmp_path / 'r.json'), encoding='utf-8') as file:
        row = json.load(file)[0]
    assert row['mAP'] == pytest.approx(expected) and 'acc1' not in row
    assert row['loss'] == pytest.approx(float(torch.nn.functional.binary_cross_entropy_with_logits(
        torch.from_numpy(logits), torch.from_numpy(ones).float())), rel=1e-5)


# ---- a resumed run

def test_the_speed_of_a_run_and_of_an_epoch():
    first = utils.Throughput(warmup_steps=0)
    for _ in range(4):
        first.update(64, 1., 0.25)
    second = utils.Throughput(warmup_steps=0, earlier=first.totals())
    for seconds in (3., 3., 2., 2.):
        second.update(64, seconds)
    assert second.images_per_second == pytest.approx(8 * 64 / 14)
    assert second.step_milliseconds == pytest.approx(14000 / 8)
    assert second.data_share == pytest.approx(1 / 14)
    assert second.since(2).images_per_second == pytest.approx(32)
    assert utils.Throughput(warmup_steps=2).since(1).warmup_steps == 1


def test_a_resumed_run_reports_figures_of_the_whole_run(folder, tmp_path, monkeypatch):
    """The first two of three epochs are slow. An epoch's line gives its own speed, the summary the run's."""
    output, lines, build = str(tmp_path / 'out'), [], run_class_finetuning.build_criterion
    base = RUN + ['--data_path', folder, '--output_dir', output, '--epochs=3', '--report', '--save_ckpt_freq=1']
    monkeypatch.setattr(run_class_finetuning.log, 'log_epoch', lambda *args: lines.append(args[-2:]))

    def slow(*how):
        criterion = build(*how)
        return lambda *args: time.sleep(0.3) or criterion(*args)

    def summary():
        with open(os.path.join(output, 'summary.json'), encoding='utf-8') as file:
            return json.load(file)

    monkeypatch.setattr(run_class_finetuning, 'build_criterion', slow)
    assert run_class_finetuning.run(base + ['--maxstep=12']) == 0  # six updates per epoch, 0.3 s each
    first = summary()
    monkeypatch.setattr(run_class_finetuning, 'build_criterion', build)
    assert run_class_finetuning.run(base + ['--auto_resume']) == 0
    whole = summary()
    assert whole['duration_seconds'] > 3.6 and whole['duration_seconds'] > first['duration_seconds'] - 1
    assert whole['step_milliseconds'] > 150  # the last epoch alone has a few milliseconds
    assert whole['images_per_second'] == pytest.approx(8000 / whole['step_milliseconds'])
    (second_speed, _), (third_speed, third_seconds) = lines[1:]
    assert second_speed < 8 / 0.3 and whole['images_per_second'] < third_speed  # two thirds of the run were slow
    assert third_seconds < whole['duration_seconds']
    with open(os.path.join(output, 'report.html'), encoding='utf-8') as file:
        tiles = tiles_of(file.read())
    best = max(lines_of(output), key=lambda stats: stats['test_acc1'])
    assert tiles['Accuracy, best epoch'] == '%.2f %%' % best['test_acc1']
    assert tiles['Loss, best epoch'] == '%.4f' % best['test_loss'] and tiles['Epochs'] == '3'
    assert tiles['Images/s'] == '%.1f' % whole['images_per_second']
