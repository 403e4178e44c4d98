"""Builds the network that flags or a checkpoint describe, with its classes and evaluation transform.

A checkpoint of this project is enough to use it: `run_predict.py` and `run_export.py` need no other flag.
"""

import dataclasses
import json
import os
from typing import Any, List, NamedTuple

import torch
from timm.models import create_model

import modeling_finetune
from beit.checkpoint import discovery, hf_names, training_state
from beit.checkpoint.pretrained import adapt_state_dict, mismatches, refuse_exports, strip_prefixes, unwrap_state_dict
from beit.config import ModelConfig, TransformConfig
from beit.data.transforms import EvalTransform
from beit.errors import UserError, escape_text, unknown_value_error
from beit.files import weights_file
from beit.log import log_main


def build_model(config: ModelConfig, nb_classes: int) -> torch.nn.Module:
    return create_model(
        config.model, pretrained=False, num_classes=nb_classes, img_size=config.input_size, drop_rate=config.drop,
        drop_path_rate=config.drop_path, attn_drop_rate=config.attn_drop_rate, init_scale=config.init_scale,
        use_mean_pooling=config.use_mean_pooling, use_rel_pos_bias=config.rel_pos_bias,
        use_abs_pos_emb=config.abs_pos_emb, init_values=config.layer_scale_init_value)


class LoadedModel(NamedTuple):
    """A trained network and what is needed to use it."""
    model: Any  # a modeling_finetune.VisionTransformer, in evaluation mode, float32, on the CPU
    classes: List[str]  # one per output; numbers where the checkpoint does not name them
    preprocessing: EvalTransform
    config: ModelConfig
    source: str  # the file
    activation: str = 'softmax'  # what makes probabilities of its outputs; or sigmoid, each class for itself


def load_for_inference(source: str, use_ema: bool = False, **given: Any) -> LoadedModel:
    """Build the network that a checkpoint holds; all it needs to know comes from the file.

    Args:
        source (str): a file, an https URL or a folder, of which the best checkpoint is taken; what `run_export.py`
            wrote as safetensors or for Hugging Face; or other weights of timm and Hugging Face, where `model` is given.
        use_ema (bool): take the averaged weights.
        given: flags that the file does not tell, such as `model` for a file of weights only; they win over the file.

    Raises:
        UserError: the file can't be read, does not say what it is of, or holds other weights than it says.
    """
    refuse_exports('--resume', source)
    if os.path.isfile(os.path.join(source, hf_names.CONFIG)):
        source = hf_names.hf_weights_path(source, '--resume')
    path, content = discovery.load_best_or_latest(source, prefer_best=True, use_ema=use_ema)
    if not isinstance(content, dict):
        raise UserError('--resume %s: holds no weights' % escape_text(path))
    settings, metadata = training_state.saved_args(content), content
    foreign = 'model' not in settings
    if foreign:
        metadata = _metadata_beside(path)
        settings = metadata.get('args', {})
    if 'model' not in settings and not given.get('model'):
        raise UserError('--resume %s: it does not say which model it is of; give --model, and --input_size where it is '
                        'not 224' % escape_text(path))
    if use_ema and not content.get('model_ema'):
        raise UserError('--resume %s holds no averaged weights (it was trained without --model_ema)'
                        % escape_text(path))
    state = content['model_ema'] if use_ema else unwrap_state_dict(content, 'model|module|state_dict')[1]
    state = hf_names.to_native(strip_prefixes(state))[0]
    if foreign:
        settings = dict(settings, **_flags_of_weights(state))
    settings = dict(settings, **{name: value for name, value in given.items() if value is not None})
    config = _config_from(settings, ModelConfig)
    if config.model not in modeling_finetune.MODELS:
        raise unknown_value_error('--model', config.model, modeling_finetune.MODELS)
    if 'head.weight' not in state:
        raise UserError('--resume %s: it has no head, so it names no class; fine-tune it first' % escape_text(path))
    nb_classes = len(state['head.weight'])
    try:
        model = build_model(config, nb_classes)
    except (ValueError, TypeError, RuntimeError) as error:
        raise UserError('--resume %s: no model can be built of what it says (%s)'
                        % (escape_text(path), error)) from None
    if foreign:
        adapt_state_dict(state, model)  # one table for all blocks; another --input_size
        unused = sorted(set(state) - set(model.state_dict()))  # such as the mask token of pretraining
        if unused:
            log_main('Unused names in %s: %s' % (escape_text(path), ', '.join(unused[:8])))
        state = {name: value for name, value in state.items() if name not in unused}
    problems = mismatches(state, model.state_dict())
    if problems:
        raise UserError('--resume %s: these are not the weights of --model %s: %s'
                        % (escape_text(path), config.model, problems))
    model.load_state_dict({name: value for name, value in state.items()
                           if not name.endswith('relative_position_index')}, strict=False)
    preprocessing = EvalTransform.from_config(_config_from(settings, TransformConfig))
    return LoadedModel(
        model.eval(), _classes(metadata, nb_classes), preprocessing, config, path,
        'sigmoid' if metadata.get('activation') == 'sigmoid' else 'softmax')


def _config_from(settings, kind):
    """The fields of a dataclass among a checkpoint's flags; the others have their defaults."""
    return kind(**{field.name: settings[field.name] for field in dataclasses.fields(kind) if field.name in settings})


def _metadata_beside(path):
    """{args, classes, activation}, as a checkpoint has them, of what stands beside bare weights; {} where nothing does.

    Of `run_export.py` that is the metadata of a safetensors file, of others the labels in Hugging Face's config.json.
    """
    metadata = weights_file.read_metadata(path)
    try:
        images = EvalTransform.from_timm(json.loads(metadata['preprocessing']))
        args = dict(model=str(metadata['model']), input_size=images.input_size, crop_pct=images.crop_pct,
                    imagenet_default_mean_and_std=images.is_imagenet_normalized)
        return dict(args=args, classes=json.loads(metadata['classes']), activation=metadata['activation'])
    except (LookupError, ValueError, TypeError, RecursionError):
        names = hf_names.hf_labels(path)
        return dict(classes=names) if names else {}


def _flags_of_weights(state):
    """The flags that the names of a state dict tell: which positions, layer scale and pooling the network has."""
    return dict(rel_pos_bias=any(name.endswith('relative_position_bias_table') for name in state),
                abs_pos_emb='pos_embed' in state, use_mean_pooling='fc_norm.weight' in state,
                layer_scale_init_value=0.1 if 'blocks.0.gamma_1' in state else 0.)  # its start


def _classes(content, nb_classes):
    """The names inside a checkpoint, or numbers."""
    names = content.get('classes')
    if isinstance(names, (list, tuple)) and len(names) == nb_classes and all(isinstance(name, str) for name in names):
        return list(names)
    return [str(number) for number in range(nb_classes)]
