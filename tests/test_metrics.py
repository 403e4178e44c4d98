"""Figures of an evaluation against scikit-learn and slow loops, their selection of the best checkpoint, calibration."""

import csv
import json
import math
import os
import pathlib
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import optimize
from sklearn import metrics as sklearn_metrics
from sklearn.calibration import calibration_curve

import average_checkpoints
import engine_for_finetuning as engine
import run_class_finetuning
import run_export
import run_predict
from beit import classifier, model_spec
from beit.checkpoint import inference_model, pretrained
from beit.data.loader import Batch
from beit.errors import UserError
from beit.files import run_folder, weights_file
from beit.outputs import model_card, report, report_html, run_log
from beit.training import metrics, temperature
from helpers import CPU, ROOT, RUN, free_port, holder, lines_of

pytestmark = pytest.mark.fast


def outputs(images=300, classes=7, seed=0):
    """Logits that are right for about half of the images; the last class has no image, and one before is not found."""
    generator = torch.Generator().manual_seed(seed)
    targets = torch.randint(0, classes - 1, (images,), generator=generator)
    output = torch.randn(images, classes, generator=generator)
    output[torch.arange(images), targets] += 2. * (torch.rand(images, generator=generator) > 0.4).float()
    output[:, classes - 3] -= 9.
    return targets, output


def figures_of(targets, output, *kinds, part=50):
    stats = {}
    for metric in kinds:
        for start in range(0, len(output), part):
            metric.update(Batch(None, targets[start:start + part], torch.arange(start, min(start + part, len(output))),
                                []), output[start:start + part])
        stats.update(metric.compute(False, CPU))
    return stats


def test_class_figures_are_scikit_learns():
    targets, output = outputs()
    stats = figures_of(targets, output, metrics.PerClass(list('abcdefg')))
    predicted = output.argmax(1)
    for kind in ('macro', 'weighted'):
        expected = sklearn_metrics.precision_recall_fscore_support(targets, predicted, average=kind, zero_division=0)
        assert [stats['%s_%s' % (kind, name)] for name in ('precision', 'recall', 'f1')] == pytest.approx(
            [100 * value for value in expected[:3]])
    with pytest.warns(UserWarning, match='y_pred contains classes not in y_true'):
        balanced = sklearn_metrics.balanced_accuracy_score(targets, predicted)
    assert stats['balanced_acc'] == pytest.approx(100 * balanced)
    table = sklearn_metrics.classification_report(targets, predicted, labels=range(7), target_names=list('abcdefg'),
                                                  output_dict=True, zero_division=0)
    assert [each['class'] for each in stats['classes']] == list('abcdefg')
    for each in stats['classes']:
        theirs = table[each['class']]
        assert each['images'] == theirs['support']
        assert each['precision'] == pytest.approx(100 * theirs['precision'])
        assert each['f1'] == pytest.approx(100 * theirs['f1-score'])
        assert each['recall'] == each['acc1'] == (pytest.approx(100 * theirs['recall']) if each['images'] else None)
    assert stats['classes'][6]['images'] == 0 and stats['classes'][4]['precision'] == 0


def test_scores_of_several_classes_per_image_are_scikit_learns():
    generator = torch.Generator().manual_seed(1)
    targets = (torch.rand(120, 5, generator=generator) > 0.7).float()
    output = torch.randn(120, 5, generator=generator) + targets
    stats = figures_of(targets, output, metrics.MeanAveragePrecision(list('abcde')),
                       metrics.Calibration('sigmoid', multi_label=True))
    for kind in ('macro', 'weighted'):
        expected = sklearn_metrics.precision_recall_fscore_support(targets, output > 0, average=kind, zero_division=0)
        assert [stats['%s_%s' % (kind, name)] for name in ('precision', 'recall', 'f1')] == pytest.approx(
            [100 * value for value in expected[:3]])
    per_class = sklearn_metrics.f1_score(targets, output > 0, average=None)
    assert [each['f1'] for each in stats['classes']] == pytest.approx((100 * per_class).tolist())
    accuracy, share = calibration_curve(targets.flatten(), torch.sigmoid(output).flatten().double(), n_bins=15)
    assert [each['accuracy'] for each in stats['reliability']] == pytest.approx(accuracy.tolist())
    assert [each['probability'] for each in stats['reliability']] == pytest.approx(share.tolist(), abs=1e-6)


