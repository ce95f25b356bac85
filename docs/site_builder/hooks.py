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

# MkDocs loads this file by its path. site_builder is in docs/, minipaged in the checkout's root.
sys.path[:0] = [str(folder) for folder in Path(__file__).parents[1:3]]

from site_builder.cli_page import cli_files
from site_builder.markdown import SOURCE, expanded
from site_builder.navigation import with_folders
from site_builder.sources import line_anchors, source_files
from site_builder.tutorials import tutorial_files


def root_of(config: MkDocsConfig) -> Path:
    return Path(config.config_file_path).resolve().parent


def on_files(files: Files, config: MkDocsConfig, **_: Any) -> Files:
    """Add the chapters, the command line, the source that pages link to, and folders' pages."""
    root = root_of(config)
    made = tutorial_files(root) | cli_files(root)
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
