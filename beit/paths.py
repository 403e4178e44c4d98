"""Where the project lies."""

import os


def project_root() -> str:
    """The folder that holds the programs."""
    return os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
