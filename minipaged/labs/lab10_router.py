"""Lab 10: a router that knows which server has computed the beginning of a prompt (chapter 8)."""

from minipaged.labs.lab import Lab, Task

LAB = Lab(
    number=10,
    name="router",
    title="a prefix-aware router",
    sources=("minipaged.labs.routing.router.PrefixRouter",),
    parts={"router": "PrefixRouter"},
    tasks=(
        Task(
            1,
            "name the beginnings of a prompt",
            20,
            holes=("PrefixRouter.keys",),
            hints=(
                "Cut the prompt into pieces of `piece_size` characters, and leave the rest. What "
                + "must the key of the third piece depend on, besides its own text?",
                "As in the prefix cache: the key of a piece is made of the key before it and its "
                + "own text. `hash((before, piece))` is small, and made in the same time however "
                + "long the prompt is.",
            ),
        ),
        Task(
            2,
            "find who knows a beginning",
            25,
            holes=("PrefixRouter.remember", "PrefixRouter.num_known"),
            hints=(
                "`known[server]` is a dictionary that is used as an ordered set: its values mean "
                + "nothing, its keys are what the server was sent. Leave the capacity for task 4.",
                "`num_known` counts from the first key and stops at the first that is not there.",
            ),
        ),
        Task(
            3,
            "choose",
            30,
            holes=("PrefixRouter.choose", "PrefixRouter.finish"),
            hints=(
                "First find the servers that attract the request: those that know more than "
                + "`threshold` of its pieces, and have at most `slack` more open requests than "
                + "the least loaded one. Only servers in `among` count, for the load as well.",
                "Of the attracting servers, take the one that knows most pieces; of equals, the "
                + "least loaded one. If none attracts, take the least loaded one of all; of "
                + "equals, the one that knows the fewest pieces.",
                "The request is open on the chosen server from now on: count it in `loads`, and "
                + "`remember` its keys there. `finish` counts it out again.",
            ),
        ),
        Task(
            4,
            "forget",
            15,
            holes=("PrefixRouter.forget",),
            hints=(
                "A server evicts what was not used for long. A router that remembers everything "
                + "sends requests to servers that have forgotten them. So `remember` must forget "
                + "as well, beyond `capacity`: the least recently used keys, of that server only.",
                "A dictionary keeps the order in which keys were inserted. To make a key the "
                + "newest one, remove and insert it again.",
                "Without its beginning, the rest of a prompt is never found. Insert the keys of a "
                + "prompt in an order in which the beginning is forgotten last.",
            ),
        ),
        Task(
            5,
            "serve 8 system prompts x 32 requests",
            10,
            hints=(
                "Each simulated server has room for five of the eight system prompts. In the end, "
                + "which server should have which? Print `router.loads` and the lengths of "
                + "`router.known` while the load runs.",
                "Few hits although each request goes where its system prompt was: compare what "
                + "the router remembers with what a pool of 112 blocks holds.",
            ),
        ),
    ),
)
