"""Sequences: how to guide a path (three minutes; writes a picture to results/sequences).

A hidden state wanders for 5 to 20 steps, of which some are seen, through noise. The model is known,
so that a Kalman filter gives log p(x), and its smoother the posterior. Three guides with the same
encoder: each step by itself, given the one before, and all at once with a banded precision.

    python examples/sequences.py
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import pyro.distributions as dist
import torch
from torch import Tensor, nn

from ppvae import Block, FamilyGuide, evaluate, families, fit, from_pyro_svi, models, simulate
from ppvae._look import color, empty
from ppvae.likelihoods import Normal

STEPS, KEPT, MOVE, NOISE = 20, 0.95, 0.5, 1.0  # z_t = KEPT z_{t-1} + MOVE e, x_t = z_t + NOISE e


class Wandering(nn.Module):
    """From a state to the next one."""

    def forward(self, z: Tensor) -> dist.Distribution:
        """The distribution of the next states, `(*, 1)`."""
        return dist.Normal(KEPT * z, MOVE).to_event(1)


class BothWays(nn.Module):
    """Features of each step by a recurrent network that reads the sequence both ways."""

    takes_missing = True  # what was not observed, and what stands behind an end, is NaN

    def __init__(self, *, at_once: bool = False) -> None:
        super().__init__()
        self.net, self.at_once = nn.GRU(2, 32, batch_first=True, bidirectional=True), at_once

    def forward(self, x: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Sequences `(batch, steps, 1)` -> `(batch, steps, 64)`, or all steps in one row."""
        told = torch.cat([x.nan_to_num(0.0), x.isnan().to(x.dtype)], -1)
        features = self.net(told)[0]
        return features.flatten(1) if self.at_once else features


#: name -> family, whether it draws all steps at once
GUIDES = {
    "each step alone": ({"z_*": "mean_scale"}, False),
    "given the one before": ({"z_*": Block("mean_scale", given="previous")}, False),
    "banded precision": (families.Banded(1), True),
}


def draw(model: models.DeepMarkov, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """States `(size, steps)`, what is seen of them `(size, steps, 1)`, and lengths."""
    (x,), latents = simulate(model, torch.zeros(size, STEPS, 1))
    states = torch.cat([latents[f"z_{t}"] for t in range(STEPS)], -1)
    lengths = torch.randint(5, STEPS + 1, (size,))
    unseen = (torch.rand(size, STEPS) < 0.2) | (torch.arange(STEPS) >= lengths[:, None])
    return states, torch.where(unseen[..., None], torch.nan, x), lengths


def kalman(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Log p of each sequence, and mean and sd of each state given all that is seen of it."""
    mean, var, total = x.new_zeros(len(x)), x.new_full((len(x),), MOVE**2 / (1 - KEPT**2)), 0.0
    means, variances = [], []
    for t in range(STEPS):
        if t:
            mean, var = KEPT * mean, KEPT**2 * var + MOVE**2
        seen = ~x[:, t, 0].isnan()
        value = torch.where(seen, x[:, t, 0], 0.0)
        log_p = dist.Normal(mean, (var + NOISE**2) ** 0.5).log_prob(value)
        gain = torch.where(seen, var / (var + NOISE**2), 0.0)
        total = total + torch.where(seen, log_p, 0.0)
        mean, var = mean + gain * (value - mean), (1 - gain) * var
        means.append(mean)
        variances.append(var)
    for t in reversed(range(STEPS - 1)):
        ahead = KEPT**2 * variances[t] + MOVE**2
        back = KEPT * variances[t] / ahead
        means[t] = means[t] + back * (means[t + 1] - KEPT * means[t])
        variances[t] = variances[t] + back**2 * (variances[t + 1] - ahead)
    return total, torch.stack(means, 1), torch.stack(variances, 1).sqrt()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--size", type=int, default=2000, help="sequences to train on")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("results/sequences"))
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(args.seed)
    start = dist.Normal(torch.zeros(1), MOVE / (1 - KEPT**2) ** 0.5).to_event(1)
    model = models.DeepMarkov(nn.Identity(), Wandering(), 1, Normal(NOISE), start)
    _, x, lengths = draw(model, args.size)
    states, test, ends = draw(model, 200)
    log_p, mean, sd = kalman(test.double())
    inside = torch.arange(STEPS) < ends[:, None]
    print(f"{args.size} training and {len(test)} test sequences; nats per sequence\n")
    heads = ("ELBO", "log p(x)", "error", "k-hat", "sd / exact", "in 90 %")
    print(f"{'':20s}{''.join(f'{head:>12s}' for head in heads)}")
    chosen, bands = int(ends.argmax()), {}  # the first of all steps is drawn
    for name, (family, at_once) in GUIDES.items():
        torch.manual_seed(args.seed)
        guide = FamilyGuide(model, family, BothWays(at_once=at_once))
        # the states behind an end are masked; a joint draw has them, too, and sees no data there
        told, held_out = ((x,), (test,)) if at_once else ((x, lengths), (test, ends))
        for rate in (1e-2, 1e-3):
            fit(
                model, guide, told, num_epochs=args.epochs, batch_size=100, learning_rate=rate,
                clip=10.0, seed=args.seed, progress=name,
            )  # fmt: skip
        found = evaluate(model, guide, *held_out, num_samples=1000, seed=args.seed)
        error = (1 / found.ess - 1 / 1000).mean() ** 0.5 / len(test) ** 0.5
        tree = from_pyro_svi(model, guide, *held_out, num_samples=1000, seed=args.seed)
        paths = [tree[f"posterior/z_{t}"].values[0, :, :, 0] for t in range(STEPS)]
        z = torch.tensor(np.stack(paths, -1)).to(states)
        low, high = z.quantile(torch.tensor([0.05, 0.95], dtype=z.dtype), 0)
        bands[name] = torch.stack([low[chosen], high[chosen]], -1)
        ratio = (z.std(0) / sd)[inside].mean()
        held = ((low < states) & (states < high))[inside].float().mean()
        line = [found.elbo.mean(), found.log_likelihood.mean(), error, found.khat.mean()]
        print(f"{name:20s}{''.join(f'{float(v):12.3f}' for v in [*line, ratio, held])}")
    held = (abs(states - mean) < 1.645 * sd)[inside].float().mean()
    print(f"{'Kalman filter':20s}{'':12s}{log_p.mean():12.3f}{'':24s}{1:12.3f}{held:12.3f}")
    figure = empty(9.6, 3.2)
    panels = figure.subplots(1, 3, sharey=True)
    end, middle, width = int(ends[chosen]), mean[chosen], 1.645 * sd[chosen]
    for panel, (name, band) in zip(panels, bands.items(), strict=True):
        low, high = (middle - width)[:end], (middle + width)[:end]
        panel.fill_between(range(end), low, high, color="0.85", label="exact")
        panel.plot(band[:end], color=color(0), label=["guide", "_"])
        panel.plot(states[chosen, :end], color="black", linewidth=1, label="true state")
        panel.plot(test[chosen], "o", color=color(3), markersize=3, label="seen")
        panel.set(title=name, xlabel="step", xticks=range(0, STEPS, 5))
    figure.axes[0].set_ylabel("state, with 90 % bands")
    figure.legend(*panel.get_legend_handles_labels(), loc="outside lower center", ncols=4)
    figure.savefig(args.out / "bands.png", dpi=110)
    print(f"\nThe picture is in {args.out}")


if __name__ == "__main__":
    main()
