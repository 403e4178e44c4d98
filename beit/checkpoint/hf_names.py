"""How other libraries name these weights: one table, read in both directions.

timm's BEiT and the reference's have this project's own names. Hugging Face's `BeitForImageClassification` has others,
and keeps query, key and value apart.
"""

import json
import os
import re
from typing import Dict, Iterable, List, Optional, Tuple

import torch

from beit.data.transforms import EvalTransform
from beit.errors import UserError, escape_text
from beit.weights import HUB_FILES

CONFIG, PREPROCESSOR = HUB_FILES[:2]  # what a Hugging Face folder holds
WEIGHTS = HUB_FILES[2:]

_BLOCK, _LAYER = 'blocks.{n}.', 'beit.encoder.layer.{n}.'
_QUERY, _KEY, _VALUE = (_LAYER + 'attention.attention.' + part for part in ('query.', 'key.', 'value.'))
# This project's name, and Hugging Face's as its files have it. A pair that ends in a dot stands for all that begins so;
# three names are those of the parts, one below the other.
HUGGING_FACE = (
    ('cls_token', 'beit.embeddings.cls_token'),
    ('pos_embed', 'beit.embeddings.position_embeddings'),
    ('patch_embed.proj.', 'beit.embeddings.patch_embeddings.projection.'),
    ('rel_pos_bias.', 'beit.encoder.relative_position_bias.'),
    (_BLOCK + 'gamma_1', _LAYER + 'lambda_1'),
    (_BLOCK + 'gamma_2', _LAYER + 'lambda_2'),
    (_BLOCK + 'norm1.', _LAYER + 'layernorm_before.'),
    (_BLOCK + 'norm2.', _LAYER + 'layernorm_after.'),
    (_BLOCK + 'attn.qkv.weight', (_QUERY + 'weight', _KEY + 'weight', _VALUE + 'weight')),
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
# Names inside a model of transformers 5, which its files do not have unless they were written with torch.save.
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
    """`name` with `pattern` at its beginning changed to `target`, or None where it does not match."""
    escaped = re.escape(pattern).replace(re.escape('{n}'), r'(\d+)')
    found = re.match(escaped + (r'(.*)\Z' if pattern[-1] in '._' else r'()\Z'), name)
    if found is None:
        return None
    return (target.format(n=found.group(1)) if '{n}' in pattern else target) + found.group(found.lastindex)


def _first(name, pairs):
    for pattern, target in pairs:
        renamed = _rename(name, pattern, target)
        if renamed is not None:
            return renamed
    return None


_PARTS = [(ours, theirs) for ours, theirs in HUGGING_FACE if isinstance(theirs, tuple)]
_PAIRS = [(ours, theirs) for ours, theirs in HUGGING_FACE if not isinstance(theirs, tuple)]


def to_hugging_face(state: Dict[str, torch.Tensor]) -> Dict[str, torch.Tensor]:
    """A state dict of this project under Hugging Face's names; the tensors are views, but for those cut in parts.

    Raises:
        KeyError: a weight has no name there. Indices of bias tables are left out, since both sides compute them.
    """
    renamed = {}
    for name, value in state.items():
        if name.endswith('relative_position_index'):
            continue
        for ours, theirs in _PARTS:
            if _rename(name, ours, '') is not None:
                for part, piece in zip(theirs, value.chunk(len(theirs))):
                    renamed[_rename(name, ours, part)] = piece.contiguous()
                break
        else:
            other = _first(name, _PAIRS)
            if other is None:
                raise KeyError(name)
            renamed[other] = value
    return renamed


def has_hf_names(names: Iterable[str]) -> bool:
    """Whether these are the names of a BEiT of transformers, with or without a head."""
    return any(re.match(r'(beit\.)?embeddings\.(cls_token|patch_embeddings\.)', name) for name in names)


def to_native(state: Dict[str, torch.Tensor]) -> Tuple[Dict[str, torch.Tensor], str]:
    """A state dict under this project's names, whichever library it comes from, and that library's name or ''.

    What has no name here stays as it is, so that it can be reported.
    """
    if not has_hf_names(state):
        return state, ''
    if not any(name.startswith('beit.') for name in state):  # of BeitModel, which the others have inside
        state = {name if name.startswith(('classifier.', 'lm_head.')) else 'beit.' + name: value
                 for name, value in state.items()}
    for pattern, older in _SINCE_5:
        state = {re.sub(pattern, older, name): value for name, value in state.items()}
    renamed: Dict[str, torch.Tensor] = {}
    parts: Dict[str, Dict[int, Tuple[str, torch.Tensor]]] = {}
    backwards = [(theirs, ours) for ours, theirs in _PAIRS]
    for name, value in state.items():
        for ours, theirs in _PARTS:
            places = [place for place, part in enumerate(theirs) if _rename(name, part, '') is not None]
            if places:
                whole = _rename(name, theirs[places[0]], ours)
                parts.setdefault(whole, {})[places[0]] = (name, value)
                break
        else:
            renamed[_first(name, backwards) or name] = value
    for whole, pieces in parts.items():
        shapes = {tuple(value.shape) for _, value in pieces.values()}
        if len(pieces) == 3 and len(shapes) == 1 and () not in shapes:
            renamed[whole] = torch.cat([pieces[place][1] for place in range(3)])
        else:  # it will be reported as missing, and these as what the file has instead
            renamed.update(pieces.values())
    return renamed, 'Hugging Face'


def hf_weights_path(folder: str, flag: str) -> str:
    """The weights file of a Hugging Face folder.

    Raises:
        UserError: it holds none, or its config.json is another model's.
    """
    name = '%s %s' % (flag, escape_text(folder))
    config = os.path.join(folder, CONFIG)
    found = [os.path.join(folder, each) for each in WEIGHTS if os.path.isfile(os.path.join(folder, each))]
    if not found or not os.path.isfile(config):
        raise UserError('%s: a folder without %s, so not one of Hugging Face\'s; give a file' % (
            name, CONFIG if found else ' or '.join(WEIGHTS)))
    try:
        with open(config, encoding='utf-8') as file:
            content = json.loads(file.read(1 << 24))
        kind = content['model_type'] if 'model_type' in content else content['architecture']  # the second is timm's
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        raise UserError('%s: its %s cannot be read; fetch or copy it again' % (name, CONFIG)) from None
    if kind != 'beit' and not re.match(r'beit(v2)?_(base|large)_', str(kind)):
        raise UserError('%s: its %s says model_type %s; only beit fits' % (name, CONFIG, escape_text(str(kind))[:40]))
    return found[0]


def hf_labels(path: str) -> List[str]:
    """The class names, in order, of the config.json beside a Hugging Face folder's weights; [] where it has none.

    LABEL_0, LABEL_1 … are what transformers writes where nobody named them.
    """
    try:
        names = _read_beside(path, CONFIG)['id2label']
        names = [names[str(label)] for label in range(len(names))]
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return []
    return [] if names == ['LABEL_%d' % label for label in range(len(names))] else names


def hf_is_multi_label(path: str) -> bool:
    """Whether the config.json beside the weights says that an image may be of several classes."""
    try:
        return _read_beside(path, CONFIG).get('problem_type') == 'multi_label_classification'
    except (OSError, ValueError, AttributeError, RecursionError):
        return False


def hf_preprocessing(path: str) -> Optional[EvalTransform]:
    """What the preprocessor_config.json beside a Hugging Face folder's weights says; None where there is none.

    Raises:
        UserError: it says what this program does not compute.
    """
    where = os.path.join(os.path.dirname(path), PREPROCESSOR)
    if os.path.basename(path) not in WEIGHTS or not os.path.isfile(where):
        return None
    try:
        found = _read_beside(path, PREPROCESSOR)
        crops = found.get('do_center_crop', False)
        side, crop = (_side(found.get(name), name) for name in ('size', 'crop_size'))
        if not found.get('do_resize', True) or not found.get('do_normalize', True) or (
                abs(found.get('rescale_factor', 1 / 255) * 255 - 1) > 1e-6):
            raise ValueError('images are not resized, or not scaled and normalised as usual')
        squashes = not isinstance(found['size'], dict) or 'shortest_edge' not in found['size']
        if squashes and crops and crop != side:  # resized to a square, of which the centre is cut
            raise ValueError('a square of %d is cropped to %d' % (side, crop))
        if not squashes and not crops:
            raise ValueError('images are not cropped to a square')
        share = 1.0 if squashes else crop / side
        if not squashes and int(crop / share) != side:  # rounding
            share = crop / (side + 0.5)
        mean, std = (tuple(map(float, found[name])) for name in ('image_mean', 'image_std'))
        made = EvalTransform(
            side if squashes else crop, share,
            {1: 'lanczos', 2: 'bilinear', 3: 'bicubic'}.get(found.get('resample', 3), 'another one'), mean, std,
            'squash' if squashes else 'center')
        made.check()
        return made
    except (OSError, ValueError, LookupError, TypeError, ZeroDivisionError, RecursionError) as error:
        raise UserError('%s: it cannot be followed (%s); take the file away and give --input_size, --crop_pct'
                        % (escape_text(where), escape_text(str(error))[:200])) from None


def _side(size, name):
    """Pixels a side, of a number or of a dict of height and width or shortest_edge."""
    if size is None:
        return 0
    sides = set(size.values()) if isinstance(size, dict) else {size}
    if len(sides) != 1 or type(next(iter(sides))) is not int:
        raise ValueError('%s is %.80r' % (name, size))
    return sides.pop()


def _read_beside(path, name):
    if os.path.basename(path) not in WEIGHTS:
        return {}
    with open(os.path.join(os.path.dirname(path), name), encoding='utf-8') as file:
        return json.loads(file.read(1 << 24))
