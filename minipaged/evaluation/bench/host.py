"""`minipaged bench host`: the host time of a decode step, without a model.

A stub replaces the model, which leaves scheduling, message, tensors, sampling and text. To compare
with another version, give a checkout of it: both are timed in turn, each run in a separate process,
and only the ratio within one call is meaningful. The timed program uses names that both versions
have (`LLM`, `engine.add_request`, `engine.step`, `runner.model`).
"""

import json
import os
import statistics
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from rich.table import Table

from minipaged.errors import InvalidOption

HERE = Path(__file__).parents[3]
NUM_SEQS = 64
NUM_TOKENS = 1024  # of each prompt
STEPS = 64

_PROGRAM = """
import json, shutil, statistics, sys, tempfile, time
from pathlib import Path
import torch
import minipaged
from minipaged import LLM, SamplingParams

num_seqs, num_tokens, steps = map(int, sys.argv[1:])
torch.set_num_threads(1)
with tempfile.TemporaryDirectory() as temporary:
    folder = Path(temporary) / "model"
    shutil.copytree(Path(minipaged.__file__).parent / "assets" / "storyteller", folder)
    config = json.loads((folder / "config.json").read_text())
    config["max_position_embeddings"] = 2 * num_tokens
    (folder / "config.json").write_text(json.dumps(config))
    llm = LLM(folder, attention_backend="reference", enable_prefix_caching=False, device="cpu",
              max_num_seqs=num_seqs, num_blocks=num_seqs * (num_tokens // 16 + 8),
              max_num_batched_tokens=num_seqs * num_tokens)
engine, vocab_size = llm.engine, llm.engine.executor.runner.model.config.vocab_size
answer = torch.zeros(num_seqs, vocab_size)
answer[:, 65] = 1


class Stub:
    config, dtype = engine.executor.runner.model.config, torch.float32

    def __call__(self, token_ids, *_):
        return torch.zeros(len(token_ids), 1)

    def logits(self, hidden):
        return answer[: len(hidden)]


engine.executor.runner.model = Stub()
params = SamplingParams(temperature=0, max_tokens=steps + 8, ignore_eos=True)
for i in range(num_seqs):
    prompt = [(7 * i + j) % (vocab_size - 10) + 5 for j in range(num_tokens)]
    engine.add_request(str(i), {"prompt_token_ids": prompt}, params)
for _ in range(3):  # the prompts, and what is done a first time
    engine.step()
seconds = []
for _ in range(steps):
    begin = time.process_time()
    advanced = engine.step()
    seconds.append(time.process_time() - begin)
    assert len(advanced) == num_seqs, "a sequence did not advance"
print(json.dumps([minipaged.__file__, statistics.median(seconds)]))
"""


@dataclass(frozen=True)
class Row:
    """The time of one version of the library."""

    version: str
    seconds: float  # of processor time per step: the median over rounds
    ratio: float  # ratio to the other version


def measure(against: Path | None, rounds: int) -> list[Row]:
    """Measure this version and another, interleaved. Raises InvalidOption for no checkout."""
    if against is not None and not (against / "minipaged" / "__init__.py").is_file():
        raise InvalidOption(
            f"{str(against)!r} is not a checkout of this library: make one with git worktree, and "
            "name its folder."
        )
    versions = {"this version": HERE}
    if against is not None:
        versions[str(against)] = against
    seconds: dict[str, list[float]] = {version: [] for version in versions}
    for _ in range(rounds):
        for version, checkout in versions.items():
            seconds[version].append(_run(checkout))
    medians = {version: statistics.median(each) for version, each in seconds.items()}
    base = list(medians.values())[-1]
    return [Row(version, median, median / base) for version, median in medians.items()]


def _run(checkout: Path) -> float:
    sizes = [str(size) for size in (NUM_SEQS, NUM_TOKENS, STEPS)]
    finished = subprocess.run(
        [sys.executable, "-c", _PROGRAM, *sizes],
        cwd=checkout,  # which is first on the path of a program given by -c
        env={**os.environ, "PYTHONPATH": str(checkout)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert finished.returncode == 0, f"{checkout} cannot be timed:\n{finished.stderr}"
    imported, seconds = json.loads(finished.stdout.splitlines()[-1])
    assert Path(imported).is_relative_to(checkout.resolve()), f"timed {imported}, not {checkout}"
    return seconds


def as_table(rows: list[Row]) -> Table:
    """The rows as a table."""
    table = Table(box=None, padding=(0, 2))
    table.add_column("")
    for title in ("per step", "ratio"):
        table.add_column(title, justify="right")
    for row in rows:
        table.add_row(row.version, f"{1e6 * row.seconds:.0f} us", f"{row.ratio:.2f}")
    return table
