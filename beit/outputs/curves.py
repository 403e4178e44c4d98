"""curves.png: loss, accuracy, learning rate and the figures that metrics declare, from log.txt."""

import collections
import io
import math
import os
import time
from typing import Any, Dict, List, NamedTuple, Sequence, Tuple

from beit import startup
from beit.distributed import process_group
from beit.errors import one_line
from beit.files import run_folder
from beit.files.atomic_write import write_bytes
from beit.log import log_main
from beit.training import metrics

run_folder.register_output(r'curves\.png')
SECONDS_BETWEEN = 20  # two drawings: a run of short epochs must not spend its time on them
RATE = 'Learning rate'
GREY, BLUE = '#8c8c8c', '#2f7ed8'
VALIDATION = ((BLUE, '#e07b00'), ('#1fa187', '#c0569b'), ('#7a5cc9', '#b09a00'),
              ('#c23b3b', '#3b8fa0'))  # a panel's figures; the average's


class Curve(NamedTuple):
    label: str
    colour: str
    epochs: Tuple[int, ...]
    values: Tuple[float, ...]


def panels(log: Sequence[Dict[str, Any]], classes: float = math.inf) -> Dict[str, List[Curve]]:
    """The curves that log.txt has values for, by the title of their panel; top-5 only of more than five classes."""
    found: Dict[str, List[Curve]] = {}

    def add(title: str, label: str, name: str, colour: str, factor: float = 1) -> None:
        points = [(stats['epoch'] + 1, factor * stats[name]) for stats in log
                  if isinstance(stats.get(name), (int, float)) and math.isfinite(stats[name])]
        if points:
            found.setdefault(title, []).append(Curve(label, colour, *zip(*points)))

    add('Loss', 'training', 'train_loss', GREY)
    add('Accuracy (%)', 'training top-1', 'train_class_acc', GREY, 100)
    drawn: Dict[str, int] = collections.Counter()
    for spec in metrics.metric_specs(name for line in log for name in line):
        if spec.title and spec.above < classes and any('test_' + spec.name in line for line in log):
            title = (spec.panel or spec.title) + (' (%s)' % spec.unit if spec.unit else '')
            colour, ema_colour = VALIDATION[drawn[title] % len(VALIDATION)]
            drawn[title] += 1
            add(title, spec.curve or 'validation', 'test_' + spec.name, colour)
            add(title, (spec.curve or 'validation') + ', EMA', 'test_ema_' + spec.name, ema_colour)
    add(RATE, 'highest', 'train_lr', BLUE)
    if any(stats.get('train_min_lr') != stats.get('train_lr') for stats in log):  # they are equal without layer decay
        add(RATE, 'lowest', 'train_min_lr', GREY)
    return found


def draw_panel(axes: Any, title: str, curves: Sequence[Curve]) -> None:
    """Draw one panel on matplotlib's axes; a single epoch is a dot."""
    from matplotlib.ticker import FormatStrFormatter, MaxNLocator
    for curve in curves:
        axes.plot(curve.epochs, curve.values, label=curve.label, color=curve.colour, linewidth=1.6, markersize=3.5,
                  marker='o' if len(curve.epochs) < 12 else None, clip_on=title != RATE)  # a line at 0 in full width
    axes.set_title(title, loc='left', fontsize=11)
    axes.set_xlabel('epoch', fontsize=9)
    axes.tick_params(labelsize=8.5)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8))
    if title == RATE:
        axes.set_ylim(bottom=0)
        axes.yaxis.set_major_formatter(FormatStrFormatter('%g'))
    axes.grid(alpha=0.25, linewidth=0.6)
    axes.spines['top'].set_visible(False)
    axes.spines['right'].set_visible(False)
    axes.legend(frameon=False, fontsize=8.5, ncol=3, columnspacing=1.2,
                loc='upper left', bbox_to_anchor=(-0.02, -0.15))  # below, where it hides no curve


def draw_curves(path: str, log: Sequence[Dict[str, Any]], classes: float = math.inf) -> None:
    """Write curves.png, with all panels in a row."""
    from matplotlib.figure import Figure  # pyplot would look for a display
    drawn = panels(log, classes)
    figure, file = Figure(figsize=(4.5 * len(drawn), 3.9), dpi=100), io.BytesIO()
    for place, (title, curves) in enumerate(drawn.items(), 1):
        draw_panel(figure.add_subplot(1, len(drawn), place), title, curves)
    figure.tight_layout(pad=1.2, w_pad=2.2)
    figure.savefig(file, format='png')
    write_bytes(path, file.getvalue())


class Curves:
    """Draws output_dir/curves.png from log.txt after epochs, on the first process. A failure does not end the run.

    It draws nothing if output_dir is ''.
    """

    def __init__(self, output_dir: str, classes: float = math.inf) -> None:
        self.classes = classes
        self.output_dir = output_dir if process_group.is_main_process() else ''
        self.drawn = -math.inf

    def draw(self, is_last: bool = False) -> None:
        if not self.output_dir or (time.monotonic() - self.drawn < SECONDS_BETWEEN and not is_last):
            return
        log = run_folder.read_log(self.output_dir)
        if not log:
            return
        try:
            draw_curves(os.path.join(self.output_dir, 'curves.png'), log, self.classes)
            self.drawn = time.monotonic()
        except Exception as error:  # of matplotlib; the training matters more
            log_main(failure_message('curves.png', error))
            self.output_dir = ''  # once


def failure_message(what: str, error: Exception) -> str:
    if isinstance(error, ImportError):
        return '%s needs matplotlib; %s (or give --no_curves)' % (what, startup.pip_install('matplotlib'))
    return '%s was not drawn (%s: %s)' % (what, type(error).__name__, one_line(error))
