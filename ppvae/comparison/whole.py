"""The optimum of each of several families for latents of all the data, by fits of their own.

The model is held as it is: a fit moves the parameters of a guide that is made for it, and no other.
What a guide is worth is averaged over draws whose moments are matched, by the map of one draw that
`fit` itself uses, so that it is exact where the model is Gaussian.
"""

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pyro
import torch
from torch import Tensor

from ppvae._checks import expect
from ppvae._process import apart
from ppvae._scopes import (
    double_precision,
    eval_mode,
    kept_buffers,
    param_store,
    private_modules,
    random_state,
    unchecked,
)
from ppvae.comparison.ledger import Measured, found_by_prior, posterior_mean
from ppvae.comparison.members import prior_of, summing_out
from ppvae.comparison.rungs import FAR, at_an_end
from ppvae.comparison.trials import task_on
from ppvae.evaluation.amortization import GROUPS
from ppvae.guides.assignment import BySite
from ppvae.guides.family_guide import FamilyGuide
from ppvae.objectives.trace_terms import terms
from ppvae.objectives.weights import estimates
from ppvae.programs.matched_normals import matched
from ppvae.programs.runs import opened
from ppvae.programs.tracing import trace_pair
from ppvae.training.average import average_of, without_fallback_warnings
from ppvae.training.fitting import fit
from ppvae.training.optimum import affordable
from ppvae.training.verdict import NarrowFamily, NotConverged

_UNSEEN = 2_000_003  # seeds of draws that no fit with a small seed has held fixed
_MATCHED = 1024  # the most latents for which draws are added until their moments can be matched


