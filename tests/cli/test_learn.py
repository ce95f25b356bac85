"""`minipaged learn` as a reader meets it."""

import subprocess
import sys
from pathlib import Path

import pytest
from commands import minipaged
from stub_chapters import make_chapters


@pytest.fixture
def learn(capsys, monkeypatch, tmp_path):
    """Run the command on two chapters that run in milliseconds."""
    tutorials = make_chapters(tmp_path / "tutorials")
    monkeypatch.setenv("RUNS", str(tmp_path / "runs"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("minipaged.labs.chapters.library.folder", lambda: tutorials)
    monkeypatch.setattr("minipaged.cli.learn.find_spec", lambda name: name)
    opened = []
    monkeypatch.setattr("webbrowser.open", lambda address: opened.append(address) or True)

    def run(*arguments: str):
        code, out, err = minipaged(capsys, monkeypatch, "learn", *arguments)
        return code, out, err, opened

    return run


def test_the_list_of_chapters_needs_no_torch():
    program = (
        "import sys; from minipaged.cli.main import app; app(['learn'], standalone_mode=False);"
        "sys.exit('torch' in sys.modules)"
    )
    run = subprocess.run([sys.executable, "-c", program], check=False, capture_output=True)
    assert run.returncode == 0
    assert b"Paged attention" in run.stdout


def test_the_list_shows_number_title_subject_time_and_lab(learn):
    code, out, _, opened = learn()
    assert code == 0
    lines = [line.strip() for line in out.splitlines()]
    assert lines[:3] == ["3  Adding & counting", "It adds numbers.", "time: 5 minutes; lab: 1"]
    assert lines[3:6] == ["4  The second", "It fails.", "time: 3 minutes"]
    assert "minipaged learn 3" in out
    assert not opened


def test_a_chapter_opens_in_the_browser_once(learn):
    code, out, _, opened = learn("3")
    assert code == 0
    assert len(opened) == 1
    page = Path(out.split()[-1])
    assert opened == [page.as_uri()]
    assert ">42<" in page.read_text()


def test_without_a_browser_the_path_is_printed(learn, monkeypatch):
    monkeypatch.setattr("webbrowser.open", lambda address: False)
    code, out, _, _ = learn("3")
    assert code == 0
    assert out.startswith("No browser can be opened here. The page is /")


def test_no_browser_prints_the_path_and_nothing_else(learn):
    code, out, err, opened = learn("3", "--no-browser")
    assert (code, opened) == (0, [])
    assert Path(out.strip()).name == "03_first.html"
    assert "The code of chapter 3 is running." in err
    assert "running" not in learn("3", "--no-browser")[2]


def test_a_chapter_that_fails_is_shown_and_the_error_is_printed(learn):
    code, _, err, opened = learn("4")
    assert code == 0
    assert len(opened) == 1
    assert "Chapter 4 stopped" in err
    assert "ZeroDivisionError" in err


def test_without_matplotlib_the_page_has_text_and_the_extra_is_named(learn, monkeypatch, tmp_path):
    monkeypatch.setattr("minipaged.cli.learn.find_spec", lambda name: None)
    code, _, err, opened = learn("3")
    assert code == 0
    assert len(opened) == 1
    assert "pip install 'minipaged[plot]'" in err
    assert not (tmp_path / "runs").exists()


def test_notebooks_are_written_and_counted(learn, tmp_path):
    code, out, _, _ = learn("--notebooks", str(tmp_path / "out"))
    assert code == 0
    assert "2 notebooks" in out
    code, _, err, _ = learn("4", "--notebooks", str(tmp_path / "out"))
    assert code == 2
    assert "--force" in err
    code, out, _, _ = learn("4", "--notebooks", str(tmp_path / "out"), "--force")
    assert code == 0
    assert "1 notebook," in out


def test_slides_are_written_and_counted(learn, tmp_path):
    out = tmp_path / "out"
    code, printed, _, opened = learn("--slides", str(out))
    assert (code, opened) == (0, [])
    assert "slides.html: 2 slides. Open it in a browser." in printed
    code, _, err, _ = learn("3", "--slides", str(out))
    assert code == 2
    assert "slides.html and 1 more exists already" in err
    code, printed, _, _ = learn("3", "--slides", str(out), "--force")
    assert code == 0
    assert "1 slide." in printed
    assert (out / "slides.html").read_text().count("<section ") == 1


def test_notebooks_and_slides_can_be_written_at_once(learn, tmp_path):
    out = str(tmp_path / "out")
    code, printed, _, _ = learn("--notebooks", out, "--slides", out)
    assert code == 0
    assert "2 notebooks" in printed
    assert "2 slides" in printed
    new = tmp_path / "new"
    code, _, err, _ = learn("--notebooks", str(new), "--slides", out)
    assert code == 2
    assert "slides.html and 1 more exists already" in err
    assert not new.exists()  # all of them, or none


@pytest.mark.parametrize("flag", ["--notebooks", "--slides"])
def test_a_folder_that_cannot_be_made_is_named(learn, tmp_path, flag):
    (tmp_path / "file").touch()
    code, _, err, _ = learn(flag, str(tmp_path / "file" / "out"))
    assert code == 2
    assert "cannot be created (Not a directory): give another folder." in " ".join(err.split())


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["99"], "there is no chapter 99: choose one from 3 to 4."),
        (["--force"], "give --notebooks or --slides as well"),
        (["--no-browser"], "give a chapter's number"),
        (["3", "--notebooks", "out", "--no-browser"], "--no-browser would be ignored"),
        (["--slides", "out", "--no-browser"], "--slides writes files and opens no page"),
    ],
)
def test_a_chapter_that_cannot_be_opened_or_written_is_refused(learn, arguments, said):
    code, _, err, _ = learn(*arguments)
    assert code == 2
    assert said in err
