"""The one room that reads and writes weights: safe reading, pretrained weights made to fit, atomic saving, resuming.

Reading never runs code from a file. Files of the reference, of timm and of this project load alike, on any device and
in any precision: what is written is always float32 on the CPU.
"""

import argparse
import collections
import contextlib
import glob
import hashlib
import http.client
import inspect
import io
import math
import os
import pickle
import re
import types
import urllib.parse
import warnings
import zipfile

import numpy as np
import torch
import torch.hub
import torch.nn.functional as F

import utils
from errors import UserError

BEST, BEST_EMA = 'checkpoint-best.pth', 'checkpoint-best-ema.pth'
MODEL_FLAGS = ('model', 'input_size', 'nb_classes', 'rel_pos_bias', 'abs_pos_emb', 'layer_scale_init_value',
               'use_mean_pooling')  # which flags decide the names and shapes of the weights


# ---- reading

class _RestrictedUnpickler(pickle.Unpickler):
    """Finds the handful of harmless names that a checkpoint needs, and refuses every other."""

    ALLOWED = {
        '_codecs': {'encode'},  # how protocol 2 writes the bytes of a NumPy scalar
        'collections': {'OrderedDict', 'defaultdict'},
        'argparse': {'Namespace'},
        'torch._utils': {'_rebuild_tensor', '_rebuild_tensor_v2', '_rebuild_parameter'},
        'torch.serialization': {'_get_layout'},
        'numpy': {'dtype', 'float64', 'float32', 'int64', 'int32', 'bool_'},
        'numpy.core.multiarray': {'scalar'},
        'numpy._core.multiarray': {'scalar'},
    }

    def find_class(self, module, name):
        if name in self.ALLOWED.get(module, ()):
            return super().find_class(module, name)
        if module == 'torch' and (name.endswith('Storage') or name == 'Size'
                                  or isinstance(getattr(torch, name, None), torch.dtype)):
            return getattr(torch, name)
        if module == 'torch.nn.parameter' and name == 'Parameter':
            return torch.nn.Parameter
        raise pickle.UnpicklingError('it refers to %s.%s, which a weights file has no use for' % (module, name))


def _restricted_pickle():
    """A module for torch.load's `pickle_module`, for the PyTorch that has no `weights_only` with an allow list."""
    module = types.ModuleType('restricted_pickle')
    module.Unpickler = _RestrictedUnpickler
    module.load = lambda file, **options: _RestrictedUnpickler(file, **options).load()
    return module


class _PaddedReader(io.BufferedReader):
    """A file that goes on with zeros behind its end, and remembers it: a short read crashes PyTorch 1.5 later on."""

    ended_early = False

    def fileno(self):
        raise io.UnsupportedOperation('fileno')  # else torch reads past this class

    def read(self, size=-1):
        data = super().read(size)
        if size is not None and len(data) < size:
            self.ended_early = True
            data += bytes(size - len(data))
        return data

    def readinto(self, buffer):
        count = super().readinto(buffer)
        if count < len(buffer):
            self.ended_early = True
            buffer[count:] = bytes(len(buffer) - count)
        return len(buffer)


def _numpy_scalar_types():
    multiarray = getattr(np, '_core', None) or np.core
    dtypes = [type(np.dtype(kind)) for kind in ('float64', 'float32', 'int64', 'int32', 'bool')]
    return [multiarray.multiarray.scalar, np.dtype] + dtypes


