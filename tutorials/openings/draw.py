"""Draws the opening picture of every chapter: its one idea at a glance.

    python tutorials/openings/draw.py

writes 00.svg, 01.svg and so on into this folder. One function draws one chapter. The first line of
its docstring is the caption of the picture, which the chapter repeats. The rest describes the
picture to readers who do not see it.
"""

import inspect
from collections.abc import Callable
from pathlib import Path

from shapes import NORMAL, SHARED, SMALL, Picture


def first_run(p: Picture) -> None:
    """Each step of the engine gives every running request its next token.

    Three prompts, A, B and C, enter one box, the engine. A row of three tokens comes out for each,
    one per step: in the park; a white key; Theo the frog.
    """
    answers = ("in the park", "a white key", "Theo the frog")
    for row, (owner, words) in enumerate(zip("ABC", answers, strict=True)):
        y = 46 + 60 * row
        p.box(16, y, 96, 40, f"prompt {owner}", owner)
        p.arrow((116, y + 20), (156, y + 20))
        p.arrow((254, y + 20), (290, y + 20))
        p.slots(296, y, 3 * owner, 56, 40, words.split())
    p.box(160, 34, 90, 184, "engine")
    for step in range(3):
        p.label(324 + 56 * step, 24, f"step {step + 1}", size=SMALL)


def the_kv_cache(p: Picture) -> None:
    """A new token attends to all tokens so far. Only its own key and value are new.

    Five tokens in a row, each with a box for its key and value below. Arrows lead from the last
    token to all five boxes. The first four boxes are kept from earlier steps.
    """
    for index, word in enumerate("once upon a time there".split()):
        x, new = 15 + 91 * index, index == 4
        p.box(x, 20, 86, 36, word, "B" if new else "none")
        p.box(x, 140, 86, 44, "key, value", "B" if new else "A", SMALL)
        p.arrow((422, 60), (x + 43, 136))
    p.arrow((16, 200), (364, 200), both=True)
    p.label(190, 220, "kept from earlier steps")
    p.label(422, 220, "new")


def the_memory_problem(p: Picture) -> None:
    """The same memory, reserved for the longest outputs and divided into blocks.

    Above, the memory has three regions, for A, B and C. Each is mostly empty. Below, blocks of A to
    E fill it almost completely.
    """
    p.label(16, 24, "reserved: three requests, mostly empty", "start")
    for index, (owner, width) in enumerate((("A", 42), ("B", 30), ("C", 54))):
        x = 16 + 150 * index
        p.box(x, 42, 148, 60)
        p.box(x, 42, width, 60, owner, owner)
    p.label(16, 138, "in blocks: more requests, almost full", "start")
    for row, owners in enumerate(("ADBECADC", "BADECEB.")):
        p.slots(16, 156 + 34 * row, owners, 56, 34, owners)


def blocks_and_block_tables(p: Picture) -> None:
    """The block table maps A's logical blocks to blocks anywhere in the pool.

    At the left are three logical blocks of A, 0 to 2. In the middle is the block table with the
    numbers 6, 1 and 3. At the right is a pool of eight physical blocks. Arrows lead from the table
    to blocks 6, 1 and 3, which belong to A. Two other blocks belong to B.
    """
    for x, text in ((66, "logical"), (206, "block table"), (406, "physical")):
        p.label(x, 20, text)
    for logical, physical in enumerate((6, 1, 3)):
        y = 56 + 58 * logical
        p.box(16, y, 100, 40, f"A, block {logical}", "A")
        p.arrow((120, y + 20), (176, y + 20))
        p.box(180, y, 52, 40, str(physical))
        p.arrow((236, y + 20), (346, 48 + 25 * physical))
    for physical, owner in enumerate(".A.AB.AB"):
        text = f"{physical}: {owner}".strip(": .")
        p.slots(350, 36 + 25 * physical, owner, 114, 25, [text])


