"""What an examination finds (facts, what is switched off, what deserves a warning), and how it is shown."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from tiered.cli.lines import columns
from tiered.units import format_rate, format_size


@dataclass(frozen=True)
class Fact:
    """One line: what it is called, how a person reads it, and the same for a program."""

    label: str
    text: str
    value: Any


@dataclass(frozen=True)
class Off:
    """A feature that this machine or version does not use."""

    feature: str
    why: str
    turn_on: str


@dataclass
class Examination:
    """What was found, in the order it was looked for."""

    sections: dict[str, list[Fact]] = field(default_factory=dict)
    off: list[Off] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    def switch_off(self, feature: str, why: str, turn_on: str) -> None:
        self.off.append(Off(feature, why, turn_on))

    def add(self, section: str, probe: Callable[["Examination"], Iterable[Fact]]) -> None:
        """Run `probe` and keep what it yields; a failure becomes a fact."""
        facts = self.sections.setdefault(section, [])
        try:
            facts.extend(probe(self))
        except Exception as error:
            # Anything may fail on an unusual machine, and this command is for such machines.
            text = f"{type(error).__name__}: {error}"
            facts.append(Fact(f"{section} probe failed", text, {"error": text}))

    def to_json(self) -> dict[str, Any]:
        sections = {
            title: {fact.label.replace(" ", "_"): fact.value for fact in facts}
            for title, facts in self.sections.items()
        }
        off = [{"feature": o.feature, "why": o.why, "turn_on": o.turn_on} for o in self.off]
        return {**sections, "switched_off": off, "warnings": self.warnings}


def plain_fact(label: str, value: str) -> Fact:
    return Fact(label, value, value)


def size_fact(label: str, nbytes: int) -> Fact:
    return Fact(label, format_size(nbytes), nbytes)


def rate_fact(label: str, bytes_per_second: float, how: str) -> Fact:
    """A measured bandwidth and how it was measured."""
    return Fact(label, f"{format_rate(bytes_per_second)} ({how})", bytes_per_second)


def lines(found: Examination) -> Iterator[str]:
    """The examination as people read it."""
    for title, facts in found.sections.items():
        yield title
        if facts:
            yield from columns([(fact.label, fact.text) for fact in facts], "<<", indent="  ")
        yield ""
    yield "switched off"
    for off in found.off:
        yield f"  {off.feature}"
        yield f"    why      {off.why}"
        yield f"    turn on  {off.turn_on}"
    if not found.off:
        yield "  nothing"
    yield ""
    yield "warnings"
    yield from (f"  {warning}" for warning in found.warnings or ("none",))
