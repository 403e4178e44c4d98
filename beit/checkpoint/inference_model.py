"""Builds the network that a checkpoint describes, with its weights.

A checkpoint of this project is enough to use it: evaluation, `run_predict.py` and `run_export.py` need no other flag.
"""

import dataclasses
import json
import os
from typing import Any, Dict, List, Mapping, NamedTuple, Optional, Sequence

import torch
from timm.models import create_model

import modeling_finetune
from beit import model_spec, weights
from beit.checkpoint import discovery, hf_names
from beit.checkpoint.pretrained import DEFAULT_KEYS, adapt_state_dict, find_state_dict, mismatches, refuse_exports
from beit.config import ModelConfig
from beit.data.transforms import EvalTransform
from beit.errors import UserError, escape_text, unknown_value_error
from beit.files import weights_file
from beit.log import log_main
from beit.model_spec import ModelSpec


def build_model(config: ModelConfig, nb_classes: int) -> torch.nn.Module:
    return create_model(
        config.model, pretrained=False, num_classes=nb_classes, img_size=config.input_size, drop_rate=config.drop,
        drop_path_rate=config.drop_path, attn_drop_rate=config.attn_drop_rate, init_scale=config.init_scale,
        use_mean_pooling=config.use_mean_pooling, use_rel_pos_bias=config.rel_pos_bias,
        use_abs_pos_emb=config.abs_pos_emb, init_values=config.layer_scale_init_value, qkv_bias=config.qkv_bias)


class LoadedModel(NamedTuple):
    """A trained network and what is needed to use it."""
    model: Any  # a modeling_finetune.VisionTransformer, in evaluation mode, float32, on the CPU
    spec: ModelSpec
    source: str  # the file

    @property
    def config(self) -> ModelConfig:
        return self.spec.architecture

    @property
    def preprocessing(self) -> EvalTransform:
        return self.spec.preprocessing

    @property
    def classes(self) -> List[str]:
        return list(self.spec.classes)

    @property
    def activation(self) -> str:
        return self.spec.activation


class CheckpointWeights(NamedTuple):
    """A checkpoint that was read: its weights, and what it says of its model."""
    source: str
    content: Dict[str, Any]
    state: Dict[str, torch.Tensor]  # under this project's names
    spec: Any  # a ModelSpec; None where it does not say, and is read for training
    is_bare: bool  # weights that do not say what they are of
    is_resized: bool  # to another input size than they were trained at

    def averaged(self) -> 'CheckpointWeights':
        """The averaged weights (EMA) of the same checkpoint."""
        state = find_state_dict(self.content, '--resume', self.source, use_ema=True)[1]
        return self._replace(state=hf_names.to_native(state)[0])


def load_for_inference(source: str, use_ema: bool = False, class_names: str = '', **given: Any) -> LoadedModel:
    """Build the network that a checkpoint holds; all it needs to know comes from the file.

    Args:
        source (str): a file, an https URL, a published name; a folder, of which the best checkpoint is taken; what
            `run_export.py` wrote as safetensors or for Hugging Face; or, with `model`, other weights of timm and
            Hugging Face.
        use_ema (bool): take the averaged weights.
        class_names (str): a file of names, see `model_spec.read_class_names`.
        given: flags such as `model`, `input_size` and `crop_pct`; they win over the file.

    Raises:
        UserError: the file can't be read, does not say what it is of, or holds other weights than it says.
    """
    refuse_exports('--resume', source)
    if given.get('model') not in (None, *modeling_finetune.MODELS):
        raise unknown_value_error('--model', given['model'], modeling_finetune.MODELS)
    if os.path.isfile(os.path.join(source, hf_names.CONFIG)):
        source = hf_names.hf_weights_path(source, '--resume')
    known = weights.published(source)
    path, content = discovery.load_best_or_latest(source, prefer_best=True, use_ema=use_ema)
    if known:
        given = dict(given, model=given.get('model') or known.model)
    found = read_weights(path, content, use_ema, class_names, **given)
    if known and known.classes == 1000 and not found.spec.has_class_names:
        found = found._replace(spec=found.spec.with_class_names(model_spec.imagenet_wnids(1000), path))
    model = build_model_or_refuse(found)
    load_state(model, found)
    return LoadedModel(model.eval(), found.spec, path)


