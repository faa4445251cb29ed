"""Which family to take: a walk up the ladder that ends where a further step can bring nothing."""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import xarray as xr
from torch import nn
from tqdm.auto import tqdm

from ppvae._checks import check_label, expect
from ppvae._process import exclusive
from ppvae._scopes import private_modules
from ppvae.comparison.members import members_of, name_of, summing_out
from ppvae.comparison.tables import table_of, wrapped
from ppvae.comparison.trials import (
    check_test,
    held_data,
    one_trial,
    settings_of,
    task_on,
    trial,
)
from ppvae.comparison.walk import Walk
from ppvae.guides.family_guide import FamilyGuide
from ppvae.guides.headed import check_encoder
from ppvae.programs.keywords import check_programs

_LADDER = ("noise_only", "mean_only", "shared_scale", "mean_scale", "full_rank", "flow")


@dataclass(frozen=True, eq=False)
class Choice:
    """What `choose_family` recommends; `print` shows the walk as a table, and why it ends there.

    Attributes:
        family: the family, as it was given.
        name: its name.
        model: a copy of the model, fitted with a guide of that family and the first seed.
        guide: that guide. Of `noise_only` it has the family for all sites but discrete latents of
            finitely many values, which are summed out.
        dataset: the numbers of the families that were tried, as in `Comparison`: `below` is the
            one that a step was held against, the best so far. Beside them, dim `family`, what a
            richer family could still gain for the same model: `left`, log p(x) less the ELBO, with
            its upper end `left_upper`, and `untrusted`, the share of the data (or of the seeds, for
            latents of all the data) whose importance weights say little of it.
        reason: the recommendation in words.
    """

    family: Any
    name: str
    model: Any
    guide: FamilyGuide
    dataset: xr.Dataset
    reason: str

    def __repr__(self) -> str:
        lines = self.reason.splitlines()
        return "\n".join(
            [table_of(self.dataset), "", *(part for line in lines for part in wrapped(line))]
        )


@exclusive
def choose_family(  # noqa: D417
    model: Any,
    data: Any,
    test: Any = None,
    *,
    encoder: Any = None,
    families: Sequence[Any] | Mapping[str, Any] = _LADDER,
    num_seeds: int = 3,
    seed: int = 0,
    min_gain: float = 0.05,
    level: float = 0.95,
    num_samples: int = 256,
    progress: bool | str = True,
    **fit_options: Any,
) -> Choice:
    r"""Walks up the ladder of families, and says which one to take, and why not a richer one.

    Each family is fitted with several seeds and held against the best one below it, as in
    `compare_families`: a step is taken where it gains more than `min_gain` for other seeds and
    other data. All begin with copies of the same model and encoder, which stay as they are.

    The walk ends before the last family where

    - **nothing is left**: log p(x) less the ELBO, which is all that a richer family could gain for
      this model, is below `min_gain` with its whole interval, and the importance weights behind it
      can be trusted. Where the model learns, it must have a code through which something passes (a
      decoder that learned to ignore its code leaves nothing, whatever the data); and another
      decoder may still be learned with another family;
    - **two steps in a row bring nothing**: their verdict is "no". A step to a family that does not
      hold the one below, as `mean_only` does not hold the prior, says nothing of richer ones where
      it loses, and is not counted.

    A step that is undecided is not taken, and the recommendation says so, and what would decide it;
    it says as well where so few epochs cannot tell whether a loss still fell.
    Points (`deterministic`, `zero`) have no ELBO, and are no rungs. Finite discrete latents are
    summed out, see `compare_families`.

    **Global latents** (no encoder) belong to all the data; all is in nats of all the data, and so
    is `min_gain`, see `compare_families`.

    Args:
        model: a `torch.nn.Module` that is a Pyro model, or a function without networks and
            `pyro.param` statements of its own, which could not be copied. To choose for a given
            decoder, freeze it: `decoder.requires_grad_(False)`.
        data: training data, as for `fit`.
        test: data to measure on, see `compare_families`; by default the training data.
        encoder: as for `FamilyGuide`; None for latents of all the data (a latent of each datum
            then has parameters of its own for each datum, as of a guide without an encoder).
        families: at least one, with a density, from the cheapest to the richest; see
            `compare_families`.
        num_seeds, seed, min_gain, level, num_samples, progress: as for `compare_families`.
        **fit_options: options of `fit`.

    Returns:
        The recommendation, with a fitted pair to go on with.

    Raises:
        TypeError: model, encoder or a family is not what it should be.
        ValueError: a family has no density, the model cannot be copied, or another argument is not
            as above.
        Diverged: see `fit`.

    Example:
        >>> import torch
        >>> from ppvae.regression import LinearRegression
        >>> X = torch.tensor([[1.0, 1.0], [1.0, 0.9], [0.9, 1.0]])
        >>> y = torch.tensor([1.0, 0.0, 2.0])
        >>> model = LinearRegression(2, noise=1.0)
        >>> names = ["noise_only", "full_rank", "flow"]
        >>> chosen = choose_family(model, (X, y), families=names, progress=False)
        >>> chosen.name, chosen.dataset.family.values.tolist()  # the posterior is Gaussian: no flow
        ('full_rank', ['noise_only', 'full_rank'])
        >>> chosen.reason.splitlines()[0][:18]
        'Take `full_rank`: '
    """
    members = members_of(families, 1)
    told = settings_of(num_seeds, seed, min_gain, level, num_samples)
    check_programs(model, model)
    check_encoder(encoder)
    args = held_data("data", data) if test is None else held_data("test", test)
    shown, label = check_label("progress", progress, "choose_family")
    walk = Walk(told, learns=_learns(model))
    pairs: dict[str, tuple[Any, FamilyGuide]] = {}
    total = len(members) * len(told.seeds)
    with (
        private_modules(),
        tqdm(desc=label, total=total, disable=not shown, unit="fit") as bar,
    ):
        for name, family in members.items():
            results = []
            for number in told.seeds:
                bar.set_postfix(family=name, seed=number)
                with one_trial("choose_family", name, number):
                    pair = _fresh(model, encoder, family)
                    if not pairs:
                        _check_model(*pair, data, fit_options)
                        if test is not None:
                            check_test(*copy.deepcopy(pair), args, fit_options)
                    options = _options_of(*pair, fit_options)
                    run = *pair, data, args, number, told.num_samples, options, "data"
                    results.append(_with_density(trial(*run), name))
                    pairs.setdefault(name, pair)
                bar.update()
            result = xr.concat(results, "seed").assign_coords(seed=[*told.seeds])
            if walk.ends_with(name, name_of(family), result):
                break
    best, found = walk.best, walk.dataset()
    return Choice(members[best], best, *pairs[best], found, walk.reason(found, [*members]))


