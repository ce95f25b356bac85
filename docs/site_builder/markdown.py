"""What is done to the Markdown of every page and chapter before a site builder sees it."""

from pathlib import Path

from site_builder.companion import with_places
from site_builder.links import with_files_linked
from site_builder.quote_code import with_quotes


def expanded(markdown: str, root: Path, page: str) -> str:
    """Raises CannotBuild, naming the page, for a name that is gone."""
    markdown = with_places(markdown, root, page)
    markdown = with_files_linked(markdown, root, page)
    return with_quotes(markdown, root, page)
