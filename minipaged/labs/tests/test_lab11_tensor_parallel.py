"""Lab 11: shards of matrices, sums over two processes, and the loop that drives them.

Each rank is a process. A test fails as soon as a rank waits for a call that another rank never
makes. A rank that never finishes is stopped after PATIENCE seconds, and in later tests after one
second.
"""

import pickle

import pytest
import torch
import torch.nn.functional as F

from minipaged.labs.tensor_parallel.model import (
    Config,
    Linear,
    attend,
    share,
    storyteller,
    whole_logits,
)
from minipaged.labs.tensor_parallel.processes import RanksFailed, run_ranks
from minipaged.utils.counts import counted

from two_ranks import (
    HEADS,
    MODULE,
    embedded,
    gathered,
    keeps_only,
    messages,
    product,
    random_weights,
    same,
    steps,
    stories,
)

PATIENCE = 10.0
PROMPTS = [[3, 1, 4, 1, 5, 9, 2, 6], [31], [0, 15, 16, 31]]

essential = pytest.mark.essential
each_split = pytest.mark.parametrize("num_ranks", [1, 2, 4])
all_heads = pytest.mark.parametrize("heads", HEADS)


def task(number: int) -> pytest.MarkDecorator:
    return pytest.mark.lab(number=11, task=number)


@pytest.fixture
def own(part):
    """`own("cut_rows")`: the student's function, in this process."""
    return lambda name: part(f"{MODULE}.{name}")


@pytest.fixture(scope="module")
def patience() -> list[float]:
    """The time limit for two ranks, in seconds; it is lowered once they have exceeded it."""
    return [PATIENCE]


@pytest.fixture
def ranks(request, custom_parts, patience):
    """`ranks(program, ...)`: runs it in two processes on the student's file; returns reports."""
    parts = list(request.config.getoption("--part") or [])
    file = parts[0].partition("=")[2].rpartition(":")[0] if parts else ""

    def run(program, *args, num_ranks: int = 2):
        try:
            seconds = patience[-1]
            return run_ranks(program, parts, *args, num_ranks=num_ranks, seconds=seconds, file=file)
        except RanksFailed as error:
            if "not done after" in str(error):
                patience.append(1.0)
            return pytest.fail(str(error))

    return run


def numbers(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(11))


def names(report) -> list[str]:
    return [call.name for call in report.calls]


# ---- task 1: cut by outputs ----------------------------------------------------------------------


