"""Every user error ends in one clear line and exit status 2, and loses no file.

Most cases call the program in this process, which takes milliseconds; a few start it as a user does.
"""

import functools
import os
import pickle
import signal
import sys
import time
import types
import warnings

import pytest
import torch
from timm.models import create_model

import run_class_finetuning
from beit.devices import accelerator, half_precision
from beit.errors import UserError, escape_text
from beit.files.atomic_write import check_writable
from flags import colour
from helpers import NANO, assert_one_line, cannot_run, launch, photo, write_images

pytestmark = pytest.mark.fast

SHORT = NANO + ['--batch_size=4', '--epochs=2', '--warmup_epochs=0']
EARLIER_RUN = {'log.txt': b'{"epoch": 0}\n', 'checkpoint-0.pth': b'not really weights'}


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    """A good data set of 16 + 8 images in two classes. Tests don't change it."""
    return write_images(tmp_path_factory.mktemp('good data'))


@pytest.fixture
def own_data(tmp_path):
    """A copy that a test may change."""
    return write_images(tmp_path / 'own data', train=4, val=2)


def contents(folder):
    """Every file below a folder, by path, with its bytes."""
    found = {}
    for place, _, names in os.walk(str(folder)):
        for name in names:
            with open(os.path.join(place, name), 'rb') as file:
                found[os.path.relpath(os.path.join(place, name), str(folder))] = file.read()
    return found


@pytest.fixture
def refused(capsys, tmp_path, data):
    """refused('--lr=x', says=['--lr', "'x'"]): the program refuses these flags with these words.

    The output folder holds an earlier run, which must not change. An error found only in training (late=True) may move
    it to a backup, but neither lose nor add a file.
    """
    output = tmp_path / 'results'
    output.mkdir()
    for name, content in EARLIER_RUN.items():
        (output / name).write_bytes(content)

    def check(*flags, says, base=True, late=False, adds=None):
        before = contents(tmp_path)
        capsys.readouterr()
        start = SHORT + ['--data_path', data, '--output_dir', str(output)] if base else []
        with warnings.catch_warnings(record=True) as printed:
            warnings.simplefilter('always')
            status = run_class_finetuning.run(start + list(flags))
        # pytest captures warnings; in a separate process they would be additional lines on stderr.
        assert [str(w.message) for w in printed if w.category in (UserWarning, FutureWarning, RuntimeWarning)] == []
        assert_one_line(status, *capsys.readouterr(), says=says)
        after = {path: content for path, content in contents(tmp_path).items()
                 if adds is None or os.path.basename(path) != adds}
        if late:
            assert sorted(after.values()) == sorted(before.values())
        else:
            assert after == before
    return check


def test_the_good_data_passes(data, tmp_path, capsys):
    """Otherwise the other tests could pass for a wrong reason."""
    assert run_class_finetuning.run(SHORT + ['--data_path', data, '--maxstep=1', '--output_dir',
                                             str(tmp_path / 'results')]) == 0
    out, err = capsys.readouterr()
    assert err == '' and 'Result: ' in out
    assert {'checkpoint-0-step1.pth', 'checkpoint-best.pth'} <= set(os.listdir(str(tmp_path / 'results')))


# ---- flags alone

