"""Limits the number of loader processes to the room for their batches in /dev/shm, and to the files that they need."""

import os
import resource
import warnings

from beit.distributed import process_group
from beit.log import log_main

FOLDER = '/dev/shm'
BATCHES = 3  # of a worker: two waiting, and one in progress
SMALL_PAGES = 3  # of a batch, for its targets and indices
PAGES = 4, 16  # of a worker's and of a loader's semaphores
FILES = 8, 64  # of a worker, and of the rest of the process

warnings.filterwarnings('ignore', 'This DataLoader will create')  # more workers than cores: on purpose


def workers_that_fit(wanted: int, *batch_bytes: int) -> int:
    """The number of loader processes, at most `wanted`, for which there is room. A line reports a reduction.

    Containers often have little shared memory (docker: 64 MB); SIGBUS kills a process that exceeds it.

    Args:
        batch_bytes: the size of the images of a batch, for each loader.
    """
    limit, files = resource.getrlimit(resource.RLIMIT_NOFILE)[0], FILES[0] * len(batch_bytes)
    workers = wanted if limit < 0 else max(0, min(wanted, (limit - FILES[1]) // files))
    if workers < wanted:
        log_main('--num_workers %d: a process may open only %d files here, which is enough for %d loader processes; '
                 'ulimit -n %d raises the limit' % (wanted, limit, workers, FILES[1] + files * wanted))
    try:
        status = os.statvfs(FOLDER)
    except OSError:  # this system has no /dev/shm
        return workers
    processes = os.environ.get('LOCAL_WORLD_SIZE', '')  # on this machine
    sharers = int(processes) if processes.isdigit() else process_group.world_size()
    page = os.sysconf('SC_PAGE_SIZE')
    each = sum(BATCHES * (size + SMALL_PAGES * page) + PAGES[0] * page for size in batch_bytes)
    available = 0.9 * status.f_bavail * status.f_frsize / sharers - len(batch_bytes) * PAGES[1] * page
    fit = max(0, min(workers, int(available / each)))
    if fit < workers:
        log_main('%s has room for the batches of %d loader processes, not of %d; docker run --shm-size=%dg enlarges it'
                 % (FOLDER, fit, workers, 1 + workers * each * process_group.world_size() // 2 ** 30))
    return fit
