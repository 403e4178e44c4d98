"""Output files of a run: args.yaml and --config, summary.json, curves.png, report.html, TensorBoard's images."""

import ast
import base64
import html.parser
import io
import json
import math
import os
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from sklearn.metrics import confusion_matrix

import datasets
import engine_for_finetuning as engine
import run_class_finetuning
from beit.checkpoint import inference_model
from beit.config import MixupConfig, TransformConfig
from beit.data.loader import Batch
from beit.distributed import collectives
from beit.errors import UserError
from beit.files import run_folder
from beit.outputs import args_yaml, report, report_html, run_log
from beit.outputs import curves as curves_module
from beit.outputs.curves import Curves, panels
from beit.outputs.run_log import nonfinite_to_none, project_version, write_summary
from beit.training.confusion import KEPT, ConfusionMatrix, EvaluatedImage
from beit.training.metrics import Loss, TopAccuracy
from flags import config_from
from helpers import ROOT, RUN, needs_extra, photo, summaries

pytestmark = pytest.mark.current_only

needs_matplotlib = needs_extra('matplotlib')
needs_browser = pytest.mark.needs('browser', shutil.which('chromium') is not None, 'no Chromium on the PATH')
NASTY = '<b>&"x'  # a class


def lines(output, start):
    return [line[len(start):] for line in output.splitlines() if line.startswith(start)]


def loaded(*path):
    with open(os.path.join(*map(str, path)), encoding='utf-8') as file:
        return json.load(file)


# ---- args.yaml and --config

FLAGS = ['--lr=1e-3', '--opt_betas', '0.9', '0.95', '--cutmix_minmax', '0.1', '0.3', '--no_curves', '--use_cls',
         '--jit_compile=on', '--loss_scale=dynamic',
         '--finetune=a "b\n\udcff\u2028\x85\x7f\U0001f600: #x', '--model_key=']


def test_flags_are_restored_from_their_file(tmp_path, parse):
    path, args = str(tmp_path / 'args.yaml'), parse(*FLAGS)
    args_yaml.write(path, vars(args))
    with open(path, encoding='utf-8') as file:
        read = yaml.safe_load(file)  # as other YAML readers see it
    assert read['opt_betas'] == [0.9, 0.95] and read['finetune'] == args.finetune and read['clip_grad'] is None
    assert parse('--config', path) == args
    both = parse('--lr=2', '--config=' + path, '--curves', '--opt_betas', '0.5', '0.6')
    assert both.lr == 2 and both.curves and both.opt_betas == [0.5, 0.6] and both.loss_scale == 'dynamic'


BY_HAND = '''# mine
amp: true
lr: 1e-3   # PyYAML would take this for a word
opt-level: O1
no_save_ckpt: true
log_dir:
seed: ~
jit_compile: on
warmup_lr: null
'''


def test_a_file_written_by_hand(tmp_path, parse):
    (tmp_path / 'mine.yaml').write_text(BY_HAND)
    expected = parse('--amp', '--lr=1e-3', '--opt-level=O1', '--no_save_ckpt', '--jit_compile=on')
    assert parse('--config=%s' % (tmp_path / 'mine.yaml')) == expected


@pytest.mark.parametrize('text, says', [
    ('lrr: 3', 'lrr: no flag has this name; did you mean lr'),
    ('lr: -1', 'lr: must be above 0, got -1'),
    ('lr: [1]', 'lr: it takes one value, not a list'),
    ('cutmix_minmax: [0.1, 0.2, 0.3]', 'cutmix_minmax: 3 values are too many'),
    ('opt_betas: 0.9', 'opt_betas: it takes a list of numbers'),
    ('amp: maybe', "amp: it must be true or false, got 'maybe'"),
    ('jit_compile: maybe', "wrong.yaml: jit_compile: unknown value 'maybe'; it must be one of auto, on, off"),
    ('lr: 1\nlr: 2', ': lr '),
    ('lr: 1\nseed: {a: 1}', 'line 2'),
    ('- lr', 'flag: value'),
    ('a: [', 'line 1'),
    ('config: x', 'config: this one works on the command line only'),
    ('epochs: ' + '[' * 1500, '--config'),
    ('x: ' + 'x' * 2 ** 20, 'larger than 1 MiB'),
], ids=lambda value: value[:20])
def test_an_error_in_a_file_is_one_line(tmp_path, parse, text, says):
    path = tmp_path / 'wrong.yaml'
    path.write_text(text)
    with pytest.raises(UserError) as caught:
        parse('--config=%s' % path)
    assert says in str(caught.value) and str(caught.value).startswith('--config %s' % path)
    assert '\n' not in str(caught.value)


def test_files_that_cannot_be_read(tmp_path, capsys):
    (tmp_path / 'binary').write_bytes(b'\xff\xfe\x00')
    for name, says in (('missing', 'No such file'), ('', 'Is a directory'), ('binary', 'not a text file')):
        assert run_class_finetuning.run(['--config=%s' % (tmp_path / name)]) == 2
        assert says in capsys.readouterr().err


