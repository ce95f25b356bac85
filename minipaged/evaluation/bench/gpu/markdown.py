"""The section of docs/kernels.md that states what a GPU has shown: made from the rows of a run.

Without rows, it says that nothing is measured yet.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from minipaged.evaluation.bench.gpu.report import Row, cell, failures, measured, seconds


class Aim(NamedTuple):
    """A bound that the kernels should meet."""

    what: str
    bound: str
    # The worst figure of the rows, and whether it meets the bound; None: not measured.
    find: Callable[[Sequence[Row]], tuple[str, bool] | None]


def _shipped(rows: Sequence[Row], stage: str) -> list[Row]:
    """The rows of our kernels as shipped, with 16-bit keys and sequences of equal length."""
    return [
        row
        for row in measured(rows, stage)
        if row["backend"] == "triton"
        and row["kv_dtype"] == "auto"
        and " and " not in row["lengths"]
    ]


def _share_of_bandwidth(
    rows: Sequence[Row], chosen: Callable[[Row], bool], least: float
) -> tuple[str, bool] | None:
    shares = [row["percent_of_floor"] for row in _shipped(rows, "decode") if chosen(row)]
    return (f"{min(shares):.0f} %", min(shares) >= least) if shares else None


def _times(ratios: list[float], most: float) -> tuple[str, bool] | None:
    return (f"{max(ratios):.2f} x", max(ratios) <= most) if ratios else None


def _large_decodes(rows: Sequence[Row]) -> tuple[str, bool] | None:
    return _share_of_bandwidth(rows, lambda row: row["num_bytes"] >= 1e9, 90)


def _one_sequence(rows: Sequence[Row]) -> tuple[str, bool] | None:
    return _share_of_bandwidth(rows, lambda row: row["num_seqs"] == 1, 75)


def _against_contiguous(rows: Sequence[Row]) -> tuple[str, bool] | None:
    return _times([row["times_baseline"] for row in _shipped(rows, "decode")], 1.05)


def _against_flash(rows: Sequence[Row]) -> tuple[str, bool] | None:
    flash = {
        (row["heads"], row["num_seqs"], row["lengths"]): row["seconds"]
        for row in measured(rows, "prefill")
        if row["backend"] == "SDPA, FlashAttention"
    }
    ratios = [
        row["seconds"] / flash[key]
        for row in _shipped(rows, "prefill")
        if row["lengths"] == "4,096"
        and (key := (row["heads"], row["num_seqs"], row["lengths"])) in flash
    ]
    return _times(ratios, 1.25)


def _step(rows: Sequence[Row]) -> tuple[str, bool] | None:
    steps = [row for row in measured(rows, "step") if row["graphs"] and row["num_seqs"] == 64]
    return _times([row["times_floor"] for row in steps], 1.3)


AIMS = (
    Aim(
        "decode, 1 GB of keys and values or more, 16 bits",
        "at least 90 % of the bandwidth of a large copy",
        _large_decodes,
    ),
    Aim("decode, one sequence of 32k tokens", "at least 75 %", _one_sequence),
    Aim(
        "decode, compared with SDPA over contiguous keys (the paper lost 20 to 26 %)",
        "at most 1.05 x its time",
        _against_contiguous,
    ),
    Aim(
        "prefill of 4k tokens, compared with SDPA's FlashAttention over contiguous keys",
        "at most 1.25 x its time",
        _against_flash,
    ),
    Aim(
        "a decode step of a model of a billion parameters, batch 64, with graphs",
        "at most 1.3 x the time for the bytes of weights, keys and values",
        _step,
    ),
)


def section(rows: Sequence[Row]) -> str:
    """The text of the section. Without rows: the aims alone."""
    opening = "**No GPU has run these kernels yet.**"
    if rows:
        facts = {row["what"]: row["value"] for row in measured(rows, "machine")}
        versions = ", ".join(f"{name} {facts.get(name, '?')}" for name in VERSIONS)
        opening = f"{facts.get('device', '?')}; {versions}; {rows[0]['run'][:10]}."
    paragraphs = [f"{opening} The aims are ratios within one run:", _aims(rows)]
    paragraphs += _results(rows) if rows else []
    return "\n\n".join(paragraphs)


VERSIONS = ("minipaged", "torch", "triton", "Python")


def _aims(rows: Sequence[Row]) -> str:
    lines: list[list[str]] = []
    for aim in AIMS:
        found = aim.find(rows)
        state = "not measured" if found is None else f"{found[0]}{'' if found[1] else ', missed'}"
        lines.append([aim.what, aim.bound, state])
    return table(["", "aim", "measured"], lines)


def _results(rows: Sequence[Row]) -> list[str]:
    """A sentence or a table for each stage that has rows."""
    found: list[str] = []
    if correct := measured(rows, "correctness"):
        cases = len(correct)
        worst = max(max(row["error"], row["needle_error"] or 0) for row in correct)
        found.append(
            f"{cases} results agree with float64; the largest relative error is {worst:.1e}."
        )
    for stage in ("decode", "prefill"):
        if attention := measured(rows, stage):
            found += [f"**{stage.capitalize()}:**", _attention(attention)]
    for stage, columns in COLUMNS.items():
        if of_stage := measured(rows, stage):
            cells = [[cell(name, row[name]) for name in columns] for row in of_stage]
            found += [f"**{stage.capitalize()}:**", table(list(columns.values()), cells)]
    if failed := failures(rows):
        found += ["**Failures:**", "\n".join(f"- {line}" for line in failed)]
    return found


COLUMNS = {  # of each stage: fields, and their titles
    "step": {
        "num_seqs": "sequences",
        "context_len": "context",
        "graphs": "graphs",
        "floor_seconds": "floor",
        "model_times_floor": "model / floor",
        "times_floor": "step / floor",
        "seconds": "step",
    },
    "sampler": {
        "options": "options",
        "num_rows": "rows",
        "vocab_size": "vocabulary",
        "seconds": "time",
        "peak_bytes": "temporary bytes",
    },
    "swap": {
        "direction": "direction",
        "by": "by",
        "kv_dtype": "pool",
        "gigabytes_per_second": "GB/s",
    },
}


def _attention(rows: Sequence[Row]) -> str:
    """A line for each case: our kernel, the best of SDPA, and the best tile."""
    lines: list[list[str]] = []
    key = ("heads", "num_seqs", "lengths", "kv_dtype")
    cases = dict.fromkeys(tuple(row[name] for name in key) for row in rows)
    for case in cases:
        of_case = {r["backend"]: r for r in rows if tuple(r[name] for name in key) == case}
        if (ours := of_case.get("triton")) is None:
            continue
        sdpa = [row for name, row in of_case.items() if name.startswith("SDPA")]
        best = min(sdpa, key=lambda row: row["seconds"])
        tiles = [row for name, row in of_case.items() if name.startswith("triton ")]
        tile = min(tiles, key=lambda row: row["seconds"], default=ours)
        heads, num_seqs, lengths, kv_dtype = case
        rate = ours["percent_of_floor"] or ours["teraflops"]
        unit = "%" if ours["percent_of_floor"] else "TFLOP/s"
        lines.append(
            [
                str(heads),
                f"{num_seqs} x {lengths}",
                str(kv_dtype),
                seconds(ours["seconds"]),
                f"{rate:.0f} {unit}",
                f"{ours['times_baseline']:.2f} x {best['backend']}",
                f"{tile['seconds'] / ours['seconds']:.2f} x ({tile['backend']})",
            ]
        )
    titles = ["heads", "tokens", "pool", "time", "rate", "over the best SDPA", "the best tile"]
    return table(titles, lines)


def table(titles: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """A table in Markdown."""
    header = [f"| {' | '.join(titles)} |", "|" + "---|" * len(titles)]
    body = [f"| {' | '.join(line)} |" for line in lines]
    return "\n".join([*header, *body]).replace("|  |", "| |")
