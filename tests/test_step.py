"""Optimisations of a step don't change its result: late reading, dropped images, checkpointing, compiling."""

import copy
import math
import time

import pytest
import torch

import engine_for_finetuning as engine
import modeling_finetune
import utils
from beit.devices import accelerator, kernels
from beit.training import loss_scaler, step_control
from helpers import CPU, Listener, Numbered, cannot_run, check_trajectory, toy, trajectory_run

pytestmark = [pytest.mark.fast, pytest.mark.computes]

FUSED = kernels.supports_grad_scale(
    kernels.build_optimizer(torch.optim.AdamW, [torch.nn.Parameter(torch.zeros(1))], lr=1.))
needs_fused = pytest.mark.needs('current', FUSED, 'this PyTorch has no fused AdamW for a CPU')


@pytest.fixture
def far_device(monkeypatch):
    """The CPU as a device whose reads have to wait."""
    monkeypatch.setattr(accelerator, 'is_synchronous', lambda device: False)


def train(batches=24, poison=(), on_nonfinite='skip', scale=1., ema=False, **options):
    """(model, its average, statistics, pilot) after an epoch; the loss of the batches in `poison` is NaN."""
    torch.manual_seed(0)
    model, loader = toy()
    loader = Numbered([loader[number % len(loader)] for number in range(batches)])
    average = utils.ModelEma(model, 0.9) if ema else None
    losses = iter(range(batches))

    def criterion(output, targets):
        loss = torch.nn.functional.cross_entropy(output, targets)
        return loss * float('nan') if next(losses) in poison else loss

    listener = Listener(on_nonfinite)
    optimizer = kernels.build_optimizer(torch.optim.AdamW, model.parameters(), lr=1e-3, weight_decay=0.05)
    stats = engine.train_one_epoch(model, criterion, loader, optimizer, CPU, 0, loss_scaler.LossScaler(scale),
                                   model_ema=average, monitor=listener, **options)
    return model, average, stats, listener


def assert_equal_weights(one, other, tolerance=0.):
    for name, value in one.state_dict().items():
        assert torch.allclose(value, other.state_dict()[name], tolerance, tolerance), name


# ---- reading late

@needs_fused
def test_the_host_reads_nothing_between_two_lines(far_device, monkeypatch):
    """Records over 24 updates in which steps tensor values are read and the device is synchronised."""
    from torch.utils._python_dispatch import TorchDispatchMode
    asked, waited, reads = [], [], []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if function is torch.ops.aten._local_scalar_dense.default:
                asked.append(len(steps))
            return function(*args, **(kwargs or {}))

    steps, step = [], step_control.CheckpointMonitor.begin_sync
    monkeypatch.setattr(step_control.CheckpointMonitor, 'begin_sync', lambda *args: steps.append(1) or step(*args))
    monkeypatch.setattr(accelerator, 'synchronize', lambda device: waited.append(len(steps) - 1))
    read = utils.to_floats
    monkeypatch.setattr(utils, 'to_floats', lambda values: reads.append(len(steps) - 1) or read(values))
    with Watch():
        _, _, stats, _ = train(24, max_norm=1., scale=128., throughput=utils.Throughput(warmup_steps=2))
    assert asked == []
    assert waited == [0, 1, 10, 20, 23]  # the first two steps, which are timed separately, and each printed line
    assert sorted(set(reads)) == [0, 10, 20, 23]
    assert math.isfinite(stats['loss'])


@needs_fused
@pytest.mark.parametrize('scale', (1., 128.))
def test_late_reading_gives_the_same_results(scale, monkeypatch):
    """Equal weights, statistics and reports, with two skipped updates; the average is equal up to rounding."""
    options = dict(poison=(3, 15), scale=scale, ema=True, max_norm=0.5)
    at_once = train(**options)
    monkeypatch.setattr(accelerator, 'is_synchronous', lambda device: False)
    late = train(**options)
    assert_equal_weights(at_once[0], late[0])
    assert_equal_weights(at_once[1].ema, late[1].ema, 1e-6)
    assert late[2] == at_once[2] and late[2]['skipped_steps'] == 2
    assert late[3].records == at_once[3].records
    assert [record['update_step'] for record in late[3].records] == [3, 15]


