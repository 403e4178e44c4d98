"""Features of run_predict.py, the linear probe and the neighbours of run_linear_eval.py, against NumPy and sklearn."""

import os
import subprocess
import sys
import tracemalloc

import numpy as np
import pytest
import torch
from PIL import Image

import modeling_finetune
import run_predict
from beit.files import weights_file
from beit.outputs import features
from beit.outputs.prediction_writers import Prediction
from helpers import ROOT, free_port, photo


def write_weights(path, head=True):
    """Weights of the nano model, of random tables too; without a head as a pretraining leaves them. Returns the model.
    """
    torch.manual_seed(3)
    model = modeling_finetune.beit_nano_patch8_32(num_classes=3, init_values=0.1, use_abs_pos_emb=False,
                                                  use_rel_pos_bias=True, use_mean_pooling=head).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    content = {name: value for name, value in model.state_dict().items() if head or not name.startswith('head.')}
    weights_file.save(str(path), {'model': content})
    return str(path), model


@pytest.fixture
def photos(tmp_path):
    """Eleven images of 32x32 in two folders, and a broken one between them."""
    for index in range(11):
        folder = tmp_path / 'photos' / str(index % 2)
        folder.mkdir(parents=True, exist_ok=True)
        photo(index, 32, 32).save(str(folder / ('%02d.png' % index)))
    (tmp_path / 'photos' / '0' / '05.png').write_bytes(b'broken')
    return str(tmp_path / 'photos')


def predict(weights, *flags):
    return run_predict.run(['--num_workers=0', '--device=cpu', '--model=beit_nano_patch8_32', '--resume', weights]
                           + list(map(str, flags)))


def read(path):
    with np.load(str(path)) as file:
        return file['features'], file['files'].tolist()


def slow_features(model, path, layer=None):
    """The features of an image by NumPy and single blocks."""
    pixels = np.asarray(Image.open(path).convert('RGB')).astype(np.float32) / 255
    with torch.no_grad():
        x = model.patch_embed(torch.from_numpy((pixels - 0.5) / 0.5).permute(2, 0, 1)[None])
        x = torch.cat((model.cls_token, x), 1)
        for block in model.blocks[:layer]:
            x = block(x)
    tokens = x[0].double().numpy()
    if layer is not None:
        return np.concatenate((tokens[0], tokens[1:].mean(0)))
    norm = model.norm if model.fc_norm is None else model.fc_norm
    pooled = tokens[0] if model.fc_norm is None else tokens[1:].mean(0)
    return (pooled - pooled.mean()) / np.sqrt(pooled.var() + 1e-6) * norm.weight.detach().numpy() \
        + norm.bias.detach().numpy()


@pytest.mark.parametrize('head', [True, False])
@pytest.mark.parametrize('layer', [None, 2])
def test_features_are_those_of_a_slow_loop_in_the_order_of_the_inputs(photos, tmp_path, capfd, head, layer):
    weights, model = write_weights(tmp_path / 'weights.pth', head)
    out = tmp_path / 'new' / 'out.npz'
    flags = [photos, '--features', out, '--batch_size=4', '--bad_images=skip'] + ['--layer=2'] * (layer is not None)
    assert predict(weights, *flags) == 0
    shown = capfd.readouterr()
    assert shown.out == '' and '11 images in' in shown.err and '1 left out; results in %s' % out in shown.err
    values, files = read(out)
    assert [os.path.relpath(name, photos) for name in files] == [
        os.path.join('0', '%02d.png' % index) for index in range(0, 11, 2)] + [
        os.path.join('1', '%02d.png' % index) for index in range(1, 11, 2)]
    assert values.dtype == np.float32 and values.shape == (11, 64 if layer is None else 128)
    for row, name in zip(values, files):
        assert np.allclose(row, slow_features(model, name, layer), atol=1e-4)
    assert os.listdir(str(tmp_path / 'new')) == ['out.npz']
    if head:  # predictions too
        assert predict(weights, *flags, '--output', tmp_path / 'out.csv') == 0
        assert len((tmp_path / 'out.csv').read_text().splitlines()) == 13 and np.array_equal(read(out)[0], values)
    else:
        assert predict(weights, *flags, '--output', tmp_path / 'out.csv') == 2
        assert 'it has no classification head' in capfd.readouterr().err


def test_two_processes_write_the_file_of_one(photos, tmp_path):
    weights, _ = write_weights(tmp_path / 'weights.pth')
    flags = [photos, '--bad_images=skip', '--batch_size=4', '--layer=4']
    torch.set_num_threads(1)
    assert predict(weights, *flags, '--features', tmp_path / 'one.npz') == 0
    port = str(free_port())
    running = [subprocess.Popen(
        [sys.executable, os.path.join(ROOT, 'run_predict.py'), '--num_workers=0', '--device=cpu', '--resume', weights,
         '--model=beit_nano_patch8_32', '--features', str(tmp_path / 'two.npz')] + flags, stderr=subprocess.PIPE,
        env=dict(os.environ, RANK=str(rank), WORLD_SIZE='2', LOCAL_RANK=str(rank), MASTER_ADDR='127.0.0.1',
                 MASTER_PORT=port, OMP_NUM_THREADS='1')) for rank in range(2)]
    outputs = [process.communicate(timeout=120) for process in running]
    assert [process.returncode for process in running] == [0, 0], outputs
    assert (tmp_path / 'two.npz').read_bytes() == (tmp_path / 'one.npz').read_bytes()


def test_the_memory_does_not_grow_with_the_images(tmp_path):
    """30 MB of features and 2.4 MB of names take less than 3 MB of memory."""
    row, = features.encode_features(torch.arange(768.)[None])
    tracemalloc.start()
    with open(str(tmp_path / 'out.npz'), 'wb') as file:
        writer = features.FeaturesWriter(file)
        for number in range(10000):
            writer.write(Prediction(number, 'folder/image %d \udcff\n.png' % number, [], [], features=row))
        writer.end()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    values, files = read(tmp_path / 'out.npz')
    assert values.shape == (10000, 768) and values[9999].tolist() == list(range(768))
    assert files[9999] == 'folder/image 9999 \udcff\n.png'
    assert peak < 3e6 < os.path.getsize(str(tmp_path / 'out.npz'))


@pytest.mark.parametrize('flags, says', [
    (['--layer=2'], '--layer 2 needs --features'), (['--features=out.csv'], '--features out.csv: give a file that'),
    (['--features=out.npz', '--layer=5'], '--layer 5: the model has blocks 1 to 4')])
def test_mistakes(photos, tmp_path, monkeypatch, capfd, flags, says):
    weights, _ = write_weights(tmp_path / 'weights.pth')
    monkeypatch.chdir(str(tmp_path))
    assert predict(weights, photos, *flags) == 2
    assert says in capfd.readouterr().err.splitlines()[-1] and not os.path.exists('out.npz')


def test_a_failure_leaves_the_earlier_file(photos, tmp_path, capfd):
    weights, _ = write_weights(tmp_path / 'weights.pth')
    (tmp_path / 'out.npz').write_text('from before')
    assert predict(weights, photos, '--features', tmp_path / 'out.npz') == 2
    assert '05.png: cannot be read' in capfd.readouterr().err.splitlines()[-1]
    assert (tmp_path / 'out.npz').read_text() == 'from before'
    assert sorted(os.listdir(str(tmp_path))) == ['out.npz', 'photos', 'weights.pth']
