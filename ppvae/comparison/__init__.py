"""Which family is worth it: side by side, on a walk up the ladder, and in the nats of one fit."""

from ppvae.comparison.accounting import Account, account
from ppvae.comparison.choice import Choice, choose_family
from ppvae.comparison.families import Comparison, compare_families
from ppvae.comparison.steps import (
    crossed_interval,
    interval_of_totals,
    still_to_come,
    with_steps,
)

__all__ = [
    "Account",
    "Choice",
    "Comparison",
    "account",
    "choose_family",
    "compare_families",
    "crossed_interval",
    "interval_of_totals",
    "still_to_come",
    "with_steps",
]
