"""Evaluation, prediction, averages and exports need no flag of the training and give the same figures.

Each draw is a random configuration: architecture, preprocessing, class names, split, loss. It trains two updates. Plain
PyTorch, Pillow and NumPy compute its figures from the checkpoint alone. The training run, and every program on the
checkpoint, its average and its export, must give the same figures. Then one thing changes, and a message must name it.
"""

import hashlib
import json
import os
import random
import shutil

import numpy as np
import pytest
import torch
from PIL import Image, ImageColor, ImageOps

import average_checkpoints
import modeling_finetune
import run_class_finetuning
import run_export
import run_predict
from helpers import lines_of, needs_extra, photo

pytestmark = pytest.mark.current_only
DRAWS, CHUNKS = (5000 if os.environ.get('BEIT_SOAK') else 200), 20
NAMES = ['cat', 'dog', 'Cat', 'n01440764', '0', '1', '2', '10', 'ros\u00e9', 'two words', 'semi;colon', 'comma,name',
         '\u540d\u524d', 'x' * 60]
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
        self.channels = rng.choice((1, 3, 3, 3, 4))
        self.flags += ['--in_chans=%d' % self.channels] * (self.channels != 3)
        self.flags += self.some('--exif=follow', *(['--background=white', '--background=9,200,30']
                                                   if self.channels != 4 else []))
        fit = rng.choice(('crop', 'squash', 'letterbox')) if self.size > 32 else 'crop'
        self.flags += ['--eval_fit=' + fit] * (fit != 'crop' or rng.random() < 0.3)
        self.flags += ['--crop_pct=0.8'] * (self.size > 32 and fit == 'crop' and rng.random() < 0.5)
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
                    alpha = np.arange(image[..., :1].size, dtype=np.uint8).reshape(image[..., :1].shape)
                    image, exif = np.concatenate([image, alpha], 2) if index % 3 == 1 else image, Image.Exif()
                    exif[0x0112] = self.rng.randint(1, 8)
                    Image.fromarray(image).save(os.path.join(where, '%d.png' % index), exif=exif)


def run(capsys, program, *flags):
    """(status, output and errors) of a program, in this process."""
    status = program.run(list(flags))
    captured = capsys.readouterr()
    return status, captured.out + captured.err


# ---- the same figures by other code