def paged_attention(p: Picture) -> None:
    """The query of C reads C's blocks in table order and updates one result.

    Six physical blocks are in a row. The table of C lists blocks 2, 3 and 5; the last one has two
    empty slots. From each of the three an arrow leads down to the maximum, total and output so far.
    """
    p.box(16, 16, 104, 40, "query of C", "C")
    p.arrow((124, 36), (208, 36))
    p.label(264, 36, "table", "end")
    p.slots(276, 16, "...", 44, 40, "235", NORMAL)
    for physical, contents in enumerate(("AAAA", "AAAA", "CCCC", "CCCC", "AA..", "CC..")):
        x = 14 + 77 * physical
        p.label(x + 34, 82, f"{physical}: {contents[0]}", size=SMALL)
        p.slots(x, 94, contents, 17, 36)
    for order, physical in (("1st", 2), ("2nd", 3), ("3rd", 5)):
        x = 48 + 77 * physical
        p.arrow((x, 134), (x, 178))
        p.label(x + 8, 152, order, "start", SMALL)
    p.box(16, 182, 448, 44, "maximum, total and output so far")


def models_on_pages(p: Picture) -> None:
    """Only two lines of a layer deal with blocks. The rest works on rows of tokens.

    A row of seven tokens, of A, C and B, goes down through a layer. Its line store_kv writes to the
    pool of blocks, and paged_attention reads from it.
    """
    p.slots(16, 14, "ACBBBBB", 34, 30, "ACBBBBB")
    p.label(266, 29, "the tokens of one step", "start")
    lines = ("linear layers", "store_kv", "paged_attention", "linear layers")
    for index, text in enumerate(lines):
        y = 60 + 44 * index
        p.arrow((135, y - 13), (135, y - 1))
        p.box(16, y, 238, 32, text, SHARED if "_" in text else "none")
    p.label(404, 72, "pool")
    for row, owners in enumerate(("AAC", "CAC", "BBB")):
        p.slots(350, 90 + 36 * row, owners, 36, 36, owners)
    p.arrow((258, 120), (344, 120))
    p.arrow((344, 164), (258, 164))
    p.label(301, 106, "write")
    p.label(301, 180, "read")


def continuous_batching(p: Picture) -> None:
    """Static batches wait for the slowest request. Continuous batching does not.

    Two charts of three batch slots over time. Above, static: A and C end early, and their batch
    slots are empty until B has ended; then D and E start. Below, continuous: D and E start in the
    steps after A and C have ended.
    """
    _batch_slots(p, 16, "static", ("AAA-----DDDDDD", "BBBBBBBBEEEE--", "CCCCC---------"))
    _batch_slots(p, 132, "continuous", ("AAADDDDDD-----", "BBBBBBBB------", "CCCCCEEEE-----"))
    p.label(150, 51, "empty", size=SMALL)
    p.label(224, 103, "empty", size=SMALL)


def _batch_slots(p: Picture, y: float, title: str, slots: tuple[str, ...]) -> None:
    """A line for each batch slot, with a letter for each step."""
    p.label(16, y, title, "start")
    p.label(408, y, "steps", "end", SMALL)
    p.arrow((416, y), (462, y))
    for line, steps in enumerate(slots):
        top = y + 22 + 26 * line
        p.box(16, top, 448, 26)
        for owner in sorted(set(steps) - {"-"}):
            start, width = 32 * steps.index(owner), 32 * steps.count(owner)
            p.box(16 + start, top, width, 26, owner, owner)


def sharing(p: Picture) -> None:
    """A1 and A2 share block 0. Before A1 writes to block 1, the block is copied.

    Two sequences, A1 at the left and A2 at the right, and three physical blocks between them. Both
    own block 0. A2 keeps block 1, where it writes "mothers". A1 writes "fathers" to block 2, a copy
    of block 1.
    """
    lines = (
        ("four score and seven", 20, SHARED),
        ("years ago our mothers", 98, "B"),
        ("years ago our fathers", 186, "A"),
    )
    for block, (words, y, fill) in enumerate(lines):
        p.label(98, y + 17, str(block))
        p.slots(112, y, 4 * [fill], 64, 34, words.split())
    p.box(16, 92, 56, 46, "A1", "A")
    p.box(408, 92, 56, 46, "A2", "B")
    p.arrow((240, 136), (240, 182))
    p.label(250, 158, "copy, then write", "start")
    p.arrow((44, 88), (44, 37), (86, 37))
    p.arrow((44, 142), (44, 203), (86, 203))
    p.arrow((436, 88), (436, 37), (372, 37))
    p.arrow((404, 115), (372, 115))
    p.label(240, 72, "shared")