def test_config_without_pyyaml(tmp_path, parse, monkeypatch):
    (tmp_path / 'args.yaml').write_text('lr: 1\n')
    monkeypatch.setitem(sys.modules, 'yaml', None)
    with pytest.raises(UserError, match='--config .*args.yaml needs PyYAML; run: /.* -m pip install PyYAML'):
        parse('--config=%s' % (tmp_path / 'args.yaml'))


def test_a_users_own_file_is_not_overwritten(tmp_path, capsys):
    (tmp_path / 'args.yaml').write_text('lr: 1\n')
    args_yaml.write(str(tmp_path / 'args.yaml'), {'lr': 2})
    assert (tmp_path / 'args.yaml').read_text() == 'lr: 1\n' and 'args.yaml' in capsys.readouterr().out


# ---- the files of one run with every output

@pytest.fixture(scope='module')
def run(tmp_path_factory):
    """A run of two epochs with odd class names: (its folder, data, TensorBoard's folder, output)."""
    root = tmp_path_factory.mktemp('look')
    for split, count in (('train', 16), ('val', 9)):
        for label, name in enumerate(('cat', NASTY, 'x' * 40)):
            folder = root / 'data' / split / name
            folder.mkdir(parents=True)
            for index in range(count + label):
                picture = photo(1000 * label + index + (500 if split == 'val' else 0), 32, 32)
                tint = Image.new('RGB', picture.size, [(150, 90, 60), (90, 120, 150), (60, 160, 60)][label])
                Image.blend(picture, tint, 0.3).save(str(folder / ('%03d$x<i>.png' % index)))
    out, printed = str(root / 'out'), io.StringIO()
    flags = RUN + ['--data_path=%s' % (root / 'data'), '--output_dir=' + out, '--epochs=4', '--model_ema', '--report',
                   '--log_dir=%s' % (root / 'tb'), '--mixup=0.8', '--lr=2e-3', '--curves', '--model_ema_decay=0.5']
    stdout, sys.stdout = sys.stdout, printed
    try:
        assert run_class_finetuning.run(flags) == 0
    finally:
        sys.stdout = stdout
    return out, str(root / 'data'), str(root / 'tb'), printed.getvalue()


def test_skipped_images_are_counted(run, tmp_path):
    out, data, _, _ = run
    shutil.copytree(data, str(tmp_path / 'data'))
    for name in ('cat/000$x<i>.png', 'cat/001$x<i>.png'):
        (tmp_path / 'data' / 'val' / name).write_bytes(b'')
    assert run_class_finetuning.run(RUN + [
        '--data_path=%s' % (tmp_path / 'data'), '--eval', '--resume=' + out, '--output_dir=%s' % tmp_path, '--report',
        '--bad_images=skip', '--max_bad_images=0.5', '--no_model_ema']) == 0
    summary = loaded(tmp_path, 'eval-summary.json')
    assert (summary['bad_images'], summary['images'], summary['validation_images']) == (2, 28, 30)
    assert re.search('<dt>In bad_images.txt</dt>\\s*<dd>2<', (tmp_path / 'eval-report.html').read_text())


def test_the_same_flags_again(run, tmp_path, capsys):
    out, _, _, printed = run
    flags = ['--config=' + os.path.join(out, 'args.yaml')]
    assert run_class_finetuning.build_parser().parse_args(flags)
    assert run_class_finetuning.run(flags + ['--output_dir=%s' % (tmp_path / 'again'), '--log_dir=%s' % tmp_path]) == 0
    again = lines(capsys.readouterr().out, 'Flags: ')
    assert [line.replace(str(tmp_path / 'again'), out).replace('--log_dir=%s' % tmp_path, '--log_dir=' + run[2])
            for line in again] == lines(printed, 'Flags: ')
    with open(os.path.join(out, 'log.txt'), 'rb') as one, open(str(tmp_path / 'again' / 'log.txt'), 'rb') as other:
        assert one.read() == other.read()  # and therefore the same run


def test_summary_has_the_results_figures_and_versions(run):
    out, _, _, printed = run
    summary, result = loaded(out, 'summary.json'), lines(printed, 'Result: ')[0].split()
    result = dict(zip(result[::2], result[1::2]))
    assert {name: form % summary[name] for name, form in (
        ('images_per_second', '%.2f'), ('step_milliseconds', '%.3f'), ('accuracy', '%.3f'), ('loss', '%.4f'))} == result
    model = inference_model.load_for_inference(out).model
    assert summary['parameters'] == sum(each.numel() for each in model.parameters())
    assert (summary['model'], summary['classes'], summary['training_images'], summary['validation_images'],
            summary['epochs'], summary['precision']) == ('beit_nano_patch8_32', 3, 51, 30, 4, 'float32')
    assert 0 < summary['duration_seconds'] < 600
    assert summary['versions']['torch'] == torch.__version__ and summary['versions']['numpy'] == np.__version__
    assert summary['versions']['python'] == '%d.%d.%d' % sys.version_info[:3] and summary['versions']['beit']


