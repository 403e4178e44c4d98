"""Ends the job when a process hangs, and names that process: what it was doing, and for how long.

A collective only knows that somebody has not come. So each process notes where it is (`enter`, `mark`), a thread of its
own tells the others once a second through the store in which they met, and another thread watches the clock. Where a
process has got no further for --dist_timeout seconds, it compares: who is furthest behind, or has fallen silent?
"""

import json
import os
import sys
import threading
import time
import traceback

import distributed
from errors import printable

LAST = 10 ** 12  # the place of a process that has done its part of a stage and waits for the others
PHASES = ('waiting for data', 'computing', 'waiting for the other processes')

_dog = None  # this process's, where there are several processes


class _Watchdog:

    def __init__(self, store, rank, processes, seconds):
        self.store, self.rank, self.processes, self.seconds = store, rank, processes, seconds
        self.beat_seconds = max(0.1, min(1., seconds / 10.))
        self.place, self.what, self.since = (0, 0, 0), 'starting', None  # no limit before the first stage
        self.beats, self.heard = 0, {}  # of each process: (its newest beat, when that came, its place and what it does)
        self.reached = time.monotonic()  # when the store last answered
        self.curious, self.ended = False, False
        self.main_thread = threading.main_thread().ident
        store.set(self.key(rank), self.word())
        for task in (self.tell, self.watch):
            threading.Thread(target=task, daemon=True, name='watchdog').start()

    def key(self, rank):
        return 'beit/beat/%d' % rank

    def word(self):
        self.beats += 1
        return json.dumps([self.beats, list(self.place), self.what])

    # ---- a thread that may hang on a dead connection

    def tell(self):
        while not self.ended:
            try:
                self.store.set(self.key(self.rank), self.word())
                if self.curious:
                    self.listen()
                self.reached = time.monotonic()
            except Exception:  # whatever a store raises when the process that holds it is gone
                if not self.curious:
                    time.sleep(self.beat_seconds)
            time.sleep(self.beat_seconds)

    def listen(self):
        for rank in range(self.processes):
            beat, place, what = json.loads(self.store.get(self.key(rank)).decode())
            known = self.heard.get(rank)
            self.heard[rank] = (beat, time.monotonic() if known is None or known[0] != beat else known[1],
                                tuple(place), what)

    # ---- a thread that only looks at the clock

    def watch(self):
        while not self.ended:
            time.sleep(self.beat_seconds / 2)
            since = self.since
            if since is None:
                continue
            age = time.monotonic() - since
            self.curious = self.curious or age > self.seconds / 3
            if age > self.seconds and since == self.since and not self.ended:
                self.bite(age)

    def bite(self, age):
        guilty, can_speak, sentence = self.verdict(age)
        if self.rank not in guilty and can_speak:
            time.sleep(3)  # the guilty one speaks first; a launcher then ends this one
        if self.ended or self.since is None or time.monotonic() - self.since < self.seconds:
            return
        print('run_class_finetuning.py: error: %s (--dist_timeout %g)' % (sentence, self.seconds), file=sys.stderr,
              flush=True)
        os._exit(1)

    def verdict(self, age):
        """(the processes that hold up the others, whether they can say so themselves, one sentence)."""
        silent = self.silent()
        if silent:
            return silent, False, '%s no answer for %d s, while process %d was %s; %s' % (
                _processes(silent, 'gives', 'give'), age, self.rank, self.what,
                'it was stopped, or its machine or the network is gone' if len(silent) == 1
                else 'they were stopped, or their machines or the network are gone')
        places = {rank: word[2] for rank, word in self.heard.items()}
        places[self.rank] = self.place
        behind = [rank for rank in sorted(places) if places[rank] == min(places.values())]
        if len(behind) == self.processes:
            return [], False, 'all processes have been %s for %d s; is the network between them, or a device, ' \
                'stuck?' % (self.what, age)
        what = self.what if self.rank in behind else self.heard[behind[0]][3]
        return behind, True, '%s behind: %s for %d s, and the others wait%s' % (
            _processes(behind, 'is', 'are'), what, age, self.line() if behind == [self.rank] else '')

    def silent(self):
        """The processes that have not been heard of for a while."""
        patience = max(3 * self.beat_seconds, min(5., self.seconds / 2))
        now = time.monotonic()
        if now - self.reached > patience:
            return [0] if self.rank else []  # process 0 holds the store
        return [rank for rank, word in sorted(self.heard.items()) if now - word[1] > patience and rank != self.rank]

    def line(self):
        """Which line of which file the main thread is at."""
        frame = sys._current_frames().get(self.main_thread)
        if frame is None:
            return ''
        here = traceback.extract_stack(frame)[-1]
        return ' (at %s:%d, %s)' % (printable(os.path.basename(here.filename)), here.lineno, here.name)


def _processes(ranks, verb, plural):
    return 'process %d %s' % (ranks[0], verb) if len(ranks) == 1 else 'processes %s %s' % (
        ', '.join(map(str, ranks)), plural)


def start(store, seconds):
    """Watch from the first `enter` on. `store` is where the processes met; a single process needs no watching."""
    global _dog
    if distributed.world_size() > 1:
        _dog = _Watchdog(store, distributed.rank(), distributed.world_size(), seconds)
        distributed.barrier()  # so that each finds the others' words


def stop():
    """Nothing more to watch: the last steps, which wait for nobody."""
    global _dog
    if _dog is not None:
        _dog.ended, _dog = True, None


def enter(stage):
    """The next stage, which all processes go through in the same order: an epoch, an evaluation, a save."""
    if _dog is not None:
        _set((_dog.place[0] + 1, 0, 0), stage)


def mark(item, phase, stage):
    """Where in the stage: at item number so and so, in one of `PHASES` (its index)."""
    if _dog is not None:
        _set((_dog.place[0], item, phase), '%s%s' % (PHASES[phase], stage % item if item != LAST else ''))


def wait():
    """The other processes are waited for, at the item last marked."""
    if _dog is not None:
        stage, item, _ = _dog.place
        _set((stage, item, 2), PHASES[2])


def _set(place, what):
    _dog.place, _dog.what, _dog.since = place, what, time.monotonic()


def lost():
    """The numbers of the processes that have fallen silent, for the message after a broken connection."""
    if _dog is None:
        return []
    _dog.curious = True
    patience = max(3 * _dog.beat_seconds, min(5., _dog.seconds / 2))
    time.sleep(patience + 2 * _dog.beat_seconds)
    return _dog.silent()
