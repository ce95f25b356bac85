"""The navigation of mkdocs.yml, in which `tutorials/` means all pages of that folder."""

from typing import Any


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