def test_nonfinite_values_are_null(tmp_path):
    write_summary(str(tmp_path / 'new'), {
        'loss': math.nan, 'list': [math.inf, 1, {'a': -math.inf}], 'text': 'NaN', 'on': True})
    written = loaded(tmp_path, 'new', 'summary.json')
    assert set(written.pop('versions')) == {'beit', 'python', 'torch', 'torchvision', 'timm', 'numpy'}
    assert written == {'loss': None, 'list': [None, 1, {'a': None}], 'text': 'NaN', 'on': True}


def test_the_version_is_that_of_the_changelog(tmp_path, monkeypatch):
    with open(os.path.join(ROOT, 'CHANGELOG.md'), encoding='utf-8') as file:
        newest = re.search(r'^## (\d\S+)', file.read(), re.M).group(1)
    assert project_version() == newest
    monkeypatch.setattr(run_log, 'project_root', lambda: str(tmp_path))
    assert project_version() is None


def test_an_evaluation_does_not_overwrite_the_trainings_files(run, tmp_path, capsys):
    out, data, _, _ = run
    copy = str(tmp_path / 'copy')
    shutil.copytree(out, copy)
    before = {name: os.stat(os.path.join(copy, name)).st_mtime_ns for name in os.listdir(copy)}
    assert run_class_finetuning.run(['--config=%s/args.yaml' % copy, '--eval', '--resume=' + copy,
                                     '--output_dir=' + copy, '--no_model_ema']) == 0
    after = {name: os.stat(os.path.join(copy, name)).st_mtime_ns for name in os.listdir(copy)}
    assert {name for name in after if after[name] != before.get(name)} == {'eval-args.yaml', 'eval-summary.json',
                                                                           'eval-report.html'}
    summary = loaded(copy, 'eval-summary.json')
    assert '%.3f' % summary['accuracy'] == lines(capsys.readouterr().out, 'Result: ')[0].split()[5]
    assert summary['accuracy'] == loaded(out, 'summary.json')['accuracy']  # the best checkpoint's
    assert summary['bad_images'] == loaded(out, 'summary.json')['bad_images'] == 0
    with open(os.path.join(copy, 'eval-report.html'), encoding='utf-8') as file:
        page = file.read()
    assert 'bad_images.txt' not in page
    assert 'Of the weights in %s' % os.path.join(copy, 'checkpoint-best.pth') in page
    assert heat_map_of(page) == heat_map_of(page_of(out))  # the same weights, evaluated twice


def test_a_new_run_moves_them_to_a_backup(run, tmp_path):
    copy = tmp_path / 'out'
    shutil.copytree(run[0], str(copy))
    (copy / 'report.html.tmp-12').write_text('half')
    (copy / 'mine.html').write_text('mine')
    run_folder.prepare_folder(str(copy))
    assert os.listdir(str(copy)) == ['mine.html']
    aside, = [name for name in os.listdir(str(tmp_path)) if name.startswith('out-')]
    assert {'args.yaml', 'summary.json', 'report.html', 'log.txt'} <= set(os.listdir(str(tmp_path / aside)))


# ---- curves.png

LOG = [dict(epoch=epoch, train_loss=2. - epoch / 10, test_loss=1.5, test_acc1=10. * epoch, test_acc5=50., train_lr=1e-3,
            train_min_lr=1e-4, train_class_acc=float('nan') if epoch == 1 else 0.5) for epoch in range(4)]


def test_curves_are_the_logs_figures():
    curves = {(title, curve.label): (curve.epochs, curve.values) for title, found in panels(LOG).items()
              for curve in found}
    assert set(curves) == {('Loss', 'training'), ('Loss', 'validation'), ('Accuracy (%)', 'training top-1'),
                           ('Accuracy (%)', 'top-1'), ('Accuracy (%)', 'top-5'), ('Learning rate', 'highest'),
                           ('Learning rate', 'lowest')}
    assert curves['Accuracy (%)', 'top-1'] == ((1, 2, 3, 4), (0., 10., 20., 30.))
    assert curves['Accuracy (%)', 'training top-1'] == ((1, 3, 4), (50., 50., 50.))  # missing values are left out


def test_curves_of_a_panel_have_different_colours():
    figures = dict(test_macro_f1=1., test_balanced_acc=2., test_ema_acc1=3., test_ema_balanced_acc=4.)
    colours = [curve.colour for curve in panels([dict(line, **figures) for line in LOG])['Accuracy (%)']]
    assert len(colours) == 7 == len(set(colours))


@needs_matplotlib
def test_curves_are_drawn(run, tmp_path):
    with Image.open(os.path.join(run[0], 'curves.png')) as picture:
        assert picture.size == (1800, 390)
        pixels = np.asarray(picture.convert('RGB')).reshape(-1, 3)
    colours = {curve.label: curve.colour for found in panels(log_of(run[0])).values() for curve in found}
    for label in ('training', 'validation', 'validation, EMA', 'macro F1'):
        colour = [int(colours[label][place:place + 2], 16) for place in (1, 3, 5)]
        assert (np.abs(pixels.astype(int) - colour).max(axis=1) < 3).sum() > 50, label


