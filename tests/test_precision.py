"""Half precision: what each level means, overflow, and checkpoints that move between precisions."""

import json

import numpy as np
import pytest
import torch

import engine_for_finetuning as engine
import optim_factory
from beit.devices import accelerator, half_precision
from beit.errors import UserError
from beit.training import loss_scaler
from helpers import CPU, RUN, Batches, lines_of, toy, trajectory_run

pytestmark = [pytest.mark.fast, pytest.mark.computes]

HAS_AUTOCAST = hasattr(torch, 'autocast')
HAS_HALF_CPU = half_precision._half_precision_problem(CPU, torch.bfloat16) is None
needs_autocast = pytest.mark.needs('current', HAS_AUTOCAST, 'this PyTorch has no autocast on a CPU')
needs_half = pytest.mark.needs('current', HAS_HALF_CPU, 'this PyTorch has no bfloat16 training on a CPU')


@pytest.mark.parametrize('level', [pytest.param('O1', marks=needs_autocast), pytest.param('O2', marks=needs_half)])
def test_losses_stay_near_float32(golden, level):
    recorded = golden('trajectory.npz')
    _, losses, model = trajectory_run(recorded, amp=dict(dtype=torch.bfloat16, opt_level=level))
    np.testing.assert_allclose(losses, recorded['microbatch_losses'], rtol=0.02)
    stored = {parameter.dtype for parameter in accelerator.unwrap(model).parameters()}
    assert stored == {torch.float32 if level == 'O1' else torch.bfloat16}


@needs_half
def test_o2_masters_are_float32_and_the_model_follows():
    model, loader = toy()
    optimizer = optim_factory.create_optimizer(model, lr=1e-6, weight_decay=0.)
    start = {name: value.clone() for name, value in model.state_dict().items()}
    model, scaler = loss_scaler.initialize_amp(model, optimizer, CPU, torch.bfloat16, 'O2')
    for epoch in range(3):
        engine.train_one_epoch(model, torch.nn.CrossEntropyLoss(), loader, optimizer, CPU, epoch, scaler)
    masters = scaler.fp32_state_dict(model)
    assert {value.dtype for value in masters.values() if value.is_floating_point()} == {torch.float32}
    moved = (masters['head.weight'] - start['head.weight']).abs()
    assert 0 < moved.max() < 1e-4  # steps too small for bfloat16 add up in the masters
    for name, parameter in accelerator.unwrap(model).named_parameters():
        assert torch.equal(parameter, masters[name].to(torch.bfloat16)), name


@needs_half
@pytest.mark.parametrize('dynamic', (False, True))
def test_overflow_is_skipped_and_counted(dynamic):
    model, loader = toy()
    optimizer = optim_factory.create_optimizer(model, lr=1e-3)
    model, scaler = loss_scaler.initialize_amp(model, optimizer, CPU, torch.bfloat16, 'O2',
                                               'dynamic' if dynamic else 128.)
    scale = scaler.scale
    before = {name: value.clone() for name, value in scaler.fp32_state_dict(model).items()}
    handle = accelerator.unwrap(model).head.bias.register_hook(lambda gradient: gradient * float('inf'))
    stats = engine.train_one_epoch(model, torch.nn.CrossEntropyLoss(), Batches(loader[:3]), optimizer, CPU, 0, scaler)
    handle.remove()
    assert stats['skipped_steps'] == 3
    assert scaler.scale == (scale / 8 if dynamic else scale)
    assert all(torch.equal(value, before[name]) for name, value in scaler.fp32_state_dict(model).items())
    stats = engine.train_one_epoch(model, torch.nn.CrossEntropyLoss(), loader, optimizer, CPU, 1, scaler)
    assert stats['skipped_steps'] == 0 and scaler.skipped == 3
    assert not torch.equal(scaler.fp32_state_dict(model)['head.bias'], before['head.bias'])


def test_scale_changes_neither_gradient_norm_nor_step():
    """In float32 a scale of 128 is exact: it must cancel out of the logged norm, the clipping and the update."""
    results = []
    for scale in (1., 128.):
        model, loader = toy()
        optimizer = optim_factory.create_optimizer(model, lr=1e-3)
        stats = engine.train_one_epoch(model, torch.nn.CrossEntropyLoss(), loader, optimizer, CPU, 0,
                                       loss_scaler.LossScaler(scale), max_norm=0.5, update_freq=2)
        results.append((stats['grad_norm'], model.state_dict()))
    assert results[0][0] == pytest.approx(results[1][0], rel=1e-6)
    for name, value in results[0][1].items():
        assert torch.allclose(value, results[1][1][name], atol=1e-7), name


