"""Checkpoints and pretrained weights: what they hold, and how they are loaded."""
