"""Tests of the emulator itself. Run with its folder on PYTHONPATH: ``pytest tests``."""

import copy
import io
import os
import pickle
import socket

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
import torch_npu  # noqa: F401
from tiny_vit import gap, make_model, train
from torch import nn
from torch_npu.optim import NpuFusedAdamW

# ------------------------------------------------------------------------------- training


def test_training_matches_cpu():
    cpu, npu = make_model(), make_model().to('npu')
    one = train(cpu, 'cpu', torch.optim.AdamW(cpu.parameters()))
    other = train(npu, 'npu', NpuFusedAdamW(npu.parameters()))
    assert (one - other).abs().max() < 1e-5 and gap(cpu, npu) < 1e-5


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_autocast_types(dtype):
    x, layer = torch.randn(4, 8, device='npu'), nn.Linear(8, 8).npu()
    with torch.autocast('npu', dtype=dtype):
        assert layer(x).dtype == dtype and (layer(x) @ x.t()).dtype == dtype
        assert layer(x).softmax(-1).dtype == torch.float32
        assert F.layer_norm(layer(x), (8,)).dtype == torch.float32
        assert F.cross_entropy(layer(x), torch.zeros(4, dtype=torch.long, device='npu')).dtype == torch.float32
    assert layer(x).dtype == torch.float32


@pytest.mark.parametrize('make', [lambda: torch.amp.GradScaler('npu'), torch.npu.amp.GradScaler])
def test_grad_scaler(make):
    cpu, npu = make_model(), make_model().to('npu')
    one = train(cpu, 'cpu', torch.optim.AdamW(cpu.parameters()))
    other = train(npu, 'npu', NpuFusedAdamW(npu.parameters()), amp=torch.float16, scaler=make())
    assert (one - other).abs().max() < 0.05


def test_grad_scaler_skips_overflow():
    p = nn.Parameter(torch.ones(2, device='npu'))
    opt, scaler = NpuFusedAdamW([p]), torch.npu.amp.GradScaler()
    scaler.scale(p.sum() * float('inf')).backward()
    scaler.step(opt)
    scaler.update()
    assert p.tolist() == [1, 1] and scaler.get_scale() == 2.0**15


# ------------------------------------------------------------------------------- optimizer


def test_fused_adamw_refusals():
    opt = NpuFusedAdamW([nn.Parameter(torch.ones(2, device='npu'))])
    with pytest.raises(ValueError):
        opt.zero_grad(set_to_none=True)
    p = nn.Parameter(torch.ones(2, device='npu', dtype=torch.bfloat16))
    p.grad = torch.ones_like(p)
    with pytest.raises(TypeError):
        NpuFusedAdamW([p]).step()
    with pytest.raises(ValueError):
        NpuFusedAdamW([p], lr=-1)


def test_fused_adamw_clips_like_torch():
    params = [[nn.Parameter(torch.ones(3, device='npu')), nn.Parameter(torch.ones(2, 2, device='npu'))]
              for _ in range(2)]
    for pair in params:
        for i, p in enumerate(pair):
            p.grad = torch.full_like(p, i + 1.0)
    norm = NpuFusedAdamW(params[0]).clip_grad_norm_fused_(1.0)
    assert torch.allclose(norm, nn.utils.clip_grad_norm_(params[1], 1.0))
    assert all(torch.allclose(a.grad, b.grad) for a, b in zip(*params))


def test_fused_adamw_does_not_see_replaced_gradients():
    p = nn.Parameter(torch.ones(1, device='npu'))
    opt = NpuFusedAdamW([p], lr=0.1, weight_decay=0.0)
    p.sum().backward()
    opt.step()
    opt.zero_grad()
    before = p.item()
    p.grad = torch.full_like(p, -100.0)  # as model.zero_grad() and a new backward do
    opt.step()
    assert p.item() < before  # the moments continue with the old, zeroed gradient


