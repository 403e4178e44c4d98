"""Fused optimizers, which need CUDA."""

import torch


class FusedAdam(torch.optim.AdamW):
    def __init__(self, *arguments, **options):
        raise RuntimeError('apex.optimizers.FusedAdam requires cuda extensions')