@pytest.mark.parametrize('flags, says', [
    *[(['--data_path', path], ['--data_path', escape_text(path), 'no such file or folder'])
      for path in ('/does/not/exist', 'dat a', 'Demo', 'two\nlines')],
    (['--eval_data_path=/does/not/exist'], ['--eval_data_path', '/does/not/exist', 'no such file or folder']),
    (['--nb_classes=1000'], ['--nb_classes 1000', '2 classes', 'leave the flag out']),
    (['--batch_size=17'], ['--batch_size 17', '16 of the training set', 'lower']),
    (['--update_freq=5'], ['--update_freq 5', '20 images', '16 of the training set', 'lower']),
    (['--finetune=checkpoints/beit.pth'], ['--finetune checkpoints/beit.pth', 'checkpoints/README.md',
                                           'train from scratch with --finetune=']),
    *[(flags + ['beit_base_patch16_224_pt22k_ft22'], flags[-1:] + ['did you mean beit_base_patch16_224_pt22k_ft22k'])
      for flags in (['--finetune'], ['--eval', '--resume'])],
    (['--finetune=hf-hub:foo'], ['--finetune hf-hub:foo', 'did you mean hf-hub:owner/name?']),
    (['--eval', '--resume=x', '--real_labels=gone'], ['--real_labels gone', 'no such file; give a JSON list']),
    (['--finetune=http://localhost/w.pth'], ['http://localhost/w.pth', 'https://', 'fetch the file yourself']),
    (['--resume=./no_such_folder'], ['--resume ./no_such_folder', 'no such file or folder']),
    (['--eval', '--resume=./no_such_folder'], ['--resume ./no_such_folder', 'no such file or folder']),
    (['--eval'], ['--eval needs --resume', 'checkpoint']),
    *[(['--device', name], ['--device', repr(name), 'auto, npu, cuda or cpu'])
      for name in ('gpu', 'cuda:x', '', 'npu1')],
    *[(['--amp', '--opt-level', level, '--amp_dtype=float16'],
       ['--amp_dtype float16', 'bfloat16', 'leave the flag out']) for level in ('O1', 'O2')],
    (['train'], ["'train' is not a flag", '--data_path=']),
    (['--lr', '1e-4', '5'], ["'5' is not a flag"]),
    (['--lr'], ['--lr', 'expected one argument']),
    (['--cutmix_minmax', '0.1'], ['--cutmix_minmax', 'expected 2 arguments']),
    *[(['--seed=%d' % seed], ['--seed', str(seed)]) for seed in (2 ** 64, 10 ** 20)],
    *[(['--opt_betas'] + betas.split(), ['--opt_betas', betas, '2']) for betas in ('0.9', '0.9 0.99 0.999')],
    (['--opt=sgd', '--opt_betas', '0.9', '0.99'], ['--opt_betas 0.9 0.99', '--opt sgd', 'leave the flag out']),
    (['--cutmix_minmax', '0.9', '0.1'], ['--cutmix_minmax', '0.9', '0.1']),
    (['--cutmix_minmax', '0.5', '0.5'], ['--cutmix_minmax', '0.5']),
    *[(['--opt', opt, '--momentum=0'], ['--momentum', '--opt', '0']) for opt in ('sgd', 'nesterov')],
    *[(['--input_size=%d' % size], ['--input_size %d' % size, 'patch size 8'] + use)
      for size, use in ((36, ['32', '40']), (31, ['24', '32']), (4, ['8']))],
    (['--model=beit_base_patch16_224', '--input_size=225'], ['--input_size 225', 'patch size 16', '224', '240']),
    (['--warmup_epochs=3'], ['--warmup_epochs 3', '--epochs 2', '--warmup_epochs=2']),
    (['--warmup_steps=9'], ['--warmup_steps 9', '8 steps', 'lower it']),
    *[(['--batch_size=3'] + mix.split(), ['--batch_size 3', 'even'])
      for mix in ('--mixup=0.8', '--cutmix=1', '--cutmix_minmax 0.2 0.8', '--mixup=0.8 --mixup_mode=pair')],
    (['--resplit'], ['--resplit', 'leave it out']),
    (['--world_size=2'], ['--world_size 2', 'launcher', '--nproc_per_node=2']),
], ids=lambda value: ascii(' '.join(value)))
def test_flags_that_are_refused(refused, flags, says):
    refused(*flags, says=says)


# ---- data

def test_data_path_left_out(refused):
    refused(*SHORT, base=False, says=['--data_path is missing', 'train/ and val/', 'demo'])


