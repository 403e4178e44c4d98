"""Finds, selects, synchronizes, seeds and times devices (npu, cuda, cpu)."""

import functools
import importlib
import importlib.util
import inspect
import os
import time
from typing import Any, Callable, Dict, Iterable, Iterator, Optional

import torch
from torch import nn

from beit.config import DEVICE_TYPES, parse_device
from beit.errors import UserError

PROCESS_GROUP_BACKEND = {'npu': 'hccl', 'cuda': 'nccl', 'cpu': 'gloo'}
CANN_MISMATCH = ('the NPU cannot be started (%s); are these the CANN and the driver that belong to this torch_npu? '
                 'docs/ascend.md lists them; look at npu-smi info too')


@functools.lru_cache(maxsize=None)
def npu_problem() -> Optional[str]:
    """None if NPUs can be used, else the reason with its remedy."""
    if not hasattr(torch, 'npu'):  # Ascend's PyTorch 1.5 has it built in
        if importlib.util.find_spec('torch_npu') is None:
            return 'torch_npu is not installed; install the torch_npu of your PyTorch, or use --device cuda or cpu'
        try:
            importlib.import_module('torch_npu')
        except (ImportError, OSError, RuntimeError) as error:
            reason = first_line(error)
            if 'undefined symbol' in reason:
                return CANN_MISMATCH % reason
            if 'cannot open shared object' in reason:
                return 'torch_npu is installed but CANN is not set up (%s); run: source test/env_npu.sh' % reason
            return 'torch_npu cannot be imported (%s); install the torch_npu of this PyTorch' % reason
    try:
        available = torch.npu.is_available()  # type: ignore[attr-defined]
    except RuntimeError as error:
        return CANN_MISMATCH % first_line(error)
    return None if available else 'torch_npu is installed but sees no NPU; look at npu-smi info'


def first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def is_compile_failure(error: BaseException) -> bool:
    """Whether torch.compile or its backend raised the error."""
    return any(kind.__module__.startswith(('torch._dynamo', 'torch._inductor')) for kind in type(error).__mro__)


def _cuda_problem() -> Optional[str]:
    if torch.cuda.is_available():
        return None
    if torch.backends.cuda.is_built():
        return 'PyTorch sees no CUDA GPU; look at nvidia-smi and CUDA_VISIBLE_DEVICES, or use --device cpu'
    return 'this PyTorch was built without CUDA; install a CUDA build, or use --device cpu'


_PROBLEM: Dict[str, Callable[[], Optional[str]]] = {'npu': npu_problem, 'cuda': _cuda_problem, 'cpu': lambda: None}


def find_device(name: str = 'auto', local_rank: int = 0, processes: int = 1) -> torch.device:
    """The `torch.device` for a process, not yet initialized.

    `name` is auto (npu, cuda, cpu: the first that works), npu, cuda, cpu, or one with an index such as cuda:1; else
    the index is `local_rank`. Raises `UserError` if the device can't be used, or there are too few for the processes.
    """
    kind, index = parse_device(name)
    if kind == 'auto':
        kind = next(kind for kind in DEVICE_TYPES if _PROBLEM[kind]() is None)
    problem = _PROBLEM[kind]()
    if problem:
        raise UserError('--device %s: %s' % (name, problem))
    if kind == 'cpu':
        return torch.device('cpu')
    if index and processes > 1:
        raise UserError('--device %s: %d processes need a device each; leave the index out' % (name, processes))
    count, number = device_module(kind).device_count(), int(index or local_rank)
    if number >= count:
        raise UserError('--device %s: process %d needs %s:%d, but there are %d; lower --nproc_per_node or the index'
                        % (name, local_rank, kind, number, count))
    return torch.device(kind, number)


def select_device(name: str = 'auto', local_rank: int = 0, processes: int = 1) -> torch.device:
    """`find_device`, and make it the current device. Raises `UserError` if it doesn't start."""
    device = find_device(name, local_rank, processes)
    if device_module(device):
        try:
            device_module(device).set_device(device)
            (torch.ones(1, device=device) + 1).item()
        except RuntimeError as error:
            raise UserError('--device %s: %s' % (name, CANN_MISMATCH % first_line(error) if device.type == 'npu' else
                                                 'the GPU cannot be started (%s)' % first_line(error))) from None
    return device


def device_module(device: Any) -> Any:
    """torch.npu or torch.cuda, or None for the CPU. Takes a device or its type."""
    return None if getattr(device, 'type', device) == 'cpu' else getattr(torch, getattr(device, 'type', device), None)


def npu_unused_reason(name: str, device: torch.device) -> str:
    """One line if --device auto does not use an installed torch_npu, else ''."""
    if name != 'auto' or device.type == 'npu' or importlib.util.find_spec('torch_npu') is None:
        return ''
    return 'Not using an NPU: %s\n' % npu_problem()


