"""Labels: draw the digit asked for (two minutes; writes pictures to results/labels).

The same networks three times: without labels, with labels in decoder and encoder, and with labels
in the prior too. What are they worth in nats, what is left of the class in the codes, and how well
does Bayes' rule with log p(x | label) tell the digits, beside a plain classifier?

And with ten labels for each digit, all others missing: these are discrete latents, which are summed
out (the model M2 of Kingma et al., Semi-supervised learning with deep generative models, 2014, with
the sum in place of its q(y | x)). Their posterior probabilities classify.

    python examples/labels.py
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression

from ppvae import (
    VAE,
    FamilyGuide,
    data,
    encode,
    evaluate,
    families,
    fit,
    generate,
    likelihoods,
    linear_probe,
    log_prob,
    plots,
    priors,
)
from ppvae.nn import Concatenate, mlp

Pair = tuple[torch.Tensor, torch.Tensor]  # images and their labels
ROWS = ("no labels", "labels", "labels, prior too")


def build(row: str, args: argparse.Namespace) -> tuple[VAE, FamilyGuide]:
    """Model and guide of one row."""
    torch.manual_seed(args.seed)
    wide = 0 if row == "no labels" else 10
    prior = priors.Learned(args.latent, context=10) if row == "labels, prior too" else None
    decoder = mlp(args.latent + wide, 256, out=64)
    model = VAE(decoder, args.latent, likelihoods.Bernoulli(), prior, context=wide or None)
    encoder = Concatenate(mlp(64 + wide, 256), labels={1: 10})
    return model, FamilyGuide(model, families.mean_scale, encoder)


def by_bayes(model: VAE, guide: FamilyGuide, x: torch.Tensor) -> np.ndarray:
    """The label under which each image is most probable."""
    scores = [
        log_prob(model, guide, x, torch.full((len(x),), label), num_samples=100).log_likelihood
        for label in range(10)
    ]
    return np.argmax(scores, 0)


class Missing(torch.nn.Module):
    """Digits with a label and a style, where a label of -1 is missing."""

    vectorized = True

    def __init__(self, latent: int) -> None:
        super().__init__()
        self.latent, self.decoder = latent, mlp(latent + 10, 128, out=64)

    def forward(self, x: torch.Tensor, label: torch.Tensor) -> None:
        """Draws a label where there is none, and the image."""
        with pyro.plate("data", len(x)):
            kinds = dist.Categorical(torch.ones(10) / 10)
            seen = {"obs": label.clamp(min=0), "obs_mask": label >= 0}
            kind = pyro.sample("kind", kinds, **seen)
            z = pyro.sample("z", dist.Normal(torch.zeros(self.latent), 1.0).to_event(1))
            shape = torch.broadcast_shapes(kind.shape, z.shape[:-1])
            both = torch.cat([torch.eye(10)[kind].expand(*shape, 10), z.expand(*shape, -1)], -1)
            pyro.sample("x", dist.Bernoulli(logits=self.decoder(both)).to_event(1), obs=x)


class Images(torch.nn.Module):
    """An encoder of the images alone."""

    def __init__(self) -> None:
        super().__init__()
        self.net = mlp(64, 256)

    def forward(self, x: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
        """Features of the images."""
        return self.net(x)


def with_few(train: Pair, held_out: Pair, args: argparse.Namespace) -> None:
    """Trains with ten labels for each digit, the others missing, and classifies new images."""
    (x, y), (test, truth) = train, held_out
    draw = torch.Generator().manual_seed(args.seed)
    known = torch.full_like(y, -1)
    for label in range(10):
        rows = (y == label).nonzero()[:, 0]
        known[rows[torch.randperm(len(rows), generator=draw)[:10]]] = label
    few = known >= 0
    torch.manual_seed(args.seed)
    model = Missing(latent=2)  # a narrow style: what it cannot say is left to the label
    guide = FamilyGuide(model, families.mean_scale, Images())
    often = torch.cat([x, *[x[few]] * 10]), torch.cat([known, *[known[few]] * 10])
    fit(
        model, guide, often, num_epochs=3 * args.epochs, batch_size=128, learning_rate=2e-3,
        seed=args.seed, progress="few labels",
    )  # fmt: skip
    found = evaluate(model, guide, test, torch.full((len(test),), -1), num_samples=256)
    told = found.kind_unobserved_responsibility.values.argmax(1)
    plain = LogisticRegression(max_iter=1000).fit(x[few], y[few])
    print(f"\nWith {int(few.sum())} labels, and {len(x) - int(few.sum())} images without one:")
    print(f"  ELBO {found.elbo.mean():.2f}, log p {found.log_likelihood.mean():.2f}", end="; ")
    print(f"{(told == truth.numpy()).mean():.1%} right by the labels' probabilities,")
    print(f"  {plain.score(test, truth):.1%} by a plain classifier on the {int(few.sum())}.")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=60)
    parser.add_argument("--latent", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("results/labels"))
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    labels = torch.as_tensor(load_digits().target)
    (x, test), (y, truth) = (data.split(part) for part in (data.load("digits"), labels))
    print(f"{len(x)} training and {len(test)} test images; nats per image\n")
    heads = ("rate", "ELBO", "log p", "class from codes", "by Bayes' rule")
    print(f"{'':20s}{''.join(f'{head:>18s}' for head in heads)}")
    drawn, codes = {}, {}
    for row in ROWS:
        model, guide = build(row, args)
        given = ((x,), (test,)) if model.context is None else ((x, y), (test, truth))
        fit(
            model, guide, given[0], num_epochs=args.epochs, batch_size=128, learning_rate=2e-3,
            seed=args.seed, progress=row,
        )  # fmt: skip
        found = evaluate(model, guide, *given[1], num_samples=256)
        codes[row] = encode(model, guide, *given[1]).mean
        probe = linear_probe(codes[row], truth)
        line = [f"{found[name].values.mean():.2f}" for name in ("rate", "elbo", "log_likelihood")]
        line.append(f"{probe.value:.0%}")
        if model.context is None:
            line.append("-")
        else:
            line.append(f"{(by_bayes(model, guide, test) == truth.numpy()).mean():.1%}")
            asked = torch.arange(10)
            drawn[row] = model.mean(model.draw_prior(10, asked), asked).detach()
        print(f"{row:20s}{''.join(f'{word:>18s}' for word in line)}")
    generated = generate(model, context=torch.arange(10), seed=args.seed)
    drawn["with noise"] = generated
    plain = LogisticRegression(max_iter=1000).fit(x, y)
    print(f"\nA plain classifier on the images: {plain.score(test, truth):.1%}")
    print("log p of the rows with labels is log p(x | label); to name a label costs", end=" ")
    print(f"{np.log(10):.2f} nats more.")
    plots.images(drawn, title="The digits 0 to 9, asked for").savefig(
        args.out / "drawn.png", dpi=150
    )
    plots.latents(codes, truth).savefig(args.out / "latents.png", dpi=150)
    with_few((x, y), (test, truth), args)
    print(f"\nPictures are in {args.out}")


if __name__ == "__main__":
    main()
