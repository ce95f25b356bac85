"""Lab 10: the keys of a prompt, the servers that cache it, where it goes, and what is forgotten.

What a key is does not matter. In the tests of one task, bodies of later tasks are the library's.
"""

import pytest

from minipaged.labs.lab10_router import LAB
from minipaged.labs.routing.load import (
    CAPACITY,
    RoundRobin,
    prompt_of,
    requests,
    simulate,
)
from minipaged.labs.routing.router import PrefixRouter

from schedulers import with_library_bodies

essential = pytest.mark.essential


def task(number: int) -> pytest.MarkDecorator:
    return pytest.mark.lab(number=10, task=number)


@pytest.fixture
def build(part, request):
    """`build(2, piece_size=4)`: a router of the student's before two servers."""
    number = request.node.get_closest_marker("lab").kwargs["task"]
    cls = with_library_bodies(part("router"), PrefixRouter, LAB, number)

    def router(num_servers: int = 2, **options) -> PrefixRouter:
        return cls(num_servers, **{"piece_size": 4, **options})

    return router


# ---- task 1: name the prefixes of a prompt -------------------------------------------------------


@task(1)
@pytest.mark.parametrize(("length", "num_keys"), [(0, 0), (3, 0), (4, 1), (7, 1), (8, 2), (41, 10)])
def test_each_complete_piece_has_a_key(build, length, num_keys):
    assert len(build().keys("x" * length)) == num_keys


@task(1)
def test_prompts_have_equal_keys_for_a_shared_prefix(build):
    router = build()
    one, other = router.keys("Once upon a time Mia"), router.keys("Once upon a tree fell")
    equal = [a == b for a, b in zip(one, other, strict=True)]
    assert equal == [True, True, True, False, False]


@task(1)
@essential("a key must depend on the whole prompt up to its end (rule 1).")
def test_equal_pieces_after_different_prefixes_have_different_keys(build):
    router = build()
    one, other = router.keys("aaaabbbbcccc"), router.keys("xxxxbbbbcccc")
    assert not set(one) & set(other)
    assert len(set(router.keys("aaaaaaaaaaaa"))) == 3, "distinct keys of one piece, three times"


@task(1)
def test_another_piece_size_gives_other_keys(build):
    assert [len(build(piece_size=size).keys("x" * 60)) for size in (1, 7, 16)] == [60, 8, 3]


@task(1)
def test_keys_of_a_long_prompt_are_computed_quickly(build):
    """Computing each of 40,000 keys from the whole text before it would take minutes."""
    assert len(build(piece_size=16).keys("x" * 640_000)) == 40_000


# ---- task 2: find the servers that know a prefix -------------------------------------------------


@task(2)
@essential("each server has its own cache: a server knows only what it was sent.")
def test_a_server_knows_what_it_was_sent_and_no_other_does(build):
    router = build(3)
    keys = router.keys("aaaabbbbcccc")
    router.remember(1, keys)
    assert [router.num_known(server, keys) for server in range(3)] == [0, 3, 0]


@task(2)
def test_a_longer_prompt_is_known_as_far_as_it_was_sent(build):
    router = build()
    router.remember(0, router.keys("aaaabbbb"))
    known = [
        router.num_known(0, router.keys(prompt))
        for prompt in ("aaaabbbbcccc", "aaaaxxxx", "xxxxbbbb", "aaa", "")
    ]
    assert known == [2, 1, 0, 0, 0]


@task(2)
def test_nothing_counts_after_a_gap(build):
    router = build()
    keys = router.keys("aaaabbbbccccdddd")
    router.remember(0, [keys[0], keys[2], keys[3]])
    assert router.num_known(0, keys) == 1


@task(2)
def test_counting_known_pieces_changes_nothing(build):
    router = build()
    keys = router.keys("aaaabbbb")
    assert [router.num_known(0, keys) for _ in range(3)] == [0, 0, 0]
    router.remember(0, keys[:1])
    assert [router.num_known(0, keys) for _ in range(3)] == [1, 1, 1]
    assert keys == router.keys("aaaabbbb"), "the caller's list of keys was changed"


