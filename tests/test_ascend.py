"""The NPU path on an emulated NPU (tests/npu_emulator): figures against the CPU's, scripts, errors.

The emulator checks the code; it shows nothing about an NPU's speed, memory or rounding.
"""

import importlib
import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest
import torch

import run_class_finetuning
from beit.checkpoint import discovery
from beit.files import weights_file
from helpers import (
    EMULATOR,
    ROOT,
    TINY,
    all_end,
    cannot_run,
    check_summary,
    copy_checkout,
    fails,
    fake_cann,
    lines_of,
    output,
    python,
    result,
    run_program,
    run_script,
    scalars,
    text,
)

DIGITS = ['--data_path=demo', '--model=beit_nano_patch8_32', '--input_size=32', '--num_workers=0', '--aa=none',
          '--reprob=0', '--color_jitter=0', '--drop_path=0', '--hflip=0', '--warmup_epochs=0', '--lr=2e-3',
          '--init_scale=1', '--abs_pos_emb', '--rel_pos_bias', '--layer_scale_init_value=0', '--layer_decay=1']
FUSED = '--opt=npufusedadamw'
NO_EVAL = '--disable_eval_during_finetuning'


@pytest.mark.soak
def test_the_emulators_own_tests(emulator):
    done = subprocess.run([sys.executable, '-m', 'pytest', '-q', '-p', 'no:cacheprovider', 'tests'], cwd=EMULATOR,
                          env=dict(os.environ, **emulator()), stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                          universal_newlines=True, timeout=600)
    assert done.returncode == 0, done.stdout[-6000:]
    assert re.search(r'\d+ passed', done.stdout) and 'skipped' not in done.stdout.splitlines()[-1], done.stdout[-300:]


# ---- numbers

class Trained:
    """A finished run: its output, the loss of each update, and its last checkpoint."""

    def __init__(self, folder, flags, env):
        self.folder = str(folder)
        self.status, self.out, self.err = run_program(
            *DIGITS + ['--output_dir=' + self.folder, '--log_dir=' + self.folder + '/tb'] + flags, env=env)

    def losses(self):
        assert self.status == 0, self.err
        return scalars(self.folder + '/tb')['loss/loss']

    def epochs(self):
        assert self.status == 0, self.err
        return lines_of(self.folder)

    def weights(self, part='model'):
        return weights_file.load_weights_file(discovery.list_checkpoints(self.folder)[-1][1])[part]


def farthest(one, other):
    assert set(one) == set(other)
    return max((one[name].double() - other[name].double()).abs().max().item() for name in one)


@pytest.fixture
def train(tmp_path, emulator):
    """train('--flag', …, apex=…, VARIABLE=…): a run on the emulated NPU, or with on='cpu' on this machine's CPU."""
    counter = []

    def run(*flags, on='npu', apex=None, **env):
        counter.append(1)
        return Trained(tmp_path / ('run%d' % len(counter)), ['--device=' + on] + list(flags),
                       dict(emulator(apex), **env) if on == 'npu' else dict(OMP_NUM_THREADS='1', **env))
    return run


def test_float32_computes_what_the_cpu_does_for_50_steps(train):
    """Accumulation, clipping, moving average, layer decay; the fused AdamW and fused attention against plain ones."""
    flags = ['--maxstep=50', '--epochs=5', '--batch_size=16', '--update_freq=2', '--clip_grad=1', '--model_ema',
             '--model_ema_decay=0.9', '--layer_decay=0.75', '--weight_decay_end=0.1']
    cpu, npu = train(*flags, on='cpu'), train(*flags + [FUSED])
    assert 'Attention: fused' in npu.out and 'plain in training' in cpu.out and 'Device: npu:0' in npu.out
    assert len(cpu.losses()) == len(npu.losses()) == 50
    assert max(abs(one - other) for one, other in zip(cpu.losses(), npu.losses())) < 1e-5
    assert cpu.losses()[-1] < cpu.losses()[0] - 0.05  # the run was not trivial
    for part in ('model', 'model_ema'):
        assert farthest(cpu.weights(part), npu.weights(part)) < 2e-5
    for one, other in zip(cpu.epochs(), npu.epochs()):
        assert one['train_grad_norm'] == pytest.approx(other['train_grad_norm'], abs=1e-4)
        assert (one['test_acc1'], one['test_ema_acc1']) == (other['test_acc1'], other['test_ema_acc1'])


