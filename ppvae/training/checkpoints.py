"""What was trained, in a file: a training that can go on, or a model with its guide.

Both are read with `torch.load(path, weights_only=True)`, and nothing of them is code. A checkpoint
is a dictionary of

- `format`: the number of this layout;
- `run`: what the training is of, in words: the parts of model and guide, data and options;
- `execution`: how the loss runs, "eager", "staged", "compiled" or "looped", and `not_faster`, why;
- `loss`: the losses of the first minibatch with the values in the file, by the same random numbers;
- `state`: `values`, name -> tensor, of all that the loss depends on; `constants`, the names of
  those that do not move, about which a warning tells if they are others where it goes on; `best`,
  those of the best epoch; `optimizer`, `scheduler` and `ending`, which say how it moves; `step`;
  `random_numbers`, where the generators stand, and `began`, where they stood when the epoch began;
  and `numbers`, its course: losses, epochs, the position in the epoch, seconds;
- for global latents, instead of a state: `fit`, what it returned; `start` and `values`, the
  parameters before and after; and `steps`, how many there could be, 0 if it was interrupted.

The file of a pair has `format`, `parts`, `model` and `guide`, the last two as `state_dict` gives
them.
"""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ppvae._checks import expect
from ppvae._files import as_path, replacing
from ppvae.training.execution import Execution
from ppvae.training.identity import check_same, parts_of

_FORMAT = 3
_SHARE = 0.02  # of the time of a training, which may go into saving it


class Checkpoint:
    """The file of a training.

    Args:
        path: of the file.
        run: what the training is of, in words; what differs from the file is refused.

    Attributes:
        saved: what the file held when it was opened; empty if there was none.
        kept: whether this process writes it; of several that train together the first one does.

    Raises:
        TypeError: `path` is no path.
        FileNotFoundError: the folder does not exist.
        ValueError: the path is that of a folder, the file is of another kind, or it is the
            checkpoint of another training.
    """

    def __init__(self, path: Any, run: Mapping[str, str]) -> None:
        self.path, self.run = as_path("checkpoint", path), dict(run)
        self.saved = _read("checkpoint", self.path, "run") if self.path.exists() else {}
        if self.saved:
            check_same("checkpoint", self.saved["run"], self.run)
        self.kept = True
        self._began = math.inf  # when the first epoch ended, in which much is done only once
        self._last = self._spent = 0.0  # seconds of the last save, and of all

    @property
    def state(self) -> dict[str, Any] | None:
        """Where the training stood; None if it has not begun."""
        return self.saved.get("state")

    def execution(self, told: Execution, epochs: int) -> Execution:
        """How the loss is to run: as it did, so that the same numbers come; or as told, anew.

        Args:
            told: as it would run without this file.
            epochs: how many there are to be, at least those that have been.
        """
        if self.state is not None:
            done = self.state["numbers"]["epoch"]
            expect(epochs >= done, "num_epochs", f"at least {done}, as in {self.path}", epochs)
            if self.is_done(epochs):  # nothing is to be run
                return Execution("eager", caller=told.caller)
        return self.ran(told) if self.saved else told

    def ran(self, told: Execution) -> Execution:
        """How the loss ran, for a user who tells so much of it."""
        state = self.saved.get("not_faster", {"why": "", "apart": []})
        return told.as_before(self.saved["execution"], state)

    def is_done(self, epochs: int) -> bool:
        """Whether the training has had so many epochs, or a reason to stop before."""
        numbers = self.saved.get("state", {}).get("numbers", {"epoch": 0, "stopped": ""})
        return bool(numbers["epoch"] >= epochs or numbers["stopped"])

    def is_due(self, epoch: int) -> bool:
        """Whether saving now, and once more at the end, takes no more than its share of the time.

        The first epoch is always saved.
        """
        now = time.perf_counter()
        self._began = min(self._began, now)
        return epoch == 1 or self._spent + 2 * self._last <= _SHARE * (now - self._began)

    def write(self, parts: Callable[[], Mapping[str, Any]]) -> None:
        """Writes the file; the old one is there until the new one is whole.

        Args:
            parts: makes what is written, which takes its time, too.
        """
        if not self.kept:
            return
        start = time.perf_counter()
        with replacing(self.path) as path:
            torch.save({"format": _FORMAT, "run": self.run, **parts()}, path)
        self._last = time.perf_counter() - start
        self._spent += self._last

    def check_losses(self, losses: Sequence[float]) -> None:
        """Raises a ValueError unless the values of the file give the losses that they gave.

        This sees what words do not tell, as another number inside of a function.
        """
        for was, now in zip(self.saved["loss"], losses, strict=True):
            same = abs(was - now) <= 1e-4 * (1 + abs(was)) or (was != was and now != now)
            wanted = f"one of this model, guide and data, which give a loss of {now:.6g}"
            expect(same, "checkpoint", wanted, f"one that says {was:.6g}")


def save_pair(path: Any, model: nn.Module, guide: nn.Module) -> None:
    """Saves a model and its guide in one file, which is whole at any moment.

    Args:
        path: of the file.
        model: a module.
        guide: its guide, a module.

    Raises:
        TypeError: one of the two is no module. The parameters of plain functions are in Pyro's
            store, which has a `save` of its own.

    Example:
        >>> import tempfile, torch
        >>> from ppvae import VAE, FamilyGuide, families, likelihoods
        >>> model = VAE(torch.nn.Linear(2, 5), latent=2, likelihood=likelihoods.Normal(1.0))
        >>> guide = FamilyGuide(model, families.mean_scale, torch.nn.Linear(5, 3))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_pair(f"{folder}/pair.pt", model, guide)
        ...     load_pair(f"{folder}/pair.pt", model, guide)
    """
    path, programs = as_path("path", path), _modules(model=model, guide=guide)
    states = {name: program.state_dict() for name, program in programs.items()}
    with replacing(path) as beside:
        torch.save({"format": _FORMAT, "parts": parts_of(**programs), **states}, beside)


def load_pair(path: Any, model: nn.Module, guide: nn.Module) -> None:
    """Gives a model and its guide the values that `save_pair` saved.

    Args:
        path: of the file.
        model: a module of the same make.
        guide: its guide, of the same make; its parameters may be yet to be made.

    Raises:
        TypeError: one of the two is no module.
        ValueError: the file is of another kind, or model or guide are made otherwise, if only in
            the family or in a setting; neither is then changed.
    """
    programs = _modules(model=model, guide=guide)
    saved = _read("path", as_path("path", path), "parts")
    here = parts_of(**programs)
    to_make = "guide.heads."  # which `load_state_dict` makes
    parts = saved["parts"].items()
    check_same("path", {k: v for k, v in parts if k in here or not k.startswith(to_make)}, here)
    for name, program in programs.items():
        program.load_state_dict(saved[name])


def _modules(**programs: Any) -> dict[str, nn.Module]:
    """The programs, which must be modules."""
    for name, program in programs.items():
        expect(isinstance(program, nn.Module), name, "a torch.nn.Module", program, TypeError)
    return programs


def _read(name: str, path: Path, part: str) -> dict[str, Any]:
    """The contents of a file that has this part."""
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"{name}: expected a file, got {path}, which is not there"
        ) from error
    except Exception as error:  # whatever PyTorch may raise over a file that is not its own
        raise ValueError(f"{name}: expected a file that was written here, got {path}") from error
    known = isinstance(saved, dict) and saved.get("format") == _FORMAT and part in saved
    expect(known, name, "a file that was written here, of this version", path)
    return saved
