"""What is expected at an observed site: means of numbers, and the most probable of categories."""

from typing import Any

import torch
from pyro.distributions import Categorical
from torch import Tensor

from ppvae._checks import check_choice, expect
from ppvae.likelihoods.mixed import Joint
from ppvae.programs.layout import Place
from ppvae.programs.nodes import Node, bare_distribution, is_data, observed_nodes
from ppvae.programs.runs import Runs
from ppvae.programs.tracing import with_discrete


def sites_of_data(runs: Runs) -> list[Node]:
    """The observed sites whose elements are independent given the latents.

    Raises:
        ValueError: there is none.
    """
    trace, _ = with_discrete(runs.model, runs.traces, runs.args)
    nodes = [node for node in observed_nodes(trace) if is_data(node)]
    able = [node for node in nodes if not bare_distribution(node["fn"]).event_shape]
    expect(able, "model", "a site of elements that are independent given the latents", "none")
    return able


def one_site(names: list[str], site: str | None, known: list[str]) -> str:
    """The one site that is meant: the one that is named, or the only one.

    Raises:
        ValueError: it is not known, or there are several.
    """
    if site is not None:
        check_choice("site", site, known)
        return site
    expect(len(names) == 1, "site", f"one of {names}", None)
    return names[0]


def expectations(fn: Any, place: Place, entries: Tensor) -> list[tuple[Tensor, Tensor]]:
    """The expectations of some entries of a site, for every draw.

    Args:
        fn: the distribution of its elements.
        place: where its draws and data are.
        entries: which entries are wanted, of shape `(datum, *columns)`.

    Returns:
        For some of the entries, and which of them these are, expectations of shape
        `(draws, some, 1)`; or of categories the probabilities of codes, `(draws, some, codes)`.
    """
    count = int(entries.sum())
    if not isinstance(fn, Joint):
        every = torch.arange(count, device=entries.device)
        if isinstance(fn, Categorical):
            probs = torch.stack([place.front(p)[:, entries] for p in fn.probs.unbind(-1)], -1)
            return [(every, probs)]
        return [(every, place.front(fn.mean)[:, entries].unsqueeze(-1))]
    column = torch.arange(entries.shape[-1], device=entries.device).expand(entries.shape)[entries]
    found = []
    for part, columns in zip(fn.fns, fn.columns, strict=True):
        at = torch.isin(column, torch.tensor(columns, device=column.device)).nonzero()[:, 0]
        own = part.probs if isinstance(part, Categorical) else part.mean.unsqueeze(-1)
        whole = own.new_zeros((*own.shape[:-2], entries.shape[-1], own.shape[-1]))
        whole[..., columns, :] = own
        each = torch.stack([place.front(p)[:, entries][:, at] for p in whole.unbind(-1)], -1)
        found.append((at, each))
    return found


def point(mean: Tensor) -> Tensor:
    """One value for each entry: its mean, or the most probable code; see `expectations`."""
    return mean[..., 0] if mean.shape[-1] == 1 else mean.argmax(-1).to(mean.dtype)
