"""Chapters as pages and notebooks: read from their scripts, run once, and shown without network."""

import base64
import importlib.util
import json
import re
from pathlib import Path

import pytest
from stub_chapters import OPENING, make_chapters

from minipaged.errors import InvalidOption
from minipaged.labs.chapters import library as library_module
from minipaged.labs.chapters.library import Library
from minipaged.labs.chapters.notebooks import notebook, notebook_files
from minipaged.labs.chapters.pages import as_html, chapter_page
from minipaged.labs.chapters.reading import Cell, chapters_of, folder, read
from minipaged.labs.chapters.running import run, run_cell
from minipaged.labs.chapters.slides import slide_files, slides_page
from minipaged.utils.files import write_new_files

ROOT = Path(__file__).parents[2]


@pytest.fixture
def tutorials(tmp_path: Path, monkeypatch) -> Path:
    monkeypatch.setenv("RUNS", str(tmp_path / "runs"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return make_chapters(tmp_path / "tutorials")


def num_runs(tmp_path: Path) -> int:
    return len((tmp_path / "runs").read_text().splitlines())


# ---- reading -------------------------------------------------------------------------------------


def test_a_chapter_has_a_number_a_title_a_subject_and_facts(tutorials):
    first, second = chapters_of(tutorials)
    assert (first.number, first.title) == (3, "Adding & counting")
    assert first.summary == "It adds numbers."
    assert first.facts == {"Needs": "chapter 2", "Time": "5 minutes", "Lab": "1"}
    assert second.facts == {"Time": "3 minutes"}  # the first chapter needs no other


def test_every_chapter_of_the_library_can_be_read():
    chapters = chapters_of(folder())
    assert [chapter.number for chapter in chapters] == list(range(len(chapters)))
    assert len(chapters) == len(list((ROOT / "tutorials").glob("[0-9]*.py")))


def test_a_cell_has_the_number_of_its_first_line(tutorials):
    chapter = read(tutorials / "03_first.py")
    lines = chapter.script.read_text().splitlines()
    code = [cell for cell in chapter.cells if cell.is_code]
    assert [lines[cell.line - 1] for cell in code] == ["import inspect", "class Shown:"]
    assert [cell.source.splitlines()[0] for cell in code] == ["import inspect", "class Shown:"]


@pytest.mark.parametrize("text", ["", "# %%\n1\n", "# %% [markdown]\n# # A title alone\n"])
def test_a_script_that_is_no_chapter_is_refused_by_name(tmp_path, text):
    (tmp_path / "05_stub.py").write_text(text)
    with pytest.raises(InvalidOption, match=r"05_stub\.py"):
        read(tmp_path / "05_stub.py")


# ---- pages ---------------------------------------------------------------------------------------


def page_of(tutorials: Path) -> str:
    chapters = chapters_of(tutorials)
    return chapter_page(chapters[0], run(chapters[0]), chapters)


def test_a_page_shows_text_code_and_outputs_in_order(tutorials):
    page = page_of(tutorials)
    body = page[page.index("<main>") :]
    places = [
        body.index(text)
        for text in (
            "<h1", "It adds numbers", "block_table.py, lines", "<summary>Answer</summary>",
            "<em>Folded.</em>", "getsource", "&lt;b&gt; def double(x):", ">42<", "Shown", "<iframe>"
        )
    ]  # fmt: skip
    assert places == sorted(places)
    assert "no outputs yet" not in page


def test_a_page_loads_nothing(tutorials):
    page = page_of(tutorials)
    page = re.sub(r"<script>.*?</script>", "", page, flags=re.DOTALL)
    assert not re.findall(r'(?:src|href)="(?!data:|file:|#|[\w-]+\.html)[^"]*"', page)
    assert not re.findall(r"url\((?!data:)", page)
    assert "@import" not in page
    assert "<script src" not in page


def test_only_a_page_with_formulas_contains_what_draws_them(tutorials):
    first, second = chapters_of(tutorials)
    assert "katex.min" not in chapter_page(second, [], [second])
    assert len(chapter_page(second, [], [second])) < 20_000
    assert "@font-face" in chapter_page(first, [], [first])


def test_a_formula_is_neither_emphasised_nor_escaped():
    page = as_html(r"So $a_1 * b_1 * \{c\} < d$ and `$x$`, and $$\frac{a}{b}$$")
    assert r'<span class="formula">a_1 * b_1 * \{c\} &lt; d</span>' in page
    assert "<code>$x$</code>" in page
    assert r'<span class="formula display">\frac{a}{b}</span>' in page


def test_links_lead_to_other_pages_and_to_installed_files(tutorials):
    page = page_of(tutorials)
    assert '<a href="04_second.html">the next chapter</a>' in page
    assert '<a href="lab_01.html">lab 1</a>' in page
    assert f'<a href="{(ROOT / "minipaged" / "llm.py").as_uri()}">the code</a>' in page
    assert "a page (<code>gone.md</code>)" in page


def test_brackets_in_code_are_no_links():
    page = as_html("`rows[i](x.md)` and\n\n```text\nf[a](03_b.md)\n```\n\n[`c`](03_b.md)")
    assert "<code>rows[i](x.md)</code>" in page
    assert "f[a](03_b.md)" in page
    assert '<a href="03_b.html"><code>c</code></a>' in page


def test_a_diagram_becomes_a_list_of_arrows(tutorials):
    page = page_of(tutorials)
    assert "<li>text &amp; ids &rarr; <i>tokenizer</i> &rarr; ids &rarr; c</li>" in page
    assert "<li>c &harr; <i>HTTP</i> &harr; text &amp; ids</li>" in page


def test_all_chapters_and_briefs_become_pages_without_placeholders():
    chapters = chapters_of(folder())
    for chapter in chapters:
        page = chapter_page(chapter, [], chapters)
        page = re.sub(r"<(pre|script|style)\b.*?</\1>", "", page, flags=re.DOTALL)
        assert "@@ " not in page, chapter.name
        assert "{{" not in page, chapter.name
        assert f"minipaged learn {chapter.number}<" in page


# ---- running -------------------------------------------------------------------------------------


def test_a_chapter_that_fails_shows_what_came_before_and_why(tutorials):
    [output] = run(read(tutorials / "04_second.py"))
    assert output.error == "ZeroDivisionError: division by zero"


def test_a_chapter_that_stops_deliberately_has_no_error(tutorials):
    script = tutorials / "04_second.py"
    script.write_text(script.read_text().replace("1 / 0", "print('why'); raise SystemExit"))
    [output] = run(read(script))
    assert (output.text, output.error) == ("why\n", "")


def test_a_process_that_dies_is_reported(tutorials):
    script = tutorials / "04_second.py"
    script.write_text(script.read_text().replace("1 / 0", "import os; os._exit(7)"))
    [output] = run(read(script))
    assert "ended with code 7" in output.error


def test_a_cell_that_draws_shows_the_picture_and_not_its_last_value(tutorials):
    pytest.importorskip("matplotlib")
    chapter = read(tutorials / "03_first.py")
    code = "from matplotlib import pyplot as plt\nplt.switch_backend('Agg')\nplt.plot([1])"
    cell = Cell(True, "One point", code, 1)
    goes_on, output = run_cell(cell, str(chapter.script), {})
    assert goes_on
    assert [picture.count("<svg") for picture in output.pictures] == [1]
    assert output.value == ""
    page = chapter_page(chapter, [output], [chapter])
    assert '<img alt="Adding' not in page
    assert "data:image/svg+xml;base64," in page


# ---- pages in the cache --------------------------------------------------------------------------


def test_a_chapter_runs_once_until_it_changes(tutorials, tmp_path):
    for _ in range(2):
        library = Library(tutorials)
        assert library.run(library.chapter(3)) == ""
    assert num_runs(tmp_path) == 1
    script = tutorials / "03_first.py"
    script.write_text(script.read_text().replace("21", "22"))
    library = Library(tutorials)
    library.run(library.chapter(3))
    assert num_runs(tmp_path) == 2
    assert ">44<" in library.page(library.chapter(3)).read_text()


def test_every_page_that_is_linked_exists_before_it_has_run(tutorials):
    library = Library(tutorials)
    pages = sorted(path.name for path in library.pages.glob("*.html"))
    assert pages == ["03_first.html", "04_second.html", "lab_01.html"]
    assert "no outputs yet" in (library.pages / "03_first.html").read_text()


def test_a_page_has_its_text_at_once_and_reloads_until_it_has_outputs(tutorials):
    library, seen = Library(tutorials), []
    chapter = library.chapter(3)
    library.run(chapter, lambda page: seen.append(page.read_text()))
    reload = 'http-equiv="refresh"'
    assert [reload in page and "It adds numbers" in page for page in seen] == [True]
    assert reload not in library.page(chapter).read_text()


def test_an_interrupted_run_leaves_a_page_that_does_not_wait(tutorials, monkeypatch):
    def interrupted(chapter):
        raise KeyboardInterrupt

    library = Library(tutorials)
    chapter = library.chapter(3)
    monkeypatch.setattr(library_module, "run", interrupted)
    with pytest.raises(KeyboardInterrupt):
        library.run(chapter)
    assert "no outputs yet" in library.page(chapter).read_text()


def test_a_chapter_that_failed_runs_again(tutorials):
    library = Library(tutorials)
    chapter = library.chapter(4)
    for _ in range(2):
        assert library.run(chapter) == "ZeroDivisionError: division by zero"
    assert "stopped here: ZeroDivisionError" in library.page(chapter).read_text()


def test_pages_of_the_three_newest_versions_are_kept(tutorials, tmp_path):
    script = tutorials / "03_first.py"
    for number in range(5):
        script.write_text(script.read_text() + f"# {number}\n")
        newest = Library(tutorials).pages
    assert len(list(newest.parent.iterdir())) == 3
    assert newest.exists()


def test_a_version_in_use_again_counts_as_new(tutorials):
    script, texts = tutorials / "03_first.py", {}
    for name in "abcad":
        script.write_text(texts.setdefault(name, script.read_text() + f"# {name}\n"))
        texts[name, "pages"] = Library(tutorials).pages
    assert [name for name in "abcd" if texts[name, "pages"].exists()] == ["a", "c", "d"]


def test_a_cache_folder_that_cannot_be_written_is_named(tutorials, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(InvalidOption, match="set XDG_CACHE_HOME to a folder"):
        _ = Library(tutorials).pages


# ---- openings ------------------------------------------------------------------------------------


def test_a_page_has_the_opening_inline_in_the_colour_of_its_text(tutorials):
    page = page_of(tutorials)
    figure = re.search(r'<figure class="opening".*?</figure>', page, re.DOTALL)[0]
    assert '<text x="1" y="9">one_label_of_it</text>' in figure
    assert "<style>" not in figure
    assert "<rect" not in figure
    assert "<figcaption>What &quot;3&quot; &lt; 4 shows.</figcaption>" in figure
    assert page.index("It counts, too.") < page.index(figure) < page.index("The sum is")


def test_a_notebook_has_the_opening_in_itself(tutorials):
    [cell, *_] = json.loads(notebook(read(tutorials / "03_first.py")))["cells"]
    image = re.search(r'<img alt="(.*?)" .*base64,(.+?)">', "".join(cell["source"]))
    assert image[1] == "What &quot;3&quot; &lt; 4 shows."
    assert base64.b64decode(image[2]).decode() == OPENING
    assert "openings/" not in "".join(cell["source"])


def test_a_chapter_without_the_file_of_its_opening_names_it(tutorials):
    (tutorials / "openings" / "03.svg").unlink()
    with pytest.raises(InvalidOption, match=r"openings/03\.svg cannot be read \(No such file"):
        read(tutorials / "03_first.py")


def test_a_page_is_built_anew_when_its_opening_changes(tutorials):
    before = Library(tutorials).pages
    (tutorials / "openings" / "03.svg").write_text(OPENING.replace("label", "word"))
    library = Library(tutorials)
    assert library.pages != before
    assert "one_word_of_it" in library.page(library.chapter(3)).read_text()


# ---- slides --------------------------------------------------------------------------------------


def test_a_slide_has_number_title_picture_sentence_and_lab(tutorials):
    first, second = slides_page(chapters_of(tutorials)).split("<section ")[1:]
    assert "<h1><span>3</span>Adding &amp; counting</h1>" in first
    assert "one_label_of_it" in first
    assert "<p>It adds numbers.</p>" in first
    assert "Lab 1</span>" in first
    assert "minipaged learn 3" in first
    assert "The second" in second
    assert "Lab" not in second


def test_slides_load_nothing_and_print_one_to_a_page(tutorials):
    page = slides_page(chapters_of(tutorials))
    assert not re.search(r"""(src|href)=|url\(|@import|https?://(?!www\.w3\.org/2000/svg)""", page)
    assert "@page { size: 16in 9in; margin: 0; }" in page
    assert "break-after: page" in page
    assert "prefers-color-scheme: dark" in page


def test_the_slides_of_the_library_have_all_pictures_and_ids_once():
    chapters = chapters_of(folder())
    page = slides_page(chapters)
    assert page.count("<svg ") == page.count("<section ") == len(chapters)
    ids = re.findall(r' id="([^"]+)"', page)
    assert len(set(ids)) == len(ids)


def test_slides_come_with_each_picture_as_a_file(tutorials, tmp_path):
    out = tmp_path / "new" / "out"
    write_new_files(slide_files(chapters_of(tutorials), out), force=False)
    assert sorted(path.name for path in out.iterdir()) == ["03_first.svg", "slides.html"]
    assert (out / "03_first.svg").read_text() == OPENING


# ---- notebooks -----------------------------------------------------------------------------------


def test_notebooks_are_valid_and_import_drawing_from_their_folder(tutorials, tmp_path):
    nbformat = pytest.importorskip("nbformat")
    drawing, out = tutorials / "drawing.py", tmp_path / "out"
    write_new_files(notebook_files(chapters_of(tutorials), drawing, out), force=False)
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert names == ["03_first.ipynb", "04_second.ipynb", "drawing.py"]
    written = nbformat.read(tmp_path / "out" / "03_first.ipynb", as_version=4)
    nbformat.validate(written)
    text, code, _ = written.cells
    assert "def slot(self" in text.source
    assert "[the next chapter](04_second.ipynb)" in text.source
    assert code.source == read(tutorials / "03_first.py").cells[1].source


def test_existing_notebooks_are_overwritten_only_by_force(tutorials, tmp_path):
    out = tmp_path / "out"
    files = notebook_files(chapters_of(tutorials), tutorials / "drawing.py", out)
    out.mkdir()
    (out / "04_second.ipynb").write_text("mine")
    with pytest.raises(InvalidOption, match=r"04_second\.ipynb exists already"):
        write_new_files(files, force=False)
    assert [path.name for path in out.iterdir()] == ["04_second.ipynb"]
    write_new_files(files, force=True)
    assert json.loads((out / "04_second.ipynb").read_text())["nbformat"] == 4


# ---- the wheel -----------------------------------------------------------------------------------


def build_step(**options):
    """The step of the build that copies the chapters, for a package without modules."""
    setuptools = pytest.importorskip("setuptools")
    spec = importlib.util.spec_from_file_location("wheel", ROOT / "tutorials" / "in_the_wheel.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    step = module.BuildWithChapters(setuptools.Distribution({"packages": []}))
    step.ensure_finalized()
    vars(step).update(options)
    return step


def test_a_wheel_contains_chapters_openings_briefs_and_fonts(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    step = build_step(build_lib=str(tmp_path))
    step.run()
    assets = tmp_path / "minipaged" / "assets"
    names = {path.name for path in assets.rglob("*") if path.is_file()}
    patterns = ("tutorials/[0-9]*.py", "tutorials/labs/*.md", "tutorials/openings/*.svg")
    expected = [path for pattern in patterns for path in ROOT.glob(pattern)]
    assert {path.name for path in expected} | {"drawing.py", "katex.min.js"} <= names
    numbers = [chapter.number for chapter in chapters_of(assets / "tutorials") if chapter.opening]
    assert numbers == list(range(15))
    monkeypatch.setattr("minipaged.labs.chapters.pages._ASSETS", assets)
    from minipaged.labs.chapters.pages import _maths

    in_the_checkout = _maths()
    _maths.cache_clear()
    assert _maths() == in_the_checkout
    assert set(step.get_source_files()) >= {"tutorials/in_the_wheel.py", "tutorials/drawing.py"}


def test_an_editable_install_copies_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    step = build_step(build_lib=str(tmp_path), editable_mode=True)
    step.run()
    assert not list(tmp_path.iterdir())
    assert step.get_outputs() == []
