"""Builds the network that a checkpoint describes, for evaluation, `run_predict.py` and `run_export.py`."""

import dataclasses
import json
from typing import Any, Dict, Mapping, NamedTuple, Optional

import torch
from timm.models import create_model

from beit import model_spec, weights
from beit.checkpoint import discovery, exported, hf_names, sources
from beit.checkpoint.pretrained import DEFAULT_KEYS, adapt_state_dict, find_state_dict, mismatches
from beit.config import ModelConfig
from beit.data.transforms import EvalTransform
from beit.errors import UserError, escape_text
from beit.files import weights_file
from beit.files.class_files import read_class_names
from beit.log import log_main, pluralize
from beit.model_spec import ModelSpec

PROBED = 'one classifier per layer, of run_linear_eval.py; give its --finetune'


def build_model(config: ModelConfig, nb_classes: int) -> torch.nn.Module:
    return create_model(
        config.model, pretrained=False, num_classes=nb_classes, img_size=config.input_size, drop_rate=config.drop,
        drop_path_rate=config.drop_path, attn_drop_rate=config.attn_drop_rate, init_scale=config.init_scale,
        use_mean_pooling=config.use_mean_pooling, use_rel_pos_bias=config.rel_pos_bias,
        use_abs_pos_emb=config.abs_pos_emb, init_values=config.layer_scale_init_value, qkv_bias=config.qkv_bias,
        in_chans=config.in_chans)


@dataclasses.dataclass(frozen=True)
class LoadedModel:
    """A trained network with its description."""
    model: Any  # a modeling_finetune.VisionTransformer or ExportedModel, in evaluation mode, float32, on the CPU
    spec: ModelSpec
    source: str  # the file
    about: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # a checkpoint's epoch, accuracy and args
    is_average: bool = False  # the averaged weights (EMA)

    config = property(lambda self: self.spec.architecture)
    preprocessing = property(lambda self: self.spec.preprocessing)
    classes = property(lambda self: list(self.spec.classes))
    activation = property(lambda self: self.spec.activation)


class CheckpointWeights(NamedTuple):
    """The weights in a checkpoint, with the description of their model."""
    source: str
    content: Dict[str, Any]
    state: Dict[str, torch.Tensor]  # under this project's names
    spec: Any  # a ModelSpec; None if a training resumes from weights without one
    has_no_spec: bool  # `spec` comes from flags or files beside the weights
    is_resized: bool  # the input size differs from that of the training
    program: Optional[exported.ExportedModel] = None  # in place of weights

    def averaged(self) -> 'CheckpointWeights':
        """The averaged weights (EMA) of the same checkpoint."""
        state = find_state_dict(self.content, '--resume', self.source, use_ema=True)[1]
        return self._replace(state=hf_names.to_native(state)[0], spec=self.spec.of_average())


def load_for_inference(source: str, use_ema: bool = False, class_names: str = '', needs_head: bool = True,
                       **overrides: Any) -> LoadedModel:
    """Build the network of a checkpoint and load its weights.

    Args:
        source: a file, an https URL, a published name, or a folder, whose best checkpoint is loaded; an export of
            `run_export.py`; or other weights of timm and Hugging Face, with `model`.
        use_ema: use the averaged weights.
        class_names: a file, see `class_files.read_class_names`.
        needs_head: refuse weights without a classification head; else their model gives features.
        overrides: flags such as `model`, `input_size` and `crop_pct`, which take precedence over the file.

    Raises:
        UserError: the file can't be read, does not describe its model, or its weights contradict the description.
    """
    if overrides.get('model') is not None:
        model_spec.check_architecture(overrides['model'], 0)  # the name, before a download
    known = weights.published(source)
    path, content = discovery.load_best_or_latest(source, prefer_best=True, use_ema=use_ema)
    found = read_weights(path, content, use_ema, class_names, needs_head=needs_head, **overrides)
    wnids = model_spec.imagenet_wnids(len(found.spec.classes)) if known and not found.spec.has_class_names else []
    if wnids:
        found = found._replace(spec=found.spec.with_class_names(wnids, path))
    if found.program is not None:
        return LoadedModel(found.program, found.spec, path)
    try:
        model = build_model(found.spec.architecture, len(found.spec.classes))
    except (ValueError, TypeError, RuntimeError) as error:
        raise UserError('--resume %s: its description fits no model (%s)' % (escape_text(path), error)) from None
    load_state(model, found)
    spec = found.spec.without_temperature()
    if found.spec.temperature != 1:
        spec = dataclasses.replace(spec, origin=dict(spec.origin, temperature='%g' % found.spec.temperature))
    about = {name: content[name] for name in ('epoch', 'progress', 'accuracy', 'args') if name in content}
    return LoadedModel(model.eval(), spec, path, about, use_ema)