def test_fused_adamw_resumes():
    whole, half = make_model().to('npu'), make_model().to('npu')
    opt, first = NpuFusedAdamW(whole.parameters()), NpuFusedAdamW(half.parameters())
    train(whole, 'npu', opt, 4)
    train(half, 'npu', first, 4)
    buffer = io.BytesIO()
    torch.save([half.state_dict(), first.state_dict()], buffer)
    buffer.seek(0)
    weights, moments = torch.load(buffer, map_location='cpu')
    rest = make_model().to('npu')
    rest.load_state_dict(weights)
    second = NpuFusedAdamW(rest.parameters())
    second.load_state_dict(moments)
    train(whole, 'npu', opt, 2)
    train(rest, 'npu', second, 2)
    assert gap(whole, rest) < 1e-6


# --------------------------------------------------------------------------------- device


def test_device_module():
    assert torch.npu.is_available() and torch.npu.device_count() == int(os.environ.get('FAKE_NPU_COUNT', 1))
    assert torch.npu.get_device_name() == 'Ascend (emulated on CPU)'
    assert torch.accelerator.current_accelerator() == torch.device('npu') and not torch.cuda.is_available()
    assert torch.npu.get_device_properties(0).name == torch.npu.get_device_name(0) == 'Ascend (emulated on CPU)'
    torch.npu.synchronize()
    torch.npu.empty_cache()
    with torch.npu.device(0), torch.npu.stream(torch.npu.current_stream()):
        assert torch.ones(1, device='npu').device == torch.device('npu:0')
    with pytest.raises(RuntimeError):
        torch.npu.set_device(torch.npu.device_count())


def test_memory_statistics():
    before = torch.npu.memory_allocated()
    torch.npu.reset_peak_memory_stats()
    x = torch.empty(1024, device='npu')
    view = x[10:]
    del x
    assert torch.npu.memory_allocated() - before == 4096
    del view
    assert torch.npu.memory_allocated() == before and torch.npu.max_memory_allocated() - before == 4096


@pytest.mark.parametrize('call', [
    lambda: torch.ones(1, dtype=torch.float64, device='npu'), lambda: torch.ones(1, dtype=torch.float64).to('npu'),
    lambda: torch.ones(1, device='npu').sum(dtype=torch.float64), lambda: nn.Linear(1, 1).double().to('npu')])
def test_float64_is_refused(call):
    with pytest.raises(TypeError, match='does not support Double'):
        call()


@pytest.mark.filterwarnings('ignore:Ascend NPU does not support float64')
def test_double_of_an_npu_tensor_is_float32():
    assert torch.ones(1, device='npu').double().dtype == torch.float32


@pytest.mark.parametrize('call', [
    lambda x, y: x + y, lambda x, y: x @ y, lambda x, y: torch.cat([x, y]), lambda x, y: F.linear(x, y),
    lambda x, y: x.numpy(), lambda x, y: x.normal_(generator=torch.Generator())])
def test_mixed_devices_are_refused(call):
    with pytest.raises((RuntimeError, TypeError)):
        call(torch.ones(2, 2, device='npu'), torch.ones(2, 2))


def test_scalars_and_cpu_indices_are_fine():
    x = torch.arange(4.0, device='npu')
    assert (x * 2 + torch.tensor(1.0))[torch.tensor([0, 3])].tolist() == [1, 7]


def test_views_share_memory():
    x = torch.zeros(3, 4, device='npu')
    x[1].add_(1)
    x.t()[2:, 0] = 5
    x.view(-1)[-1] = 9
    assert x.tolist() == [[0, 0, 5, 5], [1, 1, 1, 1], [0, 0, 0, 9]] and x[1]._base is x


def test_out_resizes():
    out = torch.empty(0, device='npu')
    torch.add(torch.ones(3, device='npu'), 1, out=out)
    assert out.tolist() == [2, 2, 2]


