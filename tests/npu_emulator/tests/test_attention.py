"""Fused attention: exact, and with the faults of FAKE_NPU_SDPA."""

import pytest
import torch
import torch.nn.functional as F
import torch_npu

SCALE = 0.3


def make(dtype=torch.float32):
    """Query, key, value (batch 2, 3 heads, 5 tokens, width 4) and a bias (1, 3, 5, 5), all with gradients."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, 3, 5, 4)] * 3 + [(1, 3, 5, 5)]
    return [torch.randn(shape, generator=generator).to(dtype).requires_grad_() for shape in shapes]


def on_npu(tensors):
    return [t.detach().to('npu').requires_grad_() for t in tensors]


def plain(q, k, v, bias, scale=SCALE, factor=1.0):
    return (q @ k.transpose(-2, -1) * scale + bias * factor).softmax(-1) @ v


def close(out, tensors, wanted, oracle, tolerance=1e-5):
    """Compare outputs, and gradients after a backward of the same weights; a missing gradient is a zero one."""
    weights = torch.arange(float(out.numel())).view(wanted.shape).cos()
    (out.view(wanted.shape).float() * weights.to(out.device)).sum().backward()
    (wanted * weights).sum().backward()
    assert (out.detach().cpu().view(wanted.shape) - wanted).abs().max() < tolerance
    for t, other in zip(tensors, oracle):
        got = torch.zeros_like(other) if t.grad is None else t.grad.cpu()
        assert (got - (0 if other.grad is None else other.grad)).abs().max() < tolerance


@pytest.mark.parametrize('mode, factor', [(None, 1.0), ('exact', 1.0), ('drop_bias', 0.0), ('scale_bias', SCALE)])
@pytest.mark.parametrize('autocast', [False, True])
def test_scaled_dot_product_attention(monkeypatch, mode, factor, autocast):
    monkeypatch.delenv('FAKE_NPU_SDPA', raising=False) if mode is None else monkeypatch.setenv('FAKE_NPU_SDPA', mode)
    cpu = make()
    npu = on_npu(cpu)
    with torch.autocast('npu', dtype=torch.float16, enabled=autocast):
        out = F.scaled_dot_product_attention(*npu[:3], attn_mask=npu[3], scale=SCALE)
    assert out.dtype == (torch.float16 if autocast else torch.float32)
    close(out, npu, plain(*cpu, factor=factor), cpu, tolerance=5e-3 if autocast else 1e-5)
    if mode == 'drop_bias':
        assert npu[3].grad is None


def test_scaled_dot_product_attention_default_scale(monkeypatch):
    monkeypatch.setenv('FAKE_NPU_SDPA', 'scale_bias')
    cpu = make()
    npu = on_npu(cpu)
    close(F.scaled_dot_product_attention(*npu[:3], attn_mask=npu[3]), npu, plain(*cpu, scale=0.5, factor=0.5), cpu)


@pytest.mark.parametrize('mode', ['exact', 'drop_bias', 'scale_bias'])
def test_other_attention_is_exact_in_every_mode(monkeypatch, mode):
    monkeypatch.setenv('FAKE_NPU_SDPA', mode)
    q, k, v, _ = make()
    hidden = torch.ones(5, 5).tril().bool()
    for options in ({}, {'is_causal': True}, {'attn_mask': hidden}):
        on_device = {name: v.to('npu') if name == 'attn_mask' else v for name, v in options.items()}
        with torch.inference_mode():
            out = F.scaled_dot_product_attention(*(t.to('npu') for t in (q, k, v)), **on_device)
            assert (out.cpu() - F.scaled_dot_product_attention(q, k, v, **options)).abs().max() < 1e-5


def test_an_unknown_mode(monkeypatch):
    monkeypatch.setenv('FAKE_NPU_SDPA', 'drop')
    with pytest.raises(ValueError, match='must be exact, drop_bias or scale_bias'):
        F.scaled_dot_product_attention(*on_npu(make())[:3])


INTO = {'BNSD': lambda t: t, 'BSND': lambda t: t.transpose(1, 2), 'BSH': lambda t: t.transpose(1, 2).flatten(2),
        'SBH': lambda t: t.permute(2, 0, 1, 3).flatten(2)}
BACK = {'BNSD': lambda t: t, 'BSND': lambda t: t.transpose(1, 2),
        'BSH': lambda t: t.unflatten(-1, (3, 4)).transpose(1, 2),
        'SBH': lambda t: t.unflatten(-1, (3, 4)).permute(1, 2, 0, 3)}


@pytest.mark.parametrize('layout', INTO)
@pytest.mark.parametrize('mode, factor', [('exact', SCALE), ('drop_bias', 0.0), ('scale_bias', SCALE * SCALE)])
def test_npu_fusion_attention(monkeypatch, layout, mode, factor):
    monkeypatch.setenv('FAKE_NPU_SDPA', mode)
    cpu = make()
    npu = on_npu(cpu)
    results = torch_npu.npu_fusion_attention(*(INTO[layout](t) for t in npu[:3]), 3, layout, pse=npu[3], scale=SCALE)
    assert len(results) == 7 and results[1].shape == (2, 3, 5, 8)
    close(BACK[layout](results[0]), npu, plain(*cpu, factor=factor), cpu)


def test_npu_fusion_attention_divided_bias_is_the_models_bias():
    cpu = make()
    npu = on_npu(cpu)
    out = torch_npu.npu_fusion_attention(*npu[:3], 3, 'BNSD', pse=npu[3] / SCALE, scale=SCALE)[0]
    close(out, npu, plain(*cpu), cpu)


def test_npu_fusion_attention_v2_adds_after_scaling():
    cpu = make()
    npu = on_npu(cpu)
    out = torch_npu.npu_fusion_attention_v2(*npu[:3], 3, 'BNSD', pse=npu[3], scale=SCALE, pse_type=0)[0]
    close(out, npu, plain(*cpu), cpu)


def test_npu_fusion_attention_mask_and_dropout():
    q, k, v, bias = on_npu(make())
    hidden = torch.ones(5, 5, device='npu').triu(1).bool()
    out = torch_npu.npu_fusion_attention(q, k, v, 3, 'BNSD', atten_mask=hidden, scale=0.5)[0]
    assert torch.allclose(out, F.scaled_dot_product_attention(q, k, v, is_causal=True), atol=1e-5)
    torch.manual_seed(0)
    mean = sum(torch_npu.npu_fusion_attention(q, k, v, 3, 'BNSD', keep_prob=0.5)[0] for _ in range(400)) / 400
    assert (mean - torch_npu.npu_fusion_attention(q, k, v, 3, 'BNSD')[0]).abs().max() < 0.4


def test_npu_fusion_attention_refusals():
    q, k, v, bias = on_npu(make())
    with pytest.raises(RuntimeError, match='one dtype'):
        torch_npu.npu_fusion_attention(q.half(), k.half(), v.half(), 3, 'BNSD', pse=bias)
    with pytest.raises(RuntimeError, match='bool or uint8'):
        torch_npu.npu_fusion_attention(q, k, v, 3, 'BNSD', atten_mask=bias)
    with pytest.raises(NotImplementedError, match='CPU'):
        torch_npu.npu_fusion_attention(*make()[:3], 3, 'BNSD')
    with pytest.raises(NotImplementedError, match='TND'):
        torch_npu.npu_fusion_attention(q, k, v, 3, 'TND')
