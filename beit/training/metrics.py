"""Metrics of an evaluation. A metric is one class, listed in `METRICS`, which declares where its figures appear.

Figures are the same on any number of processes: metrics count images, or restore their order first.
"""

import csv
import io
import json
import math
import os
import re
from typing import Any, Dict, FrozenSet, Iterable, List, Mapping, NamedTuple, Optional, Sequence, Tuple, Type

import numpy as np
import torch

from beit.data.image_dataset import ArrayDataset
from beit.distributed import collectives
from beit.errors import UserError, escape_text, guard_cell
from beit.files import atomic_write
from beit.files.archives import open_file
from beit.log import log_main
from beit.training import losses

LOSS_UNIT = 2. ** -32  # losses are summed as multiples of this: then the sum does not depend on the order
BINS = 15  # of the calibration error
BEST_BY = ('acc1', 'macro_f1', 'balanced_acc', 'loss', 'mAP')  # the values of --best_by


class MetricSpec(NamedTuple):
    """A figure of a metric, and where it appears. --results_file has all figures."""
    name: str  # in an evaluation's statistics and --results_file; in log.txt after test_ and test_ema_
    line: str = ''  # its text in the line after an evaluation; if set, TensorBoard has the figure too
    title: str = ''  # its name in the report; if set, the report has a tile and a curve
    unit: str = ''
    panel: str = ''  # the panel of its curve; by default a separate one
    curve: str = ''  # the label of its curve
    summary: str = ''  # its name in summary.json and, for a primary figure, in checkpoints
    is_primary: bool = False  # without --best_by, the best checkpoint has the highest value
    is_logged: bool = True  # appears in log.txt
    lowest_is_best: bool = False
    above: int = 0  # the report shows it for more classes than this

    @property
    def form(self) -> str:
        return '%.2f %%' if self.unit == '%' else '%.4f'

    def is_better(self, value: float, best: Optional[float]) -> bool:
        """Whether a value is better than the best one so far, or None; NaN never is."""
        sign = -1 if self.lowest_is_best else 1
        return sign * value > (-math.inf if best is None else sign * best)


class Evaluation(NamedTuple):
    """An evaluation's data and flags, which decide whether a metric applies."""
    dataset: Any  # the validation set
    results_file: str = ''  # this and the next two are flags
    real_labels: str = ''
    data_set: str = ''
    multi_label: bool = False  # images have any number of classes
    activation: str = 'softmax'  # from logits to probabilities; or 'sigmoid'
    topk: Sequence[int] = (1, 5)  # a flag
    outputs: Optional[Sequence[int]] = None  # the model's logits that are evaluated, in this order; None: all
    nb_classes: int = 0  # of the model, if `outputs` are some of them


class Metric:
    """Computes figures of a validation set. Each process calls `update` with its batches, then `compute`."""

    specs: Tuple[MetricSpec, ...] = ()
    message = ''  # a format string for a line after the evaluation

    @classmethod
    def create(cls, evaluation: Evaluation) -> Optional['Metric']:
        """A metric for this evaluation, or None if it does not apply. Raises `UserError` for unusable input."""
        return cls()

    def update(self, batch: Sequence[Any], output: torch.Tensor) -> Optional[Dict[str, torch.Tensor]]:
        """Add a `loader.Batch`, with targets on the device, and its logits, float32 (B, classes).

        Returns means over the batch for the progress line, as 0-dim tensors on the device, if any.
        """
        raise NotImplementedError

    def compute(self, sharded: bool, device: torch.device) -> Dict[str, Any]:
        """Return the figures by name. `sharded`: each process has evaluated another part of the images."""
        raise NotImplementedError


def top_spec(k: int) -> MetricSpec:
    return MetricSpec('acc%d' % k, 'Acc@%d %%.3f' % k, 'Accuracy' if k == 1 else 'Top-%d' % k, '%', 'Accuracy',
                      'top-%d' % k, 'accuracy' if k == 1 else 'top%d' % k, is_primary=k == 1, above=k if k > 1 else 0)


