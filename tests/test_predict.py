"""run_predict.py: probabilities against timm and Pillow, attention against slow loops, files, streams, mistakes."""

import collections
import csv
import io
import itertools
import json
import math
import os
import pathlib
import re
import signal
import stat
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from PIL import Image

import modeling_finetune
import run_class_finetuning
import run_export
import run_predict
from beit import load
from beit.checkpoint.inference_model import build_model
from beit.data import prediction_inputs
from beit.errors import UserError
from beit.files import weights_file
from beit.outputs import attention_maps, prediction_writers
from helpers import NANO, ROOT, free_port, photo

try:
    from timm.models import beit
except ImportError:
    beit = None

CLASSES = ['cat', 'dog', 'a "quoted", name', '猫', 'e', 'f', 'g', 'h', 'i', 'j']


def make_checkpoint(path, *flags, classes=CLASSES, ema=False, **more):
    """Write a checkpoint of the nano model whose random weights tell images apart. Returns the model."""
    args = run_class_finetuning.build_parser().parse_args(['--model=beit_nano_patch8_32'] + list(flags))
    torch.manual_seed(3)

    def random_model():
        model = build_model(args, len(classes)).eval()
        for name, parameter in model.named_parameters():
            if 'relative_position_bias_table' in name or 'qkv.weight' in name:
                torch.nn.init.normal_(parameter, std=0.6)
            if name.startswith('head.weight'):
                torch.nn.init.normal_(parameter, std=0.15)
        return model

    model, average = random_model(), random_model()
    content = dict(more, model=model.state_dict(), args=vars(args), epoch=0, classes=list(classes))
    weights_file.save(str(path), dict(content, model_ema=average.state_dict()) if ema else content)
    return average if ema else model


@pytest.fixture
def small(tmp_path):
    """(checkpoint of a model for 32x32, the model)."""
    path = tmp_path / 'small.pth'
    return str(path), make_checkpoint(path, '--input_size=32')


@pytest.fixture
def large(tmp_path):
    """The same for 48x48, which resizes images."""
    path = tmp_path / 'large.pth'
    return str(path), make_checkpoint(path, '--input_size=48')


@pytest.fixture
def photos(tmp_path):
    """A folder of five photos of several sizes and formats, at several depths."""
    root = tmp_path / 'photos'
    (root / 'b' / 'deep').mkdir(parents=True)
    for index, name in enumerate(['a.jpg', 'z.png', 'b/c.JPG', 'b/deep/d.webp', 'b/e.png']):
        photo(index, 90 + 7 * index, 70 + 3 * index).save(str(root / name))
    (root / 'notes.txt').write_text('no image')
    (root / '.hidden.png').write_text('no image')
    return str(root)


def predict(*flags):
    return run_predict.run(['--num_workers=0', '--device=cpu'] + list(map(str, flags)))


def rows(path):
    with open(str(path), encoding='utf-8', newline='') as file:
        return list(csv.DictReader(file))


def by_hand(path, size, resized):
    """The input of a model for size x size, float32 (1, 3, size, size), by Pillow and arithmetic alone."""
    image = Image.open(path).convert('RGB')
    width, height = image.size
    if width < height:
        width, height = resized, int(resized * height / width)
    else:
        width, height = int(resized * width / height), resized
    image = image.resize((width, height), Image.BICUBIC)
    left, top = int(round((width - size) / 2.)), int(round((height - size) / 2.))
    pixels = np.asarray(image.crop((left, top, left + size, top + size)))
    return pixels, torch.from_numpy((pixels.astype(np.float32) / 255 - 0.5) / 0.5).permute(2, 0, 1)[None]


# ---- predictions

@pytest.mark.needs('current', beit is not None, 'this timm has no BEiT')
def test_probabilities_are_those_of_timm_on_images_that_pillow_prepared(large, photos, tmp_path):
    options = dict(img_size=48, patch_size=8, embed_dim=64, depth=4, num_heads=4, num_classes=10, init_values=0.1,
                   use_abs_pos_emb=False, use_rel_pos_bias=True)
    oracle = beit.Beit(**options).eval()
    oracle.load_state_dict(large[1].state_dict(), strict=False)
    names = {name for name in large[1].state_dict() if not name.endswith('relative_position_index')}
    assert names == set(dict(oracle.named_parameters()))
    assert predict('--resume', large[0], photos, '--output', tmp_path / 'out.csv', '--top_k=10') == 0
    found = rows(tmp_path / 'out.csv')
    assert [os.path.relpath(row['file'], photos) for row in found] == ['a.jpg', 'z.png', 'b/c.JPG', 'b/e.png',
                                                                       'b/deep/d.webp']
    for row in found:
        with torch.no_grad():
            expected = oracle(by_hand(row['file'], 48, 54)[1])[0].softmax(-1)
        assert row['class_1'] == CLASSES[int(expected.argmax())]
        for rank in range(1, 11):
            share = float(row['probability_%d' % rank])
            assert share == pytest.approx(float(expected[CLASSES.index(row['class_%d' % rank])]), abs=2e-5)
            assert rank == 1 or share <= float(row['probability_%d' % (rank - 1)])
    assert len({row['class_1'] for row in found}) > 1  # otherwise the weights would prove nothing


