"""A signal becomes a request to stop: the step under way is finished and saved first; a second one ends at once."""

import contextlib
import os
import signal
import threading
import time
from typing import Any, Iterator, Optional

from beit.distributed import process_group

NUMBERS = tuple(getattr(signal, name) for name in ('SIGTERM', 'SIGINT', 'SIGHUP', 'SIGUSR1') if hasattr(signal, name))
SAME_EVENT_SECONDS = 1.  # a terminal, SLURM and a launcher may each deliver the same one
UNHEARD_SECONDS = 5.  # how long a signal that has to end the program at once may wait for the interpreter

_owner: Optional[int] = None  # the process whose signals these are, and not those of what it forks off
if hasattr(os, 'register_at_fork'):
    os.register_at_fork(after_in_child=lambda: _owner and signal.set_wakeup_fd(-1))


class Stopped(BaseException):
    """The program ends because of a signal. Its text, if any, says what was saved.

    Attributes:
        number (int): the signal's; the exit status is 128 + number, so 143 for SIGTERM and 130 for SIGINT.
    """

    def __init__(self, number: int, text: str = '') -> None:
        super().__init__(text)
        self.number = number


def name(number: int) -> str:
    return signal.Signals(number).name


class Signals:
    """SIGTERM, SIGINT, SIGHUP and SIGUSR1 while the program runs; a context manager around all of it.

    Outside `deferred` a signal raises `Stopped` at once. Inside, the first becomes `stop_signal`, which the loop looks
    at; the second ends the process, even one that waits inside a collective: a thread hears it.

    Attributes:
        stop_signal (int): the number of the signal that asked to stop, or 0.
    """

    def __init__(self) -> None:
        self.stop_signal, self.defers, self.entered, self.over = 0, False, False, False
        self.first: Optional[float] = None  # when the first signal came

    def __enter__(self) -> 'Signals':
        global _owner
        if threading.current_thread() is not threading.main_thread():
            return self  # only there can signals be handled
        _owner, self.entered = os.getpid(), True
        self.read_fd, write_fd = os.pipe()
        os.set_blocking(write_fd, False)
        self.write_fd, self.before = write_fd, {}
        self.wakeup = signal.set_wakeup_fd(write_fd)
        for number in NUMBERS:
            if signal.getsignal(number) != signal.SIG_IGN:  # as nohup has it
                self.before[number] = signal.signal(number, self.on_signal)
        threading.Thread(target=self.read_wakeup_fd, args=(self.read_fd,), daemon=True, name='signals').start()
        return self

    def __exit__(self, *_: Any) -> None:
        global _owner
        if not self.entered or os.getpid() != _owner:
            return
        for number, handler in self.before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self.wakeup)
        _owner = None
        os.close(self.write_fd)  # the thread reads the end of the file, and ends

    @contextlib.contextmanager
    def deferred(self) -> Iterator[None]:
        """Inside, a signal waits for the end of the step. Behind it all is saved and told, and none is heard.

        Nor does it matter then that a loader process is killed, of which PyTorch's handler would tell in a traceback.
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
        """In the main thread, between two of Python's instructions."""
        if os.getpid() != _owner or self.stop_signal or self.over:
            return
        self.stop_signal = number
        if not self.defers:
            raise Stopped(number)
        if process_group.is_main_process():
            say_now('%s: finishing this step, then saving; once more ends at once' % name(number))

    def read_wakeup_fd(self, read_fd: int) -> None:
        """In a thread of its own, which runs while the main one waits in a library."""
        while True:
            news = os.read(read_fd, 64)
            if not news:
                os.close(read_fd)
                return
            for number in news:
                if number not in NUMBERS:
                    continue
                now = time.monotonic()
                if self.first is None:
                    self.first = now
                    if not self.defers:
                        threading.Thread(target=self.force_exit_later, args=(number,), daemon=True).start()
                elif now - self.first > SAME_EVENT_SECONDS:
                    end_at_once(number)

    def force_exit_later(self, number: int) -> None:
        time.sleep(UNHEARD_SECONDS)
        if not self.stop_signal:  # the main thread is stuck in a library, and the handler has not come to its turn
            end_at_once(number)


def end_at_once(number: int) -> None:
    if process_group.is_main_process():
        say_now('%s: ended at once; the last checkpoint is whole' % name(number))
    os._exit(128 + number)


def say_now(text: str) -> None:
    """Past Python's buffer, which the interrupted code may be writing to."""
    with contextlib.suppress(OSError):  # nobody is there to read it
        os.write(2, (text + '\n').encode())
