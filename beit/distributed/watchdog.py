"""Ends the job when a process hangs, and names that process: what it was doing, and for how long.

A collective only knows that somebody has not come. So each process notes where it is (`enter_stage`, `mark_item`, each
wait for others), a thread of its own tells the others once a second through the store in which they met, and another
thread watches the clock. Where a process has got no further for --dist_timeout seconds, it compares: who is furthest
behind, or has fallen silent? The first to know tells all, and all end.
"""

import contextlib
import json
import os
import secrets
import sys
import threading
import time
from typing import Any, Dict, Iterable, Iterator, List, Optional, Tuple

import torch
import torch.distributed as dist

from beit.distributed import preemption, process_group
from beit.errors import escape_text

LAST = 10 ** 12  # the item of a process that has done its part of a stage and waits for the others
PHASES = ('waiting for data', 'computing', 'waiting for the other processes')
SPEAKER_SECONDS = 4.  # that the others give to the one who speaks first; a launcher ends them in that time


class _Position:
    """Where the main thread is, which alone changes it."""

    def __init__(self) -> None:
        self.place, self.doing = (0, 0, 0), 'starting'  # (stage, item, number of the phase), and that in words
        self.what = self.doing  # also while it waits for others
        # Before the first stage only who waits for others is timed: there, nobody knows how long the rest takes.
        self.since: Optional[float] = None

    def set(self, place: Tuple[int, int, int], what: str) -> None:
        self.place, self.what, self.since = place, what, time.monotonic()


_position = _Position()
_watchdog: Optional['_Watchdog'] = None  # where there are several processes


class _Watchdog:

    def __init__(self, store: Any, seconds: float) -> None:
        self.rank, self.processes = process_group.rank(), process_group.world_size()
        # Only the processes know the keys: the store answers everybody who connects to it.
        token = torch.tensor([secrets.randbits(62)])
        dist.broadcast(token, 0, group=process_group.host_groups[-1])
        self.store, self.seconds = dist.PrefixStore('beit %d' % token.item(), store), seconds
        self.beat_seconds = max(0.1, min(1., seconds / 20.))
        self.patience = max(3 * self.beat_seconds, min(5., seconds / 3))  # with one that doesn't answer
        self.beats = 0
        self.last_beats: Dict[int, Tuple[float, List[Any]]] = {}  # when each one's newest came, and what it said
        self.reached = time.monotonic()  # when the store last answered
        self.probing, self.terminating, self.closing = False, False, False
        self.message, self.received = '', ''  # this process's verdict, and that which another one told
        self.stopped = threading.Event()
        self.main_thread = threading.main_thread().ident
        if self.rank == 0:
            self.store.set('verdict', '')
        self.beat()
        self.threads = [threading.Thread(target=task, daemon=True, name='watchdog')
                        for task in (self.exchange_heartbeats, self.watch)]

    def state(self) -> List[Any]:
        """The place, what it is doing, and at which line of the code, as the others read it."""
        frame = sys._current_frames().get(self.main_thread or 0)
        line = 'its end' if frame is None else '%s in %s:%d' % (
            frame.f_code.co_name, escape_text(os.path.basename(frame.f_code.co_filename)), frame.f_lineno)
        return [list(_position.place), _position.what, line]

    def beat(self) -> None:
        self.beats += 1
        self.store.set(str(self.rank), json.dumps([self.beats] + self.state()))

    # ---- a thread that may hang on a dead connection

    def exchange_heartbeats(self) -> None:
        with contextlib.suppress(Exception):  # whatever a store raises when process 0, which holds it, is gone
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

    # ---- a thread that only looks at the clock

    def watch(self) -> None:
        looked = awake = time.monotonic()
        while not self.stopped.wait(self.beat_seconds / 2):
            now = time.monotonic()
            if now - looked > self.seconds / 2:
                awake = now  # this process, or all its machine, was stopped: the others had no chance
            looked, since = now, _position.since
            if self.received:
                self.terminating = True
                time.sleep(SPEAKER_SECONDS)
                self.end(self.received)
            elif since is not None and not self.closing:
                age = now - max(since, awake)
                self.probing = self.probing or age > self.seconds / 3
                if age > self.seconds and since == _position.since:
                    self.terminate(age)

    def terminate(self, age: float) -> None:
        guilty, can_speak, message = self.diagnose(age)
        others = [rank for rank in range(self.processes) if rank not in guilty]
        since, self.terminating = _position.since, True
        if self.rank != (guilty[0] if can_speak else (others or guilty)[0]):
            time.sleep(SPEAKER_SECONDS)
            if _position.since != since and not self.received:
                self.terminating = False
                return  # it goes on
        self.end(message)

    def end(self, message: str) -> None:
        """Tell the others, who may be in no state to find out, print the one line, and end the process."""
        self.message = self.received or message
        if self.stopped.is_set():
            return
        preemption.say_now('run_class_finetuning.py: error: %s (--dist_timeout %g)' % (self.message, self.seconds))
        until = time.monotonic() + 4 * self.beat_seconds
        while not self.received and time.monotonic() < until:  # by this process's other thread
            time.sleep(self.beat_seconds / 4)
        if self.rank == 0:
            time.sleep(2 * self.beat_seconds)  # the others hear it of the store, which ends with this process
        os._exit(1)

    def diagnose(self, age: float) -> Tuple[List[int], bool, str]:
        """(the processes that hold up the others, whether they can say so themselves, one message)."""
        silent = self.silent()
        if silent:
            return silent, False, self.silence(silent, age)
        states = {rank: beat[1:] for rank, (_, beat) in self.last_beats.items()}
        states[self.rank] = self.state()
        first = min(place for place, _, _ in states.values())
        behind = [rank for rank in sorted(states) if states[rank][0] == first]
        what = '%s for %d s (%s)' % (states[behind[0]][1], age, ', '.join(
            'at ' + states[rank][2] for rank in behind[:3]))
        if len(behind) == self.processes:
            return [], False, 'all processes have been %s; is the network between them, or a device, stuck?' % what
        # Before the first stage it doesn't know that it is late.
        return behind, first[0] > 0, '%s behind: %s, and the others wait' % (_processes(behind, 'is', 'are'), what)

    def silent(self) -> List[int]:
        """The processes that have not been heard of for a while."""
        now = time.monotonic()
        if self.rank == 0 and now - self.reached > self.patience:
            return list(range(1, self.processes))  # the store is here: it hangs on one that broke off in mid-word
        newest = now if self.rank == 0 else self.reached
        silent = [rank for rank, (came, _) in sorted(self.last_beats.items())
                  if newest - came > self.patience and rank != self.rank]
        return silent or ([0] if now - newest > self.patience else [])  # process 0 holds the store

    def silence(self, silent: List[int], seconds: float) -> str:
        return '%s no answer for %d s, while process %d was %s; %s' % (
            _processes(silent, 'gives', 'give'), seconds, self.rank, _position.what,
            'it was stopped or hangs, or its machine or the network is gone' if len(silent) == 1
            else 'they were stopped or hang, or their machines or the network are gone')