def test_a_binary_model_gives_each_class_its_own_probability(photos, tmp_path):
    model = make_checkpoint(tmp_path / 'labels.pth', '--input_size=48', activation='sigmoid')
    assert predict('--resume', tmp_path / 'labels.pth', photos, '--output', tmp_path / 'out.csv', '--top_k=10') == 0
    for row in rows(tmp_path / 'out.csv'):
        with torch.no_grad():
            expected = 1 / (1 + torch.exp(-model(by_hand(row['file'], 48, 54)[1])[0]))
        assert {row['class_%d' % rank]: float(row['probability_%d' % rank]) for rank in range(1, 11)} == pytest.approx(
            dict(zip(CLASSES, expected.tolist())), abs=2e-5)


def test_the_digits_accuracy_and_loss_are_those_of_the_evaluation(tmp_path, capfd):
    make_checkpoint(tmp_path / 'digits.pth', '--input_size=32', classes=list('0123456789'))
    assert run_class_finetuning.run(NANO + ['--data_path=demo', '--eval', '--resume',
                                            str(tmp_path / 'digits.pth')]) == 0
    out = capfd.readouterr().out
    assert predict('--resume', tmp_path / 'digits.pth', os.path.join(ROOT, 'data', 'digits', 'val'), '--batch_size=50',
                   '--top_k=10', '--output', tmp_path / 'digits.jsonl') == 0
    with open(str(tmp_path / 'digits.jsonl'), encoding='utf-8') as file:
        answers = [json.loads(line) for line in file]
    truth = [os.path.basename(os.path.dirname(answer['file'])) for answer in answers]
    right = sum(answer['predictions'][0]['class'] == label for answer, label in zip(answers, truth))
    assert len(answers) == 360
    assert 'on the 360 test images: %.3f%%' % (100 * right / 360) in out
    loss = sum(-math.log(each['probability']) for answer, label in zip(answers, truth)
               for each in answer['predictions'] if each['class'] == label) / 360
    assert loss == pytest.approx(float(re.search(r'Result: .* loss ([\d.]+)', out).group(1)), abs=2e-4)


def test_other_sizes_are_resized_for_a_small_model_with_one_note(small, photos, tmp_path, capfd):
    photo(9, 32, 32).save(os.path.join(photos, 'exact.png'))
    assert predict('--resume', small[0], photos, '--output', tmp_path / 'out.csv', '--top_k=1', '--batch_size=2') == 0
    assert capfd.readouterr().err.count('Note: the model was trained on images of exactly 32x32') == 1
    found = rows(tmp_path / 'out.csv')
    assert len(found) == 6
    for row in found:
        with torch.no_grad():
            expected = small[1](by_hand(row['file'], 32, 32)[1])[0].softmax(-1)
        assert float(row['probability_1']) == pytest.approx(float(expected.max()), abs=2e-5)
    assert predict('--resume', small[0], os.path.join(photos, 'exact.png')) == 0
    assert 'Note' not in capfd.readouterr().err


def test_averaged_weights(tmp_path, photos):
    average = make_checkpoint(tmp_path / 'ema.pth', '--input_size=48', ema=True)
    path = os.path.join(photos, 'a.jpg')
    assert predict('--resume', tmp_path / 'ema.pth', path, '--use_ema', '--output', tmp_path / 'ema.csv') == 0
    assert predict('--resume', tmp_path / 'ema.pth', path, '--output', tmp_path / 'plain.csv') == 0
    with torch.no_grad():
        expected = float(average(by_hand(path, 48, 54)[1])[0].softmax(-1).max())
    assert float(rows(tmp_path / 'ema.csv')[0]['probability_1']) == pytest.approx(expected, abs=2e-5)
    assert rows(tmp_path / 'plain.csv') != rows(tmp_path / 'ema.csv')


@pytest.mark.needs('current', hasattr(torch, 'autocast'), 'this PyTorch has no autocast on a CPU')
def test_half_precision_gives_nearly_the_same(large, photos, tmp_path):
    for name, flags in (('full', ()), ('half', ('--amp', '--opt_level=O1'))):
        assert predict('--resume', large[0], photos, '--output', tmp_path / (name + '.csv'), '--top_k=1', *flags) == 0
    full, half = rows(tmp_path / 'full.csv'), rows(tmp_path / 'half.csv')
    assert full != half
    for one, other in zip(full, half):
        assert float(one['probability_1']) == pytest.approx(float(other['probability_1']), abs=0.05)


