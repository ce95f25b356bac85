"""GPT-2: learned positions, LayerNorm before each half of a layer, GELU, a tied output matrix.

"Language Models are Unsupervised Multitask Learners" (Radford et al. 2019). Logits agree with
Hugging Face's `transformers`.

Read the file in the order in which a token passes through it, starting with `GPT2.forward`.
"""

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from minipaged.attention.backend import AttentionBackend
from minipaged.attention.batch import Batch
from minipaged.attention.kv_cache import Cache, KVPair
from minipaged.config import ModelConfig
from minipaged.models.base import (
    HFConfig,
    Model,
    WeightMap,
    divide_heads,
    read_architecture,
    read_eos_token_ids,
    read_float,
    read_int,
    require_option,
)
from minipaged.models.layers import MLP, MultiHeadAttention
from minipaged.models.linear import Linear
from minipaged.utils.shapes import Float, Int


@dataclass(frozen=True, kw_only=True)
class GPT2Config(ModelConfig):
    """The sizes and options of one GPT-2 model."""

    inner_size: int
    layer_norm_eps: float = 1e-5
    activation: str = "gelu_new"
    tied: bool = True  # the embedding is also the output matrix

    @classmethod
    def from_hf(cls, hf: HFConfig) -> "GPT2Config":
        """Read a parsed config.json of GPT-2.

        Raises:
            CheckpointError: a value is missing or invalid.
            UnsupportedModel: an option is not supported.
        """
        require_option(hf, "scale_attn_weights", True)
        require_option(hf, "scale_attn_by_inverse_layer_idx", False)
        require_option(hf, "reorder_and_upcast_attn", False)
        require_option(hf, "add_cross_attention", False)
        hidden_size, num_heads = read_int(hf, "n_embd"), read_int(hf, "n_head")
        return cls(
            architecture=read_architecture(hf),
            num_layers=read_int(hf, "n_layer"),
            num_heads=num_heads,
            num_kv_heads=num_heads,
            head_dim=divide_heads(hidden_size, num_heads),
            hidden_size=hidden_size,
            vocab_size=read_int(hf, "vocab_size"),
            max_position_embeddings=read_int(hf, "n_positions"),
            eos_token_ids=read_eos_token_ids(hf),
            inner_size=read_int(hf, "n_inner", 4 * hidden_size),
            layer_norm_eps=read_float(hf, "layer_norm_epsilon", 1e-5),
            activation=str(hf.get("activation_function", "gelu_new")),
            tied=bool(hf.get("tie_word_embeddings", True)),
        )


class GPT2(Model):
    """The whole model: embeddings of token and position, layers, norm, head."""

    def __init__(self, config: GPT2Config, attention: AttentionBackend) -> None:
        super().__init__()
        self.config = config
        hidden = config.hidden_size
        self.embedding = nn.Embedding(config.vocab_size, hidden)
        self.position_embedding = nn.Embedding(config.max_position_embeddings, hidden)
        self.layers = nn.ModuleList(Layer(config, attention) for _ in range(config.num_layers))
        self.norm = nn.LayerNorm(hidden, config.layer_norm_eps)
        self.head = None if config.tied else Linear(hidden, config.vocab_size, bias=False)

    def forward(
        self,
        token_ids: Int[Tensor, " tokens"],
        positions: Int[Tensor, " tokens"],
        kv_cache: Cache,
        batch: Batch,
    ) -> Float[Tensor, "tokens hidden"]:
        """One step; see `Model.forward`."""
        x = self.embedding(token_ids) + self.position_embedding(positions)  # [tokens, hidden]
        for layer, kv in zip(self.layers, kv_cache.layers, strict=True):
            x = layer(x, kv, batch)
        return self.norm(x)

    def logits(self, hidden: Float[Tensor, "rows hidden"]) -> Float[Tensor, "rows vocab"]:
        """Scores of all tokens; see `Model.logits`."""
        if self.head is None:  # tied
            return F.linear(hidden, self.embedding.weight)  # [rows, vocab]
        return self.head(hidden)  # [rows, vocab]


class Layer(nn.Module):
    """Attention, then the feed-forward; each reads its input normalised, and is added to it."""

    def __init__(self, config: GPT2Config, attention: AttentionBackend) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.attention = MultiHeadAttention(config.hidden_size, config.head_dim, attention)
        self.mlp_norm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.mlp = MLP(config.hidden_size, config.inner_size, config.activation)

    def forward(
        self, x: Float[Tensor, "tokens hidden"], kv: KVPair, batch: Batch
    ) -> Float[Tensor, "tokens hidden"]:
        x = x + self.attention(self.attention_norm(x), kv, batch)
        return x + self.mlp(self.mlp_norm(x))


GPT2_WEIGHTS = WeightMap(
    prefix="transformer.",
    modules={
        "embedding": "wte",
        "position_embedding": "wpe",
        "layers.{i}.attention_norm": "h.{i}.ln_1",
        "layers.{i}.attention.qkv_proj": "h.{i}.attn.c_attn",
        "layers.{i}.attention.o_proj": "h.{i}.attn.c_proj",
        "layers.{i}.mlp_norm": "h.{i}.ln_2",
        "layers.{i}.mlp.up_proj": "h.{i}.mlp.c_fc",
        "layers.{i}.mlp.down_proj": "h.{i}.mlp.c_proj",
        "norm": "ln_f",
        "head": "lm_head",
    },
    # OpenAI implemented these four as convolutions of width 1, which store transposed matrices.
    transposed=frozenset(
        {
            "layers.{i}.attention.qkv_proj",
            "layers.{i}.attention.o_proj",
            "layers.{i}.mlp.up_proj",
            "layers.{i}.mlp.down_proj",
        }
    ),
)
