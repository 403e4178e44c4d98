"""Where a model looks: the attention of one block, as a heat map over the picture that the model was shown."""

import io
import os
from typing import Any, Optional

import numpy as np
import torch
from PIL import Image, ImageOps

from beit.errors import UserError, escape_text
from beit.files import atomic_write

KINDS = ('cls', 'mean')
COOL, WARM, HOT = '#300080', '#ff3010', '#ffe600'  # of little attention, half and most
GREY = 0.6  # the brightness that the picture keeps, all grey, so that colours mean attention alone
OPACITY = 0.67  # of the colour for most attention; there is none over the least
SHORTEST = 224  # pixels of a picture's side; smaller ones are enlarged by a whole number


class AttentionHook:
    """Keeps what a block's attention is given while the model computes, whose result and kernel stay as they are.

    Args:
        model (VisionTransformer): out of any wrapper.
        block: which one, counted from 1; None is the last. `UserError` where the model has no such block.
        kind: 'cls': how the class token attends to the patches; 'mean': how the patches do, on average; None: whichever
            token the model pools by.
    """

    def __init__(self, model: Any, block: Optional[int] = None, kind: Optional[str] = None) -> None:
        depth = len(model.blocks)
        if block is not None and not 1 <= block <= depth:
            raise UserError('--attention_block %d: the model has blocks 1 to %d' % (block, depth))
        self.kind = kind or ('cls' if model.fc_norm is None else 'mean')
        self.grid = model.patch_embed.patch_shape
        self.attention = model.blocks[(block or depth) - 1].attn
        self.inputs: Optional[tuple] = None
        self.attention.register_forward_pre_hook(self.keep)

    def keep(self, _: torch.nn.Module, inputs: tuple) -> None:
        self.inputs = inputs

    def take(self) -> Optional[tuple]:
        """What the last batch gave, for `maps`."""
        inputs, self.inputs = self.inputs, None
        return inputs

    @torch.no_grad()
    def maps(self, inputs: tuple, row: int) -> torch.Tensor:
        """float32 (heads, H, W) on the CPU: the share of its attention that each patch of the image in that row gets.

        One image at a time: the weights of a batch of large ones would not fit into memory.
        """
        weights = self.attention.weights(inputs[0][row:row + 1], *inputs[1:])[0].float()  # (heads, N, N)
        queries = weights[:, :1] if self.kind == 'cls' else weights[:, 1:]
        return queries.mean(1)[:, 1:].reshape(-1, *self.grid).cpu()


def paint(picture: Any, heat: Any) -> Image.Image:
    """A heat map (H, W) over a picture, uint8 (size, size, 3); its colours go from its least value to its most."""
    picture, heat = Image.fromarray(np.asarray(picture)), np.asarray(heat, dtype=np.float32)
    factor = -(-SHORTEST // min(picture.size))
    picture = picture.resize((picture.width * factor, picture.height * factor), Image.NEAREST)  # type: ignore[attr-defined]
    smooth = np.asarray(Image.fromarray(heat).resize(picture.size, Image.BICUBIC))  # type: ignore[attr-defined]
    smooth = (smooth - smooth.min()) / max(float(smooth.max() - smooth.min()), 1e-12)
    colours = ImageOps.colorize(_to_grey(smooth), COOL, HOT, WARM)
    dimmed = picture.convert('L').point(lambda value: value * GREY).convert('RGB')
    return Image.composite(colours, dimmed, _to_grey(OPACITY * smooth ** 0.7))  # 0.7: half of it is seen well


def _to_grey(values: np.ndarray) -> Image.Image:
    return Image.fromarray(np.uint8(values * 255 + 0.5))


class HeatmapWriter:
    """Writes the pictures of a model's attention into a folder, in the subfolders that the images have in `origin`.

    With `heads`, one picture more for each head.
    """

    def __init__(self, hook: AttentionHook, folder: str, origin: str, heads: bool = False) -> None:
        self.hook, self.folder, self.origin, self.heads = hook, folder, origin, heads

    def write(self, path: str, picture: torch.Tensor, inputs: tuple, row: int) -> str:
        """Write <path>.attention.png, and <path>.head<N>.png for each head; gives the first one's path."""
        maps = self.hook.maps(inputs, row)
        parts = os.path.relpath(os.path.abspath(path), self.origin).split(os.sep)
        target = os.path.join(self.folder, *[part for part in parts if part != os.pardir])
        try:
            os.makedirs(os.path.dirname(target), exist_ok=True)
        except OSError as error:
            raise UserError('--attention_dir: cannot make %s (%s)'
                            % (escape_text(os.path.dirname(target)), error.strerror)) from None
        save(target + '.attention.png', paint(picture, maps.mean(0)))
        for head, heat in enumerate(maps if self.heads else (), 1):
            save('%s.head%d.png' % (target, head), paint(picture, heat))
        return target + '.attention.png'


def save(path: str, image: Image.Image) -> None:
    content = io.BytesIO()
    image.save(content, 'PNG')
    atomic_write.write_bytes(path, content.getvalue())
