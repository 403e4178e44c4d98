"""Describes a model: its architecture, preprocessing, classes, loss and origin.

A training run builds one `ModelSpec` from its flags and data. Every checkpoint, average and export holds it;
evaluation, prediction, averaging and export read it from there.
"""

import argparse
import dataclasses
import os
import re
from typing import Any, Dict, Iterable, List, Mapping, Optional, Sequence, Tuple

import modeling_finetune
from beit.config import ModelConfig, TransformConfig, check_input_size
from beit.data import class_folders
from beit.data.transforms import EvalTransform
from beit.errors import UserError, escape_text, unknown_value_error
from beit.paths import project_root

KEY = 'model_spec'  # in a checkpoint, and in the metadata of an export
VERSION = 1


@dataclasses.dataclass(frozen=True)
class ModelSpec:
    """A network's description, complete enough to use its weights."""
    architecture: ModelConfig
    preprocessing: EvalTransform
    classes: Tuple[str, ...]  # the names of the outputs, in order; their numbers where `has_class_names` is false
    has_class_names: bool = True
    loss: str = 'ce'  # softmax, one class an image; or 'bce': sigmoid, each class independently
    multi_label: bool = False  # whether an image can have several classes, or none
    # For people: the program's version, --finetune, averaged files, the temperature of an export's weights.
    origin: Mapping[str, str] = dataclasses.field(default_factory=dict)
    temperature: float = 1.  # of --calibrate; `inference_model.load_state` divides the logits by it
    ema_temperature: float = 1.  # the averaged weights' (EMA)

    @property
    def activation(self) -> str:
        """The function from logits to probabilities."""
        return 'sigmoid' if self.loss == 'bce' else 'softmax'

    def to_dict(self) -> Dict[str, Any]:
        """Plain numbers, strings, lists and dicts, for checkpoints and JSON. Names are escaped to printable text."""
        preprocessing = dict(dataclasses.asdict(self.preprocessing), mean=list(self.preprocessing.mean),
                             std=list(self.preprocessing.std))
        return {'version': VERSION, 'architecture': dataclasses.asdict(self.architecture),
                'preprocessing': preprocessing, 'classes': [escape_text(name) for name in self.classes],
                'has_class_names': self.has_class_names, 'loss': self.loss, 'multi_label': self.multi_label,
                'origin': dict(self.origin),
                **{name: getattr(self, name) for name in TEMPERATURES if getattr(self, name) != 1}}

    @classmethod
    def from_dict(cls, content: Any) -> 'ModelSpec':
        """The inverse of `to_dict`. Raises ValueError, with the reason, for any other content."""
        content = _expect(content, dict, KEY)
        if content.get('version') != VERSION:
            raise ValueError('it has version %.20r, and this program reads version %d'
                             % (content.get('version'), VERSION))
        content = {name: value for name, value in content.items() if name != 'version'}
        content.update(architecture=_dataclass_from(ModelConfig, content.get('architecture')),
                       preprocessing=_dataclass_from(EvalTransform, _expect(content.get('preprocessing'), dict,
                                                                           'preprocessing')),
                       classes=tuple(_names(content.get('classes'))))
        spec = _dataclass_from(cls, content)
        if spec.loss not in ('ce', 'bce') or not all(isinstance(each, str) for each in spec.origin.values()):
            raise ValueError('its loss or origin is invalid')
        if not all(0 < getattr(spec, name) < float('inf') for name in TEMPERATURES):
            raise ValueError('its temperature is invalid')
        spec.preprocessing.check()
        if spec.architecture.in_chans != len(spec.preprocessing.mean):
            raise ValueError('it has %d channels, and a mean of %d'
                             % (spec.architecture.in_chans, len(spec.preprocessing.mean)))
        return spec

    @classmethod
    def from_flags(cls, flags: Mapping[str, Any], classes: Optional[Sequence[str]], outputs: int,
                   **known: Any) -> 'ModelSpec':
        """From a training run's flags, which older checkpoints and the reference's hold; the fields in `known` win.

        `classes` are the names of the `outputs`, None for numbers. Raises ValueError for a value of another type.
        """
        v2 = modeling_finetune.input_statistics(str(flags.get('model')))[0] != modeling_finetune.INPUT_MEAN
        transform = _dataclass_from(TransformConfig, dict({'imagenet_default_mean_and_std': v2},
                                                          **_of_kind(TransformConfig, flags)))
        images = EvalTransform.from_config(transform)
        images.check()
        names = [str(number) for number in range(outputs)] if classes is None else list(classes)
        loss = 'bce' if flags.get('loss') == 'bce' else 'ce'
        return cls(**dict(dict(architecture=_dataclass_from(ModelConfig, _of_kind(ModelConfig, flags)),
                               preprocessing=images, classes=tuple(names),
                               has_class_names=classes is not None, loss=loss), **known))

    @property
    def flags(self) -> Dict[str, Any]:
        """The flags of the architecture and of `EvalTransform.flags`."""
        return dict(dataclasses.asdict(self.architecture), **self.preprocessing.flags)

    def replace(self, **changes: Any) -> 'ModelSpec':
        """A copy with these flags, by name; None changes nothing. Another input size gets the crop of that size."""
        changes = {name: value for name, value in changes.items() if value is not None}
        shape, images = self.architecture, self.preprocessing
        shape, images = dataclasses.replace(shape, **_of_kind(ModelConfig, changes)), images.with_flags(changes)
        if images.crop_mode != self.preprocessing.crop_mode or images.input_size != shape.input_size:
            images = images.at_size(shape.input_size)
        if changes.get('crop_pct') and images.resizes:
            images = dataclasses.replace(images, crop_pct=changes['crop_pct'])
        if 'imagenet_default_mean_and_std' in changes:
            other = EvalTransform.from_config(TransformConfig(
                imagenet_default_mean_and_std=changes['imagenet_default_mean_and_std'], in_chans=len(images.mean)))
            images = dataclasses.replace(images, mean=other.mean, std=other.std)
        loss = changes['loss'] if changes.get('loss') in ('ce', 'bce') else self.loss
        return dataclasses.replace(self, architecture=shape, preprocessing=images, loss=loss)

    def with_class_names(self, names: Sequence[str], where: str) -> 'ModelSpec':
        """A copy with these names. Raises `UserError`, which begins with `where`, if their number differs."""
        if len(names) != len(self.classes):
            raise UserError('%s: it names %d classes, and the model has %d outputs; give one name per output, in order'
                            % (where, len(names), len(self.classes)))
        return dataclasses.replace(self, classes=tuple(names), has_class_names=True)

    def of_average(self) -> 'ModelSpec':
        """The spec of the averaged weights (EMA)."""
        return dataclasses.replace(self, temperature=self.ema_temperature)

    def without_temperature(self) -> 'ModelSpec':
        """The spec of weights that hold the temperature, or that it was not fitted for."""
        return dataclasses.replace(self, temperature=1., ema_temperature=1.)

    def differences(self, other: 'ModelSpec') -> List[str]:
        """The differences from another model that make weights or figures incomparable, as text."""
        rows = [('--' + field.name, getattr(self.architecture, field.name), getattr(other.architecture, field.name))
                for field in dataclasses.fields(ModelConfig) if field.name in SHAPING]
        rows += [('preprocessing: ' + field.name, getattr(self.preprocessing, field.name),
                  getattr(other.preprocessing, field.name)) for field in dataclasses.fields(EvalTransform)
                 if field.name != 'input_size']
        rows += [('loss', self.loss, other.loss)]
        found = ['%s is %.60s (%.60s in the first)' % row for row in rows if row[1] != row[2]]
        if self.has_class_names and other.has_class_names and self.classes != other.classes:
            found.append('classes is %.60s (%.60s in the first)' % (list(self.classes), list(other.classes)))
        return found