def device_name(device: torch.device) -> str:
    module = device_module(device)
    return module.get_device_name(device.index or 0) if module else 'CPU, %d threads' % torch.get_num_threads()


def synchronize(device: torch.device) -> None:
    """Wait until the device has finished all work."""
    if device_module(device):
        device_module(device).synchronize()


def record_event(device: torch.device) -> Any:
    """A point in a device's work, for `elapsed_seconds` after a synchronization; on a CPU the current time."""
    if hasattr(device_module(device), 'Event'):
        event = device_module(device).Event(enable_timing=True)
        event.record()
        return event
    return time.perf_counter()


def elapsed_seconds(start: Any, end: Any) -> float:
    """Seconds between two results of `record_event`."""
    return end - start if isinstance(start, float) else start.elapsed_time(end) / 1000.


def max_memory_mb(device: torch.device) -> float:
    """Peak memory of tensors on the device, in MiB; 0 on a CPU."""
    return device_module(device).max_memory_allocated() / 2 ** 20 if device_module(device) else 0.


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error means that the device or the machine has no more memory."""
    return isinstance(error, MemoryError) or any(words in str(error) for words in (
        'out of memory', 'not enough memory', 'can\'t allocate memory'))


def seed_device(seed: int) -> None:
    """Seed the NPUs' generators; torch.manual_seed seeds only the CPU's and CUDA's."""
    if hasattr(torch, 'npu') and npu_problem() is None:
        torch.npu.manual_seed_all(seed)


def make_deterministic(device: torch.device) -> None:
    """Use deterministic kernels only. Raises `UserError` if PyTorch can't ensure it, and later an error without one."""
    if hasattr(torch, 'use_deterministic_algorithms'):
        torch.use_deterministic_algorithms(True)
    elif device.type != 'cpu':
        raise UserError('--deterministic: this PyTorch cannot ensure it on %s; use a newer one, or a CPU' % device.type)
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = True, False


def prepare_determinism() -> None:
    """Set the environment variables for deterministic kernels, before the device starts."""
    os.environ.setdefault('CUBLAS_WORKSPACE_CONFIG', ':4096:8')
    os.environ.setdefault('HCCL_DETERMINISTIC', 'true')


def set_compile_mode(device: torch.device, mode: str) -> None:
    """Let an NPU compile operators for each new shape: 'on', 'off', or 'auto', torch_npu's default."""
    if mode == 'auto':
        return
    if not hasattr(device_module(device), 'set_compile_mode'):
        raise UserError('--jit_compile %s: this needs an NPU with a newer torch_npu, and the device is %s; leave the '
                        'flag out' % (mode, device.type))
    device_module(device).set_compile_mode(jit_compile=mode == 'on')


def noise_generator(device: torch.device) -> torch.Generator:
    """A random generator of the device, or of the CPU if this PyTorch has none for the device."""
    try:
        generator = torch.Generator(device=device)
        torch.empty(1, device=device).normal_(generator=generator)
        return generator
    except (RuntimeError, TypeError):
        return torch.Generator()


def prefetch(items: Iterable, move: Callable[[Any], Any], device: torch.device) -> Iterator:
    """Yield move(item), a copy that does not wait, of each item; a side stream of npu and cuda copies the next one."""
    module = device_module(device)
    if not hasattr(module, 'Stream'):
        yield from map(move, items)
        return
    side, ready = module.Stream(), None
    for item in items:
        side.wait_stream(module.current_stream())  # `move` may reuse memory that this stream used and freed
        with module.stream(side):
            following = move(item)
        if ready is not None:
            yield ready
        module.current_stream().wait_stream(side)
        ready = following
    if ready is not None:
        yield ready


def is_synchronous(device: torch.device) -> bool:
    """Whether reading a number from the device never waits for pending work."""
    return device.type == 'cpu'


def wrap_ddp(model: nn.Module, device: torch.device) -> nn.Module:
    """The model in DistributedDataParallel.

    Every parameter gets a gradient, so `find_unused_parameters` is not needed. Buffers are constant and not broadcast:
    that would hang an evaluation in which one process has more batches than another.
    """
    known = inspect.signature(nn.parallel.DistributedDataParallel).parameters
    name = 'forward_sync_buffers' if 'forward_sync_buffers' in known else 'broadcast_buffers'  # before PyTorch 2.14
    options: Dict[str, Any] = {name: False}
    return nn.parallel.DistributedDataParallel(model, None if device.type == 'cpu' else [device.index], **options)


def unwrap(model: Any) -> nn.Module:
    """The model inside DistributedDataParallel and the casting wrappers of `beit.training.loss_scaler`."""
    while hasattr(model, 'module'):
        model = model.module
    return model
