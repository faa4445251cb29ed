r"""Log p(x) by annealed importance sampling: from below and, for simulated data, from above.

A chain moves from a draw of a known density q0 to the posterior in small steps: at temperature b
from 0 to 1 its density is `q0(z)^(1 - b) p(x, z)^b`. The weight that it gathers on its way has mean
p(x) whatever the number of temperatures; the more there are, the less it varies.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
import xarray as xr
from torch import Tensor
from tqdm.auto import tqdm

from ppvae import families
from ppvae._checks import check_choice, check_count, expect
from ppvae.evaluation.hmc import anneal, tune
from ppvae.evaluation.path import Densities, densities
from ppvae.guides.family_guide import FamilyGuide
from ppvae.objectives.weights import effective_sample_size, log_mean_weight
from ppvae.programs.layout import Layout
from ppvae.programs.nodes import latent_nodes
from ppvae.programs.runs import Runs, opened

_STARTS = ("guide", "prior")


def annealed_importance(
    model: Callable[..., Any],
    guide: Callable[..., Any] | None,
    *args: Any,
    num_temperatures: int = 200,
    num_chains: int = 16,
    num_leapfrog: int = 2,
    batch_size: int = 256,
    start: str = "guide",
    latents: Mapping[str, Tensor] | None = None,
    vectorized: bool | None = None,
    seed: int | None = 0,
    plate: str | None = None,
    kwargs: Mapping[str, Any] | None = None,
    progress: bool | str = True,
) -> xr.Dataset:
    r"""Estimates log p(x) of each datum by annealed importance sampling.

    Per datum (dim `datum`), in nats: `log_likelihood`, an estimate of log p(x) from below (a log
    density: the larger, the better the model), as the log of the mean weight over the chains. That
    mean has expectation p(x), so the estimate is below log p(x) on average, and above it by more
    than c nats with a chance of at most exp(-c). `ess`, the effective number of chains: the closer
    to `num_chains` the better, with a standard error of about `sqrt(1 / ess - 1 / num_chains)`;
    near 1, more temperatures are needed. `acceptance`, the mean over all transitions (NaN with one
    temperature, which has none).

    With `latents`, also `upper`, an estimate of log p(x) from above: above it on average, and below
    by more than c nats with a chance of at most exp(-c). It is the log of the harmonic mean of the
    weights of chains that run back from the latents that the datum was simulated from, which are an
    exact draw of the posterior. The two enclose log p(x), so the distance between their means over
    the data is the most by which either is wrong, up to the errors of these means. Other data have
    no such bound: simulate some, to see how many temperatures the model needs.

    The transitions are Hamiltonian, in unconstrained space. A pilot run for each minibatch finds
    their step sizes, and the temperatures, for each datum; then all is frozen, since weights from
    step sizes that follow the chains would be biased.

    Args:
        model: a Pyro model all latents of which are continuous and inside the data plate.
        guide: its guide, which is not used if the chains start from the prior; then None will do.
        *args: their arguments: data of which the first dimension is that of the data plate.
        num_temperatures: steps from the start to the posterior. One is importance sampling.
        num_chains: chains per datum.
        num_leapfrog: leapfrog steps of a transition; at equal cost, 2 of them at many temperatures
            measured better than 5 at fewer.
        batch_size: data per run.
        start: "guide" starts from draws of q(z | x), a shorter way if the guide is any good, and a
            poor one if it is narrower than the posterior; "prior" starts from p(z).
        latents: latent site -> the values that the data were simulated from by this model, as
            `simulate(model, *args).latents` has them; with any others `upper` is no bound.
        vectorized: run many chains at once, which the model must be written for (all operations
            leave leading dims alone); by default only where the model says so, as `VAE` does.
        seed: seeds the draws, without a trace outside; None uses the caller's stream.
        plate: name of the data plate; by default `data`, or else the outermost one.
        kwargs: keyword arguments of model and guide.
        progress: show a progress bar, if it takes longer than some seconds; a string is its label.

    Returns:
        The estimates. Attributes: `num_temperatures`, `num_chains`, `start`.

    Raises:
        ValueError: the data or latents are not what they should be, an argument is out of its
            range, a latent site is discrete or outside the data plate, or the chains cannot start:
            the guide has no density (a point) or none that can be evaluated at given latents, or
            the prior is improper.

    Neal, Annealed importance sampling, 2001; Wu et al., On the quantitative analysis of
    decoder-based generative models, 2017; Grosse, Ghahramani, Adams, Sandwiching the marginal
    likelihood using bidirectional Monte Carlo, 2015.

    Example:
        >>> import torch
        >>> from ppvae import VAE, likelihoods, simulate
        >>> model = VAE(torch.nn.Linear(2, 5), latent=2, likelihood=likelihoods.Normal(0.5))
        >>> (x,), latents = simulate(model, torch.zeros(3, 5), seed=0)
        >>> found = annealed_importance(model, None, x, start="prior", latents=latents)
        >>> bool(found.log_likelihood.mean() < found.upper.mean() + 0.1)
        True
    """
    for name, value in (
        ("num_temperatures", num_temperatures),
        ("num_chains", num_chains),
        ("num_leapfrog", num_leapfrog),
    ):
        check_count(name, value)
    check_choice("start", start, _STARTS)
    if start == "prior":
        guide = FamilyGuide(model, families.noise_only)
    if guide is None:
        raise ValueError('guide: expected a guide for start="guide", got None')
    path = _Path(num_temperatures, num_chains, num_leapfrog, plate, start == "prior")
    options: dict[str, Any] = {"kwargs": kwargs, "batch_size": batch_size, "vectorized": vectorized}
    results = []
    with _drawable(start), opened(model, guide, args, seed=seed, plate=plate, **options) as runs:
        states: Sequence[Tensor | None] = [None] * len(runs.batches)
        if latents is not None:
            true = Layout.of(runs.traces[0], runs.plate).free(_checked(runs.traces[0], latents))
            states = true.split(batch_size if len(runs.batches) > 1 else true.shape[1], 1)
        label = progress if isinstance(progress, str) else "annealed_importance"
        ways = 1 if latents is None else 2
        total = len(runs.batches) * num_chains * num_temperatures * ways
        with tqdm(desc=label, total=total, disable=not progress, delay=3.0) as bar:
            for batch, state in zip(runs.batches, states, strict=True):
                results.append(_estimates(runs, batch, path, state, bar.update))
    arrays = {name: np.concatenate([each[name] for each in results]) for name in results[0]}
    attrs = {"num_temperatures": num_temperatures, "num_chains": num_chains, "start": start}
    return xr.Dataset({name: ("datum", value) for name, value in arrays.items()}, attrs=attrs)


class _Path(NamedTuple):
    """How the chains of each datum go from the start to the posterior."""

    num_temperatures: int
    num_chains: int
    num_leapfrog: int
    plate: str | None
    prior: bool


@contextmanager
def _drawable(start: str) -> Iterator[None]:
    """Says of priors that cannot be drawn from that no chain can start there."""
    try:
        yield
    except NotImplementedError as error:
        if start != "prior":
            raise
        raise ValueError(f"model: expected priors that can be drawn from; {error}") from error


def _checked(trace: Any, latents: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The latents as tensors like those that the model draws."""
    nodes = {node["name"]: node for node in latent_nodes(trace)}
    expect(set(latents) == set(nodes), "latents", f"values of {list(nodes)}", list(latents))
    values = {}
    for name, node in nodes.items():
        value = torch.as_tensor(latents[name]).to(node["value"])
        shape, support = tuple(node["value"].shape), node["fn"].support
        same = value.shape == node["value"].shape
        expect(same, "latents", f"shape {shape} at {name!r}", tuple(value.shape))
        inside = support.check(value).all() and value.isfinite().all()
        expect(inside, "latents", f"values in {support} at {name!r}", "others")
        values[name] = value
    return values


