"""Which family is worth it: families side by side, and where the nats of one fit go."""

from ppvae.comparison.accounting import Account, account
from ppvae.comparison.families import Comparison, compare_families
from ppvae.comparison.steps import (
    crossed_interval,
    interval_of_totals,
    still_to_come,
    with_steps,
)

__all__ = [
    "Account",
    "Comparison",
    "account",
    "compare_families",
    "crossed_interval",
    "interval_of_totals",
    "still_to_come",
    "with_steps",
]