def read_weights(path: str, content: Any, use_ema: bool = False, class_names: str = '',
                 model_key: str = DEFAULT_KEYS, model_prefix: str = '', defaults: Optional[Mapping[str, Any]] = None,
                 trains: bool = False, **given: Any) -> CheckpointWeights:
    """What a checkpoint holds, for `load_state`. Other arguments and errors as `load_for_inference` has them.

    Args:
        model_key, model_prefix: see `find_state_dict`.
        defaults: flags of weights that do not say what they are of; `given` and the weights' own names win over them.
        trains: it is for a training, whose own flags say what the model is.
    """
    _, state = find_state_dict(content, '--resume', path, model_key, model_prefix, use_ema)
    state = hf_names.to_native(state)[0]
    outputs = len(state['head.weight']) if 'head.weight' in state else 0
    spec = model_spec.spec_in(content, path, outputs) if outputs else None
    is_bare = spec is None
    if trains:
        return CheckpointWeights(path, content, state, spec, is_bare, False)
    if 'patch_embed.proj.weight' not in state:
        raise UserError('--resume %s: these are not the weights of this kind of model: patch_embed.proj.weight is '
                        'missing in the file' % escape_text(path))
    if not outputs:
        raise UserError('--resume %s: it has no head, so it names no class; fine-tune it first' % escape_text(path))
    spec = spec or spec_beside(path, outputs, state, defaults or {}, given)
    if spec is None:
        raise UserError('--resume %s: it does not say which model it is of; give --model, and --input_size where it is '
                        'not 224' % escape_text(path))
    trained_size = spec.architecture.input_size
    spec = tell_changes(spec, given, path)
    if class_names:
        names = model_spec.read_class_names(class_names)
        if spec.has_class_names and list(spec.classes) != names:
            raise UserError('--class_names %s: %s names its classes itself (%s), and these are not the same; leave the '
                            'flag out' % (escape_text(class_names), escape_text(path),
                                          model_spec.shorten_names(spec.classes)))
        spec = spec.with_class_names(names, '--class_names %s' % escape_text(class_names))
    try:
        model_spec.check_architecture(spec.architecture.model, spec.architecture.input_size)
    except UserError as error:
        if given.get('model') or given.get('input_size'):
            raise
        raise UserError('--resume %s: no model can be built of what it says: %s' % (escape_text(path), error)) from None
    return CheckpointWeights(path, content, state, spec, is_bare, spec.architecture.input_size != trained_size)


def tell_changes(spec: ModelSpec, given: Dict[str, Any], path: str) -> ModelSpec:
    """The spec in which flags that were given win; a line names those that differ from what the checkpoint says."""
    changed = spec.replace(**given)
    before = dict(dataclasses.asdict(spec.architecture), crop_pct=spec.preprocessing.crop_pct, loss=spec.loss)
    differ = ['--%s %s (the checkpoint: %s)' % (name, value, before[name]) for name, value in given.items()
              if value is not None and name in before and value != before[name]]
    if 'imagenet_default_mean_and_std' in given and changed.preprocessing.mean != spec.preprocessing.mean:
        differ.append('mean %s (the checkpoint: %s)' % (changed.preprocessing.mean, spec.preprocessing.mean))
    if differ:
        log_main('Given on the command line, and not as in %s: %s' % (escape_text(path), ', '.join(differ)))
    return changed


def build_model_or_refuse(found: CheckpointWeights) -> torch.nn.Module:
    try:
        return build_model(found.spec.architecture, len(found.spec.classes))
    except (ValueError, TypeError, RuntimeError) as error:
        raise UserError('--resume %s: no model can be built of what it says (%s)'
                        % (escape_text(found.source), error)) from None


def load_state(model: torch.nn.Module, found: CheckpointWeights, outputs: Optional[Sequence[int]] = None) -> None:
    """Load a checkpoint's weights; tables are resized to the model's input size, as --finetune does.

    Args:
        outputs: the rows of the head that the model has, in its order; None: all.

    Raises:
        UserError: they are another model's.
    """
    state, shown = dict(found.state), escape_text(found.source)
    if outputs is not None:
        state.update((name, state[name][list(outputs)]) for name in ('head.weight', 'head.bias'))
    if found.is_bare or found.is_resized:
        adapt_state_dict(state, model)
    unused = sorted(set(state) - set(model.state_dict())) if found.is_bare else []  # such as pretraining's mask token
    if unused:
        log_main('Unused names in %s: %s' % (shown, ', '.join(unused[:8])))
    state = {name: value for name, value in state.items() if name not in unused}
    problems = mismatches(state, model.state_dict())
    if problems:
        raise UserError('--resume %s: these are not the weights of this --model %s: %s'
                        % (shown, found.spec.architecture.model, problems))
    model.load_state_dict({name: value for name, value in state.items()
                           if not name.endswith('relative_position_index')}, strict=False)


