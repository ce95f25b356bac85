"""`minipaged bench step`: the parts of a decode step, or the budget of steps on a CPU."""

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from minipaged.cli.bench_options import DType, Save, choose, choose_context, report
from minipaged.cli.options import AsJson, Device, engine_flag
from minipaged.config import EngineArgs, WeightDType
from minipaged.errors import InvalidOption

if TYPE_CHECKING:
    import torch


def step(
    device: Device = EngineArgs.device,
    dtype: DType = "auto",
    num_seqs: Annotated[
        int | None,
        typer.Option(help="Sequences to decode. Default: 32 on a CPU, 64 on a GPU.", min=1),
    ] = None,
    context_len: Annotated[
        int | None,
        typer.Option(
            help="Context tokens per sequence. Default: 128 on a CPU, 1024 on a GPU.", min=1
        ),
    ] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="Use a tiny model, to try out the command.")
    ] = False,
    tensor_parallel_size: Annotated[
        int, engine_flag("tensor_parallel_size")
    ] = EngineArgs.tensor_parallel_size,
    model: Annotated[
        str | None, typer.Option(help="Model for several ranks. Default: random weights.")
    ] = None,
    budget: Annotated[
        bool,
        typer.Option(
            "--budget", help="Compare steps on a CPU with what they must read and compute."
        ),
    ] = False,
    weight_dtype: Annotated[
        Literal["auto", "float16"],
        typer.Option(help="How --budget keeps the weights; auto: in the data type."),
    ] = "auto",
    save: Save = None,
    as_json: AsJson = False,
) -> None:
    """Measure the parts of a decode step.

    Prints the time of each part and the bytes that the step reads or, with several ranks, sends.
    """
    from minipaged.evaluation.bench import decode_step

    where, chosen, on_gpu = choose(device, dtype)
    if budget:
        _refuse_what_a_budget_lacks(on_gpu, num_seqs, tensor_parallel_size, model)
        _report_budget(chosen, context_len, quick, weight_dtype, save, as_json)
        return
    if weight_dtype != "auto":
        raise InvalidOption("--weight-dtype is an option of --budget: add it.")
    if tensor_parallel_size != 1:
        _refuse_what_ranks_lack(tensor_parallel_size, on_gpu, model, quick)
        sizes = tensor_parallel_size, num_seqs or 32, context_len
        _report_ranks(chosen, sizes, model, quick, save, as_json)
        return
    if model is not None:
        raise InvalidOption(
            "--model needs several ranks, because one process decodes with random weights: leave "
            "out --model, or raise --tensor-parallel-size."
        )
    config = decode_step.ONE_BILLION if on_gpu else decode_step.SMALL
    config = decode_step.TINY if quick else config
    backends = ["triton", "torch"] if on_gpu else ["torch", "reference"]
    num_seqs = num_seqs or (64 if on_gpu else 32)
    longest = config.max_position_embeddings - 2 * decode_step.STEPS
    context_len = choose_context(context_len, longest, 1024 if on_gpu else 128)
    rows = list(decode_step.measure(config, backends, num_seqs, context_len, where, chosen))
    note = decode_step.describe(config, chosen)
    report(rows, decode_step.as_table(rows), note, where, save, as_json)


def _refuse_what_ranks_lack(size: int, on_gpu: bool, model: str | None, quick: bool) -> None:
    if on_gpu:
        raise InvalidOption(
            f"tensor_parallel_size is {size} and the device is a GPU, but ranks are timed on the "
            "host, which does not wait for the GPU: use --device cpu."
        )
    if model is not None and quick:
        raise InvalidOption("--model and --quick both choose the model: leave out one of them.")


def _report_ranks(
    dtype: "torch.dtype",
    sizes: tuple[int, int, int | None],
    model: str | None,
    quick: bool,
    save: Path | None,
    as_json: bool,
) -> None:
    from minipaged.evaluation.bench import rank_step

    size, num_seqs, context_len = sizes
    subject, name = rank_step.Subject.of(model, quick), str(dtype).removeprefix("torch.")
    context_len = choose_context(context_len, subject.longest, 128)
    rows = rank_step.measure(subject, size, num_seqs, context_len, name)
    note = rank_step.describe(subject, name, rows)
    report(rows, rank_step.as_table(rows), note, None, save, as_json)


def _refuse_what_a_budget_lacks(
    on_gpu: bool, num_seqs: int | None, size: int, model: str | None
) -> None:
    if on_gpu:
        raise InvalidOption(
            "--budget measures steps on a CPU, and the device is a GPU: use --device cpu."
        )
    given = {"--num-seqs": num_seqs, "--tensor-parallel-size": size != 1, "--model": model}
    for name, value in given.items():
        if value:
            raise InvalidOption(
                f"--budget has its own model, on one process, with 1, 8 and 32 sequences: leave "
                f"out {name}."
            )


def _report_budget(
    dtype: "torch.dtype",
    context_len: int | None,
    quick: bool,
    weight_dtype: WeightDType,
    save: Path | None,
    as_json: bool,
) -> None:
    from minipaged.evaluation.bench import budget, decode_step

    config = decode_step.TINY if quick else decode_step.SMALL
    longest = config.max_position_embeddings - 2 * decode_step.STEPS
    workloads = budget.QUICK_WORKLOADS if quick else budget.WORKLOADS
    if context_len is not None:
        decoded = choose_context(context_len, longest, context_len)
        workloads = [replace(w, context_len=decoded) if w.decodes else w for w in workloads]
    rows = list(budget.measure(config, workloads, dtype, weight_dtype))
    note = budget.describe(config, dtype, weight_dtype, rows)
    report(rows, budget.as_table(rows), note, budget.CPU, save, as_json)
