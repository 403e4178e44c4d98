"""The one room that knows devices (npu, cuda, cpu), apex, mixed precision and what each PyTorch can do.

Everything else asks here: `select_device`, `synchronize`, `check_precision`, `distributed_model`, `profiler`. What a
PyTorch can do is found out by looking for the feature, never by its version.
"""

import contextlib
import functools
import importlib
import importlib.util
import inspect
import os
import shutil
import time

# From 2.5 on, torch imports torch_npu by itself and dies with a traceback where CANN isn't set up; here it is imported
# when it's wanted, and its failure explained.
os.environ.setdefault('TORCH_DEVICE_BACKEND_AUTOLOAD', '0')

import torch  # noqa: E402  (after the setting that it reads)
import torch.nn.functional as F  # noqa: E402
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
            reason = _first_line(error)
            if 'undefined symbol' in reason:
                return _OTHER_CANN % reason
            if 'cannot open shared object' in reason:
                return 'torch_npu is installed but CANN is not set up (%s); run: source test/env_npu.sh' % reason
            return 'torch_npu cannot be imported (%s); install the one that belongs to this PyTorch' % reason
    try:
        available = torch.npu.is_available()
    except RuntimeError as error:
        return _OTHER_CANN % _first_line(error)
    return None if available else 'torch_npu is installed but sees no NPU; look at npu-smi info'


_OTHER_CANN = ('the NPU cannot be started (%s); are these the CANN and the driver that belong to this torch_npu? '
               'README.md, Ascend, names them; look at npu-smi info too')


def _first_line(error):
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


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
    """`find_device`; for npu and cuda the device becomes the current one, and has to add 1 and 1.

    Raises:
        UserError: as `find_device`, or the device doesn't start.
    """
    device = find_device(name, local_rank, processes)
    if _module(device):
        try:
            _module(device).set_device(device)
            (torch.ones(1, device=device) + 1).item()
        except RuntimeError as error:
            raise UserError('--device %s: %s' % (name, _OTHER_CANN % _first_line(error) if device.type == 'npu' else
                                                 'the GPU cannot be started (%s)' % _first_line(error))) from None
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


def mark(device):
    """A moment in a device's work, for `seconds_between` once the device has been waited for; on a CPU, now."""
    if hasattr(_module(device), 'Event'):
        event = _module(device).Event(enable_timing=True)
        event.record()
        return event
    return time.perf_counter()


def seconds_between(mark, later):
    return later - mark if isinstance(mark, float) else mark.elapsed_time(later) / 1000.


def max_memory_mb(device):
    """Peak memory that tensors took on the device, in MiB; 0 on a CPU, where nobody counts it."""
    return _module(device).max_memory_allocated() / 2 ** 20 if _module(device) else 0.


def reset_max_memory(device):
    """Let `max_memory_mb` begin anew, at what is held now."""
    if _module(device):
        _module(device).reset_peak_memory_stats()


def out_of_memory(error):
    """Whether an error says that the device, or the machine, has no more memory."""
    return isinstance(error, MemoryError) or any(words in str(error) for words in (
        'out of memory', 'not enough memory', 'can\'t allocate memory'))


def seed_device(seed):
    """Seed every device's generator. torch.manual_seed has seeded those of the CPU and of CUDA already."""
    if hasattr(torch, 'npu') and _npu_problem() is None:
        torch.npu.manual_seed_all(seed)


def make_deterministic(device):
    """The same bits from the same command twice: only deterministic kernels, and an error where there is none.

    Raises:
        UserError: this PyTorch can't promise it on this device.
    """
    if hasattr(torch, 'use_deterministic_algorithms'):
        torch.use_deterministic_algorithms(True)
    elif hasattr(torch, 'set_deterministic'):
        torch.set_deterministic(True)
    elif device.type != 'cpu':
        raise UserError('--deterministic: this PyTorch cannot promise it on %s; use a newer one, or a CPU'
                        % device.type)
    if hasattr(torch.backends, 'cudnn'):
        torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = True, False


