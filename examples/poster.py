"""Poster: the ladder on a sheet of A3 (thirty seconds; writes a PDF and a PNG to results/poster).

Its numbers are those that `ladder.py` and `regression.py` printed (`examples/output`); the clouds
of codes are trained anew, in two dims.
    python examples/poster.py
"""

import argparse
import math
import re
from pathlib import Path

import ladder
import matplotlib
import numpy as np
import torch
from matplotlib.figure import Figure

from ppvae import families

HOME = Path(__file__).parent
WIDTH, HEIGHT = 11.69, 16.54  # inches: A3, upright
RUNG, BOTTOM = 0.955, 3.62  # height of a rung, and where the lowest begins
BLUE, ORANGE, INK, GREY = "#0072B2", "#E69F00", "#1A1A1A", "#5F5F5F"
COLORS = (BLUE, ORANGE, "#009E73", "#D55E00", "#CC79A7", "#56B4E9")  # Okabe and Ito (2008)
MARKS = "os^DvP"
RATE = {"fc": ORANGE, "ec": "#FFF3D6", "hatch": "///", "lw": 0}
FONTS = {"pdf.fonttype": 42, "font.family": "DejaVu Sans", "mathtext.fontset": "dejavusans"}

#: family -> expression; what it is in an autoencoder; in a regression; there, a row of its output
RUNGS = {
    "deterministic": ("Delta(v)", "an ordinary autoencoder", "a point: ridge, lasso", "ridge"),
    "zero": ("Delta(0)", "a decoder of nothing", "w = 0", "zero"),
    "noise_only": ("the prior itself", "nothing passes", "w as its prior has it", "noise_only"),
    "mean_only": ("Normal(loc, 1)", "a mean in noise of 1", "a width of 1 for all", "mean_only"),
    "mean_only_bounded": (
        "Normal(loc in (−1, 1), 1)",
        "a mean that is bounded",
        "the same, bounded",
        "",
    ),
    "shared_scale": ("Normal(loc, σ)", "one width for all data", "one width", "shared_scale"),
    "mean_scale": ("Normal(loc, scale)", "the usual VAE", "mean field", "mean_scale"),
    "student_t": ("StudentT(df, loc, scale)", "heavy tails", "a heavy-tailed mean field", ""),
    "low_rank": ("LowRankMultivariateNormal", "some correlations", "some correlations", ""),
    "full_rank": ("MultivariateNormal", "correlations", "the exact posterior", "full_rank"),
    "flow": ("a normalizing flow", "any shape", "any shape", ""),
}


def printed_ladder() -> dict[str, dict[str, str]]:
    """Family -> what `ladder.py` printed of it: channels and numbers, as they stand there."""
    found = {}
    for line in (HOME / "output" / "ladder.txt").read_text().splitlines():
        cells = re.split(r"\s{2,}", line.strip())
        if cells[0] in families.LADDER and len(cells) > 8:
            keys = ("rate", "distortion", "elbo", "log p(x)")
            found[cells[0]] = {"channels": cells[1], **dict(zip(keys, cells[3:7], strict=True))}
    return found


def printed_gaps() -> dict[str, str]:
    """Row of `regression.py` -> how many nats its ELBO is below the log evidence."""
    text = (HOME / "output" / "regression.txt").read_text()
    return dict(re.findall(r"^(\w+) +-\d+\.\d+ +(\d+\.\d+) ", text, re.M))


def number(text: str) -> float:
    return float(text.split()[0].rstrip("*"))


def capacity() -> float:
    """What a mean in [-1, 1] can say through noise of 1: two points are best (Smith, 1971)."""
    noise, weight = np.polynomial.hermite_e.hermegauss(100)
    return float(math.log(2) - weight @ np.log1p(np.exp(-2 - 2 * noise)) / weight.sum())