TEMPERATURES = ('temperature', 'ema_temperature')
SHAPING = ('model', 'input_size', 'use_mean_pooling', 'rel_pos_bias', 'abs_pos_emb', 'qkv_bias',  # of ModelConfig
           'in_chans')


def check_architecture(model: str, input_size: int) -> None:
    """Raise a `UserError` for an unknown name, or an input size that is no multiple of the patch size."""
    if model not in modeling_finetune.MODELS:
        raise unknown_value_error('--model', model, modeling_finetune.MODELS)
    check_input_size(model, input_size)


# ---- classes, matched by name

def match_classes(spec: ModelSpec, source: str, found: Sequence[str], trains: bool = False) -> Tuple[List[int], str]:
    """(the index of the output for each class that is `found` in the data, in its order; a line to log or '').

    Raises `UserError` where the data has a class that the model does not know or, if it `trains`, lacks one; without
    names, where it has another number of classes.
    """
    shown = '--resume %s' % escape_text(source)
    found = [class_folders.normalize(escape_text(name)) for name in found]
    if spec.has_class_names:
        indices = {class_folders.normalize(name): index for index, name in enumerate(spec.classes)}
        unknown = [name for name in found if name not in indices]
        if unknown:
            raise UserError('%s: the data has classes that the checkpoint does not know: %s; it knows %s; rename the '
                            'folders, or train on these classes with --finetune %s' % (
                                shown, shorten_names(unknown), shorten_names(spec.classes), escape_text(source)))
        missing = [name for name in indices if name not in set(found)] if trains else []
        if missing:
            raise UserError('%s: the data lacks classes of the checkpoint: %s; add them, or train on these classes '
                            'with --finetune %s' % (shown, shorten_names(missing), escape_text(source)))
        return [indices[name] for name in found], ''
    if len(found) != len(spec.classes):
        raise UserError('%s: it has %d outputs without names, and the data has %d classes; name all of its classes, '
                        'in order, with --class_names FILE' % (shown, len(spec.classes), len(found)))
    numbers = [int(name) if re.fullmatch('[0-9]{1,9}', name) else -1 for name in found]
    numeric = sorted(numbers) == list(range(len(found)))
    return numbers if numeric else list(range(len(found))), \
        '%s does not name its classes; they are matched with the data\'s classes by position, %s; name them with ' \
        '--class_names FILE' % (escape_text(source), 'in the order of their numbers' if numeric else 'in sorted order')


