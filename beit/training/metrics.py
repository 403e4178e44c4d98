"""Metrics of an evaluation: top-1, top-5 and loss, mean average precision, accuracy per class, real labels.

A metric is one class, here: its name in log.txt, TensorBoard and --results_file, its curve, its tile in the report, and
whether the best checkpoint is chosen by it are declared in it, and everybody else asks `METRICS`. Each metric is given
every batch, and computed at the end by all processes together. All give the same on any number of processes: they
count, or put the images back into their order first.
"""

import csv
import importlib.util
import io
import json
import math
import os
import re
from typing import Any, Dict, FrozenSet, List, NamedTuple, Optional, Sequence, Tuple

import numpy as np
import torch
import torch.nn.functional as F

from beit.data import subsets
from beit.distributed import collectives
from beit.errors import UserError, escape_text, guard_cell
from beit.files import atomic_write
from beit.files.regular_file import open_file

LOSS_UNIT = 2. ** -32  # losses are added up as whole multiples of this: the sum does not depend on the order


class Curve(NamedTuple):
    """A line in curves.png and the report."""
    panel: str  # its title
    label: str
    colour: str
    ema_colour: str  # of the averaged network's


class MetricSpec(NamedTuple):
    """A number that a metric gives, under this name in an evaluation's statistics and in --results_file."""
    name: str
    unit: str = ''
    line: str = ''  # in the line after an evaluation; such a figure goes to TensorBoard, too
    summary: str = ''  # its name in summary.json and, of a primary figure, among a checkpoint's bests
    title: str = ''  # for people, of a primary figure
    is_primary: bool = False  # the best checkpoint is that with the highest
    is_logged: bool = True  # is in log.txt
    curve: Optional[Curve] = None


class ReportEntry(NamedTuple):
    """A figure of summary.json at the top of the report."""
    summary: str
    of_training: str  # its title there
    of_evaluation: str
    form: str


class Metric:
    """What an evaluation reports; `update` and `compute` are called on every process.

    Attributes:
        figures (tuple of MetricSpec), tiles (tuple of ReportEntry): what it declares.
    """

    figures = ()  # type: Tuple[MetricSpec, ...]
    tiles = ()  # type: Tuple[ReportEntry, ...]

    def update(self, batch: Sequence[Any], output: torch.Tensor) -> Optional[Dict[str, torch.Tensor]]:
        """Take a batch.

        Args:
            batch (loader.Batch): its targets are where `output` is.
            output (float32 (B, classes)): what the network gave for it.

        Returns:
            Means over the batch for the log line, 0-dim tensors on the device, or None.
        """
        raise NotImplementedError

    def compute(self, sharded: bool, device: torch.device) -> Dict[str, Any]:
        """The figures by name. `sharded`: each process was given another part of the images."""
        raise NotImplementedError

    @staticmethod
    def message(stats: Dict[str, Any]) -> str:
        """A line of its own after the evaluation, or ''."""
        return ''


class TopAccuracy(Metric):
    """Top-1 and top-5 in percent, of images with one class each; counted on the device."""

    figures = (MetricSpec('acc1', '%', 'Acc@1 %.3f', 'accuracy', 'Accuracy', is_primary=True,
                          curve=Curve('Accuracy', 'top-1', '#2f7ed8', '#e07b00')),
               MetricSpec('acc5', '%', 'Acc@5 %.3f', 'top5', curve=Curve('Accuracy', 'top-5', '#1fa187', '#c0569b')))
    tiles = (ReportEntry('accuracy', 'Best accuracy, top-1', 'Accuracy, top-1', '%.2f %%'),
             ReportEntry('top5', 'Top-5', 'Top-5', '%.2f %%'),
             ReportEntry('ema_accuracy', 'Accuracy of the EMA', 'Accuracy of the EMA', '%.2f %%'))

    def __init__(self):
        self.counts = None  # int64 (3,) on the device: top-1, top-5, images

    def update(self, batch: Sequence[Any], output: torch.Tensor) -> Optional[Dict[str, torch.Tensor]]:
        hits = output.topk(min(5, output.shape[1]), dim=1).indices == batch[1][:, None]
        counts = torch.stack((hits[:, 0].sum(), hits.sum(), hits.new_ones(len(hits), dtype=torch.int64).sum()))
        self.counts = counts if self.counts is None else self.counts + counts
        return {'acc1': 100 * hits[:, 0].float().mean()}

    def compute(self, sharded: bool, device: torch.device) -> Dict[str, Any]:
        counts = [0, 0, 0] if self.counts is None else self.counts.tolist()
        top1, top5, images = sum_counts(counts, sharded, device)
        return {'acc1': percent(top1, images), 'acc5': percent(top5, images)}