def clouds(epochs: int) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Six digits, and family -> many codes of each `(6, 120, 2)`."""
    args, train, test = ladder.parse([])
    few, codes = ladder.apart(test, 6), {}
    for name in RUNGS:
        ((_, guide),), _ = ladder.train(name, train, 2, epochs, range(1), args)
        with torch.no_grad():
            codes[name] = torch.stack([guide(few)["z"] for _ in range(120)], 1).numpy()
    return few.numpy(), codes


def panel(figure: Figure, x: float, y: float, width: float, height: float, *, bare: bool = True):
    """Axes at a place in inches, without a frame if bare."""
    place = (x / WIDTH, y / HEIGHT, width / WIDTH, height / HEIGHT)
    axes = figure.add_axes(place)
    if bare:
        axes.set(xticks=[], yticks=[])
    return axes


def head(write, figure: Figure, few: np.ndarray) -> None:
    """Title, what it is about, and the key of the clouds."""
    write(0.6, 15.55, "What may an encoder say?", 34, weight="bold")
    lines = (
        "An encoder is a guide, and a kind of encoder a guide family: a distribution, some",
        "arguments of which are channels that an encoder fills. One autoencoder, the same digits,",
        "networks and number of steps; only the family differs. Climb the ladder from below.",
    )
    for k, line in enumerate(lines):
        write(0.6, 15.12 - 0.25 * k, line, 12.5, color=GREY)
    for k, image in enumerate(few):
        axes = panel(figure, 8.42 + 0.45 * k, 15.58, 0.4, 0.4)
        tint = matplotlib.colors.LinearSegmentedColormap.from_list("", ["white", COLORS[k]])
        axes.imshow(image.reshape(8, 8), cmap=tint, vmin=0, vmax=1)
        axes.spines[:].set_color(COLORS[k])
        key = panel(figure, 8.42 + 0.45 * k, 15.38, 0.4, 0.18)
        key.axis("off")
        key.plot([0.5], [0.5], MARKS[k], color=COLORS[k], markersize=6)


def rungs(write, figure: Figure, codes: dict[str, np.ndarray]) -> None:
    """One strip for each family, the lowest first."""
    told, gaps, top = printed_ladder(), printed_gaps(), BOTTOM + RUNG * len(RUNGS)
    rails = panel(figure, 0.6, BOTTOM - 0.1, 0.8, RUNG * len(RUNGS) + 0.2)
    rails.set(xlim=(0, 0.8), ylim=(-0.1, RUNG * len(RUNGS) + 0.1))
    rails.axis("off")
    rails.plot([0.1, 0.1, np.nan, 0.7, 0.7], [-0.1, 20, np.nan, -0.1, 20], color=GREY, lw=7)
    bars = panel(figure, 5.55, BOTTOM, 3.35, RUNG * len(RUNGS), bare=False)
    bars.set(xlim=(0, 33.5), ylim=(0, RUNG * len(RUNGS)), yticks=[], xticks=range(0, 31, 5))
    label = "nats per test image; a bar is −ELBO: shorter is better (dotted: no bound)"
    bars.set_xlabel(label, fontsize=8.2, color=GREY)
    bars.tick_params(labelsize=9, colors=GREY)
    bars.grid(axis="x", color="#DDDDDD", lw=0.7)
    bars.set_axisbelow(True)
    bars.spines[["top", "left", "right"]].set_visible(False)
    heads = [(0.62, "channels"), (1.65, "family"), (4.2, "codes of six digits")]
    for x, text in [*heads, (9.05, "the same in a regression")]:
        write(x, top + 0.12, text, 10, color=GREY)
    write(5.55, top + 0.12, "■ distortion", 10, color=BLUE, weight="bold")
    write(6.72, top + 0.12, "■ rate", 10, color="#9A6A00", weight="bold")
    write(7.5, top + 0.12, "◆ −log p(x)", 10, weight="bold")
    for k, (name, (expression, auto, twin, row)) in enumerate(RUNGS.items()):
        y, has = BOTTOM + RUNG * k, told[name]
        rails.plot([0.1, 0.7], [RUNG * (k + 0.5)] * 2, color=GREY, lw=7)
        count = 0 if has["channels"] == "none" else has["channels"].count(",") + 1
        badge = {"boxstyle": "circle", "fc": "white", "ec": GREY}
        word, size = ("any", 9) if name == "flow" else (str(count), 12)
        how = {"ha": "center", "va": "center", "weight": "bold", "bbox": badge}
        rails.text(0.4, RUNG * (k + 0.5), word, fontsize=size, **how)
        write(1.65, y + 0.6, name, 14.5, weight="bold")
        write(1.65, y + 0.37, expression, 10, family="DejaVu Sans Mono")
        write(1.65, y + 0.15, auto, 10, color=GREY)
        axes = panel(figure, 4.3, y + 0.04, 0.88, 0.88)
        axes.set(xlim=(-5, 5), ylim=(-5, 5))
        axes.spines[:].set_color("#BBBBBB")
        for cloud, color, mark in zip(codes[name], COLORS, MARKS, strict=True):
            axes.plot(*cloud.T, mark, color=color, markersize=2.2, mew=0, alpha=0.55)
            axes.plot(*cloud.mean(0), mark, color=color, markersize=4.5, mec="white", mew=0.5)
        left, cost = number(has["distortion"]), number(has["rate"])
        point = has["rate"].endswith("*")
        high = RUNG * k + 0.56
        bars.barh(high, left, 0.34, color=BLUE)
        ends = {"fc": "white", "ec": GREY, "hatch": "...."} if point else RATE
        bars.barh(high, cost, 0.34, left=left, **ends)
        write(5.6, y + 0.16, f"■ {has['distortion']}", 8.6, color=BLUE)
        if point:
            write(6.72, y + 0.16, "a point: −log p(z) in place of a rate", 8.6, color=GREY)
        else:
            likely = has["log p(x)"]
            bars.plot(-number(likely), high, "D", color=INK, mec="white", markersize=8)
            write(6.72, y + 0.16, f"■ {has['rate']}", 8.6, color="#9A6A00")
            write(7.74, y + 0.16, f"◆ {likely.lstrip('-')}", 8.6)
        write(9.05, y + 0.56, twin, 11)
        if row in gaps:
            write(9.05, y + 0.3, f"{float(gaps[row]):,.2f} nats short of", 9, color=GREY)
            write(9.05, y + 0.13, "the log evidence", 9, color=GREY)
        elif point:
            write(9.05, y + 0.3, "no bound on the evidence", 9, color=GREY)


def steps() -> tuple[float, ...]:
    """What a mean, one width, a width per datum and a third channel add to log p(x), in nats."""
    rows = printed_ladder()
    told = {name: number(row["log p(x)"]) for name, row in rows.items() if "*" not in row["rate"]}
    climbed = [told[name] for name in ("noise_only", "mean_only", "shared_scale", "mean_scale")]
    third = max(told[name] for name in ("student_t", "low_rank", "full_rank", "flow"))
    added = [*np.diff(climbed), third - climbed[-1]]
    between_seeds = float(rows["mean_scale"]["log p(x)"].split("(")[1].rstrip(")"))
    assert added[0] > added[1] > added[2] > between_seeds > added[3]  # or the words are wrong
    return tuple(added)


def foot(write, figure: Figure) -> None:
    """Two formulas and what to take away."""
    mean, width, own, _ = steps()
    grid = np.linspace(1, 4, 200)
    write(0.6, 2.72, "$r - 1 - \\ln\\,r$", 24, weight="bold")
    for k, line in enumerate(
        ("nats per latent and datum: what a scale is", "worth beside the mean.")
    ):
        write(0.6, 2.42 - 0.19 * k, line, 9.5)
    axes = panel(figure, 0.95, 1.12, 2.6, 0.95, bare=False)
    axes.plot(grid, grid - 1 - np.log(grid), color=BLUE, lw=2.5)
    axes.plot(grid, grid**2 / 2 - 0.5 - np.log(grid), "--", color="#D55E00", lw=2)
    axes.set(xlim=(1, 4), ylim=(0, 3), xticks=range(1, 5), yticks=range(4))
    axes.set_xlabel("r", fontsize=8, labelpad=1)
    axes.set_ylabel("nats", fontsize=8)
    axes.tick_params(labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.text(3.0, 0.35, "mean alone", color=BLUE, fontsize=9)
    axes.text(1.2, 2.2, "noise alone:\n$r^2/2 - 1/2 - \\ln\\,r$", color="#B84A00", fontsize=9)
    write(
        0.6, 0.55, "r: sd of data over sd of noise, for a learned linear decoder.", 7.9, color=GREY
    )
    write(4.2, 2.72, f"{capacity():.4f}", 24, weight="bold")
    for k, line in enumerate(
        ("nats per latent: the most that a mean", "in (−1, 1) can say in noise of 1.")
    ):
        write(4.2, 2.42 - 0.19 * k, line, 9.5)
    axes = panel(figure, 4.2, 1.12, 2.9, 0.95, bare=False)
    wide = np.linspace(-4.5, 4.5, 300)
    for centre, color, line in [(-1, BLUE, "-"), (1, "#D55E00", "--")]:
        axes.plot(wide, np.exp(-((wide - centre) ** 2) / 2), line, color=color, lw=2.5)
        axes.text(1.9 * centre, 0.93, f"mean {centre:+d}".replace("-", "−"), color=color,
                  fontsize=9, ha="right" if centre < 0 else "left")  # fmt: skip
    axes.set(yticks=[], xticks=[-4, -2, 0, 2, 4], ylim=(0, 1.15))
    axes.set_xlabel("latent: mean and noise", fontsize=8, labelpad=1)
    axes.tick_params(labelsize=8)
    axes.spines[["top", "right", "left"]].set_visible(False)
    write(4.2, 0.55, "Two points are the best such code (Smith, 1971).", 7.9, color=GREY)
    write(7.75, 2.72, "One idea, two places", 17, weight="bold")
    lines = (
        "A channel that an encoder of the datum fills",
        "makes an autoencoder; one that a free para-",
        "meter fills, a regression. Nothing else differs.",
        "",
        f"In log p(x) of a digit, a mean is worth {mean:.1f} nats,",
        f"one width that fits {width:.1f} more, a width of its own",
        f"for each digit {own:.1f}, and a third channel nothing",
        "beyond what seeds differ by.",
    )
    for k, line in enumerate(lines):
        write(7.75, 2.42 - 0.2 * k, line, 9.5)
    images = re.search(r"(\d+) test data", (HOME / "output" / "ladder.txt").read_text())[1]
    rows = re.search(r"the (\d+) training", (HOME / "output" / "regression.txt").read_text())[1]
    lines = (
        f"Bars: 8 latents, {images} images, mean (sd) of 3 seeds. Clouds:",
        f"2 latents, one seed. Regression: {rows} rows, diabetes data.",
    )
    for k, line in enumerate(lines):
        write(7.75, 0.55 - 0.15 * k, line, 7.9, color=GREY)
    made = "ppvae: guide families for amortized inference in Pyro. Made by examples/poster.py"
    write(0.6, 0.25, made, 7.9, color=GREY)


def poster(few: np.ndarray, codes: dict[str, np.ndarray]) -> Figure:
    """The sheet."""
    figure = Figure(figsize=(WIDTH, HEIGHT), facecolor="white")

    def write(x: float, y: float, text: str, size: float, **how) -> None:
        figure.text(x / WIDTH, y / HEIGHT, text, **{"fontsize": size, "color": INK, **how})

    head(write, figure, few)
    rungs(write, figure, codes)
    foot(write, figure)
    return figure


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=30, help="of the clouds' training")
    parser.add_argument("--out", type=Path, default=Path("results/poster"), help="folder")
    args = parser.parse_args(argv)
    if args.epochs < 1:
        parser.error("--epochs: expected at least 1")
    args.out.mkdir(parents=True, exist_ok=True)
    few, codes = clouds(args.epochs)
    with matplotlib.rc_context(FONTS):
        sheet = poster(few, codes)
        told = {"Title": "The ladder of guide families", "Author": "ppvae"}
        sheet.savefig(args.out / "poster.pdf", metadata=told)
        sheet.savefig(args.out / "poster.png", dpi=150)
    print(f"The poster is in {args.out}, for A3")


if __name__ == "__main__":
    main()
