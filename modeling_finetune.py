"""The BEiT vision transformer for classification, with the reference's names, arguments and state-dict keys.

Paper: https://arxiv.org/abs/2106.08254. The relative position bias is that of Swin (https://arxiv.org/abs/2103.14030,
eq. 4) with three more rows for the class token; layer scale is CaiT's (https://arxiv.org/abs/2103.17239).

Shapes below: B images, C channels, a grid of H x W patches, N = H*W + 1 tokens (class token first), D = embed_dim.
This file imports no other module of the project: it can be copied into another one.
"""

import inspect
import math
import warnings
from functools import partial
from typing import Any, Callable, Dict, List, Optional, Sequence, Set, Tuple, Union

import torch
import torch.nn.functional as F
from einops import rearrange, reduce
from torch import nn
from torch.utils.checkpoint import checkpoint

try:
    from timm.layers import DropPath, to_2tuple, trunc_normal_
    from timm.models import register_model
except ImportError:  # timm before 0.9
    from timm.models.layers import DropPath, to_2tuple, trunc_normal_
    from timm.models.registry import register_model

# The non-reentrant kind works with autocast, hooks and inputs without gradients; old PyTorch doesn't have it.
_CHECKPOINTING = {'use_reentrant': False} if 'use_reentrant' in inspect.signature(checkpoint).parameters \
    else {}  # type: Dict[str, Any]

INPUT_MEAN = INPUT_STD = (0.5, 0.5, 0.5)
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of BEiT v2
Tensor = torch.Tensor
Pixels = Union[int, Sequence[int]]  # one number, or height and width


def relative_position_index(grid: Tuple[int, int]) -> Tensor:
    """The row of the bias table for each pair of tokens, as an int64 tensor (N, N).

    The table has (2H-1)(2W-1) rows for the offsets between patches, then one row each for class token to patch, patch
    to class token, and class token to itself.
    """
    height, width = grid
    row = torch.arange(height).repeat_interleave(width)
    col = torch.arange(width).repeat(height)
    row_offset = row[:, None] - row[None, :] + height - 1
    col_offset = col[:, None] - col[None, :] + width - 1

    offsets = (2 * height - 1) * (2 * width - 1)
    index = torch.empty(height * width + 1, height * width + 1, dtype=torch.int64)
    index[1:, 1:] = row_offset * (2 * width - 1) + col_offset
    index[0, :] = offsets
    index[:, 0] = offsets + 1
    index[0, 0] = offsets + 2
    return index


def _add_relative_position(module: nn.Module, grid: Tuple[int, int], num_heads: int) -> None:
    """Add the bias table, a parameter ((2H-1)(2W-1)+3, heads), and its index, a buffer (N, N), to a module."""
    rows = (2 * grid[0] - 1) * (2 * grid[1] - 1) + 3
    module.relative_position_bias_table = nn.Parameter(torch.zeros(rows, num_heads))
    module.register_buffer('relative_position_index', relative_position_index(grid))


def gather_bias(table: Tensor, index: Tensor) -> Tensor:
    """The bias to add to the attention scores, (heads, N, N), from a table (rows, heads) and an index (N, N).

    Selecting from the transposed table gives the needed layout; the gradient of `table[index]` is far slower.
    """
    return table.t().contiguous().index_select(1, index.view(-1)).view(-1, *index.shape)


class RelativePositionBias(nn.Module):
    """One bias table that all blocks share. `forward()` returns (heads, N, N)."""

    relative_position_bias_table: Tensor
    relative_position_index: Tensor

    def __init__(self, window_size: Tuple[int, int], num_heads: int) -> None:
        super().__init__()
        _add_relative_position(self, window_size, num_heads)

    def forward(self) -> Tensor:
        return gather_bias(self.relative_position_bias_table, self.relative_position_index)


def attention_weights(q: Tensor, k: Tensor, bias: Optional[Tensor], scale: float) -> Tensor:
    """softmax(scale * q k^T + bias), (B, heads, N, N), of q and k (B, heads, N, head_dim)."""
    scores = (q * scale) @ k.transpose(-2, -1)
    return (scores if bias is None else scores + bias).softmax(dim=-1)


