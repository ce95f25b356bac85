"""What stops a build, in a sentence or two that say where and why."""

from mkdocs.exceptions import PluginError


class CannotBuild(PluginError):
    """MkDocs prints its message without a traceback, and ends."""
