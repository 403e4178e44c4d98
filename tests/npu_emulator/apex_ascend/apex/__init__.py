"""A test double of Ascend's apex 0.1+ascend: `apex.amp` and `apex.optimizers` with its interface and behaviour.

It runs on any device with float16, such as the emulated NPU. Real hardware needs the real apex.
"""

from . import amp, optimizers  # noqa: F401

__version__ = '0.1+ascend.emulated'
