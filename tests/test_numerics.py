"""Non-finite losses and gradients: reports, skipped updates, stops. Also --deterministic."""

import json
import math
import os
import re
import subprocess
import sys

import pytest
import torch

import engine_for_finetuning as engine
import run_class_finetuning
from beit.errors import UserError
from beit.files import run_folder, weights_file
from beit.training import loss_scaler, step_control
from helpers import CPU, ROOT, RUN, Listener, Numbered, cannot_run, lines_of, toy

pytestmark = [pytest.mark.fast, pytest.mark.computes]

POISON = 17  # index of the training image that breaks the loss


class Poisoned(torch.nn.Module):
    """A model whose output for one image is NaN."""

    def __init__(self, model, loader):
        super().__init__()
        self.model, self.loader = model, loader

    def forward(self, images):
        output = self.model(images)
        for row, index in enumerate(self.loader.newest.tolist()):
            if index == POISON:
                output = output + torch.zeros_like(output).index_fill(0, torch.tensor([row]), float('nan'))
        return output


def poisoned_run(on_nonfinite, update_freq=1, **options):
    model, loader = toy()
    loader = Numbered(loader * 3)
    listener = Listener(on_nonfinite)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    run = dict(model=Poisoned(model, loader), criterion=torch.nn.CrossEntropyLoss(), data_loader=loader,
               optimizer=optimizer, device=CPU, epoch=0, monitor=listener, update_freq=update_freq, **options)
    return model, listener, run, len(loader), len(loader[0][1])


def test_a_loss_that_is_not_a_number_names_step_scale_norms_and_the_image():
    model, listener, run, _, batch = poisoned_run('stop', loss_scaler=loss_scaler.LossScaler(scale=4.))
    with pytest.raises(UserError) as caught:
        engine.train_one_epoch(**run)
    step = POISON // batch
    text = str(caught.value)
    assert text.startswith('the loss is nan at update step %d; loss scale 4; norms of the gradients before: ' % step)
    assert '; images: image-%d;' % POISON in text and '--on_nonfinite skip' in text
    norms = re.search(r'before: ([\d. ]+);', text).group(1).split()
    assert len(norms) == min(step, step_control.NORMS_KEPT) and all(float(norm) > 0 for norm in norms)
    assert listener.records[0]['images'] == ['image-%d' % POISON]
    assert all(torch.isfinite(value).all() for value in model.state_dict().values())  # the step was not taken


