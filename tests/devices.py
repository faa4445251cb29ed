"""A pretended device: what is on it is computed on the CPU, and does not mix with what is not.

It is strict as a GPU is: an operation on tensors of two devices fails, unless one of them is a
number; and no array is made of a tensor on it.
"""

from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_map
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

NAME = "pretended"
_MIXED = {"copy_", "_to_copy", "index", "index_put_", "index_put", "_index_put_impl_"}


class There(Tensor):
    """A tensor on the device; its numbers are in `here`."""

    here: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, here: Tensor) -> "There":
        made = Tensor._make_wrapper_subclass(
            cls, here.shape, strides=here.stride(), storage_offset=here.storage_offset(),
            dtype=here.dtype, device=torch.device(NAME, 0), requires_grad=here.requires_grad,
        )  # fmt: skip
        made.here = here.detach()
        return made

    def __repr__(self) -> str:
        return f"There({self.here})"

    def tolist(self) -> Any:
        return self.here.tolist()

    def numpy(self, *, force: bool = False) -> Any:
        if not force:
            raise TypeError(f"no array is made of a tensor on {self.device}")
        return self.here.numpy()

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


class _Made(TorchDispatchMode):
    """Makes tensors on the device where one is asked for."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


class _Told(TorchFunctionMode):
    """Makes tensors of numbers, which PyTorch would make without asking `_Made`."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func in (Tensor.__getitem__, Tensor.__setitem__):
            index = tree_map(_as_index, args[1], is_leaf=_is_list)
            return func(args[0], index, *args[2:])
        if func not in (torch.tensor, torch.as_tensor, Tensor.new_tensor):
            return func(*args, **kwargs)
        first = args[0]
        to = first.device if isinstance(first, Tensor) else torch.device("cpu")
        told = kwargs.pop("device", None)
        to = to if told is None else torch.device(told)
        if func is Tensor.new_tensor:
            args, kwargs = args[1:], {"dtype": first.dtype, **kwargs}
        if isinstance(args[0], Tensor):
            return args[0].to(device=to, **kwargs)
        made = torch.tensor(*args, **kwargs)
        return There(made) if to.type == NAME else made


def _is_list(part: Any) -> bool:
    return isinstance(part, list)


def _as_index(part: Any) -> Any:
    return torch.tensor(part) if _is_list(part) else part


def _run(func: Any, args: Any, kwargs: Any) -> Any:
    tensors: list[Tensor] = []
    _mapped(lambda v: tensors.append(v) if isinstance(v, Tensor) else None, args)
    _mapped(lambda v: tensors.append(v) if isinstance(v, Tensor) else None, (*kwargs.values(),))
    inside = [t for t in tensors if isinstance(t, There)]
    outside = [t for t in tensors if not isinstance(t, There) and t.dim()]
    name = func.overloadpacket.__name__
    if inside and outside and name not in _MIXED:
        shapes = [tuple(t.shape) for t in outside]
        raise RuntimeError(f"{name}: expected all tensors on one device, got {shapes} on the cpu")
    told = kwargs.get("device")
    to = bool(inside) if told is None else torch.device(told).type == NAME
    if name == "copy_":
        to = isinstance(args[0], There)
    here = _mapped(_here, args), {key: _mapped(_here, value) for key, value in kwargs.items()}
    if told is not None:
        here[1]["device"] = torch.device("cpu")
    out = func(*here[0], **here[1])
    if not to:
        return out
    made = _mapped(lambda v: There(v) if isinstance(v, Tensor) else v, out)
    return return_and_correct_aliasing(func, args, kwargs, made) if inside else made


def _here(part: Any) -> Any:
    return part.here if isinstance(part, There) else part


def _mapped(what: Any, parts: Any) -> Any:
    """As `tree_map`, which takes long: operations are given no other containers."""
    if type(parts) in (list, tuple):
        return type(parts)([_mapped(what, part) for part in parts])
    return what(parts)


def there(value: Any) -> Any:
    """A tensor, or all that a module has, on the device."""
    if isinstance(value, Tensor):
        return value if isinstance(value, There) else There(value)
    before = torch.__future__.get_overwrite_module_params_on_conversion()
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    try:
        return value._apply(there)
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(before)


class _Backend:
    """What PyTorch asks of a device: here, nothing has a state."""

    def is_available(self) -> bool:
        return True

    def device_count(self) -> int:
        return 1

    def current_device(self) -> int:
        return 0

    def get_rng_state(self, *_: Any) -> Tensor:
        return torch.empty(0, dtype=torch.uint8)

    def set_rng_state(self, *_: Any) -> None:
        pass

    def manual_seed_all(self, seed: int) -> None:
        pass

    def _is_in_bad_fork(self) -> bool:
        return False


@contextmanager
def pretended() -> Any:
    """Inside there is the device."""
    try:
        torch.device(NAME)
    except RuntimeError:
        _setup_privateuseone_for_python_backend(NAME, _Backend())
    with _Made(), _Told():
        yield