@pytest.fixture(scope='module')
def half_learnt(tmp_path_factory):
    """A checkpoint of ten epochs on the CPU, after which the loss falls steeply."""
    run = Trained(tmp_path_factory.mktemp('half learnt'), ['--device=cpu', '--epochs=40', '--maxstep=220',
                                                           '--warmup_epochs=2', NO_EVAL], {'OMP_NUM_THREADS': '1'})
    assert run.epochs()[-1]['train_loss'] < 1.5
    return run.folder + '/checkpoint-9.pth'


@pytest.fixture(scope='module')
def in_float32(tmp_path_factory, emulator, half_learnt):
    """Two epochs in float32 from that checkpoint."""
    return Trained(tmp_path_factory.mktemp('float32'), ['--epochs=2', '--lr=1e-3', '--device=npu', FUSED, NO_EVAL,
                                                        '--finetune=' + half_learnt], emulator())


HALVES = [
    ('apex O2', [FUSED], 'ascend', r"O2 float16 by apex.amp \(Ascend's\)"),
    pytest.param('apex O1', [FUSED, '--opt-level=O1'], 'ascend', r"O1 float16 by apex.amp \(Ascend's\)",
                 marks=pytest.mark.soak),
    pytest.param('O2', [FUSED], None, r'O2 float16 by PyTorch \(apex is not installed\)',
                 marks=pytest.mark.soak),  # the next test compares it with apex O2
    ('O1', [FUSED, '--opt-level=O1'], 'nvidia', r"O1 float16 by PyTorch \(.*NVIDIA's without amp"),
    pytest.param('O2 dynamic', ['--loss_scale=dynamic'], 'pypi', r'O2 float16 by PyTorch \(.*unrelated package',
                 marks=pytest.mark.soak),
    pytest.param('O2 bfloat16', [FUSED, '--amp_dtype=bfloat16'], None, 'O2 bfloat16 by PyTorch',
                 marks=pytest.mark.soak)]


@pytest.mark.parametrize('way, flags, apex, about', HALVES, ids=lambda value: str(value)[:12])
def test_half_precision_learns_as_float32_does(train, half_learnt, in_float32, way, flags, apex, about):
    half = train('--epochs=2', '--lr=1e-3', NO_EVAL, '--finetune=' + half_learnt, '--amp', *flags, apex=apex)
    assert re.search('Precision: ' + about, half.out), half.out + half.err
    assert in_float32.losses()[-1] < in_float32.losses()[0] - 0.2
    assert half.losses() == pytest.approx(in_float32.losses(), rel=0.02)  # at each of the 44 updates
    assert {value.dtype for value in half.weights().values() if value.is_floating_point()} == {torch.float32}
    assert sum(epoch['train_skipped_steps'] for epoch in half.epochs()) == 0


def test_apex_and_native_o2_agree(train, half_learnt):
    flags = ['--amp', FUSED, '--maxstep=22', '--epochs=1', '--clip_grad=0.5', '--update_freq=2', '--batch_size=16',
             NO_EVAL, '--lr=1e-3', '--finetune=' + half_learnt, '--model_ema', '--model_ema_decay=0.9']
    ours, theirs = train(*flags), train(*flags, apex='ascend')
    assert 'by PyTorch' in ours.out and 'by apex.amp' in theirs.out
    assert ours.losses() == pytest.approx(theirs.losses(), rel=2e-3)
    for part in ('model', 'model_ema'):
        assert farthest(ours.weights(part), theirs.weights(part)) < 5e-3  # AdamW may step by lr in either direction


