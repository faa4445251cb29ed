"""Several processes train as one does: to the same losses and parameters."""

import os
import time

import pytest
import torch
from cases import LONG, cases
from pairs import KINDS, same
from together import WAYS, WHOLE, together, train

from ppvae._checks import TROUBLE

pytestmark = pytest.mark.skipif(
    not (torch.distributed.is_available() and hasattr(os, "fork")),
    reason="needs PyTorch with distributed, and processes that can be forked",
)
FEW = ["student_t", "one or two rows", "validation", "staged", "mixed"]
#: those that go no way of their own are for `.ci/long`, and so is the compiler, in each process
LATER = {*KINDS, *cases()} - {"student_t", "flow", "told rows"}
LATER |= {"compiled", "staged"}  # one that is staged draws numbers of two kinds
LATER |= {"all at once"}  # as those of L-BFGS are
SOME = [name for name in WAYS if LONG or name not in LATER]


def agree(one, other, bound=1e-9):
    """Fails unless two trainings are the same, up to the order of sums."""
    (told, ends, _), (other_told, other_ends, _) = one, other
    losses = {"losses", "validation_losses"}
    for name in losses:
        assert other_told[name] == pytest.approx(told[name], rel=bound)
    others = {"execution", "execution_reason", "verdict"}  # which tells rounded numbers
    for name in told.keys() - losses - others:
        assert told[name] == other_told[name], name
    assert same(ends, other_ends, bound)


@pytest.mark.parametrize(("count", "names"), [(2, SOME), (4, FEW if LONG else FEW[:2])])
def test_processes_train_as_one_does(count, names, tmp_path):
    found = together(count, tmp_path, *names)
    for name in names:
        alone = train(name)
        for each in found:
            assert not isinstance(each[name], str), (name, each[name])
            agree(alone, each[name])
            assert each[name][0]["execution"] == alone[0]["execution"].replace("looped", "compiled")
            shared = each[name][0]["execution_reason"].startswith("not looped: processes exchange")
            assert shared == (alone[0]["execution"] == "looped")
            assert same(each[name][1], found[0][name][1])  # bit for bit
            so = [line for line in each[name][2] if line.startswith("fit: each of")]
            whole = name in WHOLE or (count, name) == (4, "one or two rows")  # of four processes
            assert bool(so) == whole, (name, so)
            assert all(f"of {count} processes computes all" in s and TROUBLE in s for s in so)


def test_one_that_ends_ends_the_others_and_any_number_goes_on(tmp_path):
    path = tmp_path / "run.pt"
    began = time.monotonic()
    survivor, gone = together(2, tmp_path, "dies", checkpoint=path)
    assert time.monotonic() - began < 60  # seconds of work, and of waiting
    assert gone is None
    assert survivor["dies"].startswith("ConnectionError: fit: expected an answer of all processes")
    whole = train("mean_scale", num_epochs=6)
    for count in (1, 3):
        file = tmp_path / f"{count}.pt"
        file.write_bytes(path.read_bytes())
        (tmp_path / f"{count}").mkdir()
        told = {"num_epochs": 6, "checkpoint": file}
        found = [{"mean_scale": train("mean_scale", **told)}] if count == 1 else None
        for each in found or together(count, tmp_path / f"{count}", "mean_scale", **told):
            agree(whole, each["mean_scale"])


def test_what_one_decides_all_do_and_what_differs_is_refused(tmp_path):
    names = ["one_compares", "one_fails", "one_refuses"]  # after which all goes on
    names += ["told_to_stop", "one_stops", "other_start", "on_their_own", "own_shards"]
    names += ["other_data", "cut_twice", "no_checkpoint", "other_draws"]
    first, second = together(2, tmp_path, *names)
    for each in (first, second):
        told, _, _ = each["told_to_stop"]
        assert told["interrupted"] and told["verdict"].startswith("interrupted in epoch 3")
        told, _, _ = each["one_stops"]
        assert told["verdict"] == "stopped by the callback after epoch 2"
        for name, error in {
            "other_data": "ValueError: fit: expected the same data in all processes, which is 25 ",
            "own_shards": "ValueError: fit: expected the same first minibatch in all processes, w",
            "cut_twice": "ValueError: data: expected a loader of all the data, of which fit takes",
            "no_checkpoint": "ValueError: checkpoint: expected a file that was written here, got",
            "other_draws": "RuntimeError: fit: expected a model, objective and callback that draw",
        }.items():
            assert each[name].startswith(error)
    lost = "ConnectionError: fit: expected an answer of all processes of the group, but one has"
    assert first["one_fails"].startswith(lost) and second["one_fails"] == "LookupError: mine"
    assert first["one_refuses"].startswith(lost)
    assert second["one_refuses"].startswith("ValueError: num_epochs: expected a whole number")
    assert first["one_compares"] is second["one_compares"] is None
    assert same(first["other_start"], second["other_start"])
    for rank, each in enumerate((first, second)):  # nor do they wait for each other
        agree(train("mean_scale", seed=rank, num_epochs=rank + 1), each["on_their_own"])
