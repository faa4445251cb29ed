"""Draws nearer to the posterior than those of a guide, by importance resampling and annealing."""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
import xarray as xr
from torch import Tensor
from tqdm.auto import tqdm

from ppvae._checks import check_count, check_label, expect
from ppvae._process import exclusive
from ppvae.evaluation.hmc import chains, tune
from ppvae.evaluation.path import densities
from ppvae.objectives.trace_terms import terms
from ppvae.objectives.weights import effective_sample_size, khat, log_mean_weight
from ppvae.programs.layout import Layout
from ppvae.programs.runs import Runs, opened
from ppvae.programs.tracing import Args, kept_nodes, run_model, with_discrete


@dataclass(frozen=True, eq=False)
class Resampled:
    """What `resample` drew, and what it gained; `print` shows both in short.

    Attributes:
        latents: site -> draws of shape `(num_samples, *shape)`, as `posterior_samples` of
            `pyro.infer.Predictive`.
        gain: `elbo` of the guide, the bound `log_likelihood` that the draws reach, their difference
            `gain` with its standard error `gain_se`, all in nats per datum (dim `datum`); `ess`,
            the effective number of candidates of a draw, on average; and `khat` of the weights.
            Where some latents belong to all the data the first two are `total_elbo` and
            `log_evidence`, in nats of all the data, and there is no dim.
    """

    latents: dict[str, Tensor]
    gain: xr.Dataset

    def __repr__(self) -> str:
        count, unit = self.gain.attrs["num_samples"], self.gain.gain.attrs["unit"]
        means = {name: float(self.gain[name].mean()) for name in ("gain", "ess", "khat")}
        found = ", ".join(f"{name} {value:.3g}" for name, value in means.items())
        return f"Resampled {count} draws of {list(self.latents)}: {found} ({unit})"


