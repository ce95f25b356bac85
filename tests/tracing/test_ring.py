"""A ring of the last items: what a reader gets, and how many items it has missed."""

import threading

from minipaged.tracing.ring import Ring


def test_a_reader_gets_what_is_new_in_order():
    ring = Ring[str](10)
    place = ring.next
    ring.add("a", 1)
    ring.add("b", 1)
    assert ring.since(place) == ["a", "b"]
    assert ring.since(ring.next) == []
    place = ring.next
    ring.add("c", 1)
    assert ring.since(place) == ["c"]


def test_the_oldest_items_are_dropped_when_the_sizes_exceed_the_limit():
    ring = Ring[str](5)
    for item, size in ("a", 2), ("b", 2), ("c", 1):
        ring.add(item, size)
    assert ring.since(0) == ["a", "b", "c"]  # exactly the limit
    ring.add("d", 2)
    assert ring.since(0) is None
    assert ring.since(1) == ["b", "c", "d"]
    ring.add("larger than the limit", 6)
    assert ring.since(ring.first) == []


def test_a_reader_is_told_that_a_cleared_ring_has_lost_what_it_needs():
    ring = Ring[str](5)
    place = ring.next
    ring.add("a", 5)
    ring.clear()
    assert ring.since(place) is None
    ring.add("b", 5)
    assert ring.since(ring.first) == ["b"]
    assert ring.next == 2


def test_a_reader_in_another_thread_notices_every_gap():
    ring, found = Ring[int](50), []
    writer = threading.Thread(target=lambda: [ring.add(number, 1) for number in range(20_000)])
    writer.start()
    place = 0
    while writer.is_alive() or place < ring.next:
        items = ring.since(place)
        if items is None:
            place = ring.first
        else:
            found += items
            place += len(items)
            assert not items or items[-1] == place - 1
    writer.join()
    assert found == sorted(set(found))
    assert found[-1] == 19_999
