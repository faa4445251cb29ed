"""All draws of a tree, in pieces."""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from pyro import poutine

from ppvae._scopes import random_state
from ppvae.export.densities import densities, integrated, of_elements
from ppvae.export.names import Groups
from ppvae.export.numbers import small_numbers
from ppvae.export.pieces import Piece, gathered, side_by_side
from ppvae.export.predictions import predicted
from ppvae.export.sites import Sites
from ppvae.programs.nodes import prototype
from ppvae.programs.runs import Runs
from ppvae.programs.simulation import Uncondition
from ppvae.programs.tracing import Args, run_trace, with_discrete

_OF_GUIDE = {"posterior", "unconstrained_posterior", "posterior_predictive"}
_OF_PRIOR = {"prior", "prior_predictive"}
_DENSITIES = {"log_likelihood", "log_prior", "sample_stats"}


@dataclass(frozen=True)
class Drawing:
    """What is to be drawn.

    Attributes:
        runs: the pair.
        sites: the variables.
        wanted: names of groups; what none of them asks for is not run.
        num_inner: draws of the latents of each datum by which they are integrated out of its
            likelihood; None if they are not.
        top: the latents whose log prior is wanted.
        by_element: whether the likelihood is that of each number, given the latents.
        new: arguments for predictions, or None.
    """

    runs: Runs
    sites: Sites
    wanted: Collection[str]
    num_inner: int | None
    top: Sequence[str]
    by_element: bool
    new: Args | None

    @property
    def batches(self) -> list[Args]:
        """The minibatches: all data together, where a latent belongs to all of them."""
        return self.runs.batches if self.sites.local else [self.runs.args]

    def weight(self, groups: Groups) -> np.ndarray | None:
        """The log weights in some groups, if they are those of draws that belong to all data."""
        return None if self.sites.local else groups.get("sample_stats", {}).get("log_weight")

    def observed_values(self) -> dict[str, np.ndarray]:
        """The data of the observed sites, with one draw in front."""
        with random_state(None, keep=True):
            seen = [prototype(self.runs.model, batch, {}) for batch in self.batches]
        return side_by_side([self.sites.values(each, None, data=True) for each in seen])

    def pieces(self, num_samples: int) -> Iterator[Piece]:
        """The draws, of one minibatch after the other."""
        start = 0
        for batch in self.batches:
            rows = None
            if len(self.batches) > 1:
                count = self._rows(batch)
                rows, start = range(start, start + count), start + count
            yield from self._of_batch(batch, rows, num_samples)
        if self.sites.local and self.new is not None:
            yield from self._cast(gathered(self._predicted(self.new, num_samples), None))

    def _rows(self, batch: Args) -> int:
        """How many data a minibatch has: it is cut from the arguments that have all of them."""
        size = self.runs.plate.size
        both = zip(self.runs.args, batch, strict=True)
        return next(len(cut) for arg, cut in both if getattr(arg, "shape", ())[:1] == (size,))

    def _of_batch(self, batch: Args, rows: range | None, num_samples: int) -> Iterator[Piece]:
        """The draws for a minibatch; behind them the likelihood that they give together."""
        first = prototype(self.runs.model, batch, {})
        plates = self.runs.draws(batch, num_samples, [first])
        runs = (self._of_run(batch, draws) for _, draws in plates)
        shown = {*self.wanted, "predictions"}
        weights: np.ndarray | None = None
        likelihood: dict[str, np.ndarray] = {}
        for piece in self._cast(gathered(runs, rows)):
            weight = piece.groups.get("sample_stats", {}).get("log_weight")
            if self.num_inner is not None and weight is not None and weight.ndim == 2:
                if weights is None:  # of each datum, whose likelihood is that of all its draws
                    weights = np.empty((num_samples, weight.shape[1]), weight.dtype)
                weights[piece.first : piece.first + len(weight)] = weight
                likelihood = piece.groups.pop("log_likelihood")
            kept: Groups = {k: v for k, v in piece.groups.items() if k in shown}
            yield piece._replace(groups=kept)
        if weights is not None and "log_likelihood" in self.wanted:
            groups = {"log_likelihood": integrated(likelihood, weights)}
            yield Piece(groups, 0, rows)

    def _of_run(self, args: Args, draws: Any) -> Groups:
        """The groups of the draws of one run, with the draws in front."""
        groups: Groups = {}
        runs, sites, wanted = self.runs, self.sites, {*self.wanted}
        open_model = Uncondition()(runs.model)
        new = None if sites.local else self.new
        if wanted & (_OF_GUIDE | _DENSITIES) or new is not None:
            traces = runs.pair(args, draws)
            drawn, known = with_discrete(runs.model, traces, args, draws)
        if "posterior" in wanted:
            groups["posterior"] = sites.values(drawn, draws, data=False)
        if "posterior_predictive" in wanted:
            again = run_trace(poutine.replay(open_model, trace=known), args, draws)
            groups["posterior_predictive"] = sites.values(again, draws, data=True)
        if wanted & _OF_PRIOR:
            try:
                prior = run_trace(open_model, args, draws)
            except NotImplementedError:  # an improper prior has nothing to draw from
                prior = poutine.Trace()
            groups["prior"] = sites.values(prior, draws, data=False)
            groups["prior_predictive"] = sites.values(prior, draws, data=True)
        if "unconstrained_posterior" in wanted:
            groups["unconstrained_posterior"] = sites.on_the_reals(traces[0], draws)
        if wanted & _DENSITIES:
            groups |= densities(runs, traces, draws, self.num_inner, self.top)
            if self.by_element:
                groups["log_likelihood"] = of_elements(sites, traces[0], draws)
        if new is not None:
            groups["predictions"] = predicted(runs, sites, drawn, new, draws)
        return groups

    def _predicted(self, new: Args, num_samples: int) -> Iterator[Groups]:
        """Predictions of a model without global latents, which are drawn from it."""
        first = prototype(Uncondition()(self.runs.model), new, {})
        for _, draws in self.runs.draws(self.runs.args, num_samples, [*self.runs.traces, first]):
            nothing = poutine.Trace()
            yield {"predictions": predicted(self.runs, self.sites, nothing, new, draws)}

    def _cast(self, pieces: Iterator[Piece]) -> Iterator[Piece]:
        for piece in pieces:
            small_numbers(piece.groups, self.sites.nodes)
            yield piece
