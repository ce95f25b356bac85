"""OPT: GPT-2's architecture with ReLU, separate q, k and v projections, and shifted positions.

"OPT: Open Pre-trained Transformer Language Models" (arXiv 2205.01068), the model of most
experiments in the PagedAttention paper. Logits agree with Hugging Face's `transformers`.

OPT-350m is the only size with other options: its norms come after each half of a layer instead of
before it, and its token embedding is narrower than the layers.

Read the file in the order in which a token passes through it, starting with `OPT.forward`.
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
    read_int,
    require_option,
)
from minipaged.models.layers import MLP, MultiHeadAttention
from minipaged.models.linear import Linear
from minipaged.utils.shapes import Float, Int

# Position 0 is row 2 of the table: in training, row 1 was for padding and row 0 was unused.
POSITION_OFFSET = 2


@dataclass(frozen=True, kw_only=True)
class OPTConfig(ModelConfig):
    """The sizes and options of one OPT model."""

    inner_size: int
    embedding_size: int  # 512 in OPT-350m, otherwise the hidden size
    norm_first: bool = True  # False (OPT-350m): norms come after each half of a layer
    activation: str = "relu"
    tied: bool = True  # the embedding is also the output matrix

    @classmethod
    def from_hf(cls, hf: HFConfig) -> "OPTConfig":
        """Read a parsed config.json of OPT.

        Raises:
            CheckpointError: a value is missing or invalid.
            UnsupportedModel: an option is not supported.
        """
        hidden_size, num_heads = read_int(hf, "hidden_size"), read_int(hf, "num_attention_heads")
        require_option(hf, "_remove_final_layer_norm", False)
        require_option(hf, "enable_bias", True)
        require_option(hf, "layer_norm_elementwise_affine", True)
        return cls(
            architecture=read_architecture(hf),
            num_layers=read_int(hf, "num_hidden_layers"),
            num_heads=num_heads,
            num_kv_heads=num_heads,
            head_dim=divide_heads(hidden_size, num_heads),
            hidden_size=hidden_size,
            vocab_size=read_int(hf, "vocab_size"),
            max_position_embeddings=read_int(hf, "max_position_embeddings"),
            eos_token_ids=read_eos_token_ids(hf),
            inner_size=read_int(hf, "ffn_dim"),
            embedding_size=read_int(hf, "word_embed_proj_dim", hidden_size),
            norm_first=hf.get("do_layer_norm_before") is not False,  # absent, null: before
            activation=str(hf.get("activation_function", "relu")),
            tied=bool(hf.get("tie_word_embeddings", True)),
        )


class OPT(Model):
    """The whole model: embeddings of token and position, layers, norm, head."""

    def __init__(self, config: OPTConfig, attention: AttentionBackend) -> None:
        super().__init__()
        self.config = config
        hidden, narrow = config.hidden_size, config.embedding_size
        projects = narrow != hidden
        self.embedding = nn.Embedding(config.vocab_size, narrow)
        self.project_in = Linear(narrow, hidden, bias=False) if projects else nn.Identity()
        num_rows = config.max_position_embeddings + POSITION_OFFSET
        self.position_embedding = nn.Embedding(num_rows, hidden)
        self.layers = nn.ModuleList(Layer(config, attention) for _ in range(config.num_layers))
        # With norms after each half, the last layer already ends with one.
        self.norm = nn.LayerNorm(hidden) if config.norm_first else nn.Identity()
        self.project_out = Linear(hidden, narrow, bias=False) if projects else nn.Identity()
        self.head = None if config.tied else Linear(narrow, config.vocab_size, bias=False)

    def forward(
        self,
        token_ids: Int[Tensor, " tokens"],
        positions: Int[Tensor, " tokens"],
        kv_cache: Cache,
        batch: Batch,
    ) -> Float[Tensor, "tokens hidden"]:
        """One step; see `Model.forward`."""
        places = self.position_embedding(positions + POSITION_OFFSET)  # [tokens, hidden]
        x = self.project_in(self.embedding(token_ids)) + places  # [tokens, hidden]
        for layer, kv in zip(self.layers, kv_cache.layers, strict=True):
            x = layer(x, kv, batch)
        return self.norm(x)

    def logits(self, hidden: Float[Tensor, "rows hidden"]) -> Float[Tensor, "rows vocab"]:
        """Scores of all tokens; see `Model.logits`."""
        hidden = self.project_out(hidden)  # [rows, embedding_size]
        if self.head is None:  # tied
            return F.linear(hidden, self.embedding.weight)  # [rows, vocab]
        return self.head(hidden)  # [rows, vocab]


class Layer(nn.Module):
    """Attention, then the feed-forward, each added to its input, with a norm before or after.

    Before: each half reads a normalised copy of its input, and the residual itself is never
    normalised. After, as in "Attention Is All You Need": the sum is normalised.
    """

    def __init__(self, config: OPTConfig, attention: AttentionBackend) -> None:
        super().__init__()
        self.norm_first = config.norm_first
        self.attention_norm = nn.LayerNorm(config.hidden_size)
        self.attention = MultiHeadAttention(config.hidden_size, config.head_dim, attention)
        self.mlp_norm = nn.LayerNorm(config.hidden_size)
        self.mlp = MLP(config.hidden_size, config.inner_size, config.activation)

    def forward(
        self, x: Float[Tensor, "tokens hidden"], kv: KVPair, batch: Batch
    ) -> Float[Tensor, "tokens hidden"]:
        if self.norm_first:
            x = x + self.attention(self.attention_norm(x), kv, batch)
            return x + self.mlp(self.mlp_norm(x))
        x = self.attention_norm(x + self.attention(x, kv, batch))
        return self.mlp_norm(x + self.mlp(x))


OPT_WEIGHTS = WeightMap(
    prefix="model.",
    modules={
        "embedding": "decoder.embed_tokens",
        "project_in": "decoder.project_in",
        "position_embedding": "decoder.embed_positions",
        "layers.{i}.attention_norm": "decoder.layers.{i}.self_attn_layer_norm",
        "layers.{i}.attention.qkv_proj": (
            "decoder.layers.{i}.self_attn.q_proj",
            "decoder.layers.{i}.self_attn.k_proj",
            "decoder.layers.{i}.self_attn.v_proj",
        ),
        "layers.{i}.attention.o_proj": "decoder.layers.{i}.self_attn.out_proj",
        # This "final" norm belongs to the layer: it is the norm of the feed-forward.
        "layers.{i}.mlp_norm": "decoder.layers.{i}.final_layer_norm",
        "layers.{i}.mlp.up_proj": "decoder.layers.{i}.fc1",
        "layers.{i}.mlp.down_proj": "decoder.layers.{i}.fc2",
        "norm": "decoder.final_layer_norm",
        "project_out": "decoder.project_out",
        "head": "lm_head",
    },
)
