"""Small models with their guides and data, for tests of training and staging; and objectives."""

import sys
import warnings
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from cases import FAMILIES, world
from torch import nn

from ppvae import VAE, FamilyGuide, evaluate, families, likelihoods
from ppvae.families import GuideFamily
from ppvae.nn import mlp
from ppvae.objectives import ELBO, IWAE, Objective, at_step, negative_elbo, warm_up
from ppvae.regression import ExactPosterior
from ppvae.staging.staged import Staged

KINDS: dict[str, Any] = {**FAMILIES, "flow": families.Flow(layers=0, hidden=4, bins=3)}


def build(family="mean_scale", likelihood=None, encoder=None, **options):
    """An autoencoder of three numbers with two latents."""
    model = VAE(mlp(2, 4, out=3), 2, likelihood or likelihoods.Normal(0.5), **options)
    return model, FamilyGuide(model, KINDS[family], encoder=encoder or mlp(3, 4))


def linear(family="mean_scale"):
    """The same without hidden layers, for graphs that are soon made."""
    model = VAE(nn.Linear(2, 3), 2, likelihoods.Normal(0.5))
    return model, FamilyGuide(model, KINDS[family], encoder=nn.Identity())


def made(build_one=build, count=1):
    """Pairs from seeds of their own."""
    built = []
    for seed in range(count):
        torch.manual_seed(seed)
        built.append(build_one())
    return built


def data(rows=10, dtype=None):
    return torch.randn(rows, 3, generator=torch.Generator().manual_seed(5), dtype=dtype)


def latents_and_data(x, shift=0.0):
    """Two latents and one number per datum, as a plain function."""
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z.sum(-1) + shift, 0.5), obs=x[:, 0])


def branch(x):
    """What no graph can hold: a decision on the values of tensors."""
    latents_and_data(x, 1.0 if x.sum() > 0 else -1.0)


def function(model=latents_and_data):
    return model, FamilyGuide(model, families.mean_scale, encoder=mlp(3, 4))


def written(decoder=None, encoder=None, scale=0.5):
    """A model and a guide as one writes them by hand, and their modules."""
    decoder, encoder = decoder or nn.Linear(2, 3), encoder or nn.Linear(3, 4)

    def model(x):
        pyro.module("decoder", decoder)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(decoder(z), scale).to_event(1), obs=x)

    def guide(x):
        pyro.module("encoder", encoder)
        loc, raw = encoder(x).chunk(2, -1)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(loc, raw.exp()).to_event(1))

    return model, guide, decoder, encoder


class NanSlope(nn.Module):
    """Finite values, and a gradient that is not, while `weight` is zero: sqrt at zero."""

    def __init__(self, value=1.0):
        super().__init__()
        self.weight = nn.Parameter(torch.full((3, 4), value))

    def forward(self, x):
        return torch.sqrt((x @ self.weight) ** 2)


class Normed(nn.Sequential):
    """Running statistics and dropout."""

    def __init__(self, inputs=3, out=4, *, dropout=True):
        # a bias before the norm has a gradient of rounding only, which Adam would scale up
        layers = [nn.Linear(inputs, 4, bias=False), nn.BatchNorm1d(4), nn.Tanh()]
        layers += [nn.Dropout(0.3)] if dropout else []
        super().__init__(*layers, nn.Linear(4, out))


def values(*programs):
    """All parameters and buffers, copied."""
    modules = [program for program in programs if isinstance(program, nn.Module)]
    held = [v for module in modules for v in (*module.parameters(), *module.buffers())]
    return [value.detach().clone() for value in held]


def same(some, others, bound=0.0):
    assert len(some) == len(others)
    return all(
        a.shape == b.shape and (a.double() - b.double()).abs().max() <= bound
        for a, b in zip(some, others, strict=True)
    )


@contextmanager
def traceless(*programs, moved=True):
    """Fails if the inside changes the process, the modes of modules, or if told so a value."""
    modules = [m for m in programs if isinstance(m, nn.Module)]
    modes = {part: part.training for module in modules for part in module.modules()}
    before, outside = values(*modules), world()
    tensors = [v for module in modules for v in (*module.parameters(), *module.buffers())]
    yield
    assert world() == outside
    assert all(part.training == mode for part, mode in modes.items())
    assert moved or same([v.detach() for v in tensors], before)


@contextmanager
def one_warning(start):
    """Fails unless there is one warning, of one line that starts so, at the line of the caller."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield
    (line,) = [str(warning.message) for warning in caught]
    assert line.startswith(start) and "\n" not in line and len(line) < 300
    assert caught[0].filename == sys._getframe(2).f_code.co_filename


# ---------------------------------------------------------------------------------- objectives


@dataclass(frozen=True)
class Weighted:
    """An objective of a user's, which derives from nothing."""

    weight: Any = 1.0
    scheduled = ("weight",)

    def __call__(self, model, guide, *args, size=None, plate=None, step=0):
        loss = negative_elbo(model, guide, *args, size=size, plate=plate)
        return at_step(self, step).weight * loss


@dataclass(frozen=True)
class Distortion(Objective):
    """An objective of a user's, which writes a loss of draws."""

    weight: Any = 1.0
    scheduled = ("weight",)

    def loss(self, draw, size):
        return self.weight * draw(2)[0].terms.distortion.mean()


def stepped(model, guide, *args, size=None, step=0):
    """A plain function."""
    return negative_elbo(model, guide, *args, size=size) * (1 + step)


#: name -> objectives that may be trained side by side, each of which is staged too
OBJECTIVES: dict[str, tuple[Any, ...]] = {
    "beta": (ELBO(), ELBO(beta=2.0), ELBO(beta=0.0), ELBO(beta=warm_up(4, 0.5, 2.0))),
    "free bits": (ELBO(free_bits=0.5), ELBO(free_bits=warm_up(3))),
    "sampled": (ELBO(kl="sampled"), ELBO(kl="sampled", free_bits=0.1)),
    "all": (ELBO(0.5, 0.2, "sampled", 2), ELBO(warm_up(5), 0.1, "sampled", 2)),
    "IWAE": (IWAE(4), IWAE(4)),
    "user's": (Weighted(2.0), Weighted(warm_up(4, start=0.5))),
    "user's loss": (Distortion(2.0), Distortion(warm_up(4, start=0.5))),
    "function": (stepped, stepped),
}


def told(thing):
    """What a thing of the library says when it is used, whichever of its kinds it is."""
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)  # another process has its own
    if type(thing) is tuple:
        model, guide = thing
        assert guide.model is model
        measured = evaluate(model, guide, data(), num_samples=32, progress=False)
        return measured.objective.values.tolist(), measured.attrs
    if isinstance(thing, Staged):
        assert thing.program.guide.model is thing.program.model and thing.covers(data())
        return thing(data()).item()
    if isinstance(thing, ExactPosterior):
        return thing.quantile(0.3).tolist(), thing.loo().total
    return (thing.name, hash(thing)) if isinstance(thing, GuideFamily) else repr(thing)


def slowing(epochs, first, last):
    """Adam with one step per epoch, whose rate falls from first to last: it comes to rest."""

    class Slowing(torch.optim.Adam):
        def step(self, closure=None):
            for group in self.param_groups:
                group["lr"] *= (last / first) ** (1 / epochs)
            return super().step(closure)

    return {"num_epochs": epochs, "learning_rate": first, "optimizer": Slowing}