def read(path, flag=''):
    """What a weights file holds, its tensors on the CPU. Nothing in the file is run.

    Args:
        flag (str): the flag that named it, for the error's line.

    Raises:
        UserError: the file is missing, damaged, or holds anything but tensors and plain values.
    """
    name = ('%s %s' % (flag, path)).strip()
    if not os.path.isfile(path):
        raise UserError('%s: no such file' % name)
    try:
        with warnings.catch_warnings(), open(path, 'rb') as file:
            if file.read(4) == b'PK\x03\x04':
                zipfile.ZipFile(file).infolist()  # raises on a truncated file, on which PyTorch 1.5 would abort
            file.seek(0)
            warnings.simplefilter('ignore')  # what is wrong with a file is said once, below
            if hasattr(torch.serialization, 'safe_globals'):
                with torch.serialization.safe_globals([argparse.Namespace] + _numpy_scalar_types()):
                    return torch.load(file, map_location='cpu', weights_only=True)
            options = {}
            if 'weights_only' in inspect.signature(torch.load).parameters:
                options['weights_only'] = False  # there it has no allow list; the restricted unpickler is as strict
            with _PaddedReader(open(path, 'rb', buffering=0)) as padded:
                content = torch.load(padded, map_location='cpu', pickle_module=_restricted_pickle(), **options)
            if padded.ended_early:
                raise EOFError('the file ends early')
            return content
    except pickle.UnpicklingError as error:
        found = re.search(r'it refers to (\S+),|GLOBAL (\S+) |Unsupported (?:global|class|type)\S* (\S+)', str(error))
        if found:
            raise UserError('%s: refused, because it refers to %s; a weights file holds tensors and plain values only'
                            % (name, next(filter(None, found.groups())))) from None
        raise UserError('%s: not a weights file, or damaged; fetch or copy it again' % name) from None
    except (RuntimeError, EOFError, OSError, ValueError, KeyError, IndexError, AttributeError, TypeError,
            UnicodeDecodeError, zipfile.BadZipFile, AssertionError, ImportError) as error:
        reason = ' '.join(str(error).split())[:120] or type(error).__name__
        raise UserError('%s: not a weights file, or truncated (%s); fetch or copy it again' % (name, reason)) from None


def fetch(source):
    """The local path of a file or an https URL; a URL is downloaded once, to a temporary name first.

    A URL may end in #sha256=<hex>; a file that differs is refused. Without it a hash in the file's name, as in
    weights-8a3f5b21.pth, is checked like PyTorch does.
    """
    if not re.match(r'[a-z]+://', source):
        return source
    address, _, fragment = source.partition('#')
    if not address.startswith('https://'):
        raise UserError('%s: only https:// addresses are downloaded; fetch the file yourself and give its path'
                        % source)
    home = os.environ.get('TORCH_HOME') or os.path.join(
        os.environ.get('XDG_CACHE_HOME') or os.path.join(os.path.expanduser('~'), '.cache'), 'torch')
    name = os.path.basename(urllib.parse.urlparse(address).path)
    folder = 'beit-' + hashlib.sha256(address.encode()).hexdigest()[:12]  # two addresses may end in the same name
    path = os.path.join(home, 'hub', 'checkpoints', folder, name)
    if utils.is_main_process() and not os.path.isfile(path):
        utils.say('Downloading %s to %s' % (address, path))
        in_name = re.search(r'-([0-9a-f]{8,})\.', name)
        try:
            os.makedirs(os.path.dirname(path), exist_ok=True)
            torch.hub.download_url_to_file(address, path, in_name.group(1) if in_name else None)
        except (OSError, RuntimeError, ValueError, http.client.HTTPException) as error:
            raise UserError('%s: download failed (%s); fetch the file yourself and give its path' % (source, error)) \
                from None
    utils.barrier()
    if fragment.startswith('sha256='):
        digest = hashlib.sha256()
        with open(path, 'rb') as file:
            for block in iter(lambda: file.read(1 << 20), b''):
                digest.update(block)
        if digest.hexdigest() != fragment[len('sha256='):].lower():
            raise UserError('%s: %s has sha256 %s, not the one asked for; delete it and try again'
                            % (source, path, digest.hexdigest()))
    return path


# ---- pretrained weights (--finetune)

def check_finetune(source):
    """Raise a `UserError` where --finetune names a file that isn't there. Cheap, so that it can come first."""
    if source and not re.match(r'[a-z]+://', source) and not os.path.isfile(source):
        raise UserError('--finetune %s: no such file; put the pretrained weights there (checkpoints/README.md says '
                        'where to get them), or train from scratch with --finetune=' % source)


