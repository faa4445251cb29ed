"""The ladder: eleven kinds of encoder (two minutes; writes 125 MB to results/ladder).

One autoencoder, the same networks, data and number of steps; only the guide family differs.
    python examples/ladder.py            (with --linear: beside the exact optimum)
    python examples/ladder.py --families mean_only mean_scale --data mnist5k --seeds 3
    python examples/ladder.py --prior vamp --families mean_scale full_rank flow
"""

import argparse
from contextlib import suppress
from pathlib import Path

import torch

from ppvae import (
    VAE,
    FamilyGuide,
    data,
    encode,
    evaluate,
    families,
    fit_replicates,
    generate,
    likelihoods,
    plots,
    priors,
    two_sample,
)
from ppvae.closed_form import learned_decoder
from ppvae.export.arviz import from_pyro_svi
from ppvae.export.chains import concat_chains
from ppvae.export.files import to_netcdf
from ppvae.nn import mlp

COLUMNS = ("rate", "distortion", "objective", "log p(x)", "+-", "active", "seconds")
LEGEND = """Nats per datum on the test set; in brackets the standard deviation over seeds.
log p(x): from below, by importance sampling; +-: its standard error over the test data.
active: latents whose mean moves with the datum; two codes: whether two codes of one datum differ.
seconds: of training, a seed's share where several are trained at once.
*: a point has no density: -log p(z) in place of a rate, and a penalised log-likelihood
   in place of the ELBO. It is no bound; do not compare it with the other rows."""
EXACT = ("fitted", "exact", "short by", "fitted rate", "exact rate")
EXACT_LEGEND = """The objective and the rate on the training data, and the best there are, exactly.
deterministic has no optimum: its objective rises towards the supremum shown as the codes shrink
   and the decoder grows, without end. How near it came says only when the training stopped.
-: no closed form. But mean_scale, which low_rank, flow and (nearly) student_t can equal, reaches
   probabilistic PCA, the best of all: its optimum is theirs. mean_only_bounded is not linear."""

#: name -> the prior, of a latent of some length, where training data are at hand
PRIORS = {
    "standard": lambda latent, x: None,
    "learned": lambda latent, x: priors.Learned(latent),
    "mixture": lambda latent, x: priors.Mixture(latent, 10),
    "vamp": lambda latent, x: priors.VampPrior(x[:50], latent),
    "flow": lambda latent, x: priors.Learned(latent, "flow"),
}


def parse(argv: list[str] | None) -> tuple[argparse.Namespace, torch.Tensor, torch.Tensor]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add, ladder = parser.add_argument, list(families.LADDER)
    add("--families", nargs="+", default=ladder, choices=ladder, help="by default all")
    add("--prior", default="standard", choices=PRIORS, help="what the latents are drawn from")
    add("--data", default="digits", help="digits, mnist5k, or a .npy, .npz or .csv file")
    add("--latent", type=int, default=8, help="length of the latent")
    add("--hidden", type=int, default=256, help="width of the hidden layers")
    add("--epochs", type=int, default=60, help="with --linear 16 times as many, of one step each")
    add("--seeds", type=int, default=1, help="runs per family; the table shows mean and sd")
    add("--seed", type=int, default=0, help="the first seed")
    add("--out", type=Path, default=Path("results/ladder"), help="folder to write to")
    add("--device", default="cpu")
    add("--threads", type=int, default=1, help="small networks are faster with one")
    add("--linear", action="store_true", help="linear networks, Gaussian likelihood")
    args = parser.parse_args(argv)
    if min(args.latent, args.hidden, args.epochs, args.seeds, args.threads) < 1:
        parser.error("--latent, --hidden, --epochs, --seeds, --threads: expected at least 1")
    points = {"deterministic", "zero", "noise_only"} & set(args.families)
    if args.prior in ("mixture", "vamp") and points:
        parser.error(f"--families: {sorted(points)} have no such density for --prior {args.prior}")
    torch.set_num_threads(args.threads)
    try:
        x = data.load(args.data, binary=not args.linear)
        train, test = (part.to(args.device) for part in data.split(x))
    except (ValueError, OSError, ImportError, RuntimeError, AssertionError) as error:
        parser.error(f"--data or --device: {error}")
    return args, train, test