def test_curves_are_drawn_seldom_and_at_the_end(tmp_path, monkeypatch):
    (tmp_path / 'log.txt').write_text('{"epoch": 0, "train_loss": 1}\n')
    times, drawn = iter([100., 100., 105., 119., 121., 121., 122., 123.]), []
    monkeypatch.setattr(curves_module.time, 'monotonic', lambda: next(times))
    monkeypatch.setattr(curves_module, 'draw_curves', lambda path, *_: drawn.append(path))
    curves, counts = Curves(str(tmp_path)), []
    for is_last in (False, False, False, False, True):
        curves.draw(is_last)
        counts.append(len(drawn))
    assert counts == [1, 1, 1, 2, 3]  # at 100 s, not at 105 and 119, at 121, and at the end


@pytest.mark.parametrize('failure, says', ((ImportError('no'), 'matplotlib; run: %s -m pip' % sys.executable),
                                           (RuntimeError('odd\nfont'), 'not drawn (RuntimeError: odd font)')))
def test_a_failed_plot_is_only_one_line(image_folder, tmp_path, monkeypatch, capsys, failure, says):
    def fail(*_):
        raise failure
    monkeypatch.setattr(curves_module, 'draw_curves', fail)
    monkeypatch.setattr(curves_module, 'SECONDS_BETWEEN', 0)
    assert run_class_finetuning.run(RUN + ['--data_path=' + image_folder(), '--output_dir=%s' % (tmp_path / 'out'),
                                           '--epochs=3', '--curves']) == 0
    assert capsys.readouterr().out.count(says) == 1


def test_without_matplotlib(run, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, 'matplotlib', None)
    monkeypatch.setitem(sys.modules, 'matplotlib.figure', None)
    monkeypatch.setitem(sys.modules, 'matplotlib.backends.backend_agg', None)
    (tmp_path / 'log.txt').write_text('{"epoch": 0, "train_loss": 1}\n')
    curves = Curves(str(tmp_path))
    curves.draw()
    curves.draw(is_last=True)
    assert capsys.readouterr().out.count('-m pip install matplotlib (or give --no_curves)') == 1
    assert report.svg_plots(LOG)[0] == [] and 'A report with curves needs matplotlib' in report.svg_plots(LOG)[1]


@pytest.mark.parametrize('name', sorted(name for name in os.listdir(ROOT) if name.endswith('.py')))
def test_optional_packages_are_imported_where_they_are_needed(name):
    """Inside functions: they are optional, and importing matplotlib takes half a second."""
    with open(os.path.join(ROOT, name), encoding='utf-8') as file:
        tree = ast.parse(file.read())
    imported = {alias.name.split('.')[0] for node in tree.body if isinstance(node, ast.Import) for alias in node.names}
    imported |= {node.module.split('.')[0] for node in tree.body if isinstance(node, ast.ImportFrom)}
    assert not imported & {'matplotlib', 'yaml', 'onnx', 'onnxruntime', 'transformers', 'tensorboard', 'tensorboardX'}


# ---- predictions

def some_outputs(images=200, classes=7):
    generator = torch.Generator().manual_seed(3)
    output = 3 * torch.randn(images, classes, generator=generator)
    targets = torch.randint(0, classes - 1, (images,), generator=generator)  # the last class has no image
    output[5] = float('nan')
    losses = torch.nn.functional.cross_entropy(output, targets, reduction='none')
    return torch.randperm(images, generator=generator), targets, output.argmax(1), output, losses


def collected(parts, classes=7):
    predictions = ConfusionMatrix(classes)
    for indices, targets, _, output, _ in parts:
        predictions.update(Batch(None, targets, indices, []), output)
    return predictions


def test_predictions_against_sklearn_and_a_slow_loop():
    indices, targets, predicted, output, losses = columns = some_outputs()
    predictions = collected([[column[:150] for column in columns], [column[150:] for column in columns]])
    predictions.compute(False, None)
    assert np.array_equal(predictions.matrix(), confusion_matrix(targets, predicted, labels=range(7)))
    right, images = predictions.per_class()
    assert images.tolist() == [int((targets == label).sum()) for label in range(7)] and images[6] == 0
    assert right.tolist() == [int(((targets == label) & (predicted == label)).sum()) for label in range(7)]
    wrong = sorted((-(float(losses[row]) if math.isfinite(losses[row]) else math.inf), int(indices[row]))
                   for row in range(200) if targets[row] != predicted[row])
    assert [each.index for each in predictions.hardest] == [index for _, index in wrong[:KEPT]]
    sure = sorted((-float(torch.softmax(output[row], 0).max()), int(indices[row])) for row in range(200)
                  if targets[row] == predicted[row])
    assert [each.index for each in predictions.most_confident] == [index for _, index in sure[:KEPT]]
    assert [-each.probability for each in predictions.most_confident] == pytest.approx(
        [share for share, _ in sure[:KEPT]])
    pairs = predictions.most_confused(5)
    matrix = confusion_matrix(targets, predicted, labels=range(7))
    np.fill_diagonal(matrix, 0)
    assert [count for _, _, count in pairs] == sorted(matrix.ravel(), reverse=True)[:5]
    assert all(matrix[true, guess] == count for true, guess, count in pairs)