def load_pretrained(model, source, model_key='model|module', model_prefix=''):
    """Load pretrained weights into a model of any input size and class count.

    The head is dropped where its shape differs, a shared bias table is given to every block, bias tables and absolute
    positions are resized to the model's grid (the reference's rules).

    Args:
        source (str): a file or an https URL.
        model_key (str): names divided by |; the first that the file holds is taken, else the file itself.
        model_prefix (str): what the file's names have in front, such as 'encoder.'; names without it are left out.

    Raises:
        UserError: the file can't be read, or its weights are another model's; then it lists names and shapes.
    """
    check_finetune(source)
    loaded = read(fetch(source), '--finetune')
    key, loaded = _inner_state(loaded, model_key)
    state = _strip_prefixes(loaded, model_prefix)
    if not state:
        raise UserError('--finetune %s: holds no weights%s' % (
            source, ' with the prefix %r (--model_prefix)' % model_prefix if model_prefix else ''))
    dropped = fit_to_model(state, model)
    target = model.state_dict()
    problems = mismatches(state, target, essential_only=True)
    if problems:
        raise UserError('--finetune %s: these are not the weights of this --model: %s' % (source, problems))
    result = model.load_state_dict(state, strict=False)
    missing = [name for name in result.missing_keys if not name.endswith('relative_position_index')]
    utils.say('Loaded %d of %d weights from %s%s' % (len(target) - len(result.missing_keys), len(target), source,
                                                 ' (%s)' % key if key else ''))
    for what, names in (('Not in the file, left at their start', missing), ('Left out of the file', dropped),
                        ('Unused names in the file', sorted(result.unexpected_keys))):
        if names:
            utils.say('%s: %s' % (what, _shorten(names)))


def _inner_state(loaded, model_key):
    for key in model_key.split('|'):
        if isinstance(loaded, dict) and isinstance(loaded.get(key), dict):
            return key, loaded[key]
    return '', loaded


def _strip_prefixes(loaded, model_prefix=''):
    """The tensors of a state dict, without `model_prefix` or DistributedDataParallel's 'module.'."""
    if not isinstance(loaded, dict):
        return {}
    prefix = model_prefix
    if not prefix and loaded and all(str(name).startswith('module.') for name in loaded):
        prefix = 'module.'
    return collections.OrderedDict((name[len(prefix):], value) for name, value in loaded.items()
                                   if isinstance(name, str) and name.startswith(prefix) and torch.is_tensor(value))


def fit_to_model(state, model):
    """Change a state dict in place so that it fits the model's classes, depth and grid; gives the names it dropped."""
    target = model.state_dict()
    dropped = []
    if any(name in state and name in target and state[name].shape != target[name].shape
           for name in ('head.weight', 'head.bias')):
        dropped = [name for name in ('head.weight', 'head.bias') if state.pop(name, None) is not None]
    shared = 'rel_pos_bias.relative_position_bias_table'
    if shared in state and shared not in target:
        table = state.pop(shared)
        for index in range(model.get_num_layers()):
            state['blocks.%d.attn.relative_position_bias_table' % index] = table.clone()
    for name in [name for name in state if name.endswith('relative_position_index')]:
        del state[name]
    grid = model.patch_embed.patch_shape
    for name in list(state):
        if name not in target or state[name].shape == target[name].shape:
            continue
        if name.endswith('relative_position_bias_table') and state[name].shape[1:] == target[name].shape[1:]:
            state[name] = _resize_table(name, state[name], grid)
        elif name == 'pos_embed' and state[name].shape[::2] == target[name].shape[::2]:
            state[name] = resize_pos_embed(state[name], grid)
    return dropped