def _estimates(
    runs: Runs,
    args: tuple[Any, ...],
    path: _Path,
    true: Tensor | None,
    tick: Callable[[int], object],
) -> dict[str, np.ndarray]:
    """The estimates for one minibatch; `true` is the state that the data were simulated from."""

    def at(draws: Any) -> Densities:
        return densities(runs.model, runs.guide, args, path.plate, draws, prior=path.prior)

    traces, num_chains = at(None).traces, path.num_chains
    _, few = next(runs.draws(args, max(1, num_chains // 4), traces))
    schedule = tune(at(few), path.num_temperatures, path.num_leapfrog)
    forth, back, accepted = [], [], []
    for count, draws in runs.draws(args, num_chains, traces):
        both = at(draws)
        log_weight, share = anneal(both, both.at(both.draw()), schedule, tick)
        forth.append(log_weight)
        accepted.append(share)
        if true is not None:
            point = both.at(true.expand(count, -1, -1))
            back.append(anneal(both, point, schedule.reversed(), tick)[0])
    log_weight = torch.cat(forth)
    estimates = {
        "log_likelihood": log_mean_weight(log_weight),
        "ess": effective_sample_size(log_weight),
        "acceptance": torch.cat(accepted).mean(0),
    }
    if true is not None:
        estimates["upper"] = -log_mean_weight(torch.cat(back))
    return {name: value.cpu().numpy() for name, value in estimates.items()}
