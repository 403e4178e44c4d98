"""Figures of an evaluation against scikit-learn and slow loops, their selection of the best checkpoint, calibration."""

import csv
import json
import os
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from sklearn import metrics as sklearn_metrics
from sklearn.calibration import calibration_curve

import average_checkpoints
import run_class_finetuning
from beit.data.loader import Batch
from beit.errors import UserError
from beit.files import weights_file
from beit.outputs import report, report_html, run_log
from beit.training import metrics
from helpers import CPU, ROOT, RUN, free_port, lines_of, write_images

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


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    """(data, output, log.txt): three classes, and epochs whose accuracy and loss disagree about the best."""
    root = tmp_path_factory.mktemp('metrics')
    data, output = write_images(root / 'data', classes=('ant', 'bee', 'cow'), val=5), str(root / 'out')
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
    assert sum(each['images'] for each in rows['json']['reliability']) == 15
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


SHARDED = '''
import json, os, sys
sys.path[:0] = %r
import torch
from beit.config import DistributedConfig
from beit.data.loader import Batch
from beit.distributed import process_group
from beit.training import metrics
from test_metrics import outputs
device = process_group.init_distributed_mode(DistributedConfig(device='cpu'))
rank, world = process_group.rank(), process_group.world_size()
targets, output = outputs()
found = {}
for metric in (metrics.TopAccuracy((1, 3)), metrics.PerClass(list('abcdefg')), metrics.Calibration()):
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
