"""Whatever a model was trained with, evaluation, prediction, averages and exports need no flag and agree with it.

Each draw is a configuration by chance: architecture, preprocessing, class names, split, loss. It trains two updates; its
figures are then computed by plain PyTorch, Pillow and NumPy, of what the checkpoint says alone, and compared with the
training run's, and with what every program gives for the checkpoint, its average and its export. One thing is changed
afterwards, and must be named.
"""

import csv
import json
import os
import random
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

import average_checkpoints
import modeling_finetune
import run_class_finetuning
import run_export
import run_predict
from helpers import lines_of, needs_extra, photo

DRAWS, CHUNKS = (5000 if os.environ.get('BEIT_SOAK') else 200), 20
NAMES = ['cat', 'dog', 'Cat', 'n01440764', '0', '1', '2', '10', 'rosé', 'two words', 'semi;colon', 'comma,name', '名前', 'x' * 60]
NANO = ['--no_curves', '--model=beit_nano_patch8_32', '--num_workers=0', '--device=cpu', '--warmup_epochs=0',
        '--batch_size=4', '--aa=none', '--lr=1e-3', '--init_scale=1', '--epochs=2']


class Draw:
    """One configuration: its data in a folder, and the flags of its training."""

    def __init__(self, number, folder):
        rng = self.rng = random.Random(number)
        self.folder, self.output = str(folder), os.path.join(str(folder), 'out')
        self.size = rng.choice((32, 32, 40, 48))
        self.classes = rng.sample(NAMES, rng.randint(2, 5))
        self.split = rng.choice((0., 0., 0.3))
        self.data = os.path.join(self.folder, 'data')
        self.write_images()
        self.flags = NANO + ['--data_path', self.data, '--input_size=%d' % self.size, '--output_dir', self.output,
                             '--seed=%d' % rng.randint(0, 9)]
        self.flags += self.some('--use_cls', '--imagenet_default_mean_and_std', '--loss=bce', '--model_ema',
                                '--test_flip', '--layer_scale_init_value=0')
        self.flags += rng.choice(([], ['--abs_pos_emb'], ['--abs_pos_emb', '--disable_rel_pos_bias']))
        self.flags += ['--crop_pct=0.8'] * (self.size > 32 and rng.random() < 0.5)
        self.flags += ['--val_split=%g' % self.split] * bool(self.split)

    def some(self, *flags):
        return [flag for flag in flags if self.rng.random() < 0.4]

    def write_images(self):
        for part, count in (('train', 6), ('val', 3)):
            if part == 'val' and self.split:
                continue
            for label, name in enumerate(self.classes):
                where = os.path.join(self.data, part, name)
                os.makedirs(where)
                for index in range(count):
                    shape = (32, 32) if self.size == 32 else (self.rng.choice((50, 60, 71)), self.rng.choice((50, 64)))
                    image = np.asarray(photo(1000 * (part == 'val') + 10 * label + index, *shape)) // 2
                    image[..., label % 3] += 40 * (1 + label % 4)
                    Image.fromarray(image).save(os.path.join(where, '%d.png' % index))


def run(capsys, program, *flags):
    """(status, output and errors) of a program, in this process."""
    status = program.run(list(flags))
    captured = capsys.readouterr()
    return status, captured.out + captured.err


# ---- the same figures by other code

def prepare(path, images, flip=False):
    """What the network sees of a file: (1, 3, size, size), by Pillow and NumPy."""
    with Image.open(path) as file:
        image = file.convert('RGB')
    size = images['input_size']
    if size > 32:
        side = int(size / images['crop_pct'])
        width, height = image.size
        small = (side, int(side * height / width)) if width <= height else (int(side * width / height), side)
        image = image.resize(small, {'bicubic': Image.BICUBIC}[images['interpolation']])
        left, top = int(round((small[0] - size) / 2.)), int(round((small[1] - size) / 2.))
        image = image.crop((left, top, left + size, top + size))
    pixels = (np.asarray(image, np.float64) / 255 - images['mean']) / images['std']
    if flip:
        pixels = pixels[:, ::-1].copy()
    return torch.from_numpy(pixels.transpose(2, 0, 1)[None]).float()


