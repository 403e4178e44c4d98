"""Chooses a fused attention kernel after a test on this device, or plain attention.

The test computes this model's attention both ways, in the run's dtype: the output, with and without gradients, and the
gradients of query, key, value and bias table. An NPU kernel has silently dropped the additive bias
(github.com/huggingface/transformers/pull/48843), and kernels scale it differently.
"""

from typing import Any, Callable, Dict, Optional

import torch

import modeling_finetune
from beit.devices import accelerator, kernels
from beit.distributed import collectives
from beit.errors import UserError

# The largest distance from the plain result, relative to its norm. Rounding stays below; a lost bias is far above.
TOLERANCE = {torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 6e-2}
LARGEST = 2 ** 26  # scores of plain attention in the comparison: 256 MiB in float32, of which it needs several copies


def choose_attention(model: Any, device: torch.device, mode: str = 'auto', dtype: Optional[torch.dtype] = None,
                     batch_size: int = 2, trains: bool = True) -> str:
    """Set a fused attention in the model's blocks, or keep the plain one. Returns a description for the log.

    Args:
        mode: 'plain'; 'fused', with a `UserError` if no kernel passes; or 'auto', fused if a kernel passes, on a CPU
            without gradients only: with them it is no faster there.
        dtype: of the run's half precision; None is float32.
        batch_size: the run's, to test its shapes.
        trains: whether the description names the attention of training.
    """
    if mode == 'plain':
        return 'plain'
    evaluation_only = mode == 'auto' and device.type == 'cpu'
    if device.type == 'cpu':
        batch_size = min(batch_size, 2)  # its kernels do not depend on it
    drop = model.blocks[0].attn.attn_drop.p
    if mode == 'fused' and drop > 0:
        raise UserError('--attention fused: with --attn_drop_rate %g training uses plain attention; leave one of them '
                        'out' % drop)
    reasons = []
    for name, kernel in kernels.fused_attentions(device).items():
        problem = compare(kernel, model, device, dtype or torch.float32, batch_size)
        if not collectives.any_process(problem is not None, device):
            for block in model.blocks:
                block.attn.fused = where_tried(kernel, dtype or torch.float32, evaluation_only)
            return 'fused, %s (agrees with plain attention here, gradients too)%s' % (
                name, '' if not trains else '; plain in training' if evaluation_only else
                '; plain in training, for --attn_drop_rate' if drop > 0 else '')
        reasons.append('%s: %s' % (name, problem or 'it failed on another process'))
    reason = '; '.join(reasons) or 'this PyTorch has no fused attention'
    if mode == 'fused':
        raise UserError('--attention fused: %s; use --attention auto or plain' % reason)
    return 'plain; fused attention is not used (%s)' % reason


def where_tried(kernel: Callable, dtype: torch.dtype, evaluation_only: bool) -> Callable:
    """The kernel, else plain attention: in another dtype, as O2's average has, or with unwanted gradients."""
    def attend(query: torch.Tensor, *inputs: Any) -> torch.Tensor:
        is_plain = query.dtype != dtype or evaluation_only and torch.is_grad_enabled()
        return (modeling_finetune.plain_attention if is_plain else kernel)(query, *inputs)
    return attend


def compare(kernel: Callable, model: Any, device: torch.device, dtype: torch.dtype, batch_size: int) -> Optional[str]:
    """None if a kernel computes the attention of this model's blocks, else the difference.

    The inputs are random, from a separate generator: the run's random numbers do not change.
    """
    generator = torch.Generator().manual_seed(0)
    block = model.blocks[0].attn
    positions = block if block.has_relative_position else model.rel_pos_bias  # or None: no bias is added
    heads = block.num_heads
    tokens = model.patch_embed.num_patches + 1
    batch_size = max(1, min(batch_size, LARGEST // (heads * tokens ** 2)))
    shape = (batch_size, heads, tokens, model.embed_dim // heads)
    inputs = {name: torch.randn(shape, generator=generator) for name in ('query', 'key', 'value')}
    weights = torch.randn(shape, generator=generator).to(device)  # each output has another weight in the gradients
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
        (output * weights).sum().backward()
        results = {'output': output.detach(), 'output without gradients': evaluated}
        results.update(('gradient of the ' + name, leaf.grad) for name, leaf in leaves.items())
        return results

    try:
        found = run(kernel, dtype)
        accelerator.synchronize(device)  # an NPU reports an unsupported operator late
        expected = run(modeling_finetune.plain_attention, torch.float32)
    except (RuntimeError, TypeError, ValueError) as error:  # unsupported shapes or dtype
        return 'fails (%s)' % accelerator.first_line(error)[:100]
    for name, value in expected.items():
        if found[name] is None:
            return 'the %s is missing' % name
        distance = ((found[name] - value).norm() / value.norm()).item()
        if not distance <= TOLERANCE[dtype]:
            return 'the %s differs by %.2g %%' % (name, 100 * distance)
    return None