def prefix_caching(p: Picture) -> None:
    """B begins with the same story as A, so two of its blocks are found.

    Above are the three blocks of A, which has finished: two with a story and one with a question.
    Below are the blocks of B: the same story and another question. Arrows lead from the first two
    blocks of B up to those of A.
    """
    p.label(16, 50, "A, finished", "start", SMALL)
    p.label(16, 154, "B", "start")
    for index, text in enumerate(("story", "story", "question")):
        x, found = 104 + 122 * index, index < 2
        p.box(x, 26, 112, 48, text, "A")
        p.box(x, 130, 112, 48, text, "none" if found else "B", dashed=found)
        if found:
            p.arrow((x + 56, 126), (x + 56, 78))
    p.label(221, 202, "found in the pool")
    p.label(404, 202, "computed")


def when_memory_runs_out(p: Picture) -> None:
    """When the pool is full, the youngest request releases its blocks.

    At the left a pool that is full of blocks of A, B and C. One arrow, in both directions, leads to
    CPU memory, where the blocks of C are kept: swap. Another leads to the tokens of C, from which
    the blocks are computed again: recompute.
    """
    p.label(92, 22, "pool, full")
    for row, owners in enumerate(("ABAC", "BACB", "CAAB", "ABCA")):
        p.slots(16, 44 + 44 * row, owners, 38, 44, owners)
    p.label(232, 62, "swap")
    p.arrow((176, 82), (288, 82), both=True)
    p.box(296, 40, 168, 84)
    p.label(380, 58, "CPU memory", size=SMALL)
    p.slots(304, 72, "CCCC", 38, 42, "CCCC")
    p.label(232, 160, "recompute")
    p.arrow((176, 180), (288, 180), both=True)
    p.box(296, 150, 168, 60, dashed=True)
    p.label(380, 170, "the tokens of C,", size=SMALL)
    p.label(380, 190, "computed again", size=SMALL)


def a_first_kernel(p: Picture) -> None:
    """One program per sequence and head reads its blocks through the block table.

    At the left is a grid with a row per sequence, A to C, and a column per head. One cell of C is
    enlarged at the right. Its block table is 2, 3, 5. It loads the slots of these blocks, and a
    mask hides the empty slots of the last one.
    """
    p.label(112, 24, "heads")
    for row, owner in enumerate("ABC"):
        p.label(26, 68 + 54 * row, owner)
        p.slots(44, 44 + 54 * row, "...C" if owner == "C" else "....", 34, 48)
    p.arrow((184, 168), (214, 142))
    p.box(220, 20, 244, 204)
    p.label(342, 40, "one program")
    for index, block in enumerate("235"):
        x = 232 + 76 * index
        p.slots(x + 14, 60, ".", 40, 32, block, NORMAL)
        p.arrow((x + 34, 96), (x + 34, 116))
        p.slots(x, 120, "CCCC" if block != "5" else "CC..", 17, 40)
    p.label(458, 174, "masked", "end", SMALL)
    p.label(342, 202, "one row of the output")


def to_the_speed_of_light(p: Picture) -> None:
    """One program serves all heads that share keys; a long sequence gets several.

    At the left are four programs, one per query head, q0 to q3. Each reads the same keys. At the
    right the keys are cut in two. Each half has one program for all four heads, and the two outputs
    are merged.
    """
    p.label(116, 24, "each head reads all")
    for head in range(4):
        p.box(16 + 52 * head, 106, 44, 36, f"q{head}", "A")
        p.arrow((38 + 52 * head, 176), (38 + 52 * head, 146))
    p.box(16, 180, 200, 40, "keys and values")
    p.label(364, 24, "each key is read once")
    p.box(314, 44, 100, 32, "merge")
    for half, text in enumerate(("first half", "second half")):
        x = 264 + 102 * half
        p.arrow((x + 49, 102), (345 + 38 * half, 80))
        p.box(x, 106, 98, 36, "q0 to q3", "A")
        p.arrow((x + 49, 176), (x + 49, 146))
        p.box(x, 180, 98, 40, text, size=SMALL)