def _processes(ranks: List[int], verb: str, plural: str) -> str:
    return 'process %d %s' % (ranks[0], verb) if len(ranks) == 1 else 'processes %s %s' % (
        ', '.join(map(str, ranks)), plural)


def start(store: Any, seconds: float) -> None:
    """Watch from here on. `store` is where the processes met; a single process needs no watching."""
    global _watchdog
    if process_group.world_size() > 1:
        watchdog = _Watchdog(store, seconds)
        process_group.barrier()  # so that each finds the others' words
        _watchdog = watchdog
        process_group.set_wait_hook(_waiting)
        for thread in watchdog.threads:
            thread.start()


def stop() -> None:
    """Nothing more to watch: the last steps, which wait for nobody."""
    global _watchdog
    if _watchdog is not None:
        watchdog, _watchdog = _watchdog, None
        watchdog.stopped.set()
        for thread in watchdog.threads:  # one that comes back from the store into a Python that ends would abort it
            thread.join(watchdog.patience)


def enter_stage(stage: str) -> None:
    """The next stage, which all processes go through in the same order: an epoch, an evaluation, a save."""
    _position.doing = stage
    _position.set((_position.place[0] + 1, 0, 0), stage)


def mark_item(item: int, phase: int, stage: str) -> None:
    """Where in the stage: at item number so and so, in one of `PHASES` (its index)."""
    stage = stage % item if item != LAST else ''
    _position.doing = PHASES[1] + stage
    _position.set((_position.place[0], item, phase), PHASES[phase] + stage)


def track(iterable: Iterable[Any], stage: str, start: int = 0) -> Iterator[Any]:
    """Yield from `iterable`, and mark at which item of the stage this process is."""
    enter_stage(stage)
    form = ' (%s step %%d)' % stage.replace('%', '%%')
    mark_item(start, 0, form)
    for number, item in enumerate(iterable, start):
        mark_item(number, 1, form)
        yield item
        mark_item(number + 1, 0, form)
    mark_item(LAST, 2, form)


def mark_waiting(what: str = PHASES[2]) -> None:
    """The other processes are waited for, at the item last marked."""
    stage, item, phase = _position.place
    _position.set((stage, item, phase + 1), what)


@contextlib.contextmanager
def _waiting() -> Iterator[None]:
    mark_waiting()
    yield
    mark_waiting(_position.doing)
    if _position.place[0] == 0:
        _position.since = None


def silent_ranks() -> List[int]:
    """The numbers of the processes that have fallen silent, for the message after a broken connection."""
    if _watchdog is None:
        return []
    _watchdog.probing = _watchdog.closing = True
    time.sleep(_watchdog.patience + 2 * _watchdog.beat_seconds)
    if _watchdog.terminating:
        _watchdog.threads[1].join()  # it knows more, and ends this process
    return _watchdog.silent()
