"""The report of a run: curves and TensorBoard images during training, summary.json and report.html at its end."""

import contextlib
import io
import itertools
import json
import math
import os
import re
import time
from typing import Any, Callable, Dict, List, Optional, Sequence, Tuple

import numpy as np
import torch
from einops import rearrange

from beit.checkpoint import discovery
from beit.config import MixupConfig, OutputConfig, TransformConfig
from beit.data import transforms
from beit.data.device_loader import PrefetchLoader, RandomErasingBoxes, as_rgb
from beit.data.image_dataset import image_name
from beit.data.loader import EpochSampler, SeededDataset, collate
from beit.distributed import process_group
from beit.errors import UserError, escape_text
from beit.files import run_folder
from beit.files.atomic_write import write_bytes
from beit.log import log_main
from beit.outputs import args_yaml, curves, report_html, run_log
from beit.training import metrics
from beit.training.confusion import ConfusionMatrix, EvaluatedImage

run_folder.register_output(r'(eval-)?args\.yaml')
run_folder.register_output(r'(eval-)?report\.html', at_end=True)
run_folder.register_output(r'confusions\.json')

SAMPLES = 16  # augmented training images in the report
OF_BEST = 'the best one; its weights are in checkpoint-best.pth'
MARKER = '#010203'  # matplotlib's text colour, to be replaced by the page's


