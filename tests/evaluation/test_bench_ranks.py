"""`minipaged bench ranks`, with a tiny model."""

import json
import sys

import pytest
from commands import minipaged

from minipaged.evaluation.bench import ranks

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="memory is read from /proc")


def test_ranks_are_compared_with_one_process_and_their_memory_with_its_share(capsys, monkeypatch):
    _, out, _ = minipaged(
        capsys, monkeypatch, "bench", "ranks", "--quick", "--rounds", "1", "--json"
    )
    found = json.loads(out)
    assert [row["batch"] for row in found["rows"]] == [1, 3]
    for row in found["rows"]:
        assert row["ratio"] == pytest.approx(row["several"] / row["one"])
    assert [each["process"] for each in found["memory"]] == ["one", "rank 0", "rank 1"]
    assert all(each["peak"] > each["share"] > 0 for each in found["memory"])


def test_a_run_with_other_tokens_is_an_error():
    class Side:
        def __init__(self, tokens: list[list[int]]) -> None:
            self._answer = {"tokens": tokens, "seconds": 1.0, "num_tokens": 2}

        def ask(self, do: str, **_: object) -> dict:
            return self._answer

    same, other, twin = Side([[1, 2]]), Side([[1, 3]]), Side([[1, 2]])
    with pytest.raises(ranks.WrongTokens):
        ranks._compare(same, other, [([5], 2)], 1, lambda: None)
    assert ranks._compare(same, twin, [([5], 2)], 1, lambda: None).ratio == 1.0
