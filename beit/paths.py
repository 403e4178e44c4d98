"""Where the project lies, and what it may write beside itself."""

import os


def project_root() -> str:
    """The folder that holds the programs."""
    return os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


def cache_folder() -> str:
    """The user's folder for what the project keeps where its own cannot be written."""
    caches = os.environ.get('XDG_CACHE_HOME', '')
    if not os.path.isabs(caches):
        caches = os.path.join(os.path.expanduser('~'), '.cache')
    return os.path.join(caches, 'beit')