def plain_attention(q: Tensor, k: Tensor, v: Tensor, bias: Optional[Tensor], scale: float,
                    drop: Optional[Callable] = None) -> Tensor:
    """drop(softmax(scale * q k^T + bias)) v, one operator at a time, of q, k and v (B, heads, N, head_dim)."""
    weights = attention_weights(q, k, bias, scale)
    return (weights if drop is None else drop(weights)) @ v


class Attention(nn.Module):
    """Multi-head self-attention, (B, N, D) to (B, N, D); query and value have a bias, the key's is fixed at zero.

    `fused` is a kernel with the first five arguments of `plain_attention`, which it replaces except in training with
    dropout on the attention weights.
    """

    fused = None  # type: Optional[Callable]
    relative_position_bias_table: Tensor
    relative_position_index: Tensor

    def __init__(self, dim: int, num_heads: int = 8, qkv_bias: bool = False, qk_scale: Optional[float] = None,
                 attn_drop: float = 0., proj_drop: float = 0., window_size: Optional[Tuple[int, int]] = None) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.scale = qk_scale or (dim // num_heads) ** -0.5
        self.qkv = nn.Linear(dim, dim * 3, bias=False)
        self.q_bias = nn.Parameter(torch.zeros(dim)) if qkv_bias else None
        self.v_bias = nn.Parameter(torch.zeros(dim)) if qkv_bias else None
        self.has_relative_position = window_size is not None
        if window_size is not None:
            _add_relative_position(self, window_size, num_heads)
        self.attn_drop = nn.Dropout(attn_drop)
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(proj_drop)

    def bias(self, shared_bias: Optional[Tensor] = None) -> Optional[Tensor]:
        """The bias for the scores: this block's relative bias plus the shared one, (1, heads, N, N), or None."""
        if not self.has_relative_position:
            return None if shared_bias is None else shared_bias[None]
        bias = gather_bias(self.relative_position_bias_table, self.relative_position_index)
        return (bias if shared_bias is None else shared_bias + bias)[None]

    def queries_keys_values(self, x: Tensor) -> Tuple[Tensor, ...]:
        """Three of (B, heads, N, head_dim), from (B, N, D)."""
        qkv_bias = None
        if self.q_bias is not None and self.v_bias is not None:
            qkv_bias = torch.cat((self.q_bias, torch.zeros_like(self.v_bias, requires_grad=False), self.v_bias))
        qkv = F.linear(x, self.qkv.weight, qkv_bias)
        return rearrange(qkv, 'b n (three h d) -> three b h n d', three=3, h=self.num_heads).unbind(0)

    def weights(self, x: Tensor, shared_bias: Optional[Tensor] = None) -> Tensor:
        """The attention weights of `forward` for the same arguments, (B, heads, N, N), for visualization."""
        q, k, _ = self.queries_keys_values(x)
        return attention_weights(q, k, self.bias(shared_bias), self.scale)

    def forward(self, x: Tensor, shared_bias: Optional[Tensor] = None) -> Tensor:
        q, k, v = self.queries_keys_values(x)
        bias = self.bias(shared_bias)
        if self.fused is None or (self.training and self.attn_drop.p > 0):
            x = plain_attention(q, k, v, bias, self.scale, self.attn_drop)
        else:
            x = self.fused(q, k, v, bias, self.scale)
        return self.proj_drop(self.proj(rearrange(x, 'b h n d -> b n (h d)')))


class Mlp(nn.Module):
    """Two linear layers with an exact GELU between them; dropout once, after the second."""

    def __init__(self, dim: int, hidden_dim: int, drop: float = 0.) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden_dim)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(hidden_dim, dim)
        self.drop = nn.Dropout(drop)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(self.fc2(self.act(self.fc1(x))))


