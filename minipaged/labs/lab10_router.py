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
                "Cut the prompt into pieces of `piece_size` characters, and drop the rest. What "
                + "must the key of the third piece depend on, besides its own text?",
                "As in the prefix cache, the key of a piece consists of the key before it and its "
                + "own text. `hash((before, piece))` is small, and takes the same time for every "
                + "piece, however long the prompt is.",
            ),
        ),
        Task(
            2,
            "find who knows a beginning",
            25,
            holes=("PrefixRouter.remember", "PrefixRouter.num_known"),
            hints=(
                "`known[server]` is a dictionary used as an ordered set: its keys are those that "
                + "the server was sent, its values are unused. Leave the capacity for task 4.",
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
                + "the least loaded one. Consider only servers in `among`, for the load as well.",
                "Of these servers, choose the one that knows most pieces; if several do, the "
                + "least loaded of them. If no server attracts the request, choose the least "
                + "loaded one of all; if several are, the one that knows the fewest pieces.",
                "The request is open on the chosen server from now on: count it in `loads`, and "
                + "`remember` its keys there. `finish` decreases the count.",
            ),
        ),
        Task(
            4,
            "forget",
            15,
            holes=("PrefixRouter.forget",),
            hints=(
                "A server evicts blocks that were not used for long. A router that remembers "
                + "everything sends requests to servers that have evicted their prefix. Therefore "
                + "`remember` must also forget, beyond `capacity`: the least recently used keys, "
                + "of that server only.",
                "A dictionary keeps the order in which keys were inserted. To make a key the "
                + "newest one, remove and insert it again.",
                "Without its first pieces, the rest of a prompt is never found. Insert the keys "
                + "of a prompt in an order in which the first pieces are forgotten last.",
            ),
        ),
        Task(
            5,
            "serve 8 system prompts x 32 requests",
            10,
            hints=(
                "Each simulated server has room for five of the eight system prompts. In the end, "
                + "which server should cache which? Print `router.loads` and the lengths of "
                + "`router.known` during the load.",
                "If there are few hits although each request goes where its system prompt was: "
                + "compare what the router remembers with what a pool of 112 blocks can store.",
            ),
        ),
    ),
)
