#!/usr/bin/env python3
"""Average the weights of several checkpoints of one model, in float64, and write them to one file.

The file holds model, model_spec and args, as a checkpoint does, without the optimizer. --eval and --finetune read it.
"""

if __name__ == '__main__':
    from beit import startup
    startup.prepare()
    import check_flags
    check_flags.check_command_line('average_checkpoints.py', __doc__)

import argparse
import collections
import dataclasses
import functools
import os
import sys
from typing import Any, Dict, List, Optional, Sequence

import torch

import flags
from beit import model_spec
from beit.checkpoint import comparison, sources
from beit.checkpoint.inference_model import PROBED, spec_beside
from beit.checkpoint.pretrained import find_state_dict, mismatches, without_temperature
from beit.cli import run_interruptible
from beit.errors import UserError, escape_text, print_line, refuse
from beit.files import run_folder, weights_file
from beit.files.weights_file import load_weights_file
from beit.log import log_main
from beit.model_spec import ModelSpec
from beit.training import metrics
from check_flags import check_early

build_parser = functools.partial(flags.build_parser, flags.AVERAGE, __doc__)


# ---- which files

def take_best(paths: Sequence[str], args: argparse.Namespace) -> List[str]:
    """Select the --best files with the best validation figures, best first, by the log.txt in their folder.

    Epochs without an evaluation do not count.
    """
    figures, val_sets, by = {}, {}, {}
    for path in paths:
        folder, name = os.path.split(path)
        log = {stats['epoch']: stats for stats in run_folder.read_log(folder)}
        epochs = {each: epoch for (epoch, steps), each in sources.list_checkpoints(folder or '.') if not steps}
        epoch = epochs.get(os.path.join(folder or '.', name), 0) - 1
        prefix = 'test_ema_' if args.use_ema else 'test_'
        found = metrics.logged_primary(log.get(epoch, {}), prefix)
        if found is not None:
            figure, figures[path] = found
            by[figure.name] = path
            if log[epoch].get('val_set'):  # an earlier version did not record it
                val_sets[log[epoch]['val_set']] = path
    refuse(not figures, args, 'best', ': the log.txt beside %s and the other files has no %sacc1 or mAP of their '
           'epochs; leave --best out, or name the files' % (escape_text(paths[0]), prefix))
    refuse(args.best > len(figures), args, 'best', ': of %d checkpoints %d were evaluated; lower it, or train with '
           '--save_ckpt_freq 1' % (len(paths), len(figures)))
    refuse(len(val_sets) > 1, args, 'best', ': %s were evaluated on different validation images, or with different '
           'preprocessing; name the files without --best' % ' and '.join(map(escape_text, val_sets.values())))
    refuse(len(by) > 1, args, 'best', ': %s were trained with another --best_by (%s); name the files without --best' % (
        ' and '.join(map(escape_text, by.values())), ', '.join(by)))
    chosen = sorted(figures, key=lambda path: figures[path], reverse=not figure.lowest_is_best)[:args.best]
    for path in chosen:
        print_line('%s: %s %.3f' % (escape_text(path), figure.summary, figures[path]))
    return chosen


# ---- the average

def average(paths: Sequence[str], use_ema: bool = False) -> Dict[str, Any]:
    """The averaged checkpoint: model (float32, all files with equal weight), model_spec, args, averaged (names).

    One file is in memory at a time. Integer buffers, such as the relative position index, must be equal in all files.

    Raises:
        UserError: a file can't be read, has no averaged weights (EMA), or holds another model; it lists differences.
    """
    total: Dict[str, torch.Tensor] = {}
    first: Dict[str, Any] = {}
    for path in paths:
        content = load_weights_file(path, '--inputs')
        state = weights_of(path, content, use_ema)
        outputs = len(state['head.weight']) if 'head.weight' in state else 0
        spec = model_spec.spec_in(content, path, outputs) if outputs else None
        spec = spec or (spec_beside(path, outputs, state, {}, {}) if 'patch_embed.proj.weight' in state else None)
        if not first:
            total = collections.OrderedDict((name, value.double() if value.is_floating_point() else value)
                                            for name, value in state.items())
            first = dict(args=model_spec.saved_args(content), data=comparison.saved_data(content), spec=spec)
            continue
        check_alike(path, state, spec, paths[0], total, first['spec'])
        comparison.check_same_data(paths[0], first, path, content)
        for name, value in state.items():
            if value.is_floating_point():
                total[name] += value.double()
    for name, value in total.items():
        if value.is_floating_point():
            total[name] = (value / len(paths)).float()
    names = [escape_text(os.path.basename(path)) for path in paths]
    content = {'model': total, 'args': first['args'], 'averaged': names}
    if first['data']:
        content['data'] = first['data']
    if first['spec'] is not None:
        known = first['spec'].without_temperature()  # no temperature was fitted for the average
        origin = {name: text for name, text in known.origin.items() if name != 'temperature'}
        known = dataclasses.replace(known, origin=dict(origin, averaged=', '.join(names)))
        content.update({model_spec.KEY: known.to_dict()}, classes=list(known.classes), activation=known.activation)
    return content


def weights_of(path: str, content: Any, use_ema: bool) -> Dict[str, torch.Tensor]:
    state = find_state_dict(content, '--use_ema:' if use_ema else '--inputs', path, use_ema=use_ema)[1]
    state = without_temperature(state, path)
    if 'head.0.weight' in state:
        raise UserError('--inputs %s: it has %s' % (escape_text(path), PROBED))
    broken = [name for name, value in state.items()
              if value.is_floating_point() and not torch.isfinite(value.double().sum())]
    if broken:
        raise UserError('--inputs %s: %s is not finite; leave this file out' % (escape_text(path), broken[0]))
    return state


def check_alike(path: str, state: Dict[str, torch.Tensor], spec: Optional[ModelSpec], first_path: str,
                first_state: Dict[str, torch.Tensor], first_spec: Optional[ModelSpec]) -> None:
    if (spec is None) != (first_spec is None):
        silent, other = (path, first_path) if spec is None else (first_path, path)
        raise UserError('--inputs %s: it holds no description of its model, so it cannot be compared with %s; average '
                        'files that all hold one, or none' % (escape_text(silent), escape_text(other)))
    differences = spec.differences(first_spec) if spec is not None and first_spec is not None else []
    weights = mismatches(state, first_state)
    if weights:
        differences.append(weights.replace('in the model', 'in the first'))
    differences += ['%s has other values' % name for name, value in state.items()
                    if not weights and not value.is_floating_point() and name in first_state
                    and not value.equal(first_state[name])]
    if differences:
        raise UserError('--inputs %s: not the same model as %s: %s'
                        % (escape_text(path), escape_text(first_path), '; '.join(differences)))


def main(args: argparse.Namespace) -> None:
    check_early(flags.AVERAGE, args)
    paths = sources.find_inputs(args.inputs)
    if args.best:
        paths = take_best(paths, args)
    content = average(paths, args.use_ema)
    os.makedirs(os.path.dirname(os.path.abspath(args.output)), exist_ok=True)
    weights_file.save(args.output, content)
    log_main('Averaged %s of %d checkpoints into %s' % (
        'the averaged weights' if args.use_ema else 'the weights', len(paths), escape_text(args.output)))


def run(argv: Optional[Sequence[str]] = None) -> int:
    """Run the command line; a user error is one line and exit status 2."""
    return run_interruptible(flags.AVERAGE, lambda: main(build_parser().parse_args(argv)), 'close other programs')


if __name__ == '__main__':
    sys.exit(run())
