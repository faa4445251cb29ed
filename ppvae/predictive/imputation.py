"""What stood in the places of missing entries, by the posterior of the latents."""

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from ppvae._checks import check_count, check_share
from ppvae._process import exclusive
from ppvae.data.adapters import form_of
from ppvae.data.tables import labels_of
from ppvae.objectives import weights
from ppvae.predictive.expectations import expectations, one_site, point, sites_of_data
from ppvae.predictive.weighted import batches_of_draws, weighted_runs
from ppvae.programs.layout import Place
from ppvae.programs.missing import observed_entries
from ppvae.programs.nodes import Node, bare_distribution
from ppvae.programs.runs import Runs, opened
from ppvae.programs.tracing import Args, with_discrete

_MOST = 10_000_000  # numbers of all draws of a minibatch that are held at a time


@exclusive
def impute(  # noqa: D417
    model: Callable[..., Any],
    guide: Callable[..., Any],
    *args: Any,
    num_samples: int = 1000,
    num_imputations: int = 20,
    level: float = 0.9,
    site: str | None = None,
    batch_size: int = 256,
    vectorized: bool | None = None,
    seed: int | None = 0,
    plate: str | None = None,
    kwargs: Mapping[str, Any] | None = None,
) -> xr.Dataset:
    r"""Fills in the missing entries of data, which are NaN, masked or NA.

    By self-normalised importance sampling: with draws z of the guide and their weights
    w = p(x_observed, z) / q(z | x), a missing entry has the expectation

    .. math:: E[x_m | x_o] \approx \sum_k w_k E[x_m | z_k] / \sum_k w_k

    Variables of the result, those of the data with the dims of the data, the first one `datum`:

    - `value`: the data, with this expectation where one is missing, and of categories and grades
      the most probable code;
    - `lower`, `upper`: the ends of the interval that holds a missing entry with probability
      `level`, as much below as above; of other entries their value;
    - `imputations` (dim `imputation` in front): completed data, drawn from p(x_m | x_o); what
      follows from each of them, taken together, says how uncertain it is (multiple imputation);
    - `missing`: which entries are; `category`, in which columns they were filled in by codes;
    - `ess`, `khat` per datum: the effective number of draws, and the Pareto shape of the tail of
      the weights, above 0.7 of which nothing here can be trusted (NaN with fewer than 30 draws).

    Args:
        model: a Pyro model.
        guide: its guide.
        *args: their arguments: data with missing entries. An `obs_mask` of the model's own counts
            as well; its site `x` is called `x_observed`.
        num_samples: draws per datum, at least 2.
        num_imputations: how many completed data to draw, at least 1.
        level: probability of the intervals.
        site: the observed site, where more than one has missing entries.
        batch_size, vectorized, seed, plate, kwargs: as for `evaluate`.

    Returns:
        The completed data; `data.to_frame(found.value, table)` makes a table of them, with its
        categories.

    Raises:
        TypeError: an argument is of another kind.
        ValueError: an argument is out of its range, the data are not such as the model takes, or no
            site can leave entries out.

    Mattei and Frellsen, MIWAE: deep generative modelling and imputation of incomplete data sets,
    2019.

    Example:
        >>> import torch
        >>> from ppvae import VAE, FamilyGuide, families, impute, likelihoods
        >>> model = VAE(torch.nn.Linear(2, 5), latent=2, likelihood=likelihoods.Normal(1.0))
        >>> guide = FamilyGuide(model, families.mean_scale, encoder=torch.nn.Linear(5, 8))
        >>> x = torch.randn(20, 5)
        >>> x[0, 3] = float("nan")
        >>> found = impute(model, guide, x)
        >>> found.value.dims, int(found.missing.sum()), bool(found.value.isnull().any())
        (('datum', 'x_dim_0'), 1, False)
    """
    num_samples = check_count("num_samples", num_samples, 2)
    num_imputations = check_count("num_imputations", num_imputations)
    level, batch_size = check_share("level", level), check_count("batch_size", batch_size)
    wide = max((math.prod(arg.shape[1:]) for arg in args if hasattr(arg, "shape")), default=1)
    rows = max(1, min(batch_size, _MOST // (num_samples * max(wide, 1))))
    with opened(model, guide, args, kwargs, rows, vectorized, seed, plate) as runs:
        name = _able(runs, site)
        pieces = []
        for batch in batches_of_draws(runs):
            held = _draws(runs, batch, name, num_samples)
            pieces.append(_completed(held, num_imputations, level))
    arrays = {k: np.concatenate([p[k] for p in pieces], int(k == "imputations")) for k in pieces[0]}
    dims = ["datum", *(f"{name}_dim_{i}" for i in range(arrays["value"].ndim - 1))]
    arrays["category"] = np.asarray(arrays["category"].any(0))
    own = {"category": dims[1:], "ess": ["datum"], "khat": ["datum"]}
    own["imputations"] = ["imputation", *dims]
    variables = {k: (own.get(k, dims), array) for k, array in arrays.items()}
    attrs = {"site": name, "level": level, "num_samples": num_samples}
    labels = labels_of(args, arrays["value"].shape, form_of(model, guide))
    coords = {"datum": labels.rows, f"{name}_dim_0": labels.columns}
    coords = {dim: told for dim, told in coords.items() if told is not None}
    return xr.Dataset(variables, coords, attrs)


class _Draws(NamedTuple):
    """All draws for a minibatch.

    Attributes:
        log_weight: shape `(draws, datum)`.
        value: the data, shape `(datum, *columns)`.
        missing: which entries are, of that shape.
        drawn: a draw of each missing entry, shape `(draws, missing)`.
        expected: for some of the missing entries, and which these are, the expectation given the
            latents, shape `(draws, some, 1)`, or probabilities of codes, `(draws, some, codes)`.
    """

    log_weight: Tensor
    value: Tensor
    missing: Tensor
    drawn: Tensor
    expected: list[tuple[Tensor, Tensor]]


def _able(runs: Runs, site: str | None) -> str:
    """The site whose entries are filled in: the one that has missing entries, or the only one."""
    nodes = {node["name"]: node for node in sites_of_data(runs)}
    gaps = [name for name, node in nodes.items() if not _entries(node).all()]
    named = f"{site}_observed"  # as an `obs_mask` calls it
    site = named if named in nodes and site not in nodes else site
    return one_site(gaps or list(nodes), site, known=list(nodes))


def _entries(node: Node) -> Tensor:
    """Which entries of a site are observed."""
    entries, value = observed_entries(node), node["value"]
    if entries is None:
        entries = torch.ones_like(value, dtype=torch.bool)
    mask = node["mask"] if node["name"].endswith("_observed") else None
    if isinstance(mask, Tensor):  # of an `obs_mask`
        entries = entries & mask.reshape(mask.shape + (1,) * len(node["fn"].event_shape))
    return entries.expand(value.shape)


def _draws(runs: Runs, args: Args, name: str, num_samples: int) -> _Draws:
    """All draws for a minibatch."""
    first = with_discrete(runs.model, runs.pair(args), args)[0].nodes[name]
    place = Place.of(first, runs.plate)
    value, missing = place.front(first["value"])[0], ~place.front(_entries(first))[0]
    log_weight: list[Tensor] = []
    drawn: list[Tensor] = []
    parts: list[list[tuple[Tensor, Tensor]]] = []
    for trace, draws, weight in weighted_runs(runs, args, num_samples):
        node = trace.nodes[name]
        place = Place.of(node, runs.plate, draws)
        fn = bare_distribution(node["fn"])
        log_weight.append(weight)
        drawn.append(place.front(fn.sample().to(value.dtype))[:, missing])
        parts.append(expectations(fn, place, missing))
    expected = [
        (each[0][0], torch.cat([mean for _, mean in each])) for each in zip(*parts, strict=True)
    ]
    weight = torch.cat(log_weight).expand(num_samples, len(value))
    return _Draws(weight, value, missing, torch.cat(drawn), expected)


def _completed(held: _Draws, count: int, level: float) -> dict[str, np.ndarray]:
    """The completed data of a minibatch, as arrays."""
    datum = held.missing.nonzero()[:, 0]
    share = torch.softmax(held.log_weight, 0)
    own = share[:, datum]  # (draws, missing)
    best = held.value.new_zeros(len(datum))
    for at, expected in held.expected:
        mean = (own[:, at].unsqueeze(-1) * expected.double()).sum(0)
        best[at] = point(mean).to(best.dtype)
    order = held.drawn.argsort(0)
    below = own.gather(0, order).cumsum(0)
    ends = []
    for end in ((1 - level) / 2, (1 + level) / 2):
        rank = (below < end).sum(0).clamp_max(len(below) - 1)
        ends.append(held.drawn.gather(0, order.gather(0, rank[None]))[0])
    chosen = torch.multinomial(share.T, count, replacement=True).T  # (imputations, datum)
    drawn = held.drawn.gather(0, chosen[:, datum])

    def whole(entries: Tensor) -> np.ndarray:
        value = held.value.expand(*entries.shape[:-1], *held.value.shape).clone()
        value[..., held.missing] = entries
        return np.asarray(value.cpu().numpy())

    category = torch.zeros_like(datum, dtype=torch.bool)
    for at, mean in held.expected:
        category[at] = mean.shape[-1] > 1
    coded = torch.zeros_like(held.missing)
    coded[held.missing] = category
    return {
        "category": coded.cpu().numpy(),
        "value": whole(best),
        "lower": whole(ends[0]),
        "upper": whole(ends[1]),
        "imputations": whole(drawn),
        "missing": held.missing.cpu().numpy(),
        "ess": weights.effective_sample_size(held.log_weight).cpu().numpy(),
        "khat": weights.khat(held.log_weight).numpy(),
    }
