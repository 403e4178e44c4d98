"""The one room that knows devices (npu, cuda, cpu), apex, mixed precision and what each PyTorch can do.

Everything else asks here: `select_device`, `synchronize`, `check_precision`, `distributed_model`, `profiler`. What a
PyTorch can do is found out by looking for the feature, never by its version.
"""

import contextlib
import functools
import importlib
import importlib.util
import os

# From 2.5 on, torch imports torch_npu by itself and dies with a traceback where CANN isn't set up; here it is imported
# when it's wanted, and its failure explained.
os.environ.setdefault('TORCH_DEVICE_BACKEND_AUTOLOAD', '0')

import torch  # noqa: E402  (after the setting that it reads)
from torch import nn  # noqa: E402

from errors import UserError  # noqa: E402

DEVICE_TYPES = ('npu', 'cuda', 'cpu')  # in order of preference
PROCESS_GROUP_BACKEND = {'npu': 'hccl', 'cuda': 'nccl', 'cpu': 'gloo'}
AMP_DTYPES = ('float16', 'bfloat16')
OPT_LEVELS = ('O0', 'O1', 'O2')


# ---- devices

@functools.lru_cache(maxsize=None)
def _npu_problem():
    """None where NPUs can be used, else the reason, with its cure."""
    if not hasattr(torch, 'npu'):  # Ascend's PyTorch 1.5 has it built in
        if importlib.util.find_spec('torch_npu') is None:
            return 'torch_npu is not installed; install the torch_npu of your PyTorch, or use --device cuda or cpu'
        try:
            importlib.import_module('torch_npu')
        except (ImportError, OSError, RuntimeError) as error:
            if 'libhccl' in str(error) or 'libascend' in str(error):
                return 'torch_npu is installed but CANN is not set up (%s); run: source test/env_npu.sh' % error
            return 'torch_npu cannot be imported (%s)' % error
    return None if torch.npu.is_available() else 'torch_npu is installed but sees no NPU; look at npu-smi info'


def _cuda_problem():
    if torch.cuda.is_available():
        return None
    if torch.backends.cuda.is_built() if hasattr(torch.backends, 'cuda') else torch.version.cuda:
        return 'PyTorch sees no CUDA GPU; look at nvidia-smi and CUDA_VISIBLE_DEVICES, or use --device cpu'
    return 'this PyTorch was built without CUDA; install a CUDA build, or use --device cpu'


_PROBLEM = {'npu': _npu_problem, 'cuda': _cuda_problem, 'cpu': lambda: None}


def find_device(name='auto', local_rank=0, processes=1):
    """The `torch.device` that a process is to use. It isn't touched, so this also serves before processes start.

    Args:
        name (str): auto (npu, cuda, cpu: the first that works), npu, cuda, cpu, or one of them with an index, cuda:1.
        local_rank (int): the device's index where `name` has none.
        processes (int): how many there are in all.

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
    count, index = _module(kind).device_count(), int(index or local_rank)
    if index >= count:
        raise UserError('--device %s: process %d needs %s:%d, but there are %d; lower --nproc_per_node or the index'
                        % (name, local_rank, kind, index, count))
    return torch.device(kind, index)


def select_device(name='auto', local_rank=0, processes=1):
    """`find_device`; for npu and cuda the device becomes the current one."""
    device = find_device(name, local_rank, processes)
    if _module(device):
        _module(device).set_device(device)
    return device


def _module(device):
    """torch.npu or torch.cuda, or None for the CPU."""
    return getattr(torch, getattr(device, 'type', device), None) if getattr(device, 'type', device) != 'cpu' else None


def npu_passed_over(name, device):
    """One line, where --device auto leaves torch_npu unused, or ''. Nobody should train on a CPU without noticing."""
    if name != 'auto' or device.type == 'npu' or importlib.util.find_spec('torch_npu') is None:
        return ''
    return 'Not using an NPU: %s\n' % _npu_problem()


def device_name(device):
    module = _module(device)
    return module.get_device_name(device.index or 0) if module else 'CPU, %d threads' % torch.get_num_threads()


def synchronize(device):
    """Wait until the device has done all that it was given. Nothing to wait for on a CPU."""
    if _module(device):
        _module(device).synchronize()


def max_memory_mb(device):
    """Peak memory that tensors took on the device, in MiB; 0 on a CPU, where nobody counts it."""
    return _module(device).max_memory_allocated() / 2 ** 20 if _module(device) else 0.


def seed_device(seed):
    """Seed every device's generator. torch.manual_seed has seeded those of the CPU and of CUDA already."""
    if hasattr(torch, 'npu') and _npu_problem() is None:
        torch.npu.manual_seed_all(seed)


