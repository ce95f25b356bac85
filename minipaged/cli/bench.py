"""`minipaged bench ...`: the benchmarks. torch is imported only when one of them runs."""

import os
from pathlib import Path
from typing import Annotated, Literal

import typer

from minipaged.cli.bench_engine import engine
from minipaged.cli.bench_gpu import gpu
from minipaged.cli.bench_options import DType, Save, choose, report, require_triton
from minipaged.cli.bench_overlap import overlap
from minipaged.cli.bench_prefix import prefix
from minipaged.cli.bench_ranks import ranks
from minipaged.cli.bench_serve import health, serve
from minipaged.cli.bench_step import step
from minipaged.cli.options import AsJson, BlockSize, Device, Seed
from minipaged.config import EngineArgs
from minipaged.errors import InvalidOption

app = typer.Typer(help="Run the benchmarks that the documentation quotes.", rich_markup_mode=None)
for each in (engine, serve, health, ranks, step, prefix, overlap, gpu):
    app.command()(each)


@app.callback(invoke_without_command=True)
def bench(context: typer.Context) -> None:
    """Run the benchmarks that the documentation quotes."""
    if context.invoked_subcommand is None:
        print(context.get_help())


@app.command()
def kernel(
    device: Device = EngineArgs.device,
    dtype: DType = "auto",
    save: Save = None,
    as_json: AsJson = False,
) -> None:
    """Measure attention, stores and copies."""
    from minipaged.evaluation.bench import kernel as kernels
    from minipaged.evaluation.bench.cases import BLOCK_SIZE
    from minipaged.evaluation.bench.writes import measure_writes

    where, chosen, on_gpu = choose(device, dtype)
    backends = ["triton", "triton-naive"] if on_gpu else ["torch", "blockwise"]
    cases = kernels.GPU_CASES if on_gpu else kernels.CPU_CASES
    heads = kernels.LLAMA_3_8B if on_gpu else kernels.SMALL
    skipped: list[kernels.Case] = []
    rows = list(kernels.measure(cases, backends, where, chosen, skipped))
    rows += measure_writes(heads, 32 if on_gpu else 4, backends[0], where, chosen)
    note = (
        f"{chosen}, blocks of {BLOCK_SIZE}. The candidates of a case run in turn, round after "
        'round; each figure is a median. "of bandwidth": bytes that must be moved, as a share of '
        "what a large copy moves in that time. Stores and copies are compared with PyTorch's "
        "indexing."
    )
    if not on_gpu:
        note += " There is no GPU, so the Triton kernels are left out."
    if skipped:
        names = [f"{each.name} of {each.num_seqs} x {each.lengths} tokens" for each in skipped]
        note += f" Skipped, because memory is too small: {', '.join(names)}."
    report(rows, kernels.as_table(rows), note, where, save, as_json)


@app.command()
def formats(
    num_questions: Annotated[int, typer.Option(help="Questions to ask the model.", min=1)] = 128,
    save: Save = None,
    as_json: AsJson = False,
) -> None:
    """Compare data types of the KV cache."""
    from minipaged.evaluation.bench import formats as kv_formats

    rows = list(kv_formats.measure(num_questions))
    note = (
        'LLM(kv_cache_dtype=...). "tokens": how many fit in the same memory, relative to float16; '
        '"right": correct answers about the first sentence of a story; "changed": answers whose '
        "tokens differ from those in float32."
    )
    report(rows, kv_formats.as_table(rows), note, None, save, as_json)


@app.command()
def load(
    model: Annotated[
        Path | None, typer.Option(help="Load this checkpoint instead of synthetic ones.")
    ] = None,
    save: Save = None,
    as_json: AsJson = False,
) -> None:
    """Measure the time and peak memory of loading a checkpoint."""
    from minipaged.evaluation.bench import load as loading

    rows = list(loading.measure(model))
    note = (
        "Each load runs in its own process, which then reads every weight once. Peak: the highest "
        "resident memory, minus what it was before."
    )
    report(rows, loading.as_table(rows), note, None, save, as_json)


@app.command()
def host(
    against: Annotated[
        Path | None, typer.Option(help="Compare with another checkout, in this folder.")
    ] = None,
    rounds: Annotated[int, typer.Option(help="Runs per candidate, in turn.", min=1)] = 5,
    save: Save = None,
    as_json: AsJson = False,
) -> None:
    """Measure the host's part of a decode step, without a model."""
    from minipaged.evaluation.bench import host as hosts

    rows = hosts.measure(against, rounds)
    note = (
        f"CPU time of a decode step of {hosts.NUM_SEQS} sequences of {hosts.NUM_TOKENS} tokens. "
        "Candidates run in turn, each run in its own process; median of the rounds."
    )
    report(rows, hosts.as_table(rows), note, None, save, as_json)


