"""Compares data and settings of a checkpoint and of a resumed run, an evaluation or an average.

`FACTS` lists everything besides the flags that affects the numbers of a training run; docs/reliability.md has the
table for users.
"""

import dataclasses
import functools
import hashlib
import importlib
from typing import Any, Callable, Container, Dict, List, NamedTuple, Optional, Sequence, Tuple

import numpy as np
import torch

from beit.checkpoint.discovery import saved_progress
from beit.data import fingerprint
from beit.devices import accelerator
from beit.distributed import process_group
from beit.errors import UserError, escape_text
from beit.log import log_main
from beit.model_spec import ModelSpec, saved_args

RNG_VERSION = 2  # increased whenever the same seed gives other random numbers than before


class Run(NamedTuple):
    """The source of a training run's facts."""
    flags: Dict[str, Any]
    device: torch.device
    data: Dict[str, Any]  # see `fingerprint.of_data`
    class_weights: Optional[int] = None  # a checksum


class Fact(NamedTuple):
    """Something that affects the numbers of a training run, and that a resumed run compares."""
    name: str  # its key in the checkpoint's `progress['run']` or, such as 'train.images', in `data`
    now: Optional[Callable[[Run], Any]] = None  # gives its value, a plain one; None for a part of the fingerprints
    title: str = ''  # its name in the line '<title>: <value> (was <value>)'
    says: str = ''  # a line instead of that, where the value is a hash
    changes_order: bool = False  # whether it affects the order of the data
    unless: Tuple[str, ...] = ()  # facts whose difference explains a difference of this one, and is reported instead


def _version(package, run):
    return str(getattr(importlib.import_module(package), '__version__', None))


def _facts_of_a_set(name, title):
    """The order counts for the training set only: an evaluation's figures do not depend on it."""
    trained, names = name == 'train', '%s.names' % name
    images = Fact(name + '.images', None, title, changes_order=trained)
    other = (images.name, names)
    found = (images,
             Fact(names, None, says='%s: other files, by their names' % title, changes_order=trained,
                  unless=(images.name,)),
             Fact(name + '.labels', None, says='%s: other labels' % title, unless=other),
             Fact(name + '.sizes', None, says='%s: other files of the same names, by their sizes' % title,
                  unless=other),
             Fact(name + '.sample', None, says='%s: other files of the same names, by their content' % title,
                  unless=other + (name + '.sizes',)))
    return found + ((Fact('train.order', None, says='%s: the same files in another order' % title, changes_order=True,
                          unless=other),) if trained else ())


FACTS: Tuple[Fact, ...] = (
    Fact('batch_size', lambda run: run.flags['batch_size'], '--batch_size'),
    Fact('update_freq', lambda run: run.flags['update_freq'], '--update_freq'),
    Fact('processes', lambda run: process_group.world_size(), 'processes'),
    Fact('total_batch', lambda run: run.flags['batch_size'] * run.flags['update_freq'] * process_group.world_size(),
         'images an update', changes_order=True),
    Fact('device', lambda run: run.device.type, 'device'),
    Fact('device_name', lambda run: accelerator.device_name(run.device), 'device', unless=('device',)),
    Fact('random_numbers', lambda run: RNG_VERSION, 'version of the random numbers'),
    Fact('class_weights', lambda run: run.class_weights, 'class weights, a checksum'),
) + tuple(Fact(package, functools.partial(_version, package), 'version of ' + package)
          for package in ('torch', 'torchvision', 'timm', 'numpy', 'PIL')
          ) + _facts_of_a_set('train', 'training images') + _facts_of_a_set('val', 'validation images')


# ---- reading a checkpoint

def saved_data(content: Any) -> Dict[str, Any]:
    """The fingerprints of a checkpoint's training and validation images; {} if it holds none."""
    data = content.get('data') if isinstance(content, dict) else None
    return data if isinstance(data, dict) and isinstance(data.get('train'), dict) else {}


def _split_flags(content):
    """(--val_split, --seed) of a checkpoint's run; None without --val_split."""
    share, seed = (saved_args(content).get(name) for name in ('val_split', 'seed'))
    return (share, seed) if isinstance(share, float) and share > 0 and isinstance(seed, int) else None


