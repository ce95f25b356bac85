"""The documentation site: quotes, outputs and drawings are current; a fault fails the build."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from urllib.parse import unquote, urldefrag, urlsplit

import pytest
import yaml

pytest.importorskip("mkdocs", reason="needs the extra `docs`: pip install -e '.[docs]'")
pytest.importorskip("nbclient", reason="needs the extra `docs`: pip install -e '.[docs]'")

from site_builder.__main__ import write_tree
from site_builder.chapters import read
from site_builder.cli_page import WIDTH, cli_page
from site_builder.execution import executed
from site_builder.markdown import (
    CannotBuild,
    expanded,
    with_files_linked,
    with_places,
    with_quotes,
)
from site_builder.navigation import with_folders
from site_builder.tutorial_pages import page_of
from site_builder.tutorials import WITHOUT_RUNNING, tutorial_files
from stub_chapters import make_chapters

from minipaged.labs.chapters.names import find

ROOT = Path(__file__).parents[2]

LIBRARY = '''\
"""A library."""

import functools

WIDTH = 3


class Pool:
    """Blocks."""

    @property
    @functools.cache
    def size(self) -> int:
        return WIDTH

    def free(self) -> None:
        pass
'''

FIRST = """\
# %% [markdown]
# # The first chapter
#
# What you will know:
#
# - where $x$ is. And more.
#
# @@ minipaged.pool.Pool.size
#
# ```text
# @@ minipaged.pool.Gone
# ```
#
# See [the pool](../minipaged/pool.py) and [the next](01_second.md).

# %%
import sys
from pathlib import Path

import minipaged.pool

with Path("runs.txt").open("a") as runs:
    runs.write("once ")
print("\\x1b[32mwide\\x1b[0m", minipaged.pool.WIDTH)
print("a progress bar", file=sys.stderr)

# %% Three [numbers] & a line
from IPython.display import SVG, display

display(SVG("<svg xmlns='http://www.w3.org/2000/svg'/>"))
"Text(0.5, 0, 'numbers')"


# %%
class Player:
    def _repr_html_(self):
        return '<iframe class="replay" srcdoc="&lt;p&gt;{{ lines a.b }} $x$&lt;/p&gt;"></iframe>'


Player()
"""

DRAWN = """\
# %% [markdown]
# # A chapter that draws
#
# It draws.

# %% A line
import matplotlib.pyplot as plt

figure, axes = plt.subplots(figsize=(2, 1))
axes.fill_between([1, 2, 3], [1, 3, 2])
axes.set_title("numbers", clip_on=True)
"""

SECOND = """\
# %% [markdown]
# # The second chapter
#
# It adds numbers. Slowly.

# %%
1 + 1
"""


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A repository with a library, two chapters and three pages."""
    project = tmp_path / "project"
    files = {
        "minipaged/__init__.py": "from minipaged.pool import Pool as Pool\n",
        "minipaged/pool.py": LIBRARY,
        "tutorials/drawing.py": "",
        "tutorials/00_first.py": FIRST,
        "tutorials/01_second.py": SECOND,
        "docs/index.md": "# Home\n\n[Chapters](tutorials/index.md)\n",
        "docs/companion.md": "# Companion\n\n| a |\n|---|\n| {{ lines minipaged.Pool.free }} |\n",
        "docs/guides/one.md": "# One\n\n[the pool](../../minipaged/pool.py)\n",
    }
    for name, text in files.items():
        (project / name).parent.mkdir(parents=True, exist_ok=True)
        (project / name).write_text(text, encoding="utf-8")
    return project


