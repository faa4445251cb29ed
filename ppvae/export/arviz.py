"""From a Pyro model and its guide to ArviZ: draws, predictions and densities in one tree."""

import os
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr

from ppvae._checks import check_choice, check_count, expect
from ppvae._process import exclusive
from ppvae.data.adapters import form_of
from ppvae.export.constants import Constants, constants_of, observed_positions
from ppvae.export.densities import at_the_top
from ppvae.export.description import Description, described
from ppvae.export.drawing import Drawing
from ppvae.export.names import Groups, chosen, dims_of, mapping, table_coords
from ppvae.export.numbers import large_numbers, small_numbers, whole_numbers
from ppvae.export.pieces import Memory
from ppvae.export.predictions import New, rows_of_new
from ppvae.export.sites import Sites
from ppvae.export.stores import opened_tree, store_path, stored
from ppvae.export.tree import prior_sbc, versions, words_of
from ppvae.objectives.nested import can_integrate
from ppvae.objectives.trace_terms import terms
from ppvae.programs.runs import opened
from ppvae.programs.tracing import with_discrete

#: from the weights of draws of global latents, or None, to what is said of a posterior
_Words = Callable[[np.ndarray | None], dict[str, Any]]


@exclusive
def from_pyro_svi(  # noqa: D417
    model: Callable[..., Any],
    guide: Callable[..., Any],
    *args: Any,
    num_samples: int = 1000,
    coords: Mapping[str, Sequence[Any]] | None = None,
    dims: Mapping[str, Sequence[str]] | None = None,
    batch_size: int = 256,
    vectorized: bool | None = None,
    seed: int | None = None,
    plate: str | None = None,
    kwargs: Mapping[str, Any] | None = None,
    num_inner: int = 16,
    pointwise: str = "datum",
    stack: Mapping[str, str] | None = None,
    predictions: Any = None,
    evaluation: xr.Dataset | None = None,
    calibration: xr.Dataset | None = None,
    groups: Sequence[str] | None = None,
    path: str | os.PathLike[str] | None = None,
) -> xr.DataTree:
    r"""Draws from a fitted guide and lays out what ArviZ works with.

    Works for every model and guide with local latents (in the data plate), global ones, or both.
    The groups of the tree, each with dims `chain` and `draw`:

    - `posterior`: draws of the guide, and the model's deterministic sites. Its attributes say what
      drew them (`family`, `seed`), what the last `fit` said, if there was one (`verdict`,
      `converged`, `objective`), and for global latents what the draws are worth as weighted ones
      (`khat`, `ess`, `log_evidence`);
    - `unconstrained_posterior`: the latents on the reals, where some have another support;
    - `posterior_predictive`: the observed sites drawn anew, given those draws;
    - `predictions` and `predictions_constant_data`, if there are `predictions`;
    - `log_likelihood` of each datum, in nats, whatever `poutine.scale` says. The latents of a datum
      are integrated out by importance weights (by those of all draws, or of `num_inner` for each
      draw of the global latents), so that `loo` is about new data; where they cannot be, as of a
      point, a scaled model, or one joint draw of all data, it is given the latents, and the
      attribute `latents` says which. Of several observed sites they have one, `joint`. NaN for a
      datum of which all entries are missing, which ArviZ's `loo` is to be told nothing of;
    - `log_prior` of the global latents that depend on no others, one number per draw and site: it
      is these that `psense` scales;
    - `sample_stats`: `log_p` = log p(x, z), in which `poutine.scale` counts, `log_q` = log q(z) and
      `log_weight`, their difference without the scale: per datum where all latents are local, and
      one number per draw otherwise, of the global latents alone where the others are integrated
      out, as `loo_approximate_posterior` wants them (`ppvae.loo` calls it; there is no `log_q` for
      a point guide, which has no density);
    - `prior` and `prior_predictive`: draws of the model alone, its observations taken off (left
      out where a prior is improper);
    - `observed_data` and `constant_data`, without the two dims; NaN where an entry is missing. The
      constants are the arguments that are not observed, by their names, and the columns of tables;
    - `evaluation`, without the two dims: the result of `evaluate`, if it is given;
    - `prior_sbc`, for `plot_ecdf_pit`: where in the posterior the truth was, from 0 to 1, in each
      simulation of `calibration`, if its result is given.

    The data plate is the dim `datum`, and the coordinates of a single latent vector `latent`. A
    table that is observed gives the names of its rows and columns as coordinates. Discrete sites
    are whole numbers, where none is missing, and bytes where they are bits or few categories. Local
    latents are drawn in minibatches. Nothing is trained or changed.

    Args:
        model: a Pyro model.
        guide: its guide.
        *args: their arguments.
        num_samples: number of draws, at least 1.
        coords: coordinate values by dim.
        dims: names of the dims after `chain` and `draw` by variable, in place of the names above.
        seed: seeds the draws, and leaves the caller's stream where it was; None, as in all
            functions that draw, uses that stream.
        num_inner: draws of the latents of each datum for each draw of the global ones, by which
            they are integrated out of its likelihood; each costs a run.
        pointwise: "element" for the likelihood of each number of a datum in place of that of the
            datum, given the latents. Data that are vectors then run along one dim, as
            `x_element`: what `loo_pit`, `loo_score`, `metrics` and the predictive plots want, for
            which they leave out one number.
        stack: from the stem of names of sites to the name of a dim: `{"z": "time"}` makes one
            variable of the sites z_0, z_1, ..., with the steps along `time`.
        predictions: arguments for new data, a tensor or a tuple: what is observed is drawn for
            them, given draws of the global latents; whatever they say of it does not count, and may
            be None. A mapping gives keyword arguments.
        evaluation: a result of `evaluate`, of any data, to join the tree.
        calibration: a result of `calibration`, to join the tree.
        groups: names of the groups that are wanted, of those above but for `predictions`,
            `evaluation` and `prior_sbc`, which come where their argument is given; None for all.
            What none of them asks for is not run, and draws are then other ones for the same seed.
        path: of a netCDF file, `fit.nc`, or a Zarr store, `fit.zarr`, that the tree is written to
            while it is drawn, so that no more than some runs of it are in memory; a file of that
            name is replaced when all is written. Counts have 64 bits there.
        batch_size, vectorized, plate, kwargs: as for `evaluate`.

    Returns:
        A tree in ArviZ's schema; on arviz 0.x, `arviz.from_datatree` gives `InferenceData`. With a
        path it is that of the file, which is read where values are wanted; `close()` lets go of it.

    Raises:
        TypeError: an argument is of another kind.
        ValueError: an argument is out of its range, `coords`, `dims` or `stack` have a name that is
            not in the tree, a site has the name of a dim or one with "/" in it, the data are not
            finite or not in the support of their likelihood, guide and model do not fit, or the
            model draws its own subsample.

    Example:
        >>> import torch
        >>> from ppvae import VAE, FamilyGuide, families, likelihoods
        >>> model = VAE(torch.nn.Linear(2, 5), latent=2, likelihood=likelihoods.Normal(1.0))
        >>> guide = FamilyGuide(model, families.mean_scale, torch.nn.Linear(5, 3))
        >>> tree = from_pyro_svi(model, guide, torch.randn(20, 5), num_samples=100)
        >>> tree["posterior/z"].dims
        ('chain', 'draw', 'datum', 'latent')
    """
    num_samples = check_count("num_samples", num_samples)
    num_inner = check_count("num_inner", num_inner)
    check_choice("pointwise", pointwise, ("datum", "element"))
    by_element = pointwise == "element"
    wanted, target = chosen(groups), None if path is None else store_path(path)
    coords = mapping("coords", coords)
    renamed = {name: list(given) for name, given in mapping("dims", dims).items()}
    measured = _measured(evaluation, calibration)
    form = form_of(model, guide)
    with opened(model, guide, args, kwargs, batch_size, vectorized, seed, plate) as runs:
        parts, extra = terms(*runs.traces, plate), dict(kwargs or {})
        whole, _ = with_discrete(runs.model, runs.traces, runs.args)
        sites = Sites(whole, runs.plate, parts.is_local)
        names = dims_of(sites)
        inner = None if by_element or not can_integrate(runs, parts) else num_inner
        new = None if predictions is None else New.of(predictions, runs, form, extra)
        top = at_the_top(runs, parts)
        drawing = Drawing(runs, sites, wanted, inner, top, by_element, new and new.args)
        tables = table_coords(sites, names, renamed, args, form)
        constants: dict[str, Constants] = {}
        seen = observed_positions(runs.args, runs.traces[0])
        of_model = partial(constants_of, model, kwargs=extra, trace=whole, observed=seen)
        if new is not None:
            rows = rows_of_new(runs, sites, new.args)
            constants["predictions_constant_data"] = of_model(new.given, new.args, size=rows)
        constants["constant_data"] = of_model(args, runs.args, size=sites.size)
        how = described(
            sites, names, constants, tables, coords, renamed, stack, by_element=by_element
        )
        alone = inner is None and (by_element or bool(parts.log_prior))
        latents = "given" if alone else "integrated out"
        how.attrs["log_likelihood"] = {"latents": latents, "pointwise": pointwise}
        fixed: Groups = {}
        if "observed_data" in wanted:
            fixed["observed_data"] = drawing.observed_values()
        if "constant_data" in wanted:
            fixed["constant_data"] = constants["constant_data"].arrays
        if new is not None:
            key = "predictions_constant_data"
            fixed[key] = constants[key].arrays
        small_numbers(fixed, sites.nodes)
        whole_numbers(fixed, sites.nodes)
        undrawn = how.datasets(how.arranged(fixed)) | measured
        words = partial(words_of, model, guide, seed)
        if target is not None:
            _write(target, drawing, num_samples, how, undrawn, words)
            return opened_tree(target)
        drawn = _drawn(drawing, num_samples, how, words)
    tree = xr.DataTree.from_dict(drawn | undrawn)
    tree.attrs = versions()
    return tree