def prepare_determinism():
    """What has to be set before the device starts."""
    os.environ.setdefault('CUBLAS_WORKSPACE_CONFIG', ':4096:8')
    os.environ.setdefault('HCCL_DETERMINISTIC', 'true')


def set_compile_mode(device, mode):
    """Whether an NPU compiles operators for the shapes it meets: 'on', 'off', or 'auto', what it does by itself.

    Raises:
        UserError: the device isn't an NPU, or its torch_npu has no such setting.
    """
    if mode == 'auto':
        return
    if device.type != 'npu' or not hasattr(_module(device), 'set_compile_mode'):
        raise UserError('--jit_compile %s: %s; leave the flag out' % (
            mode, 'only NPUs have it, and this runs on %s' % device.type if device.type != 'npu'
            else 'this torch_npu has no set_compile_mode'))
    _module(device).set_compile_mode(jit_compile=mode == 'on')


@functools.lru_cache(maxsize=None)
def saturates(device):
    """Whether overflow gives the largest finite value on this device instead of inf, as on an Ascend 910A."""
    if device.type != 'npu':
        return False
    return bool(torch.isfinite(torch.full((1,), 6e4, dtype=torch.float16, device=device) * 2).all())


def read_overflow(device):
    """Whether anything overflowed on a device that `saturates` since the last call; there the numbers don't show it."""
    module = _module(device)
    if not hasattr(module, 'get_npu_overflow_flag'):
        return False
    overflowed = bool(module.get_npu_overflow_flag())
    module.clear_npu_overflow_flag()
    return overflowed


def can_pin_memory(device):
    """Whether batches can be put in page-locked memory for this device."""
    return device.type != 'cpu'


def noise_generator(device):
    """A random generator whose numbers are drawn on the device, or on the CPU where this PyTorch has none for it."""
    try:
        generator = torch.Generator(device=device)
        torch.empty(1, device=device).normal_(generator=generator)
        return generator
    except (RuntimeError, TypeError):
        return torch.Generator()


def one_ahead(items, move, device):
    """Yield move(item) of each. On npu and cuda the next is under way by then, on a stream of its own.

    So copies and what else `move` does overlap with what is computed meanwhile.

    Args:
        move (function): takes an item to the device, without waiting.
    """
    module = _module(device)
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


# By `under_apex`: where NpuFusedAdamW comes from, and that place in words.
NPU_FUSED_HOMES = {True: (('apex.optimizers',), 'Ascend\'s apex under apex.amp'),
                   False: (('torch_npu.optim',), 'torch_npu outside apex.amp'),
                   None: (('torch_npu.optim', 'apex.optimizers'), 'torch_npu or Ascend\'s apex')}


def fused_optimizer(name, under_apex=None):
    """The class of a fused optimizer: NpuFusedAdamW from torch_npu or Ascend's apex, Fused* from NVIDIA's apex.

    Args:
        under_apex (bool): whether apex.amp will prepare the optimizer; None where that isn't known yet. The two
            NpuFusedAdamW are no substitutes: apex's works under apex.amp only, and torch_npu's would not see the
            gradients that apex.amp hands over.

    Raises:
        UserError: it isn't installed here.
    """
    homes, where = NPU_FUSED_HOMES[under_apex] if name.startswith('Npu') else (('apex.optimizers',), 'NVIDIA\'s apex')
    for home in homes:
        package = home.partition('.')[0]
        if importlib.util.find_spec(package) is None or (package == 'torch_npu' and _npu_problem()):
            continue
        try:
            return getattr(importlib.import_module(home), name)
        except (ImportError, AttributeError):
            continue
    raise UserError('--opt %s needs %s, which is not installed here; use --opt adamw' % (name.lower(), where))


def build_optimizer(cls, groups, **settings):
    """An optimizer, with its fused kernel where it and the device have one: one pass over the weights, not ten."""
    groups = list(groups)
    parameters = list(groups[0]['params']) if groups and isinstance(groups[0], dict) else groups
    if parameters and _has_fused_step(cls, parameters[0].device):
        try:
            return cls(groups, fused=True, **settings)
        except RuntimeError:  # not for these settings
            pass
    return cls(groups, **settings)