def test_predictions_of_several_processes_are_those_of_one(monkeypatch):
    columns = some_outputs()
    whole = collected([columns])
    whole.compute(False, None)
    told = []

    def gather(columns, _):
        told.append(columns)
        return [torch.cat([each for each in parts if each is not None]) for parts in zip(*told)]
    monkeypatch.setattr(collectives, 'all_gather_rows', gather)
    shares = [collected([[column[rank::3] for column in columns]]) for rank in range(3)] + [ConfusionMatrix(7)]
    for share in shares:  # the last process got no image, and has now received all
        share.compute(True, None)
    assert shares[-1].counts == whole.counts
    again = ConfusionMatrix(7)
    again.load_state(json.loads(json.dumps(nonfinite_to_none(whole.state()))))
    assert again.counts == whole.counts and again.most_confident == whole.most_confident
    assert [each[:5] for each in again.hardest[1:]] == [each[:5] for each in whole.hardest[1:]]
    assert math.isnan(again.hardest[0].target_probability)
    of_all = [repr((each.hardest, each.most_confident)) for each in (shares[-1], whole)]  # repr: one is nan
    assert of_all[0] == of_all[1]


def test_an_evaluation_gives_the_same_figures_with_predictions(monkeypatch):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 7))
    batches = [Batch(torch.randn(5, 3, 2, 2), torch.randint(0, 7, (5,)), torch.arange(5) + 5 * number, [])
               for number in range(4)]
    predictions = ConfusionMatrix(7)
    metrics = [TopAccuracy(), Loss(), predictions]
    with_them = engine.evaluate(batches, model, torch.device('cpu'), metrics=metrics)
    assert with_them == engine.evaluate(batches, model, torch.device('cpu'))
    assert sum(predictions.counts.values()) == 20
    assert 100. * np.trace(predictions.matrix()) / 20 == pytest.approx(with_them['acc1'])


# ---- report.html

