"""Stage "sampler": choosing the tokens of a whole batch, until they are on the host."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from minipaged.evaluation.bench.gpu.stage import Part, Setup
from minipaged.evaluation.bench.kernel import WrongResult
from minipaged.evaluation.bench.timing import median_seconds
from minipaged.sampling import SamplingParams
from minipaged.sampling.rows import SamplingRow
from minipaged.sampling.sampler import Sampler

OPTIONS = {
    "greedy": SamplingParams(temperature=0.0),
    "greedy, 5 logprobs": SamplingParams(temperature=0.0, logprobs=5),
    "temperature": SamplingParams(temperature=1.0),
    "top_k 50": SamplingParams(temperature=1.0, top_k=50),
    "top_p 0.9": SamplingParams(temperature=1.0, top_p=0.9),
    "top_k 50, top_p 0.9": SamplingParams(temperature=1.0, top_k=50, top_p=0.9),
    "min_p 0.05": SamplingParams(temperature=1.0, min_p=0.05),
}
HOST = torch.device("cpu")


@dataclass(frozen=True)
class Row:
    """One choice of options, the same for all rows of logits."""

    options: str
    num_rows: int
    vocab_size: int
    seconds: float  # by the host's clock
    peak_bytes: int  # temporary memory of the GPU


def parts(setup: Setup) -> list[Part]:
    """The parts of this stage."""
    return [Part(name, partial(_measure, setup, name)) for name in OPTIONS]


def _measure(setup: Setup, name: str) -> Iterator[Row]:
    num_rows, vocab_size = (3, 2000) if setup.is_dry else (64, 128256)
    torch.manual_seed(0)
    logits = 3 * torch.randn(num_rows, vocab_size, device=setup.device, dtype=setup.dtype)
    params = OPTIONS[name]
    rows = [SamplingRow(params, [1], [], seed) for seed in range(num_rows)]

    def sample() -> list[int]:  # ends when the tokens are on the host, so the host can time it
        return [token.token_id for token in Sampler().sample(logits, rows).read()]

    check(name, logits, sample())
    peak_bytes = 0
    if setup.device.type == "cuda":
        before = torch.cuda.memory_allocated(setup.device)
        torch.cuda.reset_peak_memory_stats(setup.device)
        sample()
        peak_bytes = torch.cuda.max_memory_allocated(setup.device) - before
    seconds = median_seconds({name: sample}, HOST, setup.rounds)[name]
    yield Row(name, num_rows, vocab_size, seconds, peak_bytes)


def check(name: str, logits: Tensor, token_ids: list[int]) -> None:
    """Check that each token is one that the options allow. Raises WrongResult."""
    params, exact = OPTIONS[name], logits.double().cpu()
    for row, token_id in zip(exact, token_ids, strict=True):
        probs, order = row.softmax(dim=-1).sort(descending=True)
        rank = int((row > row[token_id]).sum())  # 0: the likeliest
        before = float(probs[:rank].sum())
        most = {0.0: 1}.get(params.temperature) or params.top_k or len(order)
        likely = float(probs[rank]) >= 0.99 * params.min_p * float(probs[0])
        if rank >= most or before > params.top_p + 1e-3 or not likely:
            raise WrongResult(
                f"{name}: token {token_id} was chosen, which {rank} others precede with "
                f"{before:.2%} of the probability."
            )
