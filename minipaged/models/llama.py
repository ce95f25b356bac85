"""LLaMA; with other options, the same class is Mistral, Qwen2 or Qwen3.

"LLaMA: Open and Efficient Foundation Language Models" (arXiv 2302.13971), "The Llama 3 Herd of
Models" (2407.21783), "Mistral 7B" (2310.06825), "Qwen2" (2407.10671), "Qwen3" (2505.09388). Their
additions are options of `LlamaConfig`: Qwen2 has biases for q, k and v, Qwen3 a norm on each head
of q and k. The context is limited to Mistral's sliding window. Logits agree with `transformers`.

Read the file in the order in which a token passes through it, starting with `Llama.forward`.
"""

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minipaged.attention.backend import AttentionBackend
from minipaged.attention.batch import Batch
from minipaged.attention.kv_cache import Cache, KVPair
from minipaged.config import ModelConfig
from minipaged.errors import CheckpointError, UnsupportedModel
from minipaged.models.base import (
    HFConfig,
    Model,
    WeightMap,
    divide_heads,
    read_architecture,
    read_eos_token_ids,
    read_float,
    read_int,
)
from minipaged.models.layers import choose_activation
from minipaged.models.linear import Linear, MergedLinear
from minipaged.models.rope import Rotary, rotate
from minipaged.models.rope_config import RopeConfig
from minipaged.utils.shapes import Float, Int


@dataclass(frozen=True, kw_only=True)
class LlamaConfig(ModelConfig):
    """The sizes and options of one LLaMA-like model."""

    intermediate_size: int
    rms_norm_eps: float = 1e-6
    rope: RopeConfig = field(default_factory=RopeConfig)
    activation: str = "silu"
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False  # Qwen3: RMSNorm on each head of q and k
    tied: bool = False  # the embedding is also the output matrix

    @classmethod
    def from_hf(cls, hf: HFConfig) -> "LlamaConfig":
        """Read a parsed config.json of LLaMA, Mistral, Qwen2 or Qwen3.

        Raises:
            CheckpointError: a value is missing or invalid.
            UnsupportedModel: an option is not supported.
        """
        architecture = read_architecture(hf)
        num_heads, num_kv_heads, head_dim = _read_heads(hf)
        attention_bias = bool(hf.get("attention_bias", False))
        is_qwen2 = architecture == "Qwen2ForCausalLM"
        rope = RopeConfig.from_hf(hf)
        return cls(
            architecture=architecture,
            num_layers=read_int(hf, "num_hidden_layers"),
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            hidden_size=read_int(hf, "hidden_size"),
            vocab_size=read_int(hf, "vocab_size"),
            max_position_embeddings=_read_context(hf, architecture, rope),
            eos_token_ids=read_eos_token_ids(hf),
            intermediate_size=read_int(hf, "intermediate_size"),
            rms_norm_eps=read_float(hf, "rms_norm_eps", 1e-6),
            rope=rope,
            activation=str(hf.get("hidden_act", "silu")),
            qkv_bias=attention_bias or is_qwen2,  # Qwen2's config.json does not mention its biases
            o_bias=attention_bias and not is_qwen2,
            mlp_bias=bool(hf.get("mlp_bias", False)),
            qk_norm=architecture == "Qwen3ForCausalLM",
            tied=bool(hf.get("tie_word_embeddings", False)),
        )


class Llama(Model):
    """The whole model: embedding, layers, norm, head."""

    def __init__(self, config: LlamaConfig, attention: AttentionBackend) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.rotary = Rotary(config.rope, config.head_dim)
        self.layers = nn.ModuleList(Layer(config, attention) for _ in range(config.num_layers))
        self.norm = AddRMSNorm(config, attention)
        self.head = None if config.tied else Linear(config.hidden_size, config.vocab_size, False)

    def forward(
        self,
        token_ids: Int[Tensor, " tokens"],
        positions: Int[Tensor, " tokens"],
        kv_cache: Cache,
        batch: Batch,
    ) -> Float[Tensor, "tokens hidden"]:
        """One step; see `Model.forward`."""
        x = self.embedding(token_ids)  # [tokens, hidden]
        delta = torch.zeros_like(x)  # what a layer adds to x; the first has nothing to add
        # Once per step, not once per layer: all layers rotate by the same angles.
        cos, sin = self.rotary(positions, x.dtype)  # [tokens, 1, half]
        for layer, kv in zip(self.layers, kv_cache.layers, strict=True):
            x, delta = layer(x, delta, cos, sin, kv, batch)
        return self.norm(x, delta)[1]

    def logits(self, hidden: Float[Tensor, "rows hidden"]) -> Float[Tensor, "rows vocab"]:
        """Scores of all tokens; see `Model.logits`."""
        if self.head is None:  # tied
            return F.linear(hidden, self.embedding.weight)  # [rows, vocab]
        return self.head(hidden)  # [rows, vocab]