def device_rng_state(device):
    return _module(device).get_rng_state() if _module(device) else None


def set_device_rng_state(device, state):
    if _module(device) and state is not None:
        _module(device).set_rng_state(state)


def can_pin_memory(device):
    """Whether batches can be put in page-locked memory for this device."""
    return device.type != 'cpu'


def fused_optimizer(name):
    """The class of a fused optimizer: NpuFusedAdamW from torch_npu or Ascend's apex, Fused* from NVIDIA's apex.

    Raises:
        UserError: it isn't installed here.
    """
    for home in ('torch_npu.optim', 'apex.optimizers'):
        package = home.partition('.')[0]
        if importlib.util.find_spec(package) is None or (package == 'torch_npu' and _npu_problem()):
            continue
        try:
            return getattr(importlib.import_module(home), name)
        except (ImportError, AttributeError):
            continue
    where = 'torch_npu or Ascend\'s apex' if name.startswith('Npu') else 'NVIDIA\'s apex'
    raise UserError('--opt %s needs %s, which is not installed here; use --opt adamw' % (name.lower(), where))


# ---- distribution

def distributed_model(model, device):
    """The model in DistributedDataParallel.

    Every parameter gets a gradient, so unused ones needn't be looked for. The buffers are constant; sending them at
    each call would hang an evaluation in which one process has a batch more than another.
    """
    devices = None if device.type == 'cpu' else [device.index]
    return nn.parallel.DistributedDataParallel(model, device_ids=devices, broadcast_buffers=False)


def unwrap(model):
    """The model itself, out of DistributedDataParallel and the casting wrappers of this file."""
    while hasattr(model, 'module'):
        model = model.module
    return model


# ---- what half precision is there

def autocast(device_type, dtype):
    if hasattr(torch, 'autocast'):
        return torch.autocast(device_type, dtype=dtype)
    return _module(device_type).amp.autocast()  # PyTorch 1.8, float16


def has_autocast(device_type, dtype):
    if hasattr(torch, 'autocast'):
        return True
    return dtype == torch.float16 and hasattr(getattr(_module(device_type), 'amp', None), 'autocast')


def find_apex():
    """(apex.amp or None, one sentence for people). Three packages carry the name; only some have `amp`."""
    if importlib.util.find_spec('apex') is None:
        return None, 'apex is not installed'
    try:
        apex = importlib.import_module('apex')
        amp = importlib.import_module('apex.amp')
    except Exception as error:  # an apex built for another PyTorch can fail in any way; the native path always works
        holds_optimizers = importlib.util.find_spec('apex').submodule_search_locations is not None and any(
            os.path.isdir(os.path.join(place, 'optimizers'))
            for place in importlib.util.find_spec('apex').submodule_search_locations)
        if isinstance(error, ModuleNotFoundError) and error.name == 'apex.amp' and holds_optimizers:
            return None, 'the installed apex is NVIDIA\'s without amp, which newer versions removed'
        if isinstance(error, ModuleNotFoundError) and error.name == 'apex.amp':
            return None, 'the installed apex is an unrelated package of that name'
        return None, 'the installed apex cannot be imported (%s)' % ' '.join(str(error).split())
    if not hasattr(amp, 'initialize'):
        return None, 'the installed apex has no amp.initialize'
    kind = 'Ascend\'s' if hasattr(getattr(apex, 'optimizers', None), 'NpuFusedAdamW') else 'NVIDIA\'s'
    return amp, 'apex.amp (%s)' % kind


