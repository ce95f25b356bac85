"""The marked path through the library: what to read, in the order a token travels.

`minipaged path` prints it, with lines of code per file. The reading order in README and in
docs/architecture.md is made from it, by `minipaged path --markdown`; a test compares them.
"""

import ast
import io
import tokenize
from pathlib import Path

PACKAGE = Path(__file__).parents[1]

READING_PATH: tuple[tuple[str, str], ...] = (
    ("llm.py", "the front door: prompts in, outputs out"),
    ("config.py", "the options, each declared once"),
    ("sequence.py", "the nouns: which tokens of a sequence are computed, and which are not"),
    ("engine/llm_engine.py", "one step: schedule, run, sample, commit"),
    ("tokenizer/prompts.py", "from a prompt to token ids"),
    ("tokenizer/base.py", "what every tokenizer can do"),
    ("scheduler/interface.py", "the role `scheduler`"),
    ("scheduler/fcfs.py", "who runs next, and who is preempted"),
    ("scheduler/admission.py", "what is rejected, and when a prompt waits"),
    ("scheduler/output.py", "the decision of a step, and the message made from it"),
    ("memory/allocator.py", "physical blocks and their reference counts"),
    ("memory/block_table.py", "from logical blocks to physical ones"),
    ("memory/prefix_cache.py", "full blocks, found again by their content"),
    ("memory/interface.py", "the role `memory`"),
    ("memory/block_manager.py", "which sequence owns which blocks: copy-on-write, swapping"),
    ("worker/model_runner.py", "the device side of a step"),
    ("attention/batch.py", "from plain numbers to tensors: all index arithmetic"),
    ("attention/kv_cache.py", "the tensors that block numbers refer to"),
    ("models/base.py", "what every model promises"),
    ("models/llama.py", "a model, from top to bottom"),
    ("models/rope.py", "rotary positions"),
    ("models/linear.py", "merged and packed matrices"),
    ("attention/backend.py", "the contract of paged attention"),
    ("attention/reference.py", "paged attention as plainly as possible: the specification"),
    ("attention/torch_paged.py", "the fast one in PyTorch: what a step prepares, prefill"),
    ("attention/torch_decode.py", "... and decode"),
    ("sampling/params.py", "what a request asks for"),
    ("sampling/sampler.py", "from logits to tokens"),
    ("engine/request.py", "what every request has"),
    ("engine/sampling_request.py", "samples of a prompt, and when each of them ends"),
    ("engine/beam_request.py", "beams, which fork and end in every step"),
    ("tokenizer/detokenizer.py", "from tokens to text that can be shown already"),
    ("engine/outputs.py", "what comes out of a step"),
    ("engine/parts.py", "to replace a part, to check it, to watch it"),
    ("engine/build.py", "how all of it is put together"),
)


def lines_of_code(file: str) -> int:
    """Lines of a file of the package that hold code: no blank lines, comments or docstrings."""
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
    """The path as a table; its links begin with `package`, the place of the package."""
    rows = [f"| [`{file}`]({package}/{file}) | {purpose} |" for file, purpose in READING_PATH]
    return "\n".join(["| file | what it decides |", "|---|---|", *rows]) + "\n"
