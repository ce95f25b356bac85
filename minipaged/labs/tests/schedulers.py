"""A student's scheduler over the library's own memory, in an engine without a model."""

from typing import Any

from minipaged.config import EngineConfig
from minipaged.evaluation.testing.engine_without_model import EngineWithoutModel
from minipaged.labs.lab import Lab
from minipaged.memory import BlockManager, CheckedMemory

DEFAULTS: dict[str, Any] = {
    "num_blocks": 100, "num_swap_blocks": 100, "block_size": 4, "max_model_len": 400,
    "max_num_seqs": 8, "max_num_batched_tokens": 2048, "enable_prefix_caching": True,
    "watermark": 0.0,
}  # fmt: skip


def build_engine(
    scheduler_class: Any, victim: Any, *prompts: int, num_tokens: int = 5, **options: Any
) -> EngineWithoutModel:
    """An engine with waiting prompts of these lengths. Every call recounts its memory."""
    config = EngineConfig(**{**DEFAULTS, **options})
    memory = CheckedMemory(
        BlockManager(
            num_blocks=config.num_blocks,
            num_swap_blocks=config.num_swap_blocks,
            block_size=config.block_size,
            watermark_blocks=config.watermark_blocks,
            enable_prefix_caching=config.enable_prefix_caching,
        )
    )
    engine = EngineWithoutModel(scheduler_class(config, memory, victim))
    for prompt_len in prompts:
        engine.add(prompt_len, num_tokens)
    return engine


def with_library_bodies(cls: type, library: type, lab: Lab, task: int) -> type:
    """A student's class, for the tests of one task: bodies of later tasks are the library's."""
    later = [hole for each in lab.tasks if each.number > task for hole in each.holes]
    names = [hole.partition(".")[2] for hole in later if hole.startswith(f"{library.__name__}.")]
    bodies = {name: getattr(library, name) for name in names if hasattr(cls, name)}
    return type(cls.__name__, (cls,), bodies)