@pytest.fixture
def one_thread():
    """With several threads, PyTorch 1.5 rounds the last bit by the batch size."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_two_processes_write_the_file_of_one(large, tmp_path, one_thread):
    folder = tmp_path / 'many'
    for index in range(23):  # 12 and 11: three batches of four, and the last of the second is shorter
        place = folder / ('%d' % (index % 3))
        place.mkdir(parents=True, exist_ok=True)
        photo(index, 50 + index, 60).save(str(place / ('%02d.jpg' % index)))
    (folder / '1' / 'broken.jpg').write_bytes(b'broken')
    flags = ['--resume', large[0], str(folder), '--device=cpu', '--batch_size=4', '--bad_images=skip', '--attention']
    assert predict('--num_workers=2', '--output', tmp_path / 'one' / 'out.json', *flags) == 0
    port = str(free_port())
    running = [subprocess.Popen(
        [sys.executable, os.path.join(ROOT, 'run_predict.py'), '--num_workers=0', '--output',
         str(tmp_path / 'two' / 'out.json')] + flags, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        env=dict(os.environ, RANK=str(rank), WORLD_SIZE='2', LOCAL_RANK=str(rank), MASTER_ADDR='127.0.0.1',
                 MASTER_PORT=port, OMP_NUM_THREADS='1')) for rank in range(2)]
    outputs = [process.communicate(timeout=120) for process in running]
    assert [process.returncode for process in running] == [0, 0], outputs
    assert [out for out, _ in outputs] == [b'', b'']
    assert outputs[1][1] == b'' and outputs[0][1].count(b'Left out') == 1
    one, two = ((tmp_path / name / 'out.json').read_text(encoding='utf-8') for name in ('one', 'two'))
    assert one.replace(str(tmp_path / 'one'), '') == two.replace(str(tmp_path / 'two'), '')
    assert len(json.loads(one)) == 24
    names = [sorted(os.path.relpath(os.path.join(place, name), str(root)) for place, _, files in os.walk(str(root))
                    for name in files) for root in (tmp_path / 'one', tmp_path / 'two')]
    assert names[0] == names[1] and len(names[0]) == 24  # the results and 23 pictures


# ---- results

def test_every_format_has_the_same_content(large, photos, tmp_path, capfdbinary):
    flags = ['--resume', large[0], photos, '--top_k=3']
    for name in ('out.csv', 'out.json', 'out.jsonl'):
        assert predict('--output', tmp_path / name, *flags) == 0
    answers = json.loads((tmp_path / 'out.json').read_text(encoding='utf-8'))
    assert answers == [json.loads(line) for line in (tmp_path / 'out.jsonl').read_text(encoding='utf-8').splitlines()]
    assert [[row['file']] + [row['%s_%d' % (name, rank)] for rank in (1, 2, 3) for name in ('class', 'probability')]
            for row in rows(tmp_path / 'out.csv')] == [
        [answer['file']] + [text for each in answer['predictions']
                            for text in (each['class'], '%.6f' % each['probability'])] for answer in answers]
    assert all(CLASSES[each['index']] == each['class'] for answer in answers for each in answer['predictions'])
    assert sorted(os.listdir(str(tmp_path))) == ['large.pth', 'out.csv', 'out.json', 'out.jsonl', 'photos']  # no .tmp

    capfdbinary.readouterr()
    for name in ('csv', 'json', 'jsonl'):  # standard output has only the results
        assert predict('--output=-', '--format', name, *flags) == 0
        assert capfdbinary.readouterr().out == (tmp_path / ('out.' + name)).read_bytes()
    assert predict(*flags) == 0
    lines = capfdbinary.readouterr().out.decode().splitlines()
    assert len(lines) == 5
    assert lines[0] == '%s: %s' % (answers[0]['file'], ', '.join(
        '%s (%.1f %%)' % (each['class'], 100 * each['probability']) for each in answers[0]['predictions']))


@pytest.mark.needs('linux', sys.platform.startswith('linux'), 'names of other systems are text')
def test_names_that_are_not_text_or_hold_newlines(large, tmp_path, capfd):
    folder = tmp_path / 'odd'
    folder.mkdir()
    names = [b'a\nb.png', b'bytes\xff.png', '猫, "quoted".png'.encode(), b'zz\r.png']
    for index, name in enumerate(names):
        with open(os.path.join(os.fsencode(str(folder)), name), 'wb') as file:
            photo(index).save(file, 'PNG')
    flags = ['--resume', large[0], folder, '--top_k=1']
    for ending in ('csv', 'json', 'jsonl'):
        assert predict('--output', tmp_path / ('out.' + ending), *flags) == 0
    exact = [os.path.join(os.fsencode(str(folder)), name) for name in names]
    answers = json.loads((tmp_path / 'out.json').read_text(encoding='utf-8'))
    assert sorted(os.fsencode(answer['file']) for answer in answers) == sorted(exact)
    assert len((tmp_path / 'out.jsonl').read_text(encoding='utf-8').split('\n')) == 5  # and the empty one at the end
    shown = {row['file'] for row in rows(tmp_path / 'out.csv')}
    assert shown == {os.path.join(str(folder), name) for name in ('a\\nb.png', 'bytes\\xff.png', '猫, "quoted".png',
                                                                  'zz\\r.png')}
    capfd.readouterr()
    assert predict('--attention', '--attention_dir', tmp_path / 'looks', *flags) == 0
    assert {line.rpartition(': ')[0] for line in capfd.readouterr().out.splitlines()} == shown
    assert sorted(os.listdir(os.fsencode(str(tmp_path / 'looks')))) == sorted(
        name + b'.attention.png' for name in names)


def test_unreadable_images_stop_the_program_or_are_skipped(large, photos, tmp_path, capfd):
    with open(os.path.join(photos, 'b', 'broken.jpg'), 'w') as file:
        file.write('broken')
    out = tmp_path / 'out.csv'
    out.write_text('from before')
    for workers in (0, 2):
        flags = ['--resume', large[0], photos, '--output', out, '--batch_size=2', '--num_workers=%d' % workers]
        assert predict(*flags) == 2
        error = capfd.readouterr().err.splitlines()[-1]
        assert error.startswith('run_predict.py: error: ') and 'broken.jpg: cannot be read' in error
        assert out.read_text() == 'from before' and not [name for name in os.listdir(str(tmp_path)) if '.tmp' in name]
    assert predict('--bad_images=skip', *flags) == 0
    err = capfd.readouterr().err
    assert err.count('Left out: ') == 1 and '5 images in' in err and '1 left out' in err
    found = rows(out)
    assert [os.path.basename(row['file']) for row in found] == ['a.jpg', 'z.png', 'broken.jpg', 'c.JPG', 'e.png',
                                                                'd.webp']
    assert [bool(row['error']) for row in found] == [False, False, True, False, False, False]
    assert [bool(row['class_1']) for row in found] == [True, True, False, True, True, True]
    assert predict('--resume', large[0], os.path.join(photos, 'b', 'broken.jpg'), '--bad_images=skip') == 2
    assert 'none of the 1 images can be read' in capfd.readouterr().err


def test_ctrl_c_leaves_no_half_file(large, photos, tmp_path, capfd, monkeypatch):
    def interrupted(self):
        yield from itertools.islice(whole(self), 1)
        os.kill(os.getpid(), signal.SIGINT)
        yield from ()

    whole = run_predict.Predictor.predictions
    monkeypatch.setattr(run_predict.Predictor, 'predictions', interrupted)
    assert predict('--resume', large[0], photos, '--batch_size=1', '--output', tmp_path / 'out.csv') == 130
    assert 'run_predict.py: error: interrupted by SIGINT' in capfd.readouterr().err
    assert sorted(os.listdir(str(tmp_path))) == ['large.pth', 'photos']


def test_a_closed_pipe_and_a_full_disk(large, photos, monkeypatch, capfd):
    reading, writing = os.pipe()
    os.close(reading)
    monkeypatch.setattr(sys, 'stdout', io.TextIOWrapper(os.fdopen(writing, 'wb'), encoding='utf-8'))
    assert predict('--resume', large[0], photos) == 141
    assert 'rror' not in capfd.readouterr().err
    if os.path.exists('/dev/full'):
        monkeypatch.setattr(sys, 'stdout', io.TextIOWrapper(open('/dev/full', 'wb'), encoding='utf-8'))
        assert predict('--resume', large[0], photos) == 2
        assert 'cannot write to standard output (No space left on device)' in capfd.readouterr().err


def test_an_output_link_or_pipe_is_written_to_and_stays(large, photos, tmp_path):
    """A link stays and its target is replaced; a pipe stays and its reader gets the results."""
    assert predict('--resume', large[0], photos, '--output', tmp_path / 'out.csv') == 0
    expected = (tmp_path / 'out.csv').read_bytes()
    (tmp_path / 'far').mkdir()
    os.symlink('far/target.csv', str(tmp_path / 'link.csv'))
    for _ in range(2):  # the target is not there yet, and is
        assert predict('--resume', large[0], photos, '--output', tmp_path / 'link.csv') == 0
        assert os.path.islink(str(tmp_path / 'link.csv'))
        assert (tmp_path / 'far' / 'target.csv').read_bytes() == expected
    pipe = str(tmp_path / 'pipe.csv')
    os.mkfifo(pipe)
    with subprocess.Popen(['cat', pipe], stdout=subprocess.PIPE) as reader:
        assert predict('--resume', large[0], photos, '--output', pipe) == 0
        assert reader.communicate(timeout=60)[0] == expected
    assert stat.S_ISFIFO(os.stat(pipe).st_mode)
    assert sorted(os.listdir(str(tmp_path))) == ['far', 'large.pth', 'link.csv', 'out.csv', 'photos', 'pipe.csv']
    assert os.listdir(str(tmp_path / 'far')) == ['target.csv']


def test_the_name_of_standard_output(large, photos, tmp_path):
    command = [sys.executable, os.path.join(ROOT, 'run_predict.py'), '--device=cpu', '--num_workers=0', '--format=csv',
               '--resume', large[0], photos, '--output']
    with open(str(tmp_path / 'shown'), 'wb') as file:
        subprocess.run(command + ['/proc/self/fd/1'], stdout=file, check=True)
        file.write(b'and more\n')  # to the file that the shell opened, not to a replacement
    shown = (tmp_path / 'shown').read_bytes()
    assert shown.startswith(b'file,') and len(shown.splitlines()) == 7 and shown.endswith(b'\nand more\n')


@pytest.mark.parametrize('program, flags', [
    ('run_class_finetuning', '--data_path demo'), ('run_predict', '--resume {file} {file}'),
    ('run_export', '--resume {file} --format onnx'), ('average_checkpoints', '--inputs {file} --output {file}-average'),
    ('run_linear_eval', '--data_path demo --finetune {file} --output_dir {file}-probe')])
def test_ctrl_c_while_pytorch_is_imported(program, flags, tmp_path):
    (tmp_path / 'file').write_text('whatever: only its name is checked by then')
    flags = [flag.format(file=tmp_path / 'file') for flag in flags.split()]
    process = subprocess.Popen([sys.executable, os.path.join(ROOT, program + '.py')] + flags, stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
    until = time.monotonic() + 60
    while b'libtorch' not in pathlib.Path('/proc/%d/maps' % process.pid).read_bytes() and time.monotonic() < until:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=60) == (b'', b'') and process.returncode == -signal.SIGINT


# ---- attention maps

def slow_weights(attention, x, shared_bias=None):
    """softmax of q k / sqrt(d) + bias, one number at a time: (heads, N, N) of one image's tokens (N, D)."""
    tokens, dim = x.shape
    head_dim = dim // attention.num_heads
    weight = attention.qkv.weight.detach().numpy()
    q_bias = attention.q_bias.detach().numpy()
    table = attention.relative_position_bias_table.detach().numpy() if attention.has_relative_position else None
    result = np.zeros((attention.num_heads, tokens, tokens))
    for head in range(attention.num_heads):
        part = slice(head * head_dim, (head + 1) * head_dim)
        q = x @ weight[:dim][part].T + q_bias[part]
        k = x @ weight[dim:2 * dim][part].T
        for i in range(tokens):
            scores = [float(q[i] @ k[j]) / math.sqrt(head_dim)
                      + (0 if table is None else table[int(attention.relative_position_index[i, j]), head])
                      + (0 if shared_bias is None else shared_bias[head, i, j]) for j in range(tokens)]
            powers = [math.exp(score - max(scores)) for score in scores]
            result[head, i] = [power / sum(powers) for power in powers]
    return result


