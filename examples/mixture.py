"""Discrete latents summed out: a mixture, and topics (forty seconds; writes results/mixture).

First a Gaussian mixture of irises, by maximum likelihood, beside scikit-learn's EM algorithm. Then
topics in documents (latent Dirichlet allocation; Blei, Ng and Jordan, 2003) whose true topics are
known, the bars of Griffiths and Steyvers (Finding scientific topics, 2004): a word is a cell of a
grid of 4 x 4, a topic one of its rows or columns. The shares of the topics in a document come from
an encoder, the topics themselves are global latents, and the topic of each word is summed out.

    python examples/mixture.py
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from matplotlib.patches import Ellipse
from pyro.ops.indexing import Vindex
from scipy.optimize import linear_sum_assignment
from sklearn.datasets import load_iris
from sklearn.mixture import GaussianMixture as ScikitLearn
from torch import Tensor, nn

from ppvae import FamilyGuide, _look, evaluate, fit
from ppvae.models import GaussianMixture
from ppvae.nn import mlp

SIDE, TOPICS, WORDS = 4, 8, 50
QUIET = {"progress": False}


def matched(found: np.ndarray, truth: np.ndarray) -> tuple[np.ndarray, float]:
    """The true class of each of three found ones, such that most agree, and which share does."""
    table = np.array([[(truth[found == i] == j).sum() for j in range(3)] for i in range(3)])
    _, columns = linear_sum_assignment(-table)
    return columns, (columns[found] == truth).mean()


def irises(args: argparse.Namespace) -> None:
    """A mixture of three components; the best of some starts."""
    iris = load_iris()
    x = torch.tensor(iris.data).float()
    print(f"{len(x)} irises of three species: nats per flower\n")
    print(f"{'':12s}{'log p(x)':>10s}{'scikit-learn':>14s}{'species right':>15s}{'by theirs':>12s}")
    for covariance in ("diag", "full"):
        tried = []
        for seed in range(args.starts):
            model = GaussianMixture.of(x, 3, covariance, seed=seed)
            guide = FamilyGuide(model, "mean_scale")  # it draws nothing: there is nothing to draw
            for rate in (0.05, 0.005):
                fit(model, guide, x, num_epochs=args.epochs, learning_rate=rate, **QUIET)
            tried.append((evaluate(model, guide, x, num_samples=2, **QUIET), model))
        found, model = max(tried, key=lambda pair: float(pair[0].total_elbo))
        shares = found.part_responsibility.values
        own = matched(shares.argmax(1), iris.target)[1]
        theirs = ScikitLearn(3, covariance_type=covariance, n_init=args.starts, random_state=0)
        their = matched(theirs.fit_predict(iris.data), iris.target)[1]
        print(
            f"{covariance:12s}{found.log_likelihood.values.mean():10.3f}"
            f"{theirs.score(iris.data):14.3f}{own:15.1%}{their:12.1%}"
        )
    order = matched(shares.argmax(1), iris.target)[0]
    figure = _look.empty(5.2, 4)
    axes = figure.subplots()
    for part in range(3):
        tril = (model.scales[part][:, None] * model.correlations[part]).detach()
        covariance = (tril @ tril.T)[2:, 2:]
        values, vectors = torch.linalg.eigh(covariance)
        angle = np.degrees(np.arctan2(vectors[1, 1].item(), vectors[0, 1].item()))
        height, width = (4 * values.sqrt()).tolist()  # two sds to each side
        middle, paint = model.means[part, 2:].tolist(), _look.color(order[part])
        axes.add_patch(Ellipse(middle, width, height, angle=angle, color=paint, alpha=0.15))
        rows = iris.target == order[part]
        axes.scatter(
            *iris.data[rows, 2:].T, s=14 + 40 * (1 - shares[rows, part]), color=paint,
            marker=_look.mark(part)["marker"], label=iris.target_names[order[part]],
        )  # fmt: skip
    axes.set(xlabel="petal length [cm]", ylabel="petal width [cm]")
    axes.legend(
        frameon=False, title="species; ellipses of 2 sds; larger: less sure", loc="upper left"
    )
    figure.savefig(args.out / "irises.png", dpi=120)


class Topics(nn.Module):
    """Documents `(batch, words)` of words that are drawn from a topic each."""

    vectorized = True

    def forward(self, words: Tensor) -> None:
        """Topics, their shares in each document, and for each word a topic and itself."""
        with pyro.plate("topics", TOPICS, dim=-1):
            topic = pyro.sample("topic", dist.Dirichlet(torch.ones(SIDE**2)))
        with pyro.plate("data", len(words), dim=-2):
            share = pyro.sample("share", dist.Dirichlet(torch.ones(TOPICS)))
            with pyro.plate("words", words.shape[1], dim=-1):
                part = pyro.sample("part", dist.Categorical(share))
                chances = Vindex(topic.unsqueeze(-3))[..., part, :]
                pyro.sample("word", dist.Categorical(chances), obs=words)


class Counts(nn.Module):
    """An encoder of how often each word is in a document."""

    def __init__(self) -> None:
        super().__init__()
        self.net = mlp(SIDE**2, 128)

    def forward(self, words: Tensor) -> Tensor:
        """Words `(batch, words)` -> features."""
        return self.net(nn.functional.one_hot(words.long(), SIDE**2).sum(-2) / 5.0)


def documents(number: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Words, the topic of each, and the true topics; shares are sparser than the model supposes."""
    rng = np.random.default_rng(seed)
    bars = np.zeros((TOPICS, SIDE, SIDE))
    for i in range(SIDE):
        bars[i, i], bars[SIDE + i, :, i] = 1 / SIDE, 1 / SIDE
    bars = bars.reshape(TOPICS, -1)
    share = rng.dirichlet(np.full(TOPICS, 0.3), number)
    part = np.array([rng.choice(TOPICS, WORDS, p=p) for p in share])
    words = np.array([[rng.choice(SIDE**2, p=bars[k]) for k in row] for row in part])
    return torch.tensor(words), torch.tensor(part), torch.tensor(bars)


