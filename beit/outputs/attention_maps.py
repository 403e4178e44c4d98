"""Attention maps: the attention of one block, as a heat map over the model's input image."""

import io
import os
from typing import Any, Optional

import numpy as np
import torch
from PIL import Image, ImageOps

from beit.errors import UserError, escape_text
from beit.files import atomic_write

KINDS = ('cls', 'mean')
COOL, WARM, HOT = '#300080', '#ff3010', '#ffe600'  # for the lowest, middle and highest attention
GREY = 0.6  # the brightness of the grey image below; colours show attention only
OPACITY = 0.67  # of the highest attention; the lowest has 0
SHORTEST = 224  # pixels a side; smaller images are enlarged by a whole number


def paint(picture: Any, heat: Any) -> Image.Image:
    """Draw a heat map (H, W) over an image, uint8 (size, size, 3), with colours from its minimum to its maximum."""
    picture, heat = Image.fromarray(np.asarray(picture)), np.asarray(heat, dtype=np.float32)
    factor = -(-SHORTEST // min(picture.size))
    picture = picture.resize((picture.width * factor, picture.height * factor), Image.NEAREST)  # type: ignore[attr-defined]
    smooth = np.asarray(Image.fromarray(heat).resize(picture.size, Image.BICUBIC))  # type: ignore[attr-defined]
    smooth = (smooth - smooth.min()) / max(float(smooth.max() - smooth.min()), 1e-12)
    colours = ImageOps.colorize(_to_grey(smooth), COOL, HOT, WARM)
    dimmed = picture.convert('L').point(lambda value: value * GREY).convert('RGB')
    return Image.composite(colours, dimmed, _to_grey(OPACITY * smooth ** 0.7))  # 0.7 makes medium values visible


def _to_grey(values: np.ndarray) -> Image.Image:
    return Image.fromarray(np.uint8(values * 255 + 0.5))


class HeatmapWriter:
    """Records the input of a block's attention in each forward pass, and writes attention maps into a folder.

    The result and kernel of the forward pass do not change.

    Args:
        model (VisionTransformer): without a wrapper.
        block: its number, from 1; None is the last. Raises `UserError` if the model has no such block.
        kind: 'cls': the attention of the class token to the patches; 'mean': of the patches, on average; None: of the
            token that the model pools.
        origin: the maps get the subfolders of `folder` that the images have in this one.
        heads: whether to write a map for each head, too.
    """

    def __init__(self, model: Any, block: Optional[int] = None, kind: Optional[str] = None, folder: str = '',
                 origin: str = '', heads: bool = False) -> None:
        depth = len(model.blocks)
        if block is not None and not 1 <= block <= depth:
            raise UserError('--attention_block %d: the model has blocks 1 to %d' % (block, depth))
        self.kind = kind or ('cls' if model.fc_norm is None else 'mean')
        self.grid = model.patch_embed.patch_shape
        self.attention = model.blocks[(block or depth) - 1].attn
        self.folder, self.origin, self.heads = folder, origin, heads
        self.inputs: Optional[tuple] = None  # of the last forward pass, for `maps`
        self.attention.register_forward_pre_hook(lambda _, inputs: setattr(self, 'inputs', inputs))

    @torch.no_grad()
    def maps(self, inputs: tuple, row: int) -> torch.Tensor:
        """The attention to each patch of the image in a row of the batch, float32 (heads, H, W) on the CPU.

        One image at a time: the weights of a batch of large images do not fit into memory.
        """
        weights = self.attention.weights(inputs[0][row:row + 1], *inputs[1:])[0].float()  # (heads, N, N)
        queries = weights[:, :1] if self.kind == 'cls' else weights[:, 1:]
        return queries.mean(1)[:, 1:].reshape(-1, *self.grid).cpu()

    def write(self, path: str, picture: torch.Tensor, inputs: tuple, row: int) -> str:
        """Write <path>.attention.png, and <path>.head<N>.png for each head; returns the former path."""
        maps = self.maps(inputs, row)
        parts = os.path.relpath(os.path.abspath(path), self.origin).split(os.sep)
        target = os.path.join(self.folder, *[part for part in parts if part != os.pardir])
        try:
            os.makedirs(os.path.dirname(target), exist_ok=True)
        except OSError as error:
            raise UserError('--attention_dir: cannot make %s (%s)'
                            % (escape_text(os.path.dirname(target)), error.strerror)) from None
        heats = [('attention', maps.mean(0))] + [('head%d' % head, heat) for head, heat in enumerate(maps, 1)]
        for name, heat in heats if self.heads else heats[:1]:
            content = io.BytesIO()
            paint(picture, heat).save(content, 'PNG')
            atomic_write.write_bytes('%s.%s.png' % (target, name), content.getvalue())
        return target + '.attention.png'