def read_weights(path: str, content: Any, use_ema: bool = False, class_names: str = '',
                 model_key: str = DEFAULT_KEYS, model_prefix: str = '', defaults: Optional[Mapping[str, Any]] = None,
                 trains: bool = False, needs_head: bool = True, **overrides: Any) -> CheckpointWeights:
    """The weights in a checkpoint, for `load_state`. Other arguments and errors: see `load_for_inference`.

    `defaults` are flags for weights without a description; `overrides` and the weights take precedence. If it `trains`,
    the flags of the resumed training describe the model.
    """
    program = content.get(exported.KEY) if isinstance(content, dict) else None
    if isinstance(program, exported.ExportedModel):
        return _read_program(path, content, program, use_ema, class_names, overrides)
    _, state = find_state_dict(content, '--resume', path, model_key, model_prefix, use_ema)
    state = hf_names.to_native(state)[0]
    head = 'head.0.weight' if trains and 'head.0.weight' in state else 'head.weight'  # of a linear probe
    outputs = len(state[head]) if head in state else 0
    spec = model_spec.spec_in(content, path, outputs) if outputs else None
    has_no_spec = spec is None
    if trains:
        return CheckpointWeights(path, content, state, spec, has_no_spec, False)
    if 'patch_embed.proj.weight' not in state:
        raise UserError('--resume %s: no weights of a BEiT: the file has no patch_embed.proj.weight; give another file'
                        % escape_text(path))
    if needs_head and not outputs:
        raise UserError('--resume %s: it has %s' % (escape_text(path), 'no classification head; fine-tune it first' if
            'head.0.weight' not in state else PROBED))
    spec = spec or spec_beside(path, outputs, state, defaults or {}, overrides)
    if spec is None:
        raise UserError('--resume %s: the file does not name its model; give --model, and --input_size if it is not '
                        '224' % escape_text(path))
    spec = spec.of_average() if use_ema else spec
    trained_size = spec.architecture.input_size
    spec = override_spec(spec, overrides, path, class_names)
    try:
        model_spec.check_architecture(spec.architecture.model, spec.architecture.input_size)
    except UserError as error:
        if overrides.get('model') or overrides.get('input_size'):
            raise
        raise UserError('--resume %s: its description fits no model: %s' % (escape_text(path), error)) from None
    return CheckpointWeights(path, content, state, spec, has_no_spec, spec.architecture.input_size != trained_size)


def _read_program(path, content, program, use_ema, class_names, overrides):
    """The `CheckpointWeights` of an exported program."""
    if use_ema:
        raise UserError('%s is an exported program, without averaged weights; leave --use_ema out' % escape_text(path))
    known: Any = model_spec.spec_in(content, path, len(content[model_spec.KEY]['classes']))
    spec = override_spec(known, overrides, path, class_names)
    for name in model_spec.SHAPING:
        if getattr(spec.architecture, name) != getattr(known.architecture, name):
            raise UserError('--%s %s: %s is an exported program, which computes with %s; leave the flag out' % (
                name, getattr(spec.architecture, name), escape_text(path), getattr(known.architecture, name)))
    return CheckpointWeights(path, content, {}, spec, False, False, program)


