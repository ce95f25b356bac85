"""Models and GPUs for simulation: their sizes, bandwidths and speeds."""

from dataclasses import dataclass, replace

from minipaged.errors import InvalidOption
from minipaged.evaluation.sim.fitted import SYNC_SECONDS
from minipaged.evaluation.sim.interconnect import NVLINK_3, NVLINK_4, NVLINK_5, PCIE_4, Link

GB = 10**9


@dataclass(frozen=True)
class GPU:
    """The published numbers of a GPU that limit a step."""

    name: str
    memory_bytes: float
    bandwidth: float  # bytes per second
    flops: float  # 16-bit operations per second, dense
    link: Link  # to the other GPUs of a server


@dataclass(frozen=True)
class ServedModel:
    """The sizes of a model that limit a step, with 16-bit weights and keys."""

    name: str
    num_params: float
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int

    @property
    def hidden_size(self) -> int:
        return self.num_heads * self.head_dim

    @property
    def weight_bytes(self) -> float:
        return 2 * self.num_params

    @property
    def kv_bytes_per_token(self) -> int:
        """Bytes of one token's keys and values over all layers (section 3)."""
        return 2 * 2 * self.num_layers * self.num_kv_heads * self.head_dim


@dataclass(frozen=True)
class Deployment:
    """A model on a number of GPUs, with the token slots left for keys and values."""

    model: ServedModel
    gpu: GPU
    num_gpus: int
    num_slots: int
    sync_seconds: float = 0.0  # per step, waiting for messages and other workers

    @property
    def bandwidth(self) -> float:
        return self.gpu.bandwidth * self.num_gpus

    @property
    def flops(self) -> float:
        return self.gpu.flops * self.num_gpus

    def with_link(self, link: Link) -> "Deployment":
        """Return the same server with another link between its GPUs."""
        return replace(self, gpu=replace(self.gpu, link=link))


GPUS = {
    gpu.name: gpu
    for gpu in (
        GPU("a100-40g", 40 * GB, 1555e9, 312e12, NVLINK_3),
        GPU("a100-80g", 80 * GB, 2039e9, 312e12, NVLINK_3),
        GPU("l4-24g", 24 * GB, 300e9, 121e12, PCIE_4),
        GPU("l40s-48g", 48 * GB, 864e9, 362e12, PCIE_4),
        GPU("rtx4090-24g", 24 * GB, 1008e9, 165e12, PCIE_4),
        GPU("h100-80g", 80 * GB, 3350e9, 989e12, NVLINK_4),
        GPU("h200-141g", 141 * GB, 4800e9, 989e12, NVLINK_4),
        GPU("b200-180g", 180 * GB, 8000e9, 2250e12, NVLINK_5),
    )
}

MODELS = {
    model.name: model
    for model in (
        ServedModel("opt-13b", 12.85e9, 40, 40, 40, 128, 50_272),
        ServedModel("opt-66b", 65.7e9, 64, 72, 72, 128, 50_272),
        ServedModel("opt-175b", 174.6e9, 96, 96, 96, 128, 50_272),
        ServedModel("llama-13b", 13.0e9, 40, 40, 40, 128, 32_000),
        ServedModel("smollm2-135m", 0.1345e9, 30, 9, 3, 64, 49_152),
        ServedModel("llama-3.2-1b", 1.24e9, 16, 32, 8, 64, 128_256),
        ServedModel("llama-2-7b", 6.74e9, 32, 32, 32, 128, 32_000),
        ServedModel("mistral-7b", 7.24e9, 32, 32, 8, 128, 32_000),
        ServedModel("llama-3-8b", 8.03e9, 32, 32, 8, 128, 128_256),
        ServedModel("llama-3-70b", 70.6e9, 80, 64, 8, 128, 128_256),
    )
}

# Table 1 of the paper: the servers of its evaluation. The slots are its own numbers (such as
# "15.7K"), made as exact as its memory sizes allow.
DEPLOYMENTS = {
    "opt-13b": Deployment(MODELS["opt-13b"], GPUS["a100-40g"], 1, 15_728),
    "opt-66b": Deployment(MODELS["opt-66b"], GPUS["a100-40g"], 4, 9_700, SYNC_SECONDS["opt-66b"]),
    "opt-175b": Deployment(
        MODELS["opt-175b"], GPUS["a100-80g"], 8, 60_100, SYNC_SECONDS["opt-175b"]
    ),
    "llama-13b": Deployment(MODELS["llama-13b"], GPUS["a100-40g"], 1, 15_728),
}


def find_model(name: str) -> ServedModel:
    """Return the model with this name. Raises InvalidOption with the valid names."""
    if name not in MODELS:
        raise InvalidOption(f"there is no model {name!r} here: choose one of {', '.join(MODELS)}.")
    return MODELS[name]


def find_gpu(name: str) -> GPU:
    """Return the GPU with this name. Raises InvalidOption with the valid names."""
    if name not in GPUS:
        raise InvalidOption(f"there is no GPU {name!r} here: choose one of {', '.join(GPUS)}.")
    return GPUS[name]
