"""A run's figures as lines, in log.txt, in TensorBoard and in summary.json."""

import contextlib
import importlib
import json
import math
import os
import platform
import re
from typing import Any, Dict, Iterator, List, Optional, Tuple

import torch

from beit.checkpoint import discovery
from beit.distributed import process_group
from beit.errors import UserError, escape_text, one_line
from beit.files import run_folder
from beit.files.atomic_write import write_bytes
from beit.log import log_main
from beit.model_spec import ModelSpec
from beit.paths import project_root
from beit.training import metrics

run_folder.register_output(r'(eval-)?summary\.json', at_end=True)
Stats = Dict[str, Any]  # figures by name


def count_parameters(model: torch.nn.Module) -> int:
    return getattr(model, 'parameter_count', 0) or sum(
        parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def shown_specs(stats: Stats) -> List[metrics.MetricSpec]:
    """An evaluation's figures; not top-k of k classes or fewer, which is always 100 %."""
    classes = len(stats.get('classes', ())) or math.inf
    return [spec for spec in metrics.metric_specs(stats) if spec.name in stats and spec.above < classes]


def score_lines(name: str, stats: Stats, unreadable: int) -> List[str]:
    """A line of all scores of a network on the validation images, and one of its accuracy, or mAP."""
    figure = metrics.primary_metric(stats)
    return ['* ' + ' '.join(spec.line % stats[spec.name] for spec in shown_specs(stats) if spec.line),
            '%s of the %s on the %d test images: %.3f%s%s' % (
                figure.title, name, stats['images'], stats[figure.name], figure.unit,
                ' (%d more could not be read and are not counted)' % unreadable if unreadable else '')]


def print_result(throughput: Any, figures: Stats) -> None:
    """The result line, with the figures that exist."""
    log_main('Result: images_per_second %.2f step_milliseconds %.3f' % (
        throughput.images_per_second, throughput.step_milliseconds) + ''.join(
            ' %s %.*f' % (name, places, figures[name]) for name, places in (('accuracy', 3), ('loss', 4), ('mAP', 3))
            if figures.get(name) is not None))


def speed_figures(throughput: Any, seconds: float) -> Dict[str, Optional[float]]:
    """The speed for summary.json; None without a measured step."""
    return dict(images_per_second=throughput.images_per_second or None,
                step_milliseconds=throughput.step_milliseconds or None, duration_seconds=round(seconds, 3))


def results_row(source: str, weights: str, spec: ModelSpec, parameters: int, stats: Stats, test_flip: bool) -> Stats:
    """A row of --results_file: the figures of one evaluation and everything that they depend on."""
    images = spec.preprocessing
    row: Stats = {'model': spec.architecture.model, 'checkpoint': escape_text(source), 'weights': weights}
    tables = {name: value for name, value in stats.items() if isinstance(value, list)}
    row.update((name, value) for name, value in stats.items() if name not in tables)
    row.update(param_count=parameters, img_size=images.input_size, crop_pct=images.crop_pct,
               interpolation=images.interpolation, test_flip=test_flip, **images.flags)
    return dict(row, **tables)


def print_sets(rows: List[Stats]) -> None:
    """Print a table of the evaluated sets, from the rows of --results_file."""
    most = max(rows, key=lambda row: len(row.get('classes', ())))
    specs = [spec for spec in shown_specs(most) if spec.title]
    table = [['data', 'weights', 'images'] + [spec.name for spec in specs]]
    table += [[row['data'], row['weights'], str(row['images'])] + [
        '%.*f' % (3 if spec.unit else 4, row[spec.name]) if spec in shown_specs(row) else '-' for spec in specs]
              for row in rows]
    widths = [max(map(len, column)) for column in zip(*table)]
    for cells in table:
        log_main('  '.join(cell.ljust(width) if place < 2 else cell.rjust(width)
                           for place, (cell, width) in enumerate(zip(cells, widths))))


def update_best(best: Dict[str, float], test_stats: Optional[Stats], ema_stats: Optional[Stats]) -> List[str]:
    """Update the figures of the best checkpoints; returns the names of the new ones.

    They are the figure of --best_by, and the accuracy or mAP of the same epoch.
    """
    improved = []
    for prefix, stats, file_name in (('', test_stats, discovery.BEST), ('ema_', ema_stats, discovery.BEST_EMA)):
        if stats is not None:
            figure = metrics.primary_metric(stats)
            if figure.is_better(stats[figure.name], best.get(prefix + figure.summary)):
                best.update((prefix + each.summary, stats[each.name]) for each in metrics.metric_specs()
                            if each.name in stats and (each.is_primary or each == figure))
                improved.append(file_name)
    return improved


def best_line(best: Dict[str, float], test_stats: Stats, has_ema: bool) -> str:
    figure = metrics.primary_metric(test_stats)
    values = ['%.3f%s' % (best.get(prefix + figure.summary, float('nan')), figure.unit) for prefix in ('', 'ema_')]
    return '%s %s: %s' % ('Min' if figure.lowest_is_best else 'Max', figure.summary,
                          ', of the average: '.join(values[:1 + has_ema]))


def best_texts(stats: Optional[Stats], best: Dict[str, float]) -> Optional[Tuple[str, str]]:
    """(the figure that selects the best checkpoint, the best one so far); None without statistics."""
    if stats is None:
        return None
    figure = metrics.primary_metric(stats)
    return figure.form % stats[figure.name], figure.form % best.get(figure.summary, float('nan'))


def record(output_dir: str, writer: Any, epoch: int, parameters: int, train_stats: Stats,
           test_stats: Optional[Stats], ema_stats: Optional[Stats], val_set: str) -> None:
    """Write an epoch's line of log.txt, and its scalars to TensorBoard. `val_set`: see `comparison.evaluation_id`."""
    if not process_group.is_main_process():
        return
    stats = {'train_' + name: value for name, value in train_stats.items()}
    for prefix, evaluated in (('test_', test_stats), ('test_ema_', ema_stats)):
        stats.update({prefix + name: value for name, value in metrics.logged(evaluated or {}).items()})
    if test_stats is not None:
        stats['val_set'] = val_set
    if output_dir:
        run_folder.append_log(output_dir, dict(stats, epoch=epoch, n_parameters=parameters))
    if writer is not None:
        record_scores(writer, epoch, test_stats, ema_stats)


def record_scores(writer: Any, epoch: int, test_stats: Optional[Stats], ema_stats: Optional[Stats]) -> None:
    for prefix, stats in (('test', test_stats or {}), ('ema', ema_stats or {})):
        writer.update('perf', epoch, **{'%s_%s' % (prefix, spec.name): stats[spec.name]
                                        for spec in metrics.metric_specs(stats)
                                        if (spec.line or spec.title) and spec.name in stats})


# ---- summary.json

@contextlib.contextmanager
def best_effort() -> Iterator[None]:
    """Log a write error, such as a full disk, without ending the run, whose weights would be lost."""
    try:
        yield
    except (OSError, UserError) as error:
        log_main('Not written: ' + one_line(error))


def write_summary(output_dir: str, figures: Dict[str, Any], name: str = 'summary.json') -> None:
    """Write output_dir/summary.json, on the first process: figures and versions; non-finite values become null.

    The scripts in test/ name a second file for it in `BEIT_SUMMARY`.
    """
    paths = [os.environ.get('BEIT_SUMMARY'), output_dir and os.path.join(output_dir, name)]
    for path in filter(None, paths) if process_group.is_main_process() else ():
        text = json.dumps(nonfinite_to_none(dict(figures, versions=versions())), indent=2, allow_nan=False)
        with best_effort():
            os.makedirs(os.path.dirname(path), exist_ok=True)
            write_bytes(path, (text + '\n').encode())


def nonfinite_to_none(value: Any) -> Any:
    """Copy nested dicts and lists, with None for non-finite numbers."""
    if isinstance(value, dict):
        return {name: nonfinite_to_none(each) for name, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [nonfinite_to_none(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def versions() -> Dict[str, Optional[str]]:
    """{package: version}, or None if unknown."""
    found = {'beit': project_version(), 'python': platform.python_version(), 'torch': str(torch.__version__)}
    for name in ('torchvision', 'timm', 'numpy'):
        found[name] = getattr(importlib.import_module(name), '__version__', None)
    return found


def project_version() -> Optional[str]:
    """The newest version in CHANGELOG.md; None without one."""
    path = os.path.join(project_root(), 'CHANGELOG.md')
    with contextlib.suppress(OSError, ValueError), open(path, encoding='utf-8') as file:
        return next((line.split()[1] for line in file if re.match(r'## \d', line)), None)
    return None
