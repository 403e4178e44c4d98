"""Log lines of the main process, and the progress display of a terminal.

The scripts in test/ redirect standard output to a log file, and name the terminal that they were called from in
`BEIT_TERMINAL`.
"""

import contextlib
import os
import re
import sys
from typing import Any, Callable, Dict, List, Optional, Tuple

from beit.distributed import process_group
from beit.errors import print_line

BAR = '{desc}  {percentage:3.0f}%|{bar}| {n}/{total} [{elapsed}<{remaining}{postfix}]'
NARROW, NARROW_BAR = 72, '{desc} {percentage:3.0f}% <{remaining}{postfix}'  # columns, below which no bar has room
SLOWEST_DRAW = 0.1  # seconds between two drawings of a bar


class NoDisplay:
    """What there is without a terminal: lines on standard output, and no bar."""

    def log(self, text: str, detail: bool = False, shown: Optional[str] = None) -> None:
        """A line. A terminal shows no `detail`, and `shown` instead of the text."""
        if process_group.is_main_process():
            print_line(text)

    def show(self, text: str) -> None:
        """A line for the person alone."""

    def begin(self, header: str, total: int, done: int = 0) -> None:
        """A bar of so many steps; `header` is what the lines of the log begin with."""

    def step(self, figures: Optional[Callable[[], str]] = None) -> None:
        """One step further; `figures()` gives words to stand behind the bar."""

    def end(self) -> None:
        """No bar any more."""


class ProgressDisplay(NoDisplay):
    """A terminal with at most one bar at its bottom.

    Args:
        logs (bool): standard output is another place, and gets every line.
    """

    def __init__(self, stream: Any, tqdm: Any, logs: bool) -> None:
        self.stream, self.tqdm, self.logs = stream, tqdm, logs
        self.bar: Any = None
        self.narrow = False

    def log(self, text: str, detail: bool = False, shown: Optional[str] = None) -> None:
        if self.logs:
            print_line(text)
        if not detail:
            self.show(shown or text)

    def show(self, text: str) -> None:
        with contextlib.suppress(OSError, ValueError):  # the terminal has been closed
            self.tqdm.write(text, file=self.stream)
            self.stream.flush()

    def begin(self, header: str, total: int, done: int = 0) -> None:
        self.end()
        name = re.sub(r'Epoch: \[(\d+)\]', lambda found: 'Epoch %d' % (int(found.group(1)) + 1), header)
        name = 'Validation' if name == 'Test:' else name
        with contextlib.suppress(OSError, ValueError):
            shape: Dict[str, Any] = dict(dynamic_ncols=True)
            size = os.get_terminal_size(self.stream.fileno())
            if 0 in size:  # some terminals don't tell; tqdm would draw nothing
                shape = dict(ncols=80, nrows=24)
            self.narrow = 0 < size.columns < NARROW
            self.bar = self.tqdm(total=total, initial=done, desc=name, file=self.stream, leave=False,
                                 bar_format=NARROW_BAR if self.narrow else BAR, mininterval=SLOWEST_DRAW, **shape)

    def step(self, figures: Optional[Callable[[], str]] = None) -> None:
        if self.bar is None:
            return
        with contextlib.suppress(OSError, ValueError):
            if figures is not None:
                text = figures()
                self.bar.set_postfix_str(text.replace('accuracy', 'acc') if self.narrow else text, refresh=False)
            self.bar.update(1)

    def end(self) -> None:
        bar, self.bar = self.bar, None
        if bar is not None:
            with contextlib.suppress(OSError, ValueError):
                bar.close()


_display = NoDisplay()


def current_display() -> NoDisplay:
    """The display of this process."""
    return _display


def start_display() -> None:
    """Show the first process's run on the terminal that it has, if any. Raises nothing: a bar is a courtesy."""
    global _display
    _display = NoDisplay()
    path = os.environ.get('BEIT_TERMINAL')
    with contextlib.suppress(ImportError, OSError, ValueError, AttributeError):  # no tqdm, or no such terminal
        from tqdm import tqdm
        tqdm.monitor_interval = 0  # its thread must not be there when processes are forked
        stream = open(path, 'w', encoding='utf-8', errors='backslashreplace') if path else sys.stdout
        if process_group.is_main_process() and os.environ.get('TERM') != 'dumb' and stream.isatty():
            _display = ProgressDisplay(stream, tqdm, logs=bool(path))


def log_main(text: str, detail: bool = False) -> None:
    """Print a line, on the first process only and at once; a `detail` is not for a terminal with a bar."""
    _display.log(text, detail)


def log_table(rows: List[Tuple[str, str]]) -> None:
    """Lines 'name: value' of (name, value); on a terminal the values stand below one another."""
    width = max(len(name) for name, _ in rows) + 2
    for name, value in rows:
        _display.log('%s: %s' % (name, value) if name else value, shown=name.ljust(width) + value)


def format_metrics(meters: Dict[str, Any], images_per_second: float) -> str:
    """'loss 0.512, accuracy 97.2 %, 960 images/s' of what a loop's meters hold, for a bar."""
    words = []
    if 'loss' in meters and meters['loss'].window:
        words.append('loss %.3f' % meters['loss'].global_avg)
    for name, percent in (('class_acc', 100.), ('acc1', 1.)):
        if name in meters and meters[name].window:
            words.append('accuracy %.1f %%' % (percent * meters[name].global_avg))
    return ', '.join(words + ['%.0f images/s' % images_per_second])


def log_epoch(number: int, epochs: int, train_stats: Dict[str, float], validation: Optional[Tuple[float, float]],
              images_per_second: float, seconds: float) -> None:
    """Say on a terminal, if there is one, what came of an epoch.

    Args:
        validation: the primary figure and the best one so far, in percent; None where nothing was evaluated.
    """
    words = ['Epoch %d/%d: loss %.3f' % (number + 1, epochs, train_stats.get('loss', float('nan')))]
    if 'class_acc' in train_stats:
        words.append('accuracy in training %.1f %%' % (100 * train_stats['class_acc']))
    if validation is not None:
        words.append('in validation %.2f %% (best %.2f %%)' % validation)
    _display.show(', '.join(words + ['%.0f images/s' % images_per_second, '%.1f s' % seconds]))
