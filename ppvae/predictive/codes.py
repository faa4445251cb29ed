"""From data to codes and back: the posterior of the latents, reconstructions, and paths."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from ppvae._checks import check_count, expect
from ppvae._process import exclusive
from ppvae._scopes import eval_mode, private_modules
from ppvae.data.adapters import form_of, prepared
from ppvae.predictive.expectations import expectations, one_site, point, sites_of_data
from ppvae.predictive.weighted import batches_of_draws, weighted_runs
from ppvae.programs.layout import Place
from ppvae.programs.nodes import bare_distribution, drawn_nodes, latent_nodes
from ppvae.programs.runs import Runs, opened
from ppvae.programs.tracing import Args, with_discrete


@exclusive
def encode(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    *args: Any,
    site: str | None = None,
    plate: str | None = None,
    kwargs: Mapping[str, Any] | None = None,
) -> Any:
    """The distribution q(z | x) of a latent, for all data in one pass.

    Args:
        model: a Pyro model.
        guide: its guide.
        *args: their arguments, such as data.
        site: the latent site, where there are several.
        plate: name of the data plate, see `evaluate`.
        kwargs: keyword arguments of model and guide.

    Returns:
        A Pyro distribution, for local latents of batch shape `(datum, ...)`; it has `log_prob`,
        `sample` and, unless it was carried to a support or through a flow, `mean` and `stddev`. Of
        a guide that is a point it is a `Delta`, of which `mean` is the code.

    Raises:
        TypeError: an argument is of another kind.
        ValueError: the data are not such as the model takes, there are several latents, or they
            are pieces of a joint draw.

    Example:
        >>> import torch
        >>> from ppvae import VAE, FamilyGuide, families, likelihoods
        >>> model = VAE(torch.nn.Linear(2, 5), latent=2, likelihood=likelihoods.Normal(1.0))
        >>> guide = FamilyGuide(model, families.mean_scale, encoder=torch.nn.Linear(5, 8))
        >>> encode(model, guide, torch.randn(20, 5)).mean.shape
        torch.Size([20, 2])
    """
    with opened(model, guide, args, kwargs, seed=0, plate=plate) as runs:
        latents = [node["name"] for node in latent_nodes(runs.traces[0])]
        name = one_site(latents, site, known=latents)
        node = runs.traces[1].nodes[name]
        drawn = drawn_nodes(runs.traces[1])
        whole = name in drawn or not drawn  # not a piece of a joint draw
        wanted = f"a guide that draws {name!r} by itself, as mean_scale does"
        expect(whole, "guide", wanted, "a joint draw of several latents; `from_pyro_svi` has draws")
        return node["fn"]


@exclusive
def reconstruct(  # noqa: D417
    model: Callable[..., Any],
    guide: Callable[..., Any],
    *args: Any,
    num_samples: int = 32,
    site: str | None = None,
    batch_size: int = 256,
    vectorized: bool | None = None,
    seed: int | None = 0,
    plate: str | None = None,
    kwargs: Mapping[str, Any] | None = None,
) -> Tensor:
    """What data come back as from their codes: E[x | z], averaged over draws of q(z | x).

    Missing entries come back too, from the codes that the encoder gives without them; `impute`
    weighs the draws by how well they explain the others.

    Args:
        model: a Pyro model.
        guide: its guide.
        *args: their arguments, such as data.
        num_samples: draws per datum.
        site: the observed site, where there are several.
        batch_size, vectorized, seed, plate, kwargs: as for `evaluate`.

    Returns:
        Data `(datum, *event)`: means, and of categories and grades the most probable code.

    Raises:
        TypeError: an argument is of another kind.
        ValueError: an argument is out of its range, the data are not such as the model takes, or
            elements of the site are not independent.

    Example:
        >>> import torch
        >>> from ppvae import VAE, FamilyGuide, families, likelihoods
        >>> model = VAE(torch.nn.Linear(2, 5), latent=2, likelihood=likelihoods.Normal(1.0))
        >>> guide = FamilyGuide(model, families.mean_scale, encoder=torch.nn.Linear(5, 8))
        >>> reconstruct(model, guide, torch.randn(20, 5)).shape
        torch.Size([20, 5])
    """
    num_samples = check_count("num_samples", num_samples)
    with opened(model, guide, args, kwargs, batch_size, vectorized, seed, plate) as runs:
        names = [node["name"] for node in sites_of_data(runs)]
        name = one_site(names, site, known=names)
        batches = batches_of_draws(runs)
        return torch.cat([_reconstructed(runs, batch, name, num_samples) for batch in batches])


def _reconstructed(runs: Runs, args: Args, name: str, num_samples: int) -> Tensor:
    """What the data of a minibatch come back as."""
    first = with_discrete(runs.model, runs.pair(args), args)[0].nodes[name]
    every = torch.ones_like(Place.of(first, runs.plate).front(first["value"])[0], dtype=torch.bool)
    totals: list[tuple[Tensor, Tensor]] = []
    for trace, draws, _ in weighted_runs(runs, args, num_samples):
        node = trace.nodes[name]
        place = Place.of(node, runs.plate, draws)
        means = expectations(bare_distribution(node["fn"]), place, every)
        found = [(at, mean.sum(0)) for at, mean in means]
        pairs = zip(totals, found, strict=True)
        totals = [(at, total + more) for (at, total), (_, more) in pairs] if totals else found
    back = torch.zeros(every.numel()).to(totals[0][1])
    for at, total in totals:
        back[at] = point(total / num_samples)
    return back.reshape(every.shape)


def interpolate(
    model: Any,
    guide: Callable[..., Any],
    start: Any,
    end: Any,
    *,
    steps: int = 9,
    context: Any = None,
) -> Tensor:
    """Data along the straight lines from the codes of some data to those of others.

    Args:
        model: a `VAE`, or another model with a method `mean` from codes to data.
        guide: its guide.
        start: data `(batch, *event)`.
        end: as many.
        steps: how many there are on a line, the two ends among them; at least 2.
        context: of the data of both ends, where the model has one.

    Returns:
        Means of the data, `(steps, batch, *event)`; NaN for categories.

    Raises:
        TypeError: the model has no such method.
        ValueError: `steps` is below 2, the two are not equally many, or `encode` refuses them.

    Example:
        >>> import torch
        >>> from ppvae import VAE, FamilyGuide, families, likelihoods
        >>> model = VAE(torch.nn.Linear(2, 5), latent=2, likelihood=likelihoods.Normal(1.0))
        >>> guide = FamilyGuide(model, families.mean_scale, encoder=torch.nn.Linear(5, 8))
        >>> interpolate(model, guide, torch.randn(3, 5), torch.randn(3, 5)).shape
        torch.Size([9, 3, 5])
    """
    steps = check_count("steps", steps, 2)
    able = callable(getattr(model, "mean", None))
    kind = type(model).__name__
    expect(able, "model", "one with a method `mean` from codes to data, as VAE", kind, TypeError)
    given = () if context is None else prepared((context,), form_of(model, guide))
    ends = [encode(model, guide, data, *given).mean for data in (start, end)]
    shapes = [tuple(code.shape) for code in ends]
    expect(shapes[0] == shapes[1], "end", f"as many data as start, {shapes[0][0]}", shapes[1][0])
    shares = torch.linspace(0, 1, steps, dtype=ends[0].dtype, device=ends[0].device)
    with torch.no_grad(), private_modules(), eval_mode(model):
        codes = torch.lerp(ends[0], ends[1], shares.reshape(-1, *[1] * ends[0].dim()))
        data: Tensor = model.mean(codes, *given)
    return data
