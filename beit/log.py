"""Log lines of the main process, and the progress display of a terminal.

The scripts in test/ redirect standard output to a file, and name their own terminal in `BEIT_TERMINAL`.
"""

import contextlib
import datetime
import os
import re
import sys
import textwrap
from typing import Any, Callable, Dict, List, Optional, Tuple

from beit.errors import print_line

# The bar for a terminal that has at least this many columns, the widest first.
BARS = ((100, '{desc}  {percentage:3.0f}%|{bar}| {n}/{total} [{elapsed}<{remaining}{postfix}]'),
        (72, '{desc} {percentage:3.0f}%|{bar}| {n}/{total} <{remaining}{postfix}'),
        (0, '{desc} {percentage:3.0f}% <{remaining}{postfix}'))
DEFAULT_COLUMNS = 80  # of a terminal that does not report its size
SLOWEST_DRAW = 0.1  # seconds between two drawings of a bar
EPOCH_ROW = '{:7}{:>7}{:>9}{:>11}{:>9}{:>9}{:>8}'
EPOCH_HEAD = EPOCH_ROW.format('Epoch', 'Loss', 'Training', 'Validation', 'Best', 'Images/s', 'Time')


def _is_main_process() -> bool:
    from beit.distributed import process_group  # imports PyTorch, and the parser of the flags imports this module
    return process_group.is_main_process()


def pluralize(number: int, noun: str) -> str:
    """'1 epoch', '2 epochs', '2 classes'."""
    return '%d %s%s' % (number, noun, '' if number == 1 else 'es' if noun.endswith('s') else 's')


class Display:
    """Lines on standard output and, on a terminal, lines that break between words and at most one bar below them.

    Args:
        stream: the terminal; without one the methods for it do nothing.
        logs (bool): standard output is no terminal, and gets every line.
    """

    def __init__(self, stream: Any = None, tqdm: Any = None, logs: bool = True) -> None:
        self.stream, self.tqdm, self.logs = stream, tqdm, logs
        self.bar: Any = None
        self.is_short = self.has_head = False

    def columns(self) -> int:
        with contextlib.suppress(OSError, ValueError):
            return os.get_terminal_size(self.stream.fileno()).columns or DEFAULT_COLUMNS
        return DEFAULT_COLUMNS

    def log(self, text: str, detail: bool = False) -> None:
        """Print a line. A terminal does not show a `detail`."""
        if self.logs and _is_main_process():
            print_line(text)
        if not detail:
            self.show(text)

    def log_row(self, name: str, value: str, width: int) -> None:
        """Print a line 'name: value'; a terminal shows the values in a column that begins at `width`."""
        self.log('%s: %s' % (name, value) if name else value, detail=True)
        self.show(name.ljust(width) + value, indent=width)

    def show(self, text: str, indent: int = 0) -> None:
        """Print a line on the terminal only."""
        if self.stream is None:
            return
        lines = textwrap.wrap(text, max(self.columns(), indent + 20), subsequent_indent=' ' * indent,
                              break_long_words=False, break_on_hyphens=False)
        with contextlib.suppress(OSError, ValueError):  # the terminal has been closed
            self.tqdm.write('\n'.join(lines), file=self.stream)
            self.stream.flush()

    def show_epoch(self, row: str) -> None:
        """Print the row of an epoch on the terminal only, the first one below a head."""
        if not self.has_head:
            self.show(EPOCH_HEAD)
        self.has_head = True
        self.show(row)

    def begin(self, header: str, total: int, done: int = 0) -> None:
        """Start a bar of `total` steps; `header` is the beginning of the log's lines."""
        self.end()
        if self.stream is None:
            return
        name = re.sub(r'Epoch: \[(\d+)\]', lambda found: 'Epoch %d' % (int(found.group(1)) + 1), header)
        name = 'Validation' if name == 'Test:' else name
        with contextlib.suppress(OSError, ValueError):
            is_unknown = 0 in os.get_terminal_size(self.stream.fileno())  # tqdm would draw nothing
            shape: Any = dict(ncols=DEFAULT_COLUMNS, nrows=24) if is_unknown else dict(dynamic_ncols=True)
            columns = self.columns()
            self.is_short = columns < BARS[0][0]
            self.bar = self.tqdm(total=total, initial=done, desc=name, file=self.stream, leave=False,
                                 bar_format=next(bar for least, bar in BARS if columns >= least),
                                 mininterval=SLOWEST_DRAW, **shape)

    def step(self, figures: Optional[Callable[[], str]] = None) -> None:
        """Advance the bar by a step; `figures()` gives the text after it."""
        if self.bar is None:
            return
        with contextlib.suppress(OSError, ValueError):
            if figures is not None:
                text = figures()
                self.bar.set_postfix_str(text.replace('accuracy', 'acc') if self.is_short else text, refresh=False)
            self.bar.update(1)

    def end(self) -> None:
        bar, self.bar = self.bar, None
        if bar is not None:
            with contextlib.suppress(OSError, ValueError):
                bar.close()


_display = Display()


def current_display() -> Display:
    """The display of this process."""
    return _display


def start_display() -> None:
    """Use the terminal of the first process, if there is one. Raises nothing: a run does not depend on its display."""
    global _display
    _display = Display()
    path = os.environ.get('BEIT_TERMINAL')
    with contextlib.suppress(ImportError, OSError, ValueError, AttributeError):  # no tqdm, or no such terminal
        from tqdm import tqdm
        tqdm.monitor_interval = 0  # its thread must not exist when processes are forked
        stream = open(path, 'w', encoding='utf-8', errors='backslashreplace') if path else sys.stdout
        if _is_main_process() and os.environ.get('TERM') != 'dumb' and stream.isatty():
            _display = Display(stream, tqdm, logs=bool(path))


def log_main(text: str, detail: bool = False) -> None:
    """Print a line at once, on the first process only; a terminal with a bar does not show a `detail`."""
    _display.log(text, detail)


def log_table(rows: List[Tuple[str, str]]) -> None:
    """Print lines 'name: value' of (name, value); on a terminal the values form a column."""
    width = max(len(name) for name, _ in rows) + 2
    for name, value in rows:
        _display.log_row(name, value, width)


def format_metrics(meters: Dict[str, Any], images_per_second: float) -> str:
    """The text after a bar, from a loop's meters: 'loss 0.512, accuracy 97.2 %, 960 images/s'."""
    words = []
    if 'loss' in meters and meters['loss'].window:
        words.append('loss %.3f' % meters['loss'].global_avg)
    for name, percent in (('class_acc', 100.), ('acc1', 1.)):
        if name in meters and meters[name].window:
            words.append('accuracy %.1f %%' % (percent * meters[name].global_avg))
    return ', '.join(words + ['%.0f images/s' % images_per_second])


def log_epoch(number: int, epochs: int, train_stats: Dict[str, float], validation: Optional[Tuple[str, str]],
              images_per_second: float, seconds: float) -> None:
    """Show the figures of an epoch on a terminal, if there is one. `number` counts from 0, what it shows from 1.

    `validation` is the figure that selects the best checkpoint, and the best one so far; None without an evaluation.
    """
    accuracy = '%.1f %%' % (100 * train_stats['class_acc']) if 'class_acc' in train_stats else '-'
    time = '%.1f s' % seconds if seconds < 100 else str(datetime.timedelta(seconds=int(seconds)))
    _display.show_epoch(EPOCH_ROW.format(
        '%d/%d' % (number + 1, epochs), '%.3f' % train_stats.get('loss', float('nan')), accuracy,
        *(validation or '--'), '%.0f' % images_per_second, time))
