"""The features of images, and the file of `run_predict.py --features`."""

import base64
import json
import os
import tempfile
import zipfile
from typing import Any, BinaryIO, Iterable, List, Optional, Tuple

import numpy as np
import torch

from beit.errors import UserError
from beit.outputs.prediction_writers import LineWriter, Prediction
from modeling_finetune import class_and_mean


class FeatureHook:
    """Records the features of each forward pass, whose result does not change.

    Args:
        model (VisionTransformer): without a wrapper.
        layer: a block, from 1, whose class token and mean of patch tokens are the features; None: the input of the
            head, pooled and normalised. Raises `UserError` if the model has no such block.
    """

    def __init__(self, model: Any, layer: Optional[int] = None) -> None:
        depth = len(model.blocks)
        if layer is not None and not 1 <= layer <= depth:
            raise UserError('--layer %d: the model has blocks 1 to %d' % (layer, depth))
        self.features: Optional[torch.Tensor] = None  # of the last batch, float32 (B, D) or for a layer (B, 2 D)
        if layer is None:
            model.head.register_forward_pre_hook(lambda _, inputs: self.keep(inputs[0]))
        else:
            model.blocks[layer - 1].register_forward_hook(
                lambda _, __, tokens: self.keep(class_and_mean(tokens.float())))

    def keep(self, features: torch.Tensor) -> None:
        self.features = features.float()


def encode_features(features: torch.Tensor) -> List[str]:
    """A text for the features of each image, which processes exchange."""
    return [base64.b64encode(row.tobytes()).decode() for row in features.cpu().numpy().astype('<f4')]


class FeaturesWriter(LineWriter):
    """A .npz file: `features`, float32 (images, dimensions), and `files`, their paths; without unreadable images.

    An array begins with its length, which is known at the end: until then two temporary files hold the content, in
    the folder of `file`.
    """

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        name = getattr(file, 'name', '')  # of a file in memory, on other processes, ''
        folder = os.path.dirname(os.path.abspath(name)) if name else None
        self.rows, self.names = tempfile.TemporaryFile(dir=folder), tempfile.TemporaryFile(dir=folder)
        self.count, self.dimensions, self.longest = 0, 0, 1

    def write(self, prediction: Prediction) -> None:
        if not prediction.reason:
            row = base64.b64decode(prediction.features)
            self.count, self.dimensions = self.count + 1, len(row) // 4
            self.longest = max(self.longest, len(prediction.path))
            self.rows.write(row)
            self.names.write(json.dumps(prediction.path).encode() + b'\n')

    def end(self) -> None:
        self.rows.seek(0)
        self.names.seek(0)
        with self.rows, self.names, zipfile.ZipFile(self.file, 'w') as archive:
            add_array(archive, 'features', '<f4', (self.count, self.dimensions),
                      iter(lambda: self.rows.read(1 << 20), b''))
            add_array(archive, 'files', '<U%d' % self.longest, (self.count,),
                      (json.loads(line).encode('utf-32-le', 'surrogatepass').ljust(4 * self.longest, b'\0')
                       for line in self.names), zipfile.ZIP_DEFLATED)


def add_array(archive: zipfile.ZipFile, name: str, dtype: str, shape: Tuple[int, ...], parts: Iterable[bytes],
              compression: int = zipfile.ZIP_STORED) -> None:
    """Add an array to a .npz file, from the bytes of its parts. The same content gives the same file."""
    info = zipfile.ZipInfo(name + '.npy')
    info.compress_type = compression
    with archive.open(info, 'w', force_zip64=True) as member:
        np.lib.format.write_array_header_1_0(member, {'descr': dtype, 'fortran_order': False, 'shape': shape})
        for part in parts:
            member.write(part)