@pytest.mark.parametrize('topk', ((1, 5), (2, 20), (3,)))
def test_top_k_is_scikit_learns(topk):
    targets, output = outputs(classes=30)
    stats = figures_of(targets, output, metrics.TopAccuracy(topk))
    assert set(stats) == {'acc%d' % k for k in {1, *topk}}
    for k in {1, *topk}:
        assert stats['acc%d' % k] == pytest.approx(100 * sklearn_metrics.top_k_accuracy_score(
            targets, output, k=k, labels=range(30)))


def test_the_calibration_error_by_a_slow_loop_and_scikit_learns_bins():
    targets, output = outputs()
    shares = torch.softmax(output, 1).double()
    right = (shares.argmax(1) == targets).tolist()
    bins = [[] for _ in range(15)]
    for share, is_right in zip(shares.max(1).values.tolist(), right):
        bins[next(number for number in range(15) if share <= (number + 1) / 15)].append((share, is_right))
    expected = sum(abs(sum(share - is_right for share, is_right in each)) for each in bins) / len(targets)
    stats = figures_of(targets, output, metrics.Calibration())
    assert stats['ece'] == pytest.approx(100 * expected, abs=1e-5)
    accuracy, share = calibration_curve(right, shares.max(1).values, n_bins=15)
    assert [each['accuracy'] for each in stats['reliability']] == pytest.approx(accuracy.tolist())
    assert [each['probability'] for each in stats['reliability']] == pytest.approx(share.tolist(), abs=1e-6)
    assert [each['images'] for each in stats['reliability']] == [len(each) for each in bins if each]


def test_the_reliability_diagram_has_a_bar_for_each_bin():
    bins = [dict(probability=0.5, accuracy=0.25, images=8), dict(probability=0.9, accuracy=1., images=2)]
    page = report_html._reliability({'figures': {'reliability': bins}})
    assert re.findall(r'<rect x="(\S+)" y="(\S+)" width="5" height="(\S+)"', page) == [
        ('47.50', '75.00', '25.00'), ('87.50', '0.00', '100.00')]
    assert 'probability 50.0 %, accuracy 25.0 %, images 8' in page
    assert report_html._reliability({'figures': {}}) == ''


def write_tinted(root, classes, count, seed):
    """Class folders of noise, in which the channel of the class is often a bit brighter."""
    rng = np.random.RandomState(seed)
    for name in classes:
        (root / name).mkdir(parents=True)
        for index in range(count):
            pixels = rng.randint(0, 200, (32, 32, 3)).astype(float) + 20 * rng.randn(3)
            pixels[..., ('ant', 'bee', 'cow', 'yak').index(name) % 3] += 30
            Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8)).save(str(root / name / ('%02d.png' % index)))


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    """(data, output, log.txt): three classes, and epochs whose accuracy and loss disagree about the best."""
    root = tmp_path_factory.mktemp('metrics')
    data, output = str(root / 'data'), str(root / 'out')
    for seed, (split, count) in enumerate((('train', 32), ('val', 20))):
        write_tinted(root / 'data' / split, ('ant', 'bee', 'cow'), count, seed)
    assert run_class_finetuning.run(RUN + ['--data_path', data, '--output_dir', output, '--epochs=4', '--lr=2e-3',
                                           '--save_ckpt_freq=1', '--best_by=loss', '--report', '--topk', '1', '2',
                                           '--model_ema', '--model_ema_decay=0.5']) == 0
    return data, output, lines_of(output)


def summary_of(output, name='summary.json'):
    with open(os.path.join(output, name), encoding='utf-8') as file:
        return json.load(file)