@exclusive
def resample(  # noqa: D417
    model: Callable[..., Any],
    guide: Callable[..., Any],
    *args: Any,
    num_samples: int = 100,
    num_candidates: int = 64,
    num_temperatures: int = 1,
    num_leapfrog: int = 2,
    batch_size: int = 256,
    vectorized: bool | None = None,
    seed: int | None = 0,
    plate: str | None = None,
    kwargs: Mapping[str, Any] | None = None,
    progress: bool | str = True,
) -> Resampled:
    r"""Draws latents that are nearer to the posterior than the guide's own, and says by how much.

    Each draw is one of `num_candidates` draws z of the guide, chosen with chances in proportion to
    their weights p(x, z) / q(z). These draws have a density of their own, the closer to the
    posterior the more candidates there are, and an ELBO of their own, of which the mean of the log
    of the candidates' mean weight is a lower bound. So `gain`, that mean less the ELBO of the
    guide, rather understates what is gained; it is 0 where the guide is the posterior, and with one
    candidate. Where `ess` is near 1 or `khat` above 0.7 the guide hardly meets the posterior, and
    the draws may still be far from it.

    With more than one temperature the candidates are the ends of annealed chains, with their
    weights (see `annealed_importance`): a few of them are worth as much as many draws.

    The draws are independent of each other. Latents of each datum are chosen for each datum. Where
    some belong to all the data, all are chosen together, which needs many candidates or
    temperatures if there are local latents, too. Discrete latents that are summed out are drawn
    given the others.

    Args:
        model: a Pyro model.
        guide: its guide, with a density for every latent.
        *args: their arguments: data of which the first dimension is that of the data plate.
        num_samples: draws per datum, at least 2.
        num_candidates: for each draw.
        num_temperatures: of the chains; one is importance sampling, without chains.
        num_leapfrog, batch_size, vectorized, seed, plate, kwargs, progress: as for
            `annealed_importance`; with one temperature the latents may be discrete.

    Returns:
        The draws, and what was gained.

    Raises:
        ValueError: the guide has no density, or, with more temperatures, none that can be evaluated
            at given latents; the data are not finite; or an argument is out of its range.

    Rubin, Using the SIR algorithm to simulate posterior distributions, 1988; Cremer, Morris,
    Duvenaud, Reinterpreting importance-weighted autoencoders, 2017; Neal, Annealed importance
    sampling, 2001.

    Example:
        >>> import torch
        >>> from pyro.infer import Predictive
        >>> from ppvae import VAE, FamilyGuide, families, likelihoods
        >>> model = VAE(torch.nn.Linear(2, 5), latent=2, likelihood=likelihoods.Normal(1.0))
        >>> guide = FamilyGuide(model, families.mean_scale, encoder=torch.nn.Linear(5, 8))
        >>> x = torch.randn(20, 5)
        >>> found = resample(model, guide, x, num_samples=50)
        >>> found.latents["z"].shape, bool(found.gain.gain.mean() > 0)
        (torch.Size([50, 20, 2]), True)
        >>> with torch.no_grad():
        ...     drawn = Predictive(model, posterior_samples=found.latents)(torch.zeros(20, 5))
    """
    num_samples = check_count("num_samples", num_samples, 2)
    num_candidates = check_count("num_candidates", num_candidates)
    num_temperatures = check_count("num_temperatures", num_temperatures)
    num_leapfrog = check_count("num_leapfrog", num_leapfrog)
    shown, label = check_label("progress", progress, "resample")
    chosen, measured = [], []
    with opened(model, guide, args, kwargs, batch_size, vectorized, seed, plate) as runs:
        whole = terms(*runs.traces, plate)
        expect(whole.is_dense and whole.log_guide, "guide", "a density of every latent", "a point")
        local = whole.is_local
        batches = runs.batches if local else [runs.args]
        total = len(batches) * num_samples * num_candidates * num_temperatures
        with tqdm(desc=label, total=total, disable=not shown, delay=3.0) as bar:
            for batch in batches:
                choice = _Choice(num_samples, num_candidates)
                count = num_samples * num_candidates
                if num_temperatures == 1:
                    for drawn in _weighted(runs, batch, count):
                        choice.add(*drawn)
                        bar.update(len(drawn[1]))
                    chosen.append(choice.state)
                else:
                    steps = num_temperatures, num_leapfrog
                    for drawn in _annealed(runs, batch, count, *steps, bar.update):
                        choice.add(*drawn)
                    chosen.append(_sites(runs, batch, choice.state))
                measured.append(choice.measures())
        first, _ = with_discrete(runs.model, runs.traces, runs.args)
        layout = Layout.of(first, runs.plate if local else None)
    places = {name: place._replace(drawn=True) for name, place in layout.places.items()}
    values = Layout(places).back(torch.cat(chosen, 1))
    latents = {name: value.to(first.nodes[name]["value"].dtype) for name, value in values.items()}
    arrays = {name: np.concatenate([each[name] for each in measured]) for name in measured[0]}
    options = {"num_samples": num_samples, "num_candidates": num_candidates}
    gain = _dataset(arrays, local=local).assign_attrs(options, num_temperatures=num_temperatures)
    return Resampled(latents, gain)


class _Choice:
    """Keeps one of so many candidates for each draw, as they come.

    The one with the largest log weight plus Gumbel noise is one chosen by the weights.

    Attributes:
        state: what was chosen, `(draws, datum, coordinates)`.
    """

    def __init__(self, num_samples: int, num_candidates: int) -> None:
        self.num_samples, self.num_candidates, self.count = num_samples, num_candidates, 0
        self.state, self._best = torch.empty(0), torch.empty(0)
        self._weights: list[Tensor] = []
        self._starts: list[Tensor] = []

    def add(self, state: Tensor, log_weight: Tensor, start: Tensor) -> None:
        """Adds candidates.

        Args:
            state: `(candidates, datum, coordinates)`.
            log_weight: `(candidates, datum)`, as is all that follows.
            start: log p(x, z) - log q(z) of the draw of the guide behind it.
        """
        if not self.count:
            self.state = state.new_zeros(self.num_samples, *state.shape[1:])
            self._best = log_weight.new_full((self.num_samples, log_weight.shape[1]), -math.inf)
        score = log_weight - torch.empty_like(log_weight).exponential_().log()
        row = 0
        while row < len(state):
            number, done = divmod(self.count, self.num_candidates)
            rows = slice(row, row + self.num_candidates - done)
            best, index = score[rows].max(0)
            index = index[None, :, None].expand(1, *state.shape[1:])
            better = (best > self._best[number]) | (done == 0)
            moved = state[rows].gather(0, index)[0]
            self.state[number] = torch.where(better[:, None], moved, self.state[number])
            self._best[number] = torch.where(better, best, self._best[number])
            taken = len(state[rows])
            self.count, row = self.count + taken, row + taken
        self._weights.append(log_weight)
        self._starts.append(start)

    def measures(self) -> dict[str, np.ndarray]:
        """The gain and the health of the weights, for each datum."""
        size = self.num_samples, self.num_candidates
        weights = torch.cat(self._weights)
        by_draw = weights.reshape(*size, -1).transpose(0, 1)
        elbo = torch.cat(self._starts).reshape(*size, -1).mean(1)
        bound = log_mean_weight(by_draw)
        gain = bound - elbo
        measures = {
            "elbo": elbo.mean(0),
            "log_likelihood": bound.mean(0),
            "gain": gain.mean(0),
            "gain_se": gain.std(0) / math.sqrt(self.num_samples),
            "ess": effective_sample_size(by_draw).mean(0),
            "khat": khat(weights),
        }
        return {name: value.cpu().numpy() for name, value in measures.items()}


