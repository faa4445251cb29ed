"""The ladder: one autoencoder, eleven kinds of encoder, on the same data.

Every family gets the same networks, data and number of steps; only the guide family differs.

    python examples/ladder.py
    python examples/ladder.py --families mean_only mean_scale --data mnist5k --seeds 3
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch

from ppvae import VAE, FamilyGuide, data, evaluate, families, fit, from_pyro_svi, likelihoods, plots
from ppvae.nn import mlp

COLUMNS = ("rate", "distortion", "objective", "log p(x)", "+-", "active", "seconds")


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    ladder = list(families.LADDER)
    parser.add_argument(
        "--families", nargs="+", default=ladder, metavar="FAMILY", help=", ".join(ladder)
    )
    parser.add_argument(
        "--data", default="digits", help="digits, mnist5k, or a .npy, .npz, .csv file"
    )
    parser.add_argument("--latent", type=int, default=8, help="length of the latent")
    parser.add_argument("--hidden", type=int, default=256, help="width of the hidden layers")
    parser.add_argument("--epochs", type=int, default=60)
    parser.add_argument("--seeds", type=int, default=1, help="runs per family; shows mean and sd")
    parser.add_argument("--seed", type=int, default=0, help="the first seed")
    parser.add_argument(
        "--out", type=Path, default=Path("results/ladder"), help="folder to write to"
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument(
        "--linear", action="store_true", help="linear networks, Gaussian likelihood"
    )
    args = parser.parse_args(argv)
    for name in args.families:
        if name not in families.LADDER:
            parser.error(f"--families: expected names from {', '.join(ladder)}; got {name!r}")
    if min(args.latent, args.hidden, args.epochs, args.seeds) < 1:
        parser.error("--latent, --hidden, --epochs, --seeds: expected at least 1")
    return args


def build(
    name: str, x: torch.Tensor, latent: int, args: argparse.Namespace
) -> tuple[VAE, FamilyGuide]:
    """The model and the guide of one family."""
    size = x.shape[-1]
    if args.linear:
        decoder, encoder = mlp(latent, out=size), mlp(size, out=2 * size)
    else:
        decoder, encoder = mlp(latent, args.hidden, out=size), mlp(size, args.hidden)
    binary = bool(((x == 0) | (x == 1)).all()) and not args.linear
    likelihood = likelihoods.Bernoulli() if binary else likelihoods.Normal(1.0, learned=True)
    model = VAE(decoder, latent, likelihood).to(args.device)
    return model, FamilyGuide(model, families.LADDER[name], encoder.to(args.device))


def run(
    name: str, seed: int, train: torch.Tensor, test: torch.Tensor, args: argparse.Namespace
) -> tuple[VAE, FamilyGuide, dict[str, float]]:
    """Trains one family with one seed and measures it on the test set."""
    torch.manual_seed(seed)
    model, guide = build(name, train, args.latent, args)
    label, batch = f"{name} (seed {seed})", min(128, len(train))
    result = fit(
        model, guide, train, num_epochs=args.epochs, batch_size=batch, learning_rate=2e-3,
        seed=seed, progress=label,
    )  # fmt: skip
    found = evaluate(model, guide, test)
    row = {key: float(found[key].mean()) for key in ("rate", "distortion", "objective")}
    row["log p(x)"] = float(found.log_likelihood.mean())
    row["+-"] = float(found.log_likelihood.std(ddof=1)) / len(test) ** 0.5
    row["active"] = float(found.active.sum())
    row["seconds"] = result.seconds
    row |= {"bound": found.bound, "stochastic": found.stochastic}
    return model, guide, row


def count_parameters(guide: FamilyGuide) -> int:
    """Parameters that training moves: without a channel the encoder's stay idle."""
    idle = 0 if guide.family.channels else sum(p.numel() for p in guide.encoder.parameters())
    return sum(p.numel() for p in guide.parameters()) - idle


def show(rows: dict[str, list[dict[str, float]]], parameters: dict[str, int]) -> None:
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
            f"{name:18s} {channels:22s} {parameters[name]:10d} " + " ".join(cells) + f"  {differ}"
        )
    print("\nNats per datum on the test set; in brackets the standard deviation over seeds.")
    print(
        "log p(x): from below, by importance sampling; +-: its standard error over the test data."
    )
    print("*: a point has no density: -log p(z) in place of a rate, and a penalised log-likelihood")
    print("   in place of the ELBO. It is no bound; do not compare it with the other rows.")


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    train, test = data.split(data.load(args.data, binary=not args.linear))
    train, test = train.to(args.device), test.to(args.device)
    args.out.mkdir(parents=True, exist_ok=True)
    print(
        f"{args.data}: {len(train)} training and {len(test)} test data of length {train.shape[-1]}"
    )
    rows: dict[str, list[dict[str, float]]] = {}
    parameters, rebuilt, sampled, codes = {}, {"data": test[:12].cpu()}, {}, {}
    for name in args.families:
        for seed in range(args.seed, args.seed + args.seeds):
            model, guide, row = run(name, seed, train, test, args)
            rows.setdefault(name, []).append(row)
        parameters[name] = count_parameters(guide)
        with torch.no_grad():
            rebuilt[name] = model.mean(guide(test[:12])["z"]).cpu()
            sampled[name] = model.mean(model.draw_prior(12)).cpu()
        tree = from_pyro_svi(model, guide, test[:100], num_samples=200, seed=args.seed)
        tree.to_netcdf(args.out / f"{name}.nc")
        flat, flat_guide = build(
            name, train, 2, args
        )  # once more with two latents, for the picture
        fit(
            flat, flat_guide, train, num_epochs=max(1, args.epochs // 2), batch_size=min(128, len(train)),
            learning_rate=2e-3, seed=args.seed, progress=f"{name} (2-d)",
        )  # fmt: skip
        with torch.no_grad():
            codes[name] = torch.stack([flat_guide(test[:6])["z"] for _ in range(200)], 1).cpu()
    show(rows, parameters)
    points = {
        name: (r[-1]["rate"], r[-1]["distortion"]) for name, r in rows.items() if r[-1]["bound"]
    }
    figures = {"encodings": plots.encodings(codes)}
    if points:
        figures["rate_distortion"] = plots.rate_distortion(points)
    if round(train.shape[-1] ** 0.5) ** 2 == train.shape[-1]:
        figures["reconstructions"] = plots.images(rebuilt, title="Reconstructions")
        figures["samples"] = plots.images(sampled, title="Decoded draws from the prior")
    for name, figure in figures.items():
        figure.savefig(args.out / f"{name}.png", dpi=150)
    print(f"\nPictures and one ArviZ file per family are in {args.out}")


if __name__ == "__main__":
    main()