@pytest.mark.parametrize('shared', [False, True])
def test_attention_weights_by_a_slow_loop(shared):
    torch.manual_seed(1)
    model = modeling_finetune.VisionTransformer(
        img_size=(16, 24), patch_size=8, num_classes=3, embed_dim=12, depth=2, num_heads=3, qkv_bias=True,
        use_rel_pos_bias=not shared, use_shared_rel_pos_bias=shared, use_mean_pooling=not shared).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter)
    images = torch.randn(2, 3, 16, 24)
    with torch.no_grad():
        plain = model(images)
        recorders = [attention_maps.HeatmapWriter(model, *which) for which in ((1, None), (2, 'cls'), (2, 'mean'))]
        assert torch.equal(model(images), plain)  # recording attention doesn't change the result
        assert recorders[0].kind == ('cls' if shared else 'mean')
        x = model.patch_embed(images)
        x = torch.cat((model.cls_token.expand(2, -1, -1), x), 1) + model.pos_embed
        bias = model.rel_pos_bias() if shared else None
        inputs = [recorder.inputs for recorder in recorders]
        for depth, block in enumerate(model.blocks):
            seen = block.norm1(x)
            found = block.attn.weights(seen, bias)
            assert torch.allclose(found.sum(-1), torch.ones(2, 3, 7), atol=1e-6)
            for image in range(2):
                slow = slow_weights(block.attn, seen[image].numpy(), None if bias is None else bias.numpy())
                np.testing.assert_allclose(found[image].numpy(), slow, atol=2e-6)
                for recorder, given in list(zip(recorders, inputs))[2 * depth - depth:2 * depth + 1]:
                    expected = slow[:, 0, 1:] if recorder.kind == 'cls' else slow[:, 1:, 1:].mean(1)
                    np.testing.assert_allclose(recorder.maps(given, image).numpy(), expected.reshape(3, 2, 3),
                                               atol=2e-6)
            x = block(x, bias)


