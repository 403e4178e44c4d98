"""Ends the job when a process hangs, and names that process: what it was doing, and for how long.

A collective only knows that somebody has not come. So each process notes where it is (`enter_stage`, `mark_item`, each
wait for others), a thread of its own tells the others once a second through the store in which they met, and another
thread watches the clock. Where a process has got no further for --dist_timeout seconds, it compares: who is furthest
behind, or has fallen silent? The first to know tells all, and all end.
"""

import contextlib
import json
import os
import sys
import threading
import time
from typing import Any, Iterable, Iterator, List

from beit.distributed import process_group
from beit.errors import escape_text

LAST = 10 ** 12  # the place of a process that has done its part of a stage and waits for the others
PHASES = ('waiting for data', 'computing', 'waiting for the other processes')
SPEAKER_SECONDS = 4.  # that the others give to the one who speaks first; a launcher ends them in that time
VERDICT = 'beit/verdict'

_watchdog = None  # this process's, where there are several processes


class _Watchdog:

    def __init__(self, store, rank, processes, seconds):
        self.store, self.rank, self.processes, self.seconds = store, rank, processes, seconds
        self.beat_seconds = max(0.1, min(1., seconds / 20.))
        self.patience = max(3 * self.beat_seconds, min(5., seconds / 3))  # with one that doesn't answer
        # Before the first stage only who waits for others is timed: there, nobody knows how long the rest takes.
        self.place, self.what, self.since = (0, 0, 0), 'starting', None
        self.doing = self.what  # again, after a wait
        self.beats, self.last_beats = 0, {}  # of each process: when its newest beat came, and what that said
        self.reached = time.monotonic()  # when the store last answered
        self.probing, self.terminating, self.closing, self.cut_off = False, False, False, False
        self.message, self.received = '', ''  # this process's verdict, and that which another one told
        self.stopped = threading.Event()
        self.main_thread = threading.main_thread().ident
        if rank == 0:
            store.set(VERDICT, '')
        store.set(self.key(rank), self.heartbeat())
        self.threads = [threading.Thread(target=task, daemon=True, name='watchdog')
                        for task in (self.send_heartbeats, self.watch)]

    def key(self, rank):
        return 'beit/beat/%d' % rank

    def heartbeat(self):
        self.beats += 1
        return json.dumps([self.beats, list(self.place), self.what, self.line()])

    # ---- a thread that may hang on a dead connection

    def send_heartbeats(self):
        try:
            while not (self.stopped.is_set() or self.received):
                self.store.set(self.key(self.rank), self.heartbeat())
                if self.message:
                    self.store.set(VERDICT, self.message)
                self.received = self.store.get(VERDICT).decode()
                if self.probing:
                    self.read_heartbeats()
                self.reached = time.monotonic()
                self.stopped.wait(self.beat_seconds)
        except Exception:  # whatever a store raises when process 0, which holds it, is gone
            self.cut_off = True

    def read_heartbeats(self):
        for rank in range(self.processes):
            said = json.loads(self.store.get(self.key(rank)).decode())
            if rank not in self.last_beats or self.last_beats[rank][1] != said:
                self.last_beats[rank] = time.monotonic(), said

    # ---- a thread that only looks at the clock

    def watch(self):
        looked = awake = time.monotonic()
        while not self.stopped.wait(self.beat_seconds / 2):
            now = time.monotonic()
            if now - looked > self.seconds / 2:
                awake = now  # this process, or all its machine, was stopped: the others had no chance
            looked, since = now, self.since
            if self.received:
                self.end(self.received, SPEAKER_SECONDS)
            elif self.closing:
                continue
            elif self.cut_off and now - max(self.reached, awake) > self.seconds:
                self.end(self.silence([0], now - self.reached), 0)
            elif since is not None:
                age = now - max(since, awake)
                self.probing = self.probing or age > self.seconds / 3
                if age > self.seconds and since == self.since:
                    self.terminate(age)

    def terminate(self, age):
        guilty, can_speak, message = self.diagnose(age)
        others = [rank for rank in range(self.processes) if rank not in guilty]
        speaker = guilty[0] if can_speak else (others or guilty)[0]
        since, self.terminating = self.since, True
        if self.rank != speaker:
            until = time.monotonic() + SPEAKER_SECONDS
            while time.monotonic() < until and not self.received:
                time.sleep(self.beat_seconds / 2)
            if self.since != since and not self.received:
                self.terminating = False
                return  # it goes on
        self.end(message, SPEAKER_SECONDS if self.received else 0)

    def end(self, message, seconds):
        """Tell the others, who may be in no state to find out, print the one line, and end the process."""
        self.terminating, self.message = True, self.received or message
        time.sleep(seconds)
        if self.stopped.is_set():
            return
        line = 'run_class_finetuning.py: error: %s (--dist_timeout %g)\n' % (self.message, self.seconds)
        os.write(2, line.encode())  # past Python's buffer, which a stuck thread may hold
        until = time.monotonic() + 4 * self.beat_seconds
        while not self.received and time.monotonic() < until:  # by this process's other thread
            time.sleep(self.beat_seconds / 4)
        if self.rank == 0:
            time.sleep(2 * self.beat_seconds)  # the others hear it of the store, which ends with this process
        os._exit(1)

    def diagnose(self, age):
        """(the processes that hold up the others, whether they can say so themselves, one message)."""
        silent = self.silent()
        if silent:
            return silent, False, self.silence(silent, age)
        words = {rank: said[1:] for rank, (_, said) in self.last_beats.items()}
        words[self.rank] = [list(self.place), self.what, self.line()]
        behind = [rank for rank in sorted(words) if words[rank][0] == min(word[0] for word in words.values())]
        what = '%s for %d s (%s)' % (words[behind[0]][1], age, ', '.join(
            'at ' + words[rank][2] for rank in behind[:3]))
        if len(behind) == self.processes:
            return [], False, 'all processes have been %s; is the network between them, or a device, stuck?' % what
        timed = words[behind[0]][0][0] > 0  # before the first stage it doesn't know that it is late
        return behind, timed, '%s behind: %s, and the others wait' % (_processes(behind, 'is', 'are'), what)

    def silent(self):
        """The processes that have not been heard of for a while."""
        now = time.monotonic()
        if self.rank == 0 and now - self.reached > self.patience:
            return list(range(1, self.processes))  # the store is here: it hangs on one that broke off in mid-word
        newest = now if self.rank == 0 else self.reached
        silent = [rank for rank, (came, _) in sorted(self.last_beats.items())
                  if newest - came > self.patience and rank != self.rank]
        return silent or ([0] if now - newest > self.patience else [])  # process 0 holds the store

    def silence(self, silent, seconds):
        return '%s no answer for %d s, while process %d was %s; %s' % (
            _processes(silent, 'gives', 'give'), seconds, self.rank, self.what,
            'it was stopped or hangs, or its machine or the network is gone' if len(silent) == 1
            else 'they were stopped or hang, or their machines or the network are gone')

    def line(self):
        """Where the main thread is."""
        frame = sys._current_frames().get(self.main_thread)
        return 'its end' if frame is None else '%s in %s:%d' % (
            frame.f_code.co_name, escape_text(os.path.basename(frame.f_code.co_filename)), frame.f_lineno)


