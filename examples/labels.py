"""Labels: draw the digit asked for (half a minute; writes pictures to results/labels).

The same networks three times: without labels, with labels in decoder and encoder, and with labels
in the prior too. What are they worth in nats, what is left of the class in the codes, and how well
does Bayes' rule with log p(x | label) tell the digits, beside a plain classifier?

    python examples/labels.py
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
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
    print(f"Pictures are in {args.out}")


if __name__ == "__main__":
    main()