def _resize_table(name, table, grid):
    if grid[0] != grid[1]:
        raise UserError('%s: tables are resized to square grids only, not to %dx%d patches' % ((name,) + tuple(grid)))
    side = math.isqrt(table.shape[0] - 3) if hasattr(math, 'isqrt') else int((table.shape[0] - 3) ** 0.5)
    if side * side != table.shape[0] - 3:
        raise UserError('%s: %d rows are not those of a square grid' % (name, table.shape[0]))
    utils.say('%s: resized from %dx%d to %dx%d offsets' % (name, side, side, 2 * grid[0] - 1, 2 * grid[0] - 1))
    return resize_rel_pos_bias(table, 2 * grid[0] - 1)


def resize_rel_pos_bias(table, dst_size):
    """Resize a relative position bias table, by the reference's spline on a geometric series of positions.

    Args:
        table (Tensor): (S*S+3, heads), S = 2 * source grid - 1; the three extra rows are kept.
        dst_size (int): 2 * target grid - 1.

    Returns:
        Tensor (dst_size*dst_size+3, heads), of the same dtype.
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
    """Source positions 0, ±1, ±(1+q), … ; q is bisected so that the outermost reaches dst_size // 2."""
    half = src_size // 2
    low, high = 1.01, 1.5
    while high - low > 1e-6:
        q = (low + high) / 2
        reach = (1.0 - q ** half) / (1.0 - q)
        low, high = (low, q) if reach > dst_size // 2 else (q, high)
    steps = np.cumsum([q ** power for power in range(half)])
    return np.concatenate((-steps[::-1], [0.], steps))


def resize_pos_embed(pos_embed, grid):
    """Resize absolute positions (1, 1+S*S, D) to (1, 1+H*W, D): bicubic, the class token's kept."""
    extra, patches = pos_embed[:, :1], pos_embed[:, 1:]
    side = int(patches.shape[1] ** 0.5)
    if side * side != patches.shape[1]:
        raise UserError('pos_embed: %d positions are not those of a square grid' % patches.shape[1])
    patches = patches.reshape(1, side, side, -1).permute(0, 3, 1, 2).float()
    patches = F.interpolate(patches, size=tuple(grid), mode='bicubic', align_corners=False)
    return torch.cat((extra, patches.permute(0, 2, 3, 1).flatten(1, 2).to(pos_embed.dtype)), dim=1)


# Weights that a model cannot do without; norms, gammas, position tables and the head may be left at their start.
_ESSENTIAL = re.compile(r'patch_embed\.proj\.|blocks\.\d+\.(attn\.(qkv|proj)|mlp\.fc\d)\.|cls_token')


def mismatches(state, target, essential_only=False):
    """How a state dict differs from the model's, in words; '' where it fits."""
    problems = ['%s is %s in the file and %s in the model' % (name, _shape(state[name]), _shape(target[name]))
                for name in target if name in state and state[name].shape != target[name].shape]
    problems += ['%s %s is missing in the file' % (name, _shape(target[name])) for name in target
                 if name not in state and not name.endswith('relative_position_index')
                 and (not essential_only or _ESSENTIAL.match(name))]
    if not essential_only:
        problems += ['%s %s is not in the model' % (name, _shape(state[name])) for name in state
                     if name not in target and not name.endswith('relative_position_index')]
    return _shorten(problems, 6, '; ')


def _shape(tensor):
    return '(%s)' % ', '.join(map(str, tensor.shape))


def _shorten(names, most=8, divider=', '):
    names = list(names)
    more = divider + '… and %d more' % (len(names) - most) if len(names) > most else ''
    return divider.join(names[:most]) + more


# ---- saving

def save(path, content):
    """Write a checkpoint so that the name never holds half a file: temporary name, flush, fsync, rename.

    Raises:
        UserError: the disk is full or the folder can't be written; what stood there before is whole.
    """
    temporary = '%s.tmp-%d' % (path, os.getpid())
    try:
        with open(temporary, 'wb') as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        _fsync_folder(os.path.dirname(path) or '.')
    except (OSError, RuntimeError) as error:
        raise UserError('--output_dir: cannot write %s (%s); earlier checkpoints are whole'
                        % (path, ' '.join(str(error).split()))) from None
    finally:
        with contextlib.suppress(OSError):
            os.remove(temporary)  # still there only where something failed, or the user interrupted