def held_out_keys(content: Any) -> Optional[np.ndarray]:
    """uint64: `subsets.name_keys` of the images that --val_split held out in a checkpoint's run, or None."""
    keys = saved_data(content).get('held_out')
    return keys.numpy().view(np.uint64) if torch.is_tensor(keys) and keys.dtype == torch.int64 and keys.dim() == 1 \
        else None


def data_to_save(data: Dict[str, Any], held_out: Optional[np.ndarray]) -> Dict[str, Any]:
    """A checkpoint's `data`: the fingerprints, and the uint64 keys of the images that --val_split held out."""
    return dict(data) if held_out is None else dict(
        data, held_out=torch.from_numpy(np.sort(held_out).astype(np.uint64).view(np.int64)))


# ---- resuming a training

def facts_of(run: Run) -> Dict[str, Any]:
    """A checkpoint's `progress['run']`."""
    return {fact.name: fact.now(run) for fact in FACTS if fact.now}


class Difference(NamedTuple):
    """A reason why a resumed run computes other numbers than an uninterrupted one."""
    text: str
    changes_order: Optional[bool] = False  # None: unknown


def resume_differences(content: Dict[str, Any], run: Run, ignored: Container[str]) -> List[Difference]:
    """All differences between a run and a checkpoint's, except flags in `ignored`; [] for the same numbers."""
    theirs, before, data = saved_args(content), saved_progress(content).get('run'), saved_data(content)
    if not theirs or not isinstance(before, dict):
        return [Difference('the checkpoint does not record its flags', None)]
    found = [Difference(_change('--%s is %s (was %s)', name, value, theirs[name]), name == 'seed')
             for name, value in sorted(run.flags.items())
             if name in theirs and name not in ignored and repr(theirs[name]) != repr(value)]
    found += _differing([fact for fact in FACTS if fact.now], facts_of(run).get,
                        lambda name: before.get(name, 'of another version'))
    if not data:
        return found + [Difference('the checkpoint does not record its training images', None)]
    return found + _data_differences(run.data, data)


def _differing(facts, now, before):
    """The `Difference`s of facts, unless others explain them; `now` and `before` are functions of a fact's name."""
    different, found = set(), []
    for fact in facts:
        if repr(now(fact.name)) != repr(before(fact.name)):
            different.add(fact.name)
            if not different & set(fact.unless):
                found.append(Difference(
                    fact.says or _change('%s: %s (was %s)', fact.title, now(fact.name), before(fact.name)),
                    fact.changes_order))
    return found


def _data_differences(data, before, part=''):
    """The `Difference`s of two data's fingerprints; `part` 'val.' compares the validation set alone."""
    return _differing([fact for fact in FACTS if fact.now is None and fact.name.startswith(part)],
                      functools.partial(_look_up, data), functools.partial(_look_up, before))


def _change(text, name, now, before):
    return text % (name, now, escape_text('%.60s' % (before,)))


def _look_up(data, name):
    """The value of a fact such as 'train.images'; 'none' if there is no such set."""
    part, _, key = name.partition('.')
    part = data.get(part)
    return part.get(key) if isinstance(part, dict) else 'none'


def resume_message(differences: List[Difference]) -> str:
    """The line that compares a resumed run with an uninterrupted one."""
    if not differences:
        return 'Resumes exactly as if it had not been stopped'
    orders = {difference.changes_order for difference in differences}
    order, joint = ('another', 'and') if True in orders else ('perhaps another', 'and') if None in orders \
        else ('the same', 'but')
    return 'Resumes in %s order of the data, %s not with the same numbers as without a stop: %s' % (
        order, joint, '; '.join(difference.text for difference in differences))


def evaluation_id(data: Dict[str, Any], spec: Optional[ModelSpec], test_flip: bool) -> str:
    """A hash of everything besides the weights that affects a validation figure; '' if that is unknown."""
    images = data.get('val')
    if not isinstance(images, dict) or spec is None:
        return ''
    preparing = tuple(getattr(spec.preprocessing, field.name) for field in dataclasses.fields(spec.preprocessing)
                      if field.name not in ('exif', 'transparency') or  # as before these fields
                      getattr(spec.preprocessing, field.name) != field.default)
    facts = (sorted(item for item in images.items() if item[0] != 'order'), preparing, len(spec.classes),
             bool(test_flip))
    return hashlib.sha256(repr(facts).encode()).hexdigest()[:12]