class Reference:
    """A checkpoint's network in plain PyTorch, of what the file says alone."""

    def __init__(self, path, key='model'):
        content = torch.load(path, map_location='cpu', weights_only=True)
        spec, shape = content['model_spec'], content['model_spec']['architecture']
        self.spec, self.images = spec, spec['preprocessing']
        sizes = {name: modeling_finetune.MODELS[shape['model']][name]
                 for name in ('patch_size', 'embed_dim', 'depth', 'num_heads', 'mlp_ratio')
                 if name in modeling_finetune.MODELS[shape['model']]}
        self.model = getattr(modeling_finetune, shape['model'])(
            img_size=shape['input_size'], num_classes=len(spec['classes']), use_mean_pooling=shape['use_mean_pooling'],
            use_rel_pos_bias=shape['rel_pos_bias'], use_abs_pos_emb=shape['abs_pos_emb'],
            init_values=shape['layer_scale_init_value'])
        assert sizes
        self.model.load_state_dict(content[key], strict=False)
        self.model.eval()
        self.test_flip = content['args']['test_flip']

    @torch.no_grad()
    def logits(self, path):
        found = self.model(prepare(path, self.images))[0]
        return (found + self.model(prepare(path, self.images, flip=True))[0]) / 2 if self.test_flip else found

    def figures(self, files):
        """(top-1 in percent, mean loss) of {path: class name}."""
        right, losses = 0, []
        for path, name in files.items():
            logits, label = self.logits(path), self.spec['classes'].index(name)
            right += int(logits.argmax()) == label
            if self.spec['loss'] == 'bce':
                target = torch.zeros_like(logits)
                target[label] = 1.
                losses.append(torch.nn.functional.binary_cross_entropy_with_logits(logits, target).item())
            else:
                losses.append(-logits.log_softmax(-1)[label].item())
        return 100. * right / len(files), float(np.mean(losses))

    def probabilities(self, path):
        logits = self.logits(path)
        return (logits.sigmoid() if self.spec['loss'] == 'bce' else logits.softmax(-1)).numpy()


def evaluated_files(draw, checkpoint):
    """{path: class} of the images that the run evaluated."""
    found = {}
    for part in ('val', 'train'):
        for name in draw.classes:
            folder = os.path.join(draw.data, part, name)
            for each in sorted(os.listdir(folder)) if os.path.isdir(folder) else ():
                found[os.path.join(folder, each)] = name
        if found:
            return found


def evaluate(draw, capsys, source, *flags):
    """The row of --results_file for a checkpoint, with no flag but where the data is; or (status, output)."""
    where = os.path.join(draw.folder, 'row.json')
    status, text = run(capsys, run_class_finetuning, '--eval', '--resume', source, '--data_path', draw.data,
                       '--num_workers=0', '--results_file', where, *flags)
    if status:
        return status, text
    with open(where, encoding='utf-8') as file:
        return json.load(file)['model'] if 'model' in json.load(open(where, encoding='utf-8')) else json.load(file)


# ---- a draw

def check(number, folder, capsys):
    draw = Draw(number, folder)
    status, text = run(capsys, run_class_finetuning, *draw.flags, '--maxstep=2')
    assert status == 0, text
    best = os.path.join(draw.output, 'checkpoint-best.pth')
    return draw, best


@pytest.mark.parametrize('chunk', range(CHUNKS))
@needs_extra('safetensors')
def test_one_truth(chunk, tmp_path, capsys):
    for number in range(chunk, DRAWS, CHUNKS):
        folder = tmp_path / str(number)
        folder.mkdir()
        check(number, folder, capsys)
        shutil.rmtree(str(folder))