@functools.lru_cache(maxsize=None)
def _has_fused_step(cls, device):
    """Whether a fused step works there. It is tried: PyTorch 2.1's AdamW accepts a CPU, and its step then fails."""
    if 'fused' not in inspect.signature(cls.__init__).parameters:
        return False
    parameter = nn.Parameter(torch.zeros(1, device=device))
    parameter.grad = torch.zeros_like(parameter)
    try:
        cls([parameter], lr=1., fused=True).step()
        return True
    except RuntimeError:
        return False


@functools.lru_cache(maxsize=None)
def mended_optimizer(cls):
    """The class of an optimizer, or one in its place that passes over groups without a gradient: PyTorch 1.8's AdamW
    fails where the first group has none."""
    if cls is not torch.optim.AdamW:
        return cls
    try:
        cls([nn.Parameter(torch.zeros(1))], lr=1.).step()
        return cls
    except UnboundLocalError:
        return _AdamWOfGroupsWithGradients


class _AdamWOfGroupsWithGradients(torch.optim.AdamW):
    def step(self, closure=None):
        groups = self.param_groups
        self.param_groups = [group for group in groups if any(each.grad is not None for each in group['params'])]
        try:
            return super().step(closure)
        finally:
            self.param_groups = groups


def takes_scale(optimizer):
    """Whether an optimizer's step divides the gradients by `grad_scale`, and does nothing where `found_inf` is 1."""
    return getattr(optimizer, '_step_supports_amp_scaling', False)


def step_scaled(optimizer, divisor=None, skip=None):
    """A step of an optimizer that `takes_scale`: gradients divided by a 0-dim tensor, and none where `skip` is true."""
    optimizer.grad_scale = divisor
    optimizer.found_inf = None if skip is None else skip.float()
    optimizer.step()
    optimizer.grad_scale = optimizer.found_inf = None


def reads_freely(device):
    """Whether a number can be read from the device without waiting for work that it has yet to do."""
    return device.type == 'cpu'


_HAS_FOREACH = hasattr(torch, '_foreach_copy_')


def multiply_all(tensors, factor):
    """Multiply each in place by a number."""
    if _HAS_FOREACH:
        torch._foreach_mul_(tensors, factor)
        return
    for tensor in tensors:
        tensor.mul_(factor)


def add_all(tensors, others):
    """Add to each in place the other of its place, which may be of another dtype."""
    if _HAS_FOREACH and tensors:
        torch._foreach_add_(tensors, others if tensors[0].dtype == others[0].dtype else [
            other.to(tensor.dtype) for tensor, other in zip(tensors, others)])
        return
    for tensor, other in zip(tensors, others):
        tensor.add_(other.to(tensor.dtype))


def copy_all(tensors, others):
    """Copy into each the other of its place, which may be of another dtype."""
    if _HAS_FOREACH and tensors:
        torch._foreach_copy_(tensors, others)
        return
    for tensor, other in zip(tensors, others):
        tensor.copy_(other)


def average_all(averages, values, decay, skip=False):
    """average = decay * average + (1 - decay) * value for each, in place; where `skip` is true, as they were.

    Args:
        skip (bool or 0-dim bool tensor).
    """
    if skip is True:
        return
    if skip is not False:  # it is on the device: a step of length 0
        length = ((1 - decay) * (~skip).float()).to(averages[0].device)
        if _HAS_FOREACH:
            steps = torch._foreach_sub(values, averages)
            torch._foreach_mul_(steps, length)
            torch._foreach_add_(averages, steps)
            return
        for average, value in zip(averages, values):
            average.add_((value - average) * length)
    elif _HAS_FOREACH:
        torch._foreach_mul_(averages, decay)
        torch._foreach_add_(averages, values, alpha=1 - decay)
    else:
        for average, value in zip(averages, values):
            average.mul_(decay).add_(value, alpha=1 - decay)


# ---- attention

