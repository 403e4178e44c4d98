"""A double of PyPI's package named `apex`, for tests: a toolkit for web sites; nothing to train with."""

VERSION = '0.9.10.dev0'
