"""Devices (npu, cuda, cpu): which there are, and synchronizing, seeding and timing them."""

import functools
import importlib
import importlib.util
import inspect
import os
import time
from typing import Any, Callable, Dict, Iterable, Iterator, Optional

import torch
from torch import nn

from beit.errors import UserError

DEVICE_TYPES = ('npu', 'cuda', 'cpu')  # in order of preference
PROCESS_GROUP_BACKEND = {'npu': 'hccl', 'cuda': 'nccl', 'cpu': 'gloo'}


CANN_MISMATCH = ('the NPU cannot be started (%s); are these the CANN and the driver that belong to this torch_npu? '
                 'docs/ascend.md lists them; look at npu-smi info too')


@functools.lru_cache(maxsize=None)
def npu_problem() -> Optional[str]:
    """None where NPUs can be used, else the reason, with its cure."""
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
            return 'torch_npu cannot be imported (%s); install the one that belongs to this PyTorch' % reason
    try:
        available = torch.npu.is_available()  # type: ignore[attr-defined]
    except RuntimeError as error:
        return CANN_MISMATCH % first_line(error)
    return None if available else 'torch_npu is installed but sees no NPU; look at npu-smi info'


def first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def _cuda_problem() -> Optional[str]:
    if torch.cuda.is_available():
        return None
    if torch.backends.cuda.is_built() if hasattr(torch.backends, 'cuda') else torch.version.cuda:
        return 'PyTorch sees no CUDA GPU; look at nvidia-smi and CUDA_VISIBLE_DEVICES, or use --device cpu'
    return 'this PyTorch was built without CUDA; install a CUDA build, or use --device cpu'


_PROBLEM: Dict[str, Callable[[], Optional[str]]] = {'npu': npu_problem, 'cuda': _cuda_problem, 'cpu': lambda: None}


def find_device(name: str = 'auto', local_rank: int = 0, processes: int = 1) -> torch.device:
    """The `torch.device` that a process is to use, not yet touched.

    Args:
        name (str): auto (npu, cuda, cpu: the first that works), npu, cuda, cpu, or one of them with an index, cuda:1.
        local_rank (int): the device's index where `name` has none.

    Raises:
        UserError: the device can't be used, or has fewer devices than processes.
    """
    kind, _, index = name.partition(':')
    if kind == 'auto':
        kind = next(kind for kind in DEVICE_TYPES if _PROBLEM[kind]() is None)
    if kind not in DEVICE_TYPES or (index and not (index.isdigit() and kind != 'cpu')):
        raise UserError('--device must be auto, npu, cuda or cpu, or one with an index such as cuda:1; got %r' % name)
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
    """`find_device`, which becomes the current one, and a `UserError` where it doesn't start."""
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
    """torch.npu or torch.cuda, or None for the CPU."""
    return getattr(torch, getattr(device, 'type', device), None) if getattr(device, 'type', device) != 'cpu' else None


def npu_unused_reason(name: str, device: torch.device) -> str:
    """One line, where --device auto leaves torch_npu unused, or ''. Nobody should train on a CPU without noticing."""
    if name != 'auto' or device.type == 'npu' or importlib.util.find_spec('torch_npu') is None:
        return ''
    return 'Not using an NPU: %s\n' % npu_problem()


def device_name(device: torch.device) -> str:
    module = device_module(device)
    return module.get_device_name(device.index or 0) if module else 'CPU, %d threads' % torch.get_num_threads()


def synchronize(device: torch.device) -> None:
    """Wait until the device has done all that it was given."""
    if device_module(device):
        device_module(device).synchronize()


def record_event(device: torch.device) -> Any:
    """A moment in a device's work, for `elapsed_seconds` once the device has been waited for; on a CPU, now."""
    if hasattr(device_module(device), 'Event'):
        event = device_module(device).Event(enable_timing=True)
        event.record()
        return event
    return time.perf_counter()


def elapsed_seconds(start: Any, end: Any) -> float:
    """Seconds between two of `record_event`."""
    return end - start if isinstance(start, float) else start.elapsed_time(end) / 1000.


def max_memory_mb(device: torch.device) -> float:
    """Peak memory that tensors took on the device, in MiB; 0 on a CPU, where nobody counts it."""
    return device_module(device).max_memory_allocated() / 2 ** 20 if device_module(device) else 0.


