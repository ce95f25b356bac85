"""The labs, in the order of the tutorials' chapters. Each has its own file."""

from minipaged.errors import InvalidOption
from minipaged.labs import (
    challenge,
    lab1_allocator,
    lab2_block_tables,
    lab3_paged_attention,
    lab4_scheduler,
    lab5_sharing,
    lab6_prefix_cache,
    lab7_swapping,
    lab8_triton_decode,
    lab10_router,
    lab11_tensor_parallel,
)
from minipaged.labs.lab import Lab

LABS: tuple[Lab, ...] = (
    lab1_allocator.LAB,
    lab2_block_tables.LAB,
    lab3_paged_attention.LAB,
    lab4_scheduler.LAB,
    lab5_sharing.LAB,
    lab6_prefix_cache.LAB,
    lab7_swapping.LAB,
    lab8_triton_decode.LAB,
    lab10_router.LAB,
    lab11_tensor_parallel.LAB,
)


def find_lab(number: int) -> Lab:
    """The lab of this number. Raises InvalidOption."""
    for lab in LABS:
        if lab.number == number:
            return lab
    if number == challenge.NUMBER:
        raise InvalidOption(
            f"lab {number} is the open challenge, which has no tasks and no points: "
            "run `minipaged lab challenge`."
        )
    raise InvalidOption(
        f"there is no lab {number}: `minipaged lab list` shows labs 1 to {LABS[-1].number}."
    )
