"""The behaviour of a 910A: test_switches.py runs this file in a process with FAKE_NPU_SOC=910A."""

import socket

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
import torch_npu
from tiny_vit import gap, make_model, train
from torch import nn
from torch_npu.npu import utils
from torch_npu.optim import NpuFusedAdamW

TOP = {torch.float16: 65504.0, torch.float32: torch.finfo(torch.float32).max}
INF, NAN = float('inf'), float('nan')


@pytest.fixture(autouse=True)
def no_overflow():
    utils.clear_npu_overflow_flag()


def full(value, dtype=torch.float16, shape=(2, 2)):
    return torch.full(shape, value, dtype=dtype, device='npu')


def test_properties_of_the_device():
    assert torch.npu.get_device_name() == torch.npu.get_device_properties().name == 'Ascend (emulated on CPU)'
    assert not torch.npu.is_bf16_supported() and torch.npu.get_amp_supported_dtype() == [torch.float16]
    assert not utils.is_support_inf_nan() and torch.npu._compile_mode is True
    for call in (lambda: full(1, torch.bfloat16), lambda: full(1).to(torch.bfloat16),
                 lambda: torch.ones(1, dtype=torch.bfloat16).to('npu')):
        with pytest.raises(TypeError, match='910A does not support BFloat16'):
            call()


@pytest.mark.parametrize('dtype', TOP, ids=str)
@pytest.mark.parametrize('call', [
    lambda x: x * x, lambda x: x @ x, lambda x: x.sum(), lambda x: x.mul_(4), lambda x: x.exp(), lambda x: x / 0,
    lambda x: torch.add(x, x, out=torch.empty_like(x)), lambda x: torch._foreach_mul([x], 4.0)[0],
    lambda x: torch._foreach_add_([x], [x])[0], lambda x: F.linear(x, x), lambda x: x.addcmul_(x, x), lambda x: x * INF,
    lambda x: x.index_put_((torch.zeros(2, dtype=torch.long, device='npu'),), x.clone(), accumulate=True)[:1]])
def test_overflow_saturates_and_is_flagged(call, dtype):
    result = call(full(0.8 * TOP[dtype], dtype))
    assert result.dtype == dtype and set(result.flatten().tolist()) == {TOP[dtype]}
    assert utils.get_npu_overflow_flag()
    assert utils.get_npu_overflow_flag()  # it stays until it is cleared
    assert call(full(-0.8 * TOP[dtype], dtype)).isfinite().all()
    utils.clear_npu_overflow_flag()
    assert not utils.get_npu_overflow_flag()


def test_nan_becomes_zero():
    x = full(0.0)
    assert (x / x).tolist() == [[0, 0], [0, 0]] and utils.get_npu_overflow_flag()


def test_gradients_saturate():
    x = nn.Parameter(full(60000.0))
    (x * 4).sum().mul(40000).backward()
    assert set(x.grad.flatten().tolist()) == {TOP[torch.float16]} and utils.get_npu_overflow_flag()


def test_dropout_saturates():
    torch.manual_seed(0)
    assert F.dropout(full(60000.0, shape=(64,)), 0.5).max() == TOP[torch.float16] and utils.get_npu_overflow_flag()


def test_a_cast_on_the_device_saturates():
    assert full(1e6, torch.float32).half().max() == TOP[torch.float16] and utils.get_npu_overflow_flag()
    utils.clear_npu_overflow_flag()
    half, single = full(0.0), full(-1e6, torch.float32)
    torch._foreach_copy_([half], [single])
    assert half.min() == -TOP[torch.float16] and utils.get_npu_overflow_flag()


@pytest.mark.parametrize('value', [INF, -INF, NAN])
@pytest.mark.parametrize('call', [
    lambda x: x.cpu(), lambda x: x.clone(), lambda x: x[0], lambda x: x.t().reshape(-1), lambda x: torch.cat([x, x]),
    lambda x: x.index_select(0, torch.tensor([1], device='npu')), lambda x: torch.zeros_like(x).copy_(x),
    lambda x: x[torch.tensor([0, 1])], lambda x: torch.where(x == 0, x, x),
    lambda x: torch.full_like(x, x[0, 0].item()),
    lambda x: torch.zeros_like(x).masked_fill_(x == x, x[0, 0].item()).masked_fill_(x != x, NAN),
    lambda x: x.cpu().to('npu'), lambda x: x.cpu().float().to('npu', torch.float16), lambda x: torch.stack([x, x]),
    lambda x: (torch._foreach_copy_([torch.zeros_like(x)], [x]), x)[1],
    lambda x: torch.empty_like(x).fill_(x[0, 0].item()), lambda x: F.embedding(torch.tensor([1], device='npu'), x),
    lambda x: x.repeat(2, 2), lambda x: x.gather(0, (x == 0).long())])
