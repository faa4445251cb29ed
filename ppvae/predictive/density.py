"""How probable data are under a fitted model."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
import xarray as xr

from ppvae._checks import check_count
from ppvae._process import exclusive
from ppvae.objectives.weights import estimates
from ppvae.predictive.weighted import batches_of_draws, weighted_runs
from ppvae.programs.runs import opened


@exclusive
def log_prob(  # noqa: D417
    model: Callable[..., Any],
    guide: Callable[..., Any],
    *args: Any,
    num_samples: int = 1000,
    batch_size: int = 256,
    vectorized: bool | None = None,
    seed: int | None = 0,
    plate: str | None = None,
    kwargs: Mapping[str, Any] | None = None,
) -> xr.Dataset:
    """Log p(x) of data under the model, by importance sampling with the guide, and its error.

    It is a bound from below, in expectation, and most often too low where the weights are skewed,
    by more than the standard error says: the larger `khat`, the more. Of missing entries nothing is
    counted. Where some latent belongs to all the data it is one number, that of all of them.

    Args:
        model: a Pyro model.
        guide: its guide, which must have a density.
        *args: their arguments, such as data.
        num_samples: draws per datum, at least 2.
        batch_size, vectorized, seed, plate, kwargs: as for `evaluate`.

    Returns:
        Per datum, in nats: `log_likelihood` with its standard error `log_likelihood_se`; the
        effective number of draws `ess`, and `khat`, above 0.7 of which neither can be trusted (NaN
        with fewer than 30 draws).

    Raises:
        TypeError: an argument is of another kind.
        ValueError: an argument is out of its range, the data are not such as the model takes, or
            the guide is a point.

    Example:
        >>> from ppvae import VAE, FamilyGuide, families, likelihoods
        >>> model = VAE(torch.nn.Linear(2, 5), latent=2, likelihood=likelihoods.Normal(1.0))
        >>> guide = FamilyGuide(model, families.mean_scale, encoder=torch.nn.Linear(5, 8))
        >>> dict(log_prob(model, guide, torch.randn(20, 5)).sizes)
        {'datum': 20}
    """
    num_samples = check_count("num_samples", num_samples, 2)
    pieces: dict[str, list[torch.Tensor]] = {}
    with opened(model, guide, args, kwargs, batch_size, vectorized, seed, plate) as runs:
        for batch in batches_of_draws(runs):
            drawn = weighted_runs(runs, batch, num_samples, density=True)
            weight = torch.cat([weight for _, _, weight in drawn])
            for name, value in estimates(weight).items():
                pieces.setdefault(name, []).append(value)
    values = {name: torch.cat(each).cpu().numpy() for name, each in pieces.items()}
    units = {"ess": "draws", "khat": ""}
    variables = {
        name: ("datum", value, {"unit": units.get(name, "nats")}) for name, value in values.items()
    }
    return xr.Dataset(variables, attrs={"num_samples": num_samples})
