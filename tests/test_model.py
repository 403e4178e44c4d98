"""The model against recorded figures of the reference, and against timm's own BEiT."""

import importlib
import importlib.util
import inspect
import json
import math
from functools import partial

import numpy as np
import pytest
import torch
from torch.nn import functional as F

import modeling_finetune
from helpers import cannot_run
from modeling_finetune import VisionTransformer, relative_position_index

pytestmark = [pytest.mark.fast, pytest.mark.computes]

CASES = ('model_relpos_meanpool.npz', 'model_shared_relpos_abspos.npz')


def model_of(recorded, **changes):
    config = dict(json.loads(str(recorded['config'])), **changes)
    return VisionTransformer(norm_layer=partial(torch.nn.LayerNorm, eps=1e-6), **config)


def state_of(recorded, prefix):
    return {name[len(prefix):]: torch.from_numpy(recorded[name]) for name in recorded.files if name.startswith(prefix)}


def worst_relative_difference(actual, expected):
    return max(float((actual[name] - expected[name]).abs().max() / expected[name].abs().max().clamp(min=1e-12))
               for name in expected)


@pytest.mark.parametrize('case', CASES)
def test_logits_loss_and_gradients_are_the_references(golden, case):
    recorded = golden(case)
    model = model_of(recorded).train()
    model.load_state_dict(state_of(recorded, 'state.'))  # strict: the same names
    logits = model(torch.from_numpy(recorded['images']))
    loss = F.cross_entropy(logits, torch.from_numpy(recorded['targets']))
    loss.backward()
    np.testing.assert_allclose(logits.detach().numpy(), recorded['logits'], rtol=1e-5, atol=1e-6)
    assert loss.item() == pytest.approx(float(recorded['loss']), rel=1e-5)
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    expected = state_of(recorded, 'grad.')
    assert set(gradients) == set(expected)
    assert worst_relative_difference(gradients, expected) < 1e-5


def test_names_and_shapes_of_the_base_model(golden):
    model = modeling_finetune.beit_base_patch16_224(num_classes=7, use_abs_pos_emb=False, use_rel_pos_bias=True,
                                                    init_values=0.1)
    shapes = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
    assert shapes == golden('param_groups.json')['state_shapes']


def test_relative_position_index_by_a_slow_loop():
    height, width = 3, 5
    offsets = (2 * height - 1) * (2 * width - 1)
    index = relative_position_index((height, width))
    for query in range(height * width + 1):
        for key in range(height * width + 1):
            if query == 0 or key == 0:
                expected = offsets + (2 if query == key else 0 if query == 0 else 1)
            else:
                down = (query - 1) // width - (key - 1) // width + height - 1
                right = (query - 1) % width - (key - 1) % width + width - 1
                expected = down * (2 * width - 1) + right
            assert index[query, key] == expected


def test_attention_by_a_slow_loop():
    torch.manual_seed(0)
    attention = modeling_finetune.Attention(8, num_heads=2, qkv_bias=True, window_size=(2, 3)).double()
    for parameter in attention.parameters():
        torch.nn.init.normal_(parameter)
    x = torch.randn(1, 7, 8).double()
    weight, out = attention.qkv.weight, []
    for head in range(2):
        part = slice(4 * head, 4 * head + 4)
        q = (x[0] @ weight[:8].t() + attention.q_bias)[:, part]
        k = (x[0] @ weight[8:16].t())[:, part]
        v = (x[0] @ weight[16:].t() + attention.v_bias)[:, part]
        for query in range(7):
            scores = torch.stack([q[query] @ k[key] / 2 + attention.relative_position_bias_table[
                attention.relative_position_index[query, key], head] for key in range(7)])
            out.append((torch.exp(scores) / torch.exp(scores).sum()) @ v)
    expected = torch.cat((torch.stack(out[:7]), torch.stack(out[7:])), dim=1) @ attention.proj.weight.t() \
        + attention.proj.bias
    assert torch.allclose(attention(x)[0], expected, atol=1e-12)


def test_rectangular_grid():
    model = modeling_finetune.beit_nano_patch8_32(img_size=(16, 40), num_classes=3, use_rel_pos_bias=True)
    assert model(torch.zeros(2, 3, 16, 40)).shape == (2, 3)
    with pytest.raises(ValueError, match='16x40'):
        model(torch.zeros(2, 3, 40, 16))
    with pytest.raises(ValueError, match='multiple of the patch size'):
        modeling_finetune.beit_nano_patch8_32(img_size=36)