@pytest.fixture
def without_running(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(WITHOUT_RUNNING, "1")


def copy_settings(project: Path) -> None:
    """The settings of the real site, but for its navigation."""
    settings = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    nav = "nav: [index.md, {Tutorials: [tutorials/]}, {Guides: [guides/]}, companion.md]\n\n"
    settings = re.sub(r"^nav:\n.*?(?=^\S)", nav, settings, flags=re.DOTALL | re.MULTILINE)
    settings = settings.replace("docs/site_builder", str(ROOT / "docs" / "site_builder"))
    (project / "mkdocs.yml").write_text(settings, encoding="utf-8")


def mkdocs(project: Path) -> "subprocess.CompletedProcess[str]":
    copy_settings(project)
    for folder in ("javascripts", "stylesheets"):
        shutil.copytree(ROOT / "docs" / folder, project / "docs" / folder, dirs_exist_ok=True)
    return subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict"],
        cwd=project,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
    )


# Names, and what pages do with them


def test_a_name_has_the_lines_of_its_definition_with_decorators(project):
    size = find(project, "minipaged.pool.Pool.size")
    assert (size.path, size.first, size.last) == ("minipaged/pool.py", 11, 14)
    assert size.text.startswith("@property\n@functools.cache\ndef size")
    assert find(project, "minipaged.pool.WIDTH").text == "WIDTH = 3\n"


def test_a_name_is_found_through_the_package_that_exports_it(project):
    assert find(project, "minipaged.Pool.free") == find(project, "minipaged.pool.Pool.free")


def test_a_decorated_kernel_is_found():
    kernel = find(ROOT, "minipaged.attention.triton.decode.decode_kernel")
    assert kernel.text.startswith("@triton.jit")


def test_a_quote_shows_the_source_with_its_file_and_lines(project):
    page = with_quotes("Look:\n\n  @@ minipaged.pool.Pool.free\n", project, "a.md")
    assert page == (
        'Look:\n\n  ```python title="minipaged/pool.py, lines 16-17"\n'
        "  def free(self) -> None:\n      pass\n  ```\n"
    )


def test_a_place_is_a_link_to_file_and_lines(project):
    place = with_places("| {{ lines minipaged.pool.Pool.free }} |", project, "guides/a.md")
    link = "[`minipaged/pool.py, lines 16-17`](../../minipaged/pool.py#L16-L17)"
    assert place == f"| {link} |\n"
    name = with_places("{{ name minipaged.Pool.free }}", project, "a.md")
    assert name == "[`Pool.free`](../minipaged/pool.py#L16-L17)\n"
    assert "[`minipaged/pool.py`](../" in with_places("{{lines minipaged.pool}}", project, "a.md")


@pytest.mark.parametrize("fence", ["```", "~~~~", "````"])
def test_code_in_fences_is_not_changed(project, fence):
    page = f"{fence}text\n@@ gone.name\n{{{{ lines gone.name }}}}\n[a](../minipaged)\n{fence}\n"
    assert expanded(page, project, "a.md") == page


@pytest.mark.parametrize("name", ["minipaged.gone", "minipaged.pool.Pool.gone", "gone", "."])
@pytest.mark.parametrize("form", ["@@ {}", "{{{{ lines {} }}}}", "{{{{ name {} }}}}"])
def test_a_missing_name_stops_the_build_and_is_reported_with_its_page(project, name, form):
    with pytest.raises(CannotBuild, match=re.escape("guides/a.md, line 2: cannot")) as stopped:
        expanded(f"Text\n{form.format(name)}\n", project, "guides/a.md")
    assert name in str(stopped.value)