class TopAccuracy(Metric):
    """Top-1 and the other top-k of --topk in percent, for one class per image; counted on the device."""

    specs = (top_spec(1), top_spec(5))

    def __init__(self, topk: Sequence[int] = (1, 5)) -> None:
        self.topk = sorted({1, *topk})
        self.counts: Optional[torch.Tensor] = None  # int64 on the device: hits for each k, images

    @classmethod
    def create(cls, evaluation: Evaluation) -> Optional[Metric]:
        return None if evaluation.multi_label else cls(evaluation.topk)

    def update(self, batch: Sequence[Any], output: torch.Tensor) -> Optional[Dict[str, torch.Tensor]]:
        hits = top_classes(output, self.topk[-1]) == batch[1][:, None]
        counts = torch.stack([hits[:, :k].sum() for k in self.topk]
                             + [hits.new_ones(len(hits), dtype=torch.int64).sum()])
        self.counts = counts if self.counts is None else self.counts + counts
        return {'acc1': 100 * hits[:, 0].float().mean()}

    def compute(self, sharded: bool, device: torch.device) -> Dict[str, Any]:
        counts = [0] * (len(self.topk) + 1) if self.counts is None else self.counts.tolist()
        *hits, images = sum_counts(counts, sharded, device)
        return {'acc%d' % k: percent(part, images) for k, part in zip(self.topk, hits)}


class Loss(Metric):
    """The training loss per image: cross entropy, or for a sigmoid binary cross entropy, averaged over classes."""

    specs = (MetricSpec('loss', 'loss %.3f', 'Loss', '', 'Loss', 'validation', 'loss', lowest_is_best=True),
             MetricSpec('images', summary='images', is_logged=False))

    def __init__(self, activation: str = 'softmax') -> None:
        self.activation = activation
        self.losses: List[torch.Tensor] = []

    @classmethod
    def create(cls, evaluation: Evaluation) -> Optional[Metric]:
        return cls(evaluation.activation)

    def update(self, batch: Sequence[Any], output: torch.Tensor) -> Optional[Dict[str, torch.Tensor]]:
        self.losses.append(losses.image_losses(output, batch[1], self.activation))
        return {'loss': self.losses[-1].mean()}

    def compute(self, sharded: bool, device: torch.device) -> Dict[str, Any]:
        """{'loss': NaN if the loss of an image is not finite, 'images': their number}"""
        values = torch.cat(self.losses).cpu().double() if self.losses else torch.zeros(0, dtype=torch.float64)
        finite = torch.isfinite(values) & (values < 2. ** 24)
        units = int((values[finite] / LOSS_UNIT).round().to(torch.int64).sum())
        units, not_finite, images = sum_counts([units, int((~finite).sum()), len(values)], sharded, device)
        return {'loss': math.nan if not_finite or not images else units * LOSS_UNIT / images, 'images': images}


def top_classes(output: torch.Tensor, most: int) -> torch.Tensor:
    """Class indices by descending output, int64 (B, min(most, classes)); of equal outputs the lowest index first.

    `topk` orders ties differently by device and number of classes.
    """
    if most > 16:
        order = np.argsort(-output.cpu().numpy(), axis=1, kind='stable')[:, :most]
        return torch.from_numpy(np.ascontiguousarray(order)).to(output.device)
    every = torch.arange(output.shape[1], device=output.device).expand_as(output)
    left, found = torch.ones_like(every, dtype=torch.bool), []
    for _ in range(min(most, output.shape[1])):
        highest = output.masked_fill(~left, -math.inf).max(dim=1, keepdim=True).values
        is_highest = left & ~(output < highest)  # not >=, because of NaN
        found.append(every.masked_fill(~is_highest, output.shape[1]).min(dim=1).values)
        left = left & (every != found[-1][:, None])
    return torch.stack(found, dim=1)


def sum_counts(counts: Sequence[Any], sharded: bool, device: torch.device) -> List[Any]:
    """Integers of any size, summed over the processes if the set is sharded."""
    return np.sum(np.array(collectives.all_gather_json(counts, device), dtype=object), axis=0).tolist() \
        if sharded else list(counts)


def percent(part: int, whole: int) -> float:
    return 100. * part / whole if whole else math.nan


SCORES = ('precision', 'recall', 'f1')
AVERAGES = 'Precision, recall, F1: macro %s; weighted %s' % tuple(
    ', '.join('%%(%s_%s).3f%%%%' % (kind, score) for score in SCORES) for kind in ('macro', 'weighted'))


