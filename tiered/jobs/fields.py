"""Reading a JSON object that a user wrote: every field checked as it is read, and none forgotten.

In: a parsed object. Out: plain values, or `Refused` with the field's name. Null counts as absent, as in OpenAI's API.
"""

import json
from collections.abc import Collection, Mapping
from typing import Any, Final

from tiered import errors

_SHOWN: Final = 60
"""Characters of a wrong value that a message repeats."""


class Refused(Exception):
    """A request that cannot be served; `jobs.request` turns it into a Problem."""

    def __init__(self, code: str, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.code, self.message, self.param = code, message, param


class Fields:
    """The fields of one object."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        self._values = {name: value for name, value in values.items() if value is not None}
        self._read: set[str] = set()

    def take(self, name: str) -> Any:
        """The field as it is; None where it is absent."""
        self._read.add(name)
        return self._values.get(name)

    def number(self, name: str, default: float) -> float:
        """A number, whole or not."""
        value = self.take(name)
        if value is None:
            return default
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise expected(name, "a number", value)
        try:
            return float(value)
        except OverflowError:
            raise expected(name, "a number of moderate size", value) from None

    def whole(self, name: str, least: int, most: int) -> int | None:
        """A whole number from `least` to `most`."""
        value = self.take(name)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
            raise expected(name, f"a whole number from {least} to {most}", value)
        return value

    def flag(self, name: str) -> bool:
        """true or false; false where it is absent."""
        value = self.take(name)
        if value is None:
            return False
        if not isinstance(value, bool):
            raise expected(name, "true or false", value)
        return value

    def refuse_others(self, harmless: Collection[str], neutral: Mapping[str, tuple[Any, ...]], url: str) -> None:
        """Raise Refused if there is a field that nobody has read.

        Fields of `harmless` never change a result. Those of `neutral` do unless they hold one of the values given.
        """
        for name, value in self._values.items():
            if name in self._read or name in harmless or value in neutral.get(name, ()):
                continue
            if name in neutral:
                message = f"{name}: {shown(value)} is not supported and would change the result; remove it"
                raise Refused("unsupported_value", message, name)
            name = cut(name)
            raise Refused("unknown_field", f"{name}: no field of {url} that is known here; remove or correct it", name)


def expected(name: str, what: str, found: object) -> Refused:
    """The error of a field that holds something else than `what`."""
    return Refused("invalid_value", f"{name}: expected {what}, found {shown(found)}", name)


def shown(value: object) -> str:
    """`value` as JSON, shortened to fit a message."""
    return cut(json.dumps(value))


def cut(text: str) -> str:
    """`text`, shortened to fit a message."""
    return errors.cut(text, _SHOWN)
