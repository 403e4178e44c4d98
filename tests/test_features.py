"""Features of run_predict.py, the linear probe and the neighbours of run_linear_eval.py, against NumPy and sklearn."""

import csv
import glob
import os
import re
import shutil
import subprocess
import sys
import tracemalloc

import numpy as np
import pytest
import torch
from PIL import Image

import average_checkpoints
import engine_for_finetuning as engine
import flags
import modeling_finetune
import run_linear_eval
import run_predict
from beit.files import weights_file
from beit.outputs import features
from beit.outputs.prediction_writers import Prediction
from beit.training import losses, metrics
from helpers import CPU, LAUNCHER, NANO, ROOT, free_port, photo, python
from trajectory import Batches


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
    (['--features=out.npz', '--layer=5'], '--layer 5: the model has blocks 1 to 4'),
    (['--features=out.npz', '--threshold=0.5'], '--threshold 0.5: --features alone writes no predictions'),
    (['--features=out.npz', '--top_k=1'], '--top_k 1: --features alone'),
    (['--features=out.npz', '--class_names=x'], '--class_names')])
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


# ---- the linear probe

def read_csv(path):
    with open(str(path), encoding='utf-8') as file:
        return [{name: float(value) for name, value in row.items()} for row in csv.DictReader(file)]


def probe(output, *flags):
    return NANO + ['--output_dir', str(output), '--batch_size=8', '--lr=0.02', '--epochs=2'] + list(map(str, flags))


@pytest.fixture(scope='module')
def digits(tmp_path_factory):
    """(class folders with 96 training and 60 validation digits of four classes, weights without a head)."""
    from sklearn import datasets as sklearn_datasets
    root, known = tmp_path_factory.mktemp('digits'), sklearn_datasets.load_digits(n_class=4)
    for index in range(156):
        folder = root / 'data' / ('train' if index < 96 else 'val') / ('class_%d' % known.target[index])
        folder.mkdir(parents=True, exist_ok=True)
        pixels = np.uint8(known.images[index] * 15.9)
        Image.fromarray(pixels).resize((32, 32), Image.NEAREST).convert('RGB').save(str(folder / ('%03d.png' % index)))
    return str(root / 'data'), write_weights(root / 'weights.pth', head=False)[0]


def features_of(digits, folder, split, layer):
    """(features of a layer by run_predict.py, labels)."""
    out = os.path.join(str(folder), '%s-%d.npz' % (split, layer))
    assert predict(digits[1], os.path.join(digits[0], split), '--features', out, '--layer', layer) == 0
    values, files = read(out)
    return values.astype(np.float64), np.array([int(re.search(r'class_(\d)', name).group(1)) for name in files])


def test_heads_reach_the_losses_of_logistic_regressions_on_the_same_features():
    linear_model = pytest.importorskip('sklearn.linear_model')
    torch.manual_seed(0)
    model = modeling_finetune.VisionTransformer(img_size=16, patch_size=8, embed_dim=2, depth=3, num_heads=1,
                                                num_classes=3, use_rel_pos_bias=True)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    images, targets = torch.randn(240, 3, 16, 16), torch.randint(0, 3, (240,))
    images[:, 0] += targets.view(-1, 1, 1) * 0.7
    model.probe_layers(3)
    model.freeze_backbone()
    optimizer = torch.optim.Adam([each for each in model.parameters() if each.requires_grad])
    rates = 0.4 * (1 + np.cos(np.linspace(0, np.pi, 600))) / 2
    stats = engine.train_one_epoch(model, losses.sum_over_layers(torch.nn.CrossEntropyLoss()),
                                   Batches([(images, targets)] * 600), optimizer, CPU, 0, lr_schedule_values=rates)
    assert 'class_acc' not in stats
    found = engine.evaluate(Batches([(images, targets)]), model, CPU, metrics=[metrics.OfLayers(
        [[metrics.TopAccuracy(), metrics.Loss()] for _ in range(3)])])
    hooked = []
    for block in model.blocks:
        block.register_forward_hook(lambda _, __, tokens: hooked.append(tokens.double().numpy()))
    with torch.no_grad():
        model(images)
    rows = list(found['layers'].values())
    assert len({round(row['loss'], 2) for row in rows}) > 1
    for tokens, row in zip(hooked, rows):
        inputs = np.concatenate((tokens[:, 0], tokens[:, 1:].mean(1)), 1)
        oracle = linear_model.LogisticRegression(C=1e6, max_iter=3000).fit(inputs, targets.numpy())
        chances = oracle.predict_proba(inputs)[np.arange(240), targets.numpy()]
        assert row['loss'] == pytest.approx(-np.log(chances).mean(), abs=5e-3)
        assert row['acc1'] == pytest.approx(100 * oracle.score(inputs, targets.numpy()), abs=4)
    best = max(range(3), key=lambda layer: rows[layer]['acc1'])
    assert (found['acc1'], found['loss'], found['best_layer']) == (rows[best]['acc1'], rows[best]['loss'], best + 1)


