"""Not a figure of the paper: paging compared with vAttention (arXiv 2405.04437) at equal memory.

vAttention leaves paging to the hardware: attention reads ordinary tensors, but memory is allocated
in system pages, one per buffer at a time. On a GPU the smallest page is 2 MiB: a group of pages
over all layers stores hundreds of tokens, and the last group of every request is half empty on
average. Slicing makes all layers of a token adjacent, so a group has two pages instead of eighty.

Simulated: the number of requests that fit in an overloaded server. Measured on this machine: the
time to map a page group, compared with a block, and the embedded model served from both.
`minipaged paper fig18` shows what a kernel would save without block tables. Virtual memory can
share only whole pages.
"""

import time
from statistics import median
from typing import TYPE_CHECKING, Any

from minipaged.evaluation.paper.drawing import panel, side_by_side
from minipaged.evaluation.paper.figure import MEASURED, SIMULATED, Check, Effort, Figure, Result
from minipaged.evaluation.paper.serving import Case, in_parallel, serve
from minipaged.evaluation.sim.catalogue import MODELS
from minipaged.evaluation.sim.systems import VATTENTION, Setting, virtual_layout
from minipaged.evaluation.stories import tell
from minipaged.memory import BlockAllocator
from minipaged.memory.baselines.pages import HUGE_PAGE, SMALL_PAGE, MappedPages, why_no_pages_of
from minipaged.memory.baselines.regions import RegionLayout

if TYPE_CHECKING:
    from matplotlib.figure import Figure as Canvas

    from minipaged.tokenizer.prompts import Prompt

RATES = {"sharegpt": 2.8, "alpaca": 50.0}  # requests per second: an overload
SECONDS = {"sharegpt": 240.0, "alpaca": 40.0}
PAGED = {"paged, blocks of 16": 16, "paged, blocks of 256": 256}
MIB = 1024**2
NUM_REQUESTS, NUM_TOKENS, ROUNDS = 16, 48, 3  # of the embedded model


def run(effort: Effort) -> Result:
    """Measure live tokens and requests with six memories, then the time to allocate memory."""
    used: dict[str, list[float]] = {}
    batch: dict[str, list[float]] = {}
    memories = [("vllm", size) for size in PAGED.values()] + [(name, 16) for name in VATTENTION]
    cases = [
        Case(
            system,
            workload=workload,
            rate=rate,
            seconds=SECONDS[workload],
            only_while_they_come=True,
            block_size=size,
            max_num_seqs=512,
        )
        for workload, rate in RATES.items()
        for system, size in memories
    ]
    names = [*PAGED, *(system.title for system in VATTENTION.values())]
    for number, outcome in enumerate(in_parallel(serve, cases, "vattention")):
        name = names[number % len(names)]
        used.setdefault(name, []).append(100 * outcome.used)
        batch.setdefault(name, []).append(outcome.mean_batch)
    checks: list[Check] = []
    for i, workload in enumerate(RATES):
        for name in names:
            what, remark = f"{workload}: live tokens, {name}", f"{batch[name][i]:.0f} requests"
            checks.append(Check(what, "-", used[name][i], unit="% of the pool", remark=remark))
    small, large = "paged, blocks of 16", "vAttention, 2 MiB"
    sliced = "vAttention, 2 MiB, sliced"
    for i, workload in enumerate(RATES):
        worse = used[small][i] - used[large][i]
        what = f"{workload}: pages of 2 MiB lose, against blocks of 16"
        checks.append(Check(what, "much", worse, 10, None, "points"))
        what = f"{workload}: sliced, they are as good as blocks of 16, within"
        checks.append(Check(what, "a little", used[small][i] - used[sliced][i], None, 2, "points"))
    checks += _half_a_group() + _measure() + _serve()
    data = {"used": used, "batch": batch}
    return Result("vattention", FIGURE.title, f"{SIMULATED}, {MEASURED}", checks, data)


