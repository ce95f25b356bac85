"""A device that is not the host, without a GPU.

On torch's meta device a tensor has a shape and a type and no numbers. So an operation that mixes it
with tensors of the host fails, as it would on a GPU; and so does every look at a number, which on a
GPU would make the host wait.
"""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from minipaged.attention.backend import BACKENDS
from minipaged.attention.device_batch import DeviceBatchBuilder
from minipaged.attention.kv_cache import KVCache
from minipaged.evaluation.bench.decode_step import TINY
from minipaged.models.llama import Llama
from minipaged.sampling import SamplingParams
from minipaged.sampling.rows import SamplingRow
from minipaged.sampling.sampler import Sampler
from minipaged.scheduler.output import SequenceInput, StepInput
from minipaged.utils.device import pack, to_device, to_device_together, unpack
from minipaged.worker.cuda_graphs import DecodeGraphs
from minipaged.worker.model_runner import ModelRunner

ELSEWHERE = torch.device("meta")
PARAMS = {
    "greedy": {"temperature": 0.0},
    "sampled": {"temperature": 0.7},
    "cut": {"temperature": 0.7, "top_p": 0.9, "top_k": 5, "min_p": 0.01},
    "penalised": {"repetition_penalty": 1.2, "presence_penalty": 0.1, "frequency_penalty": 0.1},
    "steered": {"logit_bias": {3: 1.0}, "min_tokens": 4, "temperature": 0.0},
    "explained": {"logprobs": 3, "temperature": 0.0},
}


@pytest.mark.parametrize("chosen", [*([name] for name in PARAMS), list(PARAMS)], ids="+".join)
def test_sampling_does_not_synchronise_before_its_last_line(chosen: list[str]) -> None:
    rows = [
        SamplingRow(SamplingParams(**PARAMS[name]), [1, 2, 3], [4, 4], seed=7, end_token_ids=[9])
        for name in chosen
    ]
    logits = torch.empty(len(rows), 1024, device=ELSEWHERE)
    with pytest.raises(NotImplementedError, match="no data") as stopped:
        Sampler().sample(logits, rows).read()
    last = [entry for entry in stopped.traceback if Path(str(entry.path)).name == "sampler.py"][-1]
    assert '.to("cpu"' in str(last.statement)
    assert last.name == "__init__"


@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize("kv_dtype", [torch.float32, torch.int8], ids=str)
def test_a_step_of_the_model_stays_on_its_device(backend: str, kv_dtype: torch.dtype) -> None:
    with ELSEWHERE:
        model = Llama(TINY, BACKENDS[backend]).to(ELSEWHERE)
    cache = KVCache(TINY, 20, 4, dtype=kv_dtype, device=ELSEWHERE)
    batches = DeviceBatchBuilder(4, 8, 4, ELSEWHERE)
    runner = ModelRunner(model, BACKENDS[backend], cache, batches)
    decodes = [
        SequenceInput(1, [5], 6, [1, 2]),
        SequenceInput(2, [5], 2, [7]),
    ]
    chunk = SequenceInput(0, [1, 2, 3], 4, [3, 5])
    logits = runner.run(StepInput((chunk, *decodes), copies=((1, 2),)))
    assert logits.shape == (3, TINY.vocab_size)
    assert logits.device == ELSEWHERE
    sampled = torch.empty(3, dtype=torch.long, device=ELSEWHERE)
    pending = SequenceInput(1, [-2], 7, [1, 2])
    assert runner.run(StepInput((pending,)), sampled).device == ELSEWHERE
    if backend != "reference":  # only a backend that prepares nothing can be recorded
        return
    runner.graphs = DecodeGraphs(model, cache, batches, lambda step: step)
    runner.record_graphs()
    for _ in range(2):
        logits = runner.run(StepInput(tuple(decodes), copies=((1, 2),)))
        assert logits.shape == (2, TINY.vocab_size)
        assert logits.device == ELSEWHERE


def test_host_tensors_are_pinned_and_gpu_tensors_stay_where_they_are(monkeypatch) -> None:
    pinned: list[Tensor] = []

    def pin_memory(tensor: Tensor) -> Tensor:
        assert tensor.device.type == "cpu", "only the host's memory can be pinned"
        pinned.append(tensor)
        return tensor

    monkeypatch.setattr(Tensor, "pin_memory", pin_memory)
    monkeypatch.setattr(Tensor, "to", lambda tensor, *_, **__: tensor)
    assert to_device([1, 2], "cuda", torch.long).tolist() == [1, 2]
    assert len(pinned) == 1
    there = torch.empty(2, device=ELSEWHERE)  # as a GPU's tensor is
    assert to_device(there, "cuda") is there
    to_device([1, 2], "cpu")
    assert len(pinned) == 1


@pytest.mark.parametrize(
    "dtype", [None, torch.long, torch.int32, torch.float32, torch.bool], ids=str
)
@pytest.mark.parametrize("values", [[], [3, -1, 2**31 - 1], [[1, 2], [3, 4]], [True, False], (1,)])
def test_numbers_become_the_same_tensor_as_with_torch(values, dtype) -> None:
    made, expected = to_device(values, "cpu", dtype), torch.tensor(values, dtype=dtype)
    assert made.dtype == expected.dtype
    assert made.tolist() == expected.tolist()


def test_arrays_are_packed_with_zeros_up_to_their_places() -> None:
    arrays = [np.array([2**40, -1]), np.array([], np.int64), np.array([7], np.int32)]
    room = [np.zeros(3, np.int64), np.zeros(1, np.int64), np.zeros(4, np.int32)]
    unpacked = unpack(pack(arrays, room, torch.device("cpu")), room)
    assert [part.tolist() for part in unpacked] == [[2**40, -1, 0], [0], [7, 0, 0, 0]]
    assert [part.dtype for part in unpacked] == [torch.long, torch.long, torch.int32]
    unpacked = to_device_together(arrays, torch.device("cpu"))
    assert [part.tolist() for part in unpacked] == [[2**40, -1], [], [7]]


def test_an_array_that_is_longer_than_its_place_is_refused() -> None:
    arrays, room = [np.array([1, 2])], [np.zeros(1, np.int64)]
    with pytest.raises(ValueError, match="broadcast"):
        pack(arrays, room, torch.device("cpu"))


def test_an_integer_that_does_not_fit_is_refused() -> None:
    for dtype, value in ((torch.int32, 2**31), (torch.long, 2**63)):
        with pytest.raises((OverflowError, RuntimeError)):
            to_device([value], "cpu", dtype)