def test_accuracies_of_heads_and_neighbours_by_numpy_and_sklearn(digits, tmp_path, capfd):
    neighbors = pytest.importorskip('sklearn.neighbors')
    data, weights = digits
    assert run_linear_eval.run(probe(tmp_path / 'out', '--finetune', weights, '--data_path', data, '--knn=20',
                                     '--save_ckpt_freq=1')) == 0
    assert 'Results: %s' % (tmp_path / 'out' / 'linear_eval.csv') in capfd.readouterr().out
    rows = read_csv(tmp_path / 'out' / 'linear_eval.csv')
    states = [torch.load(str(tmp_path / 'out' / ('checkpoint-%d.pth' % epoch)))['model'] for epoch in (0, 1)]
    assert [row['layer'] for row in rows] == [1, 2, 3, 4] and len({row['acc1'] for row in rows}) > 1
    for layer, row in enumerate(rows, 1):
        train, train_labels = features_of(digits, tmp_path, 'train', layer)
        val, labels = features_of(digits, tmp_path, 'val', layer)
        right = []
        for state in states:
            logits = val @ state['head.%d.weight' % (layer - 1)].numpy().T + state['head.%d.bias' % (layer - 1)].numpy()
            right.append(100 * (logits.argmax(1) == labels).mean())
        assert row['acc1'] == pytest.approx(right[1]) and row['best_acc1'] == pytest.approx(max(right))
        oracle = neighbors.KNeighborsClassifier(20, metric='cosine', algorithm='brute',
                                                weights=lambda distance: np.exp((1 - distance) / 0.07))
        assert row['knn20_acc1'] == pytest.approx(100 * oracle.fit(train, train_labels).score(val, labels))
        assert row['knn20_acc1'] > 30
    before = weights_file.load_weights_file(weights, '')['model']
    for name, value in before.items():  # the backbone stays
        if not name.endswith('relative_position_index'):
            assert torch.equal(states[1][name], value), name
    for program, words in ((run_predict, ['--resume', str(tmp_path / 'out'), data]), (average_checkpoints, [
            '--inputs', str(tmp_path / 'out'), '--output', str(tmp_path / 'average.pth')])):
        assert program.run(words) == 2
        assert 'one classifier per layer' in capfd.readouterr().err.splitlines()[-1]
    assert not (tmp_path / 'average.pth').exists()


def test_a_stopped_probe_resumes_to_the_same_figures_on_two_processes_too(digits, tmp_path, capfd):
    data, weights = digits
    flags = ['--finetune', weights, '--data_path', data, '--knn=20', '--hflip=0.5']
    assert run_linear_eval.run(probe(tmp_path / 'whole', *flags)) == 0
    assert run_linear_eval.run(probe(tmp_path / 'parts', '--maxstep=7', *flags)) == 0
    capfd.readouterr()
    config = ['--config', str(tmp_path / 'parts' / 'args.yaml'), '--auto_resume', '--maxstep=0']
    assert run_linear_eval.run(config) == 0
    assert 'Resumes exactly as if it had not been stopped' in capfd.readouterr().out
    expected = (tmp_path / 'whole' / 'linear_eval.csv').read_text()
    assert (tmp_path / 'parts' / 'linear_eval.csv').read_text() == expected
    os.remove(str(tmp_path / 'parts' / 'linear_eval.csv'))
    assert run_linear_eval.run(config) == 0  # nothing is left to train
    assert (tmp_path / 'parts' / 'linear_eval.csv').read_text() == expected
    done = subprocess.run(
        [python()] + LAUNCHER + ['--nproc_per_node=2', os.path.join(ROOT, 'run_linear_eval.py')] + probe(
            tmp_path / 'two', '--batch_size=4', '--dist_eval', *flags), cwd=ROOT, timeout=240, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, env=dict(os.environ, OMP_NUM_THREADS='1', PYTHON_EXEC=python()))
    assert done.returncode == 0, done.stderr
    two, one = read_csv(tmp_path / 'two' / 'linear_eval.csv'), read_csv(tmp_path / 'whole' / 'linear_eval.csv')
    for mine, other in zip(two, one):
        assert mine == pytest.approx(other, rel=1e-5)