def build(name: str, x: torch.Tensor, latent: int, seed: int, args) -> tuple[VAE, FamilyGuide]:
    """The model and the guide of one family, untrained."""
    torch.manual_seed(seed)
    size, hidden = x.shape[-1], () if args.linear else (args.hidden,)
    binary = bool(((x == 0) | (x == 1)).all()) and not args.linear
    likelihood = likelihoods.Bernoulli() if binary else likelihoods.Normal(1.0, learned=True)
    prior = PRIORS[args.prior](latent, x)
    model = VAE(mlp(latent, *hidden, out=size), latent, likelihood, prior).to(args.device)
    encoder = mlp(size, *hidden) if hidden else torch.nn.Identity()  # each channel is linear in it
    return model, FamilyGuide(model, families.LADDER[name], encoder.to(args.device)).to(args.device)


def train(name: str, x: torch.Tensor, latent: int, epochs: int, seeds: range, args):
    """The models and guides of one family, all seeds trained at once, and what fitting told."""

    def falling(parameters: list[torch.Tensor], lr: float) -> torch.optim.Optimizer:
        adam = torch.optim.Adam(parameters, lr=lr)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(adam, options["num_epochs"])
        adam.register_step_post_hook(lambda *_: schedule.step())
        return adam

    options = {"num_epochs": epochs, "batch_size": min(128, len(x)), "learning_rate": 2e-3}
    if args.linear:  # to the optimum: steps that see all the data, and shrink to nothing
        options |= {"num_epochs": 16 * epochs, "batch_size": len(x), "optimizer": falling}
        options["learning_rate"] = 1e-2 if name == "flow" else 5e-2  # its networks bear no more
    pairs = [build(name, x, latent, seed, args) for seed in seeds]
    label = f"{name}, {latent} latents, {len(seeds)} seed(s)"
    return pairs, fit_replicates(pairs, x, seeds=seeds, progress=label, **options)


def measure(model: VAE, guide: FamilyGuide, x: torch.Tensor, test: torch.Tensor, args):
    """One row of the tables."""
    found = evaluate(model, guide, test)
    row = {name: float(found[name].mean()) for name in ("rate", "distortion", "objective")}
    row["+-"] = float(found.log_likelihood.std(ddof=1)) / len(test) ** 0.5
    row |= {"log p(x)": float(found.log_likelihood.mean()), "active": float(found.active.sum())}
    used = guide if guide.family.channels else guide.heads  # without a channel: no encoder
    row |= found.attrs | {"parameters": sum(p.numel() for p in used.parameters())}
    if args.linear:
        found = evaluate(model, guide, x, num_samples=128)
        row |= {"fitted": float(found.objective.mean()), "fitted rate": float(found.rate.mean())}
        row |= {"exact": torch.nan, "exact rate": torch.nan}
        with suppress(ValueError):  # no closed form
            exact = learned_decoder(x, args.latent, guide.family)
            row |= {"exact": exact.objective, "exact rate": exact.rate}
        row["short by"] = row["exact"] - row["fitted"]
    return row


def apart(x: torch.Tensor, count: int) -> torch.Tensor:
    """Data that differ: one after the other the one that is farthest from those before."""
    chosen = [0]
    while len(chosen) < min(count, len(x)):
        chosen.append(int(torch.cdist(x, x[chosen]).amin(1).argmax()))
    return x[chosen]


