"""A list of small models of supported architectures, with licences and approximate sizes.

`minipaged fetch --list` shows this list. Any other model of these architectures can be fetched by
its `owner/name`. Sizes are rounded; a fetch asks the hub for the exact ones before it downloads.
"""

from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True)
class KnownModel:
    """One model: its name on the hub, size and licence."""

    name: str  # owner/name
    architecture: str  # as in config.json
    num_parameters: int  # rounded
    num_bytes: int  # of all files, rounded
    licence: str
    gated: bool = False  # requires accepting the licence on the hub
    note: str = ""

    @property
    def short_name(self) -> str:
        """The name without its owner: "gpt2" for "openai-community/gpt2"."""
        return self.name.partition("/")[2]


def find_known(name: str) -> KnownModel | None:
    """The listed model with this name, with or without owner, in any case."""
    wanted = name.lower()
    return next((m for m in KNOWN_MODELS if wanted in (m.name.lower(), m.short_name.lower())), None)


def in_words(num_bytes: int) -> str:
    """A size for people to read: 950 bytes, 272 MB, 2.5 GB."""
    if num_bytes < 1000:
        return f"{num_bytes} bytes"
    amount, unit = num_bytes / 1000, "kB"
    for larger in ("MB", "GB", "TB"):
        if amount < 999.5:
            break
        amount, unit = amount / 1000, larger
    return f"{amount:.0f} {unit}" if amount >= 99.5 else f"{amount:.2g} {unit}"


def _family(
    owner: str,
    architecture: str,
    licence: str,
    *sizes: tuple[str, float, float],  # name; millions of parameters; millions of bytes
    gated: bool = False,
    note: str = "",
) -> Iterator[KnownModel]:
    for name, parameters, size in sizes:
        counts = round(parameters * 1e6), round(size * 1e6)
        yield KnownModel(f"{owner}/{name}", architecture, *counts, licence, gated, note)


_APACHE = "Apache-2.0"
_OPT_LICENCE = "OPT-175B (non-commercial)"
_PICKLED = "published as pytorch_model.bin: converted after the download"

KNOWN_MODELS: tuple[KnownModel, ...] = (
    *_family("distilbert", "GPT2LMHeadModel", _APACHE, ("distilgpt2", 82, 355)),
    *_family(
        "openai-community", "GPT2LMHeadModel", "MIT",
        ("gpt2", 124, 551), ("gpt2-medium", 355, 1_520),
        ("gpt2-large", 774, 3_250), ("gpt2-xl", 1_558, 6_430),
    ),
    *_family(
        "facebook", "OPTForCausalLM", _OPT_LICENCE,
        ("opt-125m", 125, 252), ("opt-350m", 331, 664), ("opt-1.3b", 1_316, 2_630),
        ("opt-2.7b", 2_652, 5_300), ("opt-6.7b", 6_658, 13_300),
        note=_PICKLED,
    ),
    *_family(
        "HuggingFaceTB", "LlamaForCausalLM", _APACHE,
        ("SmolLM-135M", 135, 540), ("SmolLM-360M", 362, 727), ("SmolLM-1.7B", 1_711, 3_420),
        ("SmolLM2-135M", 135, 272), ("SmolLM2-135M-Instruct", 135, 272),
        ("SmolLM2-360M", 362, 727), ("SmolLM2-360M-Instruct", 362, 727),
        ("SmolLM2-1.7B", 1_711, 3_430), ("SmolLM2-1.7B-Instruct", 1_711, 3_430),
    ),
    *_family(
        "TinyLlama", "LlamaForCausalLM", _APACHE,
        ("TinyLlama-1.1B-Chat-v1.0", 1_100, 2_200),
        note="its tokenizer needs pip install 'minipaged[tokenizers]'",
    ),
    *_family(
        "meta-llama", "LlamaForCausalLM", "Llama 3.2 Community",
        ("Llama-3.2-1B", 1_236, 2_480), ("Llama-3.2-1B-Instruct", 1_236, 2_480),
        ("Llama-3.2-3B", 3_213, 6_440), ("Llama-3.2-3B-Instruct", 3_213, 6_440),
        gated=True, note="accept its licence on its page at huggingface.co, and set HF_TOKEN",
    ),
    *_family(
        "Qwen", "Qwen2ForCausalLM", _APACHE,
        ("Qwen2.5-0.5B", 494, 1_000), ("Qwen2.5-0.5B-Instruct", 494, 1_000),
        ("Qwen2.5-1.5B", 1_544, 3_100), ("Qwen2.5-1.5B-Instruct", 1_544, 3_100),
    ),
    *_family(
        "Qwen", "Qwen2ForCausalLM", "Qwen Research (non-commercial)",
        ("Qwen2.5-3B", 3_086, 6_180), ("Qwen2.5-3B-Instruct", 3_086, 6_180),
    ),
    *_family(
        "Qwen", "Qwen3ForCausalLM", _APACHE,
        ("Qwen3-0.6B", 596, 1_520), ("Qwen3-1.7B", 1_721, 4_080), ("Qwen3-4B", 4_022, 8_060),
    ),
)  # fmt: skip