def override_spec(spec: ModelSpec, overrides: Dict[str, Any], path: str, class_names: str = '') -> ModelSpec:
    """The spec with the flags of the command line; a line names the flags that differ from the checkpoint's."""
    changed = spec.replace(**overrides)
    try:
        changed.preprocessing.check()
    except ValueError as error:  # from `beit.load`; the programs have checked their flags
        raise UserError('%s: %s is not supported; correct the option' % (escape_text(path), error)) from None
    if len(changed.preprocessing.mean) == 4 and changed.preprocessing.transparency != 'dropped':
        raise UserError('--background %s: %s keeps the alpha channel as its fourth; leave it out' % (
            changed.preprocessing.transparency, escape_text(path)))
    if overrides.get('crop_pct') and changed.preprocessing.crop_mode != 'center':
        raise UserError('--crop_pct %g: %s has the --eval_fit %s, which crops nothing; leave it out' % (
            overrides['crop_pct'], escape_text(path), changed.preprocessing.crop_mode))
    if changed.architecture.in_chans != len(changed.preprocessing.mean):
        raise UserError('--in_chans %d: %s prepares images of %s; leave it out' % (
            changed.architecture.in_chans, escape_text(path), pluralize(len(changed.preprocessing.mean), 'channel')))
    before = dict(dataclasses.asdict(spec.architecture), crop_pct=spec.preprocessing.crop_pct, loss=spec.loss)
    rows = [('--' + name, value, before[name]) for name, value in overrides.items()
            if value is not None and name in before]
    rows += [(name, getattr(changed.preprocessing, name), getattr(spec.preprocessing, name))
             for name in ('mean', 'exif', 'transparency', 'crop_mode')]
    differ = ['%s %s (the checkpoint: %s)' % row for row in rows if row[1] != row[2]]
    if differ:
        log_main('Flags that differ from %s: %s' % (escape_text(path), ', '.join(differ)))
    if not class_names:
        return changed
    names = read_class_names(class_names)
    if spec.has_class_names and list(spec.classes) != names:
        raise UserError('--class_names %s: %s has other class names (%s); leave the flag out' % (
            escape_text(class_names), escape_text(path), model_spec.shorten_names(spec.classes)))
    return changed.with_class_names(names, '--class_names %s' % escape_text(class_names))


def load_state(model: torch.nn.Module, found: CheckpointWeights, quiet: bool = False) -> None:
    """Load a checkpoint's weights; tables are resized to the model's input size, as --finetune does.

    The weights of the head are divided by the checkpoint's temperature: every user of the network gets calibrated
    logits. `quiet` logs nothing: the same was logged for other weights of the file. Raises a `UserError` for weights of
    another model.
    """
    state, shown = dict(found.state), escape_text(found.source)
    if found.spec.temperature != 1:
        state.update((name, state[name] / found.spec.temperature) for name in ('head.weight', 'head.bias'))
    if found.has_no_spec or found.is_resized:
        adapt_state_dict(state, model, quiet)
    unused = sorted(set(state) - set(model.state_dict())) if found.has_no_spec else []  # such as a mask token
    if unused and not quiet:
        log_main('Unused names in %s: %s' % (shown, model_spec.shorten_names(unused)))
    state = {name: value for name, value in state.items() if name not in unused}
    problems = mismatches(state, model.state_dict())
    if problems:
        raise UserError('--resume %s: these are not the weights of this --model %s: %s'
                        % (shown, found.spec.architecture.model, problems))
    model.load_state_dict({name: value for name, value in state.items()
                           if not name.endswith('relative_position_index')}, strict=False)


