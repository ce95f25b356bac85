"""Lab 11: classic mistakes, each with the task that it must cost points; and unusual right ones."""

BEGINNING = """
from minipaged.labs.tensor_parallel import rank as library
"""

WRONG = {
    "cut_by_the_other_dimension": (
        1,
        """
def cut_columns(layer, outputs):
    return Linear(layer.weight[:, outputs.start : outputs.stop].clone(), layer.bias)
""",
    ),
    "the_bias_is_not_cut": (
        1,
        """
def cut_columns(layer, outputs):
    return Linear(layer.weight[outputs.start : outputs.stop].clone(), layer.bias)
""",
    ),
    "a_view_of_the_whole_matrix": (
        1,
        """
def cut_columns(layer, outputs):
    which = slice(outputs.start, outputs.stop)
    return Linear(layer.weight[which], None if layer.bias is None else layer.bias[which])
""",
    ),
    "kv_heads_are_not_replicated": (
        1,
        """
def heads_of(config, rank, num_ranks):
    return share(config.num_heads, rank, num_ranks), share(config.num_kv_heads, rank, num_ranks)
""",
    ),
    "every_rank_has_all_kv_heads": (
        1,
        """
def heads_of(config, rank, num_ranks):
    return share(config.num_heads, rank, num_ranks), range(config.num_kv_heads)
""",
    ),
    "the_copied_kv_head_is_always_the_first": (
        1,
        """
def heads_of(config, rank, num_ranks):
    heads = share(config.num_heads, rank, num_ranks)
    if num_ranks > config.num_kv_heads:
        return heads, range(1)
    return heads, share(config.num_kv_heads, rank, num_ranks)
""",
    ),
    "kv_heads_dealt_out_in_turn": (
        1,
        """
def heads_of(config, rank, num_ranks):
    heads, kv_heads = library.heads_of(config, rank, num_ranks)
    if num_ranks > config.num_kv_heads:
        first = rank % config.num_kv_heads
        return heads, range(first, first + 1)
    return heads, kv_heads
""",
    ),
    "heads_for_outputs": (
        1,
        """
def cut_heads(layer, heads, head_dim):
    return cut_columns(layer, heads)
""",
    ),
    "inputs_cut_by_outputs": (
        2,
        """
def cut_rows(layer, inputs):
    return Linear(layer.weight[inputs.start : inputs.stop].clone(), layer.bias)
""",
    ),
    "the_bias_on_every_rank": (
        2,
        """
def row_linear(x, layer):
    out = layer(x)
    dist.all_reduce(out)
    return out
""",
    ),
    "the_bias_on_rank_0_only_and_after_the_sum": (
        2,
        """
def row_linear(x, layer):
    out = F.linear(x, layer.weight)
    dist.all_reduce(out)
    return out + layer.bias if layer.bias is not None and dist.get_rank() == 0 else out
""",
    ),
    "no_bias_at_all": (
        2,
        """
def row_linear(x, layer):
    out = F.linear(x, layer.weight)
    dist.all_reduce(out)
    return out
""",
    ),
    "all_reduce_forgotten": (
        2,
        """
def row_linear(x, layer):
    return layer(x)
""",
    ),
    "reduced_to_rank_0_only": (
        2,
        """
def row_linear(x, layer):
    out = F.linear(x, layer.weight)
    dist.reduce(out, dst=0)
    return out if layer.bias is None else out + layer.bias
""",
    ),
    "all_reduce_on_one_rank_only": (
        2,
        """
def row_linear(x, layer):
    out = F.linear(x, layer.weight)
    if dist.get_rank() == 0:
        dist.all_reduce(out)
    return out if layer.bias is None else out + layer.bias
""",
    ),
    "sums_the_inputs": (
        2,
        """
def row_linear(x, layer):
    dist.all_reduce(x)
    return layer(x)
""",
    ),
    "two_sums_for_one_layer": (
        2,
        """
def row_linear(x, layer):
    out = library.row_linear(x, layer) / dist.get_world_size()
    dist.all_reduce(out)
    return out
""",
    ),
    "odd_vocabulary_without_padding": (
        3,
        """
def cut_vocabulary(embedding, rank, num_ranks):
    length = -(-len(embedding) // num_ranks)
    return embedding[rank * length : (rank + 1) * length].clone()
""",
    ),
    "the_rest_of_the_vocabulary_is_lost": (
        3,
        """
def cut_vocabulary(embedding, rank, num_ranks):
    length = len(embedding) // num_ranks
    return embedding[rank * length : (rank + 1) * length].clone()
""",
    ),
    "other_ranks_tokens_read_row_0": (
        3,
        """
def embed(token_ids, rows):
    local = token_ids - dist.get_rank() * len(rows)
    found = rows[local.where((local >= 0) & (local < len(rows)), 0)]
    dist.all_reduce(found)
    return found
""",
    ),
    "tokens_are_wrapped_round": (
        3,
        """
def embed(token_ids, rows):
    found = rows[token_ids % len(rows)]
    dist.all_reduce(found)
    return found
""",
    ),
    "a_border_one_too_far": (
        3,
        """
def embed(token_ids, rows):
    local = token_ids - dist.get_rank() * len(rows)
    is_here = (local >= 0) & (local <= len(rows))
    found = rows[local.where(is_here, 0).clamp(max=len(rows) - 1)]
    found = found.where(is_here[:, None], 0)
    dist.all_reduce(found)
    return found
""",
    ),
    "negative_rows_are_read_from_the_end": (
        3,
        """
def embed(token_ids, rows):
    local = token_ids - dist.get_rank() * len(rows)
    is_here = local < len(rows)
    found = rows[local.where(is_here, 0)].where(is_here[:, None], 0)
    dist.all_reduce(found)
    return found
""",
    ),
    "embeddings_are_not_summed": (
        3,
        """
def embed(token_ids, rows):
    local = token_ids - dist.get_rank() * len(rows)
    is_here = (local >= 0) & (local < len(rows))
    return rows[local.where(is_here, 0)].where(is_here[:, None], 0)
""",
    ),
    "summed_only_where_a_token_is": (
        3,
        """
def embed(token_ids, rows):
    local = token_ids - dist.get_rank() * len(rows)
    is_here = (local >= 0) & (local < len(rows))
    found = rows[local.where(is_here, 0)].where(is_here[:, None], 0)
    if is_here.any():
        dist.all_reduce(found)
    return found
""",
    ),
    "padding_not_dropped": (
        3,
        """
def gather_logits(hidden, rows, vocab_size):
    return library.gather_logits(hidden, rows, len(rows) * dist.get_world_size())
""",
    ),
    "logits_of_rank_0_only": (
        3,
        """
def gather_logits(hidden, rows, vocab_size):
    return rows @ hidden if dist.get_rank() == 0 else None
""",
    ),
    "logits_for_everyone": (
        3,
        """
def gather_logits(hidden, rows, vocab_size):
    parts = [torch.empty(len(rows)) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, rows @ hidden)
    return torch.cat(parts)[:vocab_size] if dist.get_rank() == 0 else None
""",
    ),
    "a_list_to_gather_in_on_all_ranks": (
        3,
        """
def gather_logits(hidden, rows, vocab_size):
    parts = [torch.empty(len(rows)) for _ in range(dist.get_world_size())]
    dist.gather(rows @ hidden, parts, dst=0)
    return torch.cat(parts)[:vocab_size]
""",
    ),
    "an_extra_sum_that_changes_nothing": (
        4,
        """
class Rank(library.Rank):
    def attention(self, layer, x):
        out = super().attention(layer, x)
        dist.all_reduce(out)
        return out / dist.get_world_size()
""",
    ),
    "a_barrier_in_each_step": (
        4,
        """
class Rank(library.Rank):
    def step(self, token_ids):
        dist.barrier()
        return super().step(token_ids)
""",
    ),
    "the_whole_model_is_kept": (
        4,
        """
class Rank(library.Rank):
    def __init__(self, weights, rank, num_ranks):
        super().__init__(weights, rank, num_ranks)
        self.weights = weights
""",
    ),
    "a_gate_without_its_function": (
        4,
        """
class Rank(library.Rank):
    def mlp(self, layer, x):
        return row_linear(layer.gate(x) * layer.up(x), layer.down)
""",
    ),
    "no_residual": (
        4,
        """
class Rank(library.Rank):
    def step(self, token_ids):
        x = embed(torch.tensor(token_ids), self.rows)
        for layer in self.layers:
            x = self.attention(layer, norm(self.config, x, layer.attention_norm))
            x = x + self.mlp(layer, norm(self.config, x, layer.mlp_norm))
        return gather_logits(norm(self.config, x[-1], self.norm), self.rows, self.config.vocab_size)
""",
    ),
    "the_first_layer_only": (
        4,
        """
class Rank(library.Rank):
    def __init__(self, weights, rank, num_ranks):
        super().__init__(weights, rank, num_ranks)
        del self.layers[1:]
""",
    ),
    "logits_of_the_first_token": (
        4,
        """
class Rank(library.Rank):
    def step(self, token_ids):
        return super().step(token_ids[:1])
""",
    ),
    "only_rank_0_has_residuals_to_add": (
        4,
        """
class Rank(library.Rank):
    def attention(self, layer, x):
        return super().attention(layer, x) if dist.get_rank() == 0 else x * 0
""",
    ),
    "the_stop_message_is_ignored": (
        5,
        """
class Rank(library.Rank):
    def work(self):
        while True:
            self.step(self.receive())
""",
    ),
    "a_worker_of_one_step": (
        5,
        """
class Rank(library.Rank):
    def work(self):
        if token_ids := self.receive():
            self.step(token_ids)
""",
    ),
    "rank_0_does_not_take_part": (
        5,
        """
class Rank(library.Rank):
    def generate(self, prompt, num_tokens):
        self.send(prompt)
        return list(range(num_tokens))
""",
    ),
    "steps_that_are_not_announced": (
        5,
        """
class Rank(library.Rank):
    def generate(self, prompt, num_tokens):
        token_ids = list(prompt)
        for _ in range(num_tokens):
            token_ids.append(int(self.step(token_ids).argmax()))
        return token_ids[len(prompt) :]
""",
    ),
    "the_padding_of_the_message_is_computed": (
        5,
        """
class Rank(library.Rank):
    def receive(self):
        message = torch.zeros(1 + self.config.max_tokens, dtype=torch.int64)
        dist.broadcast(message, src=0)
        return message[1:].tolist() if message[0] else []
""",
    ),
    "zeros_are_taken_for_padding": (
        5,
        """
class Rank(library.Rank):
    def receive(self):
        return [token for token in super().receive() if token]
""",
    ),
    "a_message_as_long_as_its_tokens": (
        5,
        """
class Rank(library.Rank):
    def send(self, token_ids):
        dist.broadcast(torch.tensor([len(token_ids), *token_ids]), src=0)
""",
    ),
    "a_long_message_is_cut_off": (
        5,
        """
class Rank(library.Rank):
    def send(self, token_ids):
        super().send(token_ids[: self.config.max_tokens])
""",
    ),
    "the_same_prompt_again_and_again": (
        5,
        """
class Rank(library.Rank):
    def generate(self, prompt, num_tokens):
        generated = []
        for _ in range(num_tokens):
            self.send(prompt)
            generated.append(int(self.step(prompt).argmax()))
        return generated
""",
    ),
    "a_worker_in_an_endless_loop": (
        5,
        """
class Rank(library.Rank):
    def work(self):
        while True:
            pass
""",
    ),
}

