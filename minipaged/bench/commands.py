"""`minipaged bench ...`: the commands. torch is imported only once one of them runs."""

import json
from dataclasses import asdict
from typing import Annotated

import typer
from rich.console import Console

app = typer.Typer(
    help="Measure, and print what the documentation quotes.",
    rich_markup_mode=None,
)


@app.callback(invoke_without_command=True)
def bench(context: typer.Context) -> None:
    """Measure, and print what the documentation quotes."""
    if context.invoked_subcommand is None:
        print(context.get_help())


@app.command()
def sharing(
    num_requests: Annotated[int, typer.Option(help="Requests of every setting.", min=1)] = 32,
    block_size: Annotated[int, typer.Option(help="Token slots in a block.")] = 16,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    seed: Annotated[int, typer.Option(help="Of lengths, stories and samples.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="For machines: one JSON object.")] = False,
) -> None:
    """Blocks saved by parallel sampling and beam search, beside the paper's Figure 15."""
    from minipaged.bench import sharing as figure_15
    from minipaged.bench.machine import describe_machine
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
    machine = describe_machine(str(llm.engine.runner.kv_cache.layers[0][0].device))
    mean_in, mean_out = (sum(each) / num_requests for each in zip(*lengths, strict=True))
    if as_json:
        means = {"num_requests": num_requests, "prompt_tokens": mean_in, "output_tokens": mean_out}
        print(json.dumps({"machine": machine, **means, "rows": [asdict(row) for row in rows]}))
        return
    console = Console()
    console.print(
        f"{num_requests} requests of {mean_in:.1f} prompt and {mean_out:.1f} output tokens on "
        f"average, blocks of {block_size} (the paper's had 16), no prefix cache: the part of the "
        "blocks that sharing saved",
        figure_15.as_table(rows),
        machine,
        sep="\n\n",
        highlight=False,
    )