class Page(html.parser.HTMLParser):
    """All tags and attributes of a page, its text, and the figures' captions and images."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.attributes, self.open, self.texts = [], [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += [(tag,) + each for each in attributes]
        if tag not in ('meta', 'img', 'br', 'path', 'use', 'rect'):
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if self.open and self.open[-1] == tag:
            self.open.pop()

    def handle_endtag(self, tag):
        if self.open and self.open[-1] == tag:
            self.open.pop()
        else:
            assert tag in ('path', 'use', 'rect'), '</%s> closes %s' % (tag, self.open)

    def handle_data(self, text):
        self.texts.append((tuple(self.open), text))


def page_of(folder):
    with open(os.path.join(folder, 'report.html'), encoding='utf-8') as file:
        return file.read()


def heat_map_of(page):
    """The numbers in its rows; a dot is 0."""
    table = re.search(r'<table class="heat">.*?</table>', page, re.S).group()
    return [[0 if cell == '·' else int(cell) for cell in re.findall(r'<td[^>]*>([^<]*)</td>', row)]
            for row in re.findall(r'<tr>(.*?)</tr>', table, re.S)[1:]]


def by_hand(out, data):
    """(class names, paths, true, predicted, probability) of the validation images, by the best weights and Pillow."""
    trained = inference_model.load_for_inference(out)
    classes = sorted(os.listdir(os.path.join(data, 'val')))
    assert trained.classes == classes
    paths = [os.path.join(data, 'val', name, file) for name in classes
             for file in sorted(os.listdir(os.path.join(data, 'val', name)))]
    images = np.stack([np.asarray(Image.open(path).convert('RGB'), dtype=np.float32) for path in paths])
    with torch.no_grad():
        images = torch.from_numpy(images.transpose(0, 3, 1, 2) / 255)
        shares = torch.softmax(trained.model((images - 0.5) / 0.5), 1)
    true = [classes.index(os.path.basename(os.path.dirname(path))) for path in paths]
    return classes, paths, true, shares.argmax(1).tolist(), shares.max(1).values.tolist()


def test_the_report_tells_what_the_best_weights_do(run):
    out, data, _, _ = run
    classes, paths, true, predicted, probability = by_hand(out, data)
    page = page_of(out)
    expected = confusion_matrix(true, predicted, labels=range(3))
    assert heat_map_of(page) == expected.tolist()
    bars = re.findall(r'<span class="name">(.*?)</span>.*?<small>(\d+) of (\d+)</small>', page)
    assert {(html.unescape(name), int(right), int(images)) for name, right, images in bars} == {
        (name, expected[label, label], expected[label].sum()) for label, name in enumerate(classes)}
    shares = [int(right) / int(images) for _, right, images in bars]
    assert shares == sorted(shares)
    wrong = {os.path.basename(os.path.dirname(path)) + '/' + os.path.basename(path)
             for path, one, other in zip(paths, true, predicted) if one != other}
    shown = re.search(r'<h2>Most mistaken</h2>.*?</section>', page, re.S)
    assert {html.unescape(each)[-60:] for each in re.findall(r'<span class="path" title="[^"]*">(.*?)</span>',
                                                             shown.group() if shown else '')} \
        == {path if len(path) <= 60 else '…' + path[-59:] for path in wrong}
    surest = max((share, path) for share, path, one, other in zip(probability, paths, true, predicted) if one == other)
    first = re.search(r'<h2>Surest</h2>.*?<figcaption>.*?\((.*?)\s%\).*?title="(.*?)"', page, re.S)
    assert html.unescape(first.group(2)) == surest[1]
    assert float(first.group(1)) == pytest.approx(100 * surest[0], abs=0.06)
    log = [epoch['test_acc1'] for epoch in log_of(out)]
    assert 'Of epoch %d, the best one; its weights are in checkpoint-best.pth.' % (log.index(max(log)) + 1) in page


def test_a_resumed_run_reports_the_best_epoch_before(run, tmp_path):
    """The fifth epoch ruins the weights; figures, confusions and images stay the values of checkpoint-best.pth."""
    out, data, _, _ = run
    copy = str(tmp_path / 'copy')
    shutil.copytree(out, copy)
    os.remove(os.path.join(copy, 'report.html'))
    assert run_class_finetuning.run(['--config=%s/args.yaml' % copy, '--output_dir=' + copy, '--log_dir=', '--lr=1',
                                     '--epochs=5', '--auto_resume', '--min_lr=1', '--clip_grad=1']) == 0
    log = log_of(copy)
    best = max(log[:4], key=lambda stats: stats['test_acc1'])
    assert len(log) == 5 and log[4]['test_acc1'] < best['test_acc1']
    page, before = page_of(copy), page_of(out)
    assert heat_map_of(page) == heat_map_of(before)
    assert 'Of epoch %d, the best one; its weights are in checkpoint-best.pth.' % (best['epoch'] + 1) in page
    assert '<dt>Accuracy, best epoch</dt><dd>%.2f %%</dd>' % best['test_acc1'] in page
    for title in ('Most mistaken', 'Surest'):
        section = r'<h2>%s</h2>.*?</section>' % title
        assert re.findall(section, page, re.S) == re.findall(section, before, re.S)


def log_of(out):
    with open(os.path.join(out, 'log.txt'), encoding='utf-8') as file:
        return [json.loads(line) for line in file]


def test_the_report_needs_no_other_file_and_lets_nothing_in(run):
    text = page_of(run[0])
    page = Page(text)
    assert page.open == [] and not {'script', 'b', 'i', 'link', 'iframe', 'object', 'base'} & (set(page.tags) - {'i'})
    assert text.count('<i ') == page.tags.count('i') == 3  # the bars; none of a file's name
    for tag, name, value in page.attributes:
        assert not name.startswith('on'), (tag, name)
        if name in ('src', 'href', 'xlink:href', 'action', 'srcset', 'data', 'poster'):
            assert value.startswith(('data:image/jpeg;base64,', '#')), (tag, name, value[:80])
    style = re.search(r'<style>(.*?)</style>', text, re.S).group(1)
    assert '@import' not in style and 'url(' not in style
    assert re.findall(r'url\((?!#)', text) == [] and 'http' not in re.sub(r'data:image/jpeg;base64,[\w+/=]+', '', text)
    assert NASTY in [each.strip() for _, each in page.texts]  # escaped once, and only once


def test_the_reports_images_are_what_the_model_saw(run, parse):
    out, data, _, _ = run
    pictures = [Image.open(io.BytesIO(base64.b64decode(each))) for each in
                re.findall(r'src="data:image/jpeg;base64,([\w+/=]+)"', page_of(out))]
    assert all(picture.format == 'JPEG' and picture.size == (32, 32) for picture in pictures)
    surest = re.search(r'<h2>Surest</h2>.*?base64,([\w+/=]+)".*?title="(.*?)"', page_of(out), re.S)
    shown = np.asarray(Image.open(io.BytesIO(base64.b64decode(surest.group(1)))), dtype=float)
    with Image.open(html.unescape(surest.group(2))) as picture:
        assert np.abs(shown - np.asarray(picture, dtype=float)).mean() < 12  # JPEG's losses


def samples_of(args, train, classes):
    return report.augmented_samples(train, classes, config_from(args, TransformConfig), config_from(args, MixupConfig),
                                    args.seed)


def test_augmented_samples_are_the_loaders_first_batch(run, parse):
    out, data, _, _ = run
    args = parse('--config=%s/args.yaml' % out, '--mixup=0', '--batch_size=16', '--reprob=0.5')
    train, val, classes = datasets.build_datasets(args)
    before = (torch.get_rng_state(), np.random.get_state()[1].copy())
    samples = samples_of(args, train, classes)
    assert torch.equal(before[0], torch.get_rng_state()) and np.array_equal(before[1], np.random.get_state()[1])
    batch = next(iter(datasets.build_loaders(args, train, None)[0]))
    seen = np.clip(np.rint((batch.images.numpy() * 0.5 + 0.5) * 255), 0, 255).transpose(0, 2, 3, 1)
    assert np.array_equal(np.stack([pixels for pixels, _ in samples]), seen)
    assert [caption for _, caption in samples] == [classes[label] for label in batch.targets.tolist()]
    assert sum(np.abs(seen - np.asarray(train[int(index)][0], dtype=float)).max() > 0 for index in batch.indices) > 8
    args.mixup = 0.8
    state = np.random.get_state()[1].copy()
    mixed = samples_of(args, train, classes)
    assert np.array_equal(state, np.random.get_state()[1])
    share, other = re.match(r'.* (\d+) % \+ .* (\d+) %$', next(
        caption for _, caption in mixed if ' + ' in caption)).groups()
    assert 99 <= int(share) + int(other) <= 101
    first, last = samples[0][0].astype(float), samples[-1][0].astype(float)  # timm mixes a batch with its mirror
    weights = np.linalg.lstsq(np.stack([first.ravel(), last.ravel()], 1), mixed[0][0].ravel(), rcond=None)[0]
    assert weights.sum() == pytest.approx(1, abs=0.02) and weights.min() > 0


def many_classes(tmp_path, classes=100):
    predictions = ConfusionMatrix(classes)
    generator = np.random.default_rng(0)
    for true in range(classes - 1):
        predictions.counts[true, true] = int(generator.integers(1, 50))
        predictions.counts[true, (true + 1) % classes] = true + 1
    picture = np.zeros((200, 320, 3), np.uint8)
    return predictions, dict(
        title='t', subtitle='s', tiles=[], facts=[], plots=[], hint='',
        classes=['class %d' % label for label in range(classes)],
        evaluated='All.', figures={}, per_class=predictions.per_class(), confused=predictions.most_confused(),
        matrix=None,
        hardest=[(picture, EvaluatedImage(0, 1, 2, 0.5, math.nan, math.inf), '/a/b/c.png')], most_confident=[],
        samples=[], flags=[], versions=[])


def test_many_classes_are_cut_to_the_worst_and_best(tmp_path):
    predictions, data = many_classes(tmp_path)
    page = report_html.render(data)
    names = re.findall(r'<span class="name">class (\d+)</span>', page)
    right, images = predictions.per_class()
    order = sorted(range(99), key=lambda label: (right[label] / images[label], label))
    assert [int(name) for name in names] == order[:20] + order[-20:][::-1]
    rows = re.findall(r'<tr><td>class (\d+)</td><td>class (\d+)</td><td class="number">(\d+)</td>', page)
    assert [tuple(map(int, row)) for row in rows] == [(true, true + 1, true + 1) for true in range(98, 78, -1)]
    assert 'class="heat"' not in page and '1 more have no validation image' in page and 'n/a' in page
    jpeg = Image.open(io.BytesIO(base64.b64decode(re.search(r'base64,([\w+/=]+)', page).group(1))))
    assert jpeg.size == (160, 100)


def test_report_needs_a_folder(image_folder, capsys):
    assert run_class_finetuning.run(RUN + ['--data_path=' + image_folder(), '--report']) == 2
    assert '--report needs --output_dir' in capsys.readouterr().err


def test_a_report_without_evaluation(image_folder, tmp_path):
    assert run_class_finetuning.run(RUN + ['--data_path=' + image_folder(), '--epochs=1', '--report',
                                           '--disable_eval_during_finetuning', '--output_dir=%s' % tmp_path]) == 0
    assert 'Nothing was evaluated' in page_of(str(tmp_path)) and loaded(tmp_path, 'summary.json')['accuracy'] is None


def test_a_finished_run_says_nothing_of_so_far(run):
    assert 'so far' not in re.sub(r'src="[^"]*"', '', page_of(run[0]))


@needs_matplotlib
def test_ticks_of_the_learning_rate_are_exact():
    """0.00125 stood there as 0.0013."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    figure = Figure()
    FigureCanvasAgg(figure)
    axes = figure.add_subplot(1, 1, 1)
    curves_module.draw_panel(axes, curves_module.RATE, [curves_module.Curve('highest', '#000000', (1, 2), (0, 0.002))])
    figure.canvas.draw()
    shown = [label.get_text() for label in axes.get_yticklabels()]
    assert [float(each) for each in shown] == pytest.approx(list(axes.get_yticks()), rel=1e-9) and '0.00125' in shown