@task(1)
@essential("the outputs of all ranks, concatenated, must be those of the whole layer (rule 1).")
@each_split
@pytest.mark.parametrize("bias", [numbers(8), None], ids=["bias", "no_bias"])
def test_concatenated_outputs_are_those_of_the_whole_layer(own, num_ranks, bias):
    layer, x = Linear(numbers(8, 6), bias), numbers(5, 6)
    shares = [own("cut_columns")(layer, share(8, rank, num_ranks)) for rank in range(num_ranks)]
    outputs = [one(x) for one in shares]
    assert [out.shape[1] for out in outputs] == [8 // num_ranks] * num_ranks
    same(torch.cat(outputs, dim=1), layer(x), "concatenated outputs of all ranks")


@task(1)
def test_a_share_of_outputs_does_not_keep_the_whole_in_memory(own):
    mine = own("cut_columns")(Linear(numbers(8, 6), numbers(8)), range(2, 4))
    assert keeps_only(mine.weight), "the weight is a view of the whole one"
    assert keeps_only(mine.bias), "the bias is a view of the whole one"


@task(1)
@each_split
@pytest.mark.parametrize("num_kv_heads", [1, 2, 4, 8])
def test_each_query_head_is_on_one_rank(own, num_ranks, num_kv_heads):
    config = Config(32, num_heads=8, num_kv_heads=num_kv_heads, head_dim=4)
    heads = [list(own("heads_of")(config, rank, num_ranks)[0]) for rank in range(num_ranks)]
    assert heads == [list(share(8, rank, num_ranks)) for rank in range(num_ranks)]


@task(1)
@essential("a rank needs the KV heads that its query heads read (rule 2).")
@pytest.mark.parametrize(
    ("num_kv_heads", "num_ranks", "expected"),
    [
        (8, 2, [[0, 1, 2, 3], [4, 5, 6, 7]]),
        (4, 4, [[0], [1], [2], [3]]),
        (2, 2, [[0], [1]]),
        (2, 1, [[0, 1]]),
        (2, 4, [[0], [0], [1], [1]]),
        (1, 2, [[0], [0]]),
        (2, 8, [[0]] * 4 + [[1]] * 4),
    ],
    ids=lambda value: f"{value}" if isinstance(value, int) else "heads",
)
def test_kv_heads_follow_their_query_heads(own, num_kv_heads, num_ranks, expected):
    config = Config(32, num_heads=8, num_kv_heads=num_kv_heads, head_dim=4)
    kv_heads = [list(own("heads_of")(config, rank, num_ranks)[1]) for rank in range(num_ranks)]
    assert kv_heads == expected, f"8 query heads over {num_kv_heads} KV heads, on {num_ranks} ranks"


@task(1)
def test_a_head_is_cut_with_its_bias(own):
    layer = Linear(torch.arange(24.0).view(12, 2), torch.arange(12.0))
    mine = own("cut_heads")(layer, range(1, 3), 3)
    assert mine.bias.tolist() == [3, 4, 5, 6, 7, 8]
    assert mine.weight[:, 0].tolist() == [6, 8, 10, 12, 14, 16]


@task(1)
@all_heads
@pytest.mark.parametrize("num_ranks", [2, 4])
def test_concatenated_attention_outputs_are_those_of_the_whole(own, heads, num_ranks):
    config, x = HEADS[heads], numbers(5, 24)
    layer = random_weights(config).layers[0]
    outputs = []
    for rank in range(num_ranks):
        q_heads, kv_heads = own("heads_of")(config, rank, num_ranks)
        of_heads = (layer.q, q_heads), (layer.k, kv_heads), (layer.v, kv_heads)
        q, k, v = (own("cut_heads")(one, each, config.head_dim)(x) for one, each in of_heads)
        outputs.append(attend(config, q, k, v))
    whole = attend(config, layer.q(x), layer.k(x), layer.v(x))
    same(torch.cat(outputs, dim=1), whole, "concatenated attention outputs of all ranks")


# ---- task 2: cut by inputs, and sum --------------------------------------------------------------


@task(2)
@each_split
def test_the_results_of_all_ranks_add_up_to_the_whole(own, num_ranks):
    layer, x = Linear(numbers(6, 8)), numbers(5, 8)
    mine = [share(8, rank, num_ranks) for rank in range(num_ranks)]
    parts = [F.linear(x[:, m.start : m.stop], own("cut_rows")(layer, m).weight) for m in mine]
    same(torch.stack(parts).sum(dim=0), layer(x), "sum of the products of all ranks")


@task(2)
def test_a_share_of_inputs_does_not_keep_the_whole_in_memory(own):
    mine = own("cut_rows")(Linear(numbers(6, 8)), range(2, 4))
    assert keeps_only(mine.weight), "the weight is a view of the whole one"


@task(2)
@essential("each rank must end with the sum over all ranks (rule 3).")
def test_every_rank_has_the_whole_output(ranks):
    layer, x = Linear(numbers(6, 8)), numbers(5, 8)
    for rank, report in enumerate(ranks(product, x, layer)):
        same(report.value[0], layer(x), f"output on rank {rank}")


@task(2)
@essential("the bias must be added once, not once per rank (rule 4).")
def test_the_bias_is_added_once(ranks):
    layer = Linear(torch.zeros(3, 4), torch.tensor([1.0, 2.0, 3.0]))
    for rank, report in enumerate(ranks(product, numbers(1, 4), layer)):
        out = report.value[0]
        assert out.tolist() == [[1, 2, 3]], f"bias of [1, 2, 3], weights of 0, on rank {rank}"


@task(2)
def test_the_inputs_are_not_modified(ranks):
    x = numbers(5, 8)
    for rank, report in enumerate(ranks(product, x, Linear(numbers(8, 8), numbers(8)))):
        same(report.value[1], x[:, 4 * rank : 4 * rank + 4], f"inputs of rank {rank} afterwards")


@task(2)
def test_a_layer_needs_one_sum(ranks):
    for report in ranks(product, numbers(5, 8), Linear(numbers(6, 8), numbers(6))):
        assert names(report) == ["all_reduce"], "collectives of one layer"


# ---- task 3: cut the vocabulary ------------------------------------------------------------------


@task(3)
@pytest.mark.parametrize(("vocab_size", "num_ranks"), [(8, 1), (8, 2), (9, 2), (765, 2), (5, 4)])
def test_all_ranks_have_the_same_number_of_rows(own, vocab_size, num_ranks):
    table = numbers(vocab_size, 3)
    shares = [own("cut_vocabulary")(table, rank, num_ranks) for rank in range(num_ranks)]
    assert [len(rows) for rows in shares] == [-(-vocab_size // num_ranks)] * num_ranks
    rows = torch.cat(shares)
    same(rows[:vocab_size], table, "rows of all ranks in order")
    assert rows[vocab_size:].count_nonzero() == 0, "elements of the padding that are not 0"


@task(3)
@essential("a token of another rank must contribute zeros here (rule 5).")
def test_every_token_is_found_on_any_rank(ranks):
    table, token_ids = numbers(16, 3), torch.tensor([0, 7, 8, 15, 3, 12, 3])
    for rank, report in enumerate(ranks(embedded, token_ids, table)):
        same(report.value, table[token_ids], f"embeddings on rank {rank}")


@task(3)
def test_tokens_of_an_odd_vocabulary_are_found(ranks):
    table, token_ids = numbers(15, 3), torch.tensor([0, 7, 8, 14, 6])
    for rank, report in enumerate(ranks(embedded, token_ids, table)):
        same(report.value, table[token_ids], f"embeddings on rank {rank}")


@task(3)
@pytest.mark.parametrize("token_ids", [[1, 2, 0], [14, 9]], ids=["the_first", "the_second"])
def test_one_rank_may_own_all_the_tokens(ranks, token_ids):
    table = numbers(16, 3)
    for rank, report in enumerate(ranks(embedded, torch.tensor(token_ids), table)):
        same(report.value, table[token_ids], f"embeddings on rank {rank}")


@task(3)
def test_logits_of_the_whole_vocabulary_are_on_rank_0_only(ranks):
    hidden, table = numbers(6), numbers(16, 6)
    first, second = ranks(gathered, hidden, table)
    same(first.value, table @ hidden, "logits on rank 0")
    assert second.value is None, "logits on rank 1, which samples nothing"


@task(3)
@essential("a padded row is not a token and must never be sampled (rule 6).")
def test_logits_of_the_padding_are_dropped(ranks):
    """All logits are negative, so a padded row, whose logit is 0, would have the largest."""
    hidden, table = numbers(6).abs(), -numbers(15, 6).abs()
    first, _ = ranks(gathered, hidden, table)
    assert len(first.value) == 15, "logits of a vocabulary of 15 tokens"
    same(first.value, table @ hidden, "logits on rank 0")


@task(3)
def test_an_embedding_needs_one_sum_and_logits_one_gather(ranks):
    table = numbers(16, 6)
    for report in ranks(embedded, torch.tensor([1, 9]), table):
        assert names(report) == ["all_reduce"], "collectives of `embed`"
    for report in ranks(gathered, numbers(6), table):
        assert names(report) == ["gather"], "collectives of `gather_logits`"


# ---- task 4: compute a step ----------------------------------------------------------------------


@task(4)
@essential("two ranks must compute the logits of one process, up to rounding.")
@all_heads
def test_two_ranks_give_the_logits_of_one_process(ranks, heads):
    weights = random_weights(HEADS[heads])
    first, second = ranks(steps, weights, PROMPTS)
    for prompt, yours in zip(PROMPTS, first.value, strict=True):
        same(yours, whole_logits(weights, prompt), f"logits after tokens {prompt}")
    assert second.value == [None] * len(PROMPTS), "what `step` returns on rank 1"


@task(4)
@essential("a rank must store only its share of the weights.")
def test_a_rank_stores_about_half_of_the_model(part):
    weights = storyteller()
    one = part("rank")(weights, 1, 2)
    stored, whole = len(pickle.dumps(vars(one))), len(pickle.dumps(weights))
    assert stored < 0.6 * whole, "bytes stored on one of two ranks, against 60 % of the model"


@task(4)
@pytest.mark.parametrize("num_ranks", [1, 4])
def test_any_number_of_ranks_gives_the_same_logits(ranks, num_ranks):
    weights = random_weights(HEADS["odd_vocabulary"], bias=False)
    reports = ranks(steps, weights, PROMPTS, num_ranks=num_ranks)
    for prompt, yours in zip(PROMPTS, reports[0].value, strict=True):
        same(yours, whole_logits(weights, prompt), f"logits after tokens {prompt}")


@task(4)
@essential("a step needs only two sums per layer, one for the embedding and one gather.")
@pytest.mark.parametrize("num_layers", [1, 3])
def test_a_step_needs_two_sums_per_layer(ranks, num_layers):
    weights = random_weights(HEADS["fewer_kv_heads"], num_layers)
    for report in ranks(steps, weights, PROMPTS[:1]):
        counts = {name: names(report).count(name) for name in names(report)}
        expected = {"all_reduce": 2 * num_layers + 1, "gather": 1}
        assert counts == expected, f"collectives of a step with {counted(num_layers, 'layer')}"


# ---- task 5: run the loop ------------------------------------------------------------------------


@task(5)
@essential("a worker must end at the stop message, or its process never exits (rule 8).")
def test_a_worker_ends_at_the_stop_message(ranks):
    weights = random_weights(HEADS["fewer_kv_heads"])
    for report in ranks(stories, weights, []):
        assert names(report) == ["broadcast"], "collectives up to the stop message"


@task(5)
def test_a_message_has_its_tokens_and_no_others(ranks):
    weights = random_weights(HEADS["fewer_kv_heads"])
    sent = [[5, 3, 5], [0], list(range(32)) * 2, [0, 0], []]
    _, second = ranks(messages, weights, sent)
    assert [list(each) for each in second.value] == sent, "what rank 1 received"
    assert names(second) == ["broadcast"] * len(sent), "one collective for each message"


@task(5)
def test_a_message_that_is_too_long_is_refused_before_it_is_sent(part):
    one = part("rank")(random_weights(HEADS["fewer_kv_heads"]), 0, 2)
    with pytest.raises(ValueError) as raised:  # noqa: PT011  the student chooses the message
        one.send([1] * 65)
    assert "process group" not in str(raised.value), "it was sent, in a process without a group"


@task(5)
@essential("two ranks must generate what one process generates.")
@all_heads
def test_two_ranks_generate_the_tokens_of_one_process(ranks, heads):
    weights = random_weights(HEADS[heads])
    first, _ = ranks(stories, weights, [(prompt, 6) for prompt in PROMPTS])
    assert first.value == [greedy(weights, prompt, 6) for prompt in PROMPTS]


@task(5)
def test_each_step_and_the_stop_have_one_message(ranks):
    weights = random_weights(HEADS["odd_vocabulary"])
    for report in ranks(stories, weights, [([1, 2], 3)]):
        one_step = ["broadcast", *["all_reduce"] * 5, "gather"]
        assert names(report) == [*one_step * 3, "broadcast"], "collectives of three steps"


@task(5)
def test_the_storyteller_generates_the_same_tokens_on_two_ranks(ranks):
    weights = storyteller()
    prompt = [364, 329, 260, 335]
    first, _ = ranks(stories, weights, [(prompt, 12)])
    assert first.value == [greedy(weights, prompt, 12)]


def greedy(weights, prompt: list[int], num_tokens: int) -> list[int]:
    """What one process generates."""
    token_ids = list(prompt)
    for _ in range(num_tokens):
        token_ids.append(int(whole_logits(weights, token_ids).argmax()))
    return token_ids[len(prompt) :]