# ---- no evaluation on training images

def held_out_before(source: str, content: Any, val_split: float, seed: int) -> Optional[np.ndarray]:
    """uint64: the images that the checkpoint's run held out, for this --val_split to reuse; None for a new split.

    Raises a `UserError` if the run had another --val_split or --seed, or an earlier version's split.
    """
    theirs = _split_flags(content)
    if not val_split or theirs is None:
        return None
    for name, value, other in zip(('val_split', 'seed'), (val_split, seed), theirs):
        if value != other:
            raise UserError('--%s %s: %s was trained with --%s %s, on some of the images to evaluate; give its --seed '
                            'and --val_split' % (name, value, escape_text(source), name, other))
    keys = held_out_keys(content)
    if keys is None:
        raise UserError('--val_split %g: an earlier version, with another split, trained %s on some of the images to '
                        'evaluate; evaluate separate images (--eval_data_path or --val_csv)'
                        % (val_split, escape_text(source)))
    return keys


def check_unseen(source: str, content: Any, val_set: Any, val_split: float) -> None:
    """Compare the images to evaluate with a checkpoint's sample of its training images, by size and content.

    A line reports shared ones and, if the training used --val_split, its flags. Raises a `UserError` if there are some,
    and --val_split is given, but was not in the training.
    """
    if val_split and held_out_keys(content) is not None:
        return  # the same images are held out again; copies among them are no reason to stop
    train = saved_data(content).get('train', {})
    sample = [row for row in train.get('sample', ()) if _is_row(row)] if isinstance(train.get('sample'), list) else []
    known = fingerprint.count_known(val_set, sample) if val_set is not None and sample else 0
    if not known:
        return
    share = '%d of %d training images of %s (a sample)' % (known, len(sample), escape_text(source))
    if val_split:
        raise UserError('--val_split %g: %s are among the images to evaluate; leave the flag out and name other images '
                        '(--eval_data_path or --val_csv), or start again with --finetune' % (val_split, share))
    theirs = _split_flags(content)
    log_main('Trained on: %s are among the %d to evaluate; the figures are too good for new images%s' % (
        share, len(val_set), '' if theirs is None else
        '; evaluate the held-out images with --val_split %s --seed %s' % theirs))


def _is_row(row):
    return isinstance(row, (list, tuple)) and [type(each) for each in row] == [str, str, int, str] \
        and all(len(each) == 16 and set(each) <= set('0123456789abcdef') for each in row[:2])


def check_evaluation(source: str, content: Any, val_set: Any, classes: Sequence[str], val_split: float,
                     device: Optional[torch.device] = None) -> None:
    """`check_unseen`, and log how the images differ from the validation images of the checkpoint's training.

    All processes of a job call this, with their `device`, or one alone.
    """
    check_unseen(source, content, val_set, val_split)
    theirs = saved_data(content)
    if isinstance(theirs.get('val'), dict):
        found = _data_differences(fingerprint.of_data(None, val_set, classes, device), theirs, 'val.')
        if found:
            log_main('Not the validation images of the training: %s' % '; '.join(each.text for each in found))


# ---- averaging

def check_same_data(first_source: str, first: Dict[str, Any], source: str, content: Any) -> None:
    """Compare the data of two checkpoints to average. A line reports different training images.

    Raises a `UserError` if their --val_split held out different images: each was trained on images that the other held
    out.
    """
    keys, others = held_out_keys(first), held_out_keys(content)
    mine, theirs = _split_flags(first), _split_flags(content)
    if mine != theirs or not np.array_equal(keys, others):  # type: ignore[arg-type]  # None equals only None
        raise UserError('--inputs %s: its run held out other images (%s) than %s (%s); average checkpoints of one '
                        'split' % (escape_text(source), _describe_split(theirs, others), escape_text(first_source),
                                   _describe_split(mine, keys)))
    data, before = saved_data(content), saved_data(first)
    found = _data_differences(data, before, 'train.') if data and before else []
    if found:
        log_main('%s: other data than %s: %s' % (escape_text(source), escape_text(first_source),
                                                 '; '.join(each.text for each in found)))


def _describe_split(flags, keys):
    return 'none' if flags is None else '--val_split %.20s --seed %.20s, %s images' % (
        flags + ('unknown' if keys is None else len(keys),))
