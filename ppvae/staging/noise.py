"""The noise of many steps: drawn at once where the same numbers come of it."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ppvae._scopes import random_state
from ppvae.staging.passes import is_random
from ppvae.staging.staged import Staged

_JOINT = torch.ops.aten.randn.default, torch.ops.aten.rand.default
_BLOCK = 16  # numbers that PyTorch makes at a time: from a multiple of so many on it goes on afresh


def joint_noise(staged: Staged, given: list[Tensor]) -> Callable[[int], list[Tensor]] | None:
    """What draws the noise of many steps at once, if that gives the numbers of single steps.

    Args:
        staged: a loss.
        given: what its noise is drawn for, as in a step.

    Returns:
        A function from a number of steps to the noise, of which each tensor has a first dimension
        of steps; or None.
    """
    drawn: list[Any] = [node for node in staged.noise.graph.nodes if is_random(node)]
    if not drawn:
        return lambda steps: []
    with random_state(0):
        apart = [staged.noise(*given) for _ in range(3)]
    node, first = drawn[0], apart[0][0]
    if len(drawn) > 1 or node.target not in _JOINT or first.numel() % _BLOCK:
        return None
    options = {"dtype": first.dtype, "device": first.device}

    def at_once(steps: int) -> list[Tensor]:
        return [node.target((steps, *first.shape), **options)]

    with random_state(0):
        same = torch.equal(at_once(3)[0], torch.stack([each[0] for each in apart]))
    return at_once if same else None
