"""`minipaged bench step`: the parts of a decode step, on one process or several ranks."""

from typing import Annotated

import typer

from minipaged.cli.bench_options import DType, Save, choose, choose_context, report
from minipaged.cli.options import AsJson, Device, engine_flag
from minipaged.config import EngineArgs
from minipaged.errors import InvalidOption


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
    save: Save = None,
    as_json: AsJson = False,
) -> None:
    """Measure the parts of a decode step.

    Prints the time of each part and the bytes that the step reads or, with several ranks, sends.
    """
    from minipaged.evaluation.bench import decode_step, rank_step

    where, chosen, on_gpu = choose(device, dtype)
    if tensor_parallel_size != 1:
        _refuse_what_ranks_lack(tensor_parallel_size, on_gpu, model, quick)
        subject = rank_step.Subject.of(model, quick)
        num_seqs = num_seqs or 32
        context_len = choose_context(context_len, subject.longest, 128)
        name = str(chosen).removeprefix("torch.")
        ranks = rank_step.measure(subject, tensor_parallel_size, num_seqs, context_len, name)
        note = rank_step.describe(subject, name, ranks)
        report(ranks, rank_step.as_table(ranks), note, where, save, as_json)
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