class Block(nn.Module):
    """A pre-norm transformer block, with layer scale if `init_values` is above 0.

    With `skips_dropped` stochastic depth does not compute the samples that it drops. The distribution is the same; the
    shapes inside vary between calls.
    """

    skips_dropped = False

    def __init__(self, dim: int, num_heads: int, mlp_ratio: float = 4., qkv_bias: bool = False,
                 qk_scale: Optional[float] = None, drop: float = 0., attn_drop: float = 0., drop_path: float = 0.,
                 init_values: Optional[float] = None, norm_layer: Callable = nn.LayerNorm,
                 window_size: Optional[Tuple[int, int]] = None) -> None:
        super().__init__()
        self.norm1 = norm_layer(dim)
        self.attn = Attention(dim, num_heads, qkv_bias, qk_scale, attn_drop, drop, window_size)
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()
        self.norm2 = norm_layer(dim)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), drop)
        self.gamma_1 = nn.Parameter(init_values * torch.ones(dim)) if init_values else None
        self.gamma_2 = nn.Parameter(init_values * torch.ones(dim)) if init_values else None

    def forward(self, x: Tensor, shared_bias: Optional[Tensor] = None) -> Tensor:
        x = self._add(x, lambda kept: self.attn(self.norm1(kept), shared_bias), self.gamma_1)
        return self._add(x, lambda kept: self.mlp(self.norm2(kept)), self.gamma_2)

    def _add(self, x: Tensor, branch: Callable, gamma: Optional[Tensor]) -> Tensor:
        """x + drop_path(gamma * branch(x)), with few passes over the tokens."""
        drop = getattr(self.drop_path, 'drop_prob', 0.) if self.training else 0.
        factor = gamma
        if drop and self.skips_dropped:
            kept = (torch.rand(len(x)) >= drop).nonzero().flatten()  # on the host: no wait for the device
            factor = torch.full_like(x[0, 0], 1. / (1. - drop)) if gamma is None else gamma * (1. / (1. - drop))
            if len(kept) < len(x):
                kept = kept.to(x.device, non_blocking=True)
                return x.index_add(0, kept, (branch(x.index_select(0, kept)) * factor).to(x.dtype))
        elif drop:
            mask = self.drop_path(x.new_ones(len(x), 1, 1))  # 0, or 1 / (1 - drop)
            factor = mask if gamma is None else gamma * mask
        return x + branch(x) if factor is None else torch.addcmul(x, factor, branch(x))


