"""The content and the loading of checkpoints and pretrained weights."""
