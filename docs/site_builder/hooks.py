"""What MkDocs calls while it builds; mkdocs.yml names this file.

Pages that are made here reach MkDocs as files in memory: docs/ holds only what people wrote.
"""

import sys
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.livereload import LiveReloadServer
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

sys.path.insert(0, str(Path(__file__).parents[1]))  # MkDocs loads this file by its path

from site_builder.markdown import SOURCE, expanded
from site_builder.sources import line_anchors, source_files
from site_builder.tutorials import tutorial_files


def root_of(config: MkDocsConfig) -> Path:
    return Path(config.config_file_path).resolve().parent


def on_files(files: Files, config: MkDocsConfig, **_: Any) -> Files:
    """Add the chapters, the source that pages lead to, and folders' pages to the navigation."""
    root = root_of(config)
    made = tutorial_files(root)
    pages = [
        expanded(file.content_string, root, file.src_uri) for file in files.documentation_pages()
    ]
    pages += [content.decode() for path, content in made.items() if path.endswith(".md")]
    for path, content in (made | source_files(root, pages)).items():
        text_or_bytes = content.decode() if path.endswith(".md") else content
        files.append(File.generated(config, path, content=text_or_bytes))
    if config.nav is not None:
        pages = [file.src_uri for file in files.documentation_pages()]
        config.nav = with_folders(config.nav, pages)
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, **_: Any) -> str:
    """Fill in quotes and places; chapters have theirs already."""
    if page.file.generated_by is not None:
        return markdown
    return expanded(markdown, root_of(config), page.file.src_uri)


def on_page_content(html: str, page: Page, **_: Any) -> str:
    """Tell MkDocs, which checks anchors, of those that the highlighter has set."""
    if page.file.src_uri.startswith(SOURCE):
        known = page.present_anchor_ids or set()
        page.present_anchor_ids = known | line_anchors(page.markdown or "")
    return html


def on_serve(server: LiveReloadServer, config: MkDocsConfig, **_: Any) -> LiveReloadServer:
    for folder in ("tutorials", "minipaged"):
        server.watch(str(root_of(config) / folder))
    return server


# ---- the navigation of mkdocs.yml, where `tutorials/` is all pages of that folder ----------------


def with_folders(nav: list[Any], pages: list[str]) -> list[Any]:
    """Each entry that ends in a slash is replaced by the folder's pages, its index first."""
    items: list[Any] = []
    for item in nav:
        if isinstance(item, str) and item.endswith("/"):
            items += _pages_below(item, pages)
        elif isinstance(item, dict):
            items.append({name: _expanded(value, pages) for name, value in item.items()})
        else:
            items.append(item)
    return [item for item in items if item != {}]


def _expanded(value: Any, pages: list[str]) -> Any:
    return with_folders(value, pages) if isinstance(value, list) else value


def _pages_below(folder: str, pages: list[str]) -> list[str]:
    below = [page for page in pages if page.rpartition("/")[0] == folder.rstrip("/")]
    return sorted(below, key=lambda page: (page != folder + "index.md", page))
