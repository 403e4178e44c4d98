"""A double of Ascend's apex 0.1+ascend, for tests: `apex.amp` and `apex.optimizers` with its interface and its habits.

It runs on any device that has float16 (the emulated NPU); on real hardware the real one belongs in its place.
"""

from . import amp, optimizers  # noqa: F401

__version__ = '0.1+ascend.emulated'
