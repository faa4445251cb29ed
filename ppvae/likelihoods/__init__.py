"""Likelihoods: modules that turn what a decoder puts out into a distribution over the data.

A likelihood takes the decoder's output, of shape `(*, *event)` with any number of leading
dimensions, and returns a Pyro distribution over the elements of a datum, of that batch shape; `VAE`
declares which of them are the event. Parameters of the module are learned with the decoder. Some
take several numbers for each column of the data: `likelihood.size(columns)` is what the decoder has
to put out, all first numbers, then all second ones.

Each can be made from the data, as `likelihoods.Normal.of(x)`: it then starts where a model of no
latents would end, so that a decoder that puts out zeros gives each column its own location and
scale. Columns that are not alike go together by `Mixed`.

**To add a likelihood**, write a module as that, best a `Likelihood` (`base.py`), and a row in
`tests/cases.py`.
"""

from ppvae.likelihoods.base import Likelihood
from ppvae.likelihoods.bernoulli import Bernoulli
from ppvae.likelihoods.beta import Beta
from ppvae.likelihoods.categorical import Categorical
from ppvae.likelihoods.continuous_bernoulli import ContinuousBernoulli
from ppvae.likelihoods.laplace import Laplace
from ppvae.likelihoods.log_normal import LogNormal
from ppvae.likelihoods.mixed import Mixed
from ppvae.likelihoods.negative_binomial import NegativeBinomial
from ppvae.likelihoods.normal import Normal
from ppvae.likelihoods.ordinal import Ordinal
from ppvae.likelihoods.poisson import Poisson
from ppvae.likelihoods.student_t import StudentT
from ppvae.likelihoods.zero_inflated import ZeroInflated

__all__ = [
    "Bernoulli",
    "Beta",
    "Categorical",
    "ContinuousBernoulli",
    "Laplace",
    "Likelihood",
    "LogNormal",
    "Mixed",
    "NegativeBinomial",
    "Normal",
    "Ordinal",
    "Poisson",
    "StudentT",
    "ZeroInflated",
]
