"""The library of the programs at the root."""

import os
from typing import Any

# From 2.5 on, torch imports torch_npu automatically and fails with a traceback if CANN is not set up. `beit.devices`
# imports it when needed, and explains its failure.
os.environ.setdefault('TORCH_DEVICE_BACKEND_AUTOLOAD', '0')
# PyTorch logs many lines about a broken or unexpected connection; the programs write a single one.
os.environ.setdefault('TORCH_CPP_LOG_LEVEL', 'FATAL')


def load(path: str, device: str = 'cpu', **options: Any) -> Any:
    """Load a `beit.classifier.Classifier` of a checkpoint, the folder of a training, an export, or published weights.

    >>> import beit
    >>> classifier = beit.load('train_result')
    >>> classifier.predict('photo.jpg', top_k=2)
    [('cat', 0.93), ('lynx', 0.04)]

    Args:
        path (str): a file, a folder or an https URL.
        device (str): where the network computes, such as 'cuda' or 'npu:0'.
        options: see `beit.classifier.load`.
    """
    from beit import classifier  # imports torch, which `import beit` does not need
    return classifier.load(path, device, **options)
