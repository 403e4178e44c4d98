"""Ends the job when a process hangs, and names that process, its activity and the time.

A collective cannot tell which process is missing. So each process records its position (`enter_stage`, `mark_item`,
each wait for others). One thread publishes it once a second in the store of the rendezvous, another watches the clock.
A process that makes no progress for --dist_timeout seconds searches for the rank that is furthest behind or silent. The
first verdict goes to all processes, and all exit.
"""

import contextlib
import gc
import json
import os
import secrets
import sys
import threading
import time
import types
from typing import Any, Dict, Iterable, Iterator, List, Optional, Tuple

import torch
import torch.distributed as dist

from beit.distributed import preemption, process_group
from beit.errors import escape_text

LAST = 10 ** 12  # the item of a process that has finished its part of a stage and waits for the others
PHASES = ('waiting for data', 'computing', 'waiting for the other processes')
REPORT_SECONDS = 4.  # the other processes wait this long for the first report; the launcher ends them meanwhile


class _Position:
    """The position of the main thread, which is the only writer."""

    def __init__(self) -> None:
        self.index, self.work = (0, 0, 0), 'starting'  # (stage, item, number of the phase), and the work as text
        self.activity = self.work  # the work, or waiting for others
        # Before the first stage only waiting for others is timed: the duration of other work is unknown.
        self.since: Optional[float] = None

    def set(self, index: Tuple[int, int, int], activity: str) -> None:
        self.index, self.activity, self.since = index, activity, time.monotonic()


_position = _Position()
_watchdog: Optional['_Watchdog'] = None  # with several processes


class _Watchdog:
    def __init__(self, seconds: float, program: str) -> None:
        self.program = program
        self.rank, self.processes = process_group.rank(), process_group.world_size()
        # Random keys, which only these processes know: the store answers every connection.
        token = torch.tensor([secrets.randbits(62)])
        dist.broadcast(token, 0, group=process_group.host_groups[-1])
        self.store = dist.PrefixStore('beit %d' % token.item(), process_group.rendezvous_stores[-1])
        self.seconds = seconds
        self.beat_seconds = max(0.1, min(1., seconds / 20.))
        self.patience = max(3 * self.beat_seconds, min(5., seconds / 3))  # a rank without news for longer is silent
        self.beats = 0
        self.last_beats: Dict[int, Tuple[float, List[Any]]] = {}  # time and content of each rank's newest beat
        self.reached = time.monotonic()  # time of the store's last answer
        self.probing, self.terminating, self.closing = False, False, False
        self.message, self.received = '', ''  # this process's verdict, and the published one
        self.stopped = threading.Event()
        self.main_thread = threading.main_thread().ident
        if self.rank == 0:
            self.store.set('verdict', '')
        self.beat()
        self.threads = [threading.Thread(target=task, daemon=True, name='watchdog')
                        for task in (self.exchange_heartbeats, self.watch)]

    def state(self) -> List[Any]:
        """[index, activity, line of code] for the other processes."""
        frame = _frame(self.main_thread or 0)
        line = 'its end' if frame is None else '%s in %s:%d' % (
            frame.f_code.co_name, escape_text(os.path.basename(frame.f_code.co_filename)), frame.f_lineno)
        return [list(_position.index), _position.activity, line]

    def beat(self) -> None:
        self.beats += 1
        self.store.set(str(self.rank), json.dumps([self.beats] + self.state()))

    def exchange_heartbeats(self) -> None:
        """The thread that uses the store, where a dead connection can block it."""
        with contextlib.suppress(Exception):  # a store raises anything after the exit of process 0, which holds it
            while not (self.stopped.is_set() or self.received):
                self.beat()
                if self.message:
                    self.store.set('verdict', self.message)
                self.received = self.store.get('verdict').decode()
                for rank in range(self.processes) if self.probing else ():
                    beat = json.loads(self.store.get(str(rank)).decode())
                    if rank not in self.last_beats or self.last_beats[rank][1] != beat:
                        self.last_beats[rank] = time.monotonic(), beat
                self.reached = time.monotonic()
                self.stopped.wait(self.beat_seconds)

    def watch(self) -> None:
        """The thread that only reads the clock."""
        last = awake = time.monotonic()
        while not self.stopped.wait(self.beat_seconds / 2):
            now = time.monotonic()
            if now - last > self.seconds / 2:
                awake = now  # this process or its machine was suspended: the others are not late
            last, since = now, _position.since
            if self.received:
                self.terminating = True
                time.sleep(REPORT_SECONDS)
                self.end(self.received)
            elif since is not None and not self.closing:
                age = now - max(since, awake)
                self.probing = self.probing or age > self.seconds / 3
                if age > self.seconds and since == _position.since:
                    self.terminate(age)

    def terminate(self, age: float) -> None:
        blamed, can_report, message = self.diagnose(age)
        others = [rank for rank in range(self.processes) if rank not in blamed]
        since, self.terminating = _position.since, True
        if self.rank != (blamed[0] if can_report else (others or blamed)[0]):
            time.sleep(REPORT_SECONDS)
            if _position.since != since and not self.received:
                self.terminating = False
                return  # there is progress again
        self.end(message)

    def end(self, message: str) -> None:
        """Publish the verdict for the others, print its line, and exit."""
        self.message = self.received or message
        if self.stopped.is_set():
            return
        preemption.say_now('%s: error: %s (--dist_timeout %g)' % (self.program, self.message, self.seconds))
        until = time.monotonic() + 4 * self.beat_seconds
        while not self.received and time.monotonic() < until:  # set by the other thread
            time.sleep(self.beat_seconds / 4)
        if self.rank == 0:
            time.sleep(2 * self.beat_seconds)  # the others read it from the store, which ends with this process
        os._exit(1)

    def diagnose(self, age: float) -> Tuple[List[int], bool, str]:
        """(the ranks that block the others, whether they can report it, the message)."""
        silent = self.silent()
        if silent:
            return silent, False, '%s no answer for %d s, while process %d was %s; %s' % (
                _processes(silent, 'gives', 'give'), age, self.rank, _position.activity,
                'it was stopped or hangs, or its machine or the network is gone' if len(silent) == 1
                else 'they were stopped or hang, or their machines or the network are gone')
        states = {rank: beat[1:] for rank, (_, beat) in self.last_beats.items()}
        states[self.rank] = self.state()
        first = min(index for index, _, _ in states.values())
        behind = [rank for rank in sorted(states) if states[rank][0] == first]
        activity = '%s for %d s (%s)' % (states[behind[0]][1], age, ', '.join(
            'at ' + states[rank][2] for rank in behind[:3]))
        if len(behind) == self.processes:
            return [], False, 'all processes have been %s; is the network between them, or a device, stuck?' % activity
        # Before the first stage a process doesn't know that it is late.
        return behind, first[0] > 0, '%s behind: %s, and the others wait' % (_processes(behind, 'is', 'are'), activity)

    def silent(self) -> List[int]:
        """The ranks without news for longer than `patience`."""
        now = time.monotonic()
        if self.rank == 0 and now - self.reached > self.patience:
            return list(range(1, self.processes))  # a broken connection blocks the store, which is in this process
        newest = now if self.rank == 0 else self.reached
        silent = [rank for rank, (came, _) in sorted(self.last_beats.items())
                  if newest - came > self.patience and rank != self.rank]
        return silent or ([0] if now - newest > self.patience else [])  # process 0 holds the store


