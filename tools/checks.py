"""What a program that checks something on a machine prints: lines of what holds and what does not."""


def say(text: str) -> None:
    print(text, flush=True)


class Checks:
    """Lines of what holds and what does not."""

    def __init__(self) -> None:
        self.failures = 0

    def check(self, holds: bool, what: str) -> None:
        self.failures += not holds
        say(f"{'PASS' if holds else 'FAIL'}  {what}")