RIGHT = {
    "functions_imported_by_name": """
from torch.distributed import all_reduce, broadcast, gather

def row_linear(x, layer):
    out = x @ layer.weight.T
    work = all_reduce(out, async_op=True)
    work.wait()
    return out if layer.bias is None else out + layer.bias
""",
    "the_bias_is_a_part_of_rank_0": """
def row_linear(x, layer):
    out = layer(x) if dist.get_rank() == 0 else F.linear(x, layer.weight)
    dist.all_reduce(out)
    return out
""",
    "a_product_with_one_hot_tokens": """
def embed(token_ids, rows):
    first = dist.get_rank() * len(rows)
    one_hot = (token_ids[:, None] == torch.arange(first, first + len(rows))).to(rows.dtype)
    out = one_hot @ rows
    dist.all_reduce(out)
    return out
""",
    "outputs_listed_one_by_one": """
def cut_heads(layer, heads, head_dim):
    which = [head * head_dim + i for head in heads for i in range(head_dim)]
    return Linear(layer.weight[which], None if layer.bias is None else layer.bias[which])
""",
    "the_number_of_tokens_comes_last": """
class Rank(library.Rank):
    def send(self, token_ids):
        if len(token_ids) > self.config.max_tokens:
            raise ValueError(len(token_ids))
        message = torch.full((self.config.max_tokens + 1,), -1)
        message[: len(token_ids)] = torch.tensor(token_ids, dtype=torch.int64)
        message[-1] = len(token_ids)
        dist.broadcast(message, 0)

    def receive(self):
        message = torch.empty(self.config.max_tokens + 1, dtype=torch.int64)
        dist.broadcast(message, 0)
        return message[: int(message[-1])].tolist()
""",
}
