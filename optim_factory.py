"""Layer-decay parameter groups, the table of optimizers, and the cosine schedules.

Layer-wise learning rates and weight decay follow the reference's optim_factory.py (BEiT,
https://arxiv.org/abs/2106.08254, appendix; the idea is ELECTRA's, https://arxiv.org/abs/2003.10555).
"""

import functools
import inspect
import math
import re
from typing import Any, Collection, Dict, List, Optional, Set, Tuple

import numpy as np
import timm.optim
import torch
from torch import nn

from beit.config import OptimizerConfig
from beit.devices import kernels
from beit.errors import UserError, escape_text, one_line, unknown_value_error

# ---- parameter groups

def layer_id(name: str, num_layers: int) -> int:
    """0 for the embeddings, i+1 for block i, num_layers+1 for the rest: norms, head, a shared bias table."""
    if name in ('cls_token', 'pos_embed', 'mask_token') or name.startswith('patch_embed'):
        return 0
    if name.startswith('blocks.'):
        return int(name.split('.')[1]) + 1
    return num_layers + 1


def get_parameter_groups(model: Any, weight_decay: float = 1e-5, layer_decay: float = 1.0,
                         skip_list: Collection[str] = ()) -> List[Dict[str, Any]]:
    """Parameters grouped by layer and by weight decay, in the model's order.

    Vectors, names that end in .bias and names in `skip_list` have no weight decay. The learning rate of layer i of n
    blocks is multiplied by layer_decay ** (n + 1 - i).
    """
    num_layers = model.get_num_layers()
    groups: Dict[str, Dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        layer = layer_id(name, num_layers)
        decays = not (parameter.dim() == 1 or name.endswith('.bias') or name in skip_list)
        key = 'layer_%d_%s' % (layer, 'decay' if decays else 'no_decay')
        group = groups.setdefault(key, dict(params=[], name=key, decays=decays, weight_decay=weight_decay * decays,
                                            lr_scale=layer_decay ** (num_layers + 1 - layer)))
        group['params'].append(parameter)
    return list(groups.values())


def weight_decay_skip_list(model: Any, disable_weight_decay_on_rel_pos_bias: bool = False) -> Set[str]:
    """Names without weight decay, besides vectors and biases."""
    skip = set(model.no_weight_decay())
    if disable_weight_decay_on_rel_pos_bias:
        skip |= {name for name, _ in model.named_parameters() if name.endswith('relative_position_bias_table')}
    return skip


# ---- optimizers

def _timm(*names, homes=(timm.optim,), **fixed):
    found = (getattr(home, name) for home in homes for name in names if hasattr(home, name))
    cls = next(found, None)
    return lambda under_apex: (cls, fixed)


_torch = functools.partial(_timm, homes=(torch.optim, timm.optim))


def _fused(name, **fixed):
    return lambda under_apex: (kernels.fused_optimizer(name, under_apex), fixed)


# Name to a function from `under_apex` to (class, fixed arguments). The installed timm has other names.
OPTIMIZERS = {
    'adamw': _torch('AdamW'),
    'adam': _torch('Adam'),
    'nadam': _torch('NAdam'),
    'radam': _torch('RAdam'),
    'adadelta': _torch('Adadelta'),
    'rmsprop': _torch('RMSprop', alpha=0.9),
    'sgd': _torch('SGD', nesterov=True),
    'nesterov': _torch('SGD', nesterov=True),
    'momentum': _torch('SGD', nesterov=False),
    'adamp': _timm('AdamP', wd_ratio=0.01, nesterov=True),
    'sgdp': _timm('SGDP', nesterov=True),
    'adafactor': _timm('Adafactor'),
    'adahessian': _timm('Adahessian'),
    'rmsproptf': _timm('RMSpropTF', alpha=0.9),
    'novograd': _timm('NovoGrad', 'NvNovoGrad'),
    'nvnovograd': _timm('NvNovoGrad'),
    'npufusedadamw': _fused('NpuFusedAdamW'),
    'fusedadamw': _fused('FusedAdam', adam_w_mode=True),
    'fusedadam': _fused('FusedAdam', adam_w_mode=False),
    'fusedsgd': _fused('FusedSGD', nesterov=True),
    'fusedmomentum': _fused('FusedSGD', nesterov=False),
    'fusedlamb': _fused('FusedLAMB'),
    'fusednovograd': _fused('FusedNovoGrad', betas=(0.95, 0.98)),
}
SAME_STATE = {'adam': 'adamw', 'nesterov': 'sgd', 'momentum': 'sgd'}  # they continue from each other's moments


def optimizer_class(name: str, under_apex: Optional[bool] = None) -> Tuple[Any, Dict[str, Any], bool]:
    """(class, fixed arguments, whether to wrap it in Lookahead) of a value of --opt.

    `under_apex`: see `kernels.fused_optimizer`. Raises `UserError` if the name is unknown, or its library is missing.
    """
    lookahead, _, base = name.lower().rpartition('lookahead_')
    known: List[str] = getattr(timm.optim, 'list_optimizers', list)()
    if base not in [*OPTIMIZERS, *known] or lookahead:
        raise unknown_value_error('--opt', name, list(dict.fromkeys([*OPTIMIZERS, *known, 'lookahead_adamw'])))
    if base in OPTIMIZERS:
        try:
            cls, fixed = OPTIMIZERS[base](under_apex)
        except UserError as error:
            raise UserError('--opt %s %s' % (name, error)) from None
    else:
        try:
            cls = timm.optim.get_optimizer_class(base, bind_defaults=False)
        except (AssertionError, ImportError) as error:
            raise UserError('--opt %s: %s; use --opt adamw' % (name, one_line(error))) from None
        fixed = dict(timm.optim.get_optimizer_info(base).defaults or {})
    if cls is None:
        raise UserError('--opt %s: neither this PyTorch nor this timm has it; use --opt adamw' % name)
    return cls, fixed, name.lower().startswith('lookahead_')


def check_optimizer(name: str, momentum: float) -> None:
    """Raise a `UserError` for a value of --opt that is not available, needs momentum, or does not resume exactly."""
    cls, fixed, _ = optimizer_class(name)
    if fixed.get('nesterov') and momentum == 0:
        raise UserError('--momentum 0: --opt %s needs momentum; use --opt momentum for plain descent' % name)
    if cls.__module__.startswith('timm.') and cls.state_dict is not torch.optim.Optimizer.state_dict:
        raise UserError('--opt %s: it has more state than moments, such as random numbers, which a checkpoint does not '
                        'hold; use --opt adamw' % name)


def check_same_state(source: str, theirs: Any, opt: str) -> None:
    """Raise a `UserError` where a run cannot continue from the moments of a checkpoint's optimizer, `theirs`."""
    kinds = [re.sub('^(lookahead_)?((npu)?fused)?', '', str(name).lower()) for name in (theirs, opt)]
    if theirs and len({SAME_STATE.get(kind, kind) for kind in kinds}) > 1:
        raise UserError('--opt %s: %s was trained with --opt %s, whose moments are of another kind; give its --opt, or '
                        'give the file to --finetune' % (opt, escape_text(source), escape_text(str(theirs)[:40])))


def create_optimizer(model: nn.Module, config: Optional[OptimizerConfig] = None, under_apex: Optional[bool] = None,
                     **settings: Any) -> torch.optim.Optimizer:
    """The optimizer over layer-decay groups. It gets all settings that it has arguments for.

    Without `config`, they come from `settings`, by default without layer decay. `under_apex`: apex.amp will prepare it.
    """
    config = config or OptimizerConfig(**dict({'layer_decay': 1.}, **settings))
    opt, betas = config.opt, config.opt_betas
    cls, fixed, lookahead = optimizer_class(opt, under_apex)
    cls = kernels.patched_optimizer(cls)
    if lookahead and under_apex and 'fused' in opt.lower():
        raise UserError('--opt %s: apex needs the fused optimizer without lookahead; use --opt %s or lookahead_adamw'
                        % (opt, opt.lower().replace('lookahead_', '')))
    groups = get_parameter_groups(model, config.weight_decay, config.layer_decay,
                                  weight_decay_skip_list(model, config.disable_weight_decay_on_rel_pos_bias))
    accepted = inspect.signature(cls.__init__).parameters
    if betas is not None and 'betas' not in accepted:
        raise UserError('--opt_betas %s: --opt %s has no betas; leave the flag out' % (' '.join(map(str, betas)), opt))
    chosen: Dict[str, Any] = {
        'lr': config.lr, 'weight_decay': config.weight_decay, 'eps': config.opt_eps, 'momentum': config.momentum}
    if betas is not None:
        chosen['betas'] = tuple(betas)
    is_ours = opt.lower().replace('lookahead_', '') in OPTIMIZERS
    if cls.__name__ == 'Adafactor' or not is_ours and config.opt_eps == OptimizerConfig.opt_eps:
        chosen.pop('eps')  # their defaults differ, and Adafactor has two
    chosen.update(fixed)
    for group in groups if fixed.get('corrected_weight_decay') else ():
        group['max_lr_snapshot'] = config.lr * group['lr_scale']  # the decay relates the rate to it
    chosen = {name: value for name, value in chosen.items() if name in accepted}
    optimizer = cls(groups, **chosen) if under_apex else kernels.build_optimizer(cls, groups, **chosen)
    return timm.optim.Lookahead(optimizer) if lookahead else optimizer


def complete_momenta(optimizer: torch.optim.Optimizer) -> None:
    """Give SGD's parameters without a momentum one of 0: PyTorch's fused kernel needs it for a whole group, or none."""
    inner = kernels.base_optimizer(optimizer)
    for group in inner.param_groups if isinstance(inner, torch.optim.SGD) else ():
        missing = [parameter for parameter in group['params']
                   if inner.state.get(parameter, {}).get('momentum_buffer') is None]
        for parameter in missing if len(missing) < len(group['params']) else ():
            inner.state[parameter]['momentum_buffer'] = torch.zeros_like(parameter)


# ---- schedules

def cosine_scheduler(base_value: float, final_value: float, epochs: int, niter_per_ep: int, warmup_epochs: int = 0,
                     start_warmup_value: float = 0, warmup_steps: int = -1) -> np.ndarray:
    """A float64 value for each update step: linear warm-up, then half a cosine (SGDR, https://arxiv.org/abs/1608.03983,
    eq. 5, without restarts).

    An epoch has `niter_per_ep` update steps. `warmup_steps` above 0 override `warmup_epochs`. Raises ValueError for a
    warm-up that is longer than the run.
    """
    total = epochs * niter_per_ep
    warmup = warmup_steps if warmup_steps > 0 else warmup_epochs * niter_per_ep
    if warmup > total:
        raise ValueError('a warm-up of %d steps is longer than the run of %d' % (warmup, total))
    rise = np.linspace(start_warmup_value, base_value, warmup) if warmup > 0 else np.array([])
    length = total - warmup
    fall = np.array([final_value + 0.5 * (base_value - final_value) * (1 + math.cos(math.pi * step / length))
                     for step in range(length)])
    return np.concatenate((rise, fall))
