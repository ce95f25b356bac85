"""A decode step on several ranks: each rank's time in the message, computing and collectives.

Every rank sums its own times during normal steps, and reports them after a round, so measuring adds
nothing to a step. The median round is shown, not the median of each figure, so the figures of a row
belong to the same steps and add up.
"""

import json
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from rich.table import Table

from minipaged.config import DType
from minipaged.evaluation.bench.engine_workload import DIVISIBLE, QUICK
from minipaged.llm import LLM
from minipaged.models.hub.local_models import find_model
from minipaged.models.loader import read_model_config
from minipaged.sampling import SamplingParams
from minipaged.worker.executor import MultiExecutor
from minipaged.worker.ranks import HEAD

ROUNDS, STEPS = 5, 8  # steps in each round
LONGER = ROUNDS * STEPS + 8  # tokens of each sequence after its context, with a margin


@dataclass(frozen=True)
class Row:
    """One rank, in seconds per step on average."""

    rank: int
    num_seqs: int
    context_len: int
    message_seconds: float  # sending the message, or waiting for it
    compute_seconds: float  # the model's part of the step, without the collectives
    all_reduce_seconds: float
    gather_seconds: float
    sum_seconds: float  # the sum of these four
    step_seconds: float  # of the whole step, on rank 0
    num_all_reduces: int  # per step
    num_gathers: int
    message_bytes: float  # on average
    largest_message_bytes: int


@dataclass(frozen=True)
class Subject:
    """A model to measure."""

    name: str
    folder: Path | None  # None: random weights
    hf: dict[str, Any]  # the content of config.json, if the weights are random
    longest: int  # context tokens that leave room for the steps
    vocab_size: int

    @classmethod
    def of(cls, model: str | None, quick: bool) -> "Subject":
        """Use a checkpoint, or a LLaMA with random weights. Raises CheckpointError."""
        if model is None:
            hf = (QUICK if quick else DIVISIBLE).hf
            longest = hf["max_position_embeddings"] - LONGER
            return cls("LLaMA with random weights", None, hf, longest, hf["vocab_size"])
        folder = find_model(model)
        config = read_model_config(folder)
        longest = config.max_position_embeddings - LONGER
        return cls(model, folder, {}, longest, config.vocab_size)

    def load(self, num_ranks: int, num_seqs: int, context_len: int, dtype: str) -> LLM:
        """Start the model on several ranks of this machine. Raises what `LLM` raises."""
        longest = context_len + LONGER
        with tempfile.TemporaryDirectory() as temporary:
            folder = self.folder or Path(temporary)
            if self.folder is None:
                (folder / "config.json").write_text(json.dumps(self.hf), encoding="utf-8")
            return LLM(
                folder,
                load_format="dummy" if self.folder is None else "auto",
                skip_tokenizer_init=True,
                device="cpu",
                dtype=cast(DType, dtype),
                tensor_parallel_size=num_ranks,
                num_blocks=num_seqs * (longest // 16 + 1),
                num_swap_blocks=0,
                max_model_len=longest,
                max_num_seqs=num_seqs,
                max_num_batched_tokens=num_seqs * context_len,  # one step for all prompts
                enable_prefix_caching=False,
                watermark=0.0,
            )


def measure(
    subject: Subject, num_ranks: int, num_seqs: int, context_len: int, dtype: str
) -> list[Row]:
    """Measure one row per rank. Raises what `LLM` raises."""
    llm = subject.load(num_ranks, num_seqs, context_len, dtype)
    try:
        params = SamplingParams(temperature=0.0, max_tokens=LONGER - 4, ignore_eos=True)
        for i in range(num_seqs):
            prompt = [(i * 7919 + 31 * n) % subject.vocab_size for n in range(context_len)]
            llm.engine.add_request(str(i), {"prompt_token_ids": prompt}, params)
        for _ in range(3):  # the prompts, and two steps to warm up
            llm.engine.step()
        rounds = [_measure_round(llm, context_len) for _ in range(ROUNDS)]
    finally:
        llm.engine.executor.close()
    return sorted(rounds, key=lambda rows: rows[0].step_seconds)[ROUNDS // 2]


def _measure_round(llm: LLM, context_len: int) -> list[Row]:
    executor = llm.engine.executor
    assert isinstance(executor, MultiExecutor)
    ranks, sizes, num_seqs = executor.ranks, list[int](), 0
    executor.report()  # discard earlier times
    send, counts = ranks.send, dict(ranks.counts)

    def noted_send(numbers: list[int]) -> None:
        sizes.append(4 * len(numbers))
        send(numbers)

    ranks.send = noted_send  # an attribute of this object alone
    begin = time.perf_counter()
    for _ in range(STEPS):
        num_seqs = len(llm.engine.step())
    seconds = (time.perf_counter() - begin) / STEPS
    ranks.send = send
    num_all_reduces, num_gathers = (
        (ranks.counts[name] - counts[name]) // STEPS for name in ("all-reduce", "gather")
    )
    own = dict(ranks.seconds)  # without the message that requests the report
    rows: list[Row] = []
    for rank, spent in enumerate([own, *executor.report()[1:]]):
        message, all_reduce, gather, model = (
            spent[name] / STEPS for name in ("message", "all-reduce", "gather", "step")
        )
        rows.append(
            Row(
                rank,
                num_seqs,
                context_len,
                message,
                model - all_reduce - gather,
                all_reduce,
                gather,
                message + model,
                seconds,
                num_all_reduces,
                num_gathers,
                sum(sizes) / STEPS,
                max(sizes),
            )
        )
    return rows


def describe(subject: Subject, dtype: str, rows: list[Row]) -> str:
    """The caption of the table, and the sizes of messages."""
    row = rows[0]
    return (
        f"{subject.name}, {dtype}, {len(rows)} ranks; {row.num_seqs} sequences of "
        f"{row.context_len:,} tokens decode. Milliseconds per step, the average of {STEPS} steps: "
        f"the median of {ROUNDS} such rounds. message: rank 0 sends it, the others "
        "wait for it, also while rank 0 schedules and samples. compute: the model, without the "
        "collectives. all-reduce, gather: includes the wait for the slowest rank. step: the whole "
        "step, on the clock.\n"
        f"A step is 1 message of {row.message_bytes:,.0f} bytes (largest: "
        f"{row.largest_message_bytes:,}; its first part is always filled up to {4 * HEAD:,}), "
        f"{row.num_all_reduces} all-reduces and {row.num_gathers} gather."
    )


def as_table(rows: list[Row]) -> Table:
    """The rows as a table."""
    table = Table(box=None, padding=(0, 2))
    for title in ("rank", "message", "compute", "all-reduce", "gather", "sum", "step"):
        table.add_column(title, justify="right")
    for row in rows:
        times = (
            row.message_seconds,
            row.compute_seconds,
            row.all_reduce_seconds,
            row.gather_seconds,
            row.sum_seconds,
            row.step_seconds,
        )
        table.add_row(str(row.rank), *(f"{1e3 * seconds:.2f} ms" for seconds in times))
    return table