@dataclass(frozen=True)
class Whole:
    """A model of all the data, and how it is called.

    Attributes:
        model: the model.
        args: its arguments.
        kwargs: its keyword arguments, or None.
        plate: name of the data plate, or None.
        num_samples: draws of each measure.
        seed: chooses them.
    """

    model: Any
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any] | None
    plate: str | None
    num_samples: int
    seed: int

    def fitted(self, family: Any) -> tuple[FamilyGuide, str]:
        """A guide of a family at its optimum, and what is said if it may not be there."""
        guide = FamilyGuide(self.model, summing_out(family))
        if not guide.family.channels:
            return guide, ""
        with apart(), warnings.catch_warnings():
            warnings.simplefilter("ignore", NarrowFamily)  # the rows say by how much
            warnings.simplefilter("ignore", NotConverged)
            told: dict[str, Any] = {"plate": self.plate, "kwargs": self.kwargs, "progress": False}
            found = fit(self.model, guide, self.args, seed=self.seed, **told)
        if found.interrupted:
            raise KeyboardInterrupt
        return guide, "" if found.converged else found.verdict

    def endless(self, guide: FamilyGuide) -> Tensor:
        """Whether a fitted point is at no maximum, see `without_maximum`; shape `(1,)`."""
        bounded = [block for block in guide.blocks if block.sites[0].transform is not None]
        heads: list[Any] = [guide.heads[block.key] for block in bounded]
        places = [head.v.raw for head in heads]
        kept = [place.detach().clone() for place in places]
        if not any((value.abs() > FAR).any() for value in kept):
            return torch.zeros(1, dtype=torch.bool)

        def density(factor: float, step: float) -> Tensor:
            for place, value in zip(places, kept, strict=True):
                moved = value * factor + step * value.sign()
                place.data = torch.where(value.abs() > FAR, moved, value)
            return self.parts(guide)[0][1].mean(1)[:1]

        here = density(1.0, 0.0)
        ended = at_an_end(here - density(0.5, 0.0), here - density(1.0, 1.0))
        density(1.0, 0.0)
        return ended

    def parts(self, guide: Any) -> tuple[Tensor, Tensor]:
        """What a guide is worth, in nats of all the data, by draws.

        Returns:
            Of matched draws in groups, `(3, groups, draws)`, and of independent ones, `(3, draws)`:
            the ELBO with divergences in closed form, the log weight, and log p(x | z).
        """
        with (
            torch.no_grad(),
            private_modules(),
            eval_mode(self.model, guide),
            unchecked(),
            random_state(self.seed),
        ):
            task = task_on(self.model, guide, self.args, self.kwargs, self.plate, _parts)
            device = next((p.device for p in task.program.parameters()), torch.device("cpu"))
            with double_precision(device), without_fallback_warnings():
                average = average_of(task)
                values = [parameter.detach().double() for parameter in task.parameters]

                def of(normals: Tensor, seed: int) -> Tensor:
                    chunks = enumerate(average.chunks(normals), seed)
                    pieces = [average.losses(values, chunk, own) for own, chunk in chunks]
                    return torch.cat(pieces).T / average.size

                least = 2 * (average.normals + 1)  # which can be matched
                draws = self.num_samples // GROUPS
                draws = max(draws, least) if average.normals <= _MATCHED else draws
                draws = max(2, affordable(average, 2 * ((draws + 1) // 2)))
                seeds = [self.seed + _UNSEEN * (number + 1) for number in range(GROUPS)]
                groups = [of(matched(draws, average.normals, s), s) for s in seeds]
                count = affordable(average, self.num_samples)
                alone = torch.randn(count, average.normals)
                return torch.stack(groups, 1), of(alone, self.seed + _UNSEEN)


def _parts(
    model: Any,
    guide: Any,
    *args: Any,
    size: int | None = None,
    step: Any = 0,
    plate: str | None = None,
) -> Tensor:
    """Of one draw the ELBO, the log weight and log p(x | z), all unscaled."""
    sites = terms(*trace_pair(model, guide, *args), plate)

    def total(values: Mapping[str, Tensor]) -> Tensor:
        return sum((value.sum() for value in values.values()), start=torch.zeros(()))

    likelihood = total(sites.log_likelihood)
    weight = likelihood + total(sites.log_prior) - total(sites.log_guide)
    known = sites.kl
    prior = total({k: v for k, v in sites.log_prior.items() if k not in known})
    drawn = total({k: v for k, v in sites.log_guide.items() if k not in known})
    return torch.stack([likelihood + prior - drawn - total(known), weight, likelihood])


@contextmanager
def frozen(whole: Whole, guide: Any) -> Iterator[None]:
    """Inside, no parameter or buffer of the model or of a guide moves, whoever holds it."""
    with param_store(copies=True):
        with random_state(whole.seed):
            task = task_on(whole.model, guide, whole.args, whole.kwargs, whole.plate)
        program = task.program
        store = pyro.get_param_store()
        held = [*program.parameters(), *store.get_state()["params"].values()]
        dict(store.items())  # which get_state has taken the weak references off
        moving = [parameter for parameter in held if parameter.requires_grad]
        try:
            for parameter in moving:
                parameter.requires_grad = False
            with kept_buffers(program):
                yield
        finally:
            for parameter in moving:
                parameter.requires_grad = True


def measured_whole(
    whole: Whole,
    guide: FamilyGuide,
    members: Mapping[str, Any],
    own: str | None,
    *,
    dense: bool,
    tick: Callable[[], Any],
) -> tuple[Measured, list[str]]:
    """Fits each family, and measures what its optimum is worth, with all else as it is.

    Args:
        whole: the model.
        guide: the guide to account for.
        members: family by name.
        own: the name under which that of the guide is among them, or None.
        dense: whether the guide has a density.
        tick: is called after each fit.

    Returns:
        What was measured, of the one datum that all are; and remarks on fits.
    """
    notes: list[str] = []

    def best_of(name: str, family: Any, *, dense: bool = True) -> tuple[Any, Any]:
        fitted, said = whole.fitted(family)
        if dense:
            told: dict[str, Any] = {"seed": whole.seed, "plate": whole.plate}
            told["kwargs"] = whole.kwargs
            with opened(whole.model, fitted, whole.args, **told) as runs:
                known = terms(*runs.traces, whole.plate).is_dense
            got = f"{name}, whose members are points"
            expect(known, "families", "families with a density", got)
        notes.extend([f"{name}: {said}"] if said else [])
        tick()
        return fitted, whole.parts(fitted)

    with frozen(whole, guide):
        mine = whole.parts(guide)
        parts = {name: best_of(name, family)[1] for name, family in members.items()}
        if dense and own is None:
            one = not guide.family.channels  # the only member
            parts[""] = mine if one else best_of(guide.family.name, _family_of(guide))[1]
        pointed, at_point = best_of("`point`", "deterministic", dense=False)
        endless = whole.endless(pointed)
    if dense and mine[0][0].mean() > parts[own or ""][0][0].mean():
        parts[own or ""] = mine
    together, alone = max(parts.values(), key=lambda each: float(each[0][0].mean()))
    found: dict[str, Any] = estimates(alone[1][:, None])
    more = torch.zeros(1)
    nothing = prior_of(members)
    if nothing is not None:
        prior = estimates(parts[nothing][1][1][:, None])
        more = found_by_prior(found, prior).to(more)
        if more.item() > 0:
            found, together = prior, parts[nothing][0]
    groups = {name: each[0][0].mean(1, keepdim=True) for name, each in parts.items()}
    own_value = mine[0][0 if dense else 1].mean(1, keepdim=True)
    measured = Measured(
        rungs={name: groups[name] for name in members},
        noise=posterior_mean(together[1][..., None], together[2][..., None]),
        **found,
        point=at_point[0][1].mean().reshape(1),
        endless=endless,
        best=groups[own or ""] if dense else None,
        guide=own_value,
        prior_found=more,
    )
    return measured, notes


def _family_of(guide: FamilyGuide) -> Any:
    """The family of a guide, or by site, as another guide takes it."""
    return guide.family.entries if isinstance(guide.family, BySite) else guide.family
