"""`python -m site_builder DESTINATION`: the whole docs tree as plain files.

For any site builder but MkDocs, which does the same in memory. It is written atomically.
"""

import argparse
import shutil
import sys
import tempfile
from pathlib import Path

from site_builder.markdown import CannotBuild, expanded
from site_builder.sources import source_files
from site_builder.tutorials import tutorial_files


def write_tree(root: Path, destination: Path) -> None:
    """Raises CannotBuild, also if the destination is there already."""
    if destination.exists():
        raise CannotBuild(f"{destination} is there already: name a folder that is not.")
    destination.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=destination.parent) as unfinished:
        tree = Path(unfinished) / "docs"
        shutil.copytree(root / "docs", tree, ignore=shutil.ignore_patterns("site_builder"))
        for page in sorted(tree.rglob("*.md")):
            name = page.relative_to(tree).as_posix()
            page.write_text(expanded(page.read_text(encoding="utf-8"), root, name), "utf-8")
        made = tutorial_files(root)
        pages = [page.read_text(encoding="utf-8") for page in tree.rglob("*.md")]
        pages += [content.decode() for name, content in made.items() if name.endswith(".md")]
        for name, content in (made | source_files(root, pages)).items():
            path = tree / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        tree.rename(destination)


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