def test_heat_maps_show_the_crop_and_the_weights(large, photos, tmp_path, monkeypatch):
    painted = []

    def paint(picture, heat):
        painted.append((np.asarray(picture), np.asarray(heat)))
        return real(picture, heat)

    real = attention_maps.paint
    monkeypatch.setattr(attention_maps, 'paint', paint)
    paths = [os.path.join(photos, name) for name in ('b/c.JPG', 'a.jpg')]
    assert predict('--resume', large[0], '--input', *paths, '--attention', '--attention_heads', '--attention_block=2',
                   '--output', tmp_path / 'results' / 'out.csv') == 0
    assert len(painted) == 10  # of two images, the average and four heads
    for (picture, _), path in zip(painted[::5], paths):
        np.testing.assert_array_equal(picture, by_hand(path, 48, 54)[0])
    np.testing.assert_allclose(painted[0][1], np.mean([heat for _, heat in painted[1:5]], 0), atol=1e-6)
    looks = tmp_path / 'results' / 'attention'
    assert [row['attention'] for row in rows(tmp_path / 'results' / 'out.csv')] == [
        str(looks / 'b' / 'c.JPG.attention.png'), str(looks / 'a.jpg.attention.png')]
    assert sorted(os.listdir(str(looks))) == ['a.jpg.attention.png'] + [
        'a.jpg.head%d.png' % head for head in (1, 2, 3, 4)] + ['b']
    image = Image.open(str(looks / 'a.jpg.attention.png'))
    assert image.mode == 'RGB' and image.size == (240, 240)  # 48 enlarged to 224 at least