def test_moving_data_neither_changes_it_nor_sets_the_flag(call, value):
    x = torch.full((2, 2), value).half().to('npu')
    result = call(x).cpu().float()
    assert torch.equal(result, torch.full_like(result, value)) or (value != value and result.isnan().all())
    assert not utils.get_npu_overflow_flag()


def test_flag_functions():
    assert torch.npu.get_npu_overflow_flag() is False and not utils.npu_check_overflow(full(1.0))
    full(60000.0) * 2
    assert torch_npu.npu_get_float_status(full(0.0)).tolist() == [1] + [0] * 7
    assert utils.npu_check_overflow(full(1.0)) and not utils.npu_check_overflow(1.0)  # it clears the flag
    full(60000.0) * 2
    torch_npu.npu_clear_float_status(full(0.0))
    assert torch.npu.get_npu_overflow_flag() is False


def test_training_is_as_on_the_cpu():
    cpu, npu = make_model(), make_model().to('npu')
    one = train(cpu, 'cpu', torch.optim.AdamW(cpu.parameters()))
    other = train(npu, 'npu', NpuFusedAdamW(npu.parameters()))
    assert (one - other).abs().max() < 1e-5 and gap(cpu, npu) < 1e-5 and not utils.get_npu_overflow_flag()


@pytest.mark.parametrize('make_optimizer', [torch.optim.SGD, NpuFusedAdamW])
@pytest.mark.parametrize('make_scaler', [torch.npu.amp.GradScaler, lambda: torch.amp.GradScaler('npu')])
@pytest.mark.filterwarnings('ignore:Ascend NPU does not support float64')
def test_a_dynamic_scaler_skips_what_saturated(make_optimizer, make_scaler):
    p = nn.Parameter(torch.ones(2, device='npu'))
    optimizer, scaler = make_optimizer([p], lr=0.5), make_scaler()
    for factor, moves, scale in ((INF, False, 2.0**15), (1.0, True, 2.0**15), (1e38, False, 2.0**14),
                                 (1.0, True, 2.0**14)):
        before = p.tolist()
        optimizer.zero_grad(set_to_none=False)
        scaler.scale((p * factor).sum()).backward()
        assert p.grad.isfinite().all()  # so only the flag shows the overflow
        scaler.step(optimizer)
        scaler.update()
        assert (p.tolist() != before) == moves and scaler.get_scale() == scale


def test_a_static_scaler_never_skips():
    p = nn.Parameter(torch.ones(2, device='npu'))
    optimizer, scaler = torch.optim.SGD([p], lr=1e-38), torch.npu.amp.GradScaler(dynamic=False, init_scale=128.0)
    scaler.scale((p * INF).sum()).backward()
    scaler.step(optimizer)
    scaler.update()
    assert p.tolist() != [1, 1] and scaler.get_scale() == 128


def worker(rank, port, queue):
    torch.npu.set_device(rank)
    dist.init_process_group('hccl', init_method='tcp://127.0.0.1:%d' % port, rank=rank, world_size=2)
    half, average = full(40000.0), full(40000.0)
    dist.all_reduce(half, op=dist.ReduceOp.MAX)
    quiet = utils.get_npu_overflow_flag()
    dist.all_reduce(half)
    dist.all_reduce(average, op=dist.ReduceOp.AVG)
    part = full(0.0, shape=(1,))
    dist.reduce_scatter_tensor(part, full(40000.0, shape=(2,)))
    seen = [half[0, 0].item(), average[0, 0].item(), part.item(), quiet, utils.get_npu_overflow_flag()]

    p = nn.Parameter(torch.ones(2, device='npu'))  # only rank 1 overflows, and both skip
    optimizer, scaler = torch.optim.SGD([p], lr=0.5), torch.npu.amp.GradScaler()
    scaler.scale((p * (INF if rank else 1.0)).sum()).backward()
    scaler.step(optimizer)
    scaler.update()
    queue.put(seen + [p.tolist(), scaler.get_scale()])
    dist.barrier()
    dist.destroy_process_group()


def test_reductions_saturate_and_ranks_skip_together(monkeypatch):
    monkeypatch.setenv('FAKE_NPU_COUNT', '2')
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        port = free.getsockname()[1]
    queue = mp.get_context('spawn').SimpleQueue()
    context = mp.start_processes(worker, args=(port, queue), nprocs=2, start_method='spawn', join=False)
    for seen in (queue.get(), queue.get()):
        assert seen == [65504.0, 32752.0, 65504.0, False, True, [1, 1], 2.0**15]
    while not context.join():
        pass