def test_every_figure_is_in_every_output(trained, tmp_path, capsys):
    """log.txt, --results_file as CSV and JSON, summary.json, the report and the printed lines."""
    data, output, log = trained
    best = min(log, key=lambda line: line['test_loss'])
    names = ['macro_precision', 'macro_recall', 'macro_f1', 'weighted_precision', 'weighted_recall', 'weighted_f1',
             'balanced_acc', 'ece', 'acc2']
    assert not any(isinstance(value, (list, dict)) for value in best.values()) and 'test_acc5' not in best
    rows = {}
    for ending in ('csv', 'json'):
        path = str(tmp_path / ('results.' + ending))
        capsys.readouterr()
        assert run_class_finetuning.run(RUN + ['--data_path', data, '--eval', '--resume', output, '--report', '--topk',
                                               '1', '2', '--output_dir', output, '--results_file', path]) == 0
        with open(path, newline='', encoding='utf-8') as file:
            rows[ending] = (json.load(file) if ending == 'json' else list(csv.DictReader(file)))[0]
    out, evaluated, summary = capsys.readouterr().out, summary_of(output, 'eval-summary.json'), summary_of(output)
    for name in names:
        for found in (float(rows['csv'][name]), rows['json'][name], evaluated[name.replace('acc2', 'top2')],
                      summary[name.replace('acc2', 'top2')]):
            assert found == pytest.approx(best['test_' + name]), name
    assert [each['class'] for each in rows['json']['classes']] == ['ant', 'bee', 'cow']
    assert sum(each['images'] for each in rows['json']['reliability']) == 60
    assert 'classes' not in rows['csv'] and 'reliability' not in rows['csv']
    line = 'Precision, recall, F1: macro %(macro_precision).3f%%, %(macro_recall).3f%%, %(macro_f1).3f%%; weighted ' \
        '%(weighted_precision).3f%%, %(weighted_recall).3f%%, %(weighted_f1).3f%%; balanced accuracy ' \
        '%(balanced_acc).3f%%' % rows['json']
    assert line in out and 'Expected calibration error %.3f%%' % best['test_ece'] in out
    assert re.search(r'^\* Acc@1 \S+ Acc@2 %.3f loss' % best['test_acc2'], out, re.M)
    for name in ('report.html', 'eval-report.html'):
        with open(os.path.join(output, name), encoding='utf-8') as file:
            page = file.read()
        for title, value in (('Macro F1', 'macro_f1'), ('Calibration error', 'ece'), ('Top-2', 'acc2')):
            assert re.search('<dt>%s(, best epoch)?</dt><dd>%.2f %%</dd>' % (title, best['test_' + value]), page), title
        cells = ''.join('<td class="number">%s</td>' % each for each in (
            '', *('%.2f' % rows['json']['macro_' + score] for score in ('precision', 'recall', 'f1'))))
        assert '<tr><td>macro average</td>%s</tr>' % cells in page and page.count('width="5"') == len(
            rows['json']['reliability'])
        assert 'Top-5' not in page


def test_the_best_checkpoint_follows_best_by(trained, tmp_path, capsys):
    """The loss: the checkpoint, summary.json, the average and a resumed run, which names another --best_by."""
    data, output, log = trained
    losses = [line['test_loss'] for line in log]
    best = int(np.argmin(losses))
    content = weights_file.load_weights_file(os.path.join(output, 'checkpoint-best.pth'))
    assert content['epoch'] == best
    assert content['accuracy']['loss'] == losses[best]
    assert content['accuracy']['accuracy'] == summary_of(output)['accuracy'] == log[best]['test_acc1']
    assert summary_of(output)['validation_loss'] == losses[best] and summary_of(output)['best_by'] == 'loss'
    averaged = weights_file.load_weights_file(os.path.join(output, 'checkpoint-best-ema.pth'))
    assert averaged['epoch'] == int(np.argmin([line['test_ema_loss'] for line in log]))
    path = str(tmp_path / 'average.pth')
    assert average_checkpoints.run(['--inputs', output, '--best=2', '--output', path]) == 0
    assert weights_file.load_weights_file(path)['averaged'] == [
        'checkpoint-%d.pth' % epoch for epoch in np.argsort(losses, kind='stable')[:2]]
    base = RUN + ['--data_path', data, '--epochs=5', '--lr=2e-3', '--resume', output, '--topk', '1', '2']
    for flags, says in (['--best_by=loss'], 'best '), ([], 'by --best_by loss, and this run has --best_by acc1'):
        capsys.readouterr()
        assert run_class_finetuning.run(base + ['--model_ema', '--output_dir', str(tmp_path / says[:4])] + flags) == 0
        out = capsys.readouterr().out
        assert says in out and ('The best figure starts again' in out) == (not flags)
        assert (('Min loss: %.3f' % min(losses + [lines_of(str(tmp_path / says[:4]))[0]['test_loss']])) in out) == bool(
            flags)


@pytest.mark.parametrize('best_by', ('macro_f1', 'balanced_acc'))
def test_other_figures_select_too(best_by):
    lines = [{'epoch': epoch, 'test_acc1': 50. - epoch, 'test_' + best_by: value, 'test_best_by': best_by}
             for epoch, value in enumerate((10., 30., 20.))]
    assert metrics.logged_primary(lines[1], 'test_')[0].name == best_by
    assert report.best_epoch(lines)['epoch'] == 1
    best = {}
    found = [run_log.update_best(best, {'acc1': line['test_acc1'], best_by: line['test_' + best_by],
                                        'best_by': best_by}, None) for line in lines]
    assert [bool(each) for each in found] == [True, True, False] and best == {'accuracy': 49., best_by: 30.}


