"""Weights files: resizing against recorded figures, reading without running code, atomic saving, exact resuming."""

import argparse
import errno
import os
import random
import threading

import numpy as np
import pytest
import torch

import modeling_finetune
import run_class_finetuning
import utils
from beit.checkpoint import discovery, pretrained, training_state
from beit.errors import UserError
from beit.files import weights_file
from beit.training.step_control import CheckpointMonitor
from helpers import RUN, lines_of

pytestmark = [pytest.mark.fast, pytest.mark.computes]


def nano(**options):
    torch.manual_seed(options.pop('seed', 0))
    options = dict(dict(num_classes=5, use_abs_pos_emb=False, use_rel_pos_bias=True, init_values=0.1), **options)
    return modeling_finetune.beit_nano_patch8_32(**options)


def randomised(model):
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.5)
    return model


def write_weights(tmp_path, content, name='weights.pth'):
    path = str(tmp_path / name)
    torch.save(content, path)
    return path


# ---- resizing

def test_bias_tables_are_resized_like_the_references(golden):
    recorded = golden('rel_pos_resize.npz')
    cases = [name[len('table_'):] for name in recorded.files if name.startswith('table_')]
    assert cases
    for case in cases:
        resized = pretrained.resize_rel_pos_bias(torch.from_numpy(recorded['table_' + case]), int(case.split('_')[1]))
        np.testing.assert_allclose(resized.numpy(), recorded['resized_' + case], rtol=0, atol=1e-5)


def test_a_table_of_the_same_size_is_unchanged():
    table = torch.randn(7 * 7 + 3, 2)
    assert torch.equal(pretrained.resize_rel_pos_bias(table, 7), table)
    with pytest.raises(ValueError, match=r'S\*S\+3'):
        pretrained.resize_rel_pos_bias(torch.randn(50, 2), 7)


def cubic(distance, a=-0.75):
    """The kernel of cubic convolution (Keys 1981), with PyTorch's parameter."""
    d = abs(distance)
    if d <= 1:
        return (a + 2) * d ** 3 - (a + 3) * d ** 2 + 1
    return a * d ** 3 - 5 * a * d ** 2 + 8 * a * d - 4 * a if d < 2 else 0.


def test_absolute_positions_by_a_slow_loop():
    positions = torch.randn(1, 17, 1)
    grid = positions[0, 1:, 0].reshape(4, 4)
    resized = pretrained.resize_pos_embed(positions, (6, 8))
    assert resized.shape == (1, 49, 1) and resized[0, 0] == positions[0, 0]
    for row in range(6):
        for column in range(8):
            y, x = (row + 0.5) * 4 / 6 - 0.5, (column + 0.5) * 4 / 8 - 0.5  # align_corners False
            expected = sum(
                cubic(y - i) * cubic(x - j) * float(grid[min(max(i, 0), 3), min(max(j, 0), 3)])
                for i in range(int(np.floor(y)) - 1, int(np.floor(y)) + 3)
                for j in range(int(np.floor(x)) - 1, int(np.floor(x)) + 3))
            assert float(resized[0, 1 + row * 8 + column, 0]) == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize('name, size', (('beit_base_patch16_224', 384), ('beit_large_patch16_224', 512)))