def show(rows: dict[str, list[dict]], columns: tuple[str, ...], legend: str) -> None:
    """Prints one line per family."""
    head = f"{'family':18s} {'channels':22s} {'guide par.':>10s} "
    heads = ["ELBO" if column == "objective" else column for column in columns]
    print("\n" + head + " ".join(f"{h:>15s}" for h in heads) + "  two codes")
    for name, runs in rows.items():
        line = f"{name:18s} {runs[0]['channels']:22s} {runs[0]['parameters']:10d}"
        for column in columns:
            values = torch.tensor([row[column] for row in runs], dtype=torch.float64)
            digits = {"seconds": 1, "active": 0, "short by": 3}.get(column, 2)
            spread = f" ({values.std():.2f})" if len(runs) > 1 else ""
            text = "-" if values.isnan().any() else f"{values.mean():.{digits}f}{spread}"
            starred = column in ("rate", "objective", *EXACT) and not runs[0]["bound"]
            line += f" {text + ('*' if starred else ' '):>15s}"
        print(line + ("  differ" if runs[0]["stochastic"] else "  equal"))
    print("\n" + legend)


def main(argv: list[str] | None = None) -> None:
    args, x, test = parse(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    print(f"{args.data}: {len(x)} training and {len(test)} test data of length {x.shape[-1]}")
    rows, rebuilt, sampled, between = {}, {"data": test[:12].cpu()}, {}, {}
    few, codes, rates, courses, drawn = apart(test, 6), {}, {}, {}, {}
    for name in args.families:
        seeds = range(args.seed, args.seed + args.seeds)
        pairs, results = train(name, x, args.latent, args.epochs, seeds, args)
        rows[name] = [
            measure(*pair, x, test, args) | {"seconds": result.seconds}
            for pair, result in zip(pairs, results, strict=True)
        ]
        chains = [from_pyro_svi(*pair, test[:100], num_samples=200) for pair in pairs]
        to_netcdf(concat_chains(chains), args.out / f"{name}.nc")
        epochs = args.epochs // (8 if args.linear else 2) or 1
        (flat,), _ = train(name, x, 2, epochs, seeds[:1], args)
        if rows[name][-1]["bound"]:
            rates[name] = float(evaluate(*flat, test, num_samples=16).rate.mean())
        courses[name] = results[-1]
        with torch.no_grad():
            model, guide = pairs[-1]
            between[name] = (lambda z, model=model: model.mean(z).cpu(), *guide(few[:2])["z"])
            rebuilt[name] = model.mean(guide(test[:12])["z"]).cpu()
            sampled[name] = model.mean(model.draw_prior(12)).cpu()
            drawn[name] = two_sample(test.cpu(), generate(model, len(test), seed=args.seed).cpu())
            if name == "deterministic" and args.prior == "standard":  # what its latents lack
                model.prior = priors.Mixture.of(encode(model, guide, x).mean, 10).to(args.device)
                told = generate(model, len(test), seed=args.seed).cpu()
                drawn["  with a prior fitted to its codes"] = two_sample(test.cpu(), told)
                sampled["  prior fitted"] = model.mean(model.draw_prior(12)).cpu()
            codes[name] = torch.stack([flat[1](few)["z"] for _ in range(200)], 1).cpu()
    show(rows, COLUMNS, LEGEND)
    if args.linear:
        show(rows, EXACT, EXACT_LEGEND)
    print("\nHow well a classifier tells draws from test data: area under its ROC curve, 0.5 where")
    print("it cannot, 1 where it always can")
    for name, area in drawn.items():
        print(f"  {name:36s}{area}")
    square = round(x.shape[-1] ** 0.5) ** 2 == x.shape[-1]
    shown = {"images": few if square else None, "rates": rates}
    figures = {"encodings": plots.encodings(codes, **shown), "losses": plots.losses(courses)}
    points = {k: (r[-1]["rate"], r[-1]["distortion"]) for k, r in rows.items() if r[-1]["bound"]}
    if points:
        figures["rate_distortion"] = plots.rate_distortion(points)
    if square:
        figures["reconstructions"] = plots.images(rebuilt, title="Reconstructions")
        figures["samples"] = plots.images(sampled, title="Decoded draws from the prior")
        figures["interpolations"] = plots.interpolation(between, title="From one code to another")
    for name, figure in figures.items():
        figure.savefig(args.out / f"{name}.png", dpi=150)
    print(f"\nPictures and one ArviZ file per family are in {args.out}")


if __name__ == "__main__":
    main()
