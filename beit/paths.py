"""The project's folder and the user's cache folder."""

import os


def project_root() -> str:
    """The folder that holds the programs."""
    return os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


def cache_folder() -> str:
    """The user's cache folder, for files that do not fit into a read-only project folder."""
    caches = os.environ.get('XDG_CACHE_HOME', '')
    if not os.path.isabs(caches):
        caches = os.path.join(os.path.expanduser('~'), '.cache')
    return os.path.join(caches, 'beit')
