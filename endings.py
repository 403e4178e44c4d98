"""How a program of several processes ends: what a user can mend is one line, told once, and an exit status."""

import os
import sys

import backend
import distributed
import preemption
import watchdog
from errors import UserError, loader_death, one_line


def explain(program, work, cure_of_memory, goes_on=''):
    """Do `work()`; its exit status: 0, 2 for what the user can mend, 1 for what broke.

    Args:
        program (str): the file's name, in front of an error.
        cure_of_memory (str): what helps where memory is not enough.
        goes_on (str): how to go on after a loader process was killed.
    """
    try:
        work()
        watchdog.stop()
        distributed.leave_processes()
    except UserError as error:
        mine = distributed.speaks_first() if error.rank is None else error.rank == distributed.rank()
        distributed.wait_for_others_to_speak(first=mine)
        return fail(program, one_line(error), 2, error.rank)
    except (RuntimeError, MemoryError) as error:
        if loader_death(error):
            return fail(program, loader_death(error) + goes_on, 1)
        if backend.out_of_memory(error):
            return fail(program, 'out of memory (%s); %s' % (one_line(error)[:200], cure_of_memory), 2)
        if not distributed.lost_a_process(error):
            raise
        silent = watchdog.lost()
        distributed.wait_for_others_to_speak()
        return fail(program, 'lost the connection to %s, which ended or hangs; its own message says why' % (
            'process %s' % ' and '.join(map(str, silent)) if silent else 'another process'), 1)
    return 0


def explain_or_stop(program, work, cure_of_memory):
    """`explain`, for a program that leaves nothing behind where a signal ends it: 128 + the signal's number."""
    try:
        with preemption.Signals():
            return explain(program, work, cure_of_memory)
    except preemption.Stopped as stop:
        return fail(program, 'interrupted by %s; nothing was written' % preemption.name(stop.number), 128 + stop.number)


def fail(program, message, status, rank=None):
    """Print the one line. `rank` is whom it is about, where that isn't this process."""
    about = rank if rank is not None else distributed.rank() or None
    if distributed.display() is not None:
        distributed.display().end()
    print('%s: error: %s%s' % (program, '' if about is None else 'process %d: ' % about, message), file=sys.stderr,
          flush=True)
    return leave(status)


def leave(status):
    if distributed.world_size() > 1:
        os._exit(status)  # an orderly exit would wait for processes that wait for this one
    return status