class Report:
    """Collects a run's results, on every process, and writes its report, on the first one.

    Args:
        output: the files to write, and all flags.
        environment: the entries of summary.json beside the figures.
        val_set: the validation set, or None.
        samples: returns `augmented_samples`.
        prefix: of the file names; 'eval-' keeps an evaluation from replacing a training's files.
    """

    def __init__(self, output: OutputConfig, environment: Dict[str, Any], classes: Sequence[str], val_set: Any,
                 samples: Callable[[], List[Tuple[np.ndarray, str]]], prefix: str = '') -> None:
        self.output, self.environment, self.classes, self.val_set = output, environment, classes, val_set
        self.make_samples, self.prefix, self.has_log = samples, prefix, not prefix
        self.curves = curves.Curves(output.output_dir if output.curves and not prefix else '', len(classes))
        self.newest: Optional[ConfusionMatrix] = None  # of the evaluation in progress
        self.best: Optional[ConfusionMatrix] = None  # of the best epoch
        self.best_epoch = -1
        self.confusions = os.path.join(output.output_dir, 'confusions.json')  # of the best epoch, for a resume
        self.samples: List[Tuple[np.ndarray, str]] = []
        self.evaluated, self.has_args = 'Nothing was evaluated, so there are no accuracies and confusions.', False

    def begin(self, writer: Any) -> None:
        """Before the first step: make the augmented images for the report and TensorBoard."""
        if (self.output.report or writer is not None) and process_group.is_main_process():
            self.samples = self.make_samples()
        if writer is not None and self.samples:
            writer.image('images/training', 0, image_grid([pixels for pixels, _ in self.samples]))

    def predictions(self, multi_label: bool, activation: str) -> Optional[ConfusionMatrix]:
        """The matrix for the next evaluation to fill; None if no output needs it, or images have several classes."""
        is_needed = (self.output.report or self.output.log_dir) and not multi_label
        self.newest = ConfusionMatrix(len(self.classes), activation) if is_needed else None
        return self.newest

    def after_epoch(self, writer: Any, epoch: int, is_best: bool) -> None:
        """Draw the curves, keep the best evaluation, write confusions to TensorBoard."""
        if self.newest is not None and self.newest.counts:
            if writer is not None:
                self.draw_confusions(writer, epoch)
            if is_best or self.best is None:
                self.best, self.best_epoch = self.newest, epoch
                self.evaluated = 'Of epoch %d, %s.' % (epoch + 1, OF_BEST if is_best else
                                                       'the best one since a resume; an earlier one was better')
            if is_best and self.output.report and process_group.is_main_process():
                with run_log.best_effort():
                    content = run_log.nonfinite_to_none(dict(self.best.state(), epoch=epoch, classes=len(self.classes)))
                    write_bytes(self.confusions, json.dumps(content).encode())
        self.newest = None
        self.write_args()
        self.curves.draw()

    def draw_confusions(self, writer: Any, epoch: int) -> None:
        image = None if self.newest is None else self.newest.image()
        if image is not None:
            writer.image('images/confusion', epoch, image)

    def write_args(self) -> None:
        """Write args.yaml once, after the first epoch: a run that fails at its first step leaves no file."""
        folder = self.output.output_dir
        if folder and not self.has_args and process_group.is_main_process():
            with run_log.best_effort():
                os.makedirs(folder, exist_ok=True)
                args_yaml.write(os.path.join(folder, self.prefix + 'args.yaml'), self.output.flags)
        self.has_args = True

    def recall_best(self, epoch: int) -> None:
        """After a resume: read the confusions of the best epoch from its file, if that epoch came before."""
        with contextlib.suppress(OSError, ValueError, TypeError, KeyError), open(self.confusions, 'rb') as file:
            content = json.load(file)
            best = ConfusionMatrix(len(self.classes))
            best.load_state(content)
            if (content['epoch'], content['classes']) == (epoch, len(self.classes)):
                self.best, self.evaluated = best, 'Of epoch %d, %s.' % (epoch + 1, OF_BEST)

    def of_weights(self, source: str) -> None:
        """After --eval: report the weights of a file. With a file of output_dir, the report has its curves."""
        self.best, self.evaluated = self.newest, 'Of the weights in %s.' % escape_text(source)
        self.has_log = discovery.is_inside(source, self.output.output_dir)

    def finish(self, figures: Dict[str, Any]) -> None:
        """Write all files at the end. `figures`: the run's results, for summary.json."""
        self.write_args()
        self.curves.draw(is_last=True)
        log = run_folder.read_log(self.output.output_dir) if self.has_log else []
        line = best_epoch(log)
        if not self.prefix:
            figures = dict({spec.summary: line['test_' + spec.name] for spec in metrics.metric_specs(line)
                            if spec.summary and spec.name != 'loss' and 'test_' + spec.name in line}, **figures)
        figures = dict(figures, finished=time.strftime('%Y-%m-%dT%H:%M:%S%z'))
        run_log.write_summary(self.output.output_dir, dict(figures, **self.environment), self.prefix + 'summary.json')
        if self.output.report and process_group.is_main_process():
            self.write_page(figures, log, line)

    def is_complete(self) -> bool:
        """Whether the files of `finish` exist."""
        names = ['args.yaml', 'summary.json'] + ['report.html'] * self.output.report
        folder = self.output.output_dir
        return not folder or all(os.path.isfile(os.path.join(folder, self.prefix + name)) for name in names)

    def write_page(self, figures: Dict[str, Any], log: List[Dict[str, Any]], line: Dict[str, Any]) -> None:
        """Write report.html, with the best epoch's line of log.txt."""
        path = os.path.join(self.output.output_dir, self.prefix + 'report.html')
        plots, hint = svg_plots(log, len(self.classes))
        if line and not self.prefix and line['epoch'] != self.best_epoch:
            self.recall_best(line['epoch'])
        best, flags = self.best or ConfusionMatrix(0), self.output.flags
        tiles, facts = summary_tiles(figures, self.environment, line)
        page = report_html.render(dict(
            title='%s on %s' % (flags['model'], flags['data_path'] or flags['eval_data_path']), plots=plots, hint=hint,
            subtitle='%s on %s, %s. Finished %s.' % (
                'Evaluated' if self.prefix else 'Trained', self.environment['device_name'],
                self.environment['precision'], figures['finished'][:16].replace('T', ' ')),
            tiles=tiles, facts=facts, evaluated=self.evaluated,
            classes=[str(name) for name in self.classes], per_class=self.best and best.per_class(),
            figures=best.figures, confused=best.most_confused(),
            matrix=best.matrix() if len(self.classes) <= report_html.HEAT_MAP_UP_TO else None,
            hardest=self.look_up(best.hardest), most_confident=self.look_up(best.most_confident),
            samples=self.samples, flags=[(name, text_of(value)) for name, value in sorted(flags.items())],
            versions=[(name + ' version', text_of(value)) for name, value in run_log.versions().items()]))
        write_bytes(path, page.encode('utf-8', 'backslashreplace'))
        log_main('Report: %s' % path)

    def look_up(self, images: Sequence[EvaluatedImage]) -> List[Tuple[np.ndarray, EvaluatedImage, str]]:
        """(model's input pixels, result, path) of validation images, without files that are gone."""
        found = []
        for image in images:
            with contextlib.suppress(OSError, UserError):
                pixels = as_rgb(np.asarray(self.val_set[image.index][0]))
                found.append((pixels, image, image_name(self.val_set, image.index)))
        return found