def topics(args: argparse.Namespace) -> None:
    """Topics by an encoder and global latents, held against the true ones."""
    words, _, _ = documents(args.documents, args.seed)
    test, part, bars = documents(100, args.seed + 1)
    print(f"\n{len(words)} documents of {WORDS} words from {TOPICS} topics: nats per word\n")
    print(f"{'':12s}{'bound':>10s}{'log p':>10s}{'right topic':>14s}{'topics off by':>18s}")
    tried = []
    for start in range(args.topic_starts):
        torch.manual_seed(args.seed + start)
        model, families = Topics(), {"share": "mean_scale", "topic": "mean_scale"}
        guide = FamilyGuide(model, families, {"share": Counts()}).setup(words[:50])
        with torch.no_grad():  # topics that start alike would stay so
            loc = guide.heads["topic"].loc.raw
            loc += 0.3 * torch.randn_like(loc)
        for rate, epochs in ((0.03, args.topic_epochs), (0.003, args.topic_epochs // 3)):
            fit(
                model, guide, words, num_epochs=epochs, batch_size=100, learning_rate=rate,
                seed=args.seed, progress=f"start {start}",
            )  # fmt: skip
        found = evaluate(model, guide, test, num_samples=64, **QUIET)
        draws = torch.stack([guide(words[:1])["topic"].detach() for _ in range(200)])
        mean = draws.mean(0).reshape(TOPICS, -1).numpy()
        distance = 0.5 * abs(mean[:, None] - bars.numpy()).sum(-1)
        columns = linear_sum_assignment(distance)[1]
        away = distance[np.arange(TOPICS), columns]
        told = columns[found.part_responsibility.values.argmax(-1)]
        numbers = found.elbo.values.mean() / WORDS, found.log_likelihood.values.mean() / WORDS
        print(
            f"start {start:<6d}{numbers[0]:10.3f}{numbers[1]:10.3f}"
            f"{(told == part.numpy()).mean():14.1%}{f'{away.min():.2f} to {away.max():.2f}':>18s}"
        )
        tried.append((numbers[0], mean[np.argsort(columns)]))
    best = max(tried, key=lambda pair: pair[0])[1]
    print(
        "\nOf 100 documents not trained on. right topic: of a word, by its probabilities; off by:"
    )
    print("total variation, from 0 to 1, of each topic from the true one that it is matched to.")
    figure = _look.empty(1.1 * TOPICS, 2.6)
    panels = figure.subplots(2, TOPICS)
    for column in range(TOPICS):
        for row, (name, table) in enumerate({"true": bars.numpy(), "found": best}.items()):
            axes = panels[row, column]
            axes.imshow(table[column].reshape(SIDE, SIDE), cmap="Blues", vmin=0, vmax=1 / SIDE)
            axes.set(xticks=[], yticks=[], ylabel="" if column else name)
    figure.suptitle(f"Chance of each of {SIDE**2} words in a topic; dark: {1 / SIDE} or more")
    figure.savefig(args.out / "topics.png", dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=300)
    parser.add_argument("--starts", type=int, default=5, help="of each mixture")
    parser.add_argument("--topic-epochs", type=int, default=30)
    parser.add_argument("--topic-starts", type=int, default=2)
    parser.add_argument("--documents", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("results/mixture"))
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    irises(args)
    topics(args)
    print(f"\nPictures are in {args.out}")


if __name__ == "__main__":
    main()