def one_tokens_journey(p: Picture) -> None:
    """The five calls of a step. The chosen token is an input of the next step.

    Five boxes in a ring: schedule, write the message, run the model, choose tokens, commit. An
    arrow leads back from commit to schedule. A token is between the last two.
    """
    for x, y, text in (
        (16, 44, "schedule"), (180, 44, "message"), (344, 44, "model"),
        (344, 168, "choose"), (16, 168, "commit"),
    ):  # fmt: skip
        p.box(x, y, 120, 48, text)
    p.arrow((140, 68), (176, 68))
    p.arrow((304, 68), (340, 68))
    p.arrow((404, 96), (404, 164))
    p.arrow((340, 192), (276, 192))
    p.box(204, 172, 68, 40, "token", "A")
    p.arrow((200, 192), (140, 192))
    p.arrow((76, 164), (76, 96))
    p.label(158, 22, "which sequences")
    p.label(322, 22, "ids, block tables")
    p.label(394, 130, "logits", "end")
    p.label(86, 130, "next step", "start")


def one_request_through_the_server(p: Picture) -> None:
    """One thread owns the engine: clients write to its inbox and read from queues.

    At the left are three clients. Their messages go to an inbox: add A, add B, abort C. The engine
    thread reads the inbox and puts tokens into a queue for A and one for B. C has left, and its
    blocks are freed.
    """
    p.box(16, 16, 88, 208)
    p.label(60, 36, "clients")
    p.box(376, 16, 88, 208)
    p.label(420, 110, "engine")
    p.label(420, 132, "thread")
    p.label(240, 16, "inbox")
    p.arrow((108, 50), (138, 50))
    p.slots(144, 32, "...", 64, 36, ("add A", "add B", "abort C"))
    p.arrow((340, 50), (372, 50))
    for line, (owner, tokens) in enumerate((("A", "AAA"), ("B", "B.."))):
        y = 96 + 44 * line
        p.box(28, y, 64, 34, owner, owner)
        p.arrow((138, y + 17), (96, y + 17))
        p.slots(144, y, tokens, 64, 34, tokens.count(owner) * ["token"])
        p.arrow((372, y + 17), (340, y + 17))
    p.box(28, 184, 64, 34, "C left", dashed=True)
    p.label(240, 201, "C's blocks are freed")


def cut_a_model_in_two(p: Picture) -> None:
    """Each rank has half of both matrices. One all-reduce adds up the results.

    The input x goes to two ranks. Rank 0 has the left half of the matrix up and the upper half of
    the matrix down; rank 1 has the other halves. An all-reduce adds up their results to y.
    """
    p.box(16, 100, 40, 40, "x")
    for rank, owner in enumerate("AB"):
        y, middle = 16 + 112 * rank, 66 + 108 * rank
        p.label(16, 34 + 174 * rank, f"rank {rank}", "start")
        p.arrow((60, 120), (98, middle))
        p.box(104, y, 96, 96, dashed=True)
        p.box(104 + 48 * rank, y, 48, 96, "up", owner)
        p.arrow((204, middle), (238, middle))
        p.box(244, y, 96, 96, dashed=True)
        p.box(244, y + 48 * rank, 96, 48, "down", owner)
        p.arrow((344, middle), (376, 110 + 20 * rank))
    p.box(380, 100, 40, 40, "+")
    p.label(464, 84, "all-reduce", "end")
    p.arrow((424, 120), (440, 120))
    p.box(444, 100, 24, 40, "y")


OPENINGS: list[Callable[[Picture], None]] = [
    first_run, the_kv_cache, the_memory_problem, blocks_and_block_tables, paged_attention,
    models_on_pages, continuous_batching, sharing, prefix_caching, when_memory_runs_out,
    a_first_kernel, to_the_speed_of_light, one_tokens_journey, one_request_through_the_server,
    cut_a_model_in_two,
]  # fmt: skip


def svg(number: int) -> str:
    """The opening of a chapter."""
    draw, picture = OPENINGS[number], Picture()
    draw(picture)
    caption, _, description = inspect.cleandoc(draw.__doc__ or "").partition("\n\n")
    return picture.svg(f"opening-{number:02}", caption, " ".join(description.split()))


if __name__ == "__main__":
    for chapter in range(len(OPENINGS)):
        (Path(__file__).parent / f"{chapter:02}.svg").write_text(svg(chapter), encoding="utf-8")
