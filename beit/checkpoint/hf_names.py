"""Translates between this project's weight names and Hugging Face's, with one table for both directions.

timm's BEiT and the reference's use this project's names. Hugging Face's `BeitForImageClassification` uses others, and
separate weights for query, key and value.
"""

import os
import re
from typing import Dict, List, Optional, Tuple

import torch

from beit.checkpoint.sources import hf_config, read_beside
from beit.data.transforms import EvalTransform
from beit.errors import UserError, escape_text
from beit.weights import HUB_FILES


_BLOCK, _LAYER = 'blocks.{n}.', 'beit.encoder.layer.{n}.'
_QUERY, _KEY, _VALUE = (_LAYER + 'attention.attention.' + part for part in ('query.', 'key.', 'value.'))
# Hugging Face's names of the parts of `_QKV`, concatenated along the first dimension.
_QKV, _PARTS = _BLOCK + 'attn.qkv.weight', (_QUERY + 'weight', _KEY + 'weight', _VALUE + 'weight')
# This project's name of other weights, and Hugging Face's. Names that end in a dot or underscore are prefixes.
HUGGING_FACE = (
    ('cls_token', 'beit.embeddings.cls_token'),
    ('pos_embed', 'beit.embeddings.position_embeddings'),
    ('patch_embed.proj.', 'beit.embeddings.patch_embeddings.projection.'),
    ('rel_pos_bias.', 'beit.encoder.relative_position_bias.'),
    (_BLOCK + 'gamma_1', _LAYER + 'lambda_1'),
    (_BLOCK + 'gamma_2', _LAYER + 'lambda_2'),
    (_BLOCK + 'norm1.', _LAYER + 'layernorm_before.'),
    (_BLOCK + 'norm2.', _LAYER + 'layernorm_after.'),
    (_BLOCK + 'attn.q_bias', _QUERY + 'bias'),
    (_BLOCK + 'attn.v_bias', _VALUE + 'bias'),
    (_BLOCK + 'attn.relative_position_', _LAYER + 'attention.attention.relative_position_bias.relative_position_'),
    (_BLOCK + 'attn.proj.', _LAYER + 'attention.output.dense.'),
    (_BLOCK + 'mlp.fc1.', _LAYER + 'intermediate.dense.'),
    (_BLOCK + 'mlp.fc2.', _LAYER + 'output.dense.'),
    ('norm.', 'beit.layernorm.'),
    ('fc_norm.', 'beit.pooler.layernorm.'),
    ('head.', 'classifier.'),
)
# Names inside a model of transformers 5; its files have them only if torch.save wrote them.
_SINCE_5 = (
    (r'^beit\.shared_position_bias\.', 'beit.encoder.relative_position_bias.'),
    (r'^beit\.layers\.', 'beit.encoder.layer.'),
    (r'^(beit\.encoder\.layer\.\d+\.)relative_position_bias\.', r'\1attention.attention.relative_position_bias.'),
    (r'\.attention\.q_proj\.', '.attention.attention.query.'),
    (r'\.attention\.k_proj\.', '.attention.attention.key.'),
    (r'\.attention\.v_proj\.', '.attention.attention.value.'),
    (r'\.attention\.o_proj\.', '.attention.output.dense.'),
    (r'\.mlp\.fc1\.', '.intermediate.dense.'),
    (r'\.mlp\.fc2\.', '.output.dense.'),
)


def _rename(name, pattern, target):
    """`name` with the prefix `pattern` replaced by `target`, or None if it does not match."""
    escaped = re.escape(pattern).replace(re.escape('{n}'), r'(\d+)')
    found = re.match(escaped + (r'(.*)\Z' if pattern[-1] in '._' else r'()\Z'), name)
    if found is None:
        return None
    return (target.format(n=found.group(1)) if '{n}' in pattern else target) + found.group(found.lastindex)


def _first(name, pairs):
    return next(filter(None, (_rename(name, pattern, target) for pattern, target in pairs)), None)


def to_hugging_face(state: Dict[str, torch.Tensor]) -> Dict[str, torch.Tensor]:
    """A state dict of this project under Hugging Face's names, without the indices of bias tables, which it computes.

    Raises KeyError for a weight that has no name there.
    """
    renamed = {}
    for name, value in state.items():
        if name.endswith('relative_position_index'):
            continue
        if _rename(name, _QKV, _QKV):
            for part, piece in zip(_PARTS, value.chunk(3)):
                renamed[_rename(name, _QKV, part)] = piece.contiguous()
            continue
        other = _first(name, HUGGING_FACE)
        if other is None:
            raise KeyError(name)
        renamed[other] = value
    return renamed


