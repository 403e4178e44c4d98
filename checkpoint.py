"""The one room that reads and writes weights: safe reading, pretrained weights made to fit, atomic saving, resuming.

Reading never runs code from a file. Files of the reference, of timm and of this project load alike, on any device and
in any precision: what is written is always float32 on the CPU.
"""

import argparse
import collections
import glob
import os
import re

import torch

import distributed
import utils
from errors import UserError
from pretrained import inner_state, mismatches, strip_prefixes
from safe_files import fetch, read, save  # noqa: F401  (save is part of what this room offers)

BEST, BEST_EMA = 'checkpoint-best.pth', 'checkpoint-best-ema.pth'
MODEL_FLAGS = ('model', 'input_size', 'nb_classes', 'rel_pos_bias', 'abs_pos_emb', 'layer_scale_init_value',
               'use_mean_pooling')  # which flags decide the names and shapes of the weights


# ---- saving

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
    _, state = inner_state(content, 'model|module|state_dict')
    state = strip_prefixes(state)
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
        average = strip_prefixes(content.get('model_ema') or {}) or scaler.full_precision_state(model)
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
        distributed.say('Resumed the weights of %s; it holds no optimizer state, so the schedule starts anew' % source)
        return 0, {}
    load_optimizer(source, optimizer, content['optimizer'])
    if isinstance(content.get('scaler'), dict):
        scaler.load_state_dict(content['scaler'])
    if distributed.is_main_process():  # it is the first process's; the others go on with seeds of their own
        utils.set_random_state(content.get('random_state'), next(model.parameters()).device)
    epoch = content['epoch']
    if not isinstance(epoch, int):  # the reference's best checkpoint says 'best'
        raise UserError('--resume %s: it does not say after which epoch it was saved (epoch is %r); '
                        'give its weights to --finetune instead' % (source, epoch))
    accuracy = content.get('accuracy') or {}
    distributed.say('Resumed %s: epoch %d is done%s' % (source, epoch, ''.join(
        ', best %s %.3f%%' % (name, value) for name, value in sorted(accuracy.items()))))
    return epoch + 1, accuracy
