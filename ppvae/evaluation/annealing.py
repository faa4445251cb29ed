r"""Log p(x) by annealed importance sampling: from below and, for simulated data, from above.

A chain moves from a draw of a known density q0 to the posterior in small steps: at temperature b
from 0 to 1 its density is `q0(z)^(1 - b) p(x, z)^b`. The weight that it gathers on its way has mean
p(x) whatever the number of temperatures; the more there are, the less it varies.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
import xarray as xr
from torch import Tensor
from tqdm.auto import tqdm

from ppvae import families
from ppvae._checks import check_choice, check_count, check_label, check_real, expect
from ppvae._process import exclusive
from ppvae.evaluation.hmc import Schedule, anneal, tune
from ppvae.evaluation.path import Densities, densities
from ppvae.families.rules import support_of
from ppvae.guides.family_guide import FamilyGuide
from ppvae.objectives.trace_terms import terms
from ppvae.objectives.weights import effective_sample_size, log_mean_weight
from ppvae.programs.layout import Layout
from ppvae.programs.nodes import latent_nodes
from ppvae.programs.runs import Runs, opened


@exclusive
def annealed_importance(  # noqa: D417
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

    Where some latents belong to all the data, so does the estimate: `log_evidence`, in nats, with
    `ess`, `acceptance` and `upper` of all data together, and no dim. Discrete latents of finitely
    many values are summed out.

    The transitions are Hamiltonian, in unconstrained space. A pilot run for each minibatch finds
    their step sizes, and the temperatures, for each datum; then all is frozen, since weights from
    step sizes that follow the chains would be biased.

    Args:
        model: a Pyro model, the latents of which are continuous or summed out.
        guide: its guide, which is not used if the chains start from the prior; then None will do.
        *args: their arguments: data of which the first dimension is that of the data plate.
        num_temperatures: steps from the start to the posterior. One is importance sampling.
        num_chains: chains per datum.
        num_leapfrog: leapfrog steps of a transition; at equal cost, 2 of them at many temperatures
            measured better than 5 at fewer.
        start: "guide" starts from draws of q(z | x), a shorter way if the guide is any good, and a
            poor one if it is narrower than the posterior; "prior" starts from p(z).
        latents: latent site -> the values that the data were simulated from by this model, as
            `simulate(model, *args).latents` has them; with any others `upper` is no bound.
        batch_size, vectorized, seed, plate, kwargs, progress: as for `evaluate`, with chains for
            draws.

    Returns:
        The estimates. Attributes: `num_temperatures`, `num_chains`, `start`.

    Raises:
        ValueError: the data or latents are not what they should be, an argument is out of its
            range, a latent has infinitely many discrete values, or the chains cannot start:
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
        >>> told = {"start": "prior", "latents": latents, "num_temperatures": 20}
        >>> result = annealed_importance(model, None, x, **told)
        >>> bool(result.log_likelihood.mean() < result.upper.mean() + 0.1)
        True
    """
    num_temperatures = check_count("num_temperatures", num_temperatures)
    num_chains = check_count("num_chains", num_chains)
    num_leapfrog = check_count("num_leapfrog", num_leapfrog)
    check_choice("start", start, ("guide", "prior"))
    guide = FamilyGuide(model, {"*": families.noise_only}) if start == "prior" else guide
    if guide is None:
        raise ValueError('guide: expected a guide for start="guide", got None')
    shown, label = check_label("progress", progress, "annealed_importance")
    results = []
    opening = opened(model, guide, args, kwargs, batch_size, vectorized, seed, plate)
    with _hints(start), opening as runs:
        local = terms(*runs.traces, plate).is_local
        batches = runs.batches if local else [runs.args]
        states = _states(runs, latents, batch_size, local=local)
        paths = num_chains if latents is None else 2 * num_chains
        total = len(batches) * paths * num_temperatures
        with tqdm(desc=label, total=total, disable=not shown, delay=3.0) as bar:
            for batch, state in zip(batches, states, strict=True):
                at = partial(densities, runs, batch, prior=start == "prior")
                tuned = partial(tune, num_temperatures=num_temperatures, num_leapfrog=num_leapfrog)
                results.append(_estimates(at, tuned, num_chains, state, bar.update))
    arrays = {name: np.concatenate([each[name] for each in results]) for name in results[0]}
    attrs = {"num_temperatures": num_temperatures, "num_chains": num_chains, "start": start}
    if local:
        return xr.Dataset({name: ("datum", value) for name, value in arrays.items()}, attrs=attrs)
    arrays["log_evidence"] = arrays.pop("log_likelihood")
    return xr.Dataset({name: ((), value[0]) for name, value in arrays.items()}, attrs=attrs)