def test_data_path_that_is_a_file(refused, data):
    path = os.path.join(data, 'train', 'cat', '0.png')
    refused('--data_path', path, says=['--data_path', path, 'a file'])


@pytest.mark.parametrize('split', ['train', 'val'])
def test_missing_split(refused, own_data, split):
    os.rename(os.path.join(own_data, split), os.path.join(own_data, 'other'))
    refused('--data_path', own_data, says=['--data_path', os.path.join(own_data, split), 'one folder of images per'])


def test_missing_val_for_evaluation(refused, own_data, weights):
    os.rename(os.path.join(own_data, 'val'), os.path.join(own_data, 'other'))
    refused('--data_path', own_data, '--eval', '--resume', weights['good'],
            says=['--data_path', os.path.join(own_data, 'val')])


@pytest.mark.parametrize('split', ['train', 'val'])
@pytest.mark.parametrize('left', ['nothing', 'a text file'])
def test_class_folder_without_images(refused, own_data, split, left):
    folder = os.path.join(own_data, split, 'bird')
    os.mkdir(folder)
    if left != 'nothing':
        with open(os.path.join(folder, 'notes.txt'), 'w', encoding='utf-8') as file:
            file.write('no picture')
    refused('--data_path', own_data, says=['--data_path', folder, 'no image', 'add images or remove the folder'])


def test_no_image_in_any_class_folder(refused, tmp_path):
    for name in ('train/cat', 'train/dog', 'val/cat', 'val/dog'):
        os.makedirs(str(tmp_path / 'd' / name))
    refused('--data_path', str(tmp_path / 'd'), says=['--data_path', str(tmp_path / 'd' / 'train' / 'cat'), 'no image'])


def test_no_class_folders(refused, tmp_path):
    for split in ('train', 'val'):
        os.makedirs(str(tmp_path / 'd' / split))
        photo(1, 32, 32).save(str(tmp_path / 'd' / split / 'a.png'))
    refused('--data_path', str(tmp_path / 'd'), says=[
        '--data_path', str(tmp_path / 'd' / 'train'), 'no class folders'])


def test_classes_that_differ(refused, own_data):
    os.rename(os.path.join(own_data, 'val', 'dog'), os.path.join(own_data, 'val', 'wolf'))
    refused('--data_path', own_data, says=['same classes', 'only in train: dog', 'only in val: wolf'])
    refused('--data_path', own_data, '--eval_data_path', own_data + '/val', says=[
        '--eval_data_path %s/val: its classes' % own_data, 'only in train: dog', 'only --eval --resume takes a part'])


def test_image_folder_without_eval_data_path(refused, data):
    refused('--data_set=image_folder', '--data_path', os.path.join(data, 'train'),
            says=['--data_set image_folder', '--eval_data_path'])


def test_cifar_without_its_archive(refused, data):
    refused('--data_set=CIFAR', says=['--data_path', data, 'cifar-100-python', 'unpack'])


@pytest.mark.parametrize('size', [(48, 40), (24, 24)])
def test_unresized_images_of_another_size(refused, tmp_path, size):
    """Up to 32 pixels the evaluation doesn't resize, so images must have that size."""
    root = write_images(tmp_path / 'd', train=4, val=2, size=size)
    refused('--data_path', root, late=True, says=[os.path.join(root, ''), '32', '%dx%d' % size, '--input_size'])


def test_unresized_images_of_many_sizes(refused, own_data):
    photo(9, 40, 44).save(os.path.join(own_data, 'val', 'cat', '1.png'))
    refused('--data_path', own_data, late=True,
            says=[os.path.join(own_data, 'val', 'cat', '1.png'), '40x44', '--input_size'])


def test_training_images_too_small_to_crop(refused, own_data):
    for name in os.listdir(os.path.join(own_data, 'train', 'cat')):
        photo(9, 8, 8).save(os.path.join(own_data, 'train', 'cat', name))
    refused('--data_path', own_data, late=True,
            says=[os.path.join(own_data, 'train', 'cat', ''), '8x8', '--input_size'])


