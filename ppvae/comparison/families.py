"""Is the next channel worth it? Each family against the one below it, over seeds, with a verdict.

What a family gains is uncertain, as another seed trains another guide, other data have other gains
(the interval is for both), and training may not have ended (of which the last losses tell). Latents
of all the data have one gain, of the data that were fitted: its interval is for other seeds and
other draws.
"""

import copy
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import xarray as xr
from torch import Tensor
from tqdm.auto import tqdm

from ppvae._checks import check_label, expect
from ppvae._process import exclusive
from ppvae._scopes import private_modules
from ppvae.comparison.members import members_of, summing_out
from ppvae.comparison.steps import with_steps
from ppvae.comparison.tables import table_of
from ppvae.comparison.trials import (
    check_alike,
    check_test,
    fresh,
    held_data,
    one_trial,
    settings_of,
    trial,
)
from ppvae.guides.family_guide import FamilyGuide


@dataclass(frozen=True, eq=False)
class Comparison:
    """What `compare_families` found; `print` shows it as a table.

    Attributes:
        dataset: the numbers, in nats per datum, or in nats of all the data, where some latents
            belong to all of them; each variable has its `unit`, and of all the data so has the
            whole. Dims `family` and `seed`: `elbo`, `log_likelihood`,
            `rate`, `distortion` on the test data; `seconds` of training; `fall` of the loss over
            the last quarter of the epochs, with its standard error `fall_se`. Dim `family`:
            `parameters`, the trained numbers of the guide, without an encoder that stays idle; and,
            for the step up from the family `below`, the `gain` in ELBO, its interval `gain_lower`
            to `gain_upper`, its standard errors `gain_se_seeds` and `gain_se_data`, its growth
            `gain_drift` over the last quarter of the epochs, `gain_per_parameter` and
            `gain_per_second` added (NaN if none), the `verdict`, and a `note` on what weakens it.
            Of all the data there are `total_elbo` with its Monte Carlo error `total_elbo_se`,
            `log_evidence` and `global_rate` in the place of the four measures, and `gain_se_draws`
            in that of `gain_se_data`; see `evaluate`.
    """

    dataset: xr.Dataset

    def __repr__(self) -> str:
        return table_of(self.dataset)