@app.command()
def bookkeeping(save: Save = None, as_json: AsJson = False) -> None:
    """Measure the allocator and the scheduler, without a model."""
    from minipaged.evaluation.bench import bookkeeping as books

    rows = list(books.measure())
    note = f"Plain Python; all sequences decode and have {books.NUM_TOKENS:,} tokens."
    report(rows, books.as_table(rows), note, None, save, as_json)


@app.command()
def linear(
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16.")] = "float32",
    weight_dtype: Annotated[
        Literal["float32", "float16"], typer.Option(help="Packed as they are, or in float16.")
    ] = "float32",
    save: Save = None,
    as_json: AsJson = False,
) -> None:
    """Compare packed weights with PyTorch's layout, on a CPU."""
    from minipaged.evaluation.bench import linear as matrices

    _, chosen, _ = choose("cpu", dtype)
    rows = list(matrices.measure(chosen, weight_dtype))
    note = matrices.describe(chosen, weight_dtype)
    report(rows, matrices.as_table(rows), note, None, save, as_json)


@app.command()
def decode(
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16.")] = "float32",
    save: Save = None,
    as_json: AsJson = False,
) -> None:
    """Compare decode attention on a CPU: gathered, in place, SDPA."""
    from minipaged.evaluation.bench import decode as decoding

    _, chosen, _ = choose("cpu", dtype)
    rows = list(decoding.measure(chosen))
    report(rows, decoding.as_table(rows), decoding.describe(chosen), None, save, as_json)


@app.command()
def tune(
    device: Device = EngineArgs.device,
    dtype: DType = "auto",
    save: Save = None,
    as_json: AsJson = False,
) -> None:
    """Sweep tiles, warps and stages of the kernels on a GPU."""
    where, chosen, on_gpu = choose(device, dtype)
    if not on_gpu:
        raise InvalidOption(
            "bench tune needs a GPU, and none was found: run it on a machine with one."
        )
    require_triton()
    from minipaged.evaluation.bench import tune as tuning

    rows = list(tuning.sweep(tuning.CASES, where, chosen))
    note = f"{chosen}. The fastest choices for each case, next to the default."
    report(rows, tuning.as_table(rows), note, where, save, as_json)


@app.command(name="compile")
def compile_kernels(
    more: Annotated[bool, typer.Option(help="Include padded heads and float32.")] = False,
    decode_tile: Annotated[
        tuple[int, int, int] | None, typer.Option(help="Try this many positions, warps and stages.")
    ] = None,
    prefill_tiles: Annotated[
        tuple[int, int, int, int] | None,
        typer.Option(help="Try this many rows, positions, warps and stages."),
    ] = None,
    save: Save = None,
    as_json: AsJson = False,
) -> None:
    """Compile every kernel; needs no GPU."""
    require_triton()
    os.environ["TRITON_INTERPRET"] = "0"  # before a kernel is defined
    from minipaged.attention.triton.shapes import TileShape, TileShapes
    from minipaged.evaluation.bench import compile as compiling
    from minipaged.evaluation.bench.launches import MORE_SETTINGS, SETTINGS

    settings = SETTINGS + (MORE_SETTINGS if more else ())
    tile = TileShape(*decode_tile) if decode_tile else None
    tiles = TileShapes(*prefill_tiles) if prefill_tiles else None
    rows = list(compiling.compile_all(settings, tile=tile, tiles=tiles))
    note = "A thread has at most 255 registers. Spilled values are stored on its stack."
    report(rows, compiling.as_table(rows), note, None, save, as_json)


@app.command()
def sharing(
    num_requests: Annotated[int, typer.Option(help="Requests per setting.", min=1)] = 32,
    block_size: BlockSize = EngineArgs.block_size,
    device: Device = EngineArgs.device,
    seed: Seed = EngineArgs.seed,
    as_json: AsJson = False,
) -> None:
    """Measure the blocks that sharing saves, as in Figure 15."""
    from minipaged.evaluation.bench import sharing as figure_15
    from minipaged.llm import LLM

    llm = LLM(
        "storyteller",
        device=device,
        block_size=block_size,
        max_num_seqs=256,
        enable_prefix_caching=False,  # only what a request's own sequences share is counted
        seed=seed,
    )
    lengths = figure_15.alpaca_lengths(num_requests, llm.engine.config.max_model_len, seed)
    rows = list(figure_15.measure(llm, lengths, seed, use_tqdm=not as_json))
    mean_in, mean_out = (sum(each) / num_requests for each in zip(*lengths, strict=True))
    note = (
        f"{num_requests} requests of {mean_in:.1f} prompt and {mean_out:.1f} output tokens on "
        f"average, blocks of {block_size} (16 in the paper), no prefix cache. Figures: the share "
        "of blocks that sharing saved."
    )
    device_used = llm.engine.executor.runner.kv_cache.device
    report(rows, figure_15.as_table(rows), note, device_used, None, as_json)