class Layer(nn.Module):
    """Attention, then the feed-forward. The next norm adds the latter's result, `delta`, to x."""

    def __init__(self, config: LlamaConfig, attention: AttentionBackend) -> None:
        super().__init__()
        self.attention_norm = AddRMSNorm(config, attention)
        self.attention = Attention(config, attention)
        self.mlp_norm = AddRMSNorm(config, attention)
        self.mlp = GatedMLP(config, attention)

    def forward(
        self,
        x: Float[Tensor, "tokens hidden"],
        delta: Float[Tensor, "tokens hidden"],
        cos: Float[Tensor, "tokens 1 half"],
        sin: Float[Tensor, "tokens 1 half"],
        kv: KVPair,
        batch: Batch,
    ) -> tuple[Tensor, Tensor]:
        x, normed = self.attention_norm(x, delta)
        x, normed = self.mlp_norm(x, self.attention(normed, cos, sin, kv, batch))
        return x, self.mlp(normed)


class RMSNorm(nn.Module):
    """Divide each vector by its root mean square (arXiv 1910.07467), in float32."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Float[Tensor, "... size"]) -> Float[Tensor, "... size"]:
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


class AddRMSNorm(RMSNorm):
    """Add a result to the input of a layer; returns the sum, and the sum normalised."""

    def __init__(self, config: LlamaConfig, attention: AttentionBackend) -> None:
        super().__init__(config.hidden_size, config.rms_norm_eps)
        self.fused = attention.add_rms_norm

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, x: Float[Tensor, "tokens hidden"], delta: Float[Tensor, "tokens hidden"]
    ) -> tuple[Tensor, Tensor]:
        if self.fused is not None:  # the two lines below in one kernel
            return self.fused(x, delta, self.weight, self.eps)
        x = x + delta
        return x, super().forward(x)


class Attention(nn.Module):
    """Grouped-query attention (arXiv 2305.13245) with rotary positions, over the paged cache."""

    def __init__(self, config: LlamaConfig, attention: AttentionBackend) -> None:
        super().__init__()
        q_size = config.num_heads * config.head_dim
        kv_size = config.num_kv_heads * config.head_dim
        qkv_sizes = q_size, kv_size, kv_size
        self.qkv_proj = MergedLinear(config.hidden_size, qkv_sizes, bias=config.qkv_bias)
        self.o_proj = Linear(q_size, config.hidden_size, bias=config.o_bias)
        head_norm = config.head_dim, config.rms_norm_eps
        self.q_norm = RMSNorm(*head_norm) if config.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(*head_norm) if config.qk_norm else nn.Identity()
        self.head_dim = config.head_dim
        # YaRN's factor scales queries and keys, so their product is scaled by its square.
        self.scale = config.head_dim**-0.5 * config.rope.attention_factor**2
        self.backend = attention

    def forward(
        self,
        x: Float[Tensor, "tokens hidden"],
        cos: Float[Tensor, "tokens 1 half"],
        sin: Float[Tensor, "tokens 1 half"],
        kv: KVPair,
        batch: Batch,
    ) -> Float[Tensor, "tokens hidden"]:
        # -1, not the number of heads: with tensor parallelism, a rank has only its share of them.
        split = (x.shape[0], -1, self.head_dim)
        q, k, v = self.qkv_proj(x)  # [tokens, any_heads * head_dim]
        q, k, v = q.view(split), k.view(split), v.view(split)  # [tokens, any_heads, head_dim]
        q, k = self.q_norm(q), self.k_norm(k)
        k_cache, v_cache = kv
        # Stored first, because a token also attends to itself, through the cache.
        if self.backend.rope_and_store_kv is None:
            q, k = rotate(q, cos, sin), rotate(k, cos, sin)
            self.backend.store_kv(k, v, k_cache, v_cache, batch)
        else:  # the two lines above, fused into one kernel
            q = self.backend.rope_and_store_kv(q, k, v, cos, sin, k_cache, v_cache, batch)
        out = self.backend.paged_attention(q, k_cache, v_cache, batch, self.scale)
        return self.o_proj(out.flatten(1))  # [tokens, hidden]


class GatedMLP(nn.Module):
    """SwiGLU (arXiv 2002.05202): down(silu(gate(x)) * up(x))."""

    def __init__(self, config: LlamaConfig, attention: AttentionBackend) -> None:
        super().__init__()
        hidden, inner, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        self.gate_up_proj = MergedLinear(hidden, (inner, inner), bias=bias)
        self.down_proj = Linear(inner, hidden, bias=bias)
        self.activation = choose_activation(config.activation)
        self.fused = attention.silu_and_mul if config.activation == "silu" else None

    def forward(self, x: Float[Tensor, "tokens hidden"]) -> Float[Tensor, "tokens hidden"]:
        gate, up = self.gate_up_proj(x)  # [tokens, inner] each
        inner = self.fused(gate, up) if self.fused else self.activation(gate) * up
        del gate, up  # large, and no longer needed
        return self.down_proj(inner)  # [tokens, hidden]


LLAMA_WEIGHTS = WeightMap(
    prefix="model.",
    modules={
        "embedding": "embed_tokens",
        "layers.{i}.attention_norm": "layers.{i}.input_layernorm",
        "layers.{i}.attention.qkv_proj": (
            "layers.{i}.self_attn.q_proj",
            "layers.{i}.self_attn.k_proj",
            "layers.{i}.self_attn.v_proj",
        ),
        "layers.{i}.attention.q_norm": "layers.{i}.self_attn.q_norm",
        "layers.{i}.attention.k_norm": "layers.{i}.self_attn.k_norm",
        "layers.{i}.attention.o_proj": "layers.{i}.self_attn.o_proj",
        "layers.{i}.mlp_norm": "layers.{i}.post_attention_layernorm",
        "layers.{i}.mlp.gate_up_proj": ("layers.{i}.mlp.gate_proj", "layers.{i}.mlp.up_proj"),
        "layers.{i}.mlp.down_proj": "layers.{i}.mlp.down_proj",
        "norm": "norm",
        "head": "lm_head",
    },
)


def _read_heads(hf: HFConfig) -> tuple[int, int, int]:
    """Return the number of query heads, of KV heads, and of elements per head."""
    num_heads = read_int(hf, "num_attention_heads")
    num_kv_heads = read_int(hf, "num_key_value_heads", num_heads)
    if num_heads % num_kv_heads:
        raise CheckpointError(
            f"config.json has {num_heads} query heads and {num_kv_heads} KV heads, which do not "
            "divide evenly: correct num_key_value_heads."
        )
    if hf.get("head_dim") is not None:
        return num_heads, num_kv_heads, read_int(hf, "head_dim")
    return num_heads, num_kv_heads, divide_heads(read_int(hf, "hidden_size"), num_heads)


def _read_context(hf: HFConfig, architecture: str, rope: RopeConfig) -> int:
    """The longest context in which attention is full.

    In a layer with a sliding window, a token attends to itself and the `window - 1` tokens before
    it. Up to `window` tokens this is full attention, the only kind supported, so the context is
    limited to that.
    """
    context = rope.context(read_int(hf, "max_position_embeddings"))
    slides = _any_layer_slides(hf, architecture)
    return min(context, read_int(hf, "sliding_window")) if slides else context


def _any_layer_slides(hf: HFConfig, architecture: str) -> bool:
    """Raise UnsupportedModel if a layer's attention is neither full nor a sliding window."""
    kinds: list[str] = hf.get("layer_types") or []  # newer files have one entry per layer
    for kind in kinds:
        if kind not in ("full_attention", "sliding_attention"):
            raise UnsupportedModel(
                f"config.json has a layer with {kind!r}, but only full_attention, and "
                "sliding_attention up to its window, are supported: choose another checkpoint."
            )
    if "sliding_attention" in kinds:
        return True
    if architecture in ("Qwen2ForCausalLM", "Qwen3ForCausalLM"):
        # Qwen files name a window even if none is used. If one is used, the first layers stay full.
        num_full = hf.get("max_window_layers")
        num_full = 28 if num_full is None else num_full  # 28 as in transformers
        uses = not kinds and bool(hf.get("use_sliding_window"))
        return uses and read_int(hf, "num_hidden_layers") > num_full
    return hf.get("sliding_window") is not None