class Loss(Metric):
    """Cross entropy per image; of images with several classes the binary one, averaged over the classes.

    The sum is the same bits on any number of processes: losses are added up as whole numbers.
    """

    figures = (MetricSpec('loss', '', 'loss %.3f', 'loss', curve=Curve('Loss', 'validation', '#2f7ed8', '#e07b00')),
               MetricSpec('images', summary='images', is_logged=False))
    tiles = (ReportEntry('loss', 'Last training loss', 'Loss', '%.4f'),)

    def __init__(self):
        self.losses = []

    def update(self, batch: Sequence[Any], output: torch.Tensor) -> Optional[Dict[str, torch.Tensor]]:
        targets = batch[1]
        self.losses.append(
            F.cross_entropy(output, targets, reduction='none') if targets.dim() == 1 else
            F.binary_cross_entropy_with_logits(output, targets, reduction='none').mean(dim=1))
        return {'loss': self.losses[-1].mean()}

    def compute(self, sharded: bool, device: torch.device) -> Dict[str, Any]:
        """{'loss': not a number where that of an image isn't finite, 'images': how many were evaluated}"""
        losses = torch.cat(self.losses).cpu().double() if self.losses else torch.zeros(0, dtype=torch.float64)
        finite = torch.isfinite(losses) & (losses < 2. ** 24)
        units = int((losses[finite] / LOSS_UNIT).round().to(torch.int64).sum())
        units, not_finite, images = sum_counts([units, int((~finite).sum()), len(losses)], sharded, device)
        return {'loss': math.nan if not_finite or not images else units * LOSS_UNIT / images, 'images': images}


def sum_counts(counts: Sequence[int], sharded: bool, device: torch.device) -> List[int]:
    """Whole numbers of this process, of any size; added up over the processes where each has seen another part."""
    return [sum(column) for column in zip(*collectives.all_gather_json(counts, device))] if sharded else list(counts)


def percent(part: int, whole: int) -> float:
    return 100. * part / whole if whole else math.nan


class MeanAveragePrecision(Metric):
    """mAP in percent: the average precision of each class that an image is of, averaged over these classes.

    Scores and targets of all images are kept: 8 bytes per image and class.

    Args:
        classes (sequence of str): whose own figures are wanted, too; or ().
    """

    figures = (MetricSpec('mAP', '%', 'mAP %.3f', 'mAP', 'mAP', is_primary=True),)

    def __init__(self, classes=()):
        self.classes = classes
        self.outputs, self.targets, self.indices = [], [], []

    def update(self, batch: Sequence[Any], output: torch.Tensor) -> None:
        self.outputs.append(output.cpu())
        self.targets.append(batch[1].cpu())
        self.indices.append(batch[2].cpu())

    def compute(self, sharded: bool, device: torch.device) -> Dict[str, Any]:
        """{'mAP': percent}; not a number where an output isn't one, or no image is of any class."""
        columns: List[Any] = [
            torch.cat(parts) if parts else None for parts in (self.outputs, self.targets, self.indices)]
        if sharded:
            columns = collectives.all_gather_rows(columns, device)
        outputs, targets, indices = columns
        order = indices.argsort()
        targets, outputs = targets[order].numpy(), outputs[order].numpy()
        each = average_precisions(targets, outputs)
        stats: Dict[str, Any] = {'mAP': 100. * float(np.mean(list(each.values()))) if each else float('nan')}
        if len(self.classes):
            stats['classes'] = [{'class': escape_text(name), 'images': int(targets[:, label].sum()),
                                 'average_precision': 100. * each[label] if label in each else None}
                                for label, name in enumerate(self.classes)]
        return stats


def average_precisions(targets: np.ndarray, outputs: np.ndarray) -> Dict[int, float]:
    """{class index: scikit-learn's average precision} of the classes with a positive; {} where an output isn't finite.

    Args:
        targets, outputs (arrays (images, classes)): ones and zeros; scores.
    """
    from sklearn.metrics import average_precision_score  # slow to import

    if not np.isfinite(outputs).all():
        return {}
    return {int(label): float(average_precision_score(targets[:, label], outputs[:, label]))
            for label in np.flatnonzero(targets.any(axis=0))}


