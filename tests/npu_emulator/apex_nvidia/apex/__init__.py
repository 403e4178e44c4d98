"""A test double of the current NVIDIA apex, with fused optimizers and normalisation but without `amp`."""

from . import normalization, optimizers, parallel  # noqa: F401