def to_native(state: Dict[str, torch.Tensor]) -> Tuple[Dict[str, torch.Tensor], str]:
    """A state dict of any library under this project's names, and that library's name or ''. Unknown names stay."""
    if not any(re.match(r'(beit\.)?embeddings\.(cls_token|patch_embeddings\.)', name) for name in state):
        return state, ''
    if not any(name.startswith('beit.') for name in state):  # a plain BeitModel, without the prefix
        state = {name if name.startswith(('classifier.', 'lm_head.')) else 'beit.' + name: value
                 for name, value in state.items()}
    for pattern, older in _SINCE_5:
        state = {re.sub(pattern, older, name): value for name, value in state.items()}
    renamed: Dict[str, torch.Tensor] = {}
    backwards = [(theirs, ours) for ours, theirs in HUGGING_FACE]
    for name, value in state.items():
        renamed[_first(name, backwards) or name] = value
    wholes = dict.fromkeys(_first(name, [(part, _QKV) for part in _PARTS]) for name in state)
    for whole in filter(None, wholes):
        names = [_rename(whole, _QKV, part) for part in _PARTS]
        shapes = {tuple(state[name].shape) if name in state else () for name in names}
        if len(shapes) == 1 and () not in shapes:  # else the caller reports the whole as missing, the parts as unused
            renamed[whole] = torch.cat([renamed.pop(name) for name in names])
    return renamed, 'Hugging Face'


def hf_labels(path: str) -> List[str]:
    """The class names, in order, in the config.json beside Hugging Face's weights; [] if it has none.

    Names LABEL_0, LABEL_1 … do not count: transformers writes them by default.
    """
    names = hf_config(path).get('id2label')
    names = [names.get(str(label)) for label in range(len(names))] if isinstance(names, dict) else []
    return [] if None in names or names == ['LABEL_%d' % label for label in range(len(names))] else names


def hf_preprocessing(path: str) -> Optional[EvalTransform]:
    """The transform in the preprocessor_config.json beside Hugging Face's weights; None without that file.

    Raises a `UserError` if it is damaged, or asks for steps that this program does not have.
    """
    config = os.path.join(os.path.dirname(path), HUB_FILES[1])
    if os.path.basename(path) not in HUB_FILES[2:] or not os.path.isfile(config):
        return None
    try:
        found = read_beside(path, HUB_FILES[1])
        crops = found.get('do_center_crop', False)
        side, crop = (_side(found.get(name), name) for name in ('size', 'crop_size'))
        if not found.get('do_resize', True) or not found.get('do_normalize', True) or (
                abs(found.get('rescale_factor', 1 / 255) * 255 - 1) > 1e-6):
            raise ValueError('images are not resized, scaled or normalised as usual')
        squashes = not isinstance(found['size'], dict) or 'shortest_edge' not in found['size']
        if (crops and crop != side) if squashes else not crops:
            raise ValueError('%.80r is %s' % (found['size'], 'cropped to %d' % crop if crops else 'not made a square'))
        crop_pct = 1.0 if squashes else crop / side
        if not squashes and int(crop / crop_pct) != side:  # rounding
            crop_pct = crop / (side + 0.5)
        mean, std = (tuple(map(float, found[name])) for name in ('image_mean', 'image_std'))
        transform = EvalTransform(
            side if squashes else crop, crop_pct,
            {1: 'lanczos', 2: 'bilinear', 3: 'bicubic'}.get(found.get('resample', 3), 'unknown'), mean, std,
            'squash' if squashes else 'center')
        transform.check()
        return transform
    except (OSError, ValueError, LookupError, TypeError, ZeroDivisionError, RecursionError) as error:
        raise UserError('%s: unsupported (%s); remove the file and give --input_size, --crop_pct'
                        % (escape_text(config), escape_text(str(error))[:200])) from None


def _side(size, name):
    """Pixels a side, from a number or a dict of height and width or shortest_edge."""
    if size is None:
        return 0
    sides = set(size.values()) if isinstance(size, dict) else {size}
    if len(sides) != 1 or type(next(iter(sides))) is not int:
        raise ValueError('%s is %.80r' % (name, size))
    return sides.pop()