def test_a_figure_that_the_images_do_not_have_is_refused(trained, refused):
    refused(RUN + ['--data_path', trained[0], '--best_by=mAP'], '--best_by mAP', 'one class each', 'macro_f1')
    refused(RUN + ['--data_path', trained[0], '--best_by=f1'], '--best_by', 'balanced_acc')
    with pytest.raises(UserError, match='--best_by acc1: the images have several classes each; give macro_f1'):
        metrics.check_best_by('acc1', True)


def test_a_figure_that_may_stay_zero_is_named_at_the_start(capsys):
    for best_by, multi_label in (('macro_f1', False), ('mAP', True), (None, True)):
        metrics.check_best_by(best_by, multi_label)
    assert capsys.readouterr().out == ''
    metrics.check_best_by('macro_f1', True)
    line, = capsys.readouterr().out.splitlines()
    assert '--best_by macro_f1 stays 0 until a class has a probability above 0.5' in line and 'mAP' in line


@pytest.mark.parametrize('classes, shows', [(2, False), (5, False), (6, True)])
def test_top_5_of_five_classes_is_not_shown(classes, shows, capsys):
    """It is always 100 %."""
    generator = torch.Generator().manual_seed(1)
    kinds, stats = [metrics.TopAccuracy(), metrics.Loss(), metrics.PerClass(list('abcdef'[:classes]))], {}
    for metric in kinds:
        metric.update((None, torch.tensor([0, 1]), torch.arange(2)), torch.randn(2, classes, generator=generator))
        stats.update(metric.compute(False, CPU))
    line = run_log.score_lines('network', stats, 0)[0]
    assert ('Acc@5' in line) == shows and 'Acc@1' in line
    run_log.print_sets([dict(stats, data='a', weights='model')])
    assert ('acc5' in capsys.readouterr().out) == shows
    larger = dict(stats, classes=list('abcdefg'), acc5=87.5)  # beside a larger set
    run_log.print_sets([dict(each, data='a', weights='model') for each in (stats, larger)])
    head, row, _ = (line.split() for line in capsys.readouterr().out.splitlines())
    assert row[head.index('acc5')] == ('%.3f' % stats['acc5'] if shows else '-') and row[head.index('acc1')] != '-'
    assert 'acc5' in metrics.logged(stats)  # in log.txt, for programs


SHARDED = '''
import json, os, sys
sys.path[:0] = %r
import torch
from beit.config import DistributedConfig
from beit.data.loader import Batch
from beit.distributed import process_group
from beit.training import metrics, temperature
from test_metrics import outputs
device = process_group.init_distributed_mode(DistributedConfig(device='cpu'))
rank, world = process_group.rank(), process_group.world_size()
targets, output = outputs()
found = {}
for metric in (metrics.TopAccuracy((1, 3)), metrics.PerClass(list('abcdefg')), metrics.Calibration(),
               temperature.Temperature()):
    for start in range(50 * rank, 300, 50 * world):
        metric.update(Batch(None, targets[start:start + 50], torch.arange(start, start + 50), []),
                      output[start:start + 50])
    found.update(metric.compute(world > 1, device))
print('RESULTS ' + json.dumps(found), flush=True)
os._exit(0)
'''


def test_two_processes_give_the_figures_of_one():
    code, port, found = SHARDED % ([ROOT, os.path.join(ROOT, 'tests')],), free_port(), []
    for processes in (1, 2):
        environment = dict(os.environ, WORLD_SIZE=str(processes), OMP_NUM_THREADS='1', MASTER_ADDR='127.0.0.1',
                           MASTER_PORT=str(port))
        started = [subprocess.Popen([sys.executable, '-c', code], stdout=subprocess.PIPE, universal_newlines=True,
                                    env=dict(environment, RANK=str(rank), LOCAL_RANK=str(rank)))
                   for rank in range(processes)]
        for process in started:
            found.append(re.search('RESULTS (.*)', process.communicate(timeout=120)[0]).group(1))
    assert found[0] == found[1] == found[2]


# ---- subsets of the classes, several sets

@pytest.fixture(scope='module')
def sets(trained, tmp_path_factory):
    """Folders of classes of `trained`: all, two of them, and a wrong one."""
    root = tmp_path_factory.mktemp('sets')
    for seed, (name, classes) in enumerate((('all', 'cow ant bee'), ('some', 'cow ant'), ('wrong', 'cow yak'))):
        write_tinted(root / name, classes.split(), 12, seed + 10)
    return root


def logits_of(source, folder, classes):
    """(float64 logits, class names) by Pillow and the network alone."""
    loaded = inference_model.load_for_inference(source)
    paths = [(name, path) for name in classes for path in sorted((folder / name).iterdir())]
    images = torch.from_numpy(np.stack([np.asarray(Image.open(str(path)).convert('RGB'), np.float32).transpose(2, 0, 1)
                                        for _, path in paths]) / 255)
    with torch.no_grad():
        return loaded.model((images - 0.5) / 0.5).double(), [name for name, _ in paths], list(loaded.classes)


