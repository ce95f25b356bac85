"""The model of `minipaged bench engine` as a GGUF file, which llama.cpp reads.

A GGUF file has a header, key-value pairs, a description of each tensor, and the tensors. Numbers
are little-endian, and a tensor starts at a multiple of 32 bytes
(https://github.com/ggml-org/ggml/blob/master/docs/gguf.md).
"""

import json
import struct
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors.torch import load_file
from torch import Tensor

ALIGNMENT = 32
_TENSOR_TYPES = {torch.float32: 0, torch.float16: 1}
_VALUE_TYPES = {int: (4, "<I"), float: (6, "<f")}
_STRING, _ARRAY = 8, 9
_NORMAL_TOKEN = 1
_NAMES = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
_NAMES_IN_LAYER = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def write_gguf(folder: Path, dtype: torch.dtype) -> Path:
    """Write the LLaMA checkpoint in `folder` to a file there; matrices are stored in `dtype`."""
    hf: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    tensors: dict[str, Tensor] = {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        tensors[_rename(name)] = _reorder_heads(name, tensor, hf).to(
            dtype if tensor.ndim == 2 else torch.float32
        )
    metadata = _metadata(hf, dtype)
    file = folder / f"{str(dtype).removeprefix('torch.')}.gguf"
    with file.open("wb") as out:
        out.write(b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(metadata)))
        for key, value in metadata.items():
            _write_string(out, key)
            _write_value(out, value)
        offset = 0
        for name, tensor in tensors.items():
            _write_string(out, name)
            sizes = tensor.shape[::-1]  # the innermost dimension first
            out.write(struct.pack(f"<I{len(sizes)}Q", len(sizes), *sizes))
            out.write(struct.pack("<IQ", _TENSOR_TYPES[tensor.dtype], offset))
            offset = _aligned(offset + tensor.nbytes)
        for tensor in tensors.values():
            out.write(bytes(_aligned(out.tell()) - out.tell()))
            out.write(tensor.numpy().tobytes())
    return file


def _aligned(offset: int) -> int:
    return -(-offset // ALIGNMENT) * ALIGNMENT


def _rename(name: str) -> str:
    if name in _NAMES:
        return _NAMES[name]
    _, _, layer, rest = name.split(".", 3)  # model.layers.0.mlp.up_proj.weight
    return f"blk.{layer}.{_NAMES_IN_LAYER[rest.removesuffix('.weight')]}.weight"


def _reorder_heads(name: str, tensor: Tensor, hf: dict[str, Any]) -> Tensor:
    """Heads of queries and keys: llama.cpp rotates neighbours (0, 1), not both halves (0, d/2)."""
    for part, heads in (("q_proj", "num_attention_heads"), ("k_proj", "num_key_value_heads")):
        if part in name:
            halves = tensor.view(hf[heads], 2, -1, tensor.shape[1])
            return halves.transpose(1, 2).reshape(tensor.shape)
    return tensor


def _metadata(hf: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    vocab_size = hf["vocab_size"]
    head_dim = hf["hidden_size"] // hf["num_attention_heads"]
    return {
        "general.architecture": "llama",
        "general.file_type": 0 if dtype is torch.float32 else 1,
        "llama.block_count": hf["num_hidden_layers"],
        "llama.context_length": hf["max_position_embeddings"],
        "llama.embedding_length": hf["hidden_size"],
        "llama.feed_forward_length": hf["intermediate_size"],
        "llama.attention.head_count": hf["num_attention_heads"],
        "llama.attention.head_count_kv": hf["num_key_value_heads"],
        "llama.attention.layer_norm_rms_epsilon": hf["rms_norm_eps"],
        "llama.rope.dimension_count": head_dim,
        "llama.rope.freq_base": 10_000.0,
        "llama.vocab_size": vocab_size,
        # Prompts are token ids, but a vocabulary is required: "<0>", "<1>", ...
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": [f"<{token}>" for token in range(vocab_size)],
        "tokenizer.ggml.token_type": [_NORMAL_TOKEN] * vocab_size,
        "tokenizer.ggml.merges": ["< 0"],
        "tokenizer.ggml.bos_token_id": 0,
        "tokenizer.ggml.eos_token_id": 0,
        "tokenizer.ggml.padding_token_id": 0,
    }


def _write_value(out: BinaryIO, value: Any) -> None:
    if isinstance(value, list):
        kind = _STRING if isinstance(value[0], str) else 5
        out.write(struct.pack("<IIQ", _ARRAY, kind, len(value)))
        for one in value:
            _write_string(out, one) if kind == _STRING else out.write(struct.pack("<i", one))
    elif isinstance(value, str):
        out.write(struct.pack("<I", _STRING))
        _write_string(out, value)
    else:
        kind, form = _VALUE_TYPES[type(value)]
        out.write(struct.pack("<I", kind) + struct.pack(form, value))


def _write_string(out: BinaryIO, text: str) -> None:
    encoded = text.encode()
    out.write(struct.pack("<Q", len(encoded)) + encoded)