def test_weights_of_224_load_into_larger_inputs(tmp_path, name, size):
    # Only the position codes change, so two blocks are enough.
    config = dict(depth=2, use_rel_pos_bias=True, use_abs_pos_emb=True, init_values=0.1)
    source = randomised(getattr(modeling_finetune, name)(num_classes=7, **config))
    target = getattr(modeling_finetune, name)(num_classes=7, img_size=size, **config)
    pretrained.load_pretrained(target, write_weights(tmp_path, {'model': source.state_dict()}))
    grid = size // 16
    table = 'relative_position_bias_table'
    for index in range(2):
        mine, theirs = getattr(target.blocks[index].attn, table), getattr(source.blocks[index].attn, table)
        assert mine.shape == ((2 * grid - 1) ** 2 + 3, source.blocks[0].attn.num_heads)
        assert torch.equal(mine[-3:], theirs[-3:])
        centre = ((2 * grid - 1) ** 2) // 2
        assert torch.allclose(mine[centre], theirs[27 * 27 // 2], atol=1e-5)  # offset (0, 0) is a node of both
    assert torch.equal(target.blocks[1].mlp.fc1.weight, source.blocks[1].mlp.fc1.weight)
    assert torch.equal(target.head.weight, source.head.weight)


# ---- --finetune

def test_shared_table_goes_to_every_block_and_the_head_is_dropped(tmp_path, capsys):
    source = randomised(nano(use_rel_pos_bias=False, use_shared_rel_pos_bias=True, num_classes=9))
    target = nano()
    head = target.head.weight.detach().clone()
    state = dict(reversed(list(source.state_dict().items())))  # safetensors sorts them too
    pretrained.load_pretrained(target, write_weights(tmp_path, {'module': state}))
    for block in target.blocks:
        assert torch.equal(block.attn.relative_position_bias_table, source.rel_pos_bias.relative_position_bias_table)
    assert torch.equal(target.head.weight, head)
    out = capsys.readouterr().out
    assert 'Not loaded: head.weight, head.bias' in out


@pytest.mark.parametrize('wrap, options', (
    (lambda state: state, {}),
    (lambda state: {'model': state}, {}),
    (lambda state: {'module': state}, {}),
    (lambda state: {'ema': state, 'model': {}}, {'model_key': 'ema|model'}),
    (lambda state: {'module.' + name: value for name, value in state.items()}, {}),
    (lambda state: {'state_dict': state, 'arch': 'beit'}, {}),
    (lambda state: {'state_dict_ema': state, 'epoch': 3}, {}),
    (lambda state: {'model_ema': state}, {}),
    (lambda state: {'model': {'_orig_mod.' + name: value for name, value in state.items()}}, {}),
    (lambda state: {'state_dict': {'model.module.' + name: value for name, value in state.items()}}, {}),
    (lambda state: {'state_dict': {'module._orig_mod.model.' + name: value for name, value in state.items()}}, {}),
    (lambda state: {'optimizer': {}, **state}, {}),
    (lambda state: {'model': dict({'encoder.' + name: value for name, value in state.items()},
                                  other=torch.zeros(1))}, {'model_prefix': 'encoder.'})))
def test_where_the_weights_are_found(tmp_path, capsys, wrap, options):
    source, target = randomised(nano()), nano(seed=1)
    pretrained.load_pretrained(target, write_weights(tmp_path, wrap(source.state_dict())), **options)
    assert 'Not in the file' not in capsys.readouterr().out
    for name, value in source.state_dict().items():
        assert torch.equal(target.state_dict()[name], value), name


def test_missing_and_unused_names_are_reported(tmp_path, capsys):
    state = randomised(nano(use_mean_pooling=False)).state_dict()
    state['mask_token'] = torch.zeros(1, 1, 64)
    pretrained.load_pretrained(nano(), write_weights(tmp_path, state))
    out = capsys.readouterr().out
    assert 'Not in the file, left at their initial values: fc_norm.weight, fc_norm.bias' in out
    assert 'Unused names in the file: mask_token, norm.bias, norm.weight' in out
    assert 'relative_position_index' not in out


# ---- reading

@pytest.mark.parametrize('legacy', (False, True))
def test_checkpoints_of_the_reference_are_read(tmp_path, legacy):
    model = nano()
    args = argparse.Namespace(model='beit', lr=np.float64(1e-3), opt_betas=None, drop=0.0, sizes=[1, 2])
    path = str(tmp_path / 'reference.pth')
    torch.save({'model': model.state_dict(), 'optimizer': torch.optim.AdamW(model.parameters()).state_dict(),
                'epoch': 3, 'scaler': {'scale': 1.}, 'args': args, 'best': np.float64(81.5)}, path,
               _use_new_zipfile_serialization=not legacy)
    content = weights_file.load_weights_file(path)
    assert content['args'].model == 'beit' and content['best'] == 81.5 and content['epoch'] == 3
    assert torch.equal(content['model']['head.weight'], model.head.weight)


# ---- saving

def test_a_failed_save_leaves_the_older_file_whole(tmp_path, monkeypatch):
    path = str(tmp_path / 'checkpoint-best.pth')
    weights_file.save(path, {'epoch': 1})

    def half(content, file, **options):
        file.write(b'half')
        raise OSError(28, 'No space left on device')

    monkeypatch.setattr(torch, 'save', half)
    with pytest.raises(UserError, match='No space left on device.*earlier checkpoints are intact'):
        weights_file.save(path, {'epoch': 2})
    assert weights_file.load_weights_file(path) == {'epoch': 1}
    assert os.listdir(str(tmp_path)) == ['checkpoint-best.pth']


def test_a_temporary_file_is_new_and_not_a_link(tmp_path):
    """Another user's link of that name redirects no write; the file of a killed process is replaced."""
    path, other = str(tmp_path / 'checkpoint-0.pth'), str(tmp_path / 'other')
    temporary = '%s.tmp-%d' % (path, os.getpid())
    with open(other, 'w') as file, open(temporary, 'w') as stale:
        file.write('whole')
        stale.write('left by a process that was killed')
    weights_file.save(path, {'epoch': 1})
    assert weights_file.load_weights_file(path) == {'epoch': 1} and not os.path.exists(temporary)
    for target in (other, str(tmp_path / 'nowhere')):
        os.symlink(target, temporary)
        with pytest.raises(UserError, match=r'checkpoint-0\.pth.*exists'):
            weights_file.save(path, {'epoch': 2})
        os.remove(temporary)  # its target is unchanged
    assert sorted(os.listdir(str(tmp_path))) == ['checkpoint-0.pth', 'other']
    with open(other) as file:
        assert file.read() == 'whole' and weights_file.load_weights_file(path) == {'epoch': 1}


def test_a_folder_given_as_checkpoint(tmp_path):
    for name in ('checkpoint-2.pth', 'checkpoint-10.pth', 'checkpoint-best.pth'):
        weights_file.save(str(tmp_path / name), {})
    assert discovery.load_best_or_latest(str(tmp_path))[0].endswith('checkpoint-10.pth')
    assert discovery.load_best_or_latest(str(tmp_path), prefer_best=True)[0].endswith('checkpoint-best.pth')
    with pytest.raises(UserError, match='holds no checkpoint'):
        (tmp_path / 'empty').mkdir()
        discovery.load_best_or_latest(str(tmp_path / 'empty'))


# ---- resuming

FEATURES = ['--model_ema', '--model_ema_decay=0.9', '--model_ema_warmup', '--drop=0.1', '--drop_path=0.2',
            '--mixup=0.5', '--mixup_off_epoch=3', '--clip_grad=1',
            '--save_ckpt_freq=1', '--aa=rand-m9-mstd0.5-inc1']


@pytest.mark.parametrize('opt', ('adamw', 'sgd'))
def test_a_resumed_run_ends_where_an_unbroken_one_does(image_folder, tmp_path, opt):
    data = image_folder()
    base = RUN + FEATURES + ['--data_path=' + data, '--opt=' + opt, '--epochs=4']
    whole, broken = str(tmp_path / 'whole'), str(tmp_path / 'broken')
    assert run_class_finetuning.run(base + ['--output_dir=' + whole]) == 0
    assert run_class_finetuning.run(base + ['--output_dir=' + broken, '--maxstep=8']) == 0  # 4 updates an epoch
    assert run_class_finetuning.run(base + ['--output_dir=' + broken, '--auto_resume']) == 0
    expected = weights_file.load_weights_file(os.path.join(whole, 'checkpoint-3.pth'))
    found = weights_file.load_weights_file(os.path.join(broken, 'checkpoint-3.pth'))
    for key in ('model', 'model_ema'):
        for name, value in expected[key].items():
            assert torch.equal(value, found[key][name]), (key, name)
    assert expected['accuracy'] == found['accuracy']
    assert lines_of(whole) == lines_of(broken)


def test_the_best_checkpoint_can_be_evaluated_and_resumed(image_folder, tmp_path, capsys):
    data, output = image_folder(), str(tmp_path / 'out')
    base = RUN + ['--data_path=' + data, '--model_ema', '--model_ema_decay=0.5']
    assert run_class_finetuning.run(base + ['--epochs=2', '--output_dir=' + output]) == 0
    best = weights_file.load_weights_file(os.path.join(output, discovery.BEST))
    capsys.readouterr()
    assert run_class_finetuning.run(base + ['--eval', '--resume=' + output]) == 0
    out = capsys.readouterr().out
    assert 'Accuracy of the network on the 12 test images: %.3f%%' % best['accuracy']['accuracy'] in out
    assert 'Accuracy of the averaged network (EMA)' in out
    assert run_class_finetuning.run(base + ['--epochs=3', '--resume', os.path.join(output, discovery.BEST),
                                            '--output_dir=' + output]) == 0
    assert max(line['epoch'] for line in lines_of(output)) == 2


def test_a_checkpoint_of_the_reference_resumes(image_folder, tmp_path, parse):
    data, output = image_folder(), str(tmp_path / 'out')
    base = RUN + ['--data_path=' + data, '--epochs=2', '--save_ckpt_freq=1', '--output_dir=' + output]
    assert run_class_finetuning.run(base + ['--maxstep=4']) == 0
    path = os.path.join(output, 'checkpoint-0.pth')
    content = weights_file.load_weights_file(path)
    reference = {name: content[name] for name in ('model', 'optimizer', 'epoch')}
    reference.update(scaler={'scale': 65536., 'growth_factor': 2.}, args=argparse.Namespace(**content['args']))
    os.remove(path)  # its tensors are the file's pages
    torch.save(reference, path)
    assert run_class_finetuning.run(base + ['--resume=' + path]) == 0
    assert [line['epoch'] for line in lines_of(output)] == [0, 1]


def test_the_random_numbers_of_an_update_follow_from_seed_and_step():
    def numbers():
        return random.random(), np.random.rand(), np.random.normal(), torch.rand(2).tolist()

    utils.seed_step(7, 3)
    expected = numbers()
    np.random.normal(), torch.rand(5)  # for example an evaluation
    utils.seed_step(7, 3)
    assert numbers() == expected
    for seed, step in ((7, 4), (8, 3)):
        utils.seed_step(seed, step)
        assert not set(map(str, numbers())) & set(map(str, expected))


def test_wrong_resumes(image_folder, tmp_path, capsys):
    data, output = image_folder(), str(tmp_path / 'out')
    base = RUN + ['--data_path=' + data, '--epochs=1', '--warmup_epochs=0']
    assert run_class_finetuning.run(base + ['--output_dir=' + output]) == 0
    capsys.readouterr()
    resume = ['--resume=' + output]
    assert run_class_finetuning.run(base + resume + ['--use_cls']) == 2
    error = capsys.readouterr().err
    assert 'it was trained with --model beit_nano_patch8_32' in error
    every = os.path.join(output, 'args.yaml')
    assert '; --config %s gives all of its flags)' % every in error
    assert run_class_finetuning.run(['--config', every, '--output_dir=', '--eval'] + resume) == 0
    capsys.readouterr()
    assert run_class_finetuning.run(base + resume + ['--opt=sgd', '--epochs=2']) == 2
    assert '--opt sgd: ' in capsys.readouterr().err


def test_flags_win_over_the_rates_in_a_checkpoint(image_folder, tmp_path):
    data, output = image_folder(), str(tmp_path / 'out')
    base = RUN + ['--data_path=' + data, '--save_ckpt_freq=1', '--output_dir=' + output]
    assert run_class_finetuning.run(base + ['--epochs=1', '--weight_decay=0', '--layer_decay=0.5']) == 0
    assert run_class_finetuning.run(base + ['--epochs=2', '--auto_resume', '--weight_decay=0.3']) == 0
    groups = weights_file.load_weights_file(os.path.join(output, 'checkpoint-1.pth'))['optimizer']['param_groups']
    assert {group['weight_decay'] for group in groups} == {0., 0.3}
    assert min(group['lr_scale'] for group in groups) == pytest.approx(0.9 ** 5)


def test_an_earlier_run_is_moved_to_a_backup(image_folder, tmp_path, capsys):
    data, output = image_folder(), str(tmp_path / 'out')
    base = RUN + ['--data_path=' + data, '--epochs=1', '--output_dir=' + output]
    for _ in range(3):
        assert run_class_finetuning.run(base) == 0
    folders = sorted(name for name in os.listdir(str(tmp_path)) if name.startswith('out'))
    assert len(folders) == 3 and folders[0] == 'out'
    for name in folders:
        assert os.path.isfile(str(tmp_path / name / 'checkpoint-0.pth'))
    assert capsys.readouterr().out.count('Moved the earlier run in ') == 2


def test_only_files_of_a_run_are_moved_to_a_backup(image_folder, tmp_path):
    data = image_folder()  # output_dir is the data folder, through a link, with the user's own files in it
    link = str(tmp_path / 'link')
    os.symlink(data, link)
    with open(os.path.join(data, 'notes.txt'), 'w') as file:
        file.write('mine')
    os.symlink('/nowhere', os.path.join(data, 'dangling'))
    base = RUN + ['--data_path=' + data, '--epochs=1', '--output_dir=' + link + os.sep]
    for _ in range(2):
        assert run_class_finetuning.run(base) == 0
    assert {'train', 'val', 'notes.txt', 'dangling', 'log.txt', 'checkpoint-0.pth'} <= set(os.listdir(data))
    aside, = [name for name in os.listdir(str(tmp_path)) if name.startswith('my data-')]
    assert sorted(os.listdir(str(tmp_path / aside))) == [
        'args.yaml', 'checkpoint-0.pth', 'checkpoint-best.pth', 'log.txt', 'summary.json']


def test_the_log_of_another_program_is_not_a_run(image_folder, tmp_path):
    output = tmp_path / 'home'
    output.mkdir()
    (output / 'log.txt').write_text('dear diary\n')
    assert run_class_finetuning.run(RUN + ['--data_path=' + image_folder(), '--epochs=1', '--no_save_ckpt',
                                           '--output_dir=' + str(output)]) == 0
    assert (output / 'log.txt').read_text().startswith('dear diary\n')


def test_resuming_into_a_folder_with_another_run_keeps_that_run(image_folder, tmp_path):
    data, first, second = image_folder(), str(tmp_path / 'first'), str(tmp_path / 'second')
    base = RUN + ['--data_path=' + data]
    for output in (first, second):
        assert run_class_finetuning.run(base + ['--epochs=2', '--output_dir=' + output, '--save_ckpt_freq=1']) == 0
    assert run_class_finetuning.run(base + ['--epochs=3', '--resume=' + os.path.join(first, 'checkpoint-1.pth'),
                                            '--output_dir=' + second]) == 0
    kept, = [name for name in os.listdir(str(tmp_path)) if name.startswith('second-')]
    assert {'checkpoint-0.pth', 'checkpoint-1.pth', 'log.txt'} <= set(os.listdir(str(tmp_path / kept)))
    assert [line['epoch'] for line in lines_of(second)] == [2]


def test_auto_resume_uses_a_best_checkpoint_that_is_further(image_folder, tmp_path):
    data, output = image_folder(), str(tmp_path / 'out')
    base = RUN + ['--data_path=' + data, '--epochs=3', '--output_dir=' + output]
    assert run_class_finetuning.run(base + ['--maxstep=8']) == 0  # two of three epochs
    content = weights_file.load_weights_file(os.path.join(output, 'checkpoint-1.pth'))
    os.remove(os.path.join(output, 'checkpoint-1.pth'))
    weights_file.save(os.path.join(output, discovery.BEST), content)
    assert run_class_finetuning.run(base + ['--auto_resume']) == 0
    assert [line['epoch'] for line in lines_of(output)] == [0, 1, 2]


# ---- saving in the background

def test_training_continues_while_a_checkpoint_is_written(image_folder, tmp_path, monkeypatch):
    """The write waits for two more updates: with a save that holds up training they would never come."""
    updates, later = [], threading.Event()
    step, save = CheckpointMonitor.begin_sync, weights_file.save

    def count(self, update, device):
        updates.append(update.step)
        if len(updates) == 4:  # the fourth update ends with the next save, which waits for this one
            later.set()
        step(self, update, device)

    def slow(path, content):
        before = {name: value.clone() for name, value in content['model'].items()}
        if path.endswith('checkpoint-0-step2.pth'):
            assert later.wait(60), 'training waited for the save'
        assert all(torch.equal(value, before[name]) for name, value in content['model'].items())
        save(path, content)

    monkeypatch.setattr(CheckpointMonitor, 'begin_sync', count)
    monkeypatch.setattr(weights_file, 'save', slow)
    output = str(tmp_path / 'out')
    flags = RUN + ['--data_path=' + image_folder(), '--epochs=1', '--batch_size=2', '--keep_checkpoints=9',
                   '--output_dir=' + output]
    assert run_class_finetuning.run(flags + ['--save_ckpt_steps=2']) == 0
    assert len(updates) > 5
    found = weights_file.load_weights_file(os.path.join(output, 'checkpoint-0-step2.pth'))
    monkeypatch.undo()
    assert run_class_finetuning.run(flags[:-1] + ['--output_dir=' + str(tmp_path / 'short'), '--maxstep=2']) == 0
    expected = weights_file.load_weights_file(str(tmp_path / 'short' / 'checkpoint-0-step2.pth'))
    assert repr(found['model']) == repr(expected['model'])
    states = [list(content['optimizer']['state'].values()) for content in (found, expected)]
    assert sorted(map(repr, states[0])) == sorted(map(repr, states[1]))


def test_a_save_that_fails_in_the_background_ends_the_run(image_folder, tmp_path, monkeypatch, capsys):
    def full(path, content):
        raise UserError('--output_dir: cannot write %s (No space left on device)' % path)

    monkeypatch.setattr(weights_file, 'save', full)
    assert run_class_finetuning.run(RUN + ['--data_path=' + image_folder(), '--epochs=1', '--batch_size=2',
                                           '--output_dir=' + str(tmp_path / 'out'), '--save_ckpt_steps=2']) == 2
    assert 'checkpoint-0-step2.pth (No space left on device)' in capsys.readouterr().err


def test_one_content_under_two_names_is_written_once(image_folder, tmp_path, monkeypatch):
    data = image_folder()
    for name, link in (('linked', os.link), ('copied', None)):
        output = str(tmp_path / name)
        if link is None:
            monkeypatch.setattr(os, 'link', lambda *_: (_ for _ in ()).throw(OSError(95, 'not supported')))
        assert run_class_finetuning.run(RUN + ['--data_path=' + data, '--epochs=1', '--output_dir=' + output]) == 0
        best, numbered = (os.path.join(output, name) for name in (discovery.BEST, 'checkpoint-0.pth'))
        assert os.path.samefile(best, numbered) == (link is not None)
        states = [weights_file.load_weights_file(path)['model'] for path in (best, numbered)]
        assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
        assert not [name for name in os.listdir(output) if 'tmp' in name]


def test_a_changed_byte_of_a_tensor_is_found(tmp_path):
    path = str(tmp_path / 'checkpoint-0.pth')
    weights_file.save(path, {'model': {'head.weight': torch.arange(1000.)}})
    with open(path, 'rb') as file:
        data = file.read()
    at = data.index(torch.arange(1000.).numpy().tobytes()) + 1234
    with open(path, 'wb') as file:
        file.write(data[:at] + bytes([data[at] ^ 1]) + data[at + 1:])
    with pytest.raises(UserError, match=r'checkpoint-0\.pth: .*damaged.*checksum'):
        weights_file.load_weights_file(path)


def test_a_resumed_optimizer_does_not_depend_on_the_file(tmp_path):
    path, model = str(tmp_path / 'checkpoint-0.pth'), randomised(torch.nn.Linear(64, 64))
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 64)).sum().backward()
    optimizer.step()
    expected = [value.clone() for values in optimizer.state.values() for value in values.values()
                if torch.is_tensor(value)]
    weights_file.save(path, {'optimizer': training_state.HostCopies().optimizer(optimizer)})
    resumed = torch.optim.AdamW(model.parameters())
    training_state.load_optimizer(path, resumed, weights_file.load_weights_file(path)['optimizer'])
    with open(path, 'r+b') as file:
        file.write(bytes(os.path.getsize(path)))
    found = [value for values in resumed.state.values() for value in values.values() if torch.is_tensor(value)]
    assert all(map(torch.equal, found, expected)) and len(found) == len(expected)


