"""Stages that fail, for the tests of `minipaged bench gpu`."""

import os
from collections.abc import Iterator
from functools import partial

from minipaged.evaluation.bench.gpu.stage import Part, Setup, Stage

Row = dict[str, int]


def fine(number: int) -> Iterator[Row]:
    yield {"number": number}


def raises() -> Iterator[Row]:
    yield {"number": 1}
    raise ValueError("the kernel is wrong")


def dies() -> Iterator[Row]:
    yield from ()
    os._exit(3)


FINE = [Part(f"part {number}", partial(fine, number)) for number in range(2)]


def raising(setup: Setup) -> list[Part]:
    assert setup.is_dry
    return [Part("wrong", raises), *FINE]


def dying(setup: Setup) -> list[Part]:
    return [Part("death", dies), *FINE]


def listing_fails(setup: Setup) -> list[Part]:
    os._exit(4)


def last(setup: Setup) -> list[Part]:
    return FINE


STAGES = (
    Stage("raising", 100, "", raising),
    Stage("dying", 100, "", dying),
    Stage("listing", 100, "", listing_fails),
    Stage("last", 100, "", last),
)