def imagenet_wnids(outputs: int, found: Sequence[str] = ('n01440764',)) -> List[str]:
    """ImageNet-1k's 1,000 folder names in the order of published weights' outputs.

    [] for another number of `outputs`, or if most of the classes that are `found` in the data have other names.
    """
    if outputs != 1000 or not found:
        return []
    with open(os.path.join(project_root(), 'beit', 'data', 'imagenet_wnids.txt'), encoding='ascii') as file:
        wnids = file.read().split()
    return wnids if 2 * len(set(found) & set(wnids)) >= len(found) else []  # `match_classes` names the others


def shorten_names(names: Iterable[str], most: int = 6, divider: str = ', ') -> str:
    """The first `most` names, escaped, and the number of the others. Names that hold the divider are in quotes."""
    shown = ['"%s"' % name if divider.strip() in name else name for name in map(escape_text, names)]
    return divider.join(shown[:most] + ['… and %d more' % (len(shown) - most)] * (len(shown) > most))


# ---- reading checkpoints

def saved_args(content: Any) -> Dict[str, Any]:
    """The flags of a checkpoint's run, by name; {} if it holds none."""
    args = content.get('args') if isinstance(content, dict) else None
    args = vars(args) if isinstance(args, argparse.Namespace) else args
    return args if isinstance(args, dict) else {}


def spec_in(content: Any, source: str, outputs: int) -> Optional[ModelSpec]:
    """The spec in a checkpoint, or one built from its flags; None if it holds neither.

    Raises `UserError` if they are damaged, or do not fit the number of `outputs` of its head.
    """
    flags = saved_args(content)
    try:
        if content.get(KEY) is not None:
            spec = ModelSpec.from_dict(content[KEY])
            if len(spec.classes) != outputs:
                raise ValueError('it names %d classes, and the head has %d outputs' % (len(spec.classes), outputs))
            if content.get('classes', list(spec.classes)) != list(spec.classes) or \
                    content.get('activation', spec.activation) != spec.activation:
                raise ValueError('its classes or activation contradict its %s' % KEY)
            return spec
        if 'model' not in flags:
            return None
        names = content.get('classes')
        names = names if isinstance(names, (list, tuple)) and len(names) == outputs \
            and all(isinstance(name, str) for name in names) else None
        sigmoid = content.get('activation') == 'sigmoid' or flags.get('loss') == 'bce'
        return ModelSpec.from_flags(flags, names, outputs, loss='bce' if sigmoid else 'ce',
                                    multi_label=sigmoid and 'mAP' in (content.get('accuracy') or ()))
    except ValueError as error:
        raise UserError('--resume %s: its model description cannot be used (%s); give its weights to --finetune'
                        % (escape_text(source), error)) from None


# ---- reading untrusted values

def _of_kind(kind: Any, values: Mapping[str, Any]) -> Dict[str, Any]:
    names = {field.name for field in dataclasses.fields(kind)}
    return {name: value for name, value in values.items() if name in names}


def _expect(value: Any, kind: type, name: str) -> Any:
    if not isinstance(value, kind):
        raise ValueError('%s is %.40r' % (name, value))
    return value


def _names(value: Any) -> List[str]:
    return [_expect(name, str, 'a class name') for name in _expect(value, list, 'classes')]


def _dataclass_from(kind: Any, values: Any) -> Any:
    """A dataclass of these values, each of the type of its default. Raises ValueError."""
    values, fields = _expect(values, dict, 'a part'), {field.name: field for field in dataclasses.fields(kind)}
    converted = {}
    for name, value in values.items():
        if name not in fields:
            raise ValueError('%.40r is unknown; a newer version wrote it' % (name,))
        default = fields[name].default
        if isinstance(default, tuple) and isinstance(value, (list, tuple)):
            value = tuple(float(_expect(each, (int, float), name)) for each in value)  # type: ignore[arg-type]
        elif type(default) is float and type(value) is int:
            value = float(value)
        elif default is not None and default is not dataclasses.MISSING and type(value) is not type(default):
            raise ValueError('%s is %.40r' % (name, value))
        converted[name] = value
    try:
        return kind(**converted)
    except TypeError as error:
        raise ValueError(str(error)) from None
