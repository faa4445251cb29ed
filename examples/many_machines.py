"""Many processes: one fit, one exact regression (half a minute; writes results/many_machines).

One program for a laptop and for a cluster: `fit` finds the process group, takes its share of every
minibatch, and comes to the same result with any number of processes.

    python examples/many_machines.py
    torchrun --standalone --nproc_per_node 2 examples/many_machines.py
    torchrun --nnodes 4 --nproc_per_node 8 --rdzv_backend c10d --rdzv_endpoint HOST:29400 \
        examples/many_machines.py

With `--resume` it writes a checkpoint, and goes on from it with the processes that are there then.
"""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from ppvae import VAE, FamilyGuide, data, evaluate, families, fit, likelihoods
from ppvae.nn import mlp
from ppvae.objectives import IWAE
from ppvae.regression import combine, exact_posterior, factorize


def train(args: argparse.Namespace, device: str, checkpoint: Path | None) -> None:
    """Trains an autoencoder of digits as in one process; the first one tells what came of it."""
    torch.manual_seed(args.seed)
    # doubles, to see that all processes come to the same
    where: dict[str, Any] = {"device": device, "dtype": torch.float64}
    images, held_out = (part.to(**where) for part in data.split(data.load("digits")))
    model = VAE(mlp(8, args.hidden, args.hidden, out=64), 8, likelihoods.Bernoulli()).to(**where)
    encoder = mlp(64, args.hidden, args.hidden).to(**where)
    guide = FamilyGuide(model, families.mean_scale, encoder).to(**where)

    began = time.perf_counter()
    result = fit(
        model,
        guide,
        images,
        num_epochs=args.epochs,
        batch_size=256,
        objective=IWAE(8),
        seed=args.seed,
        checkpoint=checkpoint,
        progress="digits",
    )
    seconds = time.perf_counter() - began
    if is_first():
        found = evaluate(model, guide, held_out, num_samples=128, progress=False)
        log_p = float(found.log_likelihood.mean())
        print(f"{'loss of the last epoch':25s} {result.losses[-1]:14.6f} nats per image")
        print(f"{'log p(x) of new images':25s} {log_p:14.6f} nats per image")
        print(f"{'an epoch takes':25s} {seconds / args.epochs:14.2f} s")


def regress(args: argparse.Namespace) -> None:
    """The exact posterior of rows of which each process has its own, which stay where they are."""
    rank, count = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    generator = torch.Generator().manual_seed(args.seed)
    X = torch.randn(args.rows, 10, generator=generator, dtype=torch.float64)
    y = X.sum(1) + torch.randn(args.rows, generator=generator, dtype=torch.float64)

    factors: list[Any] = [factorize(X[rank::count], y[rank::count])]
    if dist.is_initialized():  # a triangle of 11 x 11 numbers is all that is sent
        own, factors = factors[0], [None] * count
        dist.all_gather_object(factors, own)
    posterior = exact_posterior(combine(factors), noise=1.0)
    if is_first():
        print(f"{'log evidence of all rows':25s} {posterior.log_evidence:14.6f} nats")


def is_first() -> bool:
    """Whether this is the process that tells."""
    return not dist.is_initialized() or dist.get_rank() == 0


def main() -> None:
    """Runs the example."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--rows", type=int, default=200_000, help="of the regression")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--resume", action="store_true", help="write, and go on from, a checkpoint")
    parser.add_argument("--out", type=Path, default=Path("results/many_machines"))
    args = parser.parse_args()

    device = "cpu"
    if "RANK" in os.environ:  # started by torchrun
        dist.init_process_group()
        device = f"cuda:{os.environ['LOCAL_RANK']}" if torch.cuda.is_available() else "cpu"
    if is_first():
        print("processes:", dist.get_world_size() if dist.is_initialized() else 1)
    checkpoint = None
    if args.resume:
        args.out.mkdir(parents=True, exist_ok=True)
        checkpoint = args.out / "digits.pt"
    train(args, device, checkpoint)
    regress(args)
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
