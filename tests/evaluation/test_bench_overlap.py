"""`minipaged bench overlap`, with few sequences and a fast device."""

import json

import pytest
from commands import minipaged

from minipaged.evaluation.bench import overlap
from minipaged.evaluation.bench.overlap import STEPS, WARM_UP, run


def order(overlaps: bool) -> list[tuple[str, int]]:
    bars = run(num_seqs=3, context_len=20, seconds=0.001, overlaps=overlaps)
    for number in range(1, STEPS):
        before, after = (
            next(bar for bar in bars if (bar.what, bar.step) == ("device", each))
            for each in (number, number + 1)
        )
        assert before.end <= after.begin, "the device computes two steps at once"
    return [(bar.what, bar.step) for bar in bars if bar.what != "device"]


def test_with_overlap_each_step_is_launched_before_the_last_one_is_committed():
    host = order(overlaps=True)
    for number in range(1, STEPS):
        assert host.index(("launch", number + 1)) < host.index(("commit", number))


def test_without_overlap_each_step_is_launched_after_the_last_one_was_committed():
    host = order(overlaps=False)
    assert host == [(what, n) for n in range(1, STEPS + 1) for what in ("launch", "commit")]


def test_the_command_prints_one_row_per_device_and_draws_the_time_lines(
    capsys, monkeypatch, tmp_path
):
    monkeypatch.setattr(overlap, "DEVICE_SECONDS", (0.001, 0.002))
    picture = tmp_path / "overlap.png"
    arguments = "--num-seqs", "2", "--context-len", "20", "--rounds", "1"
    code, out, _ = minipaged(
        capsys, monkeypatch, "bench", "overlap", *arguments, "--plot", str(picture), "--json"
    )
    assert code == 0
    rows = json.loads(out)["rows"]
    assert [row["device_seconds"] for row in rows] == [0.001, 0.002]
    assert all(row["overlapped_seconds"] >= row["device_seconds"] for row in rows)
    assert picture.stat().st_size > 0
    assert WARM_UP < STEPS


@pytest.mark.parametrize("name", ["overlap.txt", "overlap"])
def test_a_picture_without_a_known_suffix_is_refused(capsys, monkeypatch, name):
    code, _, err = minipaged(capsys, monkeypatch, "bench", "overlap", "--plot", name)
    assert code == 2
    assert "give a file that ends in .png, .svg, .pdf." in " ".join(err.split())
