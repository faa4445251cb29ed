"""Draws of guides of global latents."""

from contextlib import ExitStack

import pyro
import torch
from torch import Tensor

from ppvae._scopes import eval_mode, private_modules, random_state
from ppvae.guides import FamilyGuide
from ppvae.regression.priors import Array


def draw_latents(
    guide: FamilyGuide, args: tuple[Tensor, ...], size: int, seed: int
) -> dict[str, Array]:
    """Draws of the latents, `(size, *event)`, that leave no trace in the streams of the caller."""
    scopes = random_state(seed), torch.no_grad(), private_modules(), eval_mode(guide)
    with ExitStack() as stack:
        for scope in (*scopes, pyro.plate("draws", size, dim=-2)):
            stack.enter_context(scope)
        values = guide(*args)
    shapes = {name: (size, *value.shape[1:]) for name, value in values.items()}
    return {
        name: values[name].expand(shape)[:, 0].detach().numpy() for name, shape in shapes.items()
    }