def reset_max_memory(device: torch.device) -> None:
    if device_module(device):
        device_module(device).reset_peak_memory_stats()


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that the device, or the machine, has no more memory."""
    return isinstance(error, MemoryError) or any(words in str(error) for words in (
        'out of memory', 'not enough memory', 'can\'t allocate memory'))


def seed_device(seed: int) -> None:
    """Seed every device's generator. torch.manual_seed has seeded those of the CPU and of CUDA already."""
    if hasattr(torch, 'npu') and npu_problem() is None:
        torch.npu.manual_seed_all(seed)


def make_deterministic(device: torch.device) -> None:
    """Only deterministic kernels, and an error where there is none; a `UserError` where PyTorch can't promise it."""
    if hasattr(torch, 'use_deterministic_algorithms'):
        torch.use_deterministic_algorithms(True)
    elif hasattr(torch, 'set_deterministic'):
        torch.set_deterministic(True)
    elif device.type != 'cpu':
        raise UserError('--deterministic: this PyTorch cannot promise it on %s; use a newer one, or a CPU'
                        % device.type)
    if hasattr(torch.backends, 'cudnn'):
        torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = True, False


def prepare_determinism() -> None:
    """What has to be set before the device starts."""
    os.environ.setdefault('CUBLAS_WORKSPACE_CONFIG', ':4096:8')
    os.environ.setdefault('HCCL_DETERMINISTIC', 'true')


def set_compile_mode(device: torch.device, mode: str) -> None:
    """Whether an NPU compiles operators for the shapes it meets: 'on', 'off', or 'auto', what it does by itself."""
    if mode == 'auto':
        return
    if not hasattr(device_module(device), 'set_compile_mode'):
        raise UserError('--jit_compile %s: only NPUs have it, with a newer torch_npu, and this runs on %s; leave the '
                        'flag out' % (mode, device.type))
    device_module(device).set_compile_mode(jit_compile=mode == 'on')


def can_pin_memory(device: torch.device) -> bool:
    """Whether batches can be put in page-locked memory for this device."""
    return device.type != 'cpu'


def noise_generator(device: torch.device) -> torch.Generator:
    """A random generator of the device, or of the CPU where this PyTorch has none for it."""
    try:
        generator = torch.Generator(device=device)
        torch.empty(1, device=device).normal_(generator=generator)
        return generator
    except (RuntimeError, TypeError):
        return torch.Generator()


def prefetch(items: Iterable, move: Callable[[Any], Any], device: torch.device) -> Iterator:
    """Yield move(item) of each, on npu and cuda while the next is under way on a stream of its own.

    Args:
        move (function): takes an item to the device, without waiting.
    """
    module = device_module(device)
    if not hasattr(module, 'Stream'):
        yield from map(move, items)
        return
    side, ready = module.Stream(), None
    for item in items:
        side.wait_stream(module.current_stream())  # what it has used so far may have been freed, for `move` to reuse
        with module.stream(side):
            coming = move(item)
        if ready is not None:
            yield ready
        module.current_stream().wait_stream(side)
        ready = coming
    if ready is not None:
        yield ready


def is_synchronous(device: torch.device) -> bool:
    """Whether a number can be read from the device without waiting for work that it has yet to do."""
    return device.type == 'cpu'


# ---- distribution

def wrap_ddp(model: nn.Module, device: torch.device) -> nn.Module:
    """The model in DistributedDataParallel.

    Every parameter gets a gradient, so unused ones needn't be looked for. The buffers are constant; sending them at
    each call would hang an evaluation in which one process has a batch more than another.
    """
    known = inspect.signature(nn.parallel.DistributedDataParallel).parameters
    name = 'forward_sync_buffers' if 'forward_sync_buffers' in known else 'broadcast_buffers'  # before PyTorch 2.14
    options: Dict[str, Any] = {name: False}
    return nn.parallel.DistributedDataParallel(model, None if device.type == 'cpu' else [device.index], **options)


def unwrap(model: Any) -> nn.Module:
    """The model itself, out of DistributedDataParallel and the casting wrappers of `beit.training.loss_scaler`."""
    while hasattr(model, 'module'):
        model = model.module
    return model
