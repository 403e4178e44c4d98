"""Fused optimizers, foreach arithmetic, fused attention and compilation, as far as the device has them."""

import contextlib
import functools
import importlib
import importlib.util
import inspect
import itertools
import os
import shutil
import warnings
from typing import Any, Callable, Dict, Iterable, List, Optional

import torch
import torch.nn.functional as F
from torch import nn

from beit.devices import accelerator
from beit.errors import UserError, escape_text, unknown_value_error

# By `under_apex`: the modules that may have NpuFusedAdamW, and their name for messages.
NPU_FUSED_HOMES = {True: (('apex.optimizers',), 'Ascend\'s apex under apex.amp'),
                   False: (('torch_npu.optim',), 'torch_npu outside apex.amp'),
                   None: (('torch_npu.optim', 'apex.optimizers'), 'torch_npu or Ascend\'s apex')}


def fused_optimizer(name: str, under_apex: Optional[bool] = None) -> Any:
    """The class of a fused optimizer: NpuFusedAdamW from torch_npu or Ascend's apex, Fused* from NVIDIA's apex.

    `under_apex` says whether apex.amp will prepare the optimizer; None: unknown. The two NpuFusedAdamW differ: apex's
    works only under apex.amp, and torch_npu's does not see apex.amp's gradients.
    """
    homes, where = NPU_FUSED_HOMES[under_apex] if name.startswith('Npu') else (('apex.optimizers',), 'NVIDIA\'s apex')
    for home in homes:
        package = home.partition('.')[0]
        if importlib.util.find_spec(package) is None or (package == 'torch_npu' and accelerator.npu_problem()):
            continue
        try:
            return getattr(importlib.import_module(home), name)
        except (ImportError, AttributeError):
            continue
    raise UserError('needs %s, which is not installed here; use --opt adamw' % where)  # `optimizer_class` names --opt


@functools.lru_cache(maxsize=None)
def _has_fused_step(cls: Any, device: torch.device) -> bool:
    """Whether a trial of a fused step succeeds: PyTorch 2.1's AdamW accepts a CPU, and its step fails then."""
    if 'fused' not in inspect.signature(cls.__init__).parameters:
        return False
    parameter = nn.Parameter(torch.zeros(1, device=device))
    parameter.grad = torch.zeros_like(parameter)
    try:
        cls([parameter], lr=1., fused=True).step()
        return True
    except RuntimeError:
        return False


def build_optimizer(cls: Any, groups: Iterable[Any], **settings: Any) -> Any:
    """An optimizer, with its fused kernel if it and the device have one: one pass over the weights, not ten."""
    groups = list(groups)
    parameters = list(groups[0]['params']) if groups and isinstance(groups[0], dict) else groups
    if parameters and _has_fused_step(cls, parameters[0].device):
        with contextlib.suppress(RuntimeError):  # unsupported settings
            return cls(groups, fused=True, **settings)
    return cls(groups, **settings)


def base_optimizer(optimizer: Any) -> Any:
    """The optimizer inside timm's Lookahead, or the optimizer itself."""
    return getattr(optimizer, '_base_optimizer', getattr(optimizer, 'base_optimizer', optimizer))


def patched_optimizer(cls: Any) -> Any:
    """The class of an optimizer, or a subclass: PyTorch 1.8's AdamW fails if a group has no gradient."""
    return _AdamWOfGroupsWithGradients if cls is torch.optim.AdamW and not hasattr(torch, '_foreach_copy_') else cls


class _AdamWOfGroupsWithGradients(torch.optim.AdamW):
    def step(self, closure: Any = None) -> Any:
        groups = self.param_groups
        self.param_groups = [group for group in groups if any(each.grad is not None for each in group['params'])]
        try:
            return super().step(closure)
        finally:
            self.param_groups = groups


def supports_grad_scale(optimizer: Any) -> bool:
    """Whether an optimizer's step divides the gradients by `grad_scale`, and does nothing if `found_inf` is 1."""
    return getattr(optimizer, '_step_supports_amp_scaling', False)


def step_scaled(optimizer: Any, divisor: Optional[torch.Tensor] = None, skip: Optional[torch.Tensor] = None) -> None:
    """A step of an optimizer that `supports_grad_scale`; `divisor` and `skip` are 0-dim tensors."""
    optimizer.grad_scale = divisor
    optimizer.found_inf = None if skip is None else skip.float()
    optimizer.step()
    optimizer.grad_scale = optimizer.found_inf = None


_HAS_FOREACH = hasattr(torch, '_foreach_copy_')


def foreach(method: str, tensors: List[torch.Tensor], others: Any, **options: float) -> None:
    """tensor.add_(other), or `method` 'mul' or 'copy', for each pair; `others` is a list, or one factor for all."""
    if _HAS_FOREACH and tensors:
        getattr(torch, '_foreach_%s_' % method)(tensors, others, **options)
        return
    for tensor, other in zip(tensors, others if isinstance(others, list) else itertools.repeat(others)):
        getattr(tensor, method + '_')(other, **options)


def foreach_lerp(averages: List[torch.Tensor], values: List[torch.Tensor], decay: float, skip: Any = False) -> None:
    """average = decay * average + (1 - decay) * value for each, in place, unless `skip`, a bool or 0-dim tensor."""
    if skip is True:
        return
    if skip is False:
        foreach('mul', averages, decay)
        foreach('add', averages, values, alpha=1 - decay)
        return
    # On the device, a step of length 0 skips.
    steps = list(torch._foreach_sub(values, averages) if _HAS_FOREACH else map(torch.sub, values, averages))
    foreach('mul', steps, ((1 - decay) * (~skip).float()).to(averages[0].device))
    foreach('add', averages, steps)