# ---- in a browser

def chromium(folder, *options):
    profile = os.path.join(str(folder), 'profile')
    done = subprocess.run(
        ['chromium', '--headless', '--no-sandbox', '--disable-gpu', '--no-first-run', '--disable-background-networking',
         '--disable-component-update', '--disable-sync', '--hide-scrollbars', '--disable-dev-shm-usage',
         '--virtual-time-budget=2000', '--user-data-dir=' + profile] + list(options),
        stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, timeout=120)
    assert done.returncode == 0
    return done.stdout.decode('utf-8', 'replace')


@needs_browser
@needs_matplotlib
@pytest.mark.parametrize('width, height', ((1280, 2400), (390, 3200)))
@pytest.mark.parametrize('scheme', ('light', 'dark'))
def test_the_report_in_a_browser(run, tmp_path, width, height, scheme):
    screenshot = str(tmp_path / 'screen.png')
    chromium(tmp_path, '--window-size=%d,%d' % (width, height), '--screenshot=' + screenshot,
             '--blink-settings=preferredColorScheme=%d' % (scheme == 'light'),
             'file://' + os.path.join(run[0], 'report.html'))
    with Image.open(screenshot) as picture:
        pixels = np.asarray(picture.convert('RGB')).astype(int)
    assert pixels.shape == (height, width, 3)
    ground = pixels[2, 2]
    assert ground.min() > 240 if scheme == 'light' else ground.max() < 40
    rows = (np.abs(pixels - ground).max(axis=2) > 60).any(axis=1)
    assert rows[:height // 2].mean() > 0.3  # text fills the whole page
    text = pixels[:height // 20].sum(axis=2)
    assert text.max() - text.min() > 500  # the title can be read
    assert ((np.abs(pixels - [47, 126, 216]).max(axis=2)) < 12).sum() > 50  # the curves' blue


@needs_browser
def test_nothing_scrolls_sideways_in_a_narrow_window(run, tmp_path):
    """In frames of these widths the page's own width fits, so no content is cut off."""
    widths = (320, 390, 768, 1280)
    asks = '<script>parent.postMessage([innerWidth, document.documentElement.scrollWidth], "*")</script></body>'
    (tmp_path / 'page.html').write_text(page_of(run[0]).replace('</body>', asks), encoding='utf-8')
    frames = ''.join('<iframe src="page.html" style="width:%dpx;height:600px;border:0"></iframe>' % width
                     for width in widths)
    (tmp_path / 'frames.html').write_text(
        '<body><p></p><script>onmessage = e => document.querySelector("p").append(e.data.join(":") + " ")</script>'
        + frames + '</body>')
    told = chromium(tmp_path, '--dump-dom', 'file://%s' % (tmp_path / 'frames.html'))
    told = re.search(r'<p>(.*?)</p>', told).group(1)
    assert sorted(told.split()) == sorted('%d:%d' % (width, width) for width in widths)


WIDE = """<script>onload = () => {
  const box = document.querySelector(".scroll"), style = getComputedStyle(box);
  document.title = [box.scrollWidth > box.clientWidth, style.overflowX, style.backgroundAttachment].join(" ")
}</script></body>"""


@needs_browser
def test_a_wide_table_scrolls_by_itself_and_shades_its_hidden_side(tmp_path):
    predictions, data = many_classes(tmp_path, classes=30)
    page = report_html.render(dict(data, matrix=predictions.matrix()))
    (tmp_path / 'page.html').write_text(page.replace('</body>', WIDE), encoding='utf-8')
    shown = chromium(tmp_path, '--window-size=390,900', '--dump-dom', 'file://%s' % (tmp_path / 'page.html'))
    assert re.search('<title>(.*?)</title>', shown).group(1) == 'true auto local, local, scroll, scroll'


# ---- TensorBoard

def images_of(folder):
    """{tag: [(step, pixels)]} of a TensorBoard folder."""
    found = {}
    for step, value in summaries(folder):
        if value.HasField('image'):
            picture = Image.open(io.BytesIO(value.image.encoded_image_string)).convert('RGB')
            found.setdefault(value.tag, []).append((step, np.asarray(picture)))
    return found


def test_tensorboard_shows_images_and_confusions(run, parse):
    out, data, folder, _ = run
    found = images_of(folder)
    (step, sheet), = found['images/training']
    assert step == 0 and sheet.shape == (4 * 34 - 2, 4 * 34 - 2, 3)
    args = parse('--config=%s/args.yaml' % out)
    train, _, classes = datasets.build_datasets(args)
    assert np.array_equal(sheet[:32, 34:66], samples_of(args, train, classes)[1][0])
    assert [step for step, _ in found['images/confusion']] == [0, 1, 2, 3]
    log = [line['test_acc1'] for line in log_of(out)]
    best = log.index(max(log))
    picture = found['images/confusion'][best][1]
    matrix = confusion_matrix(*by_hand(out, data)[2:4], labels=range(3))
    shares = matrix / matrix.sum(axis=1, keepdims=True)
    side = picture.shape[0] // 3
    shades = picture[side // 2::side, side // 2::side, 0].astype(float)  # red decreases with the share
    assert shades == pytest.approx(255 - np.sqrt(shares) * (255 - 23), abs=1)


def test_a_class_count_that_no_picture_shows():
    predictions = ConfusionMatrix(5000)
    predictions.counts[1, 2] = 1
    assert predictions.image() is None and ConfusionMatrix(3).image() is None


def test_captions_of_images_of_several_classes():
    assert report.caption(['cat', 'dog', 'owl'], [1., 0., 1.], None, 0.1) == 'cat, owl'
    assert report.caption(['cat', 'dog', 'owl'], [0., 0., 0.], None, 0.1) == 'none'
    assert report.caption(['cat', 'dog', 'owl'], 2, None, 0.1) == 'owl'
