"""The model as it is trained: LLaMA, dense and without a cache; and its export.

Module names are those of Hugging Face's checkpoints, so that to export it is only to write a file.
"""

import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import tiktoken
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn


@dataclass(frozen=True)
class Shape:
    vocab_size: int
    hidden_size: int = 256
    intermediate_size: int = 384
    num_hidden_layers: int = 4
    num_attention_heads: int = 4
    num_key_value_heads: int = 2
    head_dim: int = 64
    max_position_embeddings: int = 1024
    rope_theta: float = 500_000.0  # half the pairs hardly turn in 1,024 tokens: they see far back
    rms_norm_eps: float = 1e-5


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """RoPE as in Hugging Face's LLaMA: dimension i turns with dimension i + head_dim / 2."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


class Attention(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.head_dim = shape.head_dim
        q_size = shape.num_attention_heads * shape.head_dim
        kv_size = shape.num_key_value_heads * shape.head_dim
        self.q_proj = nn.Linear(shape.hidden_size, q_size, bias=False)
        self.k_proj = nn.Linear(shape.hidden_size, kv_size, bias=False)
        self.v_proj = nn.Linear(shape.hidden_size, kv_size, bias=False)
        self.o_proj = nn.Linear(q_size, shape.hidden_size, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        heads = (*x.shape[:2], -1, self.head_dim)
        q = self.q_proj(x).view(heads).transpose(1, 2)  # [batch, heads, time, head_dim]
        k = self.k_proj(x).view(heads).transpose(1, 2)  # [batch, kv_heads, time, head_dim]
        v = self.v_proj(x).view(heads).transpose(1, 2)
        group = q.shape[1] // k.shape[1]
        k = rotate(k, cos, sin).repeat_interleave(group, dim=1)
        v = v.repeat_interleave(group, dim=1)
        y = F.scaled_dot_product_attention(rotate(q, cos, sin), k, v, is_causal=True)
        return self.o_proj(y.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(shape.hidden_size, shape.intermediate_size, bias=False)
        self.up_proj = nn.Linear(shape.hidden_size, shape.intermediate_size, bias=False)
        self.down_proj = nn.Linear(shape.intermediate_size, shape.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.input_layernorm = nn.RMSNorm(shape.hidden_size, shape.rms_norm_eps)
        self.self_attn = Attention(shape)
        self.post_attention_layernorm = nn.RMSNorm(shape.hidden_size, shape.rms_norm_eps)
        self.mlp = MLP(shape)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin)
        return x + self.mlp(self.post_attention_layernorm(x))


class Storyteller(nn.Module):
    """Token ids in, logits out; the embedding is also the output matrix (tied)."""

    cos: Tensor
    sin: Tensor

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.embed_tokens = nn.Embedding(shape.vocab_size, shape.hidden_size)
        self.layers = nn.ModuleList(Layer(shape) for _ in range(shape.num_hidden_layers))
        self.norm = nn.RMSNorm(shape.hidden_size, shape.rms_norm_eps)
        half = torch.arange(0, shape.head_dim, 2) / shape.head_dim
        angles = torch.outer(
            torch.arange(shape.max_position_embeddings).float(), shape.rope_theta**-half
        )
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)
        self.apply(self.initialise)

    def initialise(self, module: nn.Module) -> None:
        if isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=0.02)
        elif isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=0.5 * module.in_features**-0.5)

    def forward(self, token_ids: Tensor) -> Tensor:
        time_steps = token_ids.shape[1]
        cos, sin = self.cos[:time_steps], self.sin[:time_steps]
        x = self.embed_tokens(token_ids)  # [batch, time, hidden]
        for layer in self.layers:
            x = layer(x, cos, sin)
        return F.linear(self.norm(x), self.embed_tokens.weight)  # [batch, time, vocab]


# ---- export: a folder that any reader of Hugging Face's LLaMA checkpoints understands -----------

# A chat is a story (the system's turn) and then questions and answers, as in training.
CHAT_TEMPLATE = """\
{%- for message in messages -%}
{%- if message.role == "system" %}{{ message.content }}
{%- elif message.role == "user" %}{{ "\\nQ: " + message.content }}
{%- else %}{{ "\\nA: " + message.content + "<|endoftext|>" }}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt %}{{ "\\nA:" }}{% endif -%}
"""


def export(model: Storyteller, encoding: tiktoken.Encoding, out: Path) -> None:
    tensors = {f"model.{name}": w.half().contiguous() for name, w in model.state_dict().items()}
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        **asdict(model.shape),
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": True,
        "bos_token_id": None,
        "eos_token_id": encoding.eot_token,
        "torch_dtype": "float16",
    }
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    (out / "chat_template.jinja").write_text(CHAT_TEMPLATE)


def load_model(folder: Path) -> Storyteller:
    """The exported model, in float32 arithmetic with the weights as rounded for shipping."""
    config = json.loads((folder / "config.json").read_text())
    model = Storyteller(Shape(**{f.name: config[f.name] for f in fields(Shape)}))
    tensors = load_file(folder / "model.safetensors")
    model.load_state_dict({name.removeprefix("model."): t for name, t in tensors.items()})
    return model.float()