@pytest.mark.parametrize('update_freq', (1, 2))
def test_skipping_leaves_exactly_that_update_out(update_freq, capsys):
    """Against the same run without these batches."""
    model, listener, run, batches, batch = poisoned_run('skip', update_freq)
    stats = engine.train_one_epoch(**run)
    bad = POISON // batch // update_freq
    assert stats['skipped_steps'] == 1 and math.isfinite(stats['loss'])
    assert 'the loss is nan at update step %d' % bad in capsys.readouterr().out
    other, _, run, _, _ = poisoned_run('stop', update_freq)
    kept = [each for place, each in enumerate(list.__iter__(run['data_loader'])) if place // update_freq != bad]
    run.update(model=other, data_loader=Numbered(kept))
    engine.train_one_epoch(**run)
    for name, value in model.state_dict().items():
        assert torch.equal(value, other.state_dict()[name]), name


def test_without_a_finite_loss_twenty_skips_end_the_run():
    model, loader = toy()
    loader = Numbered(loader * 6)
    with pytest.raises(UserError, match='20 updates in a row'):
        engine.train_one_epoch(model, lambda output, _: output.sum() * float('inf'), loader,
                               torch.optim.SGD(model.parameters(), lr=1e-3), CPU, 0, monitor=Listener('skip'))


@pytest.mark.parametrize('policy', ('stop', 'skip'))
def test_gradients_that_are_not_finite_in_full_precision(policy):
    model, loader = toy()
    loader = Numbered(loader)
    listener = Listener(policy)
    handle = model.head.weight.register_hook(lambda gradient: gradient * float('nan'))
    run = dict(model=model, criterion=torch.nn.CrossEntropyLoss(), data_loader=loader, device=CPU, epoch=0,
               optimizer=torch.optim.SGD(model.parameters(), lr=1e-3), monitor=listener)
    if policy == 'stop':
        with pytest.raises(UserError, match=r'the gradients are not finite \(their norm is nan, the loss 1\.\d+\) at '
                                            r'update step 0; loss scale 1; .*before: none yet; images: image-0, '
                                            r'image-1, image-2 and'):
            engine.train_one_epoch(**run)
    else:
        assert engine.train_one_epoch(**run)['skipped_steps'] == len(loader) == len(listener.records)
    handle.remove()


def test_an_overflow_of_the_scaled_loss_does_not_stop_the_run():
    model, loader = toy()
    handle = model.head.weight.register_hook(lambda gradient: gradient * float('inf'))
    scaler = loss_scaler.LossScaler(scale=128.)
    engine.train_one_epoch(model, torch.nn.CrossEntropyLoss(), loader, torch.optim.SGD(model.parameters(), lr=1e-3),
                           CPU, 0, scaler, monitor=Listener('stop'))
    assert scaler.skipped == len(loader)
    handle.remove()


@pytest.fixture
def poisoned_program(monkeypatch):
    """The program with one training image whose loss is NaN."""
    build = run_class_finetuning.build_criterion

    def build_poisoned(*how):
        criterion = build(*how)

        def poisoned(output, labels):
            loss = criterion(output, labels)
            return loss * float('nan') if (labels == 1).all() else loss  # a batch of dogs only
        return poisoned
    monkeypatch.setattr(run_class_finetuning, 'build_criterion', build_poisoned)


def test_the_program_writes_the_report_and_stops_or_continues(image_folder, tmp_path, poisoned_program, capsys):
    base = RUN + ['--data_path=' + image_folder(train=6), '--epochs=2', '--batch_size=2', '--clip_grad=1']
    stopped, skipping = str(tmp_path / 'stopped'), str(tmp_path / 'skipping')
    assert run_class_finetuning.run(base + ['--output_dir=' + stopped]) == 2
    err = capsys.readouterr().err
    assert len(err.splitlines()) == 1 and 'the loss is nan at update step' in err and 'nonfinite.txt' in err
    with open(os.path.join(stopped, 'nonfinite.txt')) as file:
        record, = [json.loads(line) for line in file]
    assert len(record['images']) == 2 and all('dog' in path and os.path.isfile(path) for path in record['images'])
    assert run_class_finetuning.run(base + ['--output_dir=' + skipping, '--on_nonfinite=skip']) == 0
    skipped = sum(line['skipped_steps'] if 'skipped_steps' in line else line['train_skipped_steps']
                  for line in lines_of(skipping))
    with open(os.path.join(skipping, 'nonfinite.txt')) as file:
        assert len(file.readlines()) == skipped > 0


# ---- --deterministic

@pytest.mark.slow
@pytest.mark.parametrize('device', ('cpu', 'cuda'))
def test_the_same_bits_twice(image_folder, tmp_path, device):
    if device == 'cuda' and not torch.cuda.is_available():
        cannot_run('cuda', 'no CUDA GPU to be deterministic on')
    data, weights = image_folder(train=12), []
    for number in range(2):
        output = str(tmp_path / str(number))
        subprocess.run([sys.executable, os.path.join(ROOT, 'run_class_finetuning.py')] + RUN + [
            '--data_path=' + data, '--output_dir=' + output, '--epochs=2', '--deterministic', '--device=' + device,
            '--rel_pos_bias', '--drop=0.1', '--drop_path=0.2', '--mixup=0.5', '--model_ema'],
            check=True, stdout=subprocess.DEVNULL, env=dict(os.environ, OMP_NUM_THREADS='2'))
        weights.append(weights_file.load_weights_file(os.path.join(output, 'checkpoint-1.pth')))
    for key in ('model', 'model_ema'):
        for name, value in weights[0][key].items():
            assert torch.equal(value, weights[1][key][name]), name
    assert weights[0]['accuracy'] == weights[1]['accuracy']


def test_deterministic_kernels_are_asked_for(image_folder):
    if not hasattr(torch, 'are_deterministic_algorithms_enabled'):
        cannot_run('current', 'this PyTorch cannot be asked whether its algorithms are deterministic')
    try:
        assert run_class_finetuning.run(RUN + ['--data_path=' + image_folder(train=8), '--epochs=1',
                                               '--deterministic']) == 0
        assert torch.are_deterministic_algorithms_enabled() and os.environ['CUBLAS_WORKSPACE_CONFIG']
    finally:
        torch.use_deterministic_algorithms(False)
        torch.backends.cudnn.deterministic = False


# ---- messages on exact resuming

def test_a_resumed_run_reports_whether_it_is_exact(image_folder, tmp_path, capsys):
    data, output = image_folder(), str(tmp_path / 'out')
    base = RUN + ['--data_path=' + data, '--output_dir=' + output, '--epochs=2']
    assert run_class_finetuning.run(base + ['--maxstep=2', '--num_workers=0']) == 0
    assert sorted(os.listdir(output)) == ['args.yaml', 'checkpoint-0-step2.pth', 'checkpoint-best.pth', 'log.txt',
                                          'summary.json']
    capsys.readouterr()
    assert run_class_finetuning.run(base + ['--auto_resume', '--maxstep=3', '--num_workers=1']) == 0
    assert 'exactly as if it had not been stopped' in capsys.readouterr().out
    assert run_class_finetuning.run(base + ['--auto_resume', '--maxstep=4', '--seed=1', '--lr=1e-3']) == 0
    assert 'not with the same numbers as without a stop: --lr is 0.001 (was 0.0005); --seed is 1 (was 0)' \
        in capsys.readouterr().out


def test_another_total_batch_in_mid_epoch_is_refused(image_folder, tmp_path, capsys):
    data, output = image_folder(), str(tmp_path / 'out')
    base = RUN + ['--data_path=' + data, '--output_dir=' + output, '--epochs=2', '--auto_resume']
    assert run_class_finetuning.run(base + ['--maxstep=2']) == 0
    assert run_class_finetuning.run(base + ['--batch_size=4']) == 2
    assert 'saved in mid-epoch with a total batch of 8, and this one is 4' in capsys.readouterr().err
    assert run_class_finetuning.run(base + ['--batch_size=4', '--update_freq=2']) == 0
    out = capsys.readouterr().out
    assert 'checkpoint-0-step2.pth: 2 updates of epoch 1' in out  # people count epochs from 1
    assert 'Epoch: [0]  [7/8]' in out and 'Epoch: [0]  [0/8]' not in out


def test_checkpoints_in_mid_epoch_are_written_and_removed(image_folder, tmp_path):
    data, output = image_folder(), str(tmp_path / 'out')
    base = RUN + ['--data_path=' + data, '--output_dir=' + output, '--epochs=3', '--save_ckpt_freq=1']
    assert run_class_finetuning.run(base + ['--save_ckpt_steps=1']) == 0
    assert sorted(os.listdir(output)) == ['args.yaml', 'checkpoint-0.pth', 'checkpoint-1.pth', 'checkpoint-2-step3.pth',
                                          'checkpoint-2-step4.pth', 'checkpoint-2.pth', 'checkpoint-best.pth',
                                          'log.txt', 'summary.json']
    assert run_class_finetuning.run(base + ['--save_ckpt_minutes=1e-9', '--keep_checkpoints=1']) == 0
    assert sorted(os.listdir(output)) == ['args.yaml', 'checkpoint-2-step4.pth', 'checkpoint-2.pth',
                                          'checkpoint-best.pth', 'log.txt', 'summary.json']


@pytest.mark.parametrize('variable', ('TORCHELASTIC_RESTART_COUNT', 'SLURM_RESTART_COUNT'))
def test_a_restart_by_torchrun_or_slurm_resumes(image_folder, tmp_path, monkeypatch, variable, capsys):
    data, output = image_folder(), str(tmp_path / 'out')
    base = RUN + ['--data_path=' + data, '--output_dir=' + output, '--epochs=2']
    monkeypatch.setenv(variable, '0')
    assert run_class_finetuning.run(base + ['--maxstep=2']) == 0
    monkeypatch.setenv(variable, '1')
    assert run_class_finetuning.run(base) == 0
    assert 'Resumed' in capsys.readouterr().out and run_folder.run_outputs(output)
