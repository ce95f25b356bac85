"""`minipaged lab ranks`: the storyteller on a student's ranks."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from minipaged.labs.lab11_tensor_parallel import LAB
from minipaged.utils.options import require_whole

console = Console(highlight=False, soft_wrap=True)


def ranks(
    prompt: Annotated[str, typer.Argument(help="First words of the story.")] = "Once upon a time",
    file: Annotated[Path, typer.Option(help="Your file.")] = Path(LAB.file_name),
    num_ranks: Annotated[int, typer.Option(help="Number of processes: 1, 2 or 4.")] = 2,
    max_tokens: Annotated[int, typer.Option(help="Tokens to generate.")] = 24,
) -> None:
    """Lab 11: generate a story with your ranks, one process each."""
    require_whole("num_ranks", num_ranks, 1)
    require_whole("max_tokens", max_tokens, 1)
    import minipaged
    from minipaged.labs.tensor_parallel.telling import tell
    from minipaged.tokenizer.load import read_tokenizer

    folder = Path(minipaged.__file__).parent / "assets" / "storyteller"
    tokenizer = read_tokenizer(folder)
    generated, uses = tell(file, tokenizer.encode(prompt), max_tokens, num_ranks)
    console.print(prompt + tokenizer.decode(generated), markup=False)
    for rank, use in enumerate(uses):
        calls = ", ".join(f"{number} {name}" for name, number in use.calls.items())
        console.print(f"rank {rank}: {use.num_elements:,} elements of weights; {calls}")
