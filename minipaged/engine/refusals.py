"""Refuses options and parts that a memory, backend or device would ignore, in one sentence each.

An option counts as given if it differs from its default, a part if it is not the library's.
Whether an option's value is valid is checked where it is declared (`config.py`).
"""

from dataclasses import dataclass

from minipaged.config import EngineArgs
from minipaged.engine.parts import Parts
from minipaged.errors import InvalidOption
from minipaged.memory.baselines.contiguous import CONTIGUOUS
from minipaged.memory.baselines.virtual import VIRTUAL
from minipaged.models.packed import InFloat16, works
from minipaged.scheduler.fcfs import FCFSScheduler


@dataclass(frozen=True)
class Unused:
    """An option or a part that a kind of memory does not use."""

    name: str
    reason: str  # a clause with the memory as subject
    harmless: tuple[object, ...] = ()  # values of an option that have the same effect


_BASELINE_PARTS = (
    Unused("allocator", "does not allocate single blocks"),
    Unused("block_table", "keeps one region per sequence, and tables of its own"),
    Unused("prefix_cache", "finds no prefixes"),
    Unused("memory", "is a memory manager itself"),
)
_BASELINE_OPTIONS = (
    Unused("enable_prefix_caching", "finds no prefixes", harmless=(False,)),
    Unused("num_swap_blocks", "does not swap", harmless=(0,)),
    Unused("preemption", "does not swap", harmless=("recompute",)),
)

UNUSED_PARTS: dict[str, tuple[Unused, ...]] = {
    "paged": (),
    **dict.fromkeys(
        CONTIGUOUS,
        (
            *_BASELINE_PARTS,
            Unused("select_victim", "reserves everything in advance and never preempts"),
        ),
    ),
    **dict.fromkeys(
        VIRTUAL,
        (
            *_BASELINE_PARTS,
            Unused("paged_attention", "has no block tables for it to read through"),
        ),
    ),
}
"""By kind of memory, the parts that it never calls."""

UNUSED_OPTIONS: dict[str, tuple[Unused, ...]] = {
    "paged": (),
    **dict.fromkeys(
        CONTIGUOUS,
        (
            *_BASELINE_OPTIONS,
            Unused("preemption", "reserves everything in advance and never preempts"),
            Unused("watermark", "reserves everything in advance, so no request grows"),
        ),
    ),
    **dict.fromkeys(
        VIRTUAL,
        (
            *_BASELINE_OPTIONS,
            Unused("attention_backend", "maps no memory after a sequence's end, and backends read "
                   "whole blocks"),
            Unused("kv_cache_dtype", "has no pages for the scales of 8-bit keys and values",
                   harmless=("float32", "bfloat16", "float16")),
        ),
    ),
}  # fmt: skip
"""By kind of memory, the options that it cannot honour."""


def refuse_what_is_ignored(args: EngineArgs, parts: Parts, device_type: str) -> None:
    """Refuse options and parts that would have no effect. Raises InvalidOption."""
    _refuse_unused_parts(args.memory, parts)
    for unused in UNUSED_OPTIONS[args.memory]:
        value = getattr(args, unused.name)
        if args.is_given(unused.name) and value not in unused.harmless:
            raise InvalidOption(
                f"{unused.name} is {value!r}, but memory={args.memory!r} {unused.reason}: leave "
                f'out {unused.name}, or choose memory="paged".',
                unused.name,
            )
    _refuse_unused_device_options(args, device_type)
    _refuse_what_several_ranks_lack(args, parts)
    if args.async_scheduling and (reason := why_steps_cannot_overlap(args, parts)):
        raise InvalidOption(
            f"async_scheduling is True, but {reason}: leave out one of the two.", "async_scheduling"
        )
    _refuse_weights_that_nobody_rounds(args, device_type)
    _refuse_splits_that_nobody_makes(args, parts)
    if args.is_given("attention_backend") and {"paged_attention", "store_kv"} <= parts.replaced:
        raise InvalidOption(
            f"attention_backend is {args.attention_backend!r}, but the parts paged_attention and "
            "store_kv replace all of its attention: leave out attention_backend or one of them.",
            "attention_backend",
        )