class MeanAveragePrecision(Metric):
    """mAP in percent: the mean of the average precisions of all classes with a positive image.

    It keeps 8 bytes per image and class. `classes`: names, for figures of each class. Precision, recall and F1 are of
    the classes with a probability above 0.5.
    """

    specs = (MetricSpec('mAP', 'mAP %.3f', 'mAP', '%', 'Accuracy', 'mAP', 'mAP', is_primary=True),)
    message = AVERAGES

    def __init__(self, classes: Sequence[str] = ()) -> None:
        self.classes = classes
        self.columns: Tuple[List[torch.Tensor], ...] = ([], [], [])  # outputs, targets, indices

    @classmethod
    def create(cls, evaluation: Evaluation) -> Optional[Metric]:
        return cls(evaluation.dataset.classes if evaluation.results_file else ()) if evaluation.multi_label else None

    def update(self, batch: Sequence[Any], output: torch.Tensor) -> None:
        targets = losses.one_hot(batch[1], output, 0.) if batch[1].dim() == 1 else batch[1]
        for column, values in zip(self.columns, (output, targets, batch[2])):
            column.append(values.cpu())

    def compute(self, sharded: bool, device: torch.device) -> Dict[str, Any]:
        """{'mAP': percent}; NaN if an output is NaN or no image has a class."""
        outputs, targets, indices = gather_batches(self.columns, sharded, device)
        order = indices.argsort()
        outputs, targets = outputs[order], targets[order]
        precisions = [average_precision(targets[:, label], outputs[:, label]) for label in range(targets.shape[1])]
        found = [value for value in precisions if value is not None]
        scores = class_scores(targets.astype(int), outputs > 0)
        stats: Dict[str, Any] = {'mAP': 100. * float(np.mean(found)) if found else math.nan, **averages(scores)}
        if len(self.classes):
            stats['classes'] = [
                {'class': escape_text(name), 'images': int(targets[:, label].sum()),
                 'average_precision': None if precision is None else 100. * precision,
                 **dict(zip(SCORES, scores[:3, label].tolist()))}
                for label, (name, precision) in enumerate(zip(self.classes, precisions))]
        return stats


def average_precision(targets: np.ndarray, scores: np.ndarray) -> Optional[float]:
    """The sum over thresholds of precision times the increase in recall, as scikit-learn's; None without a positive."""
    if not targets.any():
        return None
    if not np.isfinite(scores).all():
        return math.nan
    order = np.argsort(-scores, kind='stable')
    last_of_threshold = np.append(np.flatnonzero(np.diff(scores[order])), len(order) - 1)
    hits = np.cumsum(targets[order], dtype=np.float64)[last_of_threshold]
    return float(np.sum(np.diff(hits, prepend=0.) / hits[-1] * hits / (last_of_threshold + 1)))


class PerClass(Metric):
    """Precision, recall, F1 and balanced accuracy in percent, for one class per image.

    Averages are over the classes that occur as a label or as a prediction, as scikit-learn's are.
    """

    specs = (MetricSpec('macro_f1', '', 'Macro F1', '%', 'Accuracy', 'macro F1', 'macro_f1'),
             MetricSpec('balanced_acc', '', 'Balanced accuracy', '%', 'Accuracy', 'balanced accuracy', 'balanced_acc')
             ) + tuple(MetricSpec(name, unit='%', summary=name) for name in (
                 'macro_precision', 'macro_recall', 'weighted_precision', 'weighted_recall', 'weighted_f1'))
    message = AVERAGES + '; balanced accuracy %(balanced_acc).3f%%'

    def __init__(self, classes: Sequence[str]) -> None:
        self.classes = classes
        self.pairs: List[torch.Tensor] = []  # int64 (B,): class * classes + predicted class

    @classmethod
    def create(cls, evaluation: Evaluation) -> Optional[Metric]:
        return None if evaluation.multi_label else cls(evaluation.dataset.classes)

    def update(self, batch: Sequence[Any], output: torch.Tensor) -> None:
        self.pairs.append(batch[1] * len(self.classes) + top_classes(output, 1)[:, 0])

    def compute(self, sharded: bool, device: torch.device) -> Dict[str, Any]:
        """The averages, and 'classes': [{class, images, acc1, precision, recall, f1}]; None without images."""
        pairs, counts = np.unique(gather_batches([self.pairs], sharded, device)[0], return_counts=True)
        targets, predicted = np.divmod(pairs, len(self.classes))
        scores = class_scores(targets, predicted, counts)
        found = dict(zip(np.union1d(targets, predicted).tolist(), scores.T.tolist()))
        table = []
        for label, name in enumerate(self.classes):
            precision, recall, f1, images = found.get(label, (None,) * 3 + (0,))
            recall = recall if images else None
            table.append({'class': escape_text(name), 'images': int(images), 'acc1': recall, 'precision': precision,
                          'recall': recall, 'f1': f1})
        return dict(averages(scores), balanced_acc=float(scores[1, scores[3] > 0].mean()), classes=table)


