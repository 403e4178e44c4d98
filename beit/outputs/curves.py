"""curves.png: loss, accuracy and learning rate of log.txt."""

import io
import math
import os
import time
from typing import Any, Dict, List, Tuple

from beit.distributed import process_group
from beit.errors import one_line
from beit.files import run_folder
from beit.files.atomic_write import write_bytes
from beit.log import log_main
from beit.training import metrics

run_folder.register_output(r'curves\.png')
SECONDS_BETWEEN = 20  # two drawings of the curves: a run of many tiny epochs shall not draw all the time

# What the panels show: title, unit, whether it starts at 0, and (label, name in log.txt, colour, factor) of each curve.
PANELS = (
    ('Loss', '', False, (('training', 'train_loss', '#8c8c8c', 1),
                         *(curve + (1,) for curve in metrics.curves('Loss')))),
    ('Accuracy', '%', False, (('training top-1', 'train_class_acc', '#8c8c8c', 100),
                              *(curve + (1,) for curve in metrics.curves('Accuracy')))),
    ('Learning rate', '', True, (('highest', 'train_lr', '#2f7ed8', 1), ('lowest', 'train_min_lr', '#8c8c8c', 1))))
COLOURS = {label: colour for panel in PANELS for label, _, colour, _ in panel[3]}


def curves_of(log: List[Dict[str, Any]], panel: Tuple) -> List[Tuple]:
    """[(label, epochs, values)] of a panel's curves, those that have a value."""
    found: List[Tuple] = []
    for label, name, _, factor in panel[3]:
        points = [(stats['epoch'] + 1, factor * stats[name]) for stats in log
                  if isinstance(stats.get(name), (int, float)) and math.isfinite(stats[name])]
        curve = (label,) + tuple(zip(*points))
        if points and not (label == 'lowest' and found and found[0][1:] == curve[1:]):  # the same without layer decay
            found.append(curve)
    return found


def draw_panel(axes: Any, log: List[Dict[str, Any]], panel: Tuple) -> None:
    """One panel into matplotlib's axes; a run's single epoch is a dot."""
    from matplotlib.ticker import FormatStrFormatter, MaxNLocator
    title, unit, from_zero, _ = panel
    for label, epochs, values in curves_of(log, panel):
        axes.plot(epochs, values, label=label, color=COLOURS[label], linewidth=1.6,
                  marker='o' if len(epochs) < 12 else None, markersize=3.5, clip_on=not from_zero)  # whole at 0
    axes.set_title(title + (' (%s)' % unit if unit else ''), loc='left', fontsize=11)
    axes.set_xlabel('epoch', fontsize=9)
    axes.tick_params(labelsize=8.5)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8))
    if from_zero:
        axes.set_ylim(bottom=0)
        axes.yaxis.set_major_formatter(FormatStrFormatter('%.2g'))
    axes.grid(alpha=0.25, linewidth=0.6)
    for side in ('top', 'right'):
        axes.spines[side].set_visible(False)
    if axes.lines:
        axes.legend(frameon=False, fontsize=8.5)


def draw_curves(path: str, log: List[Dict[str, Any]]) -> None:
    """Write curves.png, three panels beside one another."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # no pyplot: it would look for a screen
    from matplotlib.figure import Figure
    figure = Figure(figsize=(13.5, 3.9), dpi=100)
    FigureCanvasAgg(figure)
    for place, panel in enumerate(PANELS, 1):
        draw_panel(figure.add_subplot(1, len(PANELS), place), log, panel)
    figure.tight_layout(pad=1.2, w_pad=2.2)
    file = io.BytesIO()
    figure.savefig(file, format='png')
    write_bytes(path, file.getvalue())


class Curves:
    """Draws output_dir/curves.png from log.txt after epochs, on the first process; nothing that fails ends the run.

    Args:
        output_dir (str): '' draws nothing.
    """

    def __init__(self, output_dir):
        self.output_dir = output_dir if process_group.is_main_process() else ''
        self.drawn = -math.inf

    def draw(self, is_last: bool = False) -> None:
        if not self.output_dir or (time.monotonic() - self.drawn < SECONDS_BETWEEN and not is_last):
            return
        log = run_folder.read_log(self.output_dir)
        if not log:
            return
        try:
            draw_curves(os.path.join(self.output_dir, 'curves.png'), log)
            self.drawn = time.monotonic()
        except Exception as error:  # whatever matplotlib meets: the training is worth more
            log_main(hint_without_matplotlib('curves.png') if isinstance(error, ImportError) else
                     'curves.png was not drawn (%s: %s)' % (type(error).__name__, one_line(error)))
            self.output_dir = ''  # once


def hint_without_matplotlib(what: str) -> str:
    return '%s needs matplotlib; run: pip install -r requirements-extra.txt (or give --no_curves)' % what
