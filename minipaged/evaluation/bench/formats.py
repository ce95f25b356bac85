"""The cost and gain of a smaller KV cache: its error, and the number of tokens in the same memory.

The error is measured for attention over random keys and values of 1,024 tokens, relative to
float64, as ‖out - exact‖ / ‖exact‖. Its effect is measured with the embedded model: right answers
to questions about facts far back in its context, and the number of tokens that change.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import cast

import torch
from rich.table import Table
from torch import Tensor

from minipaged.attention.backend import BACKENDS
from minipaged.attention.kv_cache import KV_DTYPES, bytes_per_block
from minipaged.attention.quantized_cache import KVPool, QuantizedPool
from minipaged.config import KVCacheDType
from minipaged.evaluation.bench.cases import Case, Heads, make_inputs
from minipaged.evaluation.stories import Question, prompt, tell
from minipaged.llm import LLM
from minipaged.models.llama import LlamaConfig
from minipaged.sampling import SamplingParams

HEADS = Heads("8/2 x 128", 8, 2, 128)
MOST_FACTS = 32  # facts per story: about 500 tokens


@dataclass(frozen=True)
class Row:
    """One format of keys and values."""

    kv_dtype: str
    bytes_per_key: float  # bytes of 128 elements, scale included
    times_tokens: float  # number of tokens in the memory of one token in float16
    attention_error: float
    num_right: int
    num_questions: int
    num_changed: int  # answers with a different token from float32


def measure(num_questions: int) -> Iterator[Row]:
    """Measure each format: its error over random keys, and its answers to the questions."""
    expected: list[list[int]] = []
    for kv_dtype in KV_DTYPES:
        key_bytes = _bytes_per_key(kv_dtype)
        right, answers = _answers(kv_dtype, num_questions)
        expected = expected or answers  # those of the first format, float32
        yield Row(
            kv_dtype,
            key_bytes,
            _bytes_per_key("float16") / key_bytes,
            attention_error(kv_dtype),
            right,
            len(answers),
            sum(found != wanted for found, wanted in zip(answers, expected, strict=True)),
        )


def attention_error(kv_dtype: str) -> float:
    """Relative error of attention in float64 over keys and values kept in this format."""
    cpu = torch.device("cpu")
    exact = make_inputs(Case(HEADS, 4, 1024, kv_dtype="float32"), cpu, torch.float32)
    kept = make_inputs(Case(HEADS, 4, 1024, kv_dtype=kv_dtype), cpu, torch.float32)

    def attend(keys: KVPool, values: KVPool) -> Tensor:
        q = exact.q.double()
        return BACKENDS["reference"].paged_attention(
            q, _in_double(keys), _in_double(values), exact.batch, exact.scale
        )

    right = attend(exact.k_cache, exact.v_cache)
    return float((attend(kept.k_cache, kept.v_cache) - right).norm() / right.norm())


def _in_double(pool: KVPool) -> Tensor:
    return (pool[:] if isinstance(pool, QuantizedPool) else pool).double()


def _bytes_per_key(kv_dtype: str) -> float:
    one_head = LlamaConfig(
        architecture="",
        num_layers=1,
        num_heads=1,
        num_kv_heads=1,
        head_dim=HEADS.head_dim,
        hidden_size=HEADS.head_dim,
        vocab_size=1,
        max_position_embeddings=1,
        intermediate_size=1,
    )
    return bytes_per_block(one_head, 1, KV_DTYPES[kv_dtype]) / 2  # a key and a value


def _answers(kv_dtype: str, num_questions: int) -> tuple[int, list[list[int]]]:
    """Return the number of right answers, and the tokens of all."""
    llm = LLM("storyteller", device="cpu", kv_cache_dtype=cast(KVCacheDType, kv_dtype))
    cases = [_question(index) for index in range(num_questions)]
    greedy = SamplingParams(temperature=0.0, max_tokens=32)
    outputs = llm.generate([text for text, _ in cases], greedy, use_tqdm=False)
    right = sum(
        question.is_answered_by(output.outputs[0].text)
        for (_, question), output in zip(cases, outputs, strict=True)
    )
    return right, [output.outputs[0].token_ids for output in outputs]


def _question(index: int) -> tuple[str, Question]:
    """A prompt about the first fact of a story, so that the answer is far back."""
    story = tell(1 + index % MOST_FACTS, seed=index)
    about_the_first = [q for q in story.questions if q.fact_index == 0]
    question = about_the_first[index % len(about_the_first)]
    return prompt(story, question), question


def as_table(rows: list[Row]) -> Table:
    """The rows as a table."""
    table = Table(box=None, padding=(0, 2))
    table.add_column("stored as")
    for title in ("bytes per key of 128", "tokens", "error of attention", "right", "changed"):
        table.add_column(title, justify="right")
    for row in rows:
        table.add_row(
            row.kv_dtype,
            f"{row.bytes_per_key:.0f}",
            f"{row.times_tokens:.2f} x",
            f"{row.attention_error:.1e}",
            f"{row.num_right} of {row.num_questions}",
            f"{row.num_changed}",
        )
    return table
