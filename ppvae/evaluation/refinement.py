"""Improves what an encoder says of each datum by a search of its own (semi-amortized inference)."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
import xarray as xr
from torch import Tensor, nn
from tqdm.auto import tqdm

from ppvae._checks import check_count, check_label, expect
from ppvae._process import exclusive
from ppvae.evaluation.amortization import (
    as_arrays,
    best_members,
    check_search,
    elbos,
    in_groups,
)
from ppvae.evaluation.search import with_shifts
from ppvae.programs.runs import opened


class Refined(nn.Module):
    """A guide with an answer of its own for each of some data; made by `refine`.

    It is a Pyro guide of the same model, to be called with the same data, all of them.

    Attributes:
        guide: the guide that was refined, which is as it was.
        gain: what the search brought: `elbo` before, `refined_elbo` after, and their difference
            `gain` with its standard error `gain_se`, per datum (dim `datum`), in nats.
    """

    def __init__(self, guide: Any, shifts: Mapping[str, Tensor], gain: xr.Dataset) -> None:
        super().__init__()
        self.guide, self.gain = guide, gain
        self._places = list(shifts)
        for number, shift in enumerate(shifts.values()):
            self.register_buffer(f"shift_{number}", shift)

    @property
    def family(self) -> Any:
        """The family of the guide."""
        return self.guide.family

    @property
    def size(self) -> int:
        """The number of data that it was refined for."""
        return self.gain.sizes["datum"]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Draws every latent site.

        Raises:
            ValueError: these are not as many data as the guide was refined for.
        """

        def shift(channel: str, value: Tensor) -> Tensor:
            own: Any = getattr(self, f"shift_{self._places.index(channel)}")
            rows = value.shape[-own.dim()] if value.dim() >= own.dim() else 1
            wanted = f"the {self.size} data that the guide was refined for"
            expect(rows == len(own), "args", wanted, rows)
            return own.to(value)

        with with_shifts(self.guide.heads, shift):
            return self.guide(*args, **kwargs)


@exclusive
def refine(  # noqa: D417
    model: Callable[..., Any],
    guide: Any,
    *args: Any,
    num_steps: int = 100,
    num_samples: int = 128,
    batch_size: int = 256,
    vectorized: bool | None = None,
    seed: int | None = 0,
    plate: str | None = None,
    kwargs: Mapping[str, Any] | None = None,
    progress: bool | str = True,
) -> Refined:
    r"""Improves the answer of an encoder for each datum, by some steps from where it starts.

    All arguments of the family that are channels are searched, as in `gaps`, which tells beforehand
    what there is to be gained: its `amortization`. No parameter of guide or model moves. No answer
    is worse than the encoder's, but for the noise of the draws that choose.

    Where some latents are global, the search is given one draw of them (of the seed).

    Args:
        model: a Pyro model with latents in the data plate.
        guide: a `FamilyGuide` with an encoder.
        *args: their arguments: the data.
        num_steps: steps of the search, each with about 16 draws; at least 1.
        num_samples: draws per datum that measure what was gained, at least 16.
        batch_size, vectorized, seed, plate, kwargs, progress: as for `evaluate`.

    Returns:
        A guide for these data, which carries what was gained.

    Raises:
        ValueError: the guide cannot be searched (see `gaps`); the data are not finite; an argument
            is out of its range; or no latent is in the data plate.

    Kim et al., Semi-amortized variational autoencoders, 2018.

    Example:
        >>> import torch
        >>> from ppvae import VAE, FamilyGuide, families, likelihoods
        >>> from ppvae.nn import mlp
        >>> model = VAE(torch.nn.Linear(2, 5), latent=2, likelihood=likelihoods.Normal(1.0))
        >>> guide = FamilyGuide(model, families.full_rank, encoder=mlp(5, 16))
        >>> refined = refine(model, guide, torch.randn(20, 5))
        >>> bool(refined.gain.gain.mean() > 0), refined(torch.randn(20, 5))["z"].shape
        (True, torch.Size([20, 2]))
    """
    num_steps = check_count("num_steps", num_steps)
    draws = in_groups(num_samples)
    shown, label = check_label("progress", progress, "refine")
    measured, pieces = [], []
    with opened(model, guide, args, kwargs, batch_size, vectorized, seed, plate) as runs:
        runs = check_search(runs, guide, plate)
        bar = tqdm(total=len(runs.batches) * num_steps, desc=label, disable=not shown, delay=3.0)
        for shifted, best in best_members(runs, guide, num_steps, bar):
            pieces.append(shifted.pieces(best))
            measured.append(elbos(shifted, best, draws))
    found = as_arrays(measured)
    names = {"elbo": "elbo", "best_elbo": "refined_elbo"}
    names |= {"amortization": "gain", "amortization_se": "gain_se"}
    unit = {"unit": "nats per datum"}
    gain = xr.Dataset({new: ("datum", found[old], unit) for old, new in names.items()})
    gain.attrs = {"num_steps": num_steps, "num_samples": draws}
    shifts = {channel: torch.cat([piece[channel] for piece in pieces]) for channel in pieces[0]}
    return Refined(guide, shifts, gain)
