"""The parameters of a request, checked: numbers within limits and short texts. No path is ever one."""

import math
from collections.abc import Mapping
from typing import Any

MAX_TEXT = 500


class RequestRefused(Exception):
    """A request that is answered with a status of HTTP and one sentence."""

    def __init__(self, status: int, message: str) -> None:
        self.status = status
        self.message = message
        super().__init__(message)


class Parameters:
    """The values of an address or of a JSON object. Each method raises RequestRefused (400)."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        self._values = values

    def text(self, name: str) -> str:
        """A text of up to MAX_TEXT characters; "" if it is absent."""
        value = self._values.get(name, "")
        if not isinstance(value, str) or len(value) > MAX_TEXT:
            raise RequestRefused(400, f"{name} must be a text of at most {MAX_TEXT} characters")
        return value

    def choice(self, name: str, known: tuple[str, ...]) -> str:
        """One of some words; the first if it is absent."""
        value = self._values.get(name) or known[0]
        if value not in known:
            raise RequestRefused(400, f"{name} must be one of {', '.join(known)}")
        return str(value)

    def integer(self, name: str, low: int, high: int, default: int | None = None) -> int:
        """A whole number from `low` to `high`."""
        value = self._values.get(name, default)
        try:
            number = int(str(value)) if not isinstance(value, bool) else None
        except ValueError:
            number = None
        if number is None or not low <= number <= high:
            raise RequestRefused(400, f"{name} must be a whole number from {low} to {high}")
        return number

    def number(self, name: str) -> float | None:
        """A finite number; None if it is absent or empty."""
        value = self._values.get(name, "")
        if value == "":
            return None
        try:
            number = float(str(value))
        except ValueError:
            number = math.nan
        if not math.isfinite(number):
            raise RequestRefused(400, f"{name} must be a number")
        return number

    def rows(self, name: str, rows: int, most: int) -> list[int]:
        """A list of up to `most` positions below `rows`."""
        value = self._values.get(name)
        is_list = isinstance(value, list) and all(type(each) is int and 0 <= each < rows for each in value)
        if not is_list or len(value or ()) > most:
            raise RequestRefused(400, f"{name} must be a list of at most {most} row numbers below {rows}")
        return list(value or ())
