"""The desk at which modules borrow: the loan of the block that computes now. One per bound model."""

from dataclasses import dataclass

from tiered.stream import Loan


@dataclass
class Desk:
    """What the modules of one model share. For the thread that computes."""

    loan: Loan | None = None
    """None between blocks."""