def test_links_into_the_repository_lead_to_pages_of_source_or_become_text(project):
    (project / "README.md").touch()
    page = "[p](../minipaged/pool.py#L4-L9) [all](../minipaged) [r](../README.md) [w](https://a.b)"
    assert with_files_linked(page, project, "a.md") == (
        "[p](source/minipaged/pool.py.md#__span-0-4) [all](source/minipaged/__init__.py.md) "
        "r (`README.md`) [w](https://a.b)\n"
    )
    page = "[c](../tutorials/00_first.py) [all](../tutorials/) [h](../docs/index.md#home)"
    assert with_files_linked(page, project, "guides/a.md") == (
        "[c](../tutorials/00_first.md) [all](../tutorials/index.md) [h](../index.md#home)\n"
    )
    chapter = with_files_linked("[c](01_second.py) [d](index.md)", project, "tutorials/00_first.md")
    assert chapter == "[c](../tutorials/01_second.md) [d](index.md)\n"
    (project / "tutorials" / "labs").mkdir(exist_ok=True)
    (project / "tutorials" / "labs" / "01.md").touch()
    for page in ("guides/a.md", "tutorials/00_first.md"):
        to_the_lab = "labs/01.md" if page.startswith("tut") else "../../tutorials/labs/01.md"
        led = with_files_linked(f"[lab]({to_the_lab})", project, page)
        assert led == "[lab](../tutorials/labs/01.md)\n"
    beside = "[one](guides/one.md) [gone](../minipaged/gone.py) ![p](../minipaged/pool.py)\n"
    assert with_files_linked(beside, project, "a.md") == beside


def test_a_folder_in_the_navigation_expands_to_its_pages():
    pages = ["a/2.md", "a/index.md", "a/1.md", "b.md"]
    nav = with_folders([{"A": ["a/", "b.md"]}, {"B": "b.md"}], pages)
    assert nav == [{"A": ["a/index.md", "a/1.md", "a/2.md", "b.md"]}, {"B": "b.md"}]


# Chapters


def test_a_chapter_becomes_a_page_with_the_outputs_of_its_cells(project):
    chapter = read(project / "tutorials" / "00_first.py")
    page = page_of(chapter, executed(chapter, project), project)
    assert page.markdown.startswith("# The first chapter\n\n[Notebook](00_first.ipynb)")
    assert 'python title="minipaged/pool.py, lines 11-14"' in page.markdown
    assert "\n@@ minipaged.pool.Gone\n" in page.markdown
    assert '<div class="output" markdown="1">\n\n```text\nwide 3\n```\n\n</div>' in page.markdown
    assert "progress" not in page.markdown.replace('print("a progress bar"', "")
    assert "Text(" not in page.markdown.replace('"Text(', "")
    assert "![Three \\[numbers\\] & a line](pictures/00_first-2-1.svg)" in page.markdown
    assert "<figcaption>Three [numbers] &amp; a line</figcaption>" in page.markdown
    assert '<iframe class="replay" srcdoc="&lt;p&gt;{{ lines a.b }} $x$' in page.markdown
    assert page.pictures["pictures/00_first-2-1.svg"].startswith(b"<svg")


def test_a_chapter_is_run_again_only_if_something_it_uses_changed(project):
    def runs() -> int:
        executed(read(project / "tutorials" / "00_first.py"), project)
        return (project / "tutorials" / "runs.txt").read_text().count("once")

    assert runs() == 1
    assert runs() == 1
    (project / "tutorials" / "01_second.py").write_text(SECOND + "# more\n")
    assert runs() == 1
    (project / "minipaged" / "pool.py").write_text(LIBRARY.replace("3", "4"))
    assert runs() == 2
    [kept] = (project / ".cache" / "tutorials").glob("00_first-*.ipynb")
    assert "4" in kept.read_text()


def test_pictures_are_the_same_in_every_run(project):
    script = project / "tutorials" / "02_drawn.py"
    script.write_text(DRAWN)
    chapter = read(script)
    first = page_of(chapter, executed(chapter, project), project)
    assert list(first.pictures) == ["pictures/02_drawn-1-1.svg"]
    assert "Text(" not in first.markdown
    shutil.rmtree(project / ".cache")
    assert page_of(chapter, executed(chapter, project), project) == first


def test_a_chapter_that_raises_stops_the_build_with_cell_and_error(project):
    script = project / "tutorials" / "01_second.py"
    script.write_text(SECOND + "\n# %% The fall\nblocks = 0\n16 / blocks\n")
    with pytest.raises(CannotBuild) as stopped:
        executed(read(script), project)
    message = str(stopped.value)
    assert message.startswith("01_second.py, The fall, raised")
    assert "16 / blocks" in message
    assert message.endswith("ZeroDivisionError: division by zero")
    assert len(message.splitlines()) <= 4
    assert not list((project / ".cache").rglob("01_second*"))


