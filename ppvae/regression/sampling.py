"""Independent draws of a posterior."""

import numpy as np

from ppvae.regression.hyper import HyperPosterior, Problem
from ppvae.regression.priors import Array, Seed


def draw(
    problem: Problem, hyper: HyperPosterior, size: int, generator: np.random.Generator
) -> dict[str, Array]:
    """Independent draws by name: `weight` (with the intercept), `noise` and `scale`.

    These two also where they are known. Shapes `(size, columns)` and `(size,)`.
    """
    gaussian, logs = problem.gaussian, hyper.sample(size, generator)
    means, variances = gaussian.coordinates(logs["noise"], logs["scale"])
    inner = means + np.sqrt(variances) * generator.standard_normal(means.shape)
    weight = gaussian.loc + inner @ gaussian.basis.T
    if not gaussian.whole:
        normals = generator.standard_normal((size, len(gaussian.prior.loc)))
        sds = np.exp(gaussian.log_prior(logs["noise"], logs["scale"]))
        weight = weight + sds[:, None] * gaussian.unseen_draws(normals)
    return {"weight": weight, **{name: np.exp(values) for name, values in logs.items()}}


def generator_of(seed: Seed) -> np.random.Generator:
    """A generator of random numbers, of a seed or as it is given.

    Raises:
        TypeError, ValueError: it is neither.
    """
    try:
        return np.random.default_rng(seed)
    except (TypeError, ValueError) as error:
        wanted = "a whole number of at least 0, or a NumPy generator"
        raise type(error)(f"seed: expected {wanted}, got {seed!r}") from error