def _measured(evaluation: Any, calibration: Any) -> dict[str, xr.Dataset]:
    """The groups of what was measured before, if it is given."""
    known, got = evaluation is None or isinstance(evaluation, xr.Dataset), type(evaluation).__name__
    expect(known, "evaluation", "a result of evaluate", got, TypeError)
    known = calibration is None or {"rank", "latent"} <= {*getattr(calibration, "variables", ())}
    got = type(calibration).__name__
    expect(known, "calibration", "a result of calibration", got, TypeError)
    groups = {} if evaluation is None else {"evaluation": evaluation}
    return groups | ({} if calibration is None else {"prior_sbc": prior_sbc(calibration)})


def _drawn(
    drawing: Drawing, num_samples: int, how: Description, words: _Words
) -> dict[str, xr.Dataset]:
    """The groups of the draws, in memory."""
    sites = drawing.sites
    memory = Memory(num_samples, sites.size or 0)
    for piece in drawing.pieces(num_samples):
        memory.put(piece)
    whole_numbers(memory.groups, sites.nodes)
    how.attrs["posterior"] = words(drawing.weight(memory.groups))
    return how.datasets(how.arranged(memory.groups))


def _write(
    path: Path,
    drawing: Drawing,
    num_samples: int,
    how: Description,
    undrawn: Mapping[str, xr.Dataset],
    words: _Words,
) -> None:
    """Writes all groups to a file, those of the draws while they are drawn."""
    sites, weights = drawing.sites, list[np.ndarray]()
    with stored(path, num_samples, sites.size or 0, how.dataset) as store:
        store.write(None, xr.Dataset(attrs=versions()))
        for piece in drawing.pieces(num_samples):
            weight = drawing.weight(piece.groups)
            weights += [] if weight is None else [weight]
            large_numbers(piece.groups, sites.nodes)
            store.put(piece._replace(groups=how.arranged(piece.groups)))
        for key, group in undrawn.items():
            store.write(key, group)
        if "posterior" in drawing.wanted:
            weight = np.concatenate(weights) if weights else None
            store.write("posterior", xr.Dataset(attrs=words(weight)))