def _fsync_folder(folder):
    if hasattr(os, 'O_DIRECTORY'):
        handle = os.open(folder, os.O_DIRECTORY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def training_state(args, epoch, model, optimizer, scaler, ema=None, accuracy=None):
    """The dict that a checkpoint holds: model, optimizer, epoch, scaler, args, and with an average model_ema.

    Args:
        epoch (int): the last finished epoch.
        accuracy (dict): the best accuracies so far, in percent.
    """
    content = {
        'model': _to_cpu(scaler.full_precision_state(model)),
        'optimizer': _portable(optimizer.state_dict()),
        'epoch': int(epoch),
        'scaler': scaler.state_dict(),
        'args': dict(vars(args)),
        'accuracy': dict(accuracy or {}),
        'random_state': utils.random_state(next(model.parameters()).device),
    }
    if ema is not None:
        content['model_ema'] = _to_cpu(ema.ema.state_dict())
    return content


def _to_cpu(state):
    return collections.OrderedDict(
        (name, value.detach().to('cpu', torch.float32 if value.is_floating_point() else value.dtype))
        for name, value in state.items())


def _portable(state):
    """Optimizer state that any machine and version reads: tensors on the CPU, `step` as a number."""
    def portable(name, value):
        if not torch.is_tensor(value):
            return value
        return float(value) if name == 'step' else value.detach().to('cpu')

    state['state'] = {key: {name: portable(name, value) for name, value in values.items()}
                      for key, values in state['state'].items()}
    return state


# ---- resuming

def numbered(folder):
    """(epoch, path) of every checkpoint-<epoch>.pth in a folder, oldest first."""
    found = [(re.search(r'checkpoint-(\d+)\.pth$', path), path)
             for path in glob.glob(os.path.join(glob.escape(folder), 'checkpoint-*.pth'))]
    return sorted((int(match.group(1)), path) for match, path in found if match)


def candidates(source):
    """The files that --resume may mean: itself or a URL; in a folder its checkpoints, numbered ones newest first.

    Raises:
        UserError: there's none.
    """
    if re.match(r'[a-z]+://', source) or os.path.isfile(source):
        return [source]
    if not os.path.isdir(source):
        raise UserError('--resume %s: no such file or folder' % source)
    found = [path for _, path in reversed(numbered(source))]
    found += [os.path.join(source, name) for name in (BEST, BEST_EMA) if os.path.isfile(os.path.join(source, name))]
    if not found:
        raise UserError('--resume %s: the folder holds no checkpoint-<epoch>.pth or %s' % (source, BEST))
    return found


def find(source, prefer_best=False):
    """The file to resume: of a folder's checkpoints the one that got furthest, or for evaluation the best."""
    found = candidates(source)
    best = [path for path in found if os.path.basename(path) == BEST]
    if prefer_best and best:
        return best[0]
    # A best checkpoint may be newer than the newest numbered one: those come each few epochs only.
    furthest = found[:1] + [path for path in found[1:] if os.path.basename(path) in (BEST, BEST_EMA)]
    return furthest[0] if len(furthest) == 1 else max(furthest, key=_epoch)


def _epoch(path):
    name = re.search(r'checkpoint-(\d+)\.pth$', path)
    epoch = int(name.group(1)) if name else read(path, '--resume').get('epoch')
    return epoch if isinstance(epoch, int) else -1


def lies_in(path, folder):
    return bool(path and folder) and os.path.dirname(os.path.realpath(path)) == os.path.realpath(folder)


def source_to_resume(resume, auto_resume, output_dir):
    """What to resume, as `find` gives it: --resume, else with --auto_resume from the output folder; or ''."""
    if resume:
        return find(resume)
    if auto_resume and output_dir and glob.glob(os.path.join(glob.escape(output_dir), 'checkpoint-*.pth')):
        return find(output_dir)
    return ''


def resume_weights(source, model, scaler, ema=None):
    """Load a checkpoint's weights for evaluation, into the model and, where both have one, the average.

    Returns:
        The file's content.
    """
    content = read(fetch(source), '--resume')
    if not isinstance(content, dict):
        raise UserError('--resume %s: holds no weights' % source)
    _, state = _inner_state(content, 'model|module|state_dict')
    state = _strip_prefixes(state)
    live = scaler.full_precision_state(model)
    problems = mismatches(state, live)
    if problems:
        raise UserError('--resume %s: these are not the weights of this model: %s%s'
                        % (source, problems, _trained_with(content)))
    for name, tensor in live.items():
        if name in state and not name.endswith('relative_position_index'):
            tensor.copy_(state[name])
    scaler.weights_changed()
    if ema is not None:
        # Without an average in the file, the average starts again from the weights just read.
        average = _strip_prefixes(content.get('model_ema') or {}) or scaler.full_precision_state(model)
        ema.ema.load_state_dict({**ema.ema.state_dict(), **average})
    return content


def _trained_with(content):
    """' (it was trained with --model …)', where the file says so."""
    args = content.get('args')
    args = vars(args) if isinstance(args, argparse.Namespace) else args
    if not isinstance(args, dict):
        return ''
    flags = ['--%s %s' % (name, args[name]) for name in MODEL_FLAGS if name in args]
    return ' (it was trained with %s)' % ' '.join(flags) if flags else ''


def load_optimizer(source, optimizer, state):
    """Load an optimizer's moments. Rates and decays stay this run's: the file's would silently outlive its flags."""
    mine = [{name: group[name] for name in ('lr', 'lr_scale', 'weight_decay', 'decays', 'name') if name in group}
            for group in optimizer.param_groups]
    kinds = {'betas', 'momentum', 'rho', 'alpha'}  # what tells the families of optimizers apart
    theirs = set(state['param_groups'][0]) if state.get('param_groups') else set()
    try:
        if kinds & theirs != kinds & set(optimizer.param_groups[0]):
            raise ValueError('another kind of optimizer wrote it')
        optimizer.load_state_dict(state)
    except (ValueError, KeyError) as error:
        raise UserError('--resume %s: its optimizer state does not fit this run (%s); use the --opt and model flags of '
                        'that run, or give the file to --finetune' % (source, error)) from None
    for group, values in zip(optimizer.param_groups, mine):
        group.update(values)


def resume_training(source, model, optimizer, scaler, ema=None):
    """Take up a run where a checkpoint left it.

    Returns:
        (start_epoch, accuracy): the next epoch to train, and the dict of best accuracies so far. A file with weights
        only gives (0, {}): training starts from them.
    """
    content = resume_weights(source, model, scaler, ema)
    if not isinstance(content.get('optimizer'), dict) or 'epoch' not in content:
        utils.say('Resumed the weights of %s; it holds no optimizer state, so the schedule starts anew' % source)
        return 0, {}
    load_optimizer(source, optimizer, content['optimizer'])
    if isinstance(content.get('scaler'), dict):
        scaler.load_state_dict(content['scaler'])
    if utils.is_main_process():  # it is the first process's; the others go on with seeds of their own
        utils.set_random_state(content.get('random_state'), next(model.parameters()).device)
    epoch = content['epoch']
    if not isinstance(epoch, int):  # the reference's best checkpoint says 'best'
        raise UserError('--resume %s: it does not say after which epoch it was saved (epoch is %r); '
                        'give its weights to --finetune instead' % (source, epoch))
    accuracy = content.get('accuracy') or {}
    utils.say('Resumed %s: epoch %d is done%s' % (source, epoch, ''.join(
        ', best %s %.3f%%' % (name, value) for name, value in sorted(accuracy.items()))))
    return epoch + 1, accuracy