def fused_attentions(device):
    """Fused kernels to try on a device, best first: {name: function of (q, k, v, bias, scale)}.

    q, k, v are (B, heads, N, head_dim), bias (1, heads, N, N) or None; softmax(scale * q @ k.T + bias) @ v comes out.
    Kernels differ in what they do with the bias, some lose it: `attention` proves one before it is used.
    """
    found = {}
    if hasattr(F, 'scaled_dot_product_attention'):
        found['scaled_dot_product_attention'] = _cuda_attention if device.type == 'cuda' else _torch_attention
    if device.type == 'npu' and _npu_fusion_attention() is not None:
        found['npu_fusion_attention'] = _npu_attention
    return found


def _torch_attention(q, k, v, bias, scale):
    return F.scaled_dot_product_attention(q, k, v, attn_mask=None if bias is None else bias.to(q.dtype), scale=scale)


def _cuda_attention(q, k, v, bias, scale):
    """Without gradients PyTorch expands a bias whose rows aren't a multiple of 8 long to every image, and pads that.

    Padded here, before it is expanded: a block of base takes 0.15 ms instead of 0.26 ms (H100, batch 128, bfloat16).
    """
    if bias is not None and not torch.is_grad_enabled():
        tokens = bias.shape[-1]
        bias = F.pad(bias, (0, -tokens % 8))[..., :tokens]
    return _torch_attention(q, k, v, bias, scale)


def _npu_fusion_attention():
    return getattr(importlib.import_module('torch_npu'), 'npu_fusion_attention', None) \
        if importlib.util.find_spec('torch_npu') else None


def _npu_attention(q, k, v, bias, scale):
    """It computes softmax(scale * (q @ k.T + pse)) @ v, so the bias is divided by the scale first."""
    pse = None if bias is None else (bias / scale).to(q.dtype).expand(len(q), -1, -1, -1).contiguous()
    return _npu_fusion_attention()(q, k, v, q.shape[1], 'BNSD', pse=pse, scale=scale)[0]


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


def base_optimizer(optimizer):
    """The optimizer inside timm's Lookahead; itself where there is none around it."""
    return getattr(optimizer, '_base_optimizer', getattr(optimizer, 'base_optimizer', optimizer))


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


def apex_amp(device, dtype):
    """apex.amp, where it is to do the half precision: float16 on an accelerator, with an apex that has it; or None."""
    return find_apex()[0] if device.type != 'cpu' and dtype == torch.float16 else None


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
    if amp_dtype == 'bfloat16' and device.type != 'cpu' and _half_precision_problem(device, dtype):
        raise UserError('--amp_dtype bfloat16: this %s has none (%s), as an Ascend 910A; use --amp_dtype float16'
                        % (device.type, _half_precision_problem(device, dtype)))
    if opt_level == 'O1' and not has_autocast(device.type, dtype) and not apex_amp(device, dtype):
        raise UserError('--opt-level O1: this PyTorch has no autocast to %s on %s%s; leave --amp out, or use a newer '
                        'one' % (amp_dtype, device.type, '' if device.type == 'cpu' else ', and %s' % find_apex()[1]))
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
        synchronize(device)  # an NPU refuses an operator when it comes to it
    except (RuntimeError, TypeError) as error:
        return ' '.join(str(error).split())[:100]
    return None


# ---- compilation

def check_compile(device):
    """Raise a `UserError` where torch.compile can't be had."""
    if not hasattr(torch, 'compile') or not hasattr(nn.Module, 'compile'):
        raise UserError('--compile: this PyTorch cannot compile a model in place; use 2.2 or newer, or leave it out')
    compiler = os.environ.get('CXX', 'g++')
    if device.type == 'cpu' and not any(shutil.which(name) for name in (compiler, 'clang++')):
        raise UserError('--compile: compiling for a CPU needs a C++ compiler; install g++, or leave the flag out')


def compile_in_place(model):
    """Compile a module's forward and backward pass for the shapes that it meets, as one graph each; names stay."""
    limits = importlib.import_module('torch._dynamo').config
    name = 'recompile_limit' if hasattr(limits, 'recompile_limit') else 'cache_size_limit'
    setattr(limits, name, max(getattr(limits, name), 64))  # --bad_images skip gives batches of several sizes
    model.compile(fullgraph=True, dynamic=False)


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