def test_a_picture_without_title_stops_the_build(project):
    script = project / "tutorials" / "00_first.py"
    script.write_text(FIRST.replace("# %% Three [numbers] & a line", "# %%"))
    chapter = read(script)
    notebook = executed(chapter, project)
    with pytest.raises(CannotBuild, match=r"00_first\.py: cell 2 draws a picture and has no"):
        page_of(chapter, notebook, project)


@pytest.mark.parametrize("text", ["", "# %%\n1\n", "# %% [markdown]\n# # A title alone\n"])
def test_a_chapter_without_title_or_summary_stops_the_build(project, text):
    script = project / "tutorials" / "02_third.py"
    script.write_text(text)
    with pytest.raises(CannotBuild, match=r"02_third\.py"):
        read(script)


@pytest.mark.usefixtures("without_running")
def test_the_list_of_chapters_has_titles_and_first_sentences(project):
    index = tutorial_files(project)["tutorials/index.md"].decode()
    assert "\n[The first chapter](00_first.md): where $x$ is.\n" in index
    assert "\n[The second chapter](01_second.md): It adds numbers.\n" in index


@pytest.mark.usefixtures("without_running")
def test_a_chapter_opens_with_its_picture_and_so_does_its_place_in_the_list(tmp_path):
    make_chapters(tmp_path / "tutorials")
    shutil.copytree(ROOT / "minipaged" / "memory", tmp_path / "minipaged" / "memory")
    (tmp_path / "docs").mkdir()
    files = {path: content.decode() for path, content in tutorial_files(tmp_path).items()}
    label = '<text x="1" y="9">one_label_of_it</text>'
    page, index = files["tutorials/03_first.md"], files["tutorials/index.md"]
    assert page.index("It counts, too.") < page.index(label) < page.index("The sum is")
    assert index.index(label) < index.index("[3. Adding & counting](03_first.md)")
    assert "<style>" not in page + index
    assert "openings/03.svg" not in page + index + files["tutorials/03_first.ipynb"]
    assert "data:image/svg+xml;base64," in files["tutorials/03_first.ipynb"]


@pytest.mark.usefixtures("without_running")
def test_the_downloadable_notebook_quotes_code_and_has_no_outputs(project):
    files = tutorial_files(project)
    notebook = json.loads(files["tutorials/00_first.ipynb"])
    text = "".join(notebook["cells"][0]["source"])
    assert "@@ minipaged.pool.Pool.size" not in text
    assert "def size(self)" in text
    assert all(not cell.get("outputs") for cell in notebook["cells"])
    assert files == tutorial_files(project)
    assert files["tutorials/00_first.py"].decode() == FIRST


@pytest.mark.usefixtures("without_running")
def test_the_tree_for_other_site_builders_is_written_atomically(project, tmp_path):
    copy_settings(project)
    tree = tmp_path / "tree"
    write_tree(project, tree)
    docs = tree / "docs"
    assert "pool.py, lines 16-17" in (docs / "companion.md").read_text()
    assert (docs / "tutorials" / "00_first.md").exists()
    assert "class Pool" in (docs / "source" / "minipaged" / "pool.py.md").read_text()
    settings = yaml.safe_load((tree / "mkdocs.yml").read_text())
    assert "hooks" not in settings
    chapters = ["tutorials/index.md", "tutorials/00_first.md", "tutorials/01_second.md"]
    assert settings["nav"][1] == {"Tutorials": chapters}
    with pytest.raises(CannotBuild, match="is there already"):
        write_tree(project, tree)
    (project / "docs" / "index.md").write_text("@@ gone.name\n")
    with pytest.raises(CannotBuild, match=r"index\.md, line 1"):
        write_tree(project, tmp_path / "other")
    assert [path.name for path in tmp_path.iterdir() if path != project] == ["tree"]


# The whole site