class PerClass(Metric):
    """Of each class, how many images there are and how many of them are right."""

    def __init__(self, classes):
        self.classes, self.counts = classes, np.zeros((len(classes), 2), dtype=np.int64)

    def update(self, batch: Sequence[Any], output: torch.Tensor) -> None:
        targets, right = batch[1].cpu().numpy(), (output.argmax(-1) == batch[1]).cpu().numpy()
        self.counts += np.stack([np.bincount(each, minlength=len(self.classes)) for each in (targets, targets[right])],
                                axis=1)

    def compute(self, sharded: bool, device: torch.device) -> Dict[str, Any]:
        """{'classes': [{class, images, acc1 in percent, or None without images}]}"""
        counts = np.sum(collectives.all_gather_json(self.counts.tolist(), device), axis=0) if sharded else self.counts
        return {'classes': [{'class': escape_text(name), 'images': int(images),
                             'acc1': 100. * int(right) / int(images) if images else None}
                            for name, (images, right) in zip(self.classes, counts)]}


class RealLabels(Metric):
    """Accuracy by ImageNet's reassessed labels ("Are we done with ImageNet?", https://arxiv.org/abs/2006.07159).

    An image may have several right labels; one that has none is not counted.

    Args:
        labels (list of sets of int): class indices of ILSVRC2012_val_00000001 and so on.
        samples: the validation set's, (path, class index) of each.
        source (str): the file that the labels are of.

    Raises:
        UserError: a file is not named so.
    """

    figures = (MetricSpec('real_acc1', '%'), MetricSpec('real_acc5', '%'), MetricSpec('real_images'))

    def __init__(self, labels, samples, source='labels'):
        self.right = [labels[place_of(samples[index][0], len(labels), source)] for index in range(len(samples))]
        self.counts = np.zeros(3, dtype=np.int64)

    def update(self, batch: Sequence[Any], output: torch.Tensor) -> None:
        top = output.topk(min(5, output.shape[1]), dim=1).indices.tolist()
        for index, best in zip(batch[2].tolist(), top):
            right = self.right[index]
            if right:
                self.counts += (1, best[0] in right, not right.isdisjoint(best))

    def compute(self, sharded: bool, device: torch.device) -> Dict[str, Any]:
        """{'real_acc1', 'real_acc5': percent, 'real_images': how many were counted}"""
        images, top1, top5 = sum_counts(self.counts.tolist(), sharded, device)
        return {'real_acc1': percent(top1, images), 'real_acc5': percent(top5, images), 'real_images': images}

    @staticmethod
    def message(stats: Dict[str, Any]) -> str:
        return 'By real labels: top-1 %.3f%%, top-5 %.3f%% of %d images' % (
            stats['real_acc1'], stats['real_acc5'], stats['real_images'])


def place_of(path: str, images: int, source: str) -> int:
    """Which image of ImageNet's validation set a file is, from 0; UserError where `source` has no labels of it."""
    found = re.match(r'ILSVRC2012_val_(\d{8})\.', os.path.basename(path))
    if not found or not 1 <= int(found.group(1)) <= images:
        raise UserError('--real_labels %s: its list is of %d images, ILSVRC2012_val_00000001.JPEG to _%08d.JPEG, and '
                        '%s is none of them; it is for ImageNet\'s validation set only' % (
                            escape_text(source), images, images, escape_text(path)))
    return int(found.group(1)) - 1


def read_real_labels(path: str, classes: int) -> List[FrozenSet[int]]:
    """A list of sets of class indices below `classes`, of a JSON file that holds a list of lists."""
    flag = '--real_labels %s' % escape_text(path)
    try:
        with open_file(path) as file:
            content = json.loads(file.read().decode('utf-8'))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError('%s: cannot be read as JSON (%s)' % (flag, getattr(error, 'strerror', None)
                                                             or ' '.join(str(error).split())[:100])) from None
    if not isinstance(content, list) or not content:
        raise UserError('%s: must be a list, of the right class indices of each validation image' % flag)
    for number, each in enumerate(content, 1):
        if not isinstance(each, list) or not all(type(label) is int and 0 <= label < classes for label in each):
            raise UserError('%s, image %d: must be a list of class indices below %d, is %s' % (
                flag, number, classes, escape_text(json.dumps(each)[:60])))
    return [frozenset(each) for each in content]


# ---- all of them

METRICS = (TopAccuracy, MeanAveragePrecision, Loss, PerClass, RealLabels)
FIGURES = tuple(figure for metric in METRICS for figure in metric.figures)


