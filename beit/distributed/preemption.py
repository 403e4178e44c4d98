"""Turns a signal into a request to stop after the current step and a save; a second signal exits immediately."""

import contextlib
import os
import signal
import threading
import time
from typing import Any, Iterator, Optional

from beit.distributed import process_group

NUMBERS = tuple(getattr(signal, name) for name in ('SIGTERM', 'SIGINT', 'SIGHUP', 'SIGUSR1') if hasattr(signal, name))
SAME_EVENT_SECONDS = 1.  # a terminal, SLURM and a launcher can each deliver the same signal
FORCE_EXIT_SECONDS = 5.  # after a signal outside `deferred` that the main thread did not handle

_owner: Optional[int] = None  # the process that handles the signals; its forks do not
if hasattr(os, 'register_at_fork'):
    os.register_at_fork(after_in_child=lambda: _owner and signal.set_wakeup_fd(-1))


class Stopped(BaseException):
    """The program ends because of a signal, with status 128 + `number`. The text, if any, names the saved file."""

    def __init__(self, number: int, text: str = '') -> None:
        super().__init__(text)
        self.number = number


def name(number: int) -> str:
    return signal.Signals(number).name


class Signals:
    """A context manager around the program that handles SIGTERM, SIGINT, SIGHUP and SIGUSR1.

    Outside `deferred` a signal raises `Stopped` at once. Inside, the first sets `stop_signal`, which the loop checks;
    the second exits, by a thread, because the main thread may wait inside a collective.
    """

    def __init__(self) -> None:
        self.stop_signal = 0  # the number of the signal that requested a stop
        self.defers, self.entered, self.over = False, False, False
        self.first: Optional[float] = None  # when the first signal came

    def __enter__(self) -> 'Signals':
        global _owner
        if threading.current_thread() is not threading.main_thread():
            return self  # only the main thread can handle signals
        _owner, self.entered = os.getpid(), True
        read_fd, self.write_fd = os.pipe()
        os.set_blocking(self.write_fd, False)
        self.wakeup, self.before = signal.set_wakeup_fd(self.write_fd), {}
        for number in NUMBERS:
            if signal.getsignal(number) != signal.SIG_IGN:  # as under nohup
                self.before[number] = signal.signal(number, self.on_signal)
        threading.Thread(target=self.read_wakeup_fd, args=(read_fd,), daemon=True, name='signals').start()
        return self

    def __exit__(self, *_: Any) -> None:
        global _owner
        if not self.entered or os.getpid() != _owner:
            return
        for number, handler in self.before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self.wakeup)
        _owner = None
        os.close(self.write_fd)  # ends the thread

    @contextlib.contextmanager
    def deferred(self) -> Iterator[None]:
        """Inside, a signal waits for the end of the step. Afterwards everything is saved, and signals are ignored.

        PyTorch's SIGCHLD handler is removed then: a killed loader process, for which it raises, no longer matters.
        """
        self.defers = True
        try:
            yield
            self.over = True
            if self.entered and hasattr(signal, 'SIGCHLD'):
                self.before[signal.SIGCHLD] = signal.signal(signal.SIGCHLD, signal.SIG_DFL) or signal.SIG_DFL
        finally:
            self.defers = self.over

    def on_signal(self, number: int, _: Any) -> None:
        """The handler, which Python calls in the main thread."""
        if os.getpid() != _owner or self.stop_signal or self.over:
            return
        self.stop_signal = number
        if not self.defers:
            raise Stopped(number)
        if process_group.is_main_process():
            say_now('%s: finishing this step, then saving; once more ends at once' % name(number))

    def read_wakeup_fd(self, read_fd: int) -> None:
        """The thread that sees signals while the main thread waits in a library."""
        for number, in iter(lambda: os.read(read_fd, 1), b''):
            if number not in NUMBERS:
                continue
            now = time.monotonic()
            if self.first is None:
                self.first = now
                if not self.defers:
                    threading.Thread(target=self.force_exit_later, args=(number,), daemon=True).start()
            elif now - self.first > SAME_EVENT_SECONDS:
                end_at_once(number)
        os.close(read_fd)

    def force_exit_later(self, number: int) -> None:
        time.sleep(FORCE_EXIT_SECONDS)
        if not self.stop_signal:  # the main thread is stuck in a library, so the handler did not run
            end_at_once(number)


def end_at_once(number: int) -> None:
    if process_group.is_main_process():
        say_now('%s: ended at once; every checkpoint that was written is whole' % name(number))
    os._exit(128 + number)


def say_now(text: str) -> None:
    """Write a line to standard error without Python's buffer, which the interrupted code may be using."""
    with contextlib.suppress(OSError):  # the stream is closed
        start = '\n' if os.isatty(2) else ''  # a terminal may show a bar there
        os.write(2, (start + text + '\n').encode())