def _processes(ranks, verb, plural):
    return 'process %d %s' % (ranks[0], verb) if len(ranks) == 1 else 'processes %s %s' % (
        ', '.join(map(str, ranks)), plural)


def start(store: Any, seconds: float) -> None:
    """Watch from here on. `store` is where the processes met; a single process needs no watching."""
    global _watchdog
    if process_group.world_size() > 1:
        dog = _Watchdog(store, process_group.rank(), process_group.world_size(), seconds)
        process_group.barrier()  # so that each finds the others' words
        _watchdog = dog
        process_group.set_wait_hook(_waiting)
        for thread in dog.threads:
            thread.start()


def stop() -> None:
    """Nothing more to watch: the last steps, which wait for nobody."""
    global _watchdog
    if _watchdog is not None:
        dog, _watchdog = _watchdog, None
        dog.stopped.set()
        for thread in dog.threads:  # a thread that comes back from the store into a Python that ends would abort it
            thread.join(dog.patience)


def enter_stage(stage: str) -> None:
    """The next stage, which all processes go through in the same order: an epoch, an evaluation, a save."""
    if _watchdog is not None:
        _watchdog.doing = stage
        _set((_watchdog.place[0] + 1, 0, 0), stage)


def mark_item(item: int, phase: int, stage: str) -> None:
    """Where in the stage: at item number so and so, in one of `PHASES` (its index)."""
    if _watchdog is not None:
        stage = stage % item if item != LAST else ''
        _watchdog.doing = PHASES[1] + stage
        _set((_watchdog.place[0], item, phase), PHASES[phase] + stage)


def track(iterable: Iterable, stage: str, start: int = 0) -> Iterator:
    """Yield from `iterable`, and mark at which item of the stage this process is."""
    enter_stage(stage)
    form = ' (%s step %%d)' % stage.replace('%', '%%')
    mark_item(start, 0, form)
    for number, item in enumerate(iterable, start):
        mark_item(number, 1, form)
        yield item
        mark_item(number + 1, 0, form)
    mark_item(LAST, 2, form)


def mark_waiting() -> None:
    """The other processes are waited for, at the item last marked."""
    if _watchdog is not None:
        _set(_watchdog.place[:2] + (_watchdog.place[2] + 1,), PHASES[2])


@contextlib.contextmanager
def _waiting():
    mark_waiting()
    yield
    if _watchdog is not None:
        _set(_watchdog.place[:2] + (_watchdog.place[2] + 1,), _watchdog.doing)
        if _watchdog.place[0] == 0:
            _watchdog.since = None


def _set(place, what):
    _watchdog.place, _watchdog.what, _watchdog.since = place, what, time.monotonic()


def silent_ranks() -> List[int]:
    """The numbers of the processes that have fallen silent, for the message after a broken connection."""
    if _watchdog is None:
        return []
    _watchdog.probing = _watchdog.closing = True
    time.sleep(_watchdog.patience + 2 * _watchdog.beat_seconds)
    if _watchdog.terminating:
        _watchdog.threads[1].join()  # it knows more, and ends this process
    return _watchdog.silent()
