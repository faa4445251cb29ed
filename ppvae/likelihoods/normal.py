"""The likelihood of real data."""

import pyro.distributions as dist
from torch import Tensor

from ppvae.likelihoods.scale import Scaled


class Normal(Scaled):
    """The likelihood of real data; the decoder's output is the means, the scale that of all data.

    `Normal(0.1)` has a fixed scale, `Normal(1.0, learned=True)` one learned scale that starts at 1,
    `Normal(torch.ones(64), learned=True)` a learned scale per feature, and `Normal(per_datum=True)`
    takes its logarithm from the decoder, whose outputs are the means and then these.
    `Normal.of(x, learned=True)` starts at the mean and standard deviation of each column.

    Args:
        scale: standard deviation, a positive number, or a tensor that broadcasts to one event.
        learned: whether training moves it.
        per_datum: whether the decoder puts out its logarithm, less that of `scale`.

    Raises:
        TypeError: `scale` is no number, or `learned` or `per_datum` no bool.
        ValueError: `scale` is not positive and finite; in `load_state_dict`, the state is that of
            another fixed scale.
    """

    def forward(self, output: Tensor) -> dist.Distribution:
        """One Normal distribution per element."""
        return dist.Normal(*self.location_and_scale(output))