def test_a_folder_of_some_classes_is_evaluated_on_their_logits(trained, sets, tmp_path, capsys):
    _, output, _ = trained
    logits, names, classes = logits_of(output, sets / 'some', ('cow', 'ant'))
    kept = [classes.index('ant'), classes.index('cow')]
    targets = torch.tensor([('ant', 'cow').index(name) for name in names])
    results = str(tmp_path / 'r.json')
    assert run_class_finetuning.run(['--eval', '--resume', output, '--eval_data_path', str(sets / 'some'),
                                     '--device=cpu', '--num_workers=0', '--results_file', results]) == 0
    out = capsys.readouterr().out
    assert 'Evaluated on the logits of 2 of the 3 classes' in out and str(sets / 'some') in out
    with open(results, encoding='utf-8') as file:
        row = json.load(file)[0]
    assert row['loss'] == pytest.approx(float(torch.nn.functional.cross_entropy(logits[:, kept], targets)), rel=1e-4)
    assert row['acc1'] == pytest.approx(100 * float((logits[:, kept].argmax(1) == targets).double().mean()))
    assert row['macro_f1'] == pytest.approx(100 * sklearn_metrics.f1_score(
        targets, logits[:, kept].argmax(1), average='macro'))
    assert [each['class'] for each in row['classes']] == ['ant', 'cow']


def test_reassessed_labels_of_a_subset(tmp_path):
    """Labels of other classes than the evaluated ones are no right answers."""
    path, output = 'ILSVRC2012_val_%08d.JPEG', torch.tensor([[3., 1.], [1., 2.], [5., 0.], [0., 1.]])

    class Data:
        classes, samples = ['b', 'd'], [(path % number, 0) for number in (1, 2, 3, 4)]

    labels = tmp_path / 'real.json'
    labels.write_text('[[1], [0, 3], [2], [1]]')
    found = metrics.build_metrics(metrics.Evaluation(Data(), real_labels=str(labels), outputs=[1, 3], nb_classes=4))[-1]
    found.update(Batch(None, None, torch.arange(4), []), output)
    assert found.compute(False, CPU) == {'real_acc1': pytest.approx(200 / 3), 'real_acc5': 100., 'real_images': 3}


def test_models_of_several_classes_per_image_keep_all_logits():
    """The other classes do not compete, so a folder of some classes changes nothing."""
    model = engine.EvaluatedNetwork(torch.nn.Linear(3, 4), outputs=None)
    assert model(torch.zeros(2, 3)).shape == (2, 4)
    assert engine.EvaluatedNetwork(torch.nn.Linear(3, 4), outputs=[3, 1])(torch.ones(2, 3)).shape == (2, 2)


def test_several_sets_give_a_table_and_a_row_each(trained, sets, tmp_path, capsys):
    data, output, _ = trained
    paths, results = [os.path.join(data, 'val'), str(sets / 'all'), str(sets / 'some')], str(tmp_path / 'r.csv')
    base = ['--eval', '--resume', output, '--device=cpu', '--num_workers=0', '--results_file', results]
    singly = []
    for path in paths:
        assert run_class_finetuning.run(base + ['--eval_data_path', path]) == 0
        with open(results, newline='', encoding='utf-8') as file:
            singly += list(csv.DictReader(file))
    capsys.readouterr()
    assert run_class_finetuning.run(base + ['--output_dir', str(tmp_path / 'o'), '--eval_data_path'] + paths) == 0
    out = capsys.readouterr().out
    with open(results, newline='', encoding='utf-8') as file:
        assert list(csv.DictReader(file)) == singly
    assert [(row['data'], row['weights']) for row in singly] == [
        (path, weights) for path in paths for weights in ('model', 'model_ema')]
    result, = re.findall('Result: .*', out)
    assert re.fullmatch(r'Result: images_per_second [\d.]+ step_milliseconds [\d.]+', result)
    table = out[re.search('^data +weights', out, re.M).start():].splitlines()
    for row, line in zip(singly, table[1:]):
        assert line.split()[:4] == [row['data'], row['weights'], row['images'], '%.3f' % float(row['acc1'])]
    found = summary_of(str(tmp_path / 'o'), 'eval-summary.json')['sets']
    assert [each['data'] for each in found] == paths
    assert [each['accuracy'] for each in found] == [float(row['acc1']) for row in singly[::2]]
    assert [each['ema_accuracy'] for each in found] == [float(row['acc1']) for row in singly[1::2]]
    with open(str(tmp_path / 'o' / 'eval-args.yaml'), encoding='utf-8') as file:
        args = run_class_finetuning.build_parser().parse_args(['--config', file.name])
    assert args.eval_data_path == paths