def test_generator_is_apart_from_the_cpu_one():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    state = torch.npu.get_rng_state()
    one = F.dropout(torch.ones(64, device='npu'))
    torch.npu.set_rng_state(state)
    assert torch.equal(one, F.dropout(torch.ones(64, device='npu'))) and torch.equal(before, torch.get_rng_state())


def test_copies_and_checkpoints():
    x = nn.Parameter(torch.arange(3.0, device='npu'))
    for other in (copy.deepcopy(x), pickle.loads(pickle.dumps(x))):
        assert other.device == x.device and torch.equal(other, x)
    buffer = io.BytesIO()
    torch.save(x, buffer)
    for where in ('cpu', 'npu', 'npu:0', None):
        buffer.seek(0)
        assert torch.load(buffer, map_location=where).device == torch.device('cpu' if where == 'cpu' else 'npu:0')


def fork_child(queue):
    try:
        torch.ones(1, device='npu')
        queue.put('worked')
    except RuntimeError as error:
        queue.put(str(error).splitlines()[0])


def test_use_after_fork_is_refused():
    torch.ones(1, device='npu')
    context = mp.get_context('fork')
    queue = context.SimpleQueue()
    process = context.Process(target=fork_child, args=(queue,))
    process.start()
    assert 'forked' in queue.get()
    process.join()


def test_data_loader_with_workers():
    torch.ones(1, device='npu')
    loader = torch.utils.data.DataLoader(list(torch.arange(8.0)), batch_size=4, num_workers=2, pin_memory=True)
    for batch in loader:
        assert batch.is_pinned() and batch.to('npu', non_blocking=True).device.type == 'npu'


# ---------------------------------------------------------------------------- distributed


def worker(rank, world, port, queue):
    torch.npu.set_device(rank)
    dist.init_process_group('hccl', init_method=f'tcp://127.0.0.1:{port}', rank=rank, world_size=world)
    device = torch.device('npu', rank)
    errors = []
    for tensor in (torch.ones(1), torch.ones(1, dtype=torch.float64, device=device),
                   torch.ones(1, dtype=torch.bool, device=device)):
        with pytest.raises(RuntimeError) as error:
            dist.all_reduce(tensor)
        errors.append(str(error.value).splitlines()[0])
    average = torch.tensor([rank + 1.0], device=device)
    dist.all_reduce(average, op=dist.ReduceOp.AVG)
    gathered = [None] * world
    dist.all_gather_object(gathered, rank)
    model = make_model().to(device).eval()
    ddp = nn.parallel.DistributedDataParallel(model, device_ids=[rank])
    train(ddp, 'npu', NpuFusedAdamW(ddp.parameters()), part=slice(rank * 4, rank * 4 + 4))
    queue.put((rank, errors, average.item(), gathered, [p.tolist() for p in model.parameters()]))
    dist.barrier()
    dist.destroy_process_group()


def test_data_parallel(monkeypatch):
    monkeypatch.setenv('FAKE_NPU_COUNT', '2')
    monkeypatch.setenv('FAKE_NPU_FLOAT64', '1')
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        port = free.getsockname()[1]
    queue = mp.get_context('spawn').SimpleQueue()
    context = mp.start_processes(worker, args=(2, port, queue), nprocs=2, start_method='spawn', join=False)
    (_, errors, average, gathered, one), (_, _, _, _, other) = sorted([queue.get(), queue.get()])
    while not context.join():
        pass
    assert 'device type cpu' in errors[0] and 'Unsupported data type Double' in errors[1] and 'Unsupported' in errors[2]
    assert average == 1.5 and gathered == [0, 1] and one == other
    alone = make_model().to('npu').eval()
    train(alone, 'npu', NpuFusedAdamW(alone.parameters()))
    assert max((p.cpu() - torch.tensor(q)).abs().max().item() for p, q in zip(alone.parameters(), one)) < 1e-5
