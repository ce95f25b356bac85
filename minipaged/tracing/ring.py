"""The last items of a stream, for readers in other threads that come late or are slow."""

import threading
from collections import deque
from itertools import islice
from typing import Generic, TypeVar

T = TypeVar("T")


class Ring(Generic[T]):
    """Items with numbers that count up; the oldest are dropped when their sizes exceed a limit.

    One thread adds, any thread reads. A reader keeps the number of the item that it needs next.

    Args:
        max_size: of all items together.
    """

    def __init__(self, max_size: int) -> None:
        self.max_size = max_size
        self.first = 0  # number of the oldest item
        self._items: deque[tuple[T, int]] = deque()
        self._size = 0
        self._lock = threading.Lock()

    @property
    def next(self) -> int:
        """The number of the item that will be added next."""
        return self.first + len(self._items)

    def add(self, item: T, size: int) -> None:
        """Append an item, and drop the oldest ones while the sizes exceed the limit."""
        with self._lock:
            self._items.append((item, size))
            self._size += size
            while self._size > self.max_size:
                self._size -= self._items.popleft()[1]
                self.first += 1

    def clear(self) -> None:
        """Drop all items. Their numbers are not used again."""
        with self._lock:
            self.first += len(self._items)
            self._items.clear()
            self._size = 0

    def since(self, number: int) -> list[T] | None:
        """The items from this number on; None if some of them have been dropped."""
        with self._lock:
            if number < self.first:
                return None
            return [item for item, _ in islice(self._items, number - self.first, None)]
