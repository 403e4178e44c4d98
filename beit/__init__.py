"""The library of the programs at the root.

Each package imports only from itself and the later ones: cli, outputs, training, checkpoint, model_spec, data, files,
log, distributed, devices, config, paths, startup, errors.
"""

import os

# From 2.5 on, torch imports torch_npu automatically and fails with a traceback if CANN is not set up. `beit.devices`
# imports it when needed, and explains its failure.
os.environ.setdefault('TORCH_DEVICE_BACKEND_AUTOLOAD', '0')
# PyTorch logs many lines about a broken or unexpected connection; the programs write a single one.
os.environ.setdefault('TORCH_CPP_LOG_LEVEL', 'FATAL')
