"""The command line. Each command has its own module.

A user error prints one sentence to standard error and exits with code 2. torch is imported only
when a command needs it, so `--help` is fast.
"""

import typer

from minipaged.cli.bench import app as bench
from minipaged.cli.capacity import capacity
from minipaged.cli.chat import chat
from minipaged.cli.demo import demo
from minipaged.cli.entry import run
from minipaged.cli.fetch import convert, fetch
from minipaged.cli.generate import generate
from minipaged.cli.lab import app as lab
from minipaged.cli.learn import learn
from minipaged.cli.options import Version
from minipaged.cli.paper import paper
from minipaged.cli.path import path
from minipaged.cli.serve import serve
from minipaged.cli.simulate import simulate
from minipaged.cli.soak import app as soak
from minipaged.cli.trace import app as trace

ABOUT = """PagedAttention, the system behind vLLM, from scratch.

New here? Start with `minipaged demo`.
"""

app = typer.Typer(
    help=ABOUT,
    rich_markup_mode=None,  # plain help, which scripts can read
    add_completion=False,
    pretty_exceptions_enable=False,
)


@app.callback(invoke_without_command=True)
def common(context: typer.Context, version: Version = False) -> None:
    """PagedAttention, the system behind vLLM, from scratch."""
    if context.invoked_subcommand is None:
        print(context.get_help())


for command in (
    demo, generate, chat, serve, learn, paper, simulate, capacity, fetch, convert, path
):  # fmt: skip
    app.command()(command)
app.add_typer(bench, name="bench")
app.add_typer(lab, name="lab")
app.add_typer(soak, name="soak")
app.add_typer(trace, name="trace")


def main() -> None:
    """The entry point."""
    run(app)
