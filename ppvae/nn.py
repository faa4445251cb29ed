"""Small networks for encoders and decoders, and layers for raw data: plain PyTorch, no Pyro.

Data of any scale go through a first layer that knows it, and come back by its inverse:

    standardize = Standardize.of(x)                          # or Log1p(), for counts
    encoder = nn.Sequential(standardize, mlp(5, 64))
    decoder = nn.Sequential(mlp(2, 64, out=5), standardize.inverse)
    model = VAE(decoder, latent=2, likelihood=likelihoods.Normal(0.1 * standardize.scale))

What they know is saved with the weights, so that new data are treated as the first ones were.
"""

from collections.abc import Callable, Mapping
from functools import reduce
from typing import Any, Self

import torch
from torch import Tensor, nn

from ppvae._checks import check_count, check_flag, check_mapping, check_real, expect
from ppvae.data.adapters import real_numbers

__all__ = [
    "Affine",
    "Expm1",
    "FillMissing",
    "Log1p",
    "Pool",
    "Standardize",
    "conv_decoder",
    "conv_encoder",
    "mlp",
]


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
    inputs, out = check_count("inputs", inputs), None if out is None else check_count("out", out)
    hidden = tuple(check_count("hidden", width) for width in hidden)
    widths = [inputs, *hidden, *([] if out is None else [out])]
    expect(len(widths) > 1, "hidden, out", "at least one layer", "none")
    kind = type(activation).__name__
    expect(callable(activation), "activation", "a class or function", kind, TypeError)
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
    shape, channels = _checked(shape, channels)
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
    latent = check_count("latent", latent)
    shape, channels = _checked(shape, channels)
    height, width = (side // 2 ** len(channels) for side in shape[1:])
    small = (channels[-1], height, width)
    layers: list[nn.Module] = [nn.Linear(latent, channels[-1] * height * width), nn.ReLU()]
    layers.append(nn.Unflatten(1, small))
    path = [*reversed(channels), shape[0]]
    for before, after in zip(path, path[1:], strict=False):
        layers += [nn.ConvTranspose2d(before, after, 4, stride=2, padding=1), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def _checked(shape: Any, channels: tuple[Any, ...]) -> tuple[Any, tuple[int, ...]]:
    """The shape of an image that can be halved so often, and the channels, as whole numbers."""
    channels = tuple(check_count("channels", count) for count in channels)
    factor = 2 ** len(channels)
    sides = f"(channels, height, width) with sides divisible by {factor}"
    expected = f"{sides}, for {len(channels)} convolutions (at least 1)"
    three = isinstance(shape, (tuple, list)) and len(shape) == 3
    expect(three, "shape", expected, repr(shape))
    shape = tuple(check_count("shape", side) for side in shape)
    fits = channels and not (shape[1] % factor or shape[2] % factor)
    expect(fits, "shape", expected, shape)
    return shape, channels


class _LocScale(nn.Module):
    """A location and a scale for each number of an event: buffers, which are never trained."""

    loc: Tensor
    scale: Tensor

    def __init__(self, loc: float | Tensor, scale: float | Tensor = 1.0) -> None:
        super().__init__()
        tensors = [value for value in (loc, scale) if isinstance(value, Tensor)]
        near = tensors[0] if tensors else torch.zeros((), dtype=torch.get_default_dtype())
        given = check_real("loc", loc), check_real("scale", scale)
        pair = [value.to(near.device, near.dtype) for value in given]
        try:
            both = torch.broadcast_tensors(*pair)
        except RuntimeError as error:
            shapes = " and ".join(str(tuple(value.shape)) for value in pair)
            raise ValueError(f"loc, scale: expected one shape, got {shapes}") from error
        for name, value in zip(("loc", "scale"), both, strict=True):
            expect(torch.isfinite(value).all(), name, "finite numbers", value)
            self.register_buffer(name, value.detach().clone())
        expect((self.scale > 0).all(), "scale", "positive numbers", scale)

    def extra_repr(self) -> str:
        """The shape of an event, as `torch.nn` prints it."""
        return str(tuple(self.loc.shape))

    def _check(self, values: Tensor) -> None:
        event, shape = tuple(self.loc.shape), tuple(values.shape)
        fits = shape[len(shape) - len(event) :] == event
        expect(fits, "input", f"a tensor of shape (*, {', '.join(map(str, event))})", shape)


class Standardize(_LocScale):
    """`(x - loc) / scale`: the first layer of an encoder, by which data are of size one.

    `Standardize.of(data)` has the mean and the standard deviation of each column.
    `Standardize(0.0, 255.0)` scales by a number of one's own, and
    `Standardize(torch.zeros(5), torch.ones(5))` is ready to load what was saved.

    Args:
        loc: a number, or a tensor of the shape of an event.
        scale: likewise, positive.

    Attributes:
        loc: the location, of the shape of an event; a buffer, saved and never trained.
        scale: the scale, likewise.

    Raises:
        ValueError: a number is not finite, or a scale not positive; or, in a call, the input does
            not end in the shape of an event.

    Example:
        >>> table = torch.tensor([[1.0, 2e6, 7.0], [3.0, 4e6, 7.0]])
        >>> Standardize.of(table)(table)
        tensor([[-1., -1.,  0.],
                [ 1.,  1.,  0.]])
    """

    @classmethod
    def of(cls, data: Any) -> Self:
        """The layer by which these data have mean zero and standard deviation one in each column.

        The moments are taken in double precision, about the first datum; what is missing, NaN, is
        left out. A column that does not vary, beyond the rounding of its numbers, gets scale one.

        Args:
            data: a tensor or array of shape `(N, *event)`. The layer takes its floating dtype, for
                an array or whole numbers the default one.

        Raises:
            TypeError: the data are no tensor or array.
            ValueError: there are none, a number is infinite, or a column has none.
        """
        known = isinstance(data, Tensor) or hasattr(data, "__array__")
        got = type(data).__name__
        expect(known, "data", "a tensor or array of shape (N, *event)", got, TypeError)
        values = real_numbers("data", data).detach()
        full = values.dim() > 0 and values.numel() > 0
        expect(full, "data", "shape (N, *event) with at least one datum", tuple(values.shape))
        bad = int(torch.isinf(values).sum())
        expect(bad == 0, "data", "finite numbers, or NaN where one is missing", f"{bad} infinite")
        own = isinstance(data, Tensor) and values.is_floating_point()
        dtype = values.dtype if own else torch.get_default_dtype()
        values = values.double()
        first = _first_observed(values)
        shifted = values - first  # zero, without rounding, where nothing varies
        centred = shifted - shifted.nanmean(0)
        largest = centred.abs().nan_to_num(0.0).amax(0)  # squares above 1e154 would overflow
        unit = torch.where(largest > 0, largest, 1.0)
        loc = first + shifted.nanmean(0)
        scale = unit * (centred / unit).square().nanmean(0).sqrt()
        varies = scale > torch.finfo(dtype).eps * loc.abs()
        return cls(loc.to(dtype), torch.where(varies, scale, 1.0).to(dtype))

    @property
    def inverse(self) -> "Affine":
        """The layer that goes back, with a copy of the same numbers: a decoder saves its own."""
        return Affine(self.loc, self.scale)

    def forward(self, x: Tensor) -> Tensor:
        """Data `(*, *event)` -> the same shape."""
        self._check(x)
        return (x - self.loc) / self.scale


def _first_observed(values: Tensor) -> Tensor:
    """The first number of each column that is not NaN.

    Raises:
        ValueError: a column has none.
    """
    observed = ~torch.isnan(values)
    empty = (~observed.any(0)).nonzero()
    where = ", ".join(map(str, empty[0].tolist())) if len(empty) else ""
    expect(not len(empty), "data", "an entry in each column", f"none in column {where}")
    return values.gather(0, observed.int().argmax(0, keepdim=True)).squeeze(0)


class FillMissing(nn.Module):
    """An encoder of data with missing entries, which are NaN: numbers take their places.

    A `FamilyGuide` gives zeros to an encoder of any other kind. `FillMissing.of(x, encoder)` fills
    in the means of the columns.

    Args:
        encoder: a module `(batch, *event) -> (batch, features)`; with `with_mask`, of data whose
            columns are followed by as many ones and zeros: 1 where an entry is observed.
        fill: what takes their places, a number or a tensor that broadcasts to one event.
        learned: whether training moves it.
        with_mask: whether the encoder also gets which entries are observed.

    Raises:
        TypeError: `encoder` is no module, `fill` no number, or another no bool.
        ValueError: `fill` is not finite.

    Example:
        >>> fill = FillMissing(mlp(4, 16), fill=torch.zeros(2), learned=True, with_mask=True)
        >>> fill(torch.tensor([[1.0, float("nan")]])).shape
        torch.Size([1, 16])
    """

    #: it takes NaN, which a guide would otherwise replace
    takes_missing = True
    fill: Tensor

    def __init__(
        self,
        encoder: nn.Module,
        fill: float | Tensor = 0.0,
        *,
        learned: bool = False,
        with_mask: bool = False,
    ) -> None:
        super().__init__()
        known = isinstance(encoder, nn.Module)
        expect(known, "encoder", "a torch.nn.Module", repr(encoder), TypeError)
        self.encoder, self.with_mask = encoder, check_flag("with_mask", with_mask)
        value = check_real("fill", fill).detach().clone().to(torch.get_default_dtype())
        expect(torch.isfinite(value).all(), "fill", "finite numbers", fill)
        if check_flag("learned", learned):
            self.fill = nn.Parameter(value)
        else:
            self.register_buffer("fill", value)

    @classmethod
    def of(cls, data: Any, encoder: nn.Module, **options: bool) -> Self:
        """The layer that fills in the mean of each column of these data.

        Args:
            data: of shape `(N, *event)`, with NaN, masked or NA where an entry is missing.
            encoder: as for the class.
            **options: `learned` and `with_mask`.

        Raises:
            TypeError, ValueError: as `Standardize.of`.
        """
        return cls(encoder, Standardize.of(data).loc, **options)

    def forward(self, x: Tensor) -> Tensor:
        """Data `(batch, *event)` -> features."""
        observed = ~torch.isnan(x)
        filled = torch.where(observed, x, self.fill)
        if self.with_mask:
            filled = torch.cat([filled, observed.to(filled.dtype)], -1)
        features: Tensor = self.encoder(filled)
        return features


class Concatenate(nn.Module):
    """A module of several arguments, which it gets side by side: an encoder of data and context.

    Args:
        module: a module `(batch, columns) -> (batch, features)`, of all columns together.
        labels: for each argument that is labels, how many there are: they become zeros and a one.
            `Concatenate(mlp(64 + 10, 256), labels={1: 10})` takes images and digits.

    Raises:
        TypeError: `module` is none, or `labels` no mapping.

    Example:
        >>> encoder = Concatenate(mlp(5 + 3, 16), labels={1: 3})
        >>> encoder(torch.zeros(4, 5), torch.tensor([0, 2, 1, 1])).shape
        torch.Size([4, 16])
    """

    def __init__(self, module: nn.Module, labels: Mapping[int, int] | None = None) -> None:
        super().__init__()
        known = isinstance(module, nn.Module)
        expect(known, "module", "a torch.nn.Module", repr(module), TypeError)
        self.module = module
        given = {} if labels is None else check_mapping("labels", labels)
        self.labels = {
            check_count("labels", at, 0): check_count("labels", n) for at, n in given.items()
        }

    def forward(self, *args: Tensor) -> Tensor:
        """Arguments `(batch, *)` -> features; those beyond two dimensions are made flat."""
        parts = []
        for number, arg in enumerate(args):
            kind = type(arg).__name__
            expect(isinstance(arg, Tensor), "args", f"a tensor at {number}", kind, TypeError)
            codes = self.labels.get(number)
            if codes is not None and arg.dim() == 1:
                arg = one_hot(arg, codes)
            parts.append(arg.reshape(len(arg), -1))
        dtype = reduce(torch.promote_types, [part.dtype for part in parts])
        features: Tensor = self.module(torch.cat([part.to(dtype) for part in parts], -1))
        return features


class Pool(nn.Module):
    """An encoder of groups: the mean of what a module makes of their members, and their number.

    The order of the members makes no difference. All members of a group must be in one call.

    Args:
        module: a module of all arguments but the labels, `(batch, *) -> (batch, features)`.
        groups: number of groups.
        labels: which argument has the number of each member's group; by default the last.

    Raises:
        TypeError: `module` is none.
        ValueError: `groups` is no whole number of at least 1, or in a call, a label none of 0, ...,
            groups - 1.

    Zaheer et al., Deep sets, 2017.

    Example:
        >>> encoder = Pool(mlp(5, 16), groups=3)
        >>> encoder(torch.zeros(4, 5), torch.tensor([0, 2, 2, 0])).shape
        torch.Size([3, 17])
    """

    def __init__(self, module: nn.Module, groups: int, labels: int | None = None) -> None:
        super().__init__()
        known = isinstance(module, nn.Module)
        expect(known, "module", "a torch.nn.Module", repr(module), TypeError)
        self.module, self.groups = module, check_count("groups", groups)
        self.labels = None if labels is None else check_count("labels", labels, 0)

    def forward(self, *args: Tensor) -> Tensor:
        """Arguments `(batch, *)` -> features `(groups, features + 1)`; the last is log(1 + n)."""
        others, place = list(args), len(args) - 1 if self.labels is None else self.labels
        expect(place < len(args), "labels", f"one of {len(args)} arguments", self.labels)
        member = one_hot(others.pop(place), self.groups)
        features: Tensor = self.module(*others)
        member = member.to(features.dtype)
        count = member.sum(0)[:, None]
        return torch.cat([member.T @ features / count.clamp_min(1.0), count.log1p()], -1)


def one_hot(labels: Tensor, count: int, name: str = "labels") -> Tensor:
    """Labels `(*)` as zeros and a one, `(*, count)`, in the default dtype or that of the labels.

    Raises:
        ValueError: one is none of 0, ..., count - 1. A graph (`stage`, `torch.compile`) cannot look
            at values: there its row is zero.
    """
    one = labels.unsqueeze(-1) == torch.arange(count, device=labels.device)
    if not torch.compiler.is_compiling():
        unknown = (~one.any(-1)).nonzero()
        place = tuple(unknown[0].tolist()) if len(unknown) else ()
        got = f"{labels[place].item():g} in row {place[0]}" if place else ""
        expect(not len(unknown), name, f"labels from 0 to {count - 1}", got)
    floating = labels.is_floating_point()
    return one.to(labels.dtype if floating else torch.get_default_dtype())


class Affine(_LocScale):
    """`loc + scale * y`: the inverse of `Standardize`, and the last layer of a decoder.

    Args:
        loc: as for `Standardize`.
        scale: as for `Standardize`.
    """

    @property
    def inverse(self) -> Standardize:
        """The layer that goes back, with a copy of the same numbers."""
        return Standardize(self.loc, self.scale)

    def forward(self, y: Tensor) -> Tensor:
        """Standardised numbers `(*, *event)` -> the same shape."""
        self._check(y)
        return self.loc + self.scale * y


class Log1p(nn.Module):
    """`log(1 + x)`: the first layer of an encoder of counts, however large.

    Where counts still differ much between columns, `Standardize.of(x.log1p())` may follow.

    Raises:
        ValueError: in a call, a number is negative. A graph (`stage`, `torch.compile`) cannot look
            at values: there it becomes NaN.

    Example:
        >>> Log1p()(torch.tensor([0.0, 1e6]))
        tensor([ 0.0000, 13.8155])
    """

    @property
    def inverse(self) -> "Expm1":
        """The layer that goes back."""
        return Expm1()

    def forward(self, x: Tensor) -> Tensor:
        """Counts `(*)` -> the same shape."""
        negative = x < 0
        if not torch.compiler.is_compiling():
            count = int(negative.sum())
            expect(count == 0, "input", "counts of at least 0", f"{count} below")
        return torch.where(negative, torch.nan, torch.log1p(x))


class Expm1(nn.Module):
    """`exp(y) - 1`: the inverse of `Log1p`."""

    @property
    def inverse(self) -> Log1p:
        """The layer that goes back."""
        return Log1p()

    def forward(self, y: Tensor) -> Tensor:
        """Logarithms `(*)` -> counts, of the same shape."""
        return torch.expm1(y)