def test_colours_mean_attention():
    heat = np.zeros((4, 4), dtype=np.float32)
    heat[1, 2] = 1.
    picture = np.zeros((64, 64, 3), dtype=np.uint8)
    picture[..., 0] = 200  # the red picture becomes grey
    pixels = np.asarray(attention_maps.paint(picture, heat)).astype(int)
    assert pixels.shape == (256, 256, 3)
    red, green, blue = pixels[96, 160]  # the middle of that patch
    assert red > 150 and green > 130 and blue < 60
    far = pixels[224:, :32].reshape(-1, 3)
    assert (far.max(1) - far.min(1)).max() <= 25 and far.mean() < 60
    flat = np.asarray(attention_maps.paint(picture, np.ones((4, 4)))).astype(int)
    assert (flat.max(-1) - flat.min(-1)).max() <= 1  # no difference, no colour


def test_heat_maps_are_not_inputs(large, photos):
    looks = os.path.join(photos, 'attention')
    flags = ['--resume', large[0], '--attention', '--attention_dir', looks, '--batch_size=1']
    for given in (photos, os.path.join(photos, '*'), os.path.join(photos, '**', '*.*')):
        assert predict(given, *flags) == 0
        pictures = [name for _, _, files in os.walk(looks) for name in files]
        assert len(pictures) == 5


# ---- finding the images

def names_of(paths, root):
    return [os.path.relpath(path, str(root)) for path in paths]


def make_tree(root, names):
    for name in names:
        path = os.path.join(str(root), name)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path, 'wb'):
            pass


def test_order_and_which_files_count(tmp_path):
    images = ['b.png', 'a.JPEG', 'c/2.jpg', 'c/10.jpg', 'c/d/x.webp', 'e/y.bmp']
    make_tree(tmp_path, images + ['.hidden.png', '.git/x.png', '__MACOSX/x.png', 'c/readme.md', 'empty/nothing.txt'])
    os.symlink(str(tmp_path / 'c'), str(tmp_path / 'linked'))
    found = names_of(prediction_inputs.find_images([str(tmp_path)]), tmp_path)
    assert found == ['a.JPEG', 'b.png', 'c/10.jpg', 'c/2.jpg', 'c/d/x.webp', 'e/y.bmp', 'linked/10.jpg',
                     'linked/2.jpg', 'linked/d/x.webp']
    pattern = str(tmp_path / '*' / '*.jpg')
    assert names_of(prediction_inputs.find_images([pattern]), tmp_path) == ['c/10.jpg', 'c/2.jpg', 'linked/10.jpg',
                                                                            'linked/2.jpg']
    assert names_of(prediction_inputs.find_images([str(tmp_path / '[a-z]*')]), tmp_path) == found
    everything = names_of(prediction_inputs.find_images([str(tmp_path / '**' / '[!_]*')]), tmp_path)
    assert {name for name in everything if not name.startswith(('linked', '__MACOSX'))} == set(images)
    assert len(everything) == len(set(everything))  # ** matches folders, too
    given = [str(tmp_path / 'e'), str(tmp_path / 'c/readme.md'), str(tmp_path / 'b.png')]  # any ending
    assert names_of(prediction_inputs.find_images(given), tmp_path) == ['e/y.bmp', 'c/readme.md', 'b.png']
    make_tree(tmp_path, ['photo[1].jpg'])
    found = prediction_inputs.find_images([str(tmp_path / 'photo[1].jpg')])
    assert len(list(found)) == 1  # an existing name is not used as a pattern
    os.symlink('..', str(tmp_path / 'c' / 'round'))
    with pytest.raises(UserError, match='one of its parent folders'):
        list(prediction_inputs.find_images([str(tmp_path)]))


def test_files_that_are_not_images_are_reported_and_the_rest_is_read(tmp_path, capsys):
    make_tree(tmp_path, ['a.txt', 'b.TXT', 'sub/.DS_Store', 'sub/@eaDir/x.png', 'sub/empty', 'sub/c.mp4'])
    for name, kind in (('a.jfif', 'JPEG'), ('b.gif', 'GIF'), ('sub/c.jpe', 'JPEG'), ('sub/none', 'PNG')):
        Image.new('RGB', (8, 8)).save(str(tmp_path / name), kind)
    sampler = prediction_inputs.PathSampler([str(tmp_path)])
    assert sampler.first(9) == 4 and capsys.readouterr().out == ''
    assert names_of([path for _, path in sampler], tmp_path) == ['a.jfif', 'b.gif', 'sub/c.jpe', 'sub/none']
    line = capsys.readouterr().out
    assert line.startswith('6 files or folders are not used (2 ') and line.endswith(')\n')
    for part in ('2 .txt', '2 hidden', '1 .mp4', '1 without an ending'):
        assert part in line
    make_tree(tmp_path / 'films', ['d.mp4'])
    with pytest.raises(UserError, match='films: there is no image in it; 1 file or folder is not used .1 .mp4'):
        prediction_inputs.PathSampler([str(tmp_path / 'films')]).first(1)
    list(prediction_inputs.PathSampler([str(tmp_path / '[!f]*')]))
    assert '6 files or folders' in capsys.readouterr().out