def check_precision(device, amp, opt_level, amp_dtype):
    """The half-precision `torch.dtype` to use, or None for float32; by itself: float16, on a CPU bfloat16.

    Raises:
        UserError: this device or this PyTorch can't do what is asked for.
    """
    if not amp or opt_level == 'O0':
        return None
    if amp_dtype is None:
        amp_dtype = 'bfloat16' if device.type == 'cpu' else 'float16'
    if device.type == 'cpu' and amp_dtype == 'float16':
        raise UserError('--amp_dtype float16: half precision on a CPU is bfloat16; leave the flag out')
    dtype = getattr(torch, amp_dtype)
    if opt_level == 'O1' and not has_autocast(device.type, dtype) and not (
            device.type != 'cpu' and dtype == torch.float16 and find_apex()[0]):
        raise UserError('--opt-level O1: this PyTorch has no autocast to %s on %s; leave --amp out, or use a newer one'
                        % (amp_dtype, device.type))
    if opt_level == 'O2':
        problem = _half_precision_problem(device, dtype)
        if problem:
            raise UserError('--opt-level O2: this PyTorch cannot train in %s on %s (%s); leave --amp out, or use a '
                            'newer one' % (amp_dtype, device.type, problem))
    return dtype


@functools.lru_cache(maxsize=None)
def _half_precision_problem(device, dtype):
    """None, or why the model's kinds of layer don't run forward and backward in this dtype: they are tried out."""
    try:
        layers = nn.Sequential(nn.Conv2d(3, 4, 2, 2), nn.Flatten(2), nn.LayerNorm(4), nn.Linear(4, 4), nn.GELU(),
                               nn.Softmax(-1), nn.Dropout(0.1)).to(device=device, dtype=dtype)
        (layers(torch.ones(2, 3, 4, 4, device=device, dtype=dtype)) @ torch.ones(
            2, 4, 4, device=device, dtype=dtype)).float().sum().backward()
    except (RuntimeError, TypeError) as error:
        return ' '.join(str(error).split())[:100]
    return None


# ---- profiling

@contextlib.contextmanager
def profiler(device, folder, rank=0, cann=False):
    """Record what runs inside, and write it into `folder`.

    Args:
        cann (bool): through torch_npu's profiler (for Ascend's tools); else a Chrome trace, trace_rank<N>.json.
    """
    os.makedirs(folder, exist_ok=True)
    if cann:
        with _cann_profiler(folder):
            yield
        return
    path = os.path.join(folder, 'trace_rank%d.json' % rank)
    if hasattr(torch, 'profiler') and hasattr(torch.profiler, 'ProfilerActivity'):
        activities = [getattr(torch.profiler.ProfilerActivity, name) for name in ('CPU', 'CUDA', 'PrivateUse1')
                      if hasattr(torch.profiler.ProfilerActivity, name)
                      and (name == 'CPU' or (name == 'CUDA') == (device.type == 'cuda') and device.type != 'cpu')]
        with torch.profiler.profile(activities=activities, record_shapes=True) as profile:
            yield
            synchronize(device)
    else:  # PyTorch 1.5
        with torch.autograd.profiler.profile(use_cuda=device.type == 'cuda') as profile:
            yield
            synchronize(device)
    profile.export_chrome_trace(path)


def check_cann_profiler():
    """Raise a `UserError` where torch_npu's profiler isn't to be had."""
    problem = _npu_problem()
    if problem is None and not hasattr(importlib.import_module('torch_npu'), 'profiler'):
        problem = 'this torch_npu has no profiler; use --prof'
    if problem:
        raise UserError('--cann_prof: %s' % problem)


def _cann_profiler(folder):
    torch_npu = importlib.import_module('torch_npu')
    return torch_npu.profiler.profile(
        activities=[torch_npu.profiler.ProfilerActivity.CPU, torch_npu.profiler.ProfilerActivity.NPU],
        on_trace_ready=torch_npu.profiler.tensorboard_trace_handler(folder))
