"""What an evaluation reports beside top-1, top-5 and loss: mean average precision, accuracy per class, real labels.

Each score is told of every batch, and asked at the end, by all processes together. All give the same on any number of
processes: they count, or put the images back into their order first.
"""

import csv
import importlib.util
import io
import json
import os
import re

import numpy as np
import torch

import distributed
import safe_files
import splits
from errors import UserError, escape_text
from image_files import open_file


def scores_for(args, dataset):
    """What an evaluation of this validation set is to report besides: a list, anew for each evaluation."""
    if splits.is_multi_label(getattr(dataset, 'samples', None)):
        return [MeanAveragePrecision(dataset.classes if args.results_file else ())]
    found = [PerClass(dataset.classes)] if args.results_file else []
    if args.real_labels:
        if not hasattr(dataset, 'samples'):
            raise UserError('--real_labels: --data_set %s has no image files; leave it out' % args.data_set)
        labels = read_real_labels(args.real_labels, len(dataset.classes))
        found.append(RealLabels(labels, dataset.samples, args.real_labels))
    return found


def best_by(stats):
    """The name of the figure that tells a better network: mAP, or top-1."""
    return 'mAP' if 'mAP' in stats else 'acc1'


class MeanAveragePrecision:
    """mAP in percent: the average precision of each class that an image is of, averaged over these classes.

    Scores and targets of all images are kept: 8 bytes per image and class.

    Args:
        classes (sequence of str): whose own figures are wanted, too; or ().
    """

    def __init__(self, classes=()):
        self.classes = classes
        self.outputs, self.targets, self.indices = [], [], []

    def add(self, batch, output):
        self.outputs.append(output.cpu())
        self.targets.append(batch[1].cpu())
        self.indices.append(batch[2].cpu())

    def result(self, sharded, device):
        """{'mAP': percent}; not a number where an output isn't one, or no image is of any class."""
        columns = [torch.cat(parts) if parts else None for parts in (self.outputs, self.targets, self.indices)]
        if sharded:
            columns = distributed.gather_rows(columns, device)
        outputs, targets, indices = columns
        order = indices.argsort()
        targets, outputs = targets[order].numpy(), outputs[order].numpy()
        each = average_precisions(targets, outputs)
        stats = {'mAP': 100. * float(np.mean(list(each.values()))) if each else float('nan')}
        if len(self.classes):
            stats['classes'] = [{'class': escape_text(name), 'images': int(targets[:, label].sum()),
                                 'average_precision': 100. * each[label] if label in each else None}
                                for label, name in enumerate(self.classes)]
        return stats


def average_precisions(targets, outputs):
    """{class index: scikit-learn's average precision} of the classes with a positive; {} where an output isn't finite.

    Args:
        targets, outputs (arrays (images, classes)): ones and zeros; scores.
    """
    from sklearn.metrics import average_precision_score  # slow to import

    if not np.isfinite(outputs).all():
        return {}
    return {int(label): float(average_precision_score(targets[:, label], outputs[:, label]))
            for label in np.flatnonzero(targets.any(axis=0))}


def check_scores(args, dataset):
    """Raise a `UserError` where a score cannot be had of this validation set. Cheap, so that it can come first."""
    if splits.is_multi_label(getattr(dataset, 'samples', None)) and importlib.util.find_spec('sklearn') is None:
        raise UserError('mean average precision needs scikit-learn; run: pip install scikit-learn')
    scores_for(args, dataset)


class PerClass:
    """Of each class, how many images there are and how many of them are right."""

    def __init__(self, classes):
        self.classes, self.counts = classes, np.zeros((len(classes), 2), dtype=np.int64)

    def add(self, batch, output):
        targets, right = batch[1].cpu().numpy(), (output.argmax(-1) == batch[1]).cpu().numpy()
        self.counts += np.stack([np.bincount(each, minlength=len(self.classes)) for each in (targets, targets[right])],
                                axis=1)

    def result(self, sharded, device):
        """{'classes': [{class, images, acc1 in percent, or None without images}]}"""
        counts = self.counts
        if sharded:
            counts = np.sum(distributed.gather(counts.tolist(), device), axis=0)
        return {'classes': [{'class': escape_text(name), 'images': int(images),
                             'acc1': 100. * int(right) / int(images) if images else None}
                            for name, (images, right) in zip(self.classes, counts)]}


class RealLabels:
    """Accuracy by ImageNet's reassessed labels ("Are we done with ImageNet?", https://arxiv.org/abs/2006.07159).

    An image may have several right labels; one that has none is not counted.

    Args:
        labels (list of sets of int): class indices of ILSVRC2012_val_00000001 and so on.
        samples: the validation set's, (path, class index) of each.
        source (str): the file that the labels are of.

    Raises:
        UserError: a file is not named so.
    """

    def __init__(self, labels, samples, source='labels'):
        self.right = [labels[place_of(samples[index][0], len(labels), source)] for index in range(len(samples))]
        self.counts = np.zeros(3, dtype=np.int64)

    def add(self, batch, output):
        top = output.topk(min(5, output.shape[1]), dim=1).indices.tolist()
        for index, best in zip(batch[2].tolist(), top):
            right = self.right[index]
            if right:
                self.counts += (1, best[0] in right, not right.isdisjoint(best))

    def result(self, sharded, device):
        """{'real_acc1', 'real_acc5': percent, 'real_images': how many were counted}"""
        counts = self.counts.tolist()
        if sharded:
            counts = [sum(column) for column in zip(*distributed.gather(counts, device))]
        images, top1, top5 = counts
        return {'real_acc1': 100. * top1 / images if images else float('nan'),
                'real_acc5': 100. * top5 / images if images else float('nan'), 'real_images': images}


def place_of(path, images, source):
    """Which image of ImageNet's validation set a file is, from 0; UserError where `source` has no labels of it."""
    found = re.match(r'ILSVRC2012_val_(\d{8})\.', os.path.basename(path))
    if not found or not 1 <= int(found.group(1)) <= images:
        raise UserError('--real_labels %s: its list is of %d images, ILSVRC2012_val_00000001.JPEG to _%08d.JPEG, and '
                        '%s is none of them; it is for ImageNet\'s validation set only' % (
                            escape_text(source), images, images, escape_text(path)))
    return int(found.group(1)) - 1


def read_real_labels(path, classes):
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


# ---- --results_file

RESULT_FILES = ('.csv', '.json')


def check_results_file(path):
    """Raise a `UserError` where --results_file can't be."""
    if os.path.splitext(path)[1] not in RESULT_FILES:
        raise UserError('--results_file %s: it must end in %s' % (escape_text(path), ' or '.join(RESULT_FILES)))
    if os.path.isdir(path):
        raise UserError('--results_file %s: there is a folder of that name' % escape_text(path))


def write_results(path, rows):
    """Write the figures of each evaluated network: a row of CSV, or a dict in a JSON list, there with its classes."""
    if path.endswith('.json'):
        data = json.dumps(rows, indent=2, ensure_ascii=False) + '\n'
    else:
        rows = [{name: value for name, value in row.items() if name != 'classes'} for row in rows]
        text = io.StringIO()
        table = csv.DictWriter(text, list(rows[0]), lineterminator='\n')
        table.writeheader()
        table.writerows(rows)
        data = text.getvalue()
    os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
    safe_files.write_bytes(path, data.encode('utf-8', 'backslashreplace'), is_given=True)
