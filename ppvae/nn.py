"""Small networks for encoders and decoders: plain PyTorch, no Pyro."""

from collections.abc import Callable

from torch import nn

from ppvae._checks import expect

__all__ = ["conv_decoder", "conv_encoder", "mlp"]


def mlp(
    inputs: int, *hidden: int, out: int | None = None, activation: Callable[[], nn.Module] = nn.ReLU
) -> nn.Sequential:
    """Linear layers of the given widths, each followed by the activation.

    Args:
        inputs: length of the input.
        *hidden: widths of the hidden layers.
        out: width of a last linear layer without activation; None for no such layer.
        activation: makes the activation.

    Returns:
        A module `(*, inputs) -> (*, out)`, or `(*, hidden[-1])` without `out`.

    Raises:
        ValueError: a width is below 1, or there is no layer.

    Example:
        >>> mlp(64, 256, out=8)
        Sequential(
          (0): Linear(in_features=64, out_features=256, bias=True)
          (1): ReLU()
          (2): Linear(in_features=256, out_features=8, bias=True)
        )
    """
    widths = [inputs, *hidden, *([] if out is None else [out])]
    whole = len(widths) > 1 and min(widths) > 0
    expect(whole, "inputs, hidden, out", "two or more widths above 0", widths)
    layers: list[nn.Module] = []
    for before, after in zip([inputs, *hidden], hidden, strict=False):
        layers += [nn.Linear(before, after), activation()]
    if out is not None:
        layers.append(nn.Linear(widths[-2], out))
    return nn.Sequential(*layers)


def conv_encoder(shape: tuple[int, int, int], *channels: int) -> nn.Sequential:
    """Convolutions that halve the image, each followed by a ReLU, and a flattening.

    Args:
        shape: channels, height and width of the image; the last two divisible by
            `2 ** len(channels)`.
        *channels: output channels of the convolutions.

    Returns:
        A module `(batch, *shape) -> (batch, features)`.

    Raises:
        ValueError: the image cannot be halved that often.
    """
    _check_halving(shape, channels)
    layers: list[nn.Module] = []
    for before, after in zip([shape[0], *channels], channels, strict=False):
        layers += [nn.Conv2d(before, after, 4, stride=2, padding=1), nn.ReLU()]
    return nn.Sequential(*layers, nn.Flatten())


def conv_decoder(latent: int, shape: tuple[int, int, int], *channels: int) -> nn.Sequential:
    """The mirror image of `conv_encoder`: a linear layer, then convolutions that double the image.

    Args:
        latent: length of the latent.
        shape: channels, height and width of the image.
        *channels: the channels as given to `conv_encoder`; used from last to first.

    Returns:
        A module `(batch, latent) -> (batch, *shape)`.

    Raises:
        ValueError: the image cannot be halved that often.
    """
    _check_halving(shape, channels)
    height, width = (side // 2 ** len(channels) for side in shape[1:])
    small = (channels[-1], height, width)
    layers: list[nn.Module] = [nn.Linear(latent, channels[-1] * height * width), nn.ReLU()]
    layers.append(nn.Unflatten(1, small))
    path = [*reversed(channels), shape[0]]
    for before, after in zip(path, path[1:], strict=False):
        layers += [nn.ConvTranspose2d(before, after, 4, stride=2, padding=1), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def _check_halving(shape: tuple[int, int, int], channels: tuple[int, ...]) -> None:
    factor = 2 ** len(channels)
    fits = channels and len(shape) == 3 and not (shape[1] % factor or shape[2] % factor)
    sides = f"(channels, height, width) with sides divisible by {factor}"
    expected = f"{sides}, for {len(channels)} convolutions (at least 1)"
    expect(fits, "shape", expected, tuple(shape))
