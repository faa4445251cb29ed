"""The rate of a guide with a floor under each latent coordinate."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ppvae._divergence import by_coordinate, closed_kl, is_point
from ppvae.objective import Terms, data_size

__all__ = ["floored_rate"]


def floored_rate(
    pairs: list[Any], parts: list[Terms], floor: float, size: int | None = None
) -> Tensor:
    """The rate in nats per datum, each coordinate's mean over batch and draws at least `floor`.

    A latent that the guide draws as a point has no divergence, and no floor.

    Args:
        pairs: the traces of model and guide of each run.
        parts: their terms, without `kl` where the rate is to be sampled.
        floor: nats per latent coordinate.
        size: number of data in all; by default the size of the data plate.

    Raises:
        ValueError: the guide has no density.
    """
    first = parts[0]
    if not first.log_guide:
        raise ValueError(f"free_bits: expected 0 for a guide that draws only points; got {floor}")
    total, share = torch.zeros(()), 1.0 / data_size(first, size)
    pieces = [name for name in first.log_prior if is_point(pairs[0][1].nodes[name]["fn"])]
    for name in first.log_prior:
        if name in pieces:
            continue
        values = [
            _coordinates(name, model_trace, guide_trace, part)
            for (model_trace, guide_trace), part in zip(pairs, parts, strict=True)
        ]
        lowest = floor * _mean(first.scales[name])
        rate = torch.stack(values).mean(0).clamp(min=lowest).sum()
        total = total + (rate if name in first.local else rate * share)
    return total + _joint_rate(parts, pieces, floor, share)


def _joint_rate(parts: list[Terms], pieces: list[str], floor: float, share: float) -> Tensor:
    """The rate of the pieces of joint draws, which is one number, or the penalty of points."""
    first, total = parts[0], torch.zeros(())
    drawn = [n for n in first.log_guide if n not in first.log_prior or n in pieces]
    for part in parts:
        for sign, names, values in ((-1, pieces, part.log_prior), (1, drawn, part.log_guide)):
            for name in names:
                value = sign * (values[name] * part.scales[name]).mean() / len(parts)
                total = total + (value if name in part.local else value * share)
    if not drawn:
        return total
    lowest = floor * _mean(first.scales[drawn[0]])
    return total.clamp(min=lowest if drawn[0] in first.local else lowest * share)


def _mean(scale: Any) -> Any:
    return scale.mean() if isinstance(scale, Tensor) else scale


def _coordinates(name: str, model_trace: Any, guide_trace: Any, parts: Terms) -> Tensor:
    """Mean over batch and draws of the rate of one site, by coordinate where it splits."""
    node, prior = guide_trace.nodes[name], model_trace.nodes[name]
    q, p = node["fn"], prior["fn"]
    depth = len(q.event_shape)
    pair = by_coordinate(q, p)
    if pair is None:  # no sum over coordinates
        whole = parts.kl.get(name)
        whole = parts.log_guide[name] - parts.log_prior[name] if whole is None else whole
        return (whole * parts.scales[name]).mean()
    q, p = pair
    closed = closed_kl(q, p) if name in parts.kl else None
    rate: Any = q.log_prob(node["value"]) - p.log_prob(node["value"]) if closed is None else closed

    def aligned(value: Any) -> Tensor:
        """What has the shape of the plates, with the event dims behind."""
        value = torch.as_tensor(value, device=rate.device)
        return value.reshape(value.shape + (1,) * depth)

    if prior["mask"] is not None:
        rate = torch.where(aligned(prior["mask"]), rate, torch.zeros_like(rate))
    rate = (rate * aligned(parts.scales[name])).expand(node["fn"].shape())
    averaged = {f.dim for f in node["cond_indep_stack"] if f.name == "_draws"}
    if name in parts.local:
        averaged.add(parts.plate.dim)
    dims = [dim - depth for dim in averaged]
    return rate.mean(dims) if dims else rate