class PatchEmbed(nn.Module):
    """Images (B, C, height, width) to patch tokens (B, H*W, D)."""

    def __init__(self, img_size: Pixels = 224, patch_size: Pixels = 16, in_chans: int = 3,
                 embed_dim: int = 768) -> None:
        super().__init__()
        self.img_size, self.patch_size = tuple(to_2tuple(img_size)), tuple(to_2tuple(patch_size))
        if any(side <= 0 or side % patch for side, patch in zip(self.img_size, self.patch_size)):
            raise ValueError('image size %s is not a multiple of the patch size %s'
                             % ('x'.join(map(str, self.img_size)), 'x'.join(map(str, self.patch_size))))
        self.patch_shape = (self.img_size[0] // self.patch_size[0], self.img_size[1] // self.patch_size[1])
        self.num_patches = self.patch_shape[0] * self.patch_shape[1]
        self.proj = nn.Conv2d(in_chans, embed_dim, kernel_size=self.patch_size, stride=self.patch_size)

    def forward(self, x: Tensor) -> Tensor:
        if tuple(x.shape[-2:]) != self.img_size:
            raise ValueError('the model takes images of %dx%d, got %dx%d' % (self.img_size + tuple(x.shape[-2:])))
        return rearrange(self.proj(x), 'b d h w -> b (h w) d')


def class_and_mean(tokens: Tensor) -> Tensor:
    """[class token; mean of the patch tokens] (B, 2 D) of tokens (B, N, D): the input of the linear probe's heads."""
    return torch.cat((tokens[:, 0], tokens[:, 1:].mean(1)), dim=1)


class VisionTransformer(nn.Module):
    """BEiT: images (B, in_chans, height, width) to logits (B, num_classes), or features (B, D) when that is 0.

    Args:
        img_size, patch_size: in pixels; `ValueError` if an image is not a whole number of patches in each direction.
        qk_scale: factor on the query, by default head_dim ** -0.5.
        drop_rate, attn_drop_rate: dropout on projections and on attention weights.
        drop_path_rate: stochastic depth of the last block; it grows linearly from 0 at the first.
        init_values: initial layer scale; None or 0 for none.
        use_mean_pooling: pool by the mean of the patch tokens (`fc_norm`); else the class token (`norm`).
        init_scale: factor on the head's initial weight and bias.
    """

    default_cfg: Dict[str, Any]
    head: nn.Module

    def __init__(self, img_size: Pixels = 224, patch_size: Pixels = 16, in_chans: int = 3, num_classes: int = 1000,
                 embed_dim: int = 768, depth: int = 12, num_heads: int = 12, mlp_ratio: float = 4.,
                 qkv_bias: bool = False, qk_scale: Optional[float] = None, drop_rate: float = 0.,
                 attn_drop_rate: float = 0., drop_path_rate: float = 0., norm_layer: Callable = nn.LayerNorm,
                 init_values: Optional[float] = None, use_abs_pos_emb: bool = True, use_rel_pos_bias: bool = False,
                 use_shared_rel_pos_bias: bool = False, use_mean_pooling: bool = True,
                 init_scale: float = 0.001) -> None:
        super().__init__()
        self.num_features = self.embed_dim = embed_dim
        self.patch_embed = PatchEmbed(img_size, patch_size, in_chans, embed_dim)
        grid = self.patch_embed.patch_shape
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        tokens = self.patch_embed.num_patches + 1
        self.pos_embed = nn.Parameter(torch.zeros(1, tokens, embed_dim)) if use_abs_pos_emb else None
        self.pos_drop = nn.Dropout(drop_rate)
        self.rel_pos_bias = RelativePositionBias(grid, num_heads) if use_shared_rel_pos_bias else None
        self.use_rel_pos_bias = use_rel_pos_bias
        self.blocks = nn.ModuleList([
            Block(embed_dim, num_heads, mlp_ratio, qkv_bias, qk_scale, drop_rate, attn_drop_rate,
                  drop_path_rate * index / max(depth - 1, 1), init_values, norm_layer,
                  window_size=grid if use_rel_pos_bias else None)
            for index in range(depth)])
        self.norm = nn.Identity() if use_mean_pooling else norm_layer(embed_dim)
        self.fc_norm = norm_layer(embed_dim) if use_mean_pooling else None
        self.reset_classifier(num_classes)
        self.grad_checkpointing, self.backbone_frozen = False, False
        self._init_weights(init_scale)

    def _init_weights(self, init_scale: float) -> None:
        for module in self.modules():
            if isinstance(module, nn.Linear):
                trunc_normal_(module.weight, std=.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        trunc_normal_(self.cls_token, std=.02)
        if self.pos_embed is not None:
            trunc_normal_(self.pos_embed, std=.02)
        with torch.no_grad():
            blocks = self.blocks  # type: Any
            for layer, block in enumerate(blocks, start=1):
                block.attn.proj.weight.div_(math.sqrt(2.0 * layer))
                block.mlp.fc2.weight.div_(math.sqrt(2.0 * layer))
            if isinstance(self.head, nn.Linear):
                self.head.weight.mul_(init_scale)
                self.head.bias.mul_(init_scale)

    def get_num_layers(self) -> int:
        return len(self.blocks)

    def no_weight_decay(self) -> Set[str]:
        """Names of the parameters without weight decay, besides vectors and biases."""
        return {'pos_embed', 'cls_token'}

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Keep only the blocks' inputs for the backward pass, and recompute the rest: less memory, slower."""
        self.grad_checkpointing = enable

    def freeze_backbone(self, freeze: bool = True) -> None:
        """Train only the head, on features without dropout or stochastic depth; or, with False, everything again."""
        self.backbone_frozen = freeze
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(not freeze or name.startswith('head.'))
        self.train(self.training)

    def train(self, mode: bool = True) -> 'VisionTransformer':
        super().train(mode)
        for child in self.children() if self.backbone_frozen else ():
            if child is not self.head:
                child.train(False)
        return self

    def get_classifier(self) -> nn.Module:
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str = '') -> None:
        self.num_classes = num_classes
        self.head = nn.Linear(self.embed_dim, num_classes) if num_classes > 0 else nn.Identity()

    def probe_layers(self, num_classes: int) -> None:
        """Give each block a linear classifier of its class token and mean; `forward` returns (B, depth, num_classes).
        """
        self.num_classes = num_classes
        heads = [nn.Linear(2 * self.embed_dim, num_classes) for _ in self.blocks]
        for head in heads:
            trunc_normal_(head.weight, std=.01)
            nn.init.zeros_(head.bias)
        self.head = nn.ModuleList(heads)

    def forward_features(self, x: Tensor, layers: Optional[List[Tensor]] = None) -> Tensor:
        """Images to pooled, normalised features (B, D); `layers` receives `class_and_mean` of each block."""
        x = self.patch_embed(x)
        x = torch.cat((self.cls_token.expand(x.shape[0], -1, -1), x), dim=1)  # (B, N, D)
        if self.pos_embed is not None:
            x = x + self.pos_embed
        x = self.pos_drop(x)
        shared_bias = self.rel_pos_bias() if self.rel_pos_bias is not None else None
        for block in self.blocks:
            if self.grad_checkpointing and torch.is_grad_enabled() and not self.backbone_frozen:
                x = checkpoint(block, x, shared_bias, **_CHECKPOINTING)
            else:
                x = block(x, shared_bias)
            if layers is not None:
                layers.append(class_and_mean(x))
        x = self.norm(x)
        return x[:, 0] if self.fc_norm is None else self.fc_norm(reduce(x[:, 1:], 'b n d -> b d', 'mean'))

    def forward(self, x: Tensor) -> Tensor:
        if not isinstance(self.head, nn.ModuleList):
            return self.head(self.forward_features(x))
        layers: List[Tensor] = []
        self.forward_features(x, layers)
        return torch.stack([head(layer) for head, layer in zip(self.head, layers)], dim=1)


_BASE = dict(patch_size=16, embed_dim=768, depth=12, num_heads=12)
_LARGE = dict(patch_size=16, embed_dim=1024, depth=24, num_heads=16)
MODELS = {
    'beit_nano_patch8_32': dict(img_size=32, patch_size=8, embed_dim=64, depth=4, num_heads=4),  # for the digits
    'beit_base_patch16_224': dict(img_size=224, **_BASE),
    'beit_base_patch16_384': dict(img_size=384, **_BASE),
    'beit_large_patch16_224': dict(img_size=224, **_LARGE),
    'beit_large_patch16_384': dict(img_size=384, **_LARGE),
    'beit_large_patch16_512': dict(img_size=512, **_LARGE),
    'beitv2_base_patch16_224': dict(img_size=224, **_BASE),
    'beitv2_large_patch16_224': dict(img_size=224, **_LARGE),
}


def input_statistics(name: str) -> Tuple[Tuple[float, ...], Tuple[float, ...]]:
    """(mean, standard deviation) of the pixels that a model's published weights were trained with."""
    return (IMAGENET_MEAN, IMAGENET_STD) if name.startswith('beitv2_') else (INPUT_MEAN, INPUT_STD)


def _entry_point(name: str) -> Callable:
    """The function that builds a registered model from its architecture and the caller's arguments."""
    def create(pretrained: bool = False, **kwargs: Any) -> VisionTransformer:
        if pretrained:
            raise ValueError('pretrained=True: give the weights file to --finetune, or call '
                             'beit.checkpoint.pretrained.load_pretrained')
        settings = dict(MODELS[name], qkv_bias=True, norm_layer=partial(nn.LayerNorm, eps=1e-6))  # type: Dict[str, Any]
        settings.update((key, value) for key, value in kwargs.items()
                        if not key.startswith('pretrained_cfg') and key != 'cache_dir')  # from timm's create_model
        model = VisionTransformer(**settings)
        model.default_cfg = dict(
            url='', num_classes=model.num_classes, pool_size=None,
            input_size=(model.patch_embed.proj.in_channels,) + model.patch_embed.img_size,
            crop_pct=.9, interpolation='bicubic', first_conv='patch_embed.proj', classifier='head',
            **dict(zip(('mean', 'std'), input_statistics(name))))
        return model

    create.__name__ = create.__qualname__ = name
    return create


# Registered under the reference's names. timm has models of the same names, which these replace.
__all__ = ['VisionTransformer', 'RelativePositionBias', 'relative_position_index', 'MODELS'] + list(MODELS)
with warnings.catch_warnings():
    warnings.simplefilter('ignore', UserWarning)  # timm warns that a name is taken over
    for _name in MODELS:
        globals()[_name] = register_model(_entry_point(_name))