def spec_beside(path: str, outputs: int, state: Dict[str, torch.Tensor], defaults: Mapping[str, Any],
                overrides: Mapping[str, Any]) -> Optional[ModelSpec]:
    """A spec from metadata, Hugging Face's files beside the weights, a published name, or flags; None without a model.

    `defaults` and `overrides` are flags of lower and of higher precedence than the weights and their files. Raises a
    `UserError` for metadata that is damaged, or contradicts the files beside it.
    """
    metadata, names, images = weights_file.read_metadata(path), hf_names.hf_labels(path), None
    if model_spec.KEY in metadata:
        try:
            spec = model_spec.spec_in({model_spec.KEY: json.loads(metadata[model_spec.KEY])}, path, outputs)
        except (ValueError, TypeError, RecursionError):
            raise UserError('--resume %s: its metadata is damaged' % escape_text(path)) from None
        _check_beside(path, spec, names)
        return spec
    published = weights.published(path)
    facts = published.flags if published else {}
    flags = {**facts, **defaults, **_flags_of_weights(state)}
    try:
        images = EvalTransform.from_timm(json.loads(metadata['preprocessing']))
        flags['model'] = str(metadata['model'])
        names = json.loads(metadata['classes'])
    except (LookupError, ValueError, TypeError, RecursionError):
        images = hf_names.hf_preprocessing(path)
    if images is not None:
        flags['input_size'] = images.input_size
    flags.update((name, value) for name, value in overrides.items() if value is not None and name not in facts)
    if not flags.get('model'):
        return None
    sigmoid = metadata.get('activation') == 'sigmoid' or flags.get('loss') == 'bce' or (
        sources.hf_config(path).get('problem_type') == 'multi_label_classification')
    spec = ModelSpec.from_flags(flags, names if names and len(names) == outputs else None, outputs,
                                loss='bce' if sigmoid else 'ce', multi_label=sigmoid)
    if images is not None:
        images = images if images.input_size == flags['input_size'] else images.at_size(flags['input_size'])
        return dataclasses.replace(spec, preprocessing=images)
    if not facts and overrides.get('crop_pct') is None and 'imagenet_default_mean_and_std' not in overrides:
        log_main('%s does not describe its preprocessing; using %s and the default --crop_pct' % (
            escape_text(path), 'a mean and deviation of 0.5' if set(spec.preprocessing.mean) == {0.5} else
            "ImageNet's mean and deviation"))
    return spec


def _check_beside(path, spec, names):
    """Raise a `UserError` where the JSON files of a Hugging Face folder contradict the header of its weights."""
    images, mine = hf_names.hf_preprocessing(path), spec.preprocessing
    differ = [] if images is None else [
        field for field in ('input_size', 'shorter_side', 'interpolation', 'mean', 'std', 'crop_mode')
        if getattr(images, field) != getattr(mine, field)]
    if names and names != list(spec.classes):
        differ.append('classes')
    if differ:
        raise UserError('--resume %s: the header of the weights and the folder\'s JSON files differ in %s; export the '
                        'model again, or remove the wrong file' % (escape_text(path), ', '.join(differ)))


def _flags_of_weights(state):
    """The flags for positions, layer scale, pooling and input size that a state dict implies."""
    first, size = state['patch_embed.proj.weight'], {}
    tables = [value for name, value in state.items() if name.endswith('relative_position_bias_table')]
    patches = len(state['pos_embed'][0]) - 1 if 'pos_embed' in state and state['pos_embed'].dim() == 3 else 0
    grid = (round((len(tables[0]) - 3) ** 0.5) + 1) // 2 if tables and len(tables[0]) > 3 else round(patches ** 0.5)
    if grid and first.dim() == 4:
        size = dict(input_size=grid * first.shape[-1], in_chans=first.shape[1])
    return dict(size, rel_pos_bias=bool(tables), abs_pos_emb='pos_embed' in state,
                qkv_bias='blocks.0.attn.q_bias' in state, use_mean_pooling='fc_norm.weight' in state,
                layer_scale_init_value=0.1 if 'blocks.0.gamma_1' in state else 0.)  # its start