def _frame(thread: int) -> Optional[types.FrameType]:
    """The frame of a thread of this process, or None.

    Python 3.11 and some releases around it stop for ever if they collect garbage meanwhile (python/cpython#106883).
    """
    collects = gc.isenabled()
    gc.disable()
    try:
        return sys._current_frames().get(thread)
    finally:
        if collects:
            gc.enable()


def _processes(ranks: List[int], verb: str, plural: str) -> str:
    return 'process %d %s' % (ranks[0], verb) if len(ranks) == 1 else 'processes %s %s' % (
        ', '.join(map(str, ranks)), plural)


def start(seconds: float, program: str) -> None:
    """Start to watch, if there are several processes. `program` is for errors."""
    global _watchdog
    if process_group.world_size() > 1:
        watchdog = _Watchdog(seconds, program)
        process_group.barrier()  # every first beat is in the store afterwards
        _watchdog = watchdog
        process_group.wait_hooks.append(_waiting)
        for thread in watchdog.threads:
            thread.start()


def stop() -> None:
    """Stop watching before the last steps, which wait for no other process."""
    global _watchdog
    if _watchdog is not None:
        watchdog, _watchdog = _watchdog, None
        watchdog.stopped.set()
        for thread in watchdog.threads:  # a thread that returns from the store while Python ends would abort it
            thread.join(watchdog.patience)


def enter_stage(stage: str) -> None:
    """Enter the next stage, such as an epoch, an evaluation or a save; all processes have the same order."""
    _position.work = stage
    _position.set((_position.index[0] + 1, 0, 0), stage)


def mark_item(item: int, phase: int, stage: str) -> None:
    """Record the item of the stage, and the phase as an index of `PHASES`; `stage` has a %d for the item."""
    stage = stage % item if item != LAST else ''
    _position.work = PHASES[1] + stage
    _position.set((_position.index[0], item, phase), PHASES[phase] + stage)


def track(iterable: Iterable[Any], stage: str, start: int = 0) -> Iterator[Any]:
    """Enter a stage, yield from `iterable`, and mark each item."""
    enter_stage(stage)
    form = ' (%s step %%d)' % stage.replace('%', '%%')
    mark_item(start, 0, form)
    for number, item in enumerate(iterable, start):
        mark_item(number, 1, form)
        yield item
        mark_item(number + 1, 0, form)
    mark_item(LAST, 2, form)


def mark_waiting(activity: str = PHASES[2]) -> None:
    """Record that this process waits for the others, at the last marked item."""
    stage, item, phase = _position.index
    _position.set((stage, item, phase + 1), activity)


@contextlib.contextmanager
def _waiting() -> Iterator[None]:
    mark_waiting()
    yield
    mark_waiting(_position.work)
    if _position.index[0] == 0:
        _position.since = None


def silent_ranks() -> List[int]:
    """The ranks that are silent, for the message after a broken connection."""
    if _watchdog is None:
        return []
    _watchdog.probing = _watchdog.closing = True
    time.sleep(_watchdog.patience + 2 * _watchdog.beat_seconds)
    if _watchdog.terminating:
        _watchdog.threads[1].join()  # it has a verdict, and ends this process
    return _watchdog.silent()
