"""``torch_npu.npu_fusion_attention``: Ascend's own fused attention, from plain differentiable operators."""

import os

import torch
import torch.nn.functional as F

# from each input layout to (batch, heads, tokens, head width) and back
LAYOUTS = {
    'BNSD': (lambda t, heads: t, lambda t: t),
    'BSND': (lambda t, heads: t.transpose(1, 2), lambda t: t.transpose(1, 2).contiguous()),
    'BSH': (lambda t, heads: t.unflatten(-1, (heads, -1)).transpose(1, 2), lambda t: t.transpose(1, 2).flatten(2)),
    'SBH': (lambda t, heads: t.unflatten(-1, (heads, -1)).permute(1, 2, 0, 3),
            lambda t: t.permute(2, 0, 1, 3).flatten(2)),
}


def _attend(query, key, value, heads, layout, pse, atten_mask, scale, keep_prob, sparse_mode, pse_type):
    """The emulated part of npu_fusion_attention; returns its tuple.

    pse_type 1 is scale * (QK^T + pse): for softmax(scale * QK^T + bias) pass bias / scale.
    pse_type 0 is scale * QK^T + pse.
    """
    if any(t is not None and t.device.type != 'npu' for t in (query, key, value, pse, atten_mask)):
        raise NotImplementedError('Could not run \'npu::npu_fusion_attention\' with arguments from the \'CPU\' backend')
    if any(t is not None and t.dtype != query.dtype for t in (key, value, pse)):
        raise RuntimeError('npu_fusion_attention: query, key, value and pse must have one dtype, not %s'
                           % [str(t.dtype) for t in (query, key, value, pse) if t is not None])
    if atten_mask is not None and atten_mask.dtype not in (torch.bool, torch.uint8):
        raise RuntimeError('npu_fusion_attention: atten_mask must be bool or uint8 (1 hides), not %s'
                           % atten_mask.dtype)
    if layout not in LAYOUTS or sparse_mode not in (0, 1) or pse_type not in (0, 1):
        raise NotImplementedError('the NPU emulator has input_layout %s, sparse_mode 0 and 1, pse_type 0 and 1, not '
                                  '%r, %r, %r' % (', '.join(LAYOUTS), layout, sparse_mode, pse_type))
    mode = os.environ.get('FAKE_NPU_SDPA', 'exact')  # at each call, as in npu_attention.cpp
    if pse is not None and mode != 'exact':
        pse = None if mode == 'drop_bias' else pse * scale

    inward, outward = LAYOUTS[layout]
    with torch.autocast('npu', enabled=False):
        query = inward(query, heads)
        kv_heads = key.shape[-1] // query.shape[-1] if layout.endswith('H') else inward(key, heads).shape[1]
        key, value = (inward(t, kv_heads).repeat_interleave(heads // kv_heads, 1) for t in (key, value))
        scores = query.float() @ key.float().transpose(-2, -1)
        if pse is not None and pse_type == 1:
            scores = scores + pse.float()
        scores = scores * scale
        if pse is not None and pse_type == 0:
            scores = scores + pse.float()
        if atten_mask is not None:
            scores = scores.masked_fill(atten_mask.bool(), torch.finfo(torch.float32).min)
        weights = scores.softmax(-1)
        out = outward(F.dropout(weights, 1 - keep_prob).to(value.dtype) @ value)
        # inputs of the real backward, eight values each; autograd doesn't need them
        top = scores.detach().amax(-1, keepdim=True)
        total = (scores.detach() - top).exp().sum(-1, keepdim=True)
    dropped = scores.numel() if keep_prob < 1 else 0
    return (out, top.expand(*top.shape[:-1], 8).clone(), total.expand(*total.shape[:-1], 8).clone(),
            torch.empty(0, device=out.device, dtype=out.dtype), 0, 0, dropped)


def npu_fusion_attention(query, key, value, head_num, input_layout, pse=None, padding_mask=None, atten_mask=None,
                         scale=1., keep_prob=1., pre_tockens=2147483647, next_tockens=2147483647, inner_precise=0,
                         prefix=None, actual_seq_qlen=None, actual_seq_kvlen=None, sparse_mode=0,
                         gen_mask_parallel=True, sync=False, softmax_layout=''):
    """softmax(scale * (QK^T + pse)) V as the first of seven results. Only `_attend`'s arguments are emulated."""
    return _attend(query, key, value, head_num, input_layout, pse, atten_mask, scale, keep_prob, sparse_mode, 1)


def npu_fusion_attention_v2(query, key, value, head_num, input_layout, *, pse=None, padding_mask=None,
                            atten_mask=None, query_rope=None, key_rope=None, scale=1., keep_prob=1.,
                            pre_tokens=2147483647, next_tokens=2147483647, inner_precise=0, prefix=None,
                            actual_seq_qlen=None, actual_seq_kvlen=None, sparse_mode=0, gen_mask_parallel=True,
                            sync=False, pse_type=1, q_start_idx=None, kv_start_idx=None):
    """`npu_fusion_attention` with a selectable pse_type, see `_attend`."""
    return _attend(query, key, value, head_num, input_layout, pse, atten_mask, scale, keep_prob, sparse_mode, pse_type)
