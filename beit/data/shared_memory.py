"""Limits the number of loader processes to the room for their batches in /dev/shm."""

import os

from beit.distributed import process_group
from beit.log import log_main

FOLDER = '/dev/shm'
BATCHES = 3  # of a worker: two waiting, and one in progress


def workers_that_fit(wanted: int, batch_bytes: int) -> int:
    """The number of loader processes, at most `wanted`, for whose batches there is room. A line reports a reduction.

    Containers often have little shared memory (docker: 64 MB); SIGBUS kills a process that exceeds it.
    """
    try:
        status = os.statvfs(FOLDER)
    except (OSError, AttributeError):  # this system has no /dev/shm
        return wanted
    processes = os.environ.get('LOCAL_WORLD_SIZE', '')  # on this machine
    sharers = int(processes) if processes.isdigit() else process_group.world_size()
    available = 0.9 * status.f_bavail * status.f_frsize / sharers
    workers = min(wanted, int(available / (BATCHES * batch_bytes)))
    if workers < wanted:
        log_main('%s has room for the batches of %d loader processes, not of %d; docker run --shm-size=%dg enlarges it'
                 % (FOLDER, workers, wanted, 1 + BATCHES * wanted * batch_bytes * process_group.world_size()
                    // 2 ** 30))
    return workers
