"""A test double of PyPI's `apex`, an unrelated toolkit for web sites."""

VERSION = '0.9.10.dev0'
