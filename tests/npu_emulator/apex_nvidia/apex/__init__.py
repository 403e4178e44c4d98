"""A double of today's NVIDIA apex, for tests: it has fused optimizers and normalisation, and no `amp` any more."""

from . import normalization, optimizers, parallel  # noqa: F401
