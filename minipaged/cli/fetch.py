"""`minipaged fetch` and `minipaged convert`."""

import json
import shlex
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from minipaged.cli.options import refuse_beside
from minipaged.errors import CheckpointError, InvalidOption
from minipaged.models.hub.catalogue import KNOWN_MODELS, find_known, in_words
from minipaged.models.hub.fetch import download, find_here
from minipaged.models.hub.hub import ask_hub
from minipaged.models.hub.local_models import (
    TOKENIZER_FILES,
    ModelName,
    find_local,
    find_model,
    is_model_name,
)


def fetch(
    context: typer.Context,
    name: Annotated[
        str | None, typer.Argument(help="owner/name[@revision] on the hub, or a name from --list.")
    ] = None,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit.")] = None,
    directory: Annotated[
        Path | None, typer.Option("--dir", help="Download to this folder instead of the cache.")
    ] = None,
    list_models: Annotated[
        bool, typer.Option("--list", help="List small models with their sizes and licences.")
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print JSON, one object per line.")
    ] = False,
) -> None:
    """Download a model from the Hugging Face hub.

    To resume an interrupted download, run the same command again. The environment variables
    HF_ENDPOINT, HF_TOKEN and MINIPAGED_HOME apply.
    """
    if list_models:
        fetched = ("name", "revision", "directory")
        refuse_beside(context, "--list", "fetches nothing", fetched)
        print_known_models(as_json)
    elif name is None:
        raise InvalidOption("no model was given: give owner/name, or --list to see some.")
    else:
        fetch_and_report(name, revision, directory, as_json)


def convert(
    folder: Annotated[Path, typer.Argument(help="Folder with pytorch_model.bin or its shards.")],
) -> None:
    """Convert pickled weights to safetensors.

    Loading safetensors files cannot run code. The pickled files are kept.
    """
    from minipaged.models.hub.convert import convert_to_safetensors, find_pickled

    old = find_pickled(folder)
    for path in convert_to_safetensors(folder):
        print(f"{path} ({in_words(path.stat().st_size)})")
    print(f"{', '.join(path.name for path in old)} can be deleted.")


def fetch_and_report(
    name: str, revision: str | None = None, directory: Path | None = None, as_json: bool = False
) -> None:
    """Fetch a model unless it is on this machine, and print its folder and how to use it.

    Raises:
        FetchError: the download failed.
        CheckpointError: this library cannot load the model.
    """
    model = ModelName.parse(name, revision)
    folder = find_here(model, directory)
    found = folder is not None
    if folder is None:
        offer, known = ask_hub(model), find_known(model.repo)
        named = known.licence if known else offer.licence  # the hub calls most of them "other"
        licence = f", licence: {named}" if named else ""
        size = f"{len(offer.files)} files, {in_words(offer.num_bytes)}{licence}"
        print(f"fetching {model} from {offer.hub}: {size}", file=sys.stderr)
        folder = download(offer, directory, progress=not as_json)
    num_bytes = sum(path.stat().st_size for path in folder.iterdir() if path.is_file())
    if as_json:
        report = {
            "name": str(model),
            "folder": str(folder),
            "bytes": num_bytes,
            "fetched": not found,
        }
        print(json.dumps(report))
        return
    use = str(folder if directory else model)
    state = "is already on this machine" if found else "was fetched"
    print(f"{model} {state}: {folder} ({in_words(num_bytes)})")
    if any((folder / name).is_file() for name in TOKENIZER_FILES):
        print(f'  minipaged generate "Once upon a time" --model {shlex.quote(use)}')
    else:
        print("  it has no tokenizer: give prompts as token ids.")
    print(f"  LLM({json.dumps(use, ensure_ascii=False)})")


def offer_to_fetch(model: str) -> None:
    """On a terminal, offer to fetch a model that is not on this machine, with its size.

    Otherwise, or if the answer is no, `LLM` raises an error later. Raises what `fetch` raises.
    """
    try:
        find_model(model)
    except CheckpointError:
        if sys.stdin.isatty() and sys.stderr.isatty() and is_model_name(model):
            offer = ask_hub(model)
            size = in_words(offer.num_bytes)
            if typer.confirm(f"{offer.model} is not on this machine. Fetch it ({size})?", err=True):
                download(offer)


def print_known_models(as_json: bool = False) -> None:
    """Print small models with sizes and licences, and which of them are on this machine."""
    here = {model.name: find_local(model.name) for model in KNOWN_MODELS}
    if as_json:
        for model in KNOWN_MODELS:
            folder = here[model.name]
            print(json.dumps({**asdict(model), "folder": str(folder) if folder else None}))
        return
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("model", "parameters", "size", "licence"):
        side = "right" if column in ("parameters", "size") else "left"
        table.add_column(column, justify=side, no_wrap=column != "licence")
    for model in KNOWN_MODELS:
        parameters = f"{model.num_parameters / 1e6:,.0f} M"
        table.add_row(model.name, parameters, in_words(model.num_bytes), model.licence)
    owners = {model.note: model.name.split("/")[0] for model in KNOWN_MODELS if model.note}
    notes = [f"{owner}: {note}." for note, owner in owners.items()]
    notes.append("Sizes are approximate. Any other owner/name on the hub can be fetched as well.")
    notes.append(f"On this machine: {', '.join(n for n in here if here[n]) or 'none of them yet'}.")
    # A pipe has no width: print one line per model.
    console = Console(highlight=False, markup=False, width=None if sys.stdout.isatty() else 100)
    console.print(table)
    console.print("", *notes, sep="\n", style="dim", soft_wrap=True)