def build_metrics(dataset: Any, results_file: str = '', real_labels: str = '', data_set: str = '') -> List[Metric]:
    """What an evaluation of this validation set reports, in the order of a --results_file; anew for each evaluation.

    Args:
        results_file, real_labels, data_set (str): the flags of these names.
    """
    if subsets.is_multi_label(getattr(dataset, 'samples', None)):
        return [Loss(), MeanAveragePrecision(dataset.classes if results_file else ())]
    found = [TopAccuracy(), Loss()]  # type: List[Metric]
    if results_file:
        found.append(PerClass(dataset.classes))
    if real_labels:
        if not hasattr(dataset, 'samples'):
            raise UserError('--real_labels: --data_set %s has no image files; leave it out' % data_set)
        labels = read_real_labels(real_labels, len(dataset.classes))
        found.append(RealLabels(labels, dataset.samples, real_labels))
    return found


def check_metrics(dataset: Any, results_file: str = '', real_labels: str = '', data_set: str = '') -> None:
    """Raise a `UserError` where a metric can't be had for this validation set. Cheap, so that it can come first."""
    if subsets.is_multi_label(getattr(dataset, 'samples', None)) and importlib.util.find_spec('sklearn') is None:
        raise UserError('mean average precision needs scikit-learn; run: pip install scikit-learn')
    build_metrics(dataset, results_file, real_labels, data_set)


def primary_metric(stats: Dict[str, Any]) -> MetricSpec:
    """The figure by which the best checkpoint is chosen: top-1, or mAP."""
    return next(figure for figure in FIGURES if figure.is_primary and figure.name in stats)


def primary_percent(stats: Optional[Dict[str, Any]], best: Dict[str, float]) -> Optional[Tuple[float, float]]:
    """(that figure, the best one so far); None without statistics."""
    if stats is None:
        return None
    figure = primary_metric(stats)
    return stats[figure.name], best.get(figure.summary, math.nan)


def log_line(stats: Dict[str, Any]) -> str:
    return ' '.join(figure.line % stats[figure.name] for figure in FIGURES if figure.line and figure.name in stats)


def logged(stats: Dict[str, Any]) -> Dict[str, Any]:
    """Those for log.txt."""
    hidden = {figure.name for figure in FIGURES if not figure.is_logged}
    return {name: value for name, value in stats.items() if name not in hidden}


def plotted(stats: Dict[str, Any]) -> Dict[str, float]:
    """Those for TensorBoard."""
    return {figure.name: stats[figure.name] for figure in FIGURES if figure.line and figure.name in stats}


def summary_figures(stats: Dict[str, Any]) -> Dict[str, Any]:
    """An evaluation's figures under their names in summary.json; None for those that are missing."""
    return {figure.summary: stats.get(figure.name) for figure in FIGURES if figure.summary}


def best_figures(best: Dict[str, float]) -> Dict[str, Optional[float]]:
    """A training's best figures under their names in summary.json."""
    return {figure.summary: best.get(figure.summary) for figure in FIGURES if figure.is_primary}


def curves(panel: str) -> List[Tuple[str, str, str]]:
    """(label, name in log.txt, colour) of a panel's curves, the averaged network's behind the others."""
    found = [(figure.name, figure.curve) for figure in FIGURES if figure.curve and figure.curve.panel == panel]
    return [(curve.label, 'test_' + name, curve.colour) for name, curve in found] + [
        (curve.label + ', EMA', 'test_ema_' + name, curve.ema_colour) for name, curve in found]


# ---- --results_file

RESULT_FILES = ('.csv', '.json')


def check_results_file(path: str) -> None:
    """Raise a `UserError` where --results_file can't be."""
    if os.path.splitext(path)[1] not in RESULT_FILES:
        raise UserError('--results_file %s: it must end in %s' % (escape_text(path), ' or '.join(RESULT_FILES)))
    if os.path.isdir(path):
        raise UserError('--results_file %s: there is a folder of that name' % escape_text(path))


def write_results(path: str, rows: List[Dict[str, Any]]) -> None:
    """Write the figures of each evaluated network: a row of CSV, or a dict in a JSON list, there with its classes."""
    if path.endswith('.json'):
        data = json.dumps(rows, indent=2, ensure_ascii=False) + '\n'
    else:
        rows = [{name: value for name, value in row.items() if name != 'classes'} for row in rows]
        text = io.StringIO()
        table = csv.DictWriter(text, list(rows[0]), lineterminator='\n')
        table.writeheader()
        table.writerows({name: guard_cell(value) for name, value in row.items()} for row in rows)
        data = text.getvalue()
    os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
    atomic_write.write_bytes(path, data.encode('utf-8', 'backslashreplace'), is_given=True)
