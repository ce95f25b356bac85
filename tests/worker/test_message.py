"""The message of a step: what goes in comes out, and few bytes are sent."""

from hypothesis import given
from hypothesis import strategies as st

from minipaged.scheduler.output import SequenceInput, StepInput
from minipaged.worker.message import StepDecoder, StepEncoder

numbers = st.integers(0, 2**31 - 1)
pairs = st.lists(st.tuples(numbers, numbers), max_size=3).map(tuple)
# Few ids and blocks, so that tables of one sequence often share a prefix, shrink and return.
blocks = st.lists(st.integers(0, 3), max_size=6)
sequences = st.builds(
    SequenceInput,
    st.integers(0, 4),
    st.lists(numbers, min_size=1, max_size=4),
    numbers,
    blocks,
    st.integers(1, 4),
)
steps = st.builds(
    StepInput,
    st.lists(sequences, max_size=5, unique_by=lambda each: each.seq_id).map(tuple),
    pairs,
    pairs,
    pairs,
)


@given(st.lists(steps, max_size=6))
def test_every_step_arrives_as_it_was_sent(run):
    encoder, decoder = StepEncoder(), StepDecoder()
    for step in run:
        message = encoder.encode(step)
        assert all(0 <= number < 2**31 for number in message)
        assert decoder.decode(message) == step


def decode_step(num_sequences: int, context_len: int) -> StepInput:
    num_blocks = context_len // 16 + 1
    return StepInput(
        tuple(
            SequenceInput(
                seq, [17], context_len, list(range(num_blocks * seq, num_blocks * (seq + 1)))
            )
            for seq in range(num_sequences)
        )
    )


def test_a_block_table_is_sent_once_and_then_only_its_changes():
    encoder = StepEncoder()
    first = encoder.encode(decode_step(64, 1000))
    later = encoder.encode(decode_step(64, 1000))
    assert len(first) - len(later) == 64 * 63
    assert 4 * len(later) <= 2_000  # bytes


def test_a_table_of_a_sequence_that_missed_a_step_is_sent_again():
    encoder = StepEncoder()
    first = encoder.encode(decode_step(2, 100))
    encoder.encode(decode_step(1, 100))
    assert encoder.encode(decode_step(2, 100))[-7:] == first[-7:]


def test_a_table_with_a_replaced_block_is_sent_from_that_block_on():
    encoder, decoder = StepEncoder(), StepDecoder()
    before, after = list(range(100)), [*range(98), 500, 99, 100]
    for table in (before, after):
        step = StepInput((SequenceInput(7, [17], 1600, table),))
        message = encoder.encode(step)
        assert decoder.decode(message) == step
    assert message[-4:] == [17, 500, 99, 100]


def test_of_a_table_that_has_become_shorter_no_block_is_sent():
    encoder = StepEncoder()
    for table in ([1, 2, 3], [1, 2]):
        message = encoder.encode(StepInput((SequenceInput(7, [17], 1600, table),)))
    assert message[-1] == 17