def test_a_large_folder_is_streamed(tmp_path, monkeypatch):
    make_tree(tmp_path, ['%03d.jpg' % number for number in range(100)] + ['sub/%d.png' % number for number in range(7)])
    whole = list(prediction_inputs.find_images([str(tmp_path)]))
    seen = []
    scandir = os.scandir

    class Watched:
        def __init__(self, entries):
            self.entries = entries

        def __enter__(self):
            return self

        def __exit__(self, *_):
            self.entries.close()

        def __iter__(self):
            for entry in self.entries:
                seen.append(entry)
                yield entry

    monkeypatch.setattr(prediction_inputs, 'SORTED_AT_ONCE', 10)
    monkeypatch.setattr(os, 'scandir', lambda path: Watched(scandir(path)))
    walk = prediction_inputs.find_images([str(tmp_path)])
    first = [next(walk) for _ in range(10)]
    assert len(seen) <= 11 and first == sorted(first)
    assert sorted(first + list(walk)) == sorted(whole)


def test_the_stream_is_split_between_processes_and_read_lazily(tmp_path):
    make_tree(tmp_path, ['%02d.jpg' % number for number in range(11)])
    shares = [prediction_inputs.PathSampler([str(tmp_path)], (), rank, 3) for rank in range(3)]
    taken = [list(share) for share in shares]
    assert sorted(itertools.chain(*taken)) == list(enumerate(sorted(
        os.path.join(str(tmp_path), name) for name in os.listdir(str(tmp_path)))))
    assert [[number for number, _ in share] for share in taken] == [[0, 3, 6, 9], [1, 4, 7, 10], [2, 5, 8]]
    assert shares[0].state == shares[1].state == shares[2].state
    other = prediction_inputs.PathSampler([str(tmp_path)] * 2)
    assert len(list(other)) == 22 and other.state != shares[0].state
    assert shares[1].take(2) == taken[1][:2] and shares[1].take(2) == taken[1][2:]
    assert prediction_inputs.PathSampler([str(tmp_path)]).first(5) == 5


def test_results_of_a_long_stream_are_not_kept(large, tmp_path, monkeypatch):
    """With 30 times the images, equally many predictions are alive at once."""
    alive, most = collections.Counter(), [0]

    class Counted(prediction_writers.CsvWriter):
        def write(self, prediction):
            most[0] = max(most[0], prediction.number - alive['read'])
            super().write(prediction)

    def compute(self, batch):
        result = whole(self, batch)
        alive['read'] = max(0, result[1][0][0] - 2 * len(result[1]))
        assert len(self.sampler.requested) <= 3 * len(result[1])
        return result

    whole = run_predict.Predictor.compute
    monkeypatch.setattr(run_predict.Predictor, 'compute', compute)
    monkeypatch.setitem(prediction_writers.FORMATS, 'csv', Counted)
    for index in range(60):
        photo(index, 48, 48).save(str(tmp_path / ('%02d.png' % index)))
    assert predict('--resume', large[0], tmp_path, '--output', tmp_path / 'out.csv', '--batch_size=2') == 0
    assert len(rows(tmp_path / 'out.csv')) == 60 and most[0] <= 6


# ---- mistakes

@pytest.mark.parametrize('flags, expected', [
    (['photos'], '--resume is missing'),
    (['--resume=large.pth'], 'no image is named'),
    (['--resume=large.pth', 'nothing.jpg'], 'nothing.jpg: no such file or folder'),
    (['--resume=large.pth', 'photos', '*.gif'], '*.gif: no file matches'),
    (['--resume=large.pth', 'empty'], 'empty: there is no image in it'),
    (['--resume=missing.pth', 'photos'], '--resume missing.pth: no such file or folder'),
    (['--resume=photos/a.jpg', 'photos'], '--resume photos/a.jpg: not a weights file'),
    (['--resume=large.pth', 'photos', '--output=out.txt'], '--output out.txt: its ending names no format'),
    (['--resume=large.pth', 'photos', '--output=photos', '--format=csv'], '--output photos: a folder has this name'),
    (['--resume=large.pth', 'photos', '--output=photos/a.jpg', '--format=csv'], 'would overwrite an image'),
    (['--resume=large.pth', 'photos', '--output=large.pth/out.csv'], '--output'),
    (['--resume=large.pth', 'photos', '--format=xml'], "--format: unknown value 'xml'; it must be one of"),
    (['--resume=large.pth', 'photos', '--top_k=0'], '--top_k: must be at least 1'),
    (['--resume=large.pth', 'photos', '--topk=3'], '--topk: unknown flag; did you mean --top_k?'),
    (['--resume=large.pth', 'photos', '--device=tpu'], '--device must be auto'),
    (['--resume=large.pth', 'photos', '--use_ema'], 'holds no averaged weights'),
    (['--resume=large.pth', 'photos', '--attention', '--attention_block=9'], 'the model has blocks 1 to 4'),
    (['--resume=large.pth', 'photos', '--attention_heads'], '--attention_heads needs --attention'),
    (['--resume=large.pth', 'photos', '--attention', '--attention_dir=photos'], '--attention_dir photos holds inputs'),
    (['--resume=large.pth', 'photos', '--attention', '--attention_dir=large.pth'], '--attention_dir large.pth'),
    (['--resume=large.pth', 'photos', '--model=beit_nano'], '--model'),
    (['--resume=weights.pth', 'photos'], 'give --model'),
])
def test_a_mistake_is_one_line(large, photos, tmp_path, monkeypatch, capfd, flags, expected):
    monkeypatch.chdir(str(tmp_path))
    (tmp_path / 'empty').mkdir()
    torch.save({'model': large[1].state_dict()}, 'weights.pth')
    before = sorted(os.listdir(str(tmp_path)))
    assert predict(*flags) == 2
    out, err = capfd.readouterr()
    assert err.count('\n') == 1 and err.startswith('run_predict.py: error: ') and expected in err, err
    assert out == '' and sorted(os.listdir(str(tmp_path))) == before


