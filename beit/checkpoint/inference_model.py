"""Builds the network that flags describe, or that a checkpoint tells of, with its classes and how images are prepared.

What a checkpoint of this project holds is enough to use it: `run_predict.py` and `run_export.py` need no other flag.
"""

import argparse
import json
import os
import typing

import torch
from timm.models import create_model

import modeling_finetune
from beit import config, log
from beit.checkpoint import discovery, hf_names, training_state
from beit.checkpoint.pretrained import adapt_state_dict, mismatches, refuse_exports, strip_prefixes, unwrap_state_dict
from beit.data.transforms import EvalTransform
from beit.errors import UserError, escape_text, unknown_value_error
from beit.files import weights_file


def build_model(args, nb_classes):
    return create_model(
        args.model, pretrained=False, num_classes=nb_classes, img_size=args.input_size, drop_rate=args.drop,
        drop_path_rate=args.drop_path, attn_drop_rate=args.attn_drop_rate, use_mean_pooling=args.use_mean_pooling,
        init_scale=args.init_scale, use_rel_pos_bias=args.rel_pos_bias, use_abs_pos_emb=args.abs_pos_emb,
        init_values=args.layer_scale_init_value)


class LoadedModel(typing.NamedTuple):
    """A trained network and what is needed to use it."""
    model: torch.nn.Module  # in evaluation mode, float32, on the CPU
    classes: list  # of str, one per output; numbers where the checkpoint does not name them
    preprocessing: EvalTransform
    args: argparse.Namespace  # ModelConfig's and TransformConfig's fields, with the checkpoint's values
    source: str  # the file
    activation: str = 'softmax'  # what makes probabilities of its outputs; or sigmoid, each class for itself


def load_for_inference(source, use_ema=False, **given):
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
    path, content = discovery.load_best_or_latest(source, prefer_best=True)
    if not isinstance(content, dict):
        raise UserError('--resume %s: holds no weights' % escape_text(path))
    told, about = training_state.saved_args(content), content
    foreign = 'model' not in told
    if foreign:
        about = _described(path)
        told = about.get('args', {})
    if 'model' not in told and not given.get('model'):
        raise UserError('--resume %s: it does not say which model it is of; give --model, and --input_size where it is '
                        'not 224' % escape_text(path))
    if use_ema and not content.get('model_ema'):
        raise UserError('--resume %s holds no averaged weights (it was trained without --model_ema)'
                        % escape_text(path))
    state = content['model_ema'] if use_ema else unwrap_state_dict(content, 'model|module|state_dict')[1]
    state = hf_names.to_native(strip_prefixes(state))[0]
    args = _default_settings()
    if foreign:
        told = dict(told, **_flags_of_weights(state))
    vars(args).update({name: value for name, value in told.items() if hasattr(args, name)})
    vars(args).update({name: value for name, value in given.items() if value is not None})
    if args.model not in modeling_finetune.MODELS:
        raise unknown_value_error('--model', args.model, modeling_finetune.MODELS)
    if 'head.weight' not in state:
        raise UserError('--resume %s: it has no head, so it names no class; fine-tune it first' % escape_text(path))
    nb_classes = len(state['head.weight'])
    try:
        model = build_model(args, nb_classes)
    except (ValueError, TypeError, RuntimeError) as error:
        raise UserError('--resume %s: no model can be built of what it says (%s)'
                        % (escape_text(path), error)) from None
    if foreign:
        adapt_state_dict(state, model)  # one table for all blocks; another --input_size
        unused = sorted(set(state) - set(model.state_dict()))  # such as the mask token of pretraining
        if unused:
            log.log_main('Unused names in %s: %s' % (escape_text(path), ', '.join(unused[:8])))
        state = {name: value for name, value in state.items() if name not in unused}
    problems = mismatches(state, model.state_dict())
    if problems:
        raise UserError('--resume %s: these are not the weights of --model %s: %s'
                        % (escape_text(path), args.model, problems))
    model.load_state_dict({name: value for name, value in state.items()
                           if not name.endswith('relative_position_index')}, strict=False)
    return LoadedModel(model.eval(), _classes(about, nb_classes), EvalTransform.from_config(args), args, path,
                   'sigmoid' if about.get('activation') == 'sigmoid' else 'softmax')


def _default_settings():
    """The settings that a checkpoint's flags are laid over, as a Namespace."""
    return argparse.Namespace(**dict(vars(config.ModelConfig()), **vars(config.TransformConfig())))


def _described(path):
    """{args, classes, activation}, as a checkpoint has them, of what stands beside bare weights; {} where nothing does.

    Of `run_export.py` that is the metadata of a safetensors file, of others the labels in Hugging Face's config.json.
    """
    about = weights_file.read_metadata(path)
    try:
        images = EvalTransform.from_timm(json.loads(about['preprocessing']))
        args = dict(model=str(about['model']), input_size=images.input_size, crop_pct=images.crop_pct,
                    imagenet_default_mean_and_std=images.is_imagenet_normalized)
        return dict(args=args, classes=json.loads(about['classes']), activation=about['activation'])
    except (LookupError, ValueError, TypeError, RecursionError):
        names = hf_names.hf_labels(path)
        return dict(classes=names) if names else {}


def _flags_of_weights(state):
    """The flags that the names of a state dict tell: which positions, layer scale and pooling the network has."""
    return dict(rel_pos_bias=any(name.endswith('relative_position_bias_table') for name in state),
                abs_pos_emb='pos_embed' in state, use_mean_pooling='fc_norm.weight' in state,
                layer_scale_init_value=0.1 if 'blocks.0.gamma_1' in state else 0.,)  # a start, which is loaded over


def _classes(content, nb_classes):
    """The names inside a checkpoint, or numbers."""
    names = content.get('classes')
    if isinstance(names, (list, tuple)) and len(names) == nb_classes and all(isinstance(name, str) for name in names):
        return list(names)
    return [str(number) for number in range(nb_classes)]
