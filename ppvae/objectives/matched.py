r"""Fitting global latents: a sample-average approximation of the ELBO, and a quasi-Newton method.

With the random numbers held fixed the negative ELBO of K draws is a smooth deterministic function,
and L-BFGS finds its minimum to many digits where stochastic gradients would wander. The draws are
*moment-matched*: the standard normal numbers behind them have mean zero and identity covariance
over the draws, exactly. The average of any quadratic function is then its expectation, so for a
Gaussian family on a Gaussian model the minimum is that of the ELBO itself; elsewhere it differs by
O(1/K).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from ppvae._scopes import random_state, unchecked
from ppvae.objectives.elbo import loss_of
from ppvae.objectives.trace_terms import terms
from ppvae.programs.matched_normals import MomentMatched
from ppvae.programs.runs import draws_plate, trace_pair


def average_loss(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    batch: tuple[Tensor, ...],
    *,
    draws: int,
    seed: int,
) -> Callable[[], Tensor]:
    """The negative ELBO in nats per datum as a function of the parameters, its draws held fixed."""
    plate = draws_plate(model, *batch, draws=draws)

    def loss() -> Tensor:
        with random_state(seed), MomentMatched(draws), unchecked():
            pair = trace_pair(model, guide, *batch, draws=plate)
            return loss_of(terms(*pair), len(batch[0]))

    return loss
