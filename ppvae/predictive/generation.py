"""New data: from the prior, or from a fitted guide for new inputs."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
import xarray as xr
from torch import Tensor

from ppvae._checks import check_count, expect
from ppvae._process import exclusive
from ppvae._scopes import eval_mode, private_modules, random_state, unchecked
from ppvae.data.adapters import form_of, real_numbers
from ppvae.models import VAE, TwoLevelVAE
from ppvae.programs.keywords import prepared_call
from ppvae.programs.layout import Place
from ppvae.programs.nodes import Node, latent_nodes
from ppvae.programs.plates import choose_plate, length_of, plates_of
from ppvae.programs.runs import draw_runs, largest_tensor
from ppvae.programs.tracing import is_vectorized, run_model, run_trace, with_discrete


@exclusive
def generate(
    model: VAE | TwoLevelVAE,
    num_samples: int | None = None,
    *,
    context: Any = None,
    exposure: Any = None,
    seed: int | None = None,
) -> Tensor:
    """Data drawn from a `VAE` or `TwoLevelVAE`: latents of the prior, decoded, with its noise.

    `simulate` draws from any other model, `model.mean(model.draw_prior(n))` has no noise.

    Args:
        model: the model.
        num_samples: how many data; with a context by default one for each of its rows.
        context: labels or covariates, where the model has such: one row for each, or one for all.
        exposure: of likelihoods of counts, of shape `(num_samples,)`.
        seed: seeds the draws, and leaves the caller's stream where it was; None uses that stream.

    Returns:
        Data `(num_samples, *event)`.

    Raises:
        TypeError: the model is of another kind, or an argument is.
        ValueError: an argument is out of its range, or there is a context where the model has none.

    Example:
        >>> from ppvae import likelihoods
        >>> model = VAE(torch.nn.Linear(2, 5), latent=2, likelihood=likelihoods.Normal(1.0))
        >>> generate(model, 20).shape
        torch.Size([20, 5])
    """
    known, kind = isinstance(model, (VAE, TwoLevelVAE)), type(model).__name__
    expect(known, "model", "a VAE or a TwoLevelVAE", kind, TypeError)
    takes = exposure is None or isinstance(model, VAE)
    expect(takes, "exposure", f"none for a {kind}", "one")
    form, needed = form_of(model), model.context is None
    expect(needed or context is not None, "context", "one for a model that has it", None)
    expect(num_samples is not None or not needed, "num_samples", "how many data", None)
    count = None if num_samples is None else check_count("num_samples", num_samples)
    given = {}
    for name, value in {"context": context, "exposure": exposure}.items():
        if value is None:
            continue
        schema = form.schema(1) if name == "context" else None
        tensor = real_numbers(name, value, missing=False, schema=schema)
        rows = len(tensor) if tensor.dim() else 1
        count = rows if count is None else count
        fits = rows in (1, count)
        expect(fits, name, f"{count} rows, or one for all", rows)
        tensor = tensor.reshape(1) if not tensor.dim() else tensor
        expect(torch.isfinite(tensor).all(), name, "finite numbers", "NaN or infinite ones")
        whole = tensor.expand(count, *tensor.shape[1:]) if rows == 1 else tensor
        given[name] = whole.detach().to(form.device, form.dtype)
    with torch.no_grad(), private_modules(), random_state(seed), eval_mode(model), unchecked():
        trace = run_trace(lambda: model(size=count, **given), ())
        x: Tensor = trace.nodes["x"]["value"]
        return x


@exclusive
def predict(  # noqa: D417
    model: Callable[..., Any],
    guide: Callable[..., Any],
    *args: Any,
    num_samples: int = 1000,
    vectorized: bool | None = None,
    seed: int | None = 0,
    plate: str | None = None,
    kwargs: Mapping[str, Any] | None = None,
) -> xr.Dataset:
    """What a fitted model says of new inputs: draws of the sites that are not given.

    The latents are drawn by the guide, all else by the model: `predict(model, guide, X)` of a
    regression that was fitted to `X, y` are draws of y for new rows X.

    Args:
        model: a Pyro model that draws what it is not given.
        guide: its guide.
        *args: their arguments, without those that are to be predicted.
        num_samples: number of draws.
        vectorized, seed, plate, kwargs: as for `evaluate`.

    Returns:
        A variable for each site that was drawn and is no latent, with the dims `draw`, `datum` and
        those of the event.

    Raises:
        TypeError: an argument is of another kind.
        ValueError: an argument is out of its range, or the model draws nothing but its latents.

    Example:
        >>> import torch
        >>> from ppvae import FamilyGuide, families
        >>> from ppvae.regression import LinearRegression
        >>> model = LinearRegression(2)
        >>> guide = FamilyGuide(model, families.mean_scale).setup(torch.ones(3, 2), torch.ones(3))
        >>> dict(predict(model, guide, torch.randn(5, 2)).sizes)
        {'draw': 1000, 'datum': 5}
    """
    num_samples = check_count("num_samples", num_samples)
    fitted = getattr(guide, "blocks", True) != ()
    expect(fitted, "guide", "one that was fitted, which knows the latents", "one that was not")
    vectorized = is_vectorized(model, vectorized)
    model, guide, args = prepared_call(model, guide, args, kwargs, missing=False)
    drawn: dict[str, list[Tensor]] = {}
    with torch.no_grad(), private_modules(), random_state(seed), eval_mode(model, guide):
        with unchecked():
            first = _pair(model, guide, args, None)
            wanted = "sites that are drawn beside the latents, for these arguments"
            expect(_predicted(*first), "model", wanted, "none (are the data given?)")
            widest = largest_tensor(args, *first) if vectorized else None
            for _, draws in draw_runs(model, args, num_samples, widest):
                pair = _pair(model, guide, args, draws)
                nodes = _predicted(*pair)
                frame = _plate(nodes, args, plate)
                for node in nodes:
                    place = Place.of(node, frame, draws)
                    drawn.setdefault(node["name"], []).append(place.front(node["value"]))
    variables: dict[str, Any] = {}
    for name, values in drawn.items():
        value = torch.cat(values)
        dims = ["draw", "datum", *(f"{name}_dim_{i}" for i in range(value.dim() - 2))]
        variables[name] = (dims, value.cpu().numpy())
    return xr.Dataset(variables, attrs={"num_samples": num_samples})


def _pair(model: Any, guide: Any, args: Any, draws: Any) -> tuple[Any, Any]:
    """Traces of the model and the guide, in which the model draws what it is not given."""
    guide_trace = run_trace(guide, args, draws)
    model_trace = run_model(model, guide_trace, args, draws)
    # what was summed out may be data to be predicted
    return with_discrete(model, (model_trace, guide_trace), args, draws)[0], guide_trace


def _predicted(model_trace: Any, guide_trace: Any) -> list[Node]:
    """The sites that the model drew itself."""
    return [node for node in latent_nodes(model_trace) if node["name"] not in guide_trace.nodes]


def _plate(nodes: list[Node], args: Any, plate: str | None) -> Any:
    """The plate of the data that are predicted; None if they are in none."""
    frames: dict[str, Any] = {}
    for node in nodes:
        frames |= {name: f for name, f in plates_of(node).items() if name not in frames}
    return choose_plate(frames, length_of(args), plate)
