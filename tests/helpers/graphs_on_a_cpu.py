"""Decode steps as a GPU runs them, from fixed addresses and padded, without a GPU."""

from minipaged import LLM
from minipaged.attention.device_batch import DeviceBatchBuilder
from minipaged.worker.cuda_graphs import DecodeGraphs, Record


def with_graphs(llm: LLM, record: Record = lambda step: step) -> LLM:
    """The same engine, whose decode steps are "recorded" by keeping the function.

    The tensors that a GPU would have are separate from those of the host.
    """
    runner, config = llm.engine.executor.runner, llm.engine.config
    runner.batches = DeviceBatchBuilder(
        config.max_num_seqs, config.max_blocks_per_seq, config.block_size, "cpu"
    )
    runner.graphs = DecodeGraphs(runner.model, runner.kv_cache, runner.batches, record)
    runner.record_graphs()
    return llm