def class_scores(targets: np.ndarray, predicted: np.ndarray, counts: Optional[np.ndarray] = None) -> np.ndarray:
    """Precision, recall and F1 in percent, and the number of images, of each class: float64 (4, classes).

    `targets`, `predicted`: class indices (n,), each pair `counts` times; or ones and zeros (images, classes).
    """
    from sklearn.metrics import precision_recall_fscore_support  # slow to import
    found = np.array(precision_recall_fscore_support(targets, predicted, sample_weight=counts, zero_division=0), float)
    return found * np.array([100., 100., 100., 1.])[:, None]


def averages(scores: np.ndarray) -> Dict[str, float]:
    """The mean over classes of `class_scores`, and the mean that is weighted by their images; NaN without images."""
    images = scores[3] if scores[3].any() else scores[3] + math.nan
    return {'%s_%s' % (kind, name): float(np.average(row, weights=weights))
            for kind, weights in (('macro', None), ('weighted', images)) for name, row in zip(SCORES, scores)}


class Calibration(Metric):
    """The expected calibration error in percent (Guo et al. 2017, https://arxiv.org/abs/1706.04599), with `BINS` bins.

    It compares the probability of the most likely class with how often that class is right; with several classes per
    image, the probability of every class with how often it is present.
    """

    specs = (MetricSpec('ece', '', 'Calibration error', '%', '', 'validation', 'ece', lowest_is_best=True),)
    message = 'Expected calibration error %(ece).3f%%'

    def __init__(self, activation: str = 'softmax', multi_label: bool = False) -> None:
        self.activation, self.multi_label = activation, multi_label
        self.columns: Tuple[List[torch.Tensor], ...] = ([], [], [])  # probabilities, right ones, indices

    @classmethod
    def create(cls, evaluation: Evaluation) -> Optional[Metric]:
        return cls(evaluation.activation, evaluation.multi_label)

    def update(self, batch: Sequence[Any], output: torch.Tensor) -> None:
        shares = torch.sigmoid(output) if self.activation == 'sigmoid' else torch.softmax(output, dim=1)
        if self.multi_label:
            right = (losses.one_hot(batch[1], output, 0.) if batch[1].dim() == 1 else batch[1]).cpu()
            shares = shares.cpu()
        else:
            predicted = top_classes(output, 1)
            shares, right = shares.gather(1, predicted), (predicted == batch[1][:, None]).float()
        for column, values in zip(self.columns, (shares, right, batch[2])):
            column.append(values)

    def compute(self, sharded: bool, device: torch.device) -> Dict[str, Any]:
        """{'ece': percent, 'reliability': [{probability, accuracy, images}] of the bins that are not empty}"""
        shares, right, indices = gather_batches(self.columns, sharded, device)
        order = indices.argsort()
        shares, right = np.nan_to_num(shares[order].ravel().astype(np.float64)), right[order].ravel()
        place = np.searchsorted(np.arange(1, BINS) / BINS, shares)
        images, hits, sums = (np.bincount(place, weights, BINS) for weights in (None, right, shares))
        return {'ece': 100. * float(np.abs(hits - sums).sum()) / len(shares),
                'reliability': [{'probability': float(sums[each] / images[each]), 'images': int(images[each]),
                                 'accuracy': float(hits[each] / images[each])} for each in np.flatnonzero(images)]}


def gather_batches(columns: Sequence[Sequence[torch.Tensor]], sharded: bool, device: torch.device) -> List[np.ndarray]:
    """The batches of each column as an array (rows, …); of all processes if the set is sharded."""
    joined = [torch.cat([each.cpu() for each in parts]) if parts else None for parts in columns]
    rows: Any = collectives.all_gather_rows(joined, device) if sharded else joined
    return [column.numpy() for column in rows]