def _refuse_weights_that_nobody_rounds(args: EngineArgs, device_type: str) -> None:
    if not args.is_given("weight_dtype"):
        return
    if device_type != "cpu":
        reason = "a GPU multiplies weights in the type in which they are kept: choose dtype instead"
    elif args.dtype not in ("auto", "float32", "float"):
        reason = f"dtype is {args.dtype!r}, and only float32 has other weights: leave out one"
    elif args.weight_dtype == "float16" and not works(InFloat16):
        reason = "this processor, or this torch, cannot multiply such weights: leave it out"
    else:
        return
    raise InvalidOption(f"weight_dtype is {args.weight_dtype!r}, but {reason}.", "weight_dtype")


def _refuse_splits_that_nobody_makes(args: EngineArgs, parts: Parts) -> None:
    if args.fixed_split_size is None:
        return
    given = f"fixed_split_size is {args.fixed_split_size}, but"
    if args.attention_backend != "triton":
        raise InvalidOption(
            f"{given} attention_backend is {args.attention_backend!r}, and only the decode kernel "
            'of "triton" makes splits: choose attention_backend="triton", or leave it out.',
            "fixed_split_size",
        )
    if "paged_attention" in parts.replaced:
        raise InvalidOption(
            f"{given} the part paged_attention replaces the kernel that makes splits: leave out "
            "one of them.",
            "fixed_split_size",
        )


def _refuse_unused_parts(memory: str, parts: Parts) -> None:
    for unused in UNUSED_PARTS[memory]:
        if unused.name not in parts.replaced:
            continue
        if unused.name == "select_victim" and parts.scheduler is not FCFSScheduler:
            continue  # the custom scheduler gets it, and may preempt for reasons of its own
        raise InvalidOption(
            f"the part {unused.name} would never be called, because memory={memory!r} "
            f'{unused.reason}: leave out the part, or choose memory="paged".',
            unused.name,
        )


def _refuse_what_several_ranks_lack(args: EngineArgs, parts: Parts) -> None:
    size = args.tensor_parallel_size
    if size == 1:
        for name in ("start_timeout", "step_timeout"):
            if args.is_given(name):
                raise InvalidOption(
                    f"{name} is {getattr(args, name):g}, but has no effect with one rank: leave it "
                    "out, or raise tensor_parallel_size.",
                    name,
                )
    elif args.memory != "paged":
        raise InvalidOption(
            f"tensor_parallel_size is {size}, but memory={args.memory!r} keeps all keys and values "
            'in one process: leave out tensor_parallel_size, or choose memory="paged".',
            "tensor_parallel_size",
        )
    elif theirs := sorted({"paged_attention", "store_kv"} & parts.replaced):
        raise InvalidOption(
            f"tensor_parallel_size is {size}, but the part {theirs[0]} is in this process only: "
            "leave out one of them.",
            "tensor_parallel_size",
        )


def why_steps_cannot_overlap(args: EngineArgs, parts: Parts) -> str | None:
    """Return what prevents overlapped steps, as a clause; None if nothing does."""
    if args.tensor_parallel_size != 1:
        return (
            f"tensor_parallel_size is {args.tensor_parallel_size}, and the other ranks wait for "
            "every token to be known"
        )
    if args.memory != "paged":
        return f"memory={args.memory!r} does not free and grow block by block"
    reading = ("scheduler", "memory", "sampling_request", "adjust_logits")
    if theirs := [name for name in reading if name in parts.replaced]:
        return f"the part {theirs[0]} may read tokens that are not known yet"
    if parts.scheduler_wrappers:
        return "the run is traced, and events describe one step at a time"
    return None


def _refuse_unused_device_options(args: EngineArgs, device_type: str) -> None:
    if args.memory in VIRTUAL and device_type != "cpu":
        raise InvalidOption(
            f"memory={args.memory!r} maps pages of this process's memory, which a GPU cannot read: "
            'choose device="cpu", or memory="paged".',
            "memory",
        )
