"""The probe before fused attention: correct kernels pass, and each known kind of wrong kernel is rejected."""

import copy

import pytest
import torch

import modeling_finetune
from beit.devices import half_precision, kernels
from beit.errors import UserError
from beit.training import fused_attention
from helpers import CPU, cannot_run

pytestmark = [pytest.mark.fast, pytest.mark.computes]

KERNELS = kernels.fused_attentions(CPU)


def model(**options):
    torch.manual_seed(0)
    options = dict(dict(num_classes=3, use_abs_pos_emb=False, use_rel_pos_bias=True, init_values=0.1), **options)
    return modeling_finetune.beit_nano_patch8_32(**options)


def kernel():
    """PyTorch's kernel, or plain arithmetic on a PyTorch without one."""
    return KERNELS.get('scaled_dot_product_attention', modeling_finetune.plain_attention)


@pytest.mark.parametrize('dtype', (torch.float32, torch.bfloat16))
@pytest.mark.parametrize('options', ({}, {'use_rel_pos_bias': False}, {'img_size': (24, 40)},
                                     {'use_rel_pos_bias': False, 'use_shared_rel_pos_bias': True}))
def test_a_right_kernel_passes(dtype, options):
    if dtype != torch.float32 and half_precision._half_precision_problem(CPU, dtype):
        cannot_run('current', 'this PyTorch has no bfloat16 training on a CPU')
    network, before = model(**options), torch.get_rng_state()
    assert fused_attention.compare(kernel(), network, CPU, dtype, 2) is None
    assert torch.equal(torch.get_rng_state(), before)  # the probe draws no random numbers of the run


def wrong(change):
    return lambda q, k, v, bias, scale: change(kernel(), q, k, v, bias, scale)


WRONG = {
    'drops the bias': (lambda f, q, k, v, b, s: f(q, k, v, None, s), 'the output differs by'),
    'scales the bias': (lambda f, q, k, v, b, s: f(q, k, v, b * s, s), 'the output differs by'),
    'forgets the scale': (lambda f, q, k, v, b, s: f(q, k, v, b, 1.), 'the output differs by'),
    'has no gradient for the bias': (lambda f, q, k, v, b, s: f(q, k, v, b.detach(), s),
                                     'the gradient of the bias table is missing'),
    'has half the gradient of the bias': (lambda f, q, k, v, b, s: f(q, k, v, (b + b.detach()) / 2, s),
                                          'the gradient of the bias table differs by 50 %'),
    'is wrong for the last image': (lambda f, q, k, v, b, s: torch.cat((f(q[:-1], k[:-1], v[:-1], b, s),
                                                                        f(q[-1:], k[-1:], v[-1:], None, s))),
                                    'the output differs by'),
    'is wrong without gradients only': (lambda f, q, k, v, b, s: f(q, k, v, b if torch.is_grad_enabled() else None, s),
                                        'the output without gradients differs by'),
    'gives not a number': (lambda f, q, k, v, b, s: f(q, k, v, b, s) * float('nan'), 'the output differs by nan'),
    'takes other arguments': (lambda f, q, k, v, b, s: f(), 'fails ('),
}


@pytest.mark.parametrize('kind', sorted(WRONG))
def test_a_wrong_kernel_is_detected_and_not_used(kind, monkeypatch):
    change, expected = WRONG[kind]
    monkeypatch.setattr(kernels, 'fused_attentions', lambda device: {'some_kernel': wrong(change)})
    network = model()
    images = torch.randn(2, 3, 32, 32)
    before = network(images)
    assert expected in fused_attention.compare(wrong(change), network, CPU, torch.float32, 2)
    with pytest.raises(UserError, match='--attention fused: some_kernel: '):
        fused_attention.choose_attention(network, CPU, 'fused')
    assert torch.equal(network(images), before)
    assert all(block.attn.fused is None for block in network.blocks)


@pytest.mark.parametrize('options', ({}, {'use_rel_pos_bias': False},
                                     {'use_rel_pos_bias': True, 'use_shared_rel_pos_bias': True}))
def test_a_fused_model_computes_what_the_plain_one_does(options):
    if not KERNELS:
        cannot_run('current', 'this PyTorch has no fused attention')
    plain, fused = model(**options), model(**options)
    assert 'fused, scaled_dot_product_attention' in fused_attention.choose_attention(fused, CPU, 'fused')
    images = torch.randn(4, 3, 32, 32)
    for network in (plain, fused):
        with torch.no_grad():
            for name, parameter in network.named_parameters():
                if 'table' in name:
                    torch.manual_seed(1)
                    parameter.normal_()
    assert (plain(images) - fused(images)).abs().max() < 1e-6
    for network in (plain, fused):
        network(images).square().sum().backward()
    for (name, one), other in zip(plain.named_parameters(), fused.parameters()):
        assert torch.allclose(one.grad, other.grad, rtol=1e-4, atol=1e-7), name