def test_dynamic_scale_grows_and_comes_back():
    scaler = loss_scaler.LossScaler(2. ** 10, dynamic=True)
    scaler.GROWTH_INTERVAL = 3
    weight = torch.nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([weight], lr=0.1)
    scales = []
    for factor in (1, 1, 1, float('inf'), 1, 1, 1):
        optimizer.zero_grad()
        scaler((weight * factor).sum(), optimizer, [weight])
        scales.append(scaler.scale / 2. ** 10)
    assert scales == [1, 1, 2, 1, 1, 1, 2]
    other = loss_scaler.LossScaler(1., dynamic=True)
    other.load_state_dict(scaler.state_dict())
    assert (other.scale, other.skipped, other.good_updates) == (scaler.scale, 1, 3)


def test_unsupported_precisions_are_refused(monkeypatch):
    assert half_precision.check_precision(CPU, False, 'O2', None) is None
    assert half_precision.check_precision(CPU, True, 'O0', None) is None
    with pytest.raises(UserError, match='--amp_dtype float16: half precision on a CPU is bfloat16'):
        half_precision.check_precision(CPU, True, 'O1', 'float16')
    monkeypatch.setattr(half_precision, '_half_precision_problem', lambda device, dtype: 'no such kernel')
    with pytest.raises(UserError, match='--opt-level O2: this PyTorch cannot train in bfloat16 on cpu'):
        half_precision.check_precision(CPU, True, 'O2', None)


@pytest.mark.parametrize('files, expected', (
    ({}, 'not installed'),
    ({'apex/__init__.py': '', 'apex/optimizers/__init__.py': ''}, 'without amp'),
    ({'apex/__init__.py': '', 'apex/i18n.py': ''}, 'unrelated package'),
    ({'apex.py': ''}, 'unrelated package'),
    ({'apex/__init__.py': 'raise RuntimeError("built for another torch")'}, 'cannot be imported'),
    ({'apex/__init__.py': 'from . import amp, optimizers', 'apex/amp.py': 'def initialize(): pass',
      'apex/optimizers.py': 'class NpuFusedAdamW: pass'}, "apex.amp (Ascend's)")))
def test_the_packages_called_apex_are_distinguished(tmp_path, monkeypatch, files, expected):
    import importlib
    import sys
    for name, text in files.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    monkeypatch.syspath_prepend(str(tmp_path))
    for name in [name for name in sys.modules if name.partition('.')[0] == 'apex']:
        monkeypatch.delitem(sys.modules, name)
    importlib.invalidate_caches()
    amp, about = half_precision.find_apex()
    assert expected in about
    assert (amp is not None) == about.startswith('apex.amp')
    for name in [name for name in sys.modules if name.partition('.')[0] == 'apex']:
        del sys.modules[name]


@needs_half
@needs_autocast
def test_checkpoints_move_between_precisions(image_folder, tmp_path):
    import run_class_finetuning
    data, output = image_folder(), str(tmp_path / 'out')
    ways = ([], ['--amp', '--opt-level=O1'], ['--amp', '--opt-level=O2'], [], ['--amp', '--loss_scale=dynamic'])
    for epochs, way in enumerate(ways, start=1):
        flags = ['--data_path=' + data, '--output_dir=' + output, '--epochs=%d' % epochs, '--save_ckpt_freq=1']
        assert run_class_finetuning.run(RUN + flags + way + (['--auto_resume'] if epochs > 1 else [])) == 0
        stored = torch.load('%s/checkpoint-%d.pth' % (output, epochs - 1), map_location='cpu')
        assert {value.dtype for value in stored['model'].values() if value.is_floating_point()} == {torch.float32}
        assert sorted(stored) == ['accuracy', 'activation', 'args', 'classes', 'data', 'epoch', 'model',
                                  'model_spec', 'optimizer', 'progress', 'scaler']
    assert [record['epoch'] for record in lines_of(output)] == list(range(5))
    assert json.dumps(lines_of(output)[-1])