def test_initial_weights():
    torch.manual_seed(0)
    model = VisionTransformer(img_size=32, patch_size=8, embed_dim=256, depth=3, num_heads=4, num_classes=50,
                              qkv_bias=True, use_rel_pos_bias=True, init_values=1e-5, init_scale=0.001)
    std = 0.02
    for layer, block in enumerate(model.blocks, start=1):
        assert block.attn.qkv.weight.std().item() == pytest.approx(std, rel=0.03)
        assert block.attn.proj.weight.std().item() == pytest.approx(std / math.sqrt(2 * layer), rel=0.03)
        assert block.mlp.fc2.weight.std().item() == pytest.approx(std / math.sqrt(2 * layer), rel=0.03)
        assert block.attn.relative_position_bias_table.abs().max() == 0
        assert torch.equal(block.gamma_1, torch.full((256,), 1e-5))
    assert model.head.weight.std().item() == pytest.approx(std * 0.001, rel=0.05)
    assert model.pos_embed.std().item() == pytest.approx(std, rel=0.1)
    assert model.no_weight_decay() == {'pos_embed', 'cls_token'}


def test_drop_path_grows_linearly_and_layer_scale_can_be_left_out():
    model = VisionTransformer(img_size=32, patch_size=8, embed_dim=16, depth=5, num_heads=2, drop_path_rate=0.2,
                              init_values=0)
    rates = [getattr(block.drop_path, 'drop_prob', 0.) for block in model.blocks]
    assert rates == pytest.approx([0, 0.05, 0.1, 0.15, 0.2])
    assert not [name for name, _ in model.named_parameters() if 'gamma' in name]


@pytest.mark.parametrize('mean_pooling', (True, False))
def test_pooling(mean_pooling):
    torch.manual_seed(0)
    model = modeling_finetune.beit_nano_patch8_32(num_classes=0, use_mean_pooling=mean_pooling).eval()
    seen = []
    model.blocks[-1].register_forward_hook(lambda module, inputs, output: seen.append(output))
    features = model(torch.randn(2, 3, 32, 32))
    pooled, norm = (seen[0][:, 1:].mean(1), model.fc_norm) if mean_pooling else (seen[0][:, 0], model.norm)
    assert torch.allclose(features, norm(pooled), atol=1e-6)


def test_registered_with_timm():
    import timm
    for name in ('beit_base_patch16_224', 'beit_base_patch16_384', 'beit_large_patch16_224', 'beit_large_patch16_384',
                 'beit_large_patch16_512'):
        assert name in timm.list_models('beit_*'), name
    model = timm.create_model('beit_base_patch16_384', num_classes=3)
    assert type(model) is VisionTransformer
    assert model.patch_embed.img_size == (384, 384)
    assert model.blocks[0].norm1.eps == 1e-6
    with pytest.raises(ValueError, match='--finetune'):
        timm.create_model('beit_base_patch16_224', pretrained=True)


@pytest.mark.parametrize('name', ('beit_base_patch16_224',
                                  pytest.param('beit_large_patch16_224', marks=pytest.mark.slow)))
def test_logits_and_gradients_are_timms(name):
    if importlib.util.find_spec('timm.models.beit') is None:
        cannot_run('current', 'this timm is too old to have a BEiT')
    theirs_module = importlib.import_module('timm.models.beit')
    torch.manual_seed(0)
    theirs = getattr(theirs_module, name)(num_classes=10, init_values=0.1, drop_path_rate=0.)
    ours = getattr(modeling_finetune, name)(num_classes=10, init_values=0.1, use_abs_pos_emb=False,
                                            use_rel_pos_bias=True, init_scale=1.)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.normal_(std=0.02) if parameter.dim() > 1 else parameter.add_(torch.randn_like(parameter) * 0.02)
    missing, unexpected = ours.load_state_dict(theirs.state_dict(), strict=False)
    assert not unexpected
    assert all(key.endswith('relative_position_index') for key in missing)
    images, targets = torch.randn(2, 3, 224, 224), torch.tensor([3, 7])
    results = []
    for model in (ours, theirs):
        logits = model(images)
        F.cross_entropy(logits, targets).backward()
        results.append((logits.detach(), {key: p.grad for key, p in model.named_parameters()}))
    assert float((results[0][0] - results[1][0]).abs().max()) < 1e-6 * max(1., float(results[1][0].abs().max()))
    assert worst_relative_difference(results[0][1], results[1][1]) < 1e-4
    # and back: timm's own filter takes our checkpoint
    filtered = theirs_module.checkpoint_filter_fn(ours.state_dict(), theirs)
    # that of timm 0.9 leaves the index in, which a strict load refuses
    knows_index = 'relative_position_index' in inspect.getsource(theirs_module.checkpoint_filter_fn)
    assert not theirs.load_state_dict(filtered, strict=knows_index).missing_keys