def test_weights_without_metadata_take_flags(large, photos, tmp_path, capfd):
    torch.save({'model': large[1].state_dict()}, str(tmp_path / 'weights.pth'))
    path = os.path.join(photos, 'a.jpg')
    assert predict('--resume', tmp_path / 'weights.pth', path, '--model=beit_nano_patch8_32', '--input_size=48',
                   '--top_k=1') == 0
    said = capfd.readouterr().out
    with torch.no_grad():
        best = large[1](by_hand(path, 48, 54)[1])[0].softmax(-1).max(0)
    assert said == '%s: %d (%.1f %%)\n' % (path, best.indices, 100 * best.values)  # a class without a name is a number


def test_images_may_be_anywhere_among_the_flags():
    parse = run_predict.build_parser().parse_args
    args = parse(['a.jpg', '--attention', 'b.jpg', '--top-k', '3', 'c.jpg', '--input', 'd.jpg', 'e', '--input=f'])
    assert args.images == ['a.jpg', 'b.jpg', 'c.jpg'] and args.input == [['d.jpg', 'e'], ['f']] and args.top_k == 3
    assert args.attention == 'auto'
    assert parse(['--attention', 'mean', 'x']).attention == 'mean' and parse(['x']).attention is None
    assert parse(['x', '--attention']).attention == 'auto' and parse(['--attention=cls']).attention == 'cls'


def test_every_flag_is_in_help(capfd):
    parser = run_predict.build_parser()
    with pytest.raises(SystemExit):
        run_predict.run(['--help'])
    shown = capfd.readouterr().out
    assert 'examples:' in shown
    for action in parser._actions:
        if action.option_strings and action.help != '==SUPPRESS==' and action.dest not in ('help',):
            assert '  %s' % action.option_strings[0] in shown, action.option_strings[0]


# ---- from Python

@pytest.mark.parametrize('size, resized', [(48, 54), (32, 32)])
def test_a_classifier_loaded_from_python_gives_the_network_s_probabilities(size, resized, photos, tmp_path):
    model = make_checkpoint(tmp_path / 'made.pth', '--input_size=%d' % size)
    classifier = load(tmp_path / 'made.pth')
    paths = [os.path.join(photos, name) for name in ('a.jpg', 'z.png', 'b/e.png')]
    assert classifier.classes == CLASSES and not classifier.model.training
    for path, ranking in zip(paths, classifier.predict(paths, top_k=4)):
        pixels = by_hand(path, size, resized)[1]
        np.testing.assert_allclose(classifier.transform(path), pixels[0], atol=1e-6)
        with torch.no_grad():
            expected = model(pixels)[0].softmax(-1)
        order = expected.argsort(descending=True)[:4].tolist()
        assert [name for name, _ in ranking] == [CLASSES[index] for index in order]
        assert [share for _, share in ranking] == pytest.approx(expected[order].tolist(), abs=2e-6)
        assert classifier.predict(Image.open(path), 4) == classifier.predict(path, 4)
    assert len({classifier.predict(path)[0][0] for path in paths}) > 1  # or the images would not matter
    assert len(classifier.predict(paths[0])) == 5 and classifier.predict([]) == []


def test_a_classifier_takes_what_an_export_and_several_labels_give(photos, tmp_path):
    make_checkpoint(tmp_path / 'labels.pth', '--input_size=48', activation='sigmoid')
    assert run_export.run(['--resume', str(tmp_path / 'labels.pth'), '--format=safetensors',
                           '--output', str(tmp_path / 'out.safetensors')]) == 0
    image = Image.open(os.path.join(photos, 'a.jpg')).convert('RGBA')
    first, second = (load(tmp_path / name).probabilities([image])[0] for name in ('labels.pth', 'out.safetensors'))
    assert torch.equal(first, second) and first.sum().item() != pytest.approx(1)


def test_a_classifier_names_a_file_that_is_no_image(large, tmp_path):
    (tmp_path / 'torn.jpg').write_bytes(b'no image')
    with pytest.raises(UserError, match='torn.jpg: cannot be read') as unreadable:
        load(large[0]).predict(str(tmp_path / 'torn.jpg'))
    with pytest.raises(TypeError, match='Pillow image, not ndarray'):
        load(large[0]).predict(np.zeros((48, 48, 3), np.uint8))
    with pytest.raises(UserError, match='nothing-here') as missing:
        load(tmp_path / 'nothing-here.pth')
    assert '--' not in str(unreadable.value) and '--resume' not in str(missing.value)  # Python has no flags
