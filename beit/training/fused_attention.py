"""Which attention a model computes: a fused kernel where it has been proven on this device, else the plain one.

A kernel is proven by computing this model's own attention both ways, in the run's dtype: the output, with and without
gradients, and the gradients of query, key, value and bias table. An NPU kernel has silently dropped the additive bias
(github.com/huggingface/transformers/pull/48843), and kernels differ in where they add it.
"""

from typing import Any, Callable, Dict, Optional

import torch

import modeling_finetune
from beit.devices import accelerator, kernels
from beit.distributed import collectives
from beit.errors import UserError

# How far a result may be from the plain one, as a share of its norm: rounding, with room; a lost bias is far beyond.
TOLERANCE = {torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 6e-2}

LARGEST = 2 ** 26  # scores that plain attention may hold for the comparison: 256 MiB in float32, and a few times that


def choose_attention(model: Any, device: torch.device, mode: str = 'auto', dtype: Optional[torch.dtype] = None,
                     batch_size: int = 2) -> str:
    """Put a fused attention into the model's blocks, or leave the plain one there; returns a sentence for people.

    Args:
        mode: 'plain'; 'fused', which raises a `UserError` where no kernel passes; or 'auto': fused on npu and cuda,
            where a kernel passes.
        dtype: of the run's half precision; None is float32.
        batch_size: images at a time, to try the very shapes of the run.
    """
    if mode == 'plain' or (mode == 'auto' and device.type == 'cpu'):
        return 'plain'
    drop = model.blocks[0].attn.attn_drop.p
    if mode == 'fused' and drop > 0:
        raise UserError('--attention fused: with --attn_drop_rate %g training takes plain attention; leave one of them '
                        'out' % drop)
    reasons = []
    for name, kernel in kernels.fused_attentions(device).items():
        problem = compare(kernel, model, device, dtype or torch.float32, batch_size)
        if not collectives.any_process(problem is not None, device):
            for block in model.blocks:
                block.attn.fused = kernel
            return 'fused, %s (agrees with plain attention here, gradients too)%s' % (
                name, '; plain in training, for --attn_drop_rate' if drop > 0 else '')
        reasons.append('%s: %s' % (name, problem or 'it failed on another process'))
    reason = '; '.join(reasons) or 'this PyTorch has no fused attention'
    if mode == 'fused':
        raise UserError('--attention fused: %s; use --attention auto or plain' % reason)
    return 'plain; fused attention is not used (%s)' % reason


def compare(kernel: Callable, model: Any, device: torch.device, dtype: torch.dtype, batch_size: int) -> Optional[str]:
    """None where a kernel computes the attention of this model's blocks, else what differs.

    The inputs are random, from a generator of their own, so that a run's random numbers stay as they are.
    """
    generator = torch.Generator().manual_seed(0)
    block = model.blocks[0].attn
    positions = block if block.has_relative_position else model.rel_pos_bias  # or None: no bias is added
    heads = block.num_heads
    tokens = model.patch_embed.num_patches + 1
    batch_size = max(1, min(batch_size, LARGEST // (heads * tokens ** 2)))
    shape = (batch_size, heads, tokens, model.embed_dim // heads)
    inputs = {name: torch.randn(shape, generator=generator) for name in ('query', 'key', 'value')}
    wanted = torch.randn(shape, generator=generator).to(device)  # makes each output count differently in the gradients
    if positions is not None:
        inputs['bias table'] = torch.randn(positions.relative_position_bias_table.shape, generator=generator)

    def run(attend: Callable, dtype: torch.dtype) -> Dict[str, Any]:
        leaves = {name: value.clone().to(device).requires_grad_() for name, value in inputs.items()}
        table = leaves.get('bias table')
        bias = None if table is None else modeling_finetune.gather_bias(
            table, positions.relative_position_index.to(device))[None]
        parts = [leaves[name].to(dtype) for name in ('query', 'key', 'value')]
        with torch.no_grad():
            evaluated = attend(*parts, bias, block.scale).float()
        output = attend(*parts, bias, block.scale).float()
        (output * wanted).sum().backward()
        results = {'output': output.detach(), 'output without gradients': evaluated}
        results.update(('gradient of the ' + name, leaf.grad) for name, leaf in leaves.items())
        return results

    try:
        found = run(kernel, dtype)
        accelerator.synchronize(device)  # an NPU refuses an operator when it comes to it
        expected = run(modeling_finetune.plain_attention, torch.float32)
    except (RuntimeError, TypeError, ValueError) as error:  # this kernel does not take these shapes, or this dtype
        return 'fails (%s)' % (str(error).strip().splitlines() or [type(error).__name__])[0][:100]
    for name, value in expected.items():
        if found[name] is None:
            return 'the %s is missing' % name
        distance = ((found[name] - value).norm() / value.norm()).item()
        if not distance <= TOLERANCE[dtype]:
            return 'the %s differs by %.2g %%' % (name, 100 * distance)
    return None