# ---- attention

Attention = Callable[..., torch.Tensor]  # of (q, k, v, bias, scale)


def _torch_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: Optional[torch.Tensor], scale: float
                     ) -> torch.Tensor:
    return F.scaled_dot_product_attention(q, k, v, attn_mask=None if bias is None else bias.to(q.dtype), scale=scale)


def _cuda_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: Optional[torch.Tensor], scale: float
                    ) -> torch.Tensor:
    """Without gradients, pad the rows of a bias to a multiple of 8 before PyTorch expands it to every image.

    A block of base takes 0.15 ms instead of 0.26 ms (H100, batch 128, bfloat16).
    """
    if bias is not None and not torch.is_grad_enabled():
        tokens = bias.shape[-1]
        bias = F.pad(bias, (0, -tokens % 8))[..., :tokens]
    return _torch_attention(q, k, v, bias, scale)


def fused_attentions(device: torch.device) -> Dict[str, Attention]:
    """Fused kernels to try on a device, best first: {name: function of (q, k, v, bias, scale)}.

    They compute softmax(scale * q @ k.T + bias) @ v of q, k, v (B, heads, N, head_dim) and bias (1, heads, N, N) or
    None. Some kernels lose the bias, so `fused_attention` tests them before use.
    """
    found: Dict[str, Attention] = {}
    if hasattr(F, 'scaled_dot_product_attention'):
        found['scaled_dot_product_attention'] = _cuda_attention if device.type == 'cuda' else _torch_attention
    if device.type == 'npu' and _npu_fusion_attention() is not None:
        found['npu_fusion_attention'] = _npu_attention
    return found


def _npu_fusion_attention() -> Any:
    return getattr(importlib.import_module('torch_npu'), 'npu_fusion_attention', None) \
        if importlib.util.find_spec('torch_npu') else None


def _npu_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: Optional[torch.Tensor], scale: float
                   ) -> torch.Tensor:
    """The kernel computes softmax(scale * (q @ k.T + pse)) @ v, so pse is bias / scale."""
    pse = None if bias is None else (bias / scale).to(q.dtype).expand(len(q), -1, -1, -1).contiguous()
    return _npu_fusion_attention()(q, k, v, q.shape[1], 'BNSD', pse=pse, scale=scale)[0]


# ---- compilation

TORCHAIR = 'torchair'
NPU_BACKENDS = TORCHAIR, 'npugraph_ex'

def check_compile(device: torch.device, backend: str = 'inductor') -> None:
    """Raise a `UserError` where torch.compile, or its backend, is not available."""
    if not hasattr(torch, 'compile') or not hasattr(nn.Module, 'compile'):
        raise UserError('--compile: this PyTorch cannot compile a model in place; use 2.2 or newer, or leave it out')
    flag, compiler = '--compile_backend %s: ' % escape_text(backend), os.environ.get('CXX', 'g++')
    if backend in NPU_BACKENDS and device.type != 'npu':
        raise UserError(flag + 'it compiles for an NPU, and the device is %s; use inductor' % device)
    if backend == 'inductor' and device.type != 'cpu' and importlib.util.find_spec('triton') is None:
        raise UserError(flag + 'it needs Triton, on an NPU the package triton-ascend; install it, or %s' % (
            'use ' + ' or '.join(NPU_BACKENDS) if device.type == 'npu' else 'leave --compile out'))
    if backend == 'inductor' and device.type == 'cpu' and not any(map(shutil.which, (compiler, 'clang++'))):
        raise UserError('--compile: compiling for a CPU needs a C++ compiler; install g++, or leave the flag out')
    if backend == TORCHAIR:
        find_torchair()
        return
    dynamo = importlib.import_module('torch._dynamo')
    if backend not in dynamo.list_backends(exclude_tags=()):  # of every installed package
        raise unknown_value_error('--compile_backend', escape_text(backend), dynamo.list_backends())
    if backend in ('inductor', 'cudagraphs', *NPU_BACKENDS):  # a compilation takes long, or needs the device
        return
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        try:
            torch.compile(lambda x: x * x, backend=backend)(torch.ones(1, requires_grad=True)).backward()
        except Exception as error:  # a backend belongs to another package, and can fail in any way
            reason = accelerator.first_line(getattr(error, 'inner_exception', error)).rstrip('.:')
            raise UserError(flag + 'it cannot compile here (%s); install what it needs, or use inductor' % reason
                            ) from None


def find_torchair() -> Any:
    """TorchAir's backend. torch_npu without TorchAir registers one as well, which compiles nothing."""
    for home in ('torchair', 'torch_npu.dynamo.torchair'):
        with contextlib.suppress(ImportError, AttributeError):
            return importlib.import_module(home).get_npu_backend()
    raise UserError('--compile_backend %s: TorchAir is not installed, nor a part of this torch_npu; install it, or use '
                    'another backend' % TORCHAIR)


def compile_in_place(model: nn.Module, backend: str = 'inductor') -> None:
    """Compile a module's forward and backward pass, one graph for each new shape; the names of weights stay."""
    limits = importlib.import_module('torch._dynamo').config
    name = 'recompile_limit' if hasattr(limits, 'recompile_limit') else 'cache_size_limit'
    setattr(limits, name, max(getattr(limits, name), 64))  # --bad_images skip gives batches of several sizes
    model.compile(fullgraph=True, dynamic=False, backend=find_torchair() if backend == TORCHAIR else backend)