def _half_a_group() -> list[Check]:
    """The average waste of a request's last page group; with fewer KV heads it has more tokens."""
    checks: list[Check] = []
    for name in ("opt-13b", "llama-3-8b"):
        setting = Setting(1, model=MODELS[name])
        for sliced in (False, True):
            layout = virtual_layout(setting, HUGE_PAGE, sliced)
            what = f"{name}: wasted per request, 2 MiB{', sliced' if sliced else ''}"
            checks.append(Check(what, "-", layout.group_bytes / 2 / MIB, unit="MiB"))
        block = 16 * MODELS[name].kv_bytes_per_token
        checks.append(Check(f"{name}: the same, blocks of 16", "-", block / 2 / MIB, unit="MiB"))
    return checks


def _measure() -> list[Check]:
    """Microseconds to allocate memory for the next tokens of a sequence, on this machine."""
    checks = [Check("a block of paging, allocated", "-", 1e6 * _seconds_of_a_block(), unit="us")]
    for title, page_bytes in {"4 KiB": SMALL_PAGE, "2 MiB": HUGE_PAGE}.items():
        if why_no_pages_of(page_bytes) is None:
            what = f"a page of {title}, mapped, in each of 16 buffers"
            checks.append(Check(what, "-", 1e6 * _seconds_of_a_group(page_bytes), unit="us"))
    return checks


def _serve() -> list[Check]:
    """Run the embedded model here, in paged memory and in virtual memory of 4 KiB pages."""
    if why_no_pages_of(SMALL_PAGE) is not None:
        return []
    from minipaged.llm import LLM  # torch, only here
    from minipaged.sampling import SamplingParams

    kinds = ("paged", "virtual", "virtual-sliced")
    llms = {kind: LLM(memory=kind, device="cpu", enable_prefix_caching=False) for kind in kinds}
    prompts: list[Prompt] = [tell(2 + n, seed=n).text for n in range(NUM_REQUESTS)]
    params = SamplingParams(temperature=0.0, max_tokens=NUM_TOKENS, ignore_eos=True)
    seconds: dict[str, list[float]] = {kind: [] for kind in kinds}
    tokens: dict[str, list[list[int]]] = {}
    for _ in range(ROUNDS + 1):  # in turn; the first round warms up
        for kind, llm in llms.items():
            start = time.perf_counter()
            outputs = llm.generate(prompts, params, use_tqdm=False)
            seconds[kind].append(time.perf_counter() - start)
            tokens[kind] = [output.outputs[0].token_ids for output in outputs]
    paged = median(seconds["paged"][1:])
    checks: list[Check] = []
    for kind in kinds[1:]:
        ratio, same = median(seconds[kind][1:]) / paged, tokens[kind] == tokens["paged"]
        checks.append(Check(f"embedded model, {kind}: time of paging", "-", ratio, unit="x"))
        checks.append(Check(f"embedded model, {kind}: same tokens", "1", float(same), 1, 1))
    return checks


def _seconds_of_a_block() -> float:
    allocator, many = BlockAllocator(10_000), 10_000
    start = time.perf_counter()
    for _ in range(many):
        allocator.allocate()
    return (time.perf_counter() - start) / many


def _seconds_of_a_group(page_bytes: int) -> float:
    layout = RegionLayout(16, 1, 16 * page_bytes // 1024, 1024, page_bytes)
    pages = MappedPages(layout)
    seconds: list[float] = []
    for group in range(16):
        start = time.perf_counter()
        pages.map(0, range(group, group + 1))
        seconds.append(time.perf_counter() - start)
    pages.unmap(0, range(16))
    return median(seconds)


def draw(result: Result, canvas: "Canvas") -> None:
    """Draw the live tokens of all memories, one panel per trace."""
    used: dict[str, Any] = result.data["used"]
    labels = [name.replace(", ", "\n") for name in used]
    for number, workload in enumerate(RATES):
        axes = panel(canvas, 1, 2, number + 1, f"{workload}: slots that hold a token")
        heights = {"ours": [values[number] for values in used.values()]}
        side_by_side(axes, labels, heights, "% of the pool's slots")


FIGURE = Figure("vattention", "Paging and vAttention at the same bytes", run, draw, (11.0, 4.0))