class RealLabels(Metric):
    """Accuracy by ImageNet's reassessed labels ("Are we done with ImageNet?", https://arxiv.org/abs/2006.07159).

    An image may have several right labels; images without a label are not counted.

    Args:
        labels: class indices of ILSVRC2012_val_00000001 and the following images, from the file `source`.
        samples: (path, class index) of the validation images. Raises `UserError` for a file with another name.
    """

    specs = (MetricSpec('real_acc1', unit='%'), MetricSpec('real_acc5', unit='%'), MetricSpec('real_images'))
    message = 'By real labels: top-1 %(real_acc1).3f%%, top-5 %(real_acc5).3f%% of %(real_images)d images'

    def __init__(self, labels: Sequence[FrozenSet[int]], samples: Sequence[Any], source: str = 'labels') -> None:
        self.counts, self.right = np.zeros(3, dtype=np.int64), []
        for index in range(len(samples)):
            path = samples[index][0]
            found = re.match(r'ILSVRC2012_val_(\d{8})\.', os.path.basename(path))
            if not found or not 1 <= int(found.group(1)) <= len(labels):
                raise UserError(
                    '--real_labels %s: its list is of %d images, ILSVRC2012_val_00000001.JPEG to _%08d.JPEG, and %s is '
                    'none of them; it is for ImageNet\'s validation set only' % (
                        escape_text(source), len(labels), len(labels), escape_text(path)))
            self.right.append(labels[int(found.group(1)) - 1])

    @classmethod
    def create(cls, evaluation: Evaluation) -> Optional[Metric]:
        if evaluation.multi_label or not evaluation.real_labels:
            return None
        if isinstance(evaluation.dataset, ArrayDataset):
            raise UserError('--real_labels: --data_set %s has no image files; leave it out' % evaluation.data_set)
        labels = read_real_labels(evaluation.real_labels, evaluation.nb_classes or len(evaluation.dataset.classes))
        if evaluation.outputs is not None:
            places = {output: place for place, output in enumerate(evaluation.outputs)}
            labels = [frozenset(places[label] for label in each if label in places) for each in labels]
        return cls(labels, evaluation.dataset.samples, evaluation.real_labels)

    def update(self, batch: Sequence[Any], output: torch.Tensor) -> None:
        for index, best in zip(batch[2].tolist(), top_classes(output, 5).tolist()):
            right = self.right[index]
            if right:
                self.counts += (1, best[0] in right, not right.isdisjoint(best))

    def compute(self, sharded: bool, device: torch.device) -> Dict[str, Any]:
        """{'real_acc1', 'real_acc5': percent, 'real_images': the number of counted images}"""
        images, top1, top5 = sum_counts(self.counts.tolist(), sharded, device)
        return {'real_acc1': percent(top1, images), 'real_acc5': percent(top5, images), 'real_images': images}


def read_real_labels(path: str, classes: int) -> List[FrozenSet[int]]:
    """Read a JSON list of lists of class indices below `classes`."""
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


class OfLayers(Metric):
    """The figures of the head with the highest acc1 of a linear probe, from logits (B, layers, classes).

    `layers`, in addition: {number of the layer: figures}. The argument: the metrics of each head.
    """

    message = 'Best layer: %(best_layer)d'

    def __init__(self, layers: Sequence[Sequence[Metric]]) -> None:
        self.layers = layers

    def update(self, batch: Sequence[Any], output: torch.Tensor) -> Optional[Dict[str, torch.Tensor]]:
        shown: Dict[str, torch.Tensor] = {}  # of the last layer
        for metrics, logits in zip(self.layers, output.unbind(1)):
            for metric in metrics:
                shown.update(metric.update(batch, logits) or {})
        return shown

    def compute(self, sharded: bool, device: torch.device) -> Dict[str, Any]:
        figures = [{name: value for metric in metrics for name, value in metric.compute(sharded, device).items()}
                   for metrics in self.layers]
        best = max(range(len(figures)), key=lambda layer: figures[layer]['acc1'])
        return dict(figures[best], best_layer=best + 1, layers={
            str(layer): {name: value for name, value in logged(each).items() if isinstance(value, float)}
            for layer, each in enumerate(figures, 1)})


