"""The reading path through the library, in the order in which a token passes through it.

`minipaged path` prints it, with lines of code per file. The reading order in README and in
docs/architecture.md is generated from it, by `minipaged path --markdown`; a test compares them.
"""

import ast
import io
import tokenize
from pathlib import Path

PACKAGE = Path(__file__).parents[1]

READING_PATH: tuple[tuple[str, str], ...] = (
    ("llm.py", "the user's entry point: prompts in, outputs out"),
    ("config.py", "the options, each declared once"),
    ("sequence.py", "a sequence: its tokens, and how many of them are computed"),
    ("engine/llm_engine.py", "one step: schedule, run, sample, commit"),
    ("engine/launched_step.py", "a step from its launch to its results"),
    ("tokenizer/prompts.py", "converts a prompt to token ids"),
    ("tokenizer/base.py", "the tokenizer interface"),
    ("scheduler/interface.py", "the scheduler interface"),
    ("scheduler/fcfs.py", "which requests run next, and which are preempted"),
    ("scheduler/admission.py", "which requests are rejected, and which have to wait"),
    ("scheduler/output.py", "the scheduler's decision, and the message made from it"),
    ("memory/allocator.py", "physical blocks and their reference counts"),
    ("memory/block_table.py", "maps logical blocks to physical blocks"),
    ("memory/prefix_cache.py", "finds full blocks by their content"),
    ("memory/interface.py", "the memory interface"),
    ("memory/block_manager.py", "the blocks of each sequence: copy-on-write, swapping"),
    ("worker/model_runner.py", "the device side of a step"),
    ("attention/batch.py", "builds a step's tensors: all index arithmetic"),
    ("attention/kv_cache.py", "the tensors that hold the blocks"),
    ("models/base.py", "the model interface"),
    ("models/llama.py", "a model, from top to bottom"),
    ("models/rope.py", "rotary positions"),
    ("models/linear.py", "merged and packed matrices"),
    ("attention/backend.py", "the interface of paged attention"),
    ("attention/reference.py", "paged attention as plainly as possible: the specification"),
    ("attention/torch_paged.py", "fast attention in PyTorch: metadata of a step, prefill"),
    ("attention/torch_decode.py", "fast attention in PyTorch: decode"),
    ("sampling/params.py", "the sampling parameters of a request"),
    ("sampling/sampler.py", "from logits to tokens"),
    ("engine/request.py", "state and methods of every request"),
    ("engine/sampling_request.py", "samples of a prompt, and when each of them ends"),
    ("engine/beam_request.py", "beams, which may fork or end in every step"),
    ("tokenizer/detokenizer.py", "converts tokens to text as they arrive"),
    ("engine/outputs.py", "the results of a step"),
    ("engine/parts.py", "replaces, checks and traces parts"),
    ("engine/build.py", "assembles the engine"),
)


def lines_of_code(file: str) -> int:
    """Lines of code in a file of the package: no blank lines, comments or docstrings."""
    text = (PACKAGE / file).read_text(encoding="utf-8")
    lines: set[int] = set()
    passive = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT}
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in passive and token.string:
            lines.update(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(
            node
        ):
            docstring = node.body[0]
            lines.difference_update(range(docstring.lineno, (docstring.end_lineno or 0) + 1))
    return len(lines)


def as_markdown(package: str) -> str:
    """The path as a table; links start with `package`, the path of the package."""
    rows = [f"| [`{file}`]({package}/{file}) | {purpose} |" for file, purpose in READING_PATH]
    return "\n".join(["| file | what it decides |", "|---|---|", *rows]) + "\n"
