"""What a training is of, in words that can be compared: its programs, its data, its options."""

import functools
import hashlib
import inspect
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from pyro.optim import PyroOptim
from torch import Tensor, nn

from ppvae._checks import expect
from ppvae.data.batches import Batches
from ppvae.families.base import GuideFamily

_WHOLE = 2**28  # bytes of data that are all read; of more, evenly spaced rows


def parts_of(**programs: Any) -> dict[str, str]:
    """What programs are made of: name of a part -> its class, settings, or shape and dtype.

    Args:
        **programs: models, guides or programs by name. A function has its name, and no parts.
    """
    parts: dict[str, str] = {}
    for title, program in programs.items():
        if not isinstance(program, nn.Module):
            parts[title] = in_words(program)
            continue
        for path, module in program.named_modules():
            parts[f"{title}.{path}".rstrip(".")] = _settings(module)
        for path, parameter in program.named_parameters():
            parts[f"{title}.{path}"] = f"{tuple(parameter.shape)} {parameter.dtype}"
    return parts


def _settings(module: nn.Module) -> str:
    """The class of a module, and what it holds beside tensors and modules."""
    plain = (bool, int, float, str, tuple, torch.Size)
    settings = [module.extra_repr()] if module.extra_repr() else []
    settings += [
        f"{name}={in_words(value)}"
        for name, value in sorted(vars(module).items())
        if (type(value) in plain or isinstance(value, GuideFamily))
        and name != "training"
        and not name.startswith("_")
    ]
    return f"{type(module).__qualname__}({', '.join(settings)})"


def in_words(value: Any) -> str:
    """A value in words that are the same in another process."""
    if isinstance(value, PyroOptim):
        return f"{in_words(value.pt_optim_constructor)}({value.pt_optim_args})"
    if isinstance(value, functools.partial):
        named = sorted(value.keywords.items())
        parts = [in_words(value.func), *map(in_words, value.args)]
        return f"partial({', '.join([*parts, *(f'{k}={in_words(v)}' for k, v in named)])})"
    if inspect.isroutine(value) or inspect.isclass(value):
        return value.__qualname__
    return re.sub(r" at 0x[0-9a-f]+", "", repr(value))


def data_in_words(batches: Batches) -> str:
    """Data in words: shapes and dtypes, and a digest of what is in them."""
    tensors: list[Any] = [*batches.tensors, *(v for v in batches.extra if isinstance(v, Tensor))]
    others = [in_words(v) for v in batches.extra if not isinstance(v, Tensor)]
    if batches.loader is not None:
        dataset: Any = batches.loader.dataset
        others.append(type(dataset).__qualname__)
        if hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__"):
            items = [dataset[at] for at in (0, len(dataset) - 1)]
            flat = [part for i in items for part in (i if isinstance(i, (tuple, list)) else (i,))]
            tensors += [torch.as_tensor(part) for part in flat]
    kinds = [f"{tuple(tensor.shape)} {tensor.dtype}" for tensor in tensors]
    return f"{batches.size} data, {', '.join([*kinds, *others])}, digest {_digest(tensors)}"


def batch_in_words(batch: tuple[Any, ...]) -> str:
    """A digest of a minibatch."""
    return f"of digest {_digest([value for value in batch if isinstance(value, Tensor)])}"


def _digest(tensors: Iterable[Tensor]) -> str:
    """A few letters that stand for what is in tensors."""
    digest = hashlib.blake2b(digest_size=8)
    for tensor in tensors:
        every = -(-tensor.nbytes // _WHOLE) if tensor.dim() else 1
        rows = tensor[:: max(every, 1)] if tensor.dim() else tensor
        digest.update(rows.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def differences(
    here: Mapping[str, str], other: Mapping[str, str]
) -> Iterator[tuple[str, str, str]]:
    """What two descriptions differ in, each with its name: as it is here, and in the other."""
    for key in [*here, *(key for key in other if key not in here)]:
        one, two = here.get(key, "nothing"), other.get(key, "nothing")
        if one != two:
            yield key, one, two


def check_same(name: str, saved: Mapping[str, str], here: Mapping[str, str]) -> None:
    """Raises a ValueError that names the first thing in which two descriptions differ."""
    for key, now, was in differences(here, saved):
        expect(was == now, name, f"one of the same {key}, which is {now} here", was)