# ---- all of them

METRICS: Tuple[Type[Metric], ...] = (TopAccuracy, MeanAveragePrecision, Loss, PerClass, Calibration, RealLabels)


def metric_specs(names: Iterable[str] = ()) -> List[MetricSpec]:
    """All declared figures, in display order, with the top-k figures among these names of summary.json or log.txt."""
    topk = {1, 5} | {int(k) for name in names for k in re.findall(r'^(?:test_)?(?:acc|top)(\d+)$', name)}
    return [spec for metric in METRICS
            for spec in (map(top_spec, sorted(topk)) if metric is TopAccuracy else metric.specs)]


def build_metrics(evaluation: Evaluation) -> List[Metric]:
    """New metrics for an evaluation. Raises `UserError` where a flag does not fit the validation set."""
    return [metric for metric in (kind.create(evaluation) for kind in METRICS) if metric is not None]


def check_best_by(best_by: Optional[str], multi_label: bool) -> None:
    """Raise a `UserError` for a --best_by that images of this kind do not have; a line names what may keep it at 0."""
    wrong = ('acc1', 'balanced_acc') if multi_label else ('mAP',)
    if best_by in wrong:
        raise UserError('--best_by %s: the images have %s; give %s' % (
            best_by, 'several classes each' if multi_label else 'one class each',
            ' or '.join(name for name in BEST_BY if name not in wrong)))
    if multi_label and best_by == 'macro_f1':
        log_main('--best_by macro_f1 stays 0 until a class has a probability above 0.5; --best_by mAP needs none')


def primary_metric(stats: Mapping[str, Any], prefix: str = '') -> Any:
    """The `MetricSpec` that selects the best checkpoint: --best_by's, which `stats` names, else of top-1, or mAP.

    `stats`: an evaluation's figures, or a line of log.txt, where `prefix` begins their names. None without a figure.
    """
    best_by = stats.get(prefix + 'best_by')
    return next((spec for spec in metric_specs() if prefix + spec.name in stats
                 and (spec.name == best_by if best_by else spec.is_primary)), None)


def logged_primary(line: Mapping[str, Any], prefix: str) -> Optional[Tuple[MetricSpec, float]]:
    """(`primary_metric`, its value) of a line of log.txt; None where it has no finite one."""
    spec = primary_metric(line, prefix)
    value = spec and line[prefix + spec.name]
    return (spec, value) if isinstance(value, (int, float)) and math.isfinite(value) else None


def logged(stats: Dict[str, Any]) -> Dict[str, Any]:
    """The figures for log.txt, without tables."""
    hidden = {spec.name for spec in metric_specs() if not spec.is_logged}
    return {name: value for name, value in stats.items() if name not in hidden and not isinstance(value, list)}


def summary_figures(stats: Dict[str, Any]) -> Dict[str, Any]:
    """An evaluation's figures under their names in summary.json; missing ones are None."""
    return {spec.summary or spec.name: stats.get(spec.name) for spec in metric_specs(stats)
            if spec.summary or spec.name in stats}


def best_figures(best: Dict[str, float]) -> Dict[str, Optional[float]]:
    """The figures of the best checkpoints of a training, and of its average, under their names in summary.json."""
    return {'validation_loss' if name == 'loss' else name: best.get(name) for name in
            [prefix + spec.summary for prefix in ('', 'ema_') for spec in metric_specs() if spec.summary]
            if name in best or name.replace('ema_', '') in ('accuracy', 'mAP')}


# ---- --results_file

def write_results(path: str, rows: List[Dict[str, Any]]) -> None:
    """Write the figures of each evaluated network: a row of CSV, or a dict in a JSON list, which also has tables."""
    if path.endswith('.json'):
        data = json.dumps(rows, indent=2, ensure_ascii=False) + '\n'
    else:
        text = io.StringIO()
        table = csv.DictWriter(text, [name for name, value in rows[0].items() if not isinstance(value, list)],
                               extrasaction='ignore', lineterminator='\n')
        table.writeheader()
        table.writerows({name: guard_cell(value) for name, value in row.items()} for row in rows)
        data = text.getvalue()
    os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
    atomic_write.write_bytes(path, data.encode('utf-8', 'backslashreplace'), is_given=True)