def _weighted(runs: Runs, args: Args, count: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Draws of the guide, as `_Choice.add` takes them, in the spaces of the sites."""
    pair, plate = runs.pair(args), runs.plate and runs.plate.name
    for number, draws in runs.draws(args, count, pair):
        traces = runs.pair(args, draws)
        parts = terms(*traces, plate)
        size = parts.plate.size if parts.is_local else 1
        shape = (number, size) if parts.is_local else (number,)
        weight = parts.log_weight.double().expand(shape).reshape(number, size)
        trace, _ = with_discrete(runs.model, traces, args, draws)
        layout = Layout.of(trace, runs.plate if parts.is_local else None, draws)
        values = {name: trace.nodes[name]["value"] for name in layout.places}
        yield layout.flat(values).expand(number, size, -1), weight, weight


def _annealed(
    runs: Runs,
    args: Args,
    count: int,
    num_temperatures: int,
    num_leapfrog: int,
    tick: Callable[[int], object],
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Ends of annealed chains, as `_Choice.add` takes them, in unconstrained space."""
    one = densities(runs, args)
    runs_of = partial(runs.draws, args, traces=one.traces)
    _, few = next(runs_of(min(16, count)))
    schedule = tune(densities(runs, args, few), num_temperatures, num_leapfrog)
    for _, draws in runs_of(count):
        both = densities(runs, args, draws)
        start = both.at(both.draw())
        end, log_weight, _ = chains(both, start, schedule, tick)
        yield end.state, log_weight, start.log_ratio


def _sites(runs: Runs, args: Args, state: Tensor) -> Tensor:
    """States in the spaces of the sites, with the discrete latents drawn given the others."""
    pair = runs.pair(args)
    local = terms(*pair, runs.plate and runs.plate.name).is_local
    plate, pieces, start = runs.plate if local else None, [], 0
    for count, draws in runs.draws(args, len(state), pair):
        layout = Layout.of(pair[0], plate).inside(draws)
        values, _ = layout.constrained(state[start : start + count])
        known = kept_nodes(pair[0], values)
        trace = run_model(runs.model, known, args, draws)
        trace, _ = with_discrete(runs.model, (trace, known), args, draws)
        layout = Layout.of(trace, plate, draws)
        values = {name: trace.nodes[name]["value"] for name in layout.places}
        pieces.append(layout.flat(values).expand(count, state.shape[1], -1))
        start += count
    return torch.cat(pieces)


def _dataset(arrays: dict[str, np.ndarray], *, local: bool) -> xr.Dataset:
    """The measures with their units, of each datum or of all."""
    units = dict.fromkeys(arrays, "nats per datum" if local else "nats of all the data")
    units |= {"ess": "draws", "khat": ""}
    if local:
        return xr.Dataset({k: ("datum", v, {"unit": units[k]}) for k, v in arrays.items()})
    names = {"elbo": "total_elbo", "log_likelihood": "log_evidence"}
    return xr.Dataset({names.get(k, k): ((), v[0], {"unit": units[k]}) for k, v in arrays.items()})
