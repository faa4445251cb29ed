"""From a Pyro model and its guide to ArviZ: draws, predictions and densities in one tree."""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import xarray as xr

from ppvae._checks import check_choice, check_count, expect
from ppvae._process import exclusive
from ppvae.data.adapters import form_of, items_of, prepared
from ppvae.export.constants import constants_of, observed_positions
from ppvae.export.drawing import Drawing
from ppvae.export.groups import (
    at_the_top,
    event_dims,
    large_numbers,
    observed_values,
    predicted_once,
    shown,
    small_numbers,
    whole_numbers,
)
from ppvae.export.names import (
    Dims,
    Groups,
    by_number,
    check_names,
    chosen,
    dims_of,
    free_dims,
    mapping,
    stacked,
    table_coords,
)
from ppvae.export.pieces import Memory, Piece
from ppvae.export.stores import opened_tree, store_path, stored
from ppvae.export.tree import dataset_of, prior_sbc, versions, words_of
from ppvae.objectives.nested import can_integrate
from ppvae.objectives.trace_terms import terms
from ppvae.programs.runs import Runs, opened, with_discrete


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
    wanted, target = chosen(groups), None if path is None else store_path(path)
    coords = mapping("coords", coords)
    renamed = {name: list(given) for name, given in mapping("dims", dims).items()}
    known, got = evaluation is None or isinstance(evaluation, xr.Dataset), type(evaluation).__name__
    expect(known, "evaluation", "a result of evaluate", got, TypeError)
    known = calibration is None or {"rank", "latent"} <= {*getattr(calibration, "variables", ())}
    got = type(calibration).__name__
    expect(known, "calibration", "a result of calibration", got, TypeError)
    form = form_of(model, guide)
    with opened(model, guide, args, kwargs, batch_size, vectorized, seed, plate) as runs:
        sites, extra = terms(*runs.traces, plate), dict(kwargs or {})
        local = sites.is_local
        whole, _ = with_discrete(runs.model, runs.traces, runs.args)
        nodes = shown(whole)
        events = {node["name"]: event_dims(node) for node in nodes}
        names = dims_of(nodes, whole, runs.plate, events, local=local)
        by_element = pointwise == "element"
        inner = None if by_element or not can_integrate(runs, sites) else num_inner
        new, beside = None, ()
        if predictions is not None:
            new, beside = _new_arguments(predictions, runs, form, extra)
        top = at_the_top(runs, sites)
        drawing = Drawing(runs, nodes, events, local, wanted, inner, top, by_element, new)
        tables = table_coords(nodes, args, form, names, renamed)
        seen = observed_positions(runs.args, runs.traces[0])
        size = None if runs.plate is None else runs.plate.size
        fixed: Groups = {}
        if "observed_data" in wanted:
            fixed["observed_data"] = observed_values(runs, drawing.batches, events)
        constants = [constants_of(model, args, runs.args, extra, whole, size, seen)]
        if "constant_data" in wanted:
            fixed["constant_data"] = constants[0].arrays
        if new is not None:
            drawn = predicted_once(runs, whole, new, events)
            rows = [v.shape[1] for name, v in drawn.items() if names[name][:1] == ["datum"]]
            rows_of_new = next(iter(rows), None)
            constants.append(constants_of(model, beside, new, extra, whole, rows_of_new, seen))
            fixed["predictions_constant_data"] = constants[1].arrays

        def laid_out(groups: Groups) -> tuple[Groups, Dims, dict[str, Any]]:
            found, now, steps = stacked(groups, names, events, {} if stack is None else stack)
            return (*by_number(found, now, nodes), steps) if by_element else (found, now, steps)

        small_numbers(fixed, nodes)
        whole_numbers(fixed, nodes)
        fixed, now, steps = laid_out(fixed)
        check_names({**constants[-1].dims, **constants[0].dims, **now}, coords, renamed)
        own = {"constant_data": constants[0].dims, "predictions_constant_data": constants[-1].dims}
        own["unconstrained_posterior"] = now | free_dims(whole, now, events)
        for each in constants:
            tables = each.coords | tables
        coords = tables | steps | coords
        alone = inner is None and (by_element or bool(sites.log_prior))
        latents = "given" if alone else "integrated out"
        attrs = {"log_likelihood": {"latents": latents, "pointwise": pointwise}}

        def described(group: str, values: Mapping[str, np.ndarray]) -> xr.Dataset:
            return dataset_of(group, values, {**own.get(group, now), **renamed}, coords, attrs)

        weights: list[np.ndarray] = []

        def drawn_pieces() -> Iterator[Piece]:
            for piece in drawing.pieces(num_samples):
                stats = {} if local else piece.groups.get("sample_stats", {})
                weights.extend(value for name, value in stats.items() if name == "log_weight")
                yield piece

        def words() -> dict[str, Any]:
            stats = {"log_weight": np.concatenate(weights)} if weights else None
            return words_of(model, guide, seed, stats)

        joined = {} if evaluation is None else {"evaluation": evaluation}
        joined |= {} if calibration is None else {"prior_sbc": prior_sbc(calibration)}
        joined = {key: described(key, values) for key, values in fixed.items() if values} | joined
        if target is not None:
            with stored(target, num_samples, size or 0, described) as store:
                store.write(None, xr.Dataset(attrs=versions()))
                for piece in drawn_pieces():
                    large_numbers(piece.groups, nodes)
                    store.put(piece._replace(groups=laid_out(piece.groups)[0]))
                for key, group in joined.items():
                    store.write(key, group)
                if "posterior" in wanted:
                    store.write("posterior", xr.Dataset(attrs=words()))
            return opened_tree(target)
        memory = Memory(num_samples, size or 0)
        for piece in drawn_pieces():
            memory.put(piece)
        whole_numbers(memory.groups, nodes)
        drawn_groups = laid_out(memory.groups)[0]
        attrs["posterior"] = words()
        data = {key: described(key, values) for key, values in drawn_groups.items() if values}
    tree = xr.DataTree.from_dict(data | joined)
    tree.attrs = versions()
    return tree


def _new_arguments(predictions: Any, runs: Runs, form: Any, extra: dict[str, Any]) -> Any:
    """Arguments for new data, those by keyword last; and the positional ones as they came."""
    words = dict(extra)
    given: tuple[Any, ...] = ()
    if isinstance(predictions, Mapping):
        unknown = [name for name in predictions if name not in words]
        expect(not unknown, "predictions", f"keyword arguments among {list(words)}", unknown)
        words |= predictions
    else:
        given = items_of(predictions)
        count = len(runs.args) - len(words)
        expect(len(given) == count, "predictions", f"{count} arguments", len(given))
    return (*prepared(given, form), *prepared(tuple(words.values()))), given