@contextmanager
def _hints(start: str) -> Iterator[None]:
    """Adds to an error what it means for the start of the chains."""
    kind: type[Exception] = NotImplementedError if start == "prior" else ValueError
    try:
        yield
    except kind as error:
        hint = f"model: expected priors that can be drawn from; {error}"
        if start != "prior":
            if not str(error).startswith("guide: "):
                raise
            hint = f'{error} (start="prior" needs no density of a guide)'
        raise ValueError(hint) from error


def _states(
    runs: Runs, latents: Mapping[str, Tensor] | None, size: int, *, local: bool
) -> list[Tensor | None]:
    """The state that each minibatch, of that size, was simulated from; None if it is not known."""
    if latents is None:
        return [None] * (len(runs.batches) if local else 1)
    nodes = {node["name"]: node for node in latent_nodes(runs.traces[0])}
    kind = type(latents).__name__
    expect(isinstance(latents, Mapping), "latents", "a mapping from sites", kind, TypeError)
    expect(set(latents) == set(nodes), "latents", f"values of {list(nodes)}", list(latents))
    values = {k: check_real("latents", latents[k]).to(node["value"]) for k, node in nodes.items()}
    for name, value in values.items():
        shape, support = tuple(nodes[name]["value"].shape), support_of(nodes[name]["fn"])
        expect(value.shape == shape, "latents", f"shape {shape} at {name!r}", tuple(value.shape))
        inside = support.check(value).all() and value.isfinite().all()
        expect(inside, "latents", f"values in {support} at {name!r}", "others")
    state = Layout.of(runs.traces[0], runs.plate if local else None).free(values)
    if not local:
        return [state]
    return [*state.split(size if len(runs.batches) > 1 else state.shape[1], 1)]


def _estimates(
    at: Callable[..., Densities],
    tuned: Callable[[Densities], Schedule],
    num_chains: int,
    true: Tensor | None,
    tick: Callable[[int], object],
) -> dict[str, np.ndarray]:
    """The estimates for one minibatch.

    Args:
        at: makes the log densities of the minibatch in a plate of chains.
        tuned: finds the path of the chains.
        num_chains: chains per datum.
        true: the state that the data were simulated from, if that is known.
        tick: called with the number of chains after each temperature.
    """
    one = at()
    runs_of = partial(one.runs.draws, one.args, traces=one.traces)
    _, few = next(runs_of(max(1, num_chains // 4)))
    schedule = tuned(at(few))
    up, down = [], []
    for count, draws in runs_of(num_chains):
        both = at(draws)
        up.append(anneal(both, both.at(both.draw()), schedule, tick))
        if true is not None:
            point = both.at(true.expand(count, -1, -1))
            down.append(anneal(both, point, schedule.reversed(), tick)[0])
    log_weight, acceptance = (torch.cat(column) for column in zip(*up, strict=True))
    estimates = {
        "log_likelihood": log_mean_weight(log_weight),
        "ess": effective_sample_size(log_weight),
        "acceptance": acceptance.mean(0),
    }
    if true is not None:
        estimates["upper"] = -log_mean_weight(torch.cat(down))
    return {name: value.cpu().numpy() for name, value in estimates.items()}
