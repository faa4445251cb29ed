"""The ladder: one autoencoder, eleven kinds of encoder, on the same data.

Every family gets the same networks, data and number of steps; only the guide family differs.
    python examples/ladder.py
    python examples/ladder.py --families mean_only mean_scale --data mnist5k --seeds 3
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import numpy as np
import torch

from ppvae import VAE, FamilyGuide, data, evaluate, families, fit, from_pyro_svi, likelihoods, plots
from ppvae.nn import mlp

COLUMNS = ("rate", "distortion", "objective", "log p(x)", "+-", "active", "seconds")


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add, ladder = parser.add_argument, list(families.LADDER)
    add("--families", nargs="+", default=ladder, metavar="FAMILY", help=", ".join(ladder))
    add("--data", default="digits", help="digits, mnist5k, or a .npy, .npz or .csv file")
    add("--latent", type=int, default=8, help="length of the latent")
    add("--hidden", type=int, default=256, help="width of the hidden layers")
    add("--epochs", type=int, default=60)
    add("--seeds", type=int, default=1, help="runs per family; the table shows mean and sd")
    add("--seed", type=int, default=0, help="the first seed")
    add("--out", type=Path, default=Path("results/ladder"), help="folder to write to")
    add("--device", default="cpu")
    add("--threads", type=int, default=1, help="small networks are faster with one")
    add("--linear", action="store_true", help="linear networks, Gaussian likelihood")
    args = parser.parse_args(argv)
    for name in args.families:
        if name not in families.LADDER:
            parser.error(f"--families: expected names from {', '.join(ladder)}; got {name!r}")
    try:
        torch.empty(0, device=args.device)
    except (RuntimeError, AssertionError) as error:
        parser.error(f"--device: {args.device!r} is not a device of this machine; {error}")
    if min(args.latent, args.hidden, args.epochs, args.seeds, args.threads) < 1:
        parser.error("--latent, --hidden, --epochs, --seeds, --threads: expected at least 1")
    torch.set_num_threads(args.threads)
    try:
        x = data.load(args.data, binary=not args.linear)
        args.split = [part.to(args.device) for part in data.split(x)]
    except (ValueError, FileNotFoundError, ImportError) as error:
        parser.error(f"--data: {error}")
    return args


def train(
    name: str, x: torch.Tensor, latent: int, epochs: int, seed: int, args: argparse.Namespace
):
    """The model and the guide of one family, trained."""
    torch.manual_seed(seed)
    size, hidden = x.shape[-1], () if args.linear else (args.hidden,)
    decoder = mlp(latent, *hidden, out=size)
    encoder = mlp(size, *hidden) if hidden else torch.nn.Identity()  # each channel is linear in it
    binary = bool(((x == 0) | (x == 1)).all()) and not args.linear
    likelihood = likelihoods.Bernoulli() if binary else likelihoods.Normal(1.0, learned=True)
    model = VAE(decoder, latent, likelihood).to(args.device)
    guide = FamilyGuide(model, families.LADDER[name], encoder.to(args.device)).to(args.device)
    result = fit(
        model, guide, x, num_epochs=epochs, batch_size=min(128, len(x)), learning_rate=2e-3,
        seed=seed, progress=f"{name}, {latent} latents, seed {seed}",
    )  # fmt: skip
    return model, guide, result


def measure(model: VAE, guide: FamilyGuide, test: torch.Tensor) -> dict[str, float]:
    """One row of the table."""
    found = evaluate(model, guide, test)
    row = {name: float(found[name].mean()) for name in ("rate", "distortion", "objective")}
    row["+-"] = float(found.log_likelihood.std(ddof=1)) / len(test) ** 0.5
    row |= {"log p(x)": float(found.log_likelihood.mean()), "active": float(found.active.sum())}
    # without a channel the encoder stays idle
    used = guide if guide.family.channels else guide.heads
    row["parameters"] = sum(p.numel() for p in used.parameters())
    return row | {"bound": found.bound, "stochastic": found.stochastic}


def show(rows: dict[str, list[dict[str, float]]]) -> None:
    """Prints one line per family."""
    head = f"{'family':18s} {'channels':22s} {'guide par.':>10s} "
    print("\n" + head + " ".join(f"{c:>15s}" for c in COLUMNS) + "  two codes")
    for name, runs in rows.items():
        cells = []
        for column in COLUMNS:
            values = np.array([row[column] for row in runs])
            digits = 1 if column == "seconds" else 0 if column == "active" else 2
            text = "-" if np.isnan(values).any() else f"{values.mean():.{digits}f}"
            if len(runs) > 1 and text != "-":
                text += f" ({values.std(ddof=1):.2f})"
            mark = "*" if column in ("rate", "objective") and not runs[0]["bound"] else " "
            cells.append(f"{text + mark:>15s}")
        channels = ", ".join(families.LADDER[name].channels) or "none"
        differ = "differ" if runs[0]["stochastic"] else "equal"
        print(
            f"{name:18s} {channels:22s} {runs[0]['parameters']:10d} "
            + " ".join(cells)
            + f"  {differ}"
        )
    print("\nNats per datum on the test set; in brackets the standard deviation over seeds.")
    print(
        "log p(x): from below, by importance sampling; +-: its standard error over the test data."
    )
    print("*: a point has no density: -log p(z) in place of a rate, and a penalised log-likelihood")
    print("   in place of the ELBO. It is no bound; do not compare it with the other rows.")


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    x, test = args.split
    args.out.mkdir(parents=True, exist_ok=True)
    print(f"{args.data}: {len(x)} training and {len(test)} test data of length {x.shape[-1]}")
    rows: dict[str, list[dict[str, float]]] = {}
    rebuilt, sampled, codes = {"data": test[:12].cpu()}, {}, {}
    for name in args.families:
        rows[name] = []
        for seed in range(args.seed, args.seed + args.seeds):
            model, guide, result = train(name, x, args.latent, args.epochs, seed, args)
            rows[name].append(measure(model, guide, test) | {"seconds": result.seconds})
        tree = from_pyro_svi(model, guide, test[:100], num_samples=200, seed=args.seed)
        tree.to_netcdf(args.out / f"{name}.nc")
        _, flat, _ = train(name, x, 2, max(1, args.epochs // 2), args.seed, args)
        with torch.no_grad():
            rebuilt[name] = model.mean(guide(test[:12])["z"]).cpu()
            sampled[name] = model.mean(model.draw_prior(12)).cpu()
            codes[name] = torch.stack([flat(test[:6])["z"] for _ in range(200)], 1).cpu()
    show(rows)
    figures = {"encodings": plots.encodings(codes)}
    last = {name: runs[-1] for name, runs in rows.items() if runs[-1]["bound"]}
    if last:
        points = {name: (row["rate"], row["distortion"]) for name, row in last.items()}
        figures["rate_distortion"] = plots.rate_distortion(points)
    if math.isqrt(x.shape[-1]) ** 2 == x.shape[-1]:
        figures["reconstructions"] = plots.images(rebuilt, title="Reconstructions")
        figures["samples"] = plots.images(sampled, title="Decoded draws from the prior")
    for name, figure in figures.items():
        figure.savefig(args.out / f"{name}.png", dpi=150)
    print(f"\nPictures and one ArviZ file per family are in {args.out}")


if __name__ == "__main__":
    main()