def test_changing_what_was_read_does_not_change_the_file(tmp_path):
    path, values = str(tmp_path / 'x.pth'), torch.randn(100, 100)
    weights_file.save(path, {'weight': values, 'none': torch.zeros(0), 'flag': torch.ones(3, dtype=torch.bool)})
    weights_file.load_weights_file(path)['weight'].zero_()
    content = torch.load(path)
    assert torch.equal(content['weight'], values) and len(content['none']) == 0 and content['flag'].all()


def test_a_save_in_parts_writes_the_same_file(tmp_path, monkeypatch):
    content = {'model': {str(index): torch.randn(1000) for index in range(20)}}
    paths, synced = [str(tmp_path / name / 'x.pth') for name in ('whole', 'parts')], []
    for path in paths:
        os.mkdir(os.path.dirname(path))
    weights_file.save(paths[0], content)
    monkeypatch.setattr(weights_file, 'CACHED_BYTES', 10000)
    monkeypatch.setattr(os, 'fdatasync', lambda handle: synced.append(os.fstat(handle).st_size))
    weights_file.save(paths[1], content)
    assert len(synced) >= 5 and max(synced) > 5 * min(synced)
    whole, parts = (open(path, 'rb').read() for path in paths)
    assert whole == parts

    def full(_):
        raise OSError(errno.ENOSPC, 'No space left on device')

    monkeypatch.setattr(os, 'fdatasync', full)
    with pytest.raises(UserError, match='--output_dir: cannot write .*No space'):
        weights_file.save(paths[1], {'model': {}, **content})
    assert open(paths[1], 'rb').read() == parts and os.listdir(os.path.dirname(paths[1])) == ['x.pth']