@task(2)
def test_a_server_remembers_several_prompts(build):
    router = build()
    for prompt in ("aaaabbbb", "xxxxyyyy", "aaaabbbb"):
        router.remember(0, router.keys(prompt))
    assert [router.num_known(0, router.keys(p)) for p in ("aaaabbbb", "xxxxyyyy")] == [2, 2]


# ---- task 3: choose ------------------------------------------------------------------------------


@task(3)
def test_equal_prefixes_go_to_the_same_server(build):
    router = build(slack=10)
    first = [router.choose(f"{letter * 12} first") for letter in "abcd"]
    again = [router.choose(f"{letter * 12} again") for letter in "dbca"]
    assert again == [first["abcd".index(letter)] for letter in "dbca"]
    assert sorted(first) == [0, 0, 1, 1], "new prefixes must be spread over the servers"


@task(3)
def test_a_request_is_open_until_it_is_finished(build):
    router = build(3, slack=10)
    servers = [router.choose(letter * 12) for letter in "abc"]
    assert (sorted(servers), router.loads) == ([0, 1, 2], [1, 1, 1])
    router.choose("b" * 12)
    assert router.loads[servers[1]] == 2
    for _ in range(2):
        router.finish(servers[1])
    assert router.loads[servers[1]] == 0


@task(3)
@essential("a server with far more open requests than the others must attract none (rule 3).")
@pytest.mark.parametrize("slack", [0, 1, 4])
def test_a_popular_prefix_does_not_overload_its_server(build, slack):
    router = build(slack=slack)
    for _ in range(40):
        router.choose("a" * 12)
        assert max(router.loads) - min(router.loads) <= slack + 1
    assert sum(router.loads) == 40


@task(3)
def test_a_server_attracts_requests_up_to_the_slack(build):
    router = build(slack=3)
    home = router.choose("a" * 12)
    assert [router.choose("a" * 12) for _ in range(3)] == [home] * 3, (
        "with 1, 2 and 3 open requests more"
    )
    assert router.choose("a" * 12) == 1 - home


@task(3)
@essential("a prefix that nearly all prompts share must not attract requests (rule 2).")
def test_a_short_common_prefix_attracts_no_server(build):
    """One piece of four is shared, as when every chat begins with the same template."""
    router = build(slack=100)
    servers = [router.choose("sys:" + letter * 12) for letter in "abcdefgh"]
    assert sorted(servers) == [0] * 4 + [1] * 4


@task(3)
@pytest.mark.parametrize(("threshold", "attracts"), [(0.49, True), (0.5, False), (0.9, False)])
def test_a_server_must_know_more_than_the_threshold(build, threshold, attracts):
    router = build(slack=100, threshold=threshold)
    home = router.choose("aaaabbbb")
    assert (router.choose("aaaabbbbccccdddd") == home) is attracts


@task(3)
def test_the_server_that_knows_most_has_precedence_over_a_less_loaded_one(build):
    router = build(slack=10)
    assert [router.choose("aaaabbbbcccc", [0]), router.choose("aaaabbbbccccdddd", [1])] == [0, 1]
    router.choose("x" * 8, [1])
    assert router.loads == [1, 2]
    assert router.choose("aaaabbbbccccdddd") == 1


@task(3)
def test_a_load_is_compared_only_with_that_of_available_servers(build):
    router = build(3, slack=2)
    home = [router.choose("a" * 12, [1]) for _ in range(5)]
    for _ in range(4):
        router.choose("x" * 12, [2])
    assert home == [1] * 5
    assert router.choose("a" * 12, [1, 2]) == 1, "5 and 4 are open; server 0 is not available"


@task(3)
def test_of_two_servers_that_know_as_much_the_less_loaded_is_chosen(build):
    router = build(3, slack=10)
    for server in (0, 0, 1):
        router.choose("a" * 12, [server])
    assert router.choose("a" * 12) == 1