@exclusive
def compare_families(
    build: Callable[[], tuple[Any, Any]],
    families: Sequence[Any] | Mapping[str, Any],
    train: Any,
    test: Any = None,
    *,
    num_seeds: int = 3,
    seed: int = 0,
    min_gain: float = 0.05,
    level: float = 0.95,
    num_samples: int = 256,
    progress: bool | str = True,
    **fit_options: Any,
) -> Comparison:
    r"""Trains families side by side and says of each whether it is worth more than the one below.

    For each seed all families start from the same networks and train with the same seed: the gain,
    the ELBO of a family less that of the one before it, is a mean of paired differences. Its
    interval is for another seed *and* another datum, see `crossed_interval`. The training data are
    the same throughout: the interval does not say what others would have taught.

    The verdict is "yes" where the whole interval is above `min_gain`, "no" where it is below, else
    "undecided". It must also stand if training went on: a gain that was still moving, as
    `still_to_come` sees it in the losses, makes undecided what it could turn.

    **Global latents** belong to all the data, so the ELBO and the gain do, too: they are in nats of
    all the data, and so is `min_gain`. There is no other datum, and the interval is for another
    seed and other draws, see `interval_of_totals`. What is compared are posteriors of the training
    data, and there are no others to measure them on. That a family is too narrow is what the gain
    says, and not a warning.

    **Discrete latents** of finitely many values are summed out of all families alike, `noise_only`
    included, so that no step contains what summing out gives; a mapping that names one, with a
    family that can draw it, is the exception.

    Args:
        build: makes a fresh model and encoder, without arguments; called once per seed and family,
            with the random numbers of the seed. To compare families for a given decoder, freeze it
            there: `decoder.requires_grad_(False)`. The encoder may be None, or a mapping of
            several, as for `FamilyGuide`.
        families: what `FamilyGuide` takes, in the order of the comparison: names in the ladder,
            guide families, blocks (`Block`), or mappings to such from the latent sites, each called
            by its name. Or a mapping to such from names of your own.
        train: training data, as for `fit`.
        test: data to measure on, at least 2: a tensor, an array, or a tuple of them. By default the
            training data, on which a bigger family gains more than on others. None for latents of
            all the data, or with parameters for each datum.
        num_seeds: at least 2 (where Student's t makes the interval wide).
        seed: the first seed; the others follow it.
        min_gain: what a step must gain to be worth it, in nats per datum, or of all the data.
        level: of the interval.
        num_samples: draws per datum in the evaluation, see `evaluate`; their error is in the
            interval.
        progress: as for `evaluate`.
        **fit_options: options of `fit`. Train until the losses are level, as `fit` does without
            `num_epochs`; with a learning rate that shrinks they become so anywhere, and the verdict
            may be about the optimizer.

    Returns:
        The numbers, in a wrapper that prints them as a table. A point (`deterministic`, `zero`) has
        no ELBO, so that a step from or to it has no gain and no verdict.

    Raises:
        TypeError: a family is not what it should be, `build` does not make a model and an encoder,
            or the test data are not tensors or arrays.
        ValueError: another argument is not as above, `build` does not start anew, or some families
            draw the latents of each datum by themselves and others all together.
        Diverged: see `fit`. A note on this and other errors names the family and the seed.

    Example:
        >>> import torch
        >>> from ppvae import VAE, likelihoods
        >>> def build():
        ...     model = VAE(torch.nn.Linear(2, 5), latent=2, likelihood=likelihoods.Normal(0.5))
        ...     return model, torch.nn.Identity()
        >>> names, x = ["noise_only", "mean_only"], torch.randn(20, 5)
        >>> compare_families(build, names, x, num_epochs=3, progress=False).dataset.seed.values
        array([0, 1, 2])

        Global latents, without an encoder:

        >>> from ppvae.regression import LinearRegression
        >>> def build():
        ...     return LinearRegression(2, noise=1.0), None
        >>> named = {"mean field": "mean_scale", "joint": "full_rank"}
        >>> data = torch.tensor([[1.0, 1.0], [1.0, 0.9], [0.9, 1.0]]), torch.tensor([1.0, 0.0, 2.0])
        >>> found = compare_families(build, named, data, num_seeds=2, progress=False)
        >>> found.dataset.verdict.sel(family="joint").item(), found.dataset.unit
        ('yes', 'nats of all the data')
    """
    members = members_of(families)
    told = settings_of(num_seeds, seed, min_gain, level, num_samples)
    expect(callable(build), "build", "a function", type(build).__name__, TypeError)
    args = held_data("train", train) if test is None else held_data("test", test)
    shown, label = check_label("progress", progress, "compare_families")
    runs = list(itertools.product(told.seeds, members.items()))
    results: list[xr.Dataset] = []
    starts: dict[int, list[Tensor]] = {}
    with private_modules(), tqdm(runs, label, disable=not shown, unit="fit") as bar:
        for number, (name, family) in bar:
            bar.set_postfix(family=name, seed=number)
            with one_trial("compare_families", name, number):
                model, encoder, starts[number] = fresh(build, starts.get(number))
                pair = model, FamilyGuide(model, summing_out(family), encoder)
                if test is not None and number == told.seeds[0]:
                    check_test(*copy.deepcopy(pair), args, fit_options)
                results.append(trial(*pair, train, args, number, told.num_samples, fit_options))
                check_alike(results[-1], results[0])
    rows = [results[first :: len(members)] for first in range(len(members))]
    joined = xr.combine_nested(rows, ["family", "seed"]).transpose("family", "seed", ...)
    joined = joined.assign_coords(family=list(members), seed=[*told.seeds])
    return Comparison(with_steps(joined, told.min_gain, told.level))