def test_csv_files_and_a_checkpoint_that_describes_itself(digits, tmp_path, capfd):
    """The architecture, the input size and the mean come from the checkpoint."""
    data, _ = digits
    for split in ('train', 'val'):
        names = sorted(glob.glob(os.path.join(data, split, '*', '*.png')))[::3]
        (tmp_path / (split + '.csv')).write_text('path,label\n' + ''.join(
            '%s,%s\n' % (name, os.path.basename(os.path.dirname(name))) for name in names))
    torch.manual_seed(0)
    model = modeling_finetune.beit_nano_patch8_32(num_classes=4, init_values=None, use_abs_pos_emb=True,
                                                  img_size=48, use_mean_pooling=False)
    args = dict(model='beit_nano_patch8_32', input_size=48, abs_pos_emb=True, rel_pos_bias=False,
                layer_scale_init_value=0., use_mean_pooling=False, imagenet_default_mean_and_std=True)
    weights_file.save(str(tmp_path / 'own.pth'), {'model': model.state_dict(), 'args': args})
    flags = ['--device=cpu', '--num_workers=0', '--no_curves', '--epochs=1', '--batch_size=8', '--finetune',
             str(tmp_path / 'own.pth'), '--train_csv', str(tmp_path / 'train.csv'), '--val_csv',
             str(tmp_path / 'val.csv'), '--output_dir', str(tmp_path / 'out')]
    assert run_linear_eval.run(flags) == 0
    assert 'input 48x48 (this model is for --input_size 32)\n' in capfd.readouterr().out
    assert len(read_csv(tmp_path / 'out' / 'linear_eval.csv')) == 4
    spec = torch.load(str(tmp_path / 'out' / 'checkpoint-0.pth'))['model_spec']
    assert spec['preprocessing']['mean'] == [0.485, 0.456, 0.406] and spec['architecture']['abs_pos_emb'] is True
    assert len(spec['classes']) == 4


@pytest.mark.parametrize('flags, says', [
    (['--finetune='], '--finetune is missing'), (['--output_dir='], '--output_dir is missing'),
    (['--recipe=beit_large_intermediate'], '--recipe beit_large_intermediate: it sets layer_decay, which '
     'run_linear_eval.py does not have; give beit_base_linear_probe'), (['--eval_data_path=PART'], '/part: its classes '
     'differ from the training folders (only in train: '),
    (['--knn=97'], '--knn 97: there are 96 training images'), (['--report'], '--report'),
    (['--freeze_backbone'], '--freeze_backbone: unknown flag'),
    (['--finetune=none.pth'], '--finetune none.pth: no such file; put the pretrained weights there, give a name that '
     'checkpoints/README.md lists')])
def test_mistakes_of_a_probe(digits, tmp_path, capfd, flags, says):
    part = tmp_path / 'part'
    shutil.copytree(os.path.join(digits[0], 'val'), str(part))
    shutil.rmtree(str(next(part.iterdir())))
    flags = [flag.replace('PART', str(part)) for flag in flags]
    assert run_linear_eval.run(probe(tmp_path / 'out', '--finetune', digits[1], '--data_path', digits[0], *flags)) == 2
    error = capfd.readouterr().err.splitlines()
    assert len(error) == 1 and error[0].startswith('run_linear_eval.py: error: ') and says in error[0]
    assert 'from scratch' not in error[0]
    assert not glob.glob(str(tmp_path / 'out' / '*.csv'))


def test_the_help_of_a_probe_names_the_required_flags():
    shown = {flag.name: flag.shown_default() for _, flag in flags.flags_of(flags.PROBE)}
    assert shown['finetune'] == shown['output_dir'] == 'required'


def test_the_published_recipe(tmp_path):
    args = run_linear_eval.build_parser().parse_args(['--recipe=beit_base_linear_probe'])
    assert (args.lr, args.finetune, args.model) == (0.004, 'beit_base_patch16_224_pt22k', 'beit_base_patch16_224')
