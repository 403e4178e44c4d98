"""The ranks that a launcher sets in the environment. Imports no PyTorch."""

import os
import time
from typing import Optional, Tuple

from beit.config import DistributedConfig
from beit.errors import UserError


def launch_environment(config: DistributedConfig) -> Tuple[int, int, int]:
    """(rank, world_size, local_rank) from torchrun, Open MPI (--dist_on_itp) or SLURM; (0, 1, 0) without them."""
    def number(name: str, default: Optional[str] = None) -> int:
        text = os.environ.get(name, default)
        if text is None:
            raise UserError('--dist_on_itp: %s is not set; start the program with mpirun, or leave the flag out' % name)
        if not text.isdigit():
            raise UserError('%s=%s in the environment is not a whole number; unset it, or start the program with a '
                            'launcher, which sets it' % (name, text))
        return int(text)

    if config.dist_on_itp:
        return (number('OMPI_COMM_WORLD_RANK'), number('OMPI_COMM_WORLD_SIZE'), number('OMPI_COMM_WORLD_LOCAL_RANK'))
    if 'RANK' in os.environ and 'WORLD_SIZE' in os.environ:
        return number('RANK'), number('WORLD_SIZE'), number('LOCAL_RANK', str(max(config.local_rank, 0)))
    if number('SLURM_NTASKS', '1') > 1 and 'SLURM_PROCID' in os.environ and 'MASTER_ADDR' in os.environ:
        return number('SLURM_PROCID'), number('SLURM_NTASKS'), number('SLURM_LOCALID', '0')
    return 0, 1, 0


def wait_seconds(default: int) -> int:
    """The seconds to wait for the other processes or machines at the start: DIST_WAIT_SECONDS, or the default."""
    text = os.environ.get('DIST_WAIT_SECONDS') or str(default)
    if not text.isdigit() or not 0 < int(text) <= 10 ** 6:
        raise UserError('DIST_WAIT_SECONDS=%s in the environment is not a whole number of seconds; unset it' % text)
    return int(text)


def reports_errors() -> bool:
    """Whether this process reports an error before the processes are connected: one per machine does."""
    return os.environ.get('LOCAL_RANK', '0') == '0'


def defer_report(first: bool, seconds: float) -> None:
    """Wait, unless this process is the `first` to report an error; the launcher ends the processes that wait."""
    if not first and int(os.environ.get('WORLD_SIZE', 1)) > 1:
        time.sleep(seconds)
