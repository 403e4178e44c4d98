"""What the programs at the root are made of.

Imports go one way: cli, outputs, training, checkpoint, data, files, log, distributed, devices, errors. Each may use
those after it.
"""

import os

# From 2.5 on, torch imports torch_npu by itself and fails with a traceback where CANN is not set up. `beit.devices`
# imports it when it is needed, and explains its failure.
os.environ.setdefault('TORCH_DEVICE_BACKEND_AUTOLOAD', '0')
# PyTorch would tell of connections that break off, or that a stranger made, in many lines; the programs say it in one.
os.environ.setdefault('TORCH_CPP_LOG_LEVEL', 'FATAL')
