"""The only package that names torch.npu, torch.cuda, torch_npu or apex."""
