"""How the programs end: one-line errors and the exit status."""

import multiprocessing
import os
import signal
import sys
from typing import Any, Callable, Optional

from beit.devices import accelerator
from beit.distributed import preemption, process_group, watchdog
from beit.errors import UserError, loader_limit_message, one_line, print_error, worker_death_message
from beit.log import current_display, log_main


def _report_errors(program: str, work: Callable[[], Any], memory_remedy: str, resume_hint: Callable[[], str],
                   signals: Optional[preemption.Signals]) -> int:
    """`run_interruptible`, but for the handling of signals."""
    try:
        work()
        watchdog.stop()
        process_group.shutdown()
    except UserError as error:
        mine = process_group.is_error_reporter() if error.rank is None else error.rank == process_group.rank()
        process_group.defer_error_report(first=mine)
        return exit_with_error(program, one_line(error), 2, error.rank)
    except (RuntimeError, MemoryError, OSError) as error:
        for message, status in ((loader_limit_message(error), 2), (worker_death_message(error), 1)):
            if message:
                end_loader_processes()
                return exit_with_error(program, message + resume_hint(), status)
        if isinstance(error, OSError):
            raise
        if accelerator.is_out_of_memory(error):
            return exit_with_error(program, 'out of memory (%s); %s' % (one_line(error)[:200], memory_remedy), 2)
        if accelerator.is_compile_failure(error):
            if signals is not None and signals.stop_signal:  # it ended the compiler, too
                raise preemption.Stopped(signals.stop_signal) from None
            return exit_with_error(program, '--compile: the model cannot be compiled here (%s); leave the flag out, or '
                                   'choose another --compile_backend' % accelerator.first_line(
                                       getattr(error, 'inner_exception', error)), 2)
        if not process_group.is_peer_failure(error):
            raise
        silent = watchdog.silent_ranks()
        process_group.defer_error_report()
        return exit_with_error(program, 'lost the connection to %s, which ended or hangs; see its own message' % (
            'process %s' % ' and '.join(map(str, silent)) if silent else 'another process'), 1)
    return 0


def end_loader_processes() -> None:
    """Kill the loader processes that are left: one may wait forever for a lock that a killed one held."""
    if hasattr(signal, 'SIGCHLD'):  # PyTorch's handler would report each in a traceback
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    sys.unraisablehook = lambda _: None  # PyTorch's iterator that has not started all processes fails in its __del__
    for child in multiprocessing.active_children():
        child.kill()


def run_interruptible(program: str, work: Callable[[], Any], memory_remedy: str, resume_hint: Callable[[], str] = str,
                      lost: Callable[[], str] = lambda: '; nothing was written',
                      signals: Optional[preemption.Signals] = None) -> int:
    """Call `work()`; returns the exit status: 0, 2 for a user error, 1 for another failure, 128 + a signal's number.

    Args:
        program: the file's name, the beginning of an error line.
        memory_remedy: the advice when memory is not enough.
        resume_hint: gives the advice after a loader process was killed.
        lost: gives the end of the line about a signal: what it prevented.
        signals: a training's, which logs what it has saved.
    """
    try:
        with signals or preemption.Signals():
            return _report_errors(program, work, memory_remedy, resume_hint, signals)
    except preemption.Stopped as stop:  # also during an error report: another process may have caused the error
        watchdog.stop()
        if str(stop) and signals is not None:
            log_main('%s: %s' % (program, stop))
            process_group.defer_error_report(first=process_group.is_main_process())
        elif process_group.is_error_reporter():
            exit_with_error(program, str(stop) or 'interrupted by %s%s' % (preemption.name(stop.number), lost()),
                            128 + stop.number)
        return exit_process(128 + stop.number)


def exit_with_error(program: str, message: str, status: int, rank: Optional[int] = None) -> int:
    """Print an error line. `rank` is the process that failed, if not this one."""
    about = rank if rank is not None else process_group.rank() or None
    current_display().end()
    print_error('%s: error: %s%s' % (program, '' if about is None else 'process %d: ' % about, message))
    return exit_process(status)


def exit_process(status: int) -> int:
    """End this process at once if there are several; else return the status."""
    if process_group.world_size() > 1:
        os._exit(status)  # an orderly exit waits for processes that wait for this one
    return status
