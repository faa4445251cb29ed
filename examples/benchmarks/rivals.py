"""Other libraries, with the same networks and the same start."""

from time import perf_counter
from typing import Any

from torch import Tensor, nn

from benchmarks.loops import Run, own_loop
from benchmarks.networks import BATCH, RATE, HandWritten, networks


def numpyro_row(size: str, x: Tensor, *, scanned: bool) -> Run:
    """NumPyro with the same networks: a jitted update, or all steps as one program."""
    import jax
    import numpyro
    from numpyro import distributions as dist

    device = jax.devices("gpu" if x.is_cuda else "cpu")[0]
    start: dict[str, list] = {}
    for part, module in HandWritten(*networks(size, "cpu")).named_children():
        linear = [layer for layer in module.modules() if isinstance(layer, nn.Linear)]
        start[part] = [tuple(p.detach().numpy().T for p in layer.parameters()) for layer in linear]
    start = jax.device_put(start, device)
    data = jax.device_put(x.cpu().numpy(), device)

    def through(name: str, value: Any, *, bent: bool = False) -> Any:
        *layers, (weight, bias) = numpyro.param(name, start[name])
        for w, b in layers:
            value = jax.nn.relu(value @ w + b)
        value = value @ weight + bias
        return jax.nn.relu(value) if bent else value

    def model(batch: Any) -> None:
        with numpyro.plate("data", len(batch)):
            zeros = jax.numpy.zeros(int(size.split("-")[-1]))
            z = numpyro.sample("z", dist.Normal(zeros, 1).to_event(1))
            fn = dist.Bernoulli(logits=through("decoder", z)).to_event(1)
            numpyro.sample("x", fn, obs=batch)

    def guide(batch: Any) -> None:
        features = through("encoder", batch, bent=True)
        loc, scale = through("loc", features), jax.numpy.exp(through("log_scale", features))
        with numpyro.plate("data", len(batch)):
            numpyro.sample("z", dist.Normal(loc, scale).to_event(1))

    loss = numpyro.infer.TraceMeanField_ELBO()
    svi = numpyro.infer.SVI(model, guide, numpyro.optim.Adam(RATE), loss)
    state = svi.init(jax.random.PRNGKey(0), data[:BATCH])

    def update(state: Any, rows: Any) -> Any:
        return svi.update(state, data[rows])

    go = jax.jit((lambda state, order: jax.lax.scan(update, state, order)) if scanned else update)

    def run(order: Tensor) -> float:
        nonlocal state
        rows = jax.device_put(order.cpu().numpy(), device)
        parts, begin = [rows] if scanned else list(rows), perf_counter()
        for some in parts:
            state, losses = go(state, some)
            losses.block_until_ready()
        return perf_counter() - begin

    return run


def pythae_row(size: str, x: Tensor) -> Run:
    """The module of pythae with the same networks, in the loop of the hand-written one."""
    from pythae.models import VAE as Pythae
    from pythae.models import VAEConfig
    from pythae.models.base.base_utils import ModelOutput
    from pythae.models.nn import BaseDecoder, BaseEncoder

    hand = HandWritten(*networks(size, x.device.type))

    class Encoder(BaseEncoder):
        def forward(self, x: Tensor) -> Any:
            h = hand.encoder(x)
            return ModelOutput(embedding=hand.loc(h), log_covariance=2 * hand.log_scale(h))

    class Decoder(BaseDecoder):
        def forward(self, z: Tensor) -> Any:
            return ModelOutput(reconstruction=hand.decoder(z).sigmoid())

    shape, latent = tuple(x.shape[1:]), int(size.split("-")[-1])
    config = VAEConfig(input_dim=shape, latent_dim=latent, reconstruction_loss="bce")
    other = Pythae(config, Encoder(), Decoder())
    return own_loop(hand, x, loss=lambda batch: other({"data": batch}).loss)