@task(3)
def test_of_two_idle_servers_the_one_with_fewer_pieces_gets_a_new_prompt(build):
    router = build(3)
    for server, prompt in enumerate(("a" * 40, "b" * 8, "c" * 24)):
        assert router.choose(prompt, [server]) == server
    assert router.choose("x" * 12) == 1


@task(3)
def test_only_available_servers_are_chosen(build):
    router = build(3, slack=2)
    for _ in range(5):
        assert router.choose("a" * 12, [1, 2]) in (1, 2)
    assert router.loads[0] == 0
    assert abs(router.loads[1] - router.loads[2]) <= 3
    assert router.choose("a" * 12, [2]) == 2, "the only available server, whatever its load"
    assert router.choose("aa") == 0, "the only idle server, for a prompt shorter than a piece"


# ---- task 4: forget ------------------------------------------------------------------------------


@task(4)
def test_forgetting_one_server_does_not_affect_the_others(build):
    router = build()
    keys = router.keys("a" * 12)
    for server in (0, 1):
        router.remember(server, keys)
    router.forget(0)
    assert [router.num_known(server, keys) for server in (0, 1)] == [0, 3]
    router.remember(0, keys)
    assert router.num_known(0, keys) == 3


@task(4)
@essential("a router must not grow without bound (rule 4).")
def test_a_server_remembers_no_more_pieces_than_its_capacity(build):
    router = build(capacity=6)
    prompts = [f"{number:04}" * 3 for number in range(50)]
    for prompt in prompts:
        router.remember(0, router.keys(prompt))
    known = [router.num_known(0, router.keys(prompt)) for prompt in prompts]
    assert known == [0] * 48 + [3, 3]
    assert router.num_known(1, router.keys(prompts[-1])) == 0


@task(4)
def test_the_least_recently_used_prompt_is_forgotten_first(build):
    router = build(capacity=6)
    for letter in "aba":
        router.remember(0, router.keys(letter * 12))
    router.remember(0, router.keys("c" * 12))
    assert [router.num_known(0, router.keys(letter * 12)) for letter in "abc"] == [3, 0, 3]


@task(4)
def test_the_end_of_a_prompt_is_forgotten_before_its_beginning(build):
    router = build(capacity=4)
    router.remember(0, router.keys("a" * 12))
    router.remember(0, router.keys("b" * 8))
    assert router.num_known(0, router.keys("a" * 12)) == 2, "of one piece too many, the last goes"
    assert router.num_known(0, router.keys("b" * 8)) == 2


@task(4)
def test_of_a_prompt_longer_than_the_capacity_the_beginning_is_kept(build):
    router = build(capacity=3)
    router.remember(0, router.keys("a" * 40))
    assert router.num_known(0, router.keys("a" * 40)) == 3


# ---- task 5: serve the load ----------------------------------------------------------------------


@task(5)
@essential("the router must find 1.5 times as many tokens in the caches as round robin.")
@pytest.mark.parametrize("seed", range(3))
def test_the_router_finds_far_more_cached_prefixes_than_round_robin(build, seed):
    prompts = [prompt_of(*request) for request in requests(seed)]
    compared = simulate(RoundRobin(2), prompts)
    yours = simulate(build(piece_size=16, capacity=CAPACITY), prompts)
    found, least = yours.num_cached_tokens, 1.5 * compared.num_cached_tokens
    assert found >= least, (
        "prompt tokens found in the prefix caches, against 1.5 times round robin's"
    )
    assert sum(yours.num_requests) == len(prompts)
    most = max(yours.num_requests)
    assert most <= 0.6 * len(prompts), "requests of the busiest server, against 60 % of all"


@task(5)
def test_all_servers_work_at_the_same_time(build):
    prompts = [prompt_of(*request) for request in requests()]
    router = build(4, piece_size=16, capacity=CAPACITY, slack=2)
    report = simulate(router, prompts, num_servers=4)
    assert report.largest_gap <= 4, (
        "gap in open requests between the most and the least loaded server"
    )
    assert min(report.num_requests) >= len(prompts) / 8
    assert router.loads == [0] * 4, "open requests once all have ended"
