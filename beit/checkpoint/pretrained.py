"""Adapts pretrained weights to another class count, input size or kind of bias table (--finetune)."""

import collections
import json
import math
import os
import re
from typing import Any, Dict, List, Optional, Sequence, Tuple

import numpy as np
import torch
import torch.nn.functional as F

try:
    from timm.models import adapt_input_conv
except ImportError:  # timm before 0.9
    from timm.models.helpers import adapt_input_conv

from beit import model_spec, weights
from beit.checkpoint import hf_names, sources
from beit.errors import UserError, escape_text
from beit.files.weights_file import load_weights_file, read_metadata
from beit.log import log_main

DEFAULT_KEYS = 'model|module'
OTHER_KEYS, AVERAGED_KEYS = ('state_dict', 'model_state_dict'), ('model_ema', 'state_dict_ema')


def load_pretrained(model: torch.nn.Module, source: str, model_key: str = DEFAULT_KEYS, model_prefix: str = '',
                    classes: Optional[Sequence[str]] = None) -> None:
    """Load pretrained weights of the reference, timm or Hugging Face into a model of any input size and class count.

    The reference's rules: a head of another shape is dropped, a shared bias table is copied to every block, bias tables
    and absolute positions are resized to the model's grid. If the file names its classes, the head keeps the row of
    each class that `classes` names too. Raises a `UserError`, which lists names and shapes, for another model's file.
    """
    sources.check_finetune(source)
    path = weights.resolve(source, '--finetune')
    path = sources.hf_weights_path(path, '--finetune') if os.path.isdir(path) else path
    content = load_weights_file(path, '--finetune')
    key, loaded = find_state_dict(content, '--finetune', source, model_key, model_prefix)
    state, library = hf_names.to_native(without_temperature(loaded, path))
    if classes is not None:
        keep_head_rows(state, model, known_class_names(content, path), classes)
    dropped = adapt_state_dict(state, model)
    target = model.state_dict()
    problems = mismatches(state, target, essential_only=True)
    if problems:
        raise UserError('--finetune %s: these are not the weights of this --model: %s' % (source, problems))
    result = model.load_state_dict(state, strict=False)
    key = ', '.join(filter(None, [key, library and 'names of %s' % library]))
    needed, missing = ([name for name in names if not name.endswith('relative_position_index')]
                        for names in (target, result.missing_keys))
    log_main('Loaded %d of %d weights from %s%s' % (len(needed) - len(missing), len(needed), source,
                                                    ' (%s)' % key if key else ''))
    for title, names in (('Not in the file, left at their initial values', missing), ('Not loaded', dropped),
                         ('Unused names in the file', sorted(result.unexpected_keys))):
        if names:
            log_main('%s: %s' % (title, model_spec.shorten_names(names)))


def find_state_dict(content: Any, flag: str, source: str, model_key: str = DEFAULT_KEYS, model_prefix: str = '',
                    use_ema: bool = False) -> Tuple[str, Dict[str, torch.Tensor]]:
    """(the key of the weights in a file, or ''; the weights by name, without the prefixes of wrappers).

    Args:
        model_key: keys separated by |; the first that the file holds is used. The default continues with the keys of
            other programs, then the file itself.
        model_prefix: keep only names with this prefix, such as 'encoder.', and remove it. '' removes the prefixes of
            DistributedDataParallel, Lightning and torch.compile, in any order.

    Raises a `UserError`, which names the keys of the file, if it holds no such weights.
    """
    shown = '%s %s' % (flag, escape_text(source))
    keys = AVERAGED_KEYS if use_ema else tuple(model_key.split('|'))
    if model_key == DEFAULT_KEYS and not use_ema:
        keys += OTHER_KEYS + AVERAGED_KEYS
    found = [(key, content[key]) for key in keys if isinstance(content, dict) and isinstance(content.get(key), dict)]
    if use_ema and not any(_tensors(state) for _, state in found):
        raise UserError('%s holds no averaged weights; leave --use_ema out' % shown)
    for key, state in found + [('', content)] * (model_key == DEFAULT_KEYS or 'model' in keys):
        tensors = _tensors(state)
        if not tensors:
            continue
        prefix = model_prefix or _wrapper(os.path.commonprefix([_wrapper(name) for name in tensors]))
        stripped = collections.OrderedDict((name[len(prefix):].replace('_orig_mod.', ''), value)
                                           for name, value in tensors.items() if name.startswith(prefix))
        if stripped:
            if key in AVERAGED_KEYS and not use_ema:
                log_main('%s: using the averaged weights (%s); it holds no others' % (escape_text(source), key))
            return key, stripped
        raise UserError('%s: no weight has the prefix %r (--model_prefix); their names are %s'
                        % (shown, model_prefix, model_spec.shorten_names(tensors)))
    names = model_spec.shorten_names(map(str, content)) if isinstance(content, dict) else type(content).__name__
    raise UserError('%s: no weights were found under %s; it holds %s; name their key with --model_key'
                    % (shown, ', '.join(keys), names or 'nothing'))


