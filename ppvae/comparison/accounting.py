"""Where the nats of a fit go: from the noise of the data, channel by channel, to the ELBO."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from ppvae._checks import as_doubles, check_count, check_label, check_real, check_seed, expect
from ppvae._process import exclusive
from ppvae.comparison.balance import Account, balance_of
from ppvae.comparison.each_datum import measured_of_each
from ppvae.comparison.ledger import Measured, check_finite, notes_of
from ppvae.comparison.members import members_of, name_of, own_of
from ppvae.comparison.whole import Whole, measured_whole
from ppvae.data.adapters import as_tensors
from ppvae.evaluation.amortization import in_groups
from ppvae.guides.family_guide import FamilyGuide
from ppvae.objectives.trace_terms import terms
from ppvae.programs.runs import opened

_LADDER = ("noise_only", "mean_only", "mean_scale", "full_rank")
_CLEAR = 4.0  # errors by which a given log p(x) must be above that of the weights ...
_SHORT = 0.01  # ... and nats, for a remark


@exclusive
def account(  # noqa: D417
    model: Callable[..., Any],
    guide: Any,
    *args: Any,
    families: Sequence[Any] | Mapping[str, Any] = _LADDER,
    num_samples: int = 512,
    num_steps: int = 300,
    batch_size: int = 256,
    log_likelihood: Any = None,
    vectorized: bool | None = None,
    seed: int = 0,
    plate: str | None = None,
    kwargs: Mapping[str, Any] | None = None,
    progress: bool | str = True,
) -> Account:
    r"""Says where the nats of a fit go, from the noise of the data to the ELBO.

    The model stays what it is. Of each family in `families` the best member is searched for each
    datum by itself, without an encoder; the differences of their ELBOs are rows that sum to
    log p(x), in nats per datum:

    - `noise`: E[log p(x|z)] over the posterior p(z|x), what the likelihood says where z is known as
      well as x tells it; mostly below zero for discrete data;
    - `prior_cost` = ELBO(`noise_only`) - noise, what it costs that nothing passes: minus KL(p(z) ||
      p(z|x)) and minus KL(p(z|x) || p(z)) together;
    - `mean_channel`, `scale_channel`, `correlations`: what `mean_only`, `mean_scale` and
      `full_rank` add to the family before them;
    - `beyond_gaussian` = log p(x) - ELBO(`full_rank`), the shape that no Gaussian has.

    From there two rows lead down to the guide's ELBO: `family_gap`, what its family cannot say, and
    `amortization_gap`, what its encoder (and an argument that all data share) misses of the best
    member for each datum. With other families the rows between have the names of the families.
    A row may be negative: `mean_only` is a normal distribution of sd 1 in unconstrained space,
    which may suit worse than the prior, and so may any family that does not hold the one before it.

    Outside of the sum stands `point`, max log p(x, z) over z in the coordinates of the model, as of
    the family `deterministic` (no Jacobian where z is constrained): no bound on log p(x), and above
    it where the posterior is narrow. A remark says where the search for it found no maximum, as of
    a density that is infinite at an end of its support. A guide that is a point has `guide_point`,
    log p(x, z) at its points, in the place of the two gaps.

    **Searches** are those of `gaps`, one for each family; each begins where the better of the guide
    and of the family before is. Where one still rose at its end, a note says by how much it may be
    short: three times what the last quarter of its evaluations brought, a judgement and no bound.
    Arguments that all data share are free for each datum. Families whose heads have networks of
    their own (a flow) can only be that of the guide, with its networks. Discrete latents of
    finitely many values are summed out for all of them, `noise_only` included; those that the guide
    itself draws are charged in the last two rows. Draws are moment-matched in 8 groups, so that
    Gaussian families on linear-Gaussian models come out to rounding, and all families see the same,
    so that the errors of rows are those of differences. log p(x) is estimated from below by
    `num_samples` independent draws from the best member of all (or from the prior, where those find
    clearly more), with `ess` and `khat` as in `evaluate`; a mode that neither meets is not seen.

    **Global latents** (a guide without an encoder, as for a regression) belong to all the data: the
    rows are in nats of all the data. The best members are found by `fit`, on guides of their own,
    and the last row is `optimization_gap`, what the fit is short of its family's optimum. Where
    some latents are global and others local with an encoder, all is given one draw of the globals,
    as in `gaps`.

    Args:
        model: a Pyro model.
        guide: a `FamilyGuide`.
        *args: their arguments: the data.
        families: what `FamilyGuide` takes as families, each with a density, from the first to the
            last; or a mapping to such from names of your own.
        num_samples: draws of each measure, at least 16; rounded up to a multiple of 8.
        num_steps: steps of each search for local latents, at least 1; where the last of them still
            bring something, up to two thirds as many follow.
        log_likelihood: log p(x) of shape `(N,)`, or a number for latents of all the data, exact or
            better estimated; taken as it is.
        batch_size, vectorized, seed, plate, kwargs, progress: as for `evaluate`; the seed is a
            number.

    Returns:
        The rows, in a wrapper that prints them as a table; `ppvae.plots.account` draws them.

    Raises:
        TypeError: a family is none, or the guide cannot be called.
        ValueError: the guide is no `FamilyGuide`; a family has no density, or cannot be searched;
            the data are not finite, or have no finite ELBO; or an argument is out of its range.

    Cremer, Li, Duvenaud, Inference suboptimality in variational autoencoders, 2018 (the two gaps);
    Hoffman and Johnson, ELBO surgery, 2016.

    Example:
        >>> import torch
        >>> from ppvae import VAE, FamilyGuide, families, likelihoods
        >>> from ppvae.nn import mlp
        >>> model = VAE(torch.nn.Linear(2, 5), latent=2, likelihood=likelihoods.Normal(1.0))
        >>> guide = FamilyGuide(model, families.mean_scale, encoder=mlp(5, 16))
        >>> found = account(model, guide, torch.randn(20, 5), progress=False).dataset
        >>> found.row.values[:4].tolist()
        ['noise', 'prior_cost', 'mean_channel', 'scale_channel']
        >>> bool(abs(found.nats.sel(row="beyond_gaussian")).max() < 1e-3)  # the posterior is one
        True
        >>> total = found.nats.where(found.summed).sum("row")
        >>> bool(abs(total - found.elbo).max() < 1e-9)
        True
    """
    members = members_of(families, 1)
    num_steps, seed = check_count("num_steps", num_steps), check_seed(seed)
    draws = in_groups(num_samples)
    wanted = "a FamilyGuide"
    expect(isinstance(guide, FamilyGuide), "guide", wanted, type(guide).__name__)
    shown, label = check_label("progress", progress, "account")
    if args and guide.encoder is None and guide.family.channels:  # data of fits of their own
        as_tensors("args", args, missing=True, sparse=True)
    with opened(model, guide, args, kwargs, batch_size, vectorized, seed, plate) as runs:
        sites = terms(*runs.traces, plate)
        dense, channels = sites.is_dense, guide.family.channels
        local = sites.is_local if not channels else guide.encoder is not None
        notes: list[str] = []
        if local:
            bar = tqdm(desc=label, disable=not shown, delay=3.0)
            names = tuple(kwargs or ())
            found = measured_of_each(model, guide, runs, members, num_steps, draws, names, bar)
        frame, args, traces = runs.plate, runs.args, runs.traces
        args = args[: len(args) - len(kwargs or ())]
    if not local:
        known = None if frame is None or plate is None else frame.name
        whole = Whole(model, args, kwargs, known, draws, seed)
        count = len(members) + 2
        with tqdm(desc=label, total=count, disable=not shown, delay=3.0, unit="fit") as bar:
            own = own_of(guide, traces, members)
            found, notes = measured_whole(whole, guide, members, own, dense=dense, tick=bar.update)
    check_finite(found)
    if log_likelihood is not None:
        exact = _exact(log_likelihood, len(found.khat), whole=not local)
        found, missed = _with_exact(found, exact)
        notes = [*notes, *missed]
    kinds = {name: name_of(family) for name, family in members.items()}
    notes += notes_of(found, kinds, exact=log_likelihood is not None)
    told = {"num_samples": draws, "guide": guide.family.name}
    told |= {"num_steps": num_steps} if local else {}
    return balance_of(found, kinds, notes, told, whole=not local)


def _exact(log_likelihood: Any, size: int, *, whole: bool) -> Tensor:
    """The user's log p(x), of shape `(size,)`."""
    values = as_doubles(check_real("log_likelihood", log_likelihood))
    values = values.reshape(1) if whole and values.size == 1 else values
    bad = int((~np.isfinite(values)).sum())
    wanted = "a finite number" if whole else f"{size} finite numbers, one per datum"
    came = f"shape {values.shape} with {bad} that are not finite"
    expect(values.shape == (size,) and not bad, "log_likelihood", wanted, came)
    return torch.from_numpy(np.array(values))


def _with_exact(found: Measured, exact: Tensor) -> tuple[Measured, list[str]]:
    """The same with a known log p(x), and a remark if the weights miss some of it."""
    short = exact - found.log_likelihood - _CLEAR * found.log_likelihood_se - _SHORT
    missed = int((short > 0).sum())
    remark = (
        f"the weighted draws miss up to {(exact - found.log_likelihood).max():.2g} nats of the log "
        f"p(x) that was given, for {missed} of {len(exact)}: `noise` may be off there"
    )
    known = replace(found, log_likelihood=exact, log_likelihood_se=torch.zeros_like(exact))
    return known, [remark] if missed else []
