"""`apex.optimizers.NpuFusedAdamW`: AdamW for gradients that `amp.initialize(combine_grad=True)` has combined."""

import torch


class NpuFusedAdamW(torch.optim.AdamW):
    """The double computes PyTorch's AdamW, and refuses the same calls as the real one."""

    def __init__(self, params, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=1e-2, amsgrad=False):
        super().__init__(params, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, amsgrad=amsgrad)
        self.is_npu_fused_optimizer = True

    def step(self, closure=None):
        stash = getattr(self, '_amp_stash', None)
        if stash is None:
            raise RuntimeError('apex.optimizers.NpuFusedAdamW should be used with AMP.')
        if not stash.combine:
            raise RuntimeError('apex.optimizers.NpuFusedAdamW needs amp.initialize(..., combine_grad=True)')
        return super().step(closure)