def _wrapper(name):
    return re.match(r'(?:(?:module|model|_orig_mod)\.)*', name).group()


def _tensors(state):
    return {name: value for name, value in state.items() if isinstance(name, str) and torch.is_tensor(value)} \
        if isinstance(state, dict) else {}


def _description(content: Any, path: str) -> Dict[str, Any]:
    """The model_spec of a checkpoint, or in the metadata of an export; {} without one."""
    spec = content.get(model_spec.KEY) if isinstance(content, dict) else None
    try:
        spec = spec or json.loads(read_metadata(path)[model_spec.KEY])
    except (LookupError, ValueError, TypeError, RecursionError):
        pass
    return spec if isinstance(spec, dict) else {}


def without_temperature(state: Dict[str, torch.Tensor], path: str) -> Dict[str, torch.Tensor]:
    """Multiply the head of a calibrated export by the temperature that it holds, to six digits, for training."""
    origin = _description(None, path).get('origin')
    try:
        value = float(origin['temperature'])  # type: ignore[index]
    except (LookupError, ValueError, TypeError):
        return state
    if not 0 < value < math.inf:
        return state
    log_main('%s: its head is calibrated; without the temperature %g here' % (escape_text(path), value))
    return collections.OrderedDict(
        (name, tensor * value if re.match(r'(head|classifier)\.', name) else tensor) for name, tensor in state.items())


def known_class_names(content: Any, path: str) -> List[str]:
    """The class names in a file, or in the config.json beside it; [] if neither has any."""
    spec = _description(content, path)
    if spec.get('has_class_names') is False:
        return []
    names = (content.get('classes') if isinstance(content, dict) else None) or spec.get('classes') \
        or hf_names.hf_labels(path)
    return list(names) if isinstance(names, (list, tuple)) and all(isinstance(name, str) for name in names) else []


def keep_head_rows(state: Dict[str, torch.Tensor], model: torch.nn.Module, theirs: Sequence[str],
                   classes: Sequence[str]) -> None:
    """Copy the head's rows of the classes that both name; the other rows keep their initial values.

    If the file names no classes, nothing changes, and `adapt_state_dict` decides by the head's shape.
    """
    heads = {name: state[name] for name in ('head.weight', 'head.bias') if name in state}
    classes = [escape_text(name) for name in classes]
    theirs = theirs or model_spec.imagenet_wnids(len(heads.get('head.weight', ())), classes)
    if not theirs or list(theirs) == classes or any(len(value) != len(theirs) for value in heads.values()):
        return
    target = model.state_dict()
    rows = [(index, theirs.index(name)) for index, name in enumerate(classes) if name in theirs]
    for name, value in heads.items():
        head = target[name].clone()
        if head.shape[1:] != value.shape[1:]:
            return
        for index, row in rows:
            head[index] = value[row]
        state[name] = head
    log_main('Head: the rows of %d of %d classes come from the file, by name' % (len(rows), len(classes)) if rows else
             'Head: left at its initial values; the file has other classes (%s)' % model_spec.shorten_names(theirs, 4))


def adapt_state_dict(state: Dict[str, torch.Tensor], model: Any, quiet: bool = False) -> List[str]:
    """Adapt a state dict, in place, to the model's classes, depth and grid. Returns the names that it dropped."""
    target = model.state_dict()
    dropped: List[str] = [name for name in ('head.weight', 'head.bias') if name in state]
    if all(name not in target or state[name].shape == target[name].shape for name in dropped):
        dropped = []
    for name in dropped + [name for name in state if name.endswith('relative_position_index')]:
        del state[name]
    first, channels = 'patch_embed.proj.weight', model.patch_embed.proj.in_channels
    if first in state and state[first].dim() == 4 and state[first].shape[1] == 3 != channels:
        state[first] = adapt_input_conv(channels, state[first])
        log_main('%s: adapted from 3 channels to %d, as timm does' % (first, channels))
    shared = 'rel_pos_bias.relative_position_bias_table'
    if shared in state and shared not in target:
        table = state.pop(shared)
        for index in range(model.get_num_layers()):
            state['blocks.%d.attn.relative_position_bias_table' % index] = table.clone()
    grid = model.patch_embed.patch_shape
    for name in list(state):
        if name not in target or state[name].shape == target[name].shape:
            continue
        if name.endswith('relative_position_bias_table') and state[name].shape[1:] == target[name].shape[1:]:
            state[name] = _resize_table(name, state[name], grid, quiet)
        elif name == 'pos_embed' and state[name].shape[::2] == target[name].shape[::2]:
            state[name] = resize_pos_embed(state[name], grid)
    return dropped