def test_a_bad_set_is_found_before_the_first_is_evaluated(trained, sets, refused, capsys):
    base = ['--eval', '--resume', trained[1], '--device=cpu', '--num_workers=0', '--eval_data_path', str(sets / 'all')]
    for path, says in ((sets / 'wrong', 'yak'), (sets / 'gone', 'no such file or folder')):
        refused(base + [str(path)], '--eval_data_path %s' % path, says)
    assert 'Evaluating' not in capsys.readouterr().out
    for flags, says in ((['--report', '--output_dir=x'], '--report'), (['--calibrate'], '--calibrate'),
                        (['--no_eval', '--data_path', trained[0]], 'belong to --eval')):
        refused(base + [str(sets / 'some')] + flags, 'several sets', says)


# ---- calibration

def evaluated(output, folder, tmp_path, *flags):
    results = str(tmp_path / 'calibrated.json')
    assert run_class_finetuning.run(['--eval', '--resume', output, '--eval_data_path', str(folder), '--device=cpu',
                                     '--num_workers=0', '--results_file', results, *flags]) == 0
    with open(results, encoding='utf-8') as file:
        return json.load(file)


def test_a_temperature_is_scipys_and_goes_everywhere(trained, sets, tmp_path, capsys):
    """Into the checkpoint, from there into evaluation, prediction, beit.load and an export, but not into an average."""
    folder = tmp_path / 'copy'
    shutil.copytree(trained[1], str(folder))
    best = str(folder / 'checkpoint-best.pth')
    before, content = evaluated(best, sets / 'all', tmp_path), weights_file.load_weights_file(best)
    logits, names, classes = logits_of(best, sets / 'all', ('ant', 'bee', 'cow'))
    targets = torch.tensor([classes.index(name) for name in names])
    expected = optimize.minimize(lambda log: float(torch.nn.functional.cross_entropy(
        logits * math.exp(-log[0]), targets)), [0.], method='Nelder-Mead', options={'xatol': 1e-6, 'fatol': 1e-12})
    assert abs(expected.x[0]) > 0.01
    capsys.readouterr()
    after = evaluated(best, sets / 'all', tmp_path, '--calibrate')
    out, calibrated = capsys.readouterr().out, weights_file.load_weights_file(best)
    spec = calibrated['model_spec']
    assert spec['temperature'] == pytest.approx(math.exp(expected.x[0]), rel=1e-3)
    assert spec['ema_temperature'] != spec['temperature']
    assert 'NLL %.4f -> %.4f, calibration error %.3f%% -> %.3f%%' % (
        before[0]['loss'], expected.fun, before[0]['ece'], after[0]['ece']) in out
    assert 'Wrote the temperature into %s' % best in out
    assert after[0]['loss'] == pytest.approx(expected.fun, rel=1e-5) and after[0]['acc1'] == before[0]['acc1']
    assert after == evaluated(best, sets / 'all', tmp_path)
    assert set(calibrated) == set(content) and all(
        torch.equal(calibrated['model'][name], value) for name, value in content['model'].items())
    share = torch.softmax(logits / spec['temperature'], 1)
    image = str(sets / 'all' / 'ant' / '00.png')
    loaded = classifier.load(best)
    assert loaded.probabilities([image])[0].tolist() == pytest.approx(share[0].tolist(), rel=1e-4)
    assert classifier.load(best, use_ema=True).spec.origin['temperature'] == '%g' % spec['ema_temperature']
    for path, calibrated_by in ((best, spec['temperature']), (os.path.join(trained[1], 'checkpoint-best.pth'), None)):
        card = model_card.write(inference_model.load_for_inference(path)).decode()
        assert re.findall(r'calibrated, with the temperature ([^ ]+)\. Loss .* before', card.replace('\\', '')) == (
            ['%g' % calibrated_by] if calibrated_by else [])
    exported = str(tmp_path / 'e.safetensors')
    assert run_export.run(['--resume', best, '--format=safetensors', '--output', exported, '--no_check']) == 0
    assert classifier.load(exported).probabilities([image])[0].tolist() == pytest.approx(share[0].tolist(), rel=1e-4)
    capsys.readouterr()
    assert run_predict.run(['--resume', best, '--output=-', '--format=json', image]) == 0
    best_share = json.loads(capsys.readouterr().out)[0]['predictions'][0]['probability']
    assert best_share == pytest.approx(float(share[0].max()), abs=2e-5)
    average = str(tmp_path / 'average.pth')
    for inputs in ([best, str(folder / 'checkpoint-0.pth')], [exported]):
        assert average_checkpoints.run(['--inputs', *inputs, '--output', average, '--overwrite']) == 0
        assert 'temperature' not in str(weights_file.load_weights_file(average)['model_spec'])
    head = weights_file.load_weights_file(average)['model']['head.weight']
    assert torch.allclose(head, content['model']['head.weight'], rtol=1e-4, atol=0)
    assert 'temperature' not in content['model_spec']
    network = inference_model.load_for_inference(best).model
    pretrained.load_pretrained(network, exported, classes=('cow', 'ant', 'bee'))
    assert torch.allclose(network.head.weight, head[[2, 0, 1]])