def test_a_small_site_is_built_strictly(project):
    build = mkdocs(project)
    assert build.returncode == 0, build.stderr
    page = (project / "site" / "tutorials" / "00_first.html").read_text("utf-8")
    assert '<img alt="Three [numbers] &amp; a line" src="pictures/00_first-2-1.svg"' in page
    assert '<iframe class="replay" srcdoc="&lt;p&gt;{{ lines a.b }} $x$&lt;/p&gt;">' in page
    assert 'href="../source/minipaged/pool.py.html"' in page
    assert 'href="01_second.html"' in page
    companion = (project / "site" / "companion.html").read_text("utf-8")
    assert 'href="source/minipaged/pool.py.html#__span-0-16"' in companion
    source = (project / "site" / "source" / "minipaged" / "pool.py.html").read_text()
    assert 'id="__span-0-16"' in source
    assert not (project / "docs" / "tutorials").exists()


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ("[a](gone.md) [b](companion.md#gone)", ["'gone.md'", "anchor '#gone'"]),
        ("@@ minipaged.pool.Gone", ["index.md, line 3: cannot quote minipaged.pool.Gone"]),
    ],
)
def test_a_page_that_is_wrong_fails_the_build(project, wrong, said, monkeypatch):
    monkeypatch.setenv(WITHOUT_RUNNING, "1")
    (project / "docs" / "index.md").write_text(f"# Home\n\n{wrong}\n")
    build = mkdocs(project)
    assert build.returncode != 0
    assert all(part in build.stderr for part in said), build.stderr
    assert "Traceback" not in build.stderr


@pytest.mark.full
@pytest.mark.xdist_group("site")
@pytest.mark.timeout(1800)  # it may run all chapters
def test_no_page_of_the_site_loads_anything_from_elsewhere(built_site):
    loads = re.compile(r'<(?:script|link|img|iframe)\b[^>]*?\b(?:src|href)="((?:https?:)?//[^"]*)"')
    for page in built_site.rglob("*.html"):
        assert not loads.findall(page.read_text(encoding="utf-8")), page


@pytest.mark.full
@pytest.mark.xdist_group("site")
@pytest.mark.timeout(1800)
def test_every_chapter_is_a_page_of_the_site(built_site):
    for script in (ROOT / "tutorials").glob("[0-9]*_*.py"):
        assert (built_site / "tutorials" / f"{script.stem}.html").exists()
        assert (built_site / "tutorials" / f"{script.stem}.ipynb").exists()


@pytest.mark.full
@pytest.mark.xdist_group("site")
@pytest.mark.timeout(1800)
def test_every_link_within_the_site_leads_somewhere(built_site):
    anchors: dict[Path, set[str]] = {}
    for page in built_site.rglob("*.html"):
        text = re.sub(r'srcdoc="[^"]*"', "", page.read_text(encoding="utf-8"))
        anchors[page] = set(re.findall(r'\b(?:id|name)="([^"]+)"', text)) | {""}
    for page in anchors:
        text = re.sub(r'srcdoc="[^"]*"', "", page.read_text(encoding="utf-8"))
        for link in re.findall(r'\b(?:href|src)="([^"]+)"', text):
            address, anchor = urldefrag(link)
            if urlsplit(link).scheme or (page.name == "404.html" and address.startswith("/")):
                continue
            target = (page.parent / unquote(address)).resolve() if address else page
            target = target / "index.html" if target.is_dir() else target
            assert target.exists(), f"{page}: {link}"
            assert anchor in anchors.get(target, {anchor}), f"{page}: {link}"


def test_the_page_of_the_command_line_has_every_command_and_no_path_of_this_machine():
    page = cli_page()
    for command in ("demo", "serve", "bench engine", "lab start", "trace view"):
        assert f"## minipaged {command}\n\n```text\nUsage: minipaged {command}" in page
    assert str(Path.home()) not in page
    texts = re.findall(r"```text\n(.*?)```", page, flags=re.DOTALL)
    assert max(len(line) for text in texts for line in text.splitlines()) <= WIDTH
