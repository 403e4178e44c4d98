"""The lines at the start of a run: device, precision, model, data, batch, checkpoints."""

from typing import Any, Dict, List, Tuple

import torch

from beit import model_spec, recipes
from beit.data import fingerprint
from beit.devices import accelerator
from beit.errors import escape_text
from beit.log import log_main, log_table, pluralize
from modeling_finetune import MODELS


def show(environment: Dict[str, Any], flags: Dict[str, Any], data: Any, attention: str,
         steps_per_epoch: int = 0, source: str = '') -> None:
    """Print all flags and a table of the run.

    Args:
        environment: what summary.json has about a run beside its figures.
        steps_per_epoch: update steps; 0 for an evaluation.
        source: the checkpoint that the training resumes, or ''.
    """
    log_main('Flags: %s' % escape_text(' '.join('--%s=%s' % item for item in sorted(flags.items())
                                                if item[1] is not None)), detail=True)
    processes, side, classes = environment['processes'], environment['input_size'], data.classes
    rows = [('Device', '%s, %s, %s' % (environment['device'], environment['device_name'],
                                       pluralize(processes, 'process')))]
    unused_npu = accelerator.npu_unused_reason(flags['device'], torch.device(environment['device']))
    if unused_npu:
        rows.append(('', unused_npu.rstrip()))
    usual = MODELS.get(environment['model'], {}).get('img_size', side)
    counts = ['%d %s' % (environment[kind + '_images'], kind) for kind in ('training', 'validation')
              if environment[kind + '_images'] is not None]
    transparent, sampled = fingerprint.count_transparent(data.val_set if data.train_set is None else data.train_set)
    rows += [('Precision', environment['precision']),
             ('Attention', attention),
             ('Model', '%s, %.2f M parameters, %s, input %dx%d%s' % (
                 environment['model'], environment['parameters'] / 1e6,
                 pluralize(len(classes), 'class'), side, side,
                 '' if side == usual else ' (this model is for --input_size %d)' % usual)),
             ('Classes', model_spec.shorten_names(classes) + (
                 ' (only one: there is nothing to distinguish)' if len(classes) == 1 else '')),
             ('Data', '%s images' % ' and '.join(counts))]
    if transparent and data.spec.architecture.in_chans != 4:
        colour = data.spec.preprocessing.transparency
        rows.append(('', '%d of %d images (a sample) have an alpha channel: %s' % (
            transparent, sampled, 'it is dropped; --background white replaces it' if colour == 'dropped'
            else 'they get the background ' + colour)))
    log_table(rows + (_training_rows(flags, processes, steps_per_epoch, source) if steps_per_epoch else []))


def _training_rows(flags: Dict[str, Any], processes: int, steps_per_epoch: int,
                   source: str) -> List[Tuple[str, str]]:
    steps, every = steps_per_epoch * flags['epochs'], flags['save_ckpt_freq']
    limit = '; --maxstep ends after %d' % flags['maxstep'] if 0 < flags['maxstep'] < steps else ''
    images = flags['batch_size'] * flags['update_freq'] * processes
    return [('Batch', '%d per device x %d x %d accumulated = %d; %s an epoch, %d in all%s' % (
                flags['batch_size'], processes, flags['update_freq'],
                images, pluralize(steps_per_epoch, 'update'),
                steps, limit)),
            *([('Recipe', recipes.describe(flags['recipe'], flags['lr'], images))] if flags['recipe'] else ()),
            ('Checkpoints', 'every %s, and the best, in %s' % (
                'epoch' if every == 1 else '%d epochs' % every, escape_text(flags['output_dir']))
             if flags['output_dir'] and flags['save_ckpt'] else 'none'),
            ('Resumed', escape_text(source) if source else 'nothing, training starts')]