def test_a_calibrated_checkpoint_goes_to_another_output_dir(trained, sets, tmp_path, capsys):
    output = str(tmp_path / 'new')
    evaluated(trained[1], sets / 'all', tmp_path, '--calibrate', '--output_dir', output)
    assert 'temperature' in weights_file.load_weights_file(os.path.join(output, 'checkpoint-best.pth'))['model_spec']
    best = os.path.join(trained[1], 'checkpoint-best.pth')
    assert 'temperature' not in weights_file.load_weights_file(best)['model_spec']


def test_a_folder_is_calibrated_by_one_command_at_a_time(trained, sets, tmp_path, refused, monkeypatch):
    """It is locked before its checkpoint is read: a run that ends there meanwhile would lose a newer one."""
    folder = shutil.copytree(trained[1], str(tmp_path / 'run'))
    base = ['--device=cpu', '--num_workers=0', '--calibrate', '--eval', '--eval_data_path', str(sets / 'all')]
    with holder(folder), monkeypatch.context() as patch:
        patch.delattr('beit.checkpoint.discovery.load_agreed')
        for resume in (folder, os.path.join(folder, 'checkpoint-best.pth')):
            refused(base + ['--resume', resume], '--calibrate in %s: process ' % folder, ' writes there; wait')
    assert run_class_finetuning.run(base + ['--resume', folder]) == 0
    assert run_folder.LOCK not in os.listdir(folder)


def test_what_cannot_be_calibrated_is_refused(trained, sets, tmp_path, refused):
    base = ['--device=cpu', '--num_workers=0', '--calibrate', '--eval_data_path']
    refused(base + [str(sets / 'some'), '--eval', '--resume', trained[1]], '--calibrate', '2 of the 3 classes')
    refused(base + [str(sets / 'all'), '--data_path', trained[0]], '--calibrate', 'belongs to --eval')
    folder = tmp_path / 'there'
    folder.mkdir()
    (folder / 'checkpoint-best.pth').write_text('')
    refused(base + [str(sets / 'all'), '--eval', '--resume', trained[1], '--output_dir', str(folder)],
            '--output_dir', 'it holds a checkpoint-best.pth already')
    content = weights_file.load_weights_file(os.path.join(trained[1], 'checkpoint-best.pth'))
    bare = str(tmp_path / 'bare.pth')
    torch.save({name: value for name, value in content.items() if name != 'model_spec'}, bare)
    refused(base + [str(sets / 'all'), '--eval', '--resume', bare], '--calibrate', 'no description of its model')
    exported = str(tmp_path / 'e.safetensors')
    assert run_export.run(['--resume', trained[1], '--format=safetensors', '--output', exported, '--no_check']) == 0
    refused(base + [str(sets / 'all'), '--eval', '--resume', exported], 'is an export, which takes no temperature')
    for value in (0., -1., math.nan, math.inf):
        damaged = dict(content, model_spec=dict(content['model_spec'], temperature=value))
        with pytest.raises(UserError, match='temperature is invalid'):
            model_spec.spec_in(damaged, 'x.pth', 3)


@pytest.mark.parametrize('logits, reason', [
    ([[1., 0.], [0., 1.]], 'nearly every prediction is right'), ([[0., 1.], [1., 0.]], 'no better than chance'),
    ([[1e-4, 0.], [0., 1e-4]], 'nearly equal'), ([[0., 1e-4], [1e-4, 0.]], 'nearly equal'),
    ([[0., 0.], [0., 0.]], 'nearly equal'), ([[2., 0.], [3., 0.]], 'no better than chance'),
    ([[math.nan, 0.], [0., 1.]], 'outputs are NaN'), ([[math.inf, 0.], [0., 1.]], 'or infinite'),
    ([[3., 0.], [1., 0.]], '')])
