"""The README.md of a Hugging Face folder: what the model is, its figures, how it was trained, its classes."""

import json
import os
import re
from typing import Any, Dict

from beit import model_spec, weights
from beit.checkpoint import discovery
from beit.checkpoint.inference_model import LoadedModel
from beit.config import policy_or_none
from beit.errors import escape_text
from beit.files import run_folder

FLAGS = re.findall(r'\w+', '''recipe model input_size batch_size update_freq world_size epochs warmup_epochs opt lr
    min_lr weight_decay layer_decay drop_path smoothing mixup cutmix aa reprob color_jitter loss class_weights model_ema
    model_ema_decay freeze_backbone amp opt_level amp_dtype seed''')  # no paths
NEEDS = {'model_ema_decay': 'model_ema', 'opt_level': 'amp', 'amp_dtype': 'amp'}  # without effect otherwise


def literal(value: Any) -> str:
    """Text for Markdown in which no character has a meaning; a name can hold links and HTML."""
    return re.sub(r'([!-/:-@\[-`{-~])', r'\\\1', escape_text(str(value))[:20000])


def figures(trained: LoadedModel) -> Dict[str, float]:
    """The figures of these weights: of their epoch in the log.txt beside them, else of the best checkpoint itself."""
    folder, name = os.path.split(trained.source)
    finished, steps = discovery.position_in_content(dict(trained.about))
    found = {key[len('test_'):]: value for stats in run_folder.read_log(folder)
             if stats['epoch'] == finished - 1 and not steps for key, value in stats.items() if key.startswith('test_')}
    if not found and name == (discovery.BEST_EMA if trained.is_average else discovery.BEST):
        found = dict(trained.about.get('accuracy') or {})
    return {str(key).replace('ema_', '', 1): value for key, value in found.items()
            if str(key).startswith('ema_') == trained.is_average and type(value) in (int, float)}


def write(trained: LoadedModel) -> bytes:
    """The card: YAML, whose strings are JSON, and Markdown."""
    found, args, name = figures(trained), model_spec.saved_args(trained.about), trained.config.model
    origin = trained.spec.origin
    rows = [('weights at the start', re.split(r'[/\\]', origin['finetune'])[-1] or 'random')] \
        if 'finetune' in origin else []
    rows += [('--' + flag, args[flag]) for flag in FLAGS if args.get(flag) not in (None, '', False) and args.get(
        NEEDS.get(flag, flag)) and not (flag == 'color_jitter' and policy_or_none(args.get('aa')))]
    table = '| | |\n|---|---|\n%s\n'
    return ('\n'.join([
        '---', 'library_name: transformers', 'pipeline_tag: image-classification',
        'tags: [image-classification, vision, beit]',
        'metrics: [accuracy]\nmodel-index:\n- name: %s\n  results:\n  - task: {type: image-classification}\n    '
        'dataset: {type: imagefolder, name: validation images}\n    metrics: [{type: accuracy, value: %.6g}]\n---\n'
        % (json.dumps(name), found['acc1'] / 100) if 'acc1' in found else '---\n',
        '# %s\n' % literal(name),
        'BEiT, for RGB images of %dx%d pixels and %d classes, of which an image has %s%s.\n' % (
            trained.config.input_size, trained.config.input_size, len(trained.classes),
            'any number (sigmoid)' if trained.activation == 'sigmoid' else 'one (softmax)',
            literal(trained.preprocessing.preparation('; '))),
        '## Figures on the validation images\n', table % '\n'.join(
            '| %s | %.6g |' % (literal(key), value) for key, value in found.items()) if found else 'Not known.\n',
        *['The publishers\' accuracy of these weights, %s, on ImageNet-1k: top-1 / top-5 %s %%.\n' % (
            literal(each.name), each.accuracy()) for each in [weights.published(trained.source)] if each and each.acc1],
        *['The outputs are calibrated, with the temperature %s. Loss and calibration error (ece) here are from before '
          'that.\n' % literal(origin.get('temperature'))] * ('temperature' in origin),
        *['## Training with BEiT for PyTorch\n', table % '\n'.join(
            '| %s | %s |' % (literal(key), literal(value)) for key, value in rows)] * bool(rows),
        '## Classes\n', literal(model_spec.shorten_names(trained.classes, 1000)) + '\n'])).encode()