def corrupt(own_data, split):
    path = os.path.join(own_data, split, 'cat', '1.png')
    with open(path, 'rb') as file:
        content = file.read()
    with open(path, 'wb') as file:
        file.write(content[:len(content) // 2])
    return path


@pytest.mark.parametrize('split', ['train', 'val'])
def test_corrupt_image(refused, own_data, split):
    path = corrupt(own_data, split)
    refused('--data_path', own_data, '--no_save_ckpt', late=True, says=[path, 'cannot be read', '--bad_images skip'])


@pytest.mark.slow
def test_corrupt_image_in_a_worker(program, own_data, tmp_path):
    path = corrupt(own_data, 'train')
    status, out, err = program(*SHORT, '--data_path', own_data, '--num_workers=2', '--output_dir', str(tmp_path / 'o'))
    assert_one_line(status, out, err, [path, 'cannot be read', '--bad_images skip'])
    assert contents(tmp_path / 'o') == {}


# ---- weights

@pytest.fixture(scope='module')
def weights(tmp_path_factory):
    """weights('good.pth'): files with valid and invalid weights."""
    folder = tmp_path_factory.mktemp('weights')
    model = create_model('beit_nano_patch8_32', num_classes=2, img_size=32)
    narrow = create_model('beit_nano_patch8_32', num_classes=2, img_size=32, embed_dim=32)
    path = {name: str(folder / (name + '.pth')) for name in (
        'good', 'narrow', 'other', 'truncated', 'text', 'empty', 'zip', 'list', 'no weights')}
    torch.save({'model': model.state_dict()}, path['good'])
    torch.save({'model': narrow.state_dict(), 'args': {'model': 'beit_small', 'input_size': 32}}, path['narrow'])
    torch.save({'conv1.weight': torch.zeros(64, 3, 7, 7), 'fc.bias': torch.zeros(1000)}, path['other'])
    with open(path['good'], 'rb') as file:
        content = file.read()
    for name, data in (('truncated', content[:len(content) // 2]), ('text', b'hello, world\n'), ('empty', b''),
                       ('zip', b'PK\x03\x04' + bytes(range(200)))):
        with open(path[name], 'wb') as file:
            file.write(data)
    torch.save([1, 2, 3], path['list'])
    torch.save({'model': {}, 'note': 'nothing here'}, path['no weights'])
    return path


def test_good_weights_are_taken(weights, data, capsys):
    assert run_class_finetuning.run(SHORT + ['--data_path', data, '--finetune', weights['good'], '--maxstep=1']) == 0
    assert 'Loaded ' in capsys.readouterr().out


def test_folder_instead_of_weights(refused, tmp_path):
    refused('--finetune', str(tmp_path), says=['--finetune', str(tmp_path)])


@pytest.mark.parametrize('flags', [['--finetune'], ['--resume'], ['--eval', '--resume']], ids=' '.join)
@pytest.mark.parametrize('name, says', [
    *[(name, ['not a weights file', 'again']) for name in ('truncated', 'text', 'empty', 'zip')],
    *[(name, ['FLAG']) for name in ('list', 'no weights')],
    ('narrow', ['FLAG', 'not the weights of this', 'more',
                'patch_embed.proj.weight is (32, 3, 8, 8) in the file and (64, 3, 8, 8) in the model']),
    ('other', ['FLAG', 'patch_embed.proj.weight', 'the file'])])
def test_wrong_weights(refused, weights, flags, name, says):
    refused(*flags, weights[name], says=[weights[name]] + [word.replace('FLAG', flags[-1]) for word in says])


def test_the_flags_that_a_checkpoint_was_trained_with_are_named(refused, weights):
    refused('--resume', weights['narrow'], says=['--model beit_small', '--input_size 32'])


def test_model_key_and_prefix_that_are_not_in_the_file(refused, weights):
    refused('--finetune', weights['good'], '--model_prefix=encoder.', says=[
        weights['good'], "'encoder.'", '--model_prefix'])
    refused('--finetune', weights['good'], '--model_key=teacher', says=[weights['good'], 'no weights'])


class Malicious:
    """Makes a folder when it is unpickled."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (self.marker,)


@pytest.mark.parametrize('flags', [['--finetune'], ['--resume'], ['--eval', '--resume'], ['--auto_resume']],
                         ids=' '.join)
@pytest.mark.parametrize('save', [
    torch.save, functools.partial(torch.save, _use_new_zipfile_serialization=False), pickle.dump],
    ids=['torch.save', 'old torch.save', 'plain pickle'])
def test_weights_that_carry_a_program(refused, tmp_path, flags, save):
    marker = str(tmp_path / 'it ran')
    path = str(tmp_path / 'results' / 'checkpoint-1.pth')
    with open(path, 'wb') as file:
        save({'model': {'head.weight': Malicious(marker)}}, file)
    refused(*(flags if flags == ['--auto_resume'] else flags + [path]), says=[path, 'refers to', 'mkdir'])
    assert not os.path.exists(marker)


def test_resume_folder_without_checkpoints(refused, data):
    refused('--resume', data, says=['--resume', data, 'no checkpoint-<epoch>.pth', 'checkpoint-best.pth'])


def test_auto_resume_of_a_damaged_checkpoint(refused, tmp_path):
    refused('--auto_resume', says=[str(tmp_path / 'results' / 'checkpoint-0.pth'), 'not a weights file'])


# ---- device

@pytest.fixture
def fresh_devices():
    """Clear the cached NPU detection before and after this test."""
    accelerator.npu_problem.cache_clear()
    yield
    accelerator.npu_problem.cache_clear()


def without(monkeypatch, *packages):
    """Hide these packages."""
    find_spec = accelerator.importlib.util.find_spec
    monkeypatch.setattr(accelerator.importlib.util, 'find_spec',
                        lambda name: None if name in packages else find_spec(name))


def test_npu_without_torch_npu(refused, monkeypatch, fresh_devices):
    without(monkeypatch, 'torch_npu')
    monkeypatch.delattr(torch, 'npu', raising=False)
    for flag in ('--device=npu', '--device=npu:1'):
        refused(flag, says=[flag.replace('=', ' '), 'torch_npu is not installed', '--device cuda or cpu'])
    refused('--cann_prof', says=['--cann_prof', 'torch_npu is not installed'])


def test_torch_npu_that_sees_no_npu(refused, monkeypatch, fresh_devices):
    monkeypatch.setattr(torch, 'npu', types.SimpleNamespace(is_available=lambda: False), raising=False)
    refused('--device=npu', says=['--device npu', 'sees no NPU', 'npu-smi'])


@pytest.mark.slow
def test_npu_without_cann(program, data, tmp_path):
    """torch_npu is installed as a package that torch loads automatically, but CANN's libraries are missing."""
    if hasattr(torch, 'npu'):
        cannot_run('current', 'this PyTorch has NPUs built in: no torch_npu without CANN')
    site = tmp_path / 'site'
    (site / 'torch_npu').mkdir(parents=True)
    (site / 'torch_npu' / '__init__.py').write_text(
        "raise ImportError('libhccl.so: cannot open shared object file: No such file or directory')\n")
    (site / 'torch_npu-2.0.dist-info').mkdir()
    (site / 'torch_npu-2.0.dist-info' / 'METADATA').write_text('Metadata-Version: 2.1\nName: torch_npu\nVersion: 2.0\n')
    (site / 'torch_npu-2.0.dist-info' / 'entry_points.txt').write_text(
        '[torch.backends]\ntorch_npu = torch_npu:_autoload\n')
    status, out, err = program(*SHORT, '--data_path', data, '--device=npu', env={'PYTHONPATH': str(site)})
    assert_one_line(status, out, err, ['--device npu', 'CANN', 'libhccl.so', 'source test/env_npu.sh'])
    assert out == ''


def test_cuda_without_cuda(refused, monkeypatch):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    for flag in ('--device=cuda', '--device=cuda:1'):
        refused(flag, says=[flag.replace('=', ' '), 'CUDA', '--device cpu'])


def test_more_devices_than_there_are(refused, monkeypatch):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: 2)
    refused('--device=cuda:7', says=['--device cuda:7', 'there are 2'])


# ---- precision

def test_o2_on_a_pytorch_that_cannot(refused, monkeypatch):
    monkeypatch.setattr(half_precision, '_half_precision_problem', lambda device, dtype: 'no LayerNorm for BFloat16')
    refused('--amp', '--opt-level=O2', says=['--opt-level O2', 'bfloat16', 'no LayerNorm for BFloat16',
                                             'leave --amp out'])


def test_o1_without_autocast(refused, monkeypatch):
    monkeypatch.setattr(half_precision, 'has_autocast', lambda device_type, dtype: False)
    refused('--amp', '--opt-level=O1', says=['--opt-level O1', 'no autocast', 'leave --amp out'])


# ---- names

@pytest.mark.parametrize('flag, value, near', [
    ('--model', 'beit_base_patch16_244', ['beit_base_patch16_224']),
    ('--model', 'beit_huge', ['beit_']),
    ('--model', 'resnet50', ['beit_base_patch16_224', 'beit_nano_patch8_32']),
    ('--opt', 'adamv', ['adam']),
    ('--opt', 'AdmaW', ['adamw']),
    ('--opt', 'sgdm', ['sgd']),
    ('--opt', 'lookahead_adma', ['lookahead_adamw']),
    ('--data_set', 'IMNT', ['IMNET']),
    ('--data_set', 'imnet', ['IMNET']),
    ('--data_set', 'IMAGENET', ['IMNET']),
    ('--data_set', 'Cifar', ['CIFAR']),
    ('--data_set', 'cifar100', ['CIFAR']),
    ('--data_set', 'imagefolder', ['image_folder']),
    ('--aa', 'rand-m9-mstd0.5-inc1-z3', ['rand-m9-mstd0.5-inc1']),
    ('--aa', 'orignal', ['original']),
    ('--aa', 'augmx-m3-w3', ['augmix-m3-w3']),
    ('--aa', 'autoaugment', ['rand-m9-mstd0.5-inc1', 'none']),
    ('--remode', 'pixl', ['pixel']),
    ('--train_interpolation', 'cubic', ['bicubic']),
    ('--mixup_mode', 'batches', ['batch']),
    ('--opt-level', 'O3', ['O1', 'O2']),
    ('--opt_level', '2', ['O1', 'O2']),
    ('--amp_dtype', 'fp16', ['float16']),
])
def test_unknown_name(refused, flag, value, near):
    refused('%s=%s' % (flag, value), says=[flag.replace('-level', '_level'), repr(value)] + near)


@pytest.mark.parametrize('name, needs', [('npufusedadamw', 'torch_npu'), ('fusedlamb', 'apex'), ('fusedadamw', 'apex')])
def test_optimizer_without_its_library(refused, monkeypatch, name, needs):
    without(monkeypatch, 'torch_npu', 'apex')
    refused('--opt', name, says=['--opt ' + name, needs, 'not installed', '--opt adamw'])


@pytest.mark.parametrize('flag, near', [
    ('--epoch=3x', '--epochs'), ('--batchsize=3', '--batch_size'), ('--data-pth=x', '--data_path'),
    ('--learning_rate=1', '--'), ('--warmup_epoch=2', '--warmup_epochs'), ('--opt_leve=O1', '--opt_level'),
    ('--no_amp2', '--'), ('-x', '--help'), ('-lr=3', '--lr')])
def test_unknown_flag(refused, flag, near):
    refused(flag, says=[flag.partition('=')[0].replace('-pth', '_pth') + ': unknown flag', near])


# ---- numbers

def numeric_flags():
    """(flag, how many values it takes) for every flag of the parser that takes numbers."""
    return sorted((action.option_strings[0], action.nargs) for action in run_class_finetuning.build_parser()._actions
                  if action.type not in (None, str, colour))


def with_value(flag, nargs, value):
    return [flag, '0.5', value] if nargs == 2 else [flag, value] if nargs else ['%s=%s' % (flag, value)]


def test_every_flag_with_a_number_checks_it():
    typed = {flag for flag, _ in numeric_flags()}
    for action in run_class_finetuning.build_parser()._actions:
        if isinstance(action.default, (int, float)) and not isinstance(action.default, bool):
            assert action.option_strings[0] in typed
    assert {'--clip_grad', '--weight_decay_end', '--crop_pct', '--opt_betas', '--loss_scale'} < typed
    assert len(typed) > 40


@pytest.mark.parametrize('value', ['nan', 'inf', '1e999', 'three', '', '1,5', '-2'])
@pytest.mark.parametrize('flag, nargs', numeric_flags())
def test_not_a_sensible_number(refused, flag, nargs, value):
    refused(*with_value(flag, nargs, value), says=[flag, value])


@pytest.mark.parametrize('flag', [
    '--batch_size', '--epochs', '--update_freq', '--save_ckpt_freq', '--input_size', '--opt_eps', '--layer_decay',
    '--crop_pct', '--recount', '--world_size', '--loss_scale'])
def test_zero_where_it_makes_no_sense(refused, flag):
    refused(flag + '=0', says=[flag, 'got 0', 'at least 1' if flag not in (
        '--opt_eps', '--layer_decay', '--crop_pct', '--loss_scale') else 'above 0'])


BELOW_ONE = ('--drop', '--attn_drop_rate', '--drop_path', '--smoothing', '--momentum', '--opt_betas')
AT_MOST_ONE = ('--hflip', '--reprob', '--mixup_prob', '--mixup_switch_prob', '--model_ema_decay', '--layer_decay',
               '--crop_pct')


@pytest.mark.parametrize('flag, value', [(flag, '1') for flag in BELOW_ONE] + [(flag, '1.5') for flag in AT_MOST_ONE])
def test_shares_above_one(refused, flag, value):
    refused('%s=%s' % (flag, value), says=[flag, 'at most', 'got ' + value])


@pytest.mark.parametrize('flag', [
    '--batch_size', '--epochs', '--update_freq', '--save_ckpt_freq', '--seed', '--maxstep', '--num_workers',
    '--input_size', '--warmup_epochs', '--warmup_steps', '--nb_classes', '--recount', '--start_epoch'])
@pytest.mark.parametrize('value', ['1.5', '1e3'])
def test_fractions_where_a_whole_number_is_meant(refused, flag, value):
    refused('%s=%s' % (flag, value), says=[flag, repr(value), 'not a whole number'])


def test_open_mpi_without_mpirun(refused, monkeypatch):
    monkeypatch.delenv('OMPI_COMM_WORLD_RANK', raising=False)
    refused('--dist_on_itp', says=['--dist_on_itp', 'OMPI_COMM_WORLD_RANK', 'mpirun'])


def test_loss_that_is_not_finite(refused):
    refused('--init_scale=1e300', '--no_save_ckpt', late=True, adds='nonfinite.txt',
            says=['the loss is', 'update step 0', '--lr'])


# ---- output

@pytest.mark.parametrize('flag', ['--output_dir', '--log_dir'])
def test_output_that_is_a_file_or_under_one(refused, tmp_path, flag):
    (tmp_path / 'a file').write_text('mine')
    for folder in (tmp_path / 'a file', tmp_path / 'a file' / 'deeper' / 'still'):
        refused(flag, str(folder), says=[flag, str(folder), 'a file, not a folder', 'choose another'])


@pytest.mark.parametrize('flag', ['--output_dir', '--log_dir'])
def test_output_that_cannot_be_written(refused, tmp_path, flag):
    folder = tmp_path / 'locked'
    folder.mkdir()
    folder.chmod(0o555)
    if os.access(str(folder), os.W_OK):  # root may write anywhere except in pseudo file systems
        folder = type(folder)('/proc')
        if not folder.is_dir():
            cannot_run('linux', 'root can write to every folder here')
    refused(flag, str(folder / 'results'), says=[flag, str(folder / 'results'), 'cannot be written', 'choose another'])


def test_images_that_a_small_input_does_not_fit_are_found_before_training(refused, image_folder, monkeypatch):
    monkeypatch.setattr(run_class_finetuning, 'train', lambda *_: pytest.fail('training began'))
    refused('--data_path', image_folder(size=(40, 50)), says=['is 40x50', '--input_size of 32', 'are not resized'])


def test_the_write_check_leaves_no_file_even_when_killed(monkeypatch, tmp_path):
    try:
        os.close(os.open(str(tmp_path), os.O_TMPFILE | os.O_RDWR))
    except (AttributeError, OSError):
        cannot_run('linux', 'every file has a name here')
    for name in ('remove', 'unlink'):
        monkeypatch.setattr(os, name, lambda *_: pytest.fail('the file had a name'))
    check_writable('--output_dir', str(tmp_path / 'new' / 'er'))
    assert os.listdir(str(tmp_path)) == []


def test_log_dir_without_tensorboardx(refused, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, 'tensorboardX', None)
    refused('--log_dir', str(tmp_path / 'tb'), late=True, says=['--log_dir', '-m pip install tensorboardX'])


# ---- several processes

def test_fewer_devices_than_processes(refused, monkeypatch):
    """Only some processes have no device, but all detect it; one reports it."""
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: 2)
    monkeypatch.setenv('LOCAL_WORLD_SIZE', '8')
    refused('--device=cuda', says=['--device cuda', 'there are 2', '--nproc_per_node'])


@pytest.mark.parametrize('flags, says', [
    (['--batch_size=many'], ['--batch_size', "'many'"]), (['--model=beit'], ['--model', "'beit'"])], ids=str)
def test_an_error_of_all_processes_is_reported_by_one(tmp_path, data, flags, says):
    status, out, err = launch(2, '--data_path', data, '--output_dir', str(tmp_path / 'o'), *flags, preset=())
    assert_one_line(status, out, err, says)
    assert out == '' and not (tmp_path / 'o').exists()


def test_an_index_for_several_processes(monkeypatch):
    from beit.devices import accelerator
    monkeypatch.setitem(accelerator._PROBLEM, 'cuda', lambda: None)
    with pytest.raises(UserError, match='--device cuda:1: 2 processes need a device each'):
        accelerator.find_device('cuda:1', 0, processes=2)


def test_an_unusable_npu_is_reported(monkeypatch, tmp_path):
    import importlib.util

    import torch

    from beit.devices import accelerator
    monkeypatch.setattr(importlib.util, 'find_spec', lambda name: name == 'torch_npu' or None)
    monkeypatch.setattr(accelerator, 'npu_problem', lambda: 'CANN is not set up')
    assert accelerator.npu_unused_reason('auto', torch.device('cpu')) == 'Not using an NPU: CANN is not set up\n'
    assert accelerator.npu_unused_reason('cpu', torch.device('cpu')) == ''


def test_interrupted(monkeypatch, capsys):
    def interrupt(args, signals):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(10)

    monkeypatch.setattr(run_class_finetuning, 'main', interrupt)
    assert run_class_finetuning.run([]) == 130
    assert capsys.readouterr().err.count('\n') == 1
