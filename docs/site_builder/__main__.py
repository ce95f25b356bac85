"""`python -m site_builder FOLDER`: the pages as plain files in FOLDER/docs, with FOLDER/mkdocs.yml.

For site builders that cannot run our hooks, such as Zensical. MkDocs does the same in memory. The
folder is written atomically.
"""

import argparse
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import yaml

from site_builder.cli_page import cli_files
from site_builder.markdown import CannotBuild, expanded
from site_builder.navigation import with_folders
from site_builder.sources import source_files
from site_builder.tutorials import tutorial_files


def write_tree(root: Path, destination: Path) -> None:
    """Raises CannotBuild, also if the destination is there already."""
    if destination.exists():
        raise CannotBuild(f"{destination} is there already: name a folder that is not.")
    destination.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=destination.parent) as unfinished:
        folder = Path(unfinished) / "folder"
        tree = folder / "docs"
        shutil.copytree(root / "docs", tree, ignore=shutil.ignore_patterns("site_builder"))
        for page in sorted(tree.rglob("*.md")):
            name = page.relative_to(tree).as_posix()
            page.write_text(expanded(page.read_text(encoding="utf-8"), root, name), "utf-8")
        made = tutorial_files(root) | cli_files(root)
        pages = [page.read_text(encoding="utf-8") for page in tree.rglob("*.md")]
        pages += [content.decode() for name, content in made.items() if name.endswith(".md")]
        for name, content in (made | source_files(root, pages)).items():
            path = tree / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        names = [page.relative_to(tree).as_posix() for page in tree.rglob("*.md")]
        text = yaml.safe_dump(_settings(root, names), sort_keys=False, allow_unicode=True)
        (folder / "mkdocs.yml").write_text(text, encoding="utf-8")
        folder.rename(destination)


def _settings(root: Path, pages: list[str]) -> dict[str, Any]:
    """mkdocs.yml, without hooks: what they do has been done."""
    settings = yaml.safe_load((root / "mkdocs.yml").read_text(encoding="utf-8"))
    for done in ("hooks", "exclude_docs"):
        settings.pop(done, None)
    settings["nav"] = with_folders(settings["nav"], pages)
    for plugin in settings["plugins"]:
        if "mkdocstrings" in plugin:
            python = plugin["mkdocstrings"]["handlers"]["python"]
            python["paths"] = [str(root)]
            extensions = python["options"]["extensions"]
            python["options"]["extensions"] = [str(root / each) for each in extensions]
    return settings


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m site_builder", description=__doc__)
    parser.add_argument("destination", type=Path, help="a folder that is not there yet")
    chosen = parser.parse_args(arguments)
    try:
        write_tree(Path(__file__).resolve().parents[2], chosen.destination)
    except CannotBuild as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