def _fresh(model: Any, encoder: Any, family: Any) -> tuple[Any, FamilyGuide]:
    """A copy of the model and of the encoder, which may share parts, and a guide for them."""
    prior: Any = getattr(model, "prior", None)
    attached = hasattr(prior, "attach") and prior.attached
    wanted = "a prior that is made of no guide's posteriors yet"
    expect(not attached, "model", wanted, "one that another guide is attached to")
    model, encoder = copy.deepcopy((model, encoder))
    return model, FamilyGuide(model, summing_out(family), encoder)


def _learns(model: Any) -> bool:
    """Whether a model has parameters that are trained."""
    return isinstance(model, nn.Module) and any(p.requires_grad for p in model.parameters())


def _options_of(model: Any, guide: FamilyGuide, options: Mapping[str, Any]) -> dict[str, Any]:
    """The options of `fit`; where there is nothing to train, one epoch is enough."""
    if guide.family.channels or _learns(model):
        return dict(options)
    kept = {
        name: value for name, value in options.items() if name not in ("max_epochs", "scheduler")
    }
    return kept | {"num_epochs": 1}


def _with_density(result: xr.Dataset, name: str) -> xr.Dataset:
    """A result, which must be one of a family with a density."""
    elbo = result["total_elbo" if "total_elbo" in result else "elbo"]
    wanted = "families with a density, of which there is an ELBO"
    expect(not elbo.isnull().any(), "families", wanted, f"{name}, a point")
    return result


def _check_model(model: Any, guide: FamilyGuide, data: Any, options: Mapping[str, Any]) -> None:
    """Raises a ValueError if a model has parameters that a copy of it would share, or lack."""
    told = options.get("kwargs"), options.get("plate")
    program = task_on(*copy.deepcopy((model, guide)), data, *told).program
    own = [part for part in program.called if {*part.parameters(), *part.buffers()}]
    shared = [type(part).__name__ for part in own]
    shared += [f"pyro.param({name!r})" for name in program.constraints]
    wanted = "a torch.nn.Module that holds its networks and parameters, so that it can be copied"
    expect(not shared, "model", wanted, f"one that uses {shared} from outside of itself")
