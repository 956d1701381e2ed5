"""A cache of values by key, limited by their bytes: those that were not asked for longest go first."""

import threading
from collections import OrderedDict
from typing import Generic, TypeVar

Key = TypeVar("Key")
Value = TypeVar("Value")


class Cache(Generic[Key, Value]):
    """Thread-safe. One value may be larger than the limit: then it is alone."""

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.size_bytes = 0
        self._values: OrderedDict[Key, tuple[Value, int]] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: Key) -> Value | None:
        """The value of a key, or None."""
        with self._lock:
            if key not in self._values:
                return None
            self._values.move_to_end(key)
            return self._values[key][0]

    def add(self, key: Key, value: Value, size_bytes: int) -> None:
        """Add a value, and drop others until the limit is kept."""
        with self._lock:
            self.size_bytes += size_bytes - self._values.pop(key, (value, 0))[1]
            self._values[key] = value, size_bytes
            while self.size_bytes > self.max_bytes and len(self._values) > 1:
                self.size_bytes -= self._values.popitem(last=False)[1][1]