def _resize_table(name, table, grid, quiet):
    if grid[0] != grid[1]:
        raise UserError('%s: tables are resized to square grids only, not to %dx%d patches' % ((name,) + tuple(grid)))
    side = round(max(table.shape[0] - 3, 0) ** 0.5)
    if side * side != table.shape[0] - 3:
        raise UserError('%s: %d rows do not fit a square grid' % (name, table.shape[0]))
    if not quiet:
        log_main('%s: resized from %dx%d to %dx%d offsets' % (name, side, side, 2 * grid[0] - 1, 2 * grid[0] - 1))
    return resize_rel_pos_bias(table, 2 * grid[0] - 1)


def resize_rel_pos_bias(table: torch.Tensor, dst_size: int) -> torch.Tensor:
    """Resize a relative position bias table with the reference's spline on a geometric series of positions.

    Args:
        table: (S*S+3, heads), S = 2 * source grid - 1; the three extra rows are kept.
        dst_size: 2 * target grid - 1, of the resulting (dst_size*dst_size+3, heads) of the same dtype.
    """
    from scipy.interpolate import RectBivariateSpline  # slow to import, seldom needed

    src_size = int(round((table.shape[0] - 3) ** 0.5))
    if src_size * src_size != table.shape[0] - 3:
        raise ValueError('a table has S*S+3 rows, got %d' % table.shape[0])
    if src_size == dst_size:
        return table.clone()
    source = _geometric_positions(src_size, dst_size)
    target = np.arange(-(dst_size // 2), dst_size // 2 + 1, dtype=np.float64)
    offsets, extra = table[:-3], table[-3:]
    resized = []
    for head in range(table.shape[1]):
        z = offsets[:, head].view(src_size, src_size).double().numpy()
        resized.append(torch.from_numpy(
            np.ascontiguousarray(RectBivariateSpline(source, source, z.T)(target, target).T)).reshape(-1, 1))
    return torch.cat((torch.cat(resized, dim=1).to(table.dtype), extra), dim=0)


def _geometric_positions(src_size, dst_size):
    """Source positions 0, ±1, ±(1+q), …; bisects q until the outermost position reaches dst_size // 2."""
    half = src_size // 2
    low, high = 1.01, 1.5
    while high - low > 1e-6:
        q = (low + high) / 2
        reach = (1.0 - q ** half) / (1.0 - q)
        low, high = (low, q) if reach > dst_size // 2 else (q, high)
    steps = np.cumsum([q ** power for power in range(half)])
    return np.concatenate((-steps[::-1], [0.], steps))


def resize_pos_embed(pos_embed: torch.Tensor, grid: Sequence[int]) -> torch.Tensor:
    """Resize absolute positions (1, 1+S*S, D) to (1, 1+H*W, D): bicubic; the class token's row is kept."""
    extra, patches = pos_embed[:, :1], pos_embed[:, 1:]
    side = int(patches.shape[1] ** 0.5)
    if side * side != patches.shape[1]:
        raise UserError('pos_embed: %d positions do not fit a square grid' % patches.shape[1])
    patches = patches.reshape(1, side, side, -1).permute(0, 3, 1, 2).float()
    patches = F.interpolate(patches, size=tuple(grid), mode='bicubic', align_corners=False)
    return torch.cat((extra, patches.permute(0, 2, 3, 1).flatten(1, 2).to(pos_embed.dtype)), dim=1)


# Weights that a file must hold; norms, gammas, position tables and the head may keep their initial values.
_ESSENTIAL = re.compile(r'patch_embed\.proj\.|blocks\.\d+\.(attn\.(qkv\.|proj\.|[qv]_bias)|mlp\.fc\d\.)|cls_token')


def mismatches(state: Dict[str, torch.Tensor], target: Dict[str, torch.Tensor], essential_only: bool = False) -> str:
    """The differences between a state dict and the model's, as text; '' if it fits."""
    problems = ['%s is %s in the file and %s in the model' % (name, _shape(state[name]), _shape(target[name]))
                for name in target if name in state and state[name].shape != target[name].shape]
    problems += ['%s %s is missing in the file' % (name, _shape(target[name])) for name in target
                 if name not in state and not name.endswith('relative_position_index')
                 and (not essential_only or _ESSENTIAL.match(name))]
    # With `essential_only`, names of another kind of network, such as a plain ViT's qkv.bias.
    unwanted = r'blocks\.\d+\.(attn|mlp)\..*(weight|(?<!k_)bias)$' if essential_only \
        else r'(?!.*relative_position_index$)'
    problems += ['%s %s is not in the model' % (name, _shape(state[name])) for name in state
                 if name not in target and re.match(unwanted, name)]
    return model_spec.shorten_names(problems, divider='; ')


def _shape(tensor):
    return '(%s)' % ', '.join(map(str, tensor.shape))
