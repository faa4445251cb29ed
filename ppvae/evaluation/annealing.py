r"""Log p(x) by annealed importance sampling: from below and, for simulated data, from above.

A chain moves from a draw of a known density q0 to the posterior in small steps: at temperature b
from 0 to 1 its density is `q0(z)^(1 - b) p(x, z)^b`. The weight that it gathers on its way has mean
p(x) whatever the number of temperatures; the more there are, the less it varies.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
import xarray as xr
from torch import Tensor
from tqdm.auto import tqdm

from ppvae import families
from ppvae._checks import check_count
from ppvae._scopes import eval_mode, private_modules, random_state, unchecked
from ppvae.data.adapters import prepared
from ppvae.evaluation.hmc import anneal, tune
from ppvae.evaluation.path import Densities
from ppvae.guides.family_guide import FamilyGuide
from ppvae.programs.runs import draw_runs, is_vectorized, minibatches

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
    options = _Options(num_temperatures, num_chains, num_leapfrog, batch_size)
    options.check()
    guide = _start_of(model, guide, start)
    args = prepared(args)
    vectorized = is_vectorized(model) if vectorized is None else vectorized
    found = []
    with torch.no_grad(), private_modules(), random_state(seed), eval_mode(model, guide):
        with unchecked():
            pair = _Pair(model, guide, plate, start == "prior", vectorized)
            whole = pair.densities(args)
            true = None if latents is None else whole.state(_checked(whole, latents))
            batches = minibatches(model, guide, args, whole.frame, batch_size, plate)
            ends = 1 if latents is None else 2
            label = progress if isinstance(progress, str) else "annealed_importance"
            total = len(batches) * num_chains * num_temperatures * ends
            size = whole.frame.size if len(batches) == 1 else batch_size
            with tqdm(desc=label, total=total, disable=not progress, delay=3.0) as bar:
                for number, batch in enumerate(batches):
                    rows = slice(number * size, (number + 1) * size)
                    state = None if true is None else true[:, rows]
                    found.append(_estimates(pair, batch, options, state, bar.update))
    arrays = {name: np.concatenate([each[name] for each in found]) for name in found[0]}
    attrs = {"num_temperatures": num_temperatures, "num_chains": num_chains, "start": start}
    return xr.Dataset({name: ("datum", value) for name, value in arrays.items()}, attrs=attrs)


class _Options(NamedTuple):
    num_temperatures: int
    num_chains: int
    num_leapfrog: int
    batch_size: int

    def check(self) -> None:
        for name, value in self._asdict().items():
            check_count(name, value)


class _Pair(NamedTuple):
    """A model, the guide that the chains start from, and how to run them."""

    model: Any
    guide: Any
    plate: str | None
    prior: bool
    vectorized: bool

    def densities(self, args: tuple[Any, ...], draws: Any = None) -> Densities:
        try:
            return Densities(self.model, self.guide, args, self.plate, draws, prior=self.prior)
        except NotImplementedError as error:
            if not self.prior:
                raise
            raise ValueError(f"model: expected priors that can be drawn from; {error}") from error


def _start_of(model: Any, guide: Any, start: str) -> Any:
    """The guide that the chains start from."""
    if start not in _STARTS:
        raise ValueError(f"start: expected one of {', '.join(_STARTS)}; got {start!r}")
    if start == "prior":
        return FamilyGuide(model, families.noise_only)
    if guide is None:
        raise ValueError('guide: expected a guide for start="guide", got None')
    return guide


def _checked(whole: Densities, latents: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The latents as tensors like those that the model draws."""
    if set(latents) != set(whole.places):
        raise ValueError(
            f"latents: expected values of {list(whole.places)}, got those of {list(latents)}"
        )
    values = {}
    for name, given in latents.items():
        node = whole.model_trace.nodes[name]
        value = torch.as_tensor(given).to(node["value"])
        if value.shape != node["value"].shape:
            raise ValueError(
                f"latents: expected shape {tuple(node['value'].shape)} at {name!r}, got "
                f"{tuple(value.shape)}"
            )
        if not (node["fn"].support.check(value).all() and value.isfinite().all()):
            raise ValueError(f"latents: expected values in {node['fn'].support} at {name!r}")
        values[name] = value
    return values


def _estimates(
    pair: _Pair,
    args: tuple[Any, ...],
    options: _Options,
    true: Tensor | None,
    tick: Callable[[int], object],
) -> dict[str, np.ndarray]:
    """The estimates for one minibatch; `true` is the state that the data were simulated from."""
    one, chains = pair.densities(args), options.num_chains
    nodes = [*one.model_trace.nodes.values(), *one.guide_trace.nodes.values()]
    sizes = [node["value"].numel() for node in nodes if node["type"] == "sample"]
    widest = max(sizes) if pair.vectorized else None
    few = next(draw_runs(pair.model, args, max(1, chains // 4), widest))[1]
    pilot = pair.densities(args, few)
    schedule = tune(pilot, options.num_temperatures, options.num_leapfrog)
    forth, back, accepted = [], [], []
    for count, draws in draw_runs(pair.model, args, chains, widest):
        densities = pair.densities(args, draws)
        log_weight, share = anneal(densities, densities.at(densities.draw()), schedule, tick)
        forth.append(log_weight)
        accepted.append(share)
        if true is not None:
            point = densities.at(true.expand(count, -1, -1))
            back.append(anneal(densities, point, schedule.reversed(), tick)[0])
    log_weight = torch.cat(forth)
    found = {
        "log_likelihood": log_weight.logsumexp(0) - math.log(chains),
        "ess": 1 / torch.softmax(log_weight, 0).square().sum(0),
        "acceptance": torch.cat(accepted).mean(0),
    }
    if true is not None:
        found["upper"] = math.log(chains) - torch.cat(back).logsumexp(0)
    return {name: value.cpu().numpy() for name, value in found.items()}