def text_of(value: Any) -> str:
    return '-' if value is None or value == '' else 'on' if value is True else 'off' if value is False else str(value)


def summary_tiles(figures: Dict[str, Any], environment: Dict[str, Any],
                  line: Dict[str, Any]) -> Tuple[List[Tuple[str, str]], List[Tuple[str, str]]]:
    """((name, text) of the results, (name, text) of the facts of the run), without missing values.

    A training's results come from `line`, the best epoch in log.txt, also before a resume.
    """
    seconds = int(figures.get('duration_seconds') or 0)
    is_training = 'epochs' in figures
    specs = [spec for spec in metrics.metric_specs(line if is_training else figures)
             if spec.title and spec.above < environment['classes']]
    results = [(spec.title + ', best epoch' * is_training,
                line.get('test_' + spec.name) if is_training else figures.get(spec.summary or spec.name), spec.form)
               for spec in specs]
    results += [(spec.title + ' of the EMA', figures.get('ema_' + spec.summary), spec.form)
                for spec in specs if spec.is_primary]
    results.append(('Last training loss', figures.get('loss') if is_training else None, '%.4f'))
    facts = [('Time', '%d:%02d:%02d' % (seconds // 3600, seconds // 60 % 60, seconds % 60), '%s'),
             ('Images/s', figures.get('images_per_second'), '%.1f'),
             ('Milliseconds a step', figures.get('step_milliseconds'), '%.1f'),
             ('Epochs', figures.get('epochs'), '%d'), ('Parameters', environment['parameters'] / 1e6, '%.2f M'),
             ('Classes', environment['classes'], '%d'), ('Training images', environment['training_images'], '%d'),
             ('Validation images', environment['validation_images'], '%d'),
             ('In bad_images.txt', figures.get('bad_images') or None, '%d')]
    shown = [[(name, form % value) for name, value, form in part if value is not None] for part in (results, facts)]
    return shown[0], shown[1]


def best_epoch(log: Sequence[Dict[str, Any]]) -> Dict[str, Any]:
    """The line of log.txt by which the best checkpoint was chosen; {} without one."""
    last: Dict[str, Any] = next((line for line in reversed(log) if metrics.logged_primary(line, 'test_')), {})
    best, best_value = {}, None
    for line in log:
        if line.get('val_set') in (None, last.get('val_set')) and line.get('test_best_by') == last.get('test_best_by'):
            figure = metrics.logged_primary(line, 'test_')
            if figure is not None and figure[0].is_better(figure[1], best_value):
                best, best_value = line, figure[1]
    return best


# ---- pictures

def augmented_samples(train_set: Any, classes: Sequence[str], transform: TransformConfig, mixing: MixupConfig,
                      seed: int) -> List[Tuple[np.ndarray, str]]:
    """[(pixels uint8 (H, W, 3), caption)] of the first training images as the model sees them, after mixup.

    Does not change the run's random numbers. Gives [] at an unreadable file, which the run reports.
    """
    evaluation = transforms.EvalTransform.from_config(transform)
    loader = PrefetchLoader(None, torch.device('cpu'), evaluation.mean, evaluation.std, remode=transform.remode)
    erasing = RandomErasingBoxes(transform.reprob, transform.recount) if transform.reprob > 0 else None
    samples = SeededDataset(train_set, seed, True, erasing)
    try:
        items = [samples[each] for each in itertools.islice(EpochSampler(len(train_set), seed=seed), SAMPLES)]
    except UserError:
        return []
    batch = loader.prepare(collate(items, transform.input_size))
    if not len(batch.images):
        return []
    images, mixup = batch.images, transforms.build_mixup(mixing, len(classes))
    shares: Any = [None] * len(images)
    if mixup is not None:
        state = np.random.get_state()
        try:
            np.random.seed(seed % 2 ** 32)
            images, shares = mixup(images.clone(), batch.targets)
        finally:
            np.random.set_state(state)
    captions = [caption(classes, *each, mixing.smoothing) for each in zip(batch.targets.tolist(), shares)]
    return list(zip(loader.denormalize(images).numpy(), captions))


def caption(classes: Sequence[str], target: Any, shares: Optional[torch.Tensor], smoothing: float) -> str:
    """The class of an image, or the mixed classes with their shares."""
    if isinstance(target, list):  # of several classes, or of none
        return ', '.join(str(name) for name, share in zip(classes, target) if share > 0.5) or 'none'
    if shares is None:
        return str(classes[target])
    shares = (shares - smoothing / len(classes)) / max(1 - smoothing, 1e-6)
    top = [label for label in shares.argsort(descending=True).tolist()[:2] if shares[label] > 0.005]
    return ' + '.join('%s %.0f %%' % (classes[label], 100 * float(shares[label])) for label in top) \
        if len(top) > 1 else str(classes[top[0] if top else target])


def image_grid(pictures: Sequence[np.ndarray]) -> np.ndarray:
    """Arrange pictures in rows of four with a gap of two pixels: uint8 (H, W, 3)."""
    rows, side = -(-len(pictures) // 4), len(pictures[0]) + 2
    cells = np.full((rows * 4, side, side, 3), 255, np.uint8)
    cells[:len(pictures), :-2, :-2] = pictures
    return rearrange(cells, '(rows columns) h w c -> (rows h) (columns w) c', rows=rows)[:-2, :-2]


def svg_plots(log: Sequence[Dict[str, Any]], classes: float = math.inf) -> Tuple[List[str], str]:
    """(SVG texts of the curves, '') or ([], the reason without them). Their text has the page's colour."""
    if not log:
        return [], ''
    try:
        import matplotlib
        from matplotlib.backends.backend_svg import FigureCanvasSVG
        from matplotlib.figure import Figure
        plots = []
        style: Any = dict.fromkeys(('text.color', 'axes.labelcolor', 'xtick.color', 'ytick.color', 'axes.edgecolor'),
                                   MARKER)
        with matplotlib.rc_context(dict(style, **{'svg.fonttype': 'none', 'font.family': 'sans-serif'})):
            for title, drawn in curves.panels(log, classes).items():
                matplotlib.rcParams['svg.hashsalt'] = title  # ids must differ within the page
                figure, file = Figure(figsize=(4.6, 3.4)), io.StringIO()
                FigureCanvasSVG(figure)
                axes = figure.add_subplot(1, 1, 1)
                curves.draw_panel(axes, title, drawn)
                figure.tight_layout(pad=0.6)
                figure.patch.set_alpha(0)
                axes.patch.set_alpha(0)
                figure.savefig(file, format='svg')
                plots.append(_for_page(file.getvalue(), title))
        return plots, ''
    except Exception as error:  # of matplotlib; the page does without curves
        hint = curves.failure_message('A report with curves', error)
        log_main(hint)
        return [], hint


def _for_page(svg: str, title: str) -> str:
    """Turn matplotlib's SVG file into a part of the page: without prologue, metadata and namespaces."""
    svg = re.sub(r'<metadata>.*?</metadata>', '', svg[svg.index('<svg'):], flags=re.S)
    svg = re.sub(r'\s(xmlns(:\w+)?="[^"]*"|id="[\w.]+_\d+")', '', svg)  # ids of groups are equal in every plot
    svg = re.sub(r'<svg\b[^>]*?viewBox="([^"]*)"[^>]*>', r'<svg viewBox="\1" role="img" aria-label="%s">' % title, svg,
                 count=1)
    return svg.replace('xlink:href=', 'href=').replace(MARKER, 'currentColor')