@pytest.mark.parametrize('processes', [4, pytest.param(8, marks=pytest.mark.soak)])
def test_processes_train_as_one_with_the_total_batch(emulator, tmp_path, image_folder, processes):
    checkout = copy_checkout(str(tmp_path / 'my code' / 'beit'))
    data = image_folder(train=40)
    flags = ['--data_path=' + data, '--device=npu', FUSED, '--finetune=', '--model=beit_nano_patch8_32',
             '--input_size=32', '--num_workers=0', '--epochs=2', '--warmup_epochs=1', '--lr=1e-3', '--init_scale=1',
             '--aa=none', '--reprob=0', '--color_jitter=0', '--drop_path=0', '--hflip=0', '--no_amp']
    one = run_script(checkout, 'train_full_1p', *flags, '--batch_size=16', '--output_dir=one', **emulator())
    several = run_script(checkout, 'train_full_8p', *flags, '--batch_size=%d' % (16 // processes),
                         *['--nproc_per_node=4'] if processes == 4 else [], '--output_dir=several',
                         **emulator(FAKE_NPU_COUNT='8'))
    assert result(one)['accuracy'] == result(several)['accuracy']
    assert 'Ascend (emulated on CPU), %d processes' % processes in several.out
    logs = [lines_of(os.path.join(checkout, name)) for name in ('one', 'several')]
    for first, second in zip(*logs):
        assert first['train_loss'] == pytest.approx(second['train_loss'], abs=1e-5)
        assert first['test_loss'] == pytest.approx(second['test_loss'], abs=1e-5)
    weights = [weights_file.load_weights_file(os.path.join(checkout, name, 'checkpoint-1.pth'))['model']
               for name in ('one', 'several')]
    assert farthest(*weights) < 2e-5


# ---- overflow

OVERFLOW = """
import sys
import run_class_finetuning as program

build, calls = program.inference_model.build_model, []

def build_model(args, nb_classes):
    model = build(args, nb_classes)

    def overflow(gradient):  # of the logits, at the chosen calls of backward
        calls.append(1)
        return gradient * (60000. if len(calls) in (3, 6) else 1.)  # with the loss scale it is beyond float16

    model.head.register_forward_hook(
        lambda module, inputs, output: output.register_hook(overflow) and None if output.requires_grad else None)
    return model

program.inference_model.build_model = build_model
sys.exit(program.run(sys.argv[1:]))
"""


@pytest.mark.parametrize('soc, scale, apex', [
    ('910A', '65504', 'ascend'), ('910A', 'dynamic', None), ('910B', '65504', None)] + [
    pytest.param(*way, marks=pytest.mark.soak) for way in [('910A', '65504', None), ('910A', 'dynamic', 'ascend'),
                                                           ('910B', '65504', 'ascend'), ('910B', 'dynamic', None),
                                                           ('910B', 'dynamic', 'ascend')]])
def test_an_overflow_is_skipped_counted_and_logged(emulator, tmp_path, soc, scale, apex):
    """Twice in eight updates; on a 910A the gradients stay finite, and only its flag shows the overflow."""
    out = str(tmp_path / 'out')
    done = subprocess.run(
        [python(), '-c', OVERFLOW] + DIGITS + [
            '--device=npu', FUSED, '--amp', '--loss_scale=' + scale, '--epochs=1', '--maxstep=8', '--batch_size=16',
            '--output_dir=' + out], cwd=ROOT, env=dict(os.environ, **emulator(apex, FAKE_NPU_SOC=soc)),
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, universal_newlines=True)
    assert done.returncode == 0, done.stdout
    assert ('by apex.amp' if apex else 'by PyTorch') in done.stdout
    skipped = re.findall(r'Update step (\d) skipped: its gradients overflowed \(loss scale now (\d+), (\d) skipped',
                         done.stdout)
    now = [65504, 65504] if scale == '65504' else [32768, 16384]
    assert [tuple(map(int, found)) for found in skipped] == [(2, now[0], 1), (5, now[1], 2)], done.stdout
    record, = lines_of(out)
    assert record['train_skipped_steps'] == 2
    state = weights_file.load_weights_file(out + '/checkpoint-0-step8.pth')
    assert state['scaler']['skipped'] == 2
    assert all(torch.isfinite(value).all() for value in state['model'].values())
    assert max(value.abs().max() for value in state['model'].values() if value.is_floating_point()) < 10
    steps = {values['step'] for values in state['optimizer']['state'].values()}
    assert steps == {6}  # of eight


def test_an_overflow_on_one_of_two_processes_is_skipped_by_both(emulator, tmp_path):
    """On a 910A the averaged gradients are finite, and the flag is raised on the second process alone."""
    program, out = tmp_path / 'program.py', str(tmp_path / 'out')
    program.write_text('import os\nimport sys\nsys.path.insert(0, %r)\n' % ROOT + OVERFLOW.replace(
        'if len(calls) in (3, 6)', "if len(calls) in (3, 6) and os.environ['RANK'] == '1'"))
    done = subprocess.run(
        [python(), '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=2', str(program)] + DIGITS + [
            '--device=npu', FUSED, '--amp', '--loss_scale=65504', '--epochs=1', '--maxstep=8', '--batch_size=8',
            '--output_dir=' + out], cwd=ROOT, env=dict(os.environ, **emulator(FAKE_NPU_SOC='910A', FAKE_NPU_COUNT='2')),
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, universal_newlines=True, timeout=200)
    assert done.returncode == 0, done.stdout
    assert re.findall(r'Update step (\d) skipped', done.stdout) == ['2', '5'], done.stdout
    state = weights_file.load_weights_file(out + '/checkpoint-0-step8.pth')['optimizer']['state']
    steps = {values['step'] for values in state.values()}
    assert steps == {6}


def test_a_scale_that_always_overflows_ends_in_one_line(train):
    run = train('--amp', '--loss_scale=1e12', '--epochs=1', '--batch_size=8')
    assert run.status == 2
    assert '20 updates in a row had gradients that overflowed' in run.err and 'Traceback' not in run.err


# ---- the scripts, from the shell to the result block

@pytest.fixture
def checkout(tmp_path):
    return copy_checkout(str(tmp_path / 'my code' / 'beit'))


ON_NPU = TINY + ['--device=npu']
BY_APEX = r"O2 float16 by apex.amp \(Ascend's\)"
WAYS = [pytest.param('train_full_1p', 1, None, ['--opt-level=O1'], 'O1 float16 by PyTorch', marks=pytest.mark.soak),
        pytest.param('train_full_1p', 1, 'nvidia', [], 'O2 float16 by PyTorch', marks=pytest.mark.soak),
        pytest.param('train_full_1p', 1, None, ['--no_amp'], 'float32', marks=pytest.mark.soak),
        ('train_full_8p', 2, 'ascend', ['--nproc_per_node=2'], BY_APEX),
        pytest.param('train_full_8p', 8, 'ascend', ['--batch_size=2'], BY_APEX, marks=pytest.mark.soak),
        ('train_performance_1p', 1, 'ascend', [], BY_APEX),
        pytest.param('train_performance_8p', 2, None, ['--nproc_per_node=2'], 'O2 float16 by PyTorch',
                     marks=pytest.mark.soak)]


def check_script(checkout, script, run, devices, about):
    check_summary(checkout, script, run, batch_size=2 if devices == 8 else 4, devices=devices)
    assert re.search('Precision: ' + about, run.out), run.out
    assert 'Device: npu:0, Ascend (emulated on CPU), %d process' % devices in run.out
    assert '--opt=npufusedadamw' in run.out
    assert run.err.count('Warning') == 0, run.err


@pytest.mark.parametrize('script, devices, apex, flags, about', WAYS, ids=lambda value: str(value)[:16])
def test_the_scripts_on_npus(emulator, checkout, data, script, devices, apex, flags, about):
    run = run_script(checkout, script, '--data_path=' + data, *ON_NPU + flags, **emulator(apex, FAKE_NPU_COUNT='8'))
    check_script(checkout, script, run, devices, about)


@pytest.mark.parametrize('last', [[], pytest.param(['--no_amp'], marks=pytest.mark.soak)])
def test_training_and_evaluation_agree_and_another_device_resumes(emulator, checkout, data, last):
    """npu with apex, cpu, npu with PyTorch or in float32: each resumes the previous checkpoint."""
    flags = ['--data_path=' + data] + TINY + ['--save_ckpt_freq=1', '--model_ema']
    for epochs, (device, apex, more) in enumerate([('npu', 'ascend', []), ('cpu', None, []), ('npu', None, last)], 1):
        resume = ['--resume=./train_result'] if epochs > 1 else []
        run = run_script(checkout, 'train_full_1p', *flags, '--device=' + device, '--epochs=%d' % epochs,
                         *resume + more, **(emulator(apex) if device == 'npu' else {}))
        accuracy = result(run)['accuracy']
        assert (epochs == 1) == ('is done' not in run.out), run.out
        assert 'Epoch: [%d]' % (epochs - 1) in run.out
        if epochs == 1:
            check_script(checkout, 'train_full_1p', run, 1, BY_APEX)
    assert [line['epoch'] for line in lines_of(os.path.join(checkout, 'train_result'))] == [0, 1, 2]
    for env in ({}, emulator()):
        evaluation = run_script(checkout, 'train_eval_1p', '--data_path=' + data, *TINY,
                                '--device=' + ('npu' if env else 'cpu'), '--resume=./train_result', **env)
        assert result(evaluation)['accuracy'] == accuracy


def test_a_run_that_changes_devices_computes_what_an_unbroken_one_does(train):
    """In float32, one epoch each on npu, cpu, npu: the fused optimizer's moments move to AdamW and back."""
    flags = ['--epochs=3', '--batch_size=128', '--save_ckpt_freq=1']
    unbroken = train(*flags, on='cpu')
    steps = unbroken.epochs()[-1]['epoch'] and len(unbroken.losses()) // 3
    first = train(*flags + ['--maxstep=%d' % steps, FUSED])
    second = train(*flags + ['--maxstep=%d' % (2 * steps), '--resume=' + first.folder], on='cpu')
    third = train(*flags + ['--resume=' + second.folder, FUSED])
    losses = first.losses() + second.losses() + third.losses()
    assert losses == pytest.approx(unbroken.losses(), abs=1e-4)
    assert farthest(third.weights(), unbroken.weights()) < 1e-4


RESUMED = {
    'float32': (['--drop_path=0.2', '--drop=0.1'], None, 0),
    'O2': (['--amp', '--drop_path=0.2', '--drop=0.1'], None, 1e-6),
    'apex O2': (['--amp', '--drop_path=0.2', '--drop=0.1'], 'ascend', 1e-6),
    'apex O2 dynamic': (['--amp', '--loss_scale=dynamic'], 'ascend', 1e-6),
    'apex O1': (['--amp', '--opt-level=O1'], 'ascend', 1e-6)}


@pytest.mark.parametrize('way', ['apex O2 dynamic'] + [
    pytest.param(way, marks=pytest.mark.soak) for way in ('float32', 'O2', 'apex O1', 'apex O2')])
def test_a_run_resumed_on_npus_computes_what_an_unbroken_one_does(train, half_learnt, way):
    """Masters, moments, loss scale and the device's random numbers are restored."""
    more, apex, tolerance = RESUMED[way]
    flags = ['--epochs=2', '--batch_size=64', '--max_train_samples=704', '--save_ckpt_freq=1', '--lr=1e-3', FUSED,
             NO_EVAL] + more
    unbroken = train(*flags, '--finetune=' + half_learnt, apex=apex)
    first = train(*flags, '--finetune=' + half_learnt, '--maxstep=11', apex=apex)
    second = train(*flags, '--resume=' + first.folder, apex=apex)
    assert len(first.losses()) == len(second.losses()) == 11
    assert first.losses() + second.losses() == pytest.approx(unbroken.losses(), abs=tolerance or 1e-7)
    assert farthest(second.weights(), unbroken.weights()) <= (tolerance or 1e-7)
    assert second.weights('scaler') == unbroken.weights('scaler')
    weight = first.weights()['blocks.0.mlp.fc1.weight']
    assert (weight.half().float() != weight).float().mean() > 0.9  # a master, not its float16 copy


def test_apex_o1_with_a_scale_of_1_clips_and_its_checkpoint_is_read_without_an_npu(train):
    """apex then neither unscales nor combines gradients, so its own clipping can't work. PyTorch alone reads the
    checkpoint, in this process without torch_npu."""
    run = train('--amp', '--opt-level=O1', '--loss_scale=1', '--clip_grad=1', FUSED, '--epochs=1', '--maxstep=3',
                '--max_train_samples=128', apex='ascend')
    assert run.status == 0, run.err
    assert not hasattr(torch, 'npu')
    content = torch.load(run.folder + '/checkpoint-best.pth', weights_only=True)
    assert {value.device.type for value in content['model'].values()} == {'cpu'}


def test_an_npu_checkpoint_resumes_on_cuda(train):
    if not torch.cuda.is_available():
        cannot_run('cuda', 'no CUDA GPU to resume an NPU checkpoint on')
    first = train('--epochs=2', '--maxstep=22', '--save_ckpt_freq=1', FUSED)
    second = train('--epochs=2', '--resume=' + first.folder, on='cuda')
    assert 'epoch 1 is done' in second.out and second.epochs()[-1]['epoch'] == 1


@pytest.mark.parametrize('flag, pattern', [('--prof', 'trace_rank0.json'),
                                           ('--cann_prof', '*_ascend_pt/ASCEND_PROFILER_OUTPUT/trace_view.json')])
def test_profiles(train, tmp_path, flag, pattern):
    run = train(flag, '--epochs=1')
    assert run.status == 0, run.err
    path, = (tmp_path / 'run1' / 'prof').glob(pattern)
    trace = json.loads(path.read_text())
    events = trace['traceEvents'] if isinstance(trace, dict) else trace
    assert any('addmm' in event.get('name', '') for event in events)


def test_cann_prof_without_torch_npu_is_one_line(refused):
    refused(DIGITS + ['--cann_prof', '--device=cpu'], '--cann_prof: torch_npu is not installed')


# ---- fused attention

@pytest.mark.parametrize('fault', ['drop_bias', pytest.param('scale_bias', marks=pytest.mark.soak)])
def test_a_fused_attention_that_treats_the_bias_wrongly_is_not_used(train, fault):
    flags = ['--epochs=1', '--maxstep=8', NO_EVAL]
    run, cpu = train(*flags, FAKE_NPU_SDPA=fault), train(*flags, on='cpu')
    assert run.losses() == pytest.approx(cpu.losses(), abs=1e-5)
    said, = re.findall('Attention: (.*)', run.out)  # once
    differs = r'the output differs by [\d.]+ %'
    assert re.match(r'plain; fused attention is not used \(scaled_dot_product_attention: %s; '
                    r'npu_fusion_attention: %s\)$' % (differs, differs), said)
    asked_for = train(*flags, '--attention=fused', FAKE_NPU_SDPA=fault)
    assert asked_for.status == 2 and '--attention fused: scaled_dot_product_attention: the output' in asked_for.err


def test_without_the_probe_the_fault_is_unnoticed(train, emulator, half_learnt, tmp_path):
    """The reason for the probe: the run with a dropped bias succeeds, with losses of another model."""
    code = ('import sys; from beit.training import fused_attention; fused_attention.compare = lambda *arguments: None; '
            'import run_class_finetuning; sys.exit(run_class_finetuning.run(sys.argv[1:]))')
    flags = ['--epochs=1', '--maxstep=8', '--finetune=' + half_learnt, NO_EVAL]
    done = subprocess.run([python(), '-c', code] + DIGITS + flags
                          + ['--device=npu', '--log_dir=' + str(tmp_path)], cwd=ROOT, env=dict(
                              os.environ, **emulator(FAKE_NPU_SDPA='drop_bias')),
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT, universal_newlines=True)
    assert done.returncode == 0, done.stdout
    cpu = train(*flags, on='cpu')
    assert max(abs(one - other) for one, other in zip(scalars(str(tmp_path))['loss/loss'], cpu.losses())) > 1e-3


@pytest.mark.parametrize('precision', [['--amp'], pytest.param([], marks=pytest.mark.soak),
                                       pytest.param(['--amp', '--opt-level=O1'], marks=pytest.mark.soak)])
def test_npu_fusion_attention_where_the_other_is_missing(emulator, tmp_path, precision):
    code = ('import sys, torch.nn.functional as F; del F.scaled_dot_product_attention; '
            'import run_class_finetuning; sys.exit(run_class_finetuning.run(sys.argv[1:]))')
    flags = DIGITS + ['--device=npu', '--epochs=1', '--maxstep=8', '--batch_size=16', NO_EVAL]
    done = subprocess.run([python(), '-c', code] + flags + precision + ['--log_dir=' + str(tmp_path / 'a')],
                          cwd=ROOT, env=dict(os.environ, **emulator()), stdout=subprocess.PIPE,
                          stderr=subprocess.STDOUT, universal_newlines=True)
    assert 'Attention: fused, npu_fusion_attention (agrees' in done.stdout, done.stdout
    status, _, err = run_program(*flags + precision + ['--attention=plain', '--log_dir=' + str(tmp_path / 'b')],
                                 env=emulator())
    assert (done.returncode, status) == (0, 0), err
    assert scalars(str(tmp_path / 'a'))['loss/loss'] == pytest.approx(
        scalars(str(tmp_path / 'b'))['loss/loss'], abs=2e-3 if precision else 1e-5)


# ---- settings and errors

def one_line(run, *expected):
    assert run.status == 2, run.out + run.err
    lines = [line for line in run.err.splitlines() if 'Warning' not in line]
    assert len(lines) == 1 and lines[0].startswith('run_class_finetuning.py: error: '), run.err
    for words in expected:
        assert words in lines[0], lines[0]


def run_each(ways, patch, env):
    """The program once for each list of flags, in one process, after `patch`; the lines of its standard error."""
    code = 'import json, sys, torch, run_class_finetuning as program\n' + patch + \
        '\nfor flags in json.loads(sys.argv[1]):\n    try:\n        program.run(flags)\n' \
        '    except SystemExit as end:\n        sys.stderr.write("%s\\n" % end)\n'
    ways = [DIGITS + ['--device=npu'] + way for way in ways]
    done = subprocess.run([python(), '-c', code, json.dumps(ways)], cwd=ROOT, env=dict(os.environ, **env),
                          stdout=subprocess.PIPE, stderr=subprocess.PIPE, universal_newlines=True)
    assert done.returncode == 0, done.stderr
    return [line for line in done.stderr.splitlines() if 'Warning' not in line]


@pytest.mark.parametrize('soc, modes', [('910A', {'auto': True, 'off': False}), ('910B', {'auto': False, 'on': True})])
def test_compile_mode_reaches_the_device(emulator, soc, modes):
    patch = 'program.build_criterion = lambda *a: sys.exit("mode %s" % torch.npu._compile_mode)'
    lines = run_each([['--jit_compile=' + mode] for mode in modes], patch, emulator(FAKE_NPU_SOC=soc))
    assert lines == ['mode %s' % expected for expected in modes.values()]


def test_the_seed_reaches_the_device(emulator):
    code = 'import utils, torch; from beit.devices import accelerator; accelerator.select_device("npu"); ' \
           'utils.seed_everything(7); print(torch.npu.initial_seed())'
    assert subprocess.check_output([python(), '-c', code], cwd=ROOT, env=dict(os.environ, **emulator())) == b'7\n'


def test_compile_mode_is_for_npus(refused):
    refused(DIGITS + ['--device=cpu', '--jit_compile=on'], '--jit_compile on', 'needs an NPU',
            'leave the flag out')


@pytest.mark.parametrize('level', [pytest.param('O1', marks=pytest.mark.soak), 'O2'])
def test_bfloat16_on_a_910a(train, level):
    one_line(train('--amp', '--opt-level=' + level, '--amp_dtype=bfloat16', FAKE_NPU_SOC='910A'),
             '--amp_dtype bfloat16', '910A', 'use --amp_dtype float16')


def test_cann_is_missing(train):
    one_line(train(FAKE_NPU_CANN='missing'), '--device npu', 'CANN is not set up', 'libhccl.so',
             'source test/env_npu.sh')


def test_cann_of_another_version(train):
    one_line(train(FAKE_NPU_CANN='7.0'), '--device npu', 'cannot be started', 'CANN', 'docs/ascend.md')


def test_no_device_and_one_too_few(train):
    one_line(train(FAKE_NPU_COUNT='0'), '--device npu', 'sees no NPU', 'npu-smi info')
    one_line(train('--device=npu:3'), '--device npu:3', 'there are 1')


def test_auto_reports_why_it_skips_an_npu(train):
    run = train('--device=auto', '--epochs=1', '--maxstep=2', NO_EVAL, FAKE_NPU_CANN='missing')
    assert run.status == 0 and 'Not using an NPU: torch_npu is installed but CANN is not set up' in run.out


def test_each_precision_gets_the_fused_optimizer_that_works_with_it(emulator):
    """torch_npu's never sees apex's combined gradients, and apex's works only under apex."""
    patch = ('build = program.build_optimizer\n'
             'program.build_optimizer = lambda *a: sys.exit("class %s" % type(build(*a)).__module__)')
    nvidia, = run_each([[FUSED, '--amp']], patch, emulator('nvidia'))
    with_apex, without_amp, fused_adam, lookahead = run_each(
        [[FUSED, '--amp'], [FUSED], ['--amp', '--opt=fusedadam'], ['--amp', '--opt=lookahead_npufusedadamw']], patch,
        emulator('ascend'))
    assert with_apex == 'class apex.optimizers'
    assert nvidia == without_amp == 'class torch_npu.optim'
    error = 'run_class_finetuning.py: error: '
    assert fused_adam.startswith(error) and '--opt fusedadam' in fused_adam and 'NVIDIA' in fused_adam
    assert lookahead.startswith(error + '--opt lookahead_npufusedadamw') and 'use --opt npufusedadamw' in lookahead


def test_a_failed_probe_on_one_process_turns_fused_attention_off_on_all(emulator, tmp_path):
    program = tmp_path / 'program.py'
    program.write_text(
        "import os, sys\nsys.path.insert(0, %r)\nif os.environ['RANK'] == '1':\n"
        "    os.environ['FAKE_NPU_SDPA'] = 'drop_bias'\n"
        "import run_class_finetuning\nsys.exit(run_class_finetuning.run(sys.argv[1:]))\n" % ROOT)
    done = subprocess.run(
        [python(), '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=2', str(program)] + DIGITS + [
            '--device=npu', '--epochs=1', '--maxstep=1', NO_EVAL], cwd=ROOT, timeout=200, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, universal_newlines=True, env=dict(os.environ, **emulator(FAKE_NPU_COUNT='2')))
    assert done.returncode == 0, done.stdout
    assert 'Attention: plain; fused attention is not used (scaled_dot_product_attention: it failed on another process' \
        in done.stdout


def test_attention_dropout_and_fused_attention(train):
    one_line(train('--attention=fused', '--attn_drop_rate=0.1'), '--attention fused', '--attn_drop_rate 0.1')
    run = train('--attn_drop_rate=0.1', '--epochs=1', '--maxstep=1', '--batch_size=8', NO_EVAL)
    assert 'plain in training, for --attn_drop_rate' in run.out


@pytest.mark.parametrize('package', ['ascend-toolkit', pytest.param('nnae', marks=pytest.mark.soak)])
def test_the_scripts_set_cann_up(emulator, checkout, data, tmp_path, package):
    """Without CANN torch_npu can't be imported; --device=auto finds the NPU."""
    info = fake_cann(tmp_path, package)
    with open(os.path.join(os.path.dirname(info), 'opt', 'my Ascend', package, 'set_env.sh'), 'a') as file:
        file.write('unset FAKE_NPU_CANN\n')
    env = dict(emulator(), ASCEND_INSTALL_INFO=info, FAKE_NPU_CANN='missing')
    del env['ASCEND_HOME_PATH']
    flags = [flag for flag in TINY if not flag.startswith('--device')]
    run = run_script(checkout, 'train_performance_1p', '--data_path=' + data, *flags, '--maxstep=3', **env)
    result(run)
    assert 'Device: npu:0, Ascend (emulated on CPU)' in run.out
    without = run_script(checkout, 'train_performance_1p', '--data_path=' + data, *flags, '--device=npu',
                         **dict(env, ASCEND_INSTALL_INFO='/nowhere'))
    fails(without, '--device npu', 'CANN is not set up')
    assert 'found no CANN' in without.err
    assert 'Final result' not in text(output(checkout, 'train_0_perf.log'))


@pytest.mark.parametrize('flags, env, expected', [
    pytest.param([], {'FAKE_NPU_CANN': 'missing'}, 'CANN is not set up', marks=pytest.mark.soak),
    ([], {'FAKE_NPU_CANN': '7.0'}, 'cannot be started'),  # each process finds it
    pytest.param(['--amp', '--amp_dtype=bfloat16'], {'FAKE_NPU_SOC': '910A'}, '--amp_dtype bfloat16',
                 marks=pytest.mark.soak),
    (['--nproc_per_node=3'], {}, 'there are 2; lower --nproc_per_node')])
def test_an_error_on_every_process_is_one_line(emulator, checkout, data, flags, env, expected):
    started = time.time()
    run = run_script(checkout, 'train_full_8p', '--data_path=' + data, *ON_NPU, '--nproc_per_node=2', *flags,
                     MARK=checkout, **emulator(FAKE_NPU_COUNT='2', **env))
    fails(run, expected)
    assert time.time() - started < 60
    assert all_end(checkout)


# ---- compilation

TORCHAIR = '''
def get_npu_backend(**options):
    def compile_graph(graph, inputs):
        print('TorchAir got a graph of %d nodes' % len(graph.graph.nodes), flush=True)
        return graph
    return compile_graph
'''


def test_compile_backends_on_the_emulated_npu(train, tmp_path):
    """Backends that compute each operator as written train as without compilation."""
    plain = train('--maxstep=3').losses()
    assert train('--maxstep=3', '--compile', '--compile_backend=eager').losses() == pytest.approx(plain, abs=1e-4)
    (tmp_path / 'torchair.py').write_text(TORCHAIR)
    path = os.pathsep.join([str(tmp_path), EMULATOR])
    run = train('--maxstep=3', '--compile', '--compile_backend=torchair', PYTHONPATH=path)
    assert run.losses() == pytest.approx(plain, abs=1e-4) and 'TorchAir got a graph of ' in run.out


def test_missing_compile_backends_are_one_line(train):
    one_line(train('--compile', '--compile_backend=torchair'), '--compile_backend torchair: TorchAir is not installed')
    one_line(train('--compile', '--compile_backend=npugraph_ex'), '--compile_backend', 'npugraph_ex')


def test_compile_backends_of_npus_and_unknown_ones_are_refused(refused, monkeypatch):
    base = DIGITS + ['--device=cpu', '--compile_backend']
    if hasattr(torch.nn.Module, 'compile'):
        refused(base + ['torchair', '--compile'], '--compile_backend torchair: ', 'the device is cpu', 'use inductor')
        refused(base + ['induktor', '--compile'], '--compile_backend', 'did you mean inductor')
        refused(base + ['nosuch', '--compile'], "'nosuch'; it must be one of cudagraphs, inductor, ")
        refused(base + ['tvm', '--compile'], '--compile_backend tvm: it cannot compile here (', 'use inductor')
    refused(base + ['eager'], '--compile_backend eager needs --compile')


@pytest.mark.parametrize('stopped', (False, True))
def test_a_failed_compilation_is_one_line(refused, monkeypatch, capsys, stopped):
    """A signal to the whole process group ends the compiler, too: then the line is about the signal."""
    if not hasattr(torch.nn.Module, 'compile'):
        cannot_run('current', 'this PyTorch cannot compile')

    def fail(*_, **__):
        if stopped:
            os.kill(os.getpid(), signal.SIGTERM)
        raise RuntimeError('g++ failed')
    monkeypatch.setattr(importlib.import_module('torch._inductor.compile_fx'), 'compile_fx', fail)
    flags = DIGITS + ['--device=cpu', '--compile', '--maxstep=1']
    if not stopped:
        refused(flags, '--compile: the model cannot be compiled here (', 'g++ failed', 'leave the flag out')
        return
    assert run_class_finetuning.run(flags) == 143
    assert 'error: interrupted by SIGTERM; ' in capsys.readouterr().err