@needs_fused
def test_a_loss_that_is_not_finite_stops_at_the_next_line(far_device):
    with pytest.raises(engine.UserError, match='the loss is nan at update step 3; '):
        train(poison=(3,), on_nonfinite='stop')


@needs_fused
def test_the_fused_step_is_that_of_clipping_and_adamw():
    """Against PyTorch's loop over tensors, with gradients unscaled and clipped by hand."""
    fused, _, _, _ = train(12, max_norm=0.1, scale=128.)
    torch.manual_seed(0)
    plain, loader = toy()
    optimizer = torch.optim.AdamW(plain.parameters(), lr=1e-3, weight_decay=0.05, foreach=False, fused=False)
    for number in range(12):
        images, targets = loader[number % len(loader)]
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(plain(images), targets).backward()
        assert torch.nn.utils.clip_grad_norm_(plain.parameters(), 0.1) > 0.1
        optimizer.step()
    assert_equal_weights(plain, fused, 2e-6)


# ---- stochastic depth

def block(drop_path, gamma=0.5):
    torch.manual_seed(1)
    return modeling_finetune.Block(16, 2, drop_path=drop_path, init_values=gamma, window_size=(2, 2))


@pytest.mark.parametrize('kept', ((), (1,), (0, 2, 3, 5), tuple(range(6))))
@pytest.mark.parametrize('gamma', (None, 0.5))
def test_skipping_dropped_images_computes_what_a_mask_does(kept, gamma, monkeypatch):
    """Output and gradients with the same dropped images, including none and all."""
    keep = torch.zeros(6, dtype=torch.bool)
    keep[list(kept)] = True
    one, other = block(0.25, gamma), block(0.25, gamma)
    one.skips_dropped = True
    other.drop_path = torch.nn.Identity()
    other.drop_path.drop_prob = 0.25
    other.drop_path.forward = lambda ones: ones * keep[:, None, None].float() / 0.75
    monkeypatch.setattr(torch, 'rand', lambda size: keep.float())
    x = torch.randn(6, 5, 16)
    results = []
    for each in (one, other):
        leaf = x.clone().requires_grad_()
        output = each(leaf)
        (output * torch.arange(output.numel()).view_as(output)).sum().backward()
        results.append([output.detach(), leaf.grad] + [parameter.grad for parameter in each.parameters()])
    for mine, theirs in zip(*results):
        assert mine is not None
        assert torch.allclose(mine, theirs, 1e-4, 1e-4)


@pytest.mark.parametrize('skips', (True, False))
def test_the_share_of_dropped_images_is_the_rate(skips):
    """Each branch separately; 4,000 images at 0.25, within three standard deviations of 0.0068."""
    each = block(0.25, gamma=None)
    each.skips_dropped = skips
    each.attn = torch.nn.Identity()
    each.norm1 = torch.nn.Identity()
    each.attn.forward = lambda x, shared_bias: torch.ones_like(x)
    each.norm2 = torch.nn.Identity()
    each.mlp.forward = lambda x: torch.full_like(x, 10.)
    added = each(torch.zeros(4000, 1, 16))[:, 0, 0] * 0.75
    assert set(added.round().tolist()) == {0., 1., 10., 11.}
    for branch in (added.round() % 10 > 0, added.round() >= 10):
        assert branch.float().mean().item() == pytest.approx(0.75, abs=0.021)
    assert all(each.eval()(torch.zeros(100, 1, 16))[:, 0, 0] == 11.)


# ---- checkpointing and compiling

def nano(**options):
    torch.manual_seed(0)
    return modeling_finetune.beit_nano_patch8_32(num_classes=7, use_rel_pos_bias=True, use_abs_pos_emb=False,
                                                 init_values=0.1, init_scale=1., **options)


@pytest.mark.parametrize('skips', (True, False))
def test_gradient_checkpointing_gives_the_same_bits(skips):
    images, results = torch.randn(6, 3, 32, 32), []
    for enable in (False, True):
        model = nano(drop_path_rate=0.5)
        model.set_grad_checkpointing(enable)
        for each in model.blocks:
            each.skips_dropped = skips
        torch.manual_seed(3)
        model(images).square().sum().backward()
        results.append([parameter.grad for parameter in model.parameters()])
    for mine, theirs in zip(*results):
        assert torch.equal(mine, theirs)