def prepare(path, images, flip=False):
    """The network's input for a file, (1, 3, size, size), by Pillow and NumPy."""
    with Image.open(path) as file:
        image = ImageOps.exif_transpose(file) if images['exif'] == 'followed' else file.copy()
    if images['transparency'] != 'dropped' and image.mode == 'RGBA':
        colour = images['transparency'] if images['transparency'] == 'white' else 'rgb(%s)' % images['transparency']
        below = Image.new('RGBA', image.size, ImageColor.getrgb(colour))
        below.alpha_composite(image)
        image = below
    mode = {1: 'L', 3: 'RGB', 4: 'RGBA'}[len(images['mean'])]
    image = image.convert(mode)
    size = images['input_size']
    if size > 32 and images['crop_mode'] == 'squash':
        image = image.resize((size, size), Image.BICUBIC)
    elif size > 32 and images['crop_mode'] == 'border':
        ratio = size / max(image.size)
        small = image.resize([round(side * ratio) for side in image.size], Image.BICUBIC)
        image = Image.new(mode, (size, size), tuple(round(255 * value) for value in images['mean']))
        image.paste(small, ((size - small.width) // 2, (size - small.height) // 2))
    elif size > 32:
        side = int(size / images['crop_pct'])
        width, height = image.size
        small = (side, int(side * height / width)) if width <= height else (int(side * width / height), side)
        image = image.resize(small, {'bicubic': Image.BICUBIC}[images['interpolation']])
        left, top = int(round((small[0] - size) / 2.)), int(round((small[1] - size) / 2.))
        image = image.crop((left, top, left + size, top + size))
    pixels = np.asarray(image, np.float64).reshape(size, size, -1) / 255
    pixels = (pixels - images['mean']) / images['std']
    if flip:
        pixels = pixels[:, ::-1].copy()
    return torch.from_numpy(pixels.transpose(2, 0, 1)[None]).float()


class Reference:
    """A checkpoint's network in plain PyTorch, built from the file alone."""

    def __init__(self, path, key='model'):
        content = torch.load(path, map_location='cpu', weights_only=True)
        spec, shape = content['model_spec'], content['model_spec']['architecture']
        self.spec, self.images = spec, spec['preprocessing']
        self.model = getattr(modeling_finetune, shape['model'])(
            img_size=shape['input_size'], num_classes=len(spec['classes']), use_mean_pooling=shape['use_mean_pooling'],
            use_rel_pos_bias=shape['rel_pos_bias'], use_abs_pos_emb=shape['abs_pos_emb'],
            init_values=shape['layer_scale_init_value'], in_chans=shape['in_chans'])
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

    @torch.no_grad()
    def predicted(self, path):
        """Probabilities, float64 (classes,), as in prediction: without the mirrored image."""
        logits = self.model(prepare(path, self.images))[0]
        return (logits.sigmoid() if self.spec['loss'] == 'bce' else logits.softmax(-1)).numpy()


def evaluated_files(draw, checkpoint):
    """{path: class} of the evaluated images: val/, or the images whose hashed names the checkpoint lists."""
    part = 'train' if draw.split else 'val'
    found = {os.path.join(draw.data, part, name, each): name for name in draw.classes
             for each in sorted(os.listdir(os.path.join(draw.data, part, name)))}
    if draw.split:
        kept = set(torch.load(checkpoint, weights_only=True)['data']['held_out'].tolist())
        hashed = {path: hashlib.blake2b('/'.join(path.split(os.sep)[-2:]).encode(), digest_size=8).digest()
                  for path in found}
        found = {path: name for path, name in found.items()
                 if int.from_bytes(hashed[path], 'little', signed=True) in kept}
        assert len(found) == len(kept)
    return found


def evaluate(draw, capsys, source, *flags):
    """(top-1, loss) in --results_file of each evaluated network, without flags except the data's location."""
    where = os.path.join(draw.folder, 'rows.json')
    status, text = run(capsys, run_class_finetuning, '--eval', '--resume', source, '--data_path', draw.data,
                       '--num_workers=0', '--results_file', where, *flags)
    assert status == 0, text
    with open(where, encoding='utf-8') as file:
        return [(row['acc1'], row['loss']) for row in json.load(file)], text


# ---- a draw

def check_figures(draw, best, capsys):
    """The figures of the training, of --eval and of independent code."""
    files, logged = evaluated_files(draw, best), lines_of(draw.output)[-1]
    rows, text = evaluate(draw, capsys, best)
    assert 'Flags that differ' not in text and 'by position' not in text
    assert rows == [(logged[name + 'acc1'], logged[name + 'loss'])  # to the last digit
                    for name in ('test_', 'test_ema_')[:1 + ('--model_ema' in draw.flags)]]
    for key, row in zip(('model', 'model_ema'), rows):
        accuracy, loss = Reference(best, key).figures(files)
        assert row[0] == pytest.approx(accuracy, abs=1e-9) and row[1] == pytest.approx(loss, rel=2e-5)
    return files, rows


def check_prediction(draw, source, files, reference, capsys):
    where = os.path.join(draw.folder, 'predicted.json')
    status, text = run(capsys, run_predict, '--resume', source, '--output', where, '--top_k=2', '--num_workers=0',
                       *sorted(files))
    assert status == 0, text
    with open(where, encoding='utf-8') as file:
        rows = json.load(file)
    assert len(rows) == len(files)
    for row in rows:
        expected = reference.predicted(row['file'])
        for found in row['predictions']:
            place = reference.spec['classes'].index(found['class'])
            assert found['probability'] == pytest.approx(float(expected[place]), abs=2e-5)
        assert row['predictions'][0]['probability'] == pytest.approx(float(expected.max()), abs=2e-5)


def check_average_and_export(draw, best, rows, capsys):
    """An average of two copies and an export have the figures of the checkpoint, without any flag."""
    copy, average = os.path.join(draw.folder, 'copy.pth'), os.path.join(draw.folder, 'average.pth')
    shutil.copy(best, copy)
    status, text = run(capsys, average_checkpoints, '--inputs', best, copy, '--output', average)
    assert status == 0, text
    exported = os.path.join(draw.folder, 'out.safetensors')
    status, text = run(capsys, run_export, '--resume', best, '--format=safetensors', '--output', exported, '--no_check')
    assert status == 0, text
    flags = [flag for flag in draw.flags if flag.startswith(('--val_split', '--seed')) or flag == '--test_flip']
    for source, given in ((average, []), (exported, flags)):  # an export describes the model, not its training
        assert evaluate(draw, capsys, source, *given)[0][0] == rows[0], source
    return exported


def check_resuming(draw, capsys):
    status, text = run(capsys, run_class_finetuning, *draw.flags, '--maxstep=2', '--resume', draw.output)
    assert status == 0 and 'exactly as if it had not been stopped' in text, text


# ---- one thing changed

def changed_class_name(draw, best, capsys):
    part = os.path.join(draw.data, 'train' if draw.split else 'val')
    os.rename(os.path.join(part, draw.classes[0]), os.path.join(part, 'unheard of'))
    status, text = run(capsys, run_class_finetuning, '--eval', '--resume', best, '--data_path', draw.data)
    assert status == 2 and 'unheard of' in text and '--finetune' in text, text


def changed_preprocessing(draw, best, capsys):
    given = {flag.partition('=')[0] for flag in draw.flags}
    changes = (('--background=', 'transparency dropped'), ('--exif=ignore', 'exif ignored'),
               ('--eval_fit=crop', 'crop_mode center'))
    flag, says = next((change for change in changes if change[0].partition('=')[0] in given - set(draw.flags)
                       and change[0] not in draw.flags),
                      ('--crop_pct=0.5', 'crop_pct 0.5') if draw.size > 32 else
                      ('--imagenet_default_mean_and_std', 'mean'))
    if flag in draw.flags:
        flag = '--no_imagenet_default_mean_and_std'
    _, text = evaluate(draw, capsys, best, flag)
    assert 'Flags that differ' in text and says in text, text


def changed_images(draw, best, capsys):
    path = os.path.join(draw.data, 'train', draw.classes[0], '0.png')
    photo(77, *((32, 32) if draw.size == 32 else (80, 90))).save(path)
    status, text = run(capsys, run_class_finetuning, *draw.flags, '--maxstep=2', '--resume', draw.output)
    assert 'exactly' not in text and 'of the same names' in text, text


def changed_labels(draw, best, capsys):
    first, second = (os.path.join(draw.data, 'train', name) for name in draw.classes[:2])
    os.rename(os.path.join(first, '0.png'), os.path.join(second, 'moved.png'))
    status, text = run(capsys, run_class_finetuning, *draw.flags, '--maxstep=2', '--resume', draw.output)
    named = 'training images: ' if draw.split else 'training images: other files, by their names'  # it was held out
    assert 'exactly' not in text and named in text, text


def changed_batch(draw, best, capsys):
    status, text = run(capsys, run_class_finetuning, *draw.flags, '--maxstep=2', '--batch_size=2', '--update_freq=2',
                       '--resume', draw.output)
    assert 'exactly' not in text and '--batch_size: 2 (was 4)' in text, text


def changed_average(draw, best, capsys):
    content = torch.load(best, weights_only=True)
    content['model_spec']['classes'] = content['classes'] = content['classes'][::-1]
    other = os.path.join(draw.folder, 'other.pth')
    torch.save(content, other)
    status, text = run(capsys, average_checkpoints, '--inputs', best, other, '--output',
                       os.path.join(draw.folder, 'x.pth'))
    assert status == 2 and 'classes is' in text, text


CHANGES = (changed_class_name, changed_preprocessing, changed_images, changed_labels, changed_batch, changed_average)


def check(number, folder, capsys):
    draw = Draw(number, folder)
    status, text = run(capsys, run_class_finetuning, *draw.flags, '--maxstep=2')
    assert status == 0, text
    best = os.path.join(draw.output, 'checkpoint-best.pth')
    files, rows = check_figures(draw, best, capsys)
    exported = check_average_and_export(draw, best, rows, capsys)
    check_prediction(draw, exported if number % 2 else best, files, Reference(best), capsys)
    check_resuming(draw, capsys)
    CHANGES[number % len(CHANGES)](draw, best, capsys)


@pytest.mark.parametrize('chunk', range(CHUNKS))
@needs_extra('safetensors')
def test_one_truth(chunk, tmp_path, capsys):
    numbers = range(chunk, DRAWS, CHUNKS)
    for number in numbers:
        folder = tmp_path / str(number)
        folder.mkdir()
        try:
            check(number, folder, capsys)
        except Exception as error:
            raise AssertionError('draw %d: %s' % (number, error)) from error
        shutil.rmtree(str(folder))
    with capsys.disabled():
        print('\n%d draws agree (%d of %d)' % (len(numbers), chunk + 1, CHUNKS), end='')