def spec_beside(path: str, outputs: int, state: Dict[str, torch.Tensor], defaults: Mapping[str, Any],
                given: Mapping[str, Any]) -> Optional[ModelSpec]:
    """The spec of weights that hold none: of an export's metadata, of Hugging Face's files beside, of flags.

    Args:
        defaults, given: flags that yield to what the weights say, and that win over it.

    Raises:
        UserError: the metadata is damaged, or contradicts the files beside it.
    """
    metadata, names, images = weights_file.read_metadata(path), hf_names.hf_labels(path), None
    if model_spec.KEY in metadata:
        try:
            spec = model_spec.spec_in({model_spec.KEY: json.loads(metadata[model_spec.KEY])}, path, outputs)
        except (ValueError, TypeError, RecursionError):
            raise UserError('--resume %s: its metadata is damaged' % escape_text(path)) from None
        _check_beside(path, spec, names)
        return spec
    flags, known = dict(defaults, **_flags_of_weights(state)), {}
    try:
        images = EvalTransform.from_timm(json.loads(metadata['preprocessing']))
        flags.update(model=str(metadata['model']), input_size=images.input_size)
        names = json.loads(metadata['classes'])
    except (LookupError, ValueError, TypeError, RecursionError):
        images = hf_names.hf_preprocessing(path)
        if images is not None:
            flags.update(input_size=images.input_size)
    flags.update((name, value) for name, value in given.items() if value is not None)
    if not flags.get('model'):
        return None
    if images is not None:
        known['preprocessing'] = images
    elif given.get('crop_pct') is None and 'imagenet_default_mean_and_std' not in given:
        log_main('%s does not say how its images are prepared: a mean and deviation of 0.5 and the crop of --help are '
                 'taken' % escape_text(path))
    sigmoid = metadata.get('activation') == 'sigmoid' or hf_names.hf_is_multi_label(path) or flags.get('loss') == 'bce'
    spec = ModelSpec.from_flags(flags, names if names and len(names) == outputs else None, outputs,
                                loss='bce' if sigmoid else 'ce', multi_label=sigmoid, **known)
    if images is not None and flags['input_size'] != images.input_size:
        spec = dataclasses.replace(spec, preprocessing=images.at_size(flags['input_size']))
    return spec


def _check_beside(path, spec, names):
    """Raise a `UserError` where the files of a Hugging Face folder say something else than its weights' header."""
    images, mine = hf_names.hf_preprocessing(path), spec.preprocessing
    differ = [] if images is None else [
        field for field in ('input_size', 'shorter_side', 'interpolation', 'mean', 'std', 'crop_mode')
        if getattr(images, field) != getattr(mine, field)]
    if names and names != list(spec.classes):
        differ.append('classes')
    if differ:
        raise UserError('--resume %s: the header of the weights and the folder\'s JSON files say something else of %s; '
                        'export the model again, or remove what is wrong' % (escape_text(path), ', '.join(differ)))


def _flags_of_weights(state):
    """The flags that a state dict tells: positions, layer scale and pooling of the network, and its input size."""
    size, tables = {}, [value for name, value in state.items() if name.endswith('relative_position_bias_table')]
    patches = len(state['pos_embed'][0]) - 1 if 'pos_embed' in state and state['pos_embed'].dim() == 3 else 0
    grid = (round((len(tables[0]) - 3) ** 0.5) + 1) // 2 if tables and len(tables[0]) > 3 else round(patches ** 0.5)
    if grid and state['patch_embed.proj.weight'].dim() == 4:
        size = {'input_size': grid * state['patch_embed.proj.weight'].shape[-1]}
    return dict(size, rel_pos_bias=any('relative_position_bias_table' in name for name in state),
                abs_pos_emb='pos_embed' in state, qkv_bias='blocks.0.attn.q_bias' in state,
                use_mean_pooling='fc_norm.weight' in state,
                layer_scale_init_value=0.1 if 'blocks.0.gamma_1' in state else 0.)  # its start