def test_gradient_checkpointing_computes_the_blocks_twice():
    model, calls = nano(), []
    model.blocks[0].register_forward_pre_hook(lambda *_: calls.append(1))
    model.set_grad_checkpointing()
    model(torch.randn(2, 3, 32, 32)).sum().backward()
    assert len(calls) == 2
    with torch.no_grad():
        model(torch.randn(2, 3, 32, 32))
    assert len(calls) == 3


@pytest.mark.slow
def test_a_compiled_model_is_one_graph_and_trains_as_the_reference(golden):
    """Over the two recorded epochs: one graph for training and one for evaluation, without recompilation."""
    if not hasattr(torch.nn.Module, 'compile'):
        cannot_run('current', 'this PyTorch cannot compile')
    try:
        kernels.check_compile(CPU)
    except engine.UserError as error:
        cannot_run('compiler', str(error))
    from torch import _dynamo
    from torch._dynamo.utils import counters
    _dynamo.reset()
    counters.clear()
    recorded = golden('trajectory.npz')
    stats, losses, model = trajectory_run(recorded, prepare=kernels.compile_in_place)
    check_trajectory(recorded, stats, losses, model)
    assert counters['stats']['unique_graphs'] == 1
    assert not counters['graph_break']
    for _ in range(2):
        engine.evaluate([(torch.from_numpy(recorded['images'])[0].float(), torch.from_numpy(recorded['targets'])[0])],
                        model, CPU)
    assert counters['stats']['unique_graphs'] == 2


def test_average_of_the_weights_in_one_call():
    """Against the formula, tensor by tensor."""
    model = nano()
    average = utils.ModelEma(model, 0.75)
    before = copy.deepcopy(average.ema.state_dict())
    state = {name: value + 1 if value.is_floating_point() else value for name, value in model.state_dict().items()}
    average.update(state)
    for name, value in average.ema.state_dict().items():
        if value.is_floating_point():
            assert torch.allclose(value, 0.75 * before[name] + 0.25 * state[name])
    kept = copy.deepcopy(average.ema.state_dict())
    average.update(state, skip=True)
    average.update(state, skip=torch.tensor(True))
    for name, value in average.ema.state_dict().items():
        assert torch.equal(value, kept[name])


# ---- the bottleneck

@pytest.mark.parametrize('seconds, limit', ((0.2, 'loader'), (0., 'device')))
def test_a_run_reports_whether_loader_or_device_is_the_limit(seconds, limit):
    """A loader with 200 ms per batch; then a model with 200 ms per batch and an instant loader."""
    model, loader = toy()

    class Slow(Numbered):
        def __iter__(self):
            for batch in super().__iter__():
                time.sleep(seconds)
                yield batch

    def criterion(output, targets):
        time.sleep(0.2 - seconds)
        return torch.nn.functional.cross_entropy(output, targets)

    throughput = utils.Throughput(warmup_steps=2)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    engine.train_one_epoch(model, criterion, Slow(loader * 2), optimizer, CPU, 0, throughput=throughput)
    assert throughput.bottleneck().startswith('the %s is the limit: ' % limit)
    assert throughput.data_share > 0.5 if seconds else throughput.data_share < 0.05
    assert throughput.step_milliseconds > 200


def test_a_run_that_waits_for_data_less_than_half_of_the_time_names_no_limit():
    throughput = utils.Throughput(warmup_steps=0)
    throughput.update(8, 1., 0.385)
    assert throughput.bottleneck() == ('the device waited for data 38.5 % of the time; more --num_workers or, '
                                       'for JPEG files, --data_backend fast may help')


@pytest.mark.parametrize('sizes, counted', [
    ((24, 1), (24, 1)), ((24, 24), (24,)), ((8, 8, 8, 4), (8, 8, 4)), ((5,), (5,))])
def test_the_speed_leaves_a_smaller_last_batch_out(sizes, counted):
    throughput = utils.Throughput(warmup_steps=1)
    for size in sizes:
        throughput.update(size, 1. + (size == 1))
    assert throughput.images_per_second == sum(counted) / (len(counted) + counted.count(1))