@pytest.mark.parametrize('tokens', (5, 16, 197))
def test_a_bias_padded_for_cuda_gives_the_same(tokens, monkeypatch):
    """Without gradients the row stride is a multiple of 8; with gradients, or without a bias, nothing changes."""
    if not KERNELS:
        cannot_run('current', 'this PyTorch has no fused attention')
    plain, padded = [kernels.fused_attentions(torch.device(kind))['scaled_dot_product_attention']
                     for kind in ('cpu', 'cuda')]
    q, k, v = torch.randn(3, 2, 4, tokens, 8).unbind(0)
    bias, rows = torch.randn(1, 4, tokens, tokens), []
    attend = torch.nn.functional.scaled_dot_product_attention

    def recorded(*tensors, attn_mask=None, **options):
        rows.append(None if attn_mask is None else attn_mask.stride(-2))
        return attend(*tensors, attn_mask=attn_mask, **options)

    monkeypatch.setattr(torch.nn.functional, 'scaled_dot_product_attention', recorded)
    for enabled in (False, True):
        with torch.set_grad_enabled(enabled):
            for each in (bias, None):
                assert torch.allclose(padded(q, k, v, each, 0.3), plain(q, k, v, each, 0.3), 1e-6, 1e-6)
    assert rows[::2] == [-(-tokens // 8) * 8, None, tokens, None]


def test_auto_on_a_cpu_is_fused_where_no_gradient_is_needed(monkeypatch):
    if not KERNELS:
        cannot_run('current', 'this PyTorch has no fused attention')
    attend, calls = torch.nn.functional.scaled_dot_product_attention, []
    monkeypatch.setattr(torch.nn.functional, 'scaled_dot_product_attention',
                        lambda *tensors, **options: calls.append(1) or attend(*tensors, **options))
    plain, network = model(), model()
    said = fused_attention.choose_attention(network, CPU, batch_size=10 ** 6)
    assert said == 'fused, scaled_dot_product_attention (agrees with plain attention here, gradients too); plain in ' \
                   'training'
    assert fused_attention.choose_attention(model(), CPU, trains=False) == said.partition(';')[0]
    network = copy.deepcopy(network)  # as the weight average
    images = torch.randn(2, 3, 32, 32)
    calls.clear()
    assert torch.equal(plain(images), network(images)) and not calls
    with torch.no_grad():
        assert (plain(images) - network(images)).abs().max() < 1e-6
    assert len(calls) == len(network.blocks)


def test_a_kernel_is_not_used_in_a_precision_that_was_not_tried(monkeypatch):
    if half_precision._half_precision_problem(CPU, torch.bfloat16):
        cannot_run('current', 'this PyTorch has no bfloat16 training on a CPU')

    def half_only(q, k, v, bias, scale):
        assert q.dtype == torch.bfloat16
        return modeling_finetune.plain_attention(q, k, v, bias.to(q.dtype), scale)

    monkeypatch.setattr(kernels, 'fused_attentions', lambda device: {'half_only': half_only})
    network, images = model(), torch.randn(2, 3, 32, 32)
    assert 'fused, half_only' in fused_attention.choose_attention(network, CPU, 'fused', torch.bfloat16)
    assert torch.equal(copy.deepcopy(network)(images), model()(images))  # as the average of O2, in float32


def test_the_modes(monkeypatch):
    network = model()
    assert fused_attention.choose_attention(network, CPU, 'plain') == 'plain'
    monkeypatch.setattr(kernels, 'fused_attentions', lambda device: {})
    assert fused_attention.choose_attention(network, CPU) == \
        'plain; fused attention is not used (this PyTorch has no fused attention)'
    with pytest.raises(UserError, match='--attention fused: this PyTorch has no fused attention; use --attention'):
        fused_attention.choose_attention(network, CPU, 'fused')


def test_dropout_on_the_weights_uses_plain_attention():
    network = model(attn_drop_rate=0.5)
    for block in network.blocks:
        block.attn.fused = lambda *arguments: 1 / 0
    network(torch.randn(2, 3, 32, 32))  # training
    with pytest.raises(ZeroDivisionError):
        network.eval()(torch.randn(2, 3, 32, 32))