def test_why_there_is_no_temperature(logits, reason):
    metric = temperature.Temperature()
    metric.update((None, torch.tensor([0, 1]), torch.arange(2)), torch.tensor(logits))
    found = metric.compute(False, CPU)['reason']
    assert reason in found and bool(reason) == bool(found)


def test_an_average_without_a_temperature_leaves_the_networks(trained, sets, tmp_path, capsys, refused):
    """An average of few epochs is nearly untrained."""
    content = weights_file.load_weights_file(os.path.join(trained[1], 'checkpoint-best.pth'))
    for key in ('model_ema', 'model'):  # from the second on, both have equal outputs
        content[key] = {name: value * 1e-6 if name.startswith('head.') else value
                        for name, value in content[key].items()}
        path = str(tmp_path / (key + '.pth'))
        torch.save(content, path)
        before = pathlib.Path(path).read_bytes()
        if key == 'model_ema':
            rows = evaluated(path, sets / 'all', tmp_path, '--calibrate')
            lines = [line for line in capsys.readouterr().out.splitlines() if 'no temperature' in line]
            assert len(lines) == 1 and lines[0].endswith(
                'fits the averaged network (EMA), since its outputs are nearly equal for all classes; train longer. '
                'Its temperature stays 1')
            spec = weights_file.load_weights_file(path)['model_spec']
            assert spec['temperature'] != 1 and 'ema_temperature' not in spec
            assert rows == evaluated(path, sets / 'all', tmp_path)
        else:
            refused(['--eval', '--resume', path, '--eval_data_path', str(sets / 'all'), '--device=cpu', '--calibrate',
                     '--num_workers=0'], 'fits the network, since its outputs are nearly equal for all classes')
            assert pathlib.Path(path).read_bytes() == before


def test_a_checkpoint_of_the_linear_probe_is_named(trained, tmp_path, capsys, refused):
    content = weights_file.load_weights_file(os.path.join(trained[1], 'checkpoint-best.pth'))
    content['model'] = {name.replace('head.', 'head.0.'): value for name, value in content['model'].items()}
    path = str(tmp_path / 'probe.pth')
    torch.save(content, path)
    refused(['--eval', '--resume', path, '--data_path', trained[0], '--device=cpu', '--num_workers=0'],
            'run_linear_eval.py', 'one classifier per layer')
    assert run_predict.run(['--resume', path, trained[0]]) == 2
    assert 'one classifier per layer, of run_linear_eval.py' in capsys.readouterr().err


def test_a_temperature_for_several_classes_per_image():
    generator = torch.Generator().manual_seed(1)
    targets = (torch.rand(200, 3, generator=generator) > 0.6).float()
    output = 4 * torch.randn(200, 3, generator=generator) + 2 * targets
    metric = temperature.Temperature('sigmoid', multi_label=True)
    metric.update((None, targets, torch.arange(200)), output)
    stats = metric.compute(False, CPU)

    def nll(scale):
        return float(torch.nn.functional.binary_cross_entropy_with_logits(output.double() / scale, targets.double()))

    assert stats['nll_before'] == pytest.approx(nll(1.)) and stats['nll'] == pytest.approx(nll(stats['temperature']))
    assert stats['nll'] <= min(nll(stats['temperature'] * factor) for factor in (0.99, 1.01)) and stats['ece'] < \
        stats['ece_before']


def test_unsure_images_are_marked_in_every_format(trained, sets, tmp_path, capsys):
    folder = sets / 'all' / 'ant'
    logits, _, _ = logits_of(trained[1], sets / 'all', ('ant',))
    shares = torch.softmax(logits, 1).max(1).values.tolist()
    limit = float(np.median(shares))
    expected = [share < limit for share in shares]
    assert any(expected) and not all(expected)
    found = {}
    for kind in ('text', 'csv', 'json', 'jsonl'):
        capsys.readouterr()
        assert run_predict.run(['--resume', trained[1], '--threshold=%.9f' % limit, str(folder)]
                               + (['--format', kind] if kind != 'text' else [])) == 0
        found[kind] = capsys.readouterr().out
    assert [': unsure, ' in line for line in found['text'].splitlines()] == expected
    assert [row['unsure'] for row in csv.DictReader(found['csv'].splitlines())] == [
        'unsure' if each else '' for each in expected]
    assert [each['unsure'] for each in json.loads(found['json'])] == expected
    assert [json.loads(line)['unsure'] for line in found['jsonl'].splitlines()] == expected
    assert run_predict.run(['--resume', trained[1], '--format=csv', str(folder)]) == 0
    assert 'unsure' not in capsys.readouterr().out
