"""A scheduler over a small pool, with its parts checked."""

from dataclasses import replace

from minipaged.config import EngineConfig
from minipaged.engine.parts import Parts
from minipaged.evaluation.testing.engine_without_model import EngineWithoutModel

CONFIG = EngineConfig(
    num_blocks=100,
    num_swap_blocks=100,
    block_size=4,
    max_model_len=400,
    max_num_batched_tokens=2048,
    enable_prefix_caching=True,
    watermark=0.0,
)


def build_engine(parts: Parts | None = None, **options) -> EngineWithoutModel:
    config = replace(CONFIG, **options)
    return EngineWithoutModel((parts or Parts()).checked().build_scheduler(config))
