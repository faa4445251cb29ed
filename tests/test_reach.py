"""The modules of a program are found wherever it has them, and none of them is moved."""

import functools
import threading
import types
import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch
from pairs import Normed, data, traceless
from pyro import poutine
from torch import nn
from torch.nn.modules.module import _global_forward_pre_hooks

import ppvae
from ppvae import FamilyGuide, fit, stage
from ppvae._reach import reached, watched
from ppvae._scopes import eval_mode, unchecked
from ppvae.training import Diverged

GLOBAL = nn.Linear(1, 1)
SPACE = types.SimpleNamespace(inner={"net": [nn.Linear(1, 1)]})
NETS = types.ModuleType("nets")
NETS.first, NETS.deep, NETS.others = nn.Linear(1, 1), types.ModuleType("deep"), [nn.Linear(1, 1)]
NETS.deep.second, NETS.deep.nets, NETS.deep.third = nn.Linear(1, 1), NETS, nn.Linear(1, 1)


class Program:
    """No module, and has one."""

    def __init__(self):
        self.net = nn.Linear(1, 1)

    def model(self, x):
        return self.net(x)

    def __call__(self, x):
        return GLOBAL(x)


def by_name(x):
    return GLOBAL(x)


def by_attribute(x):
    return SPACE.inner["net"][0](x)


def of_a_module(x):
    assert NETS.first is not None  # which pytest rewrites, to call functions of its own
    return NETS.deep.nets.deep.second(NETS.first(x))


def of_a_closed_module(nets):
    return lambda x: [nets.deep.second(each) for each in x]


def inside(x):
    return [GLOBAL(each) for each in x]


def by_default(x, net=SPACE.inner["net"][0]):
    return net(x)


def closed(net):
    return lambda x: net(x)


OWN = nn.Linear(1, 1)
PROGRAM, HELD = Program(), types.SimpleNamespace(nets=NETS)
#: name -> a program, and what it reaches
PROGRAMS = {
    "itself": (OWN, {OWN}),
    "closure": (closed(OWN), {OWN}),
    "of a closure": (closed(closed(OWN)), {OWN}),
    "global": (by_name, {GLOBAL}),
    "in a loop": (inside, {GLOBAL}),
    "container": (by_attribute, {SPACE.inner["net"][0]}),
    "module": (of_a_module, {NETS.first, NETS.deep.second}),
    "closed module": (of_a_closed_module(NETS), {NETS.deep.second}),
    "held module": (HELD, {NETS.first, *NETS.others}),
    "default": (by_default, {SPACE.inner["net"][0]}),
    "partial": (functools.partial(by_default, net=OWN), {SPACE.inner["net"][0], OWN}),
    "method": (PROGRAM.model, {PROGRAM.net, GLOBAL}),
    "object": (PROGRAM, {PROGRAM.net, GLOBAL}),
    "wrapped": (functools.wraps(closed(OWN))(lambda x: x), {OWN}),
    "handled": (poutine.scale(closed(OWN), 0.5), {OWN}),
    "handled method": (poutine.block(poutine.scale(PROGRAM.model, 0.5)), {PROGRAM.net, GLOBAL}),
    "none": (print, set()),
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_module_is_found_wherever_it_is(name):
    program, wanted = PROGRAMS[name]
    found = reached(program)
    assert {*found} == wanted and len(found) == len(wanted)


def test_a_name_without_a_value_and_a_circle_are_no_trouble():
    def program(x):
        return net(x) + len(own)

    own = [program]
    own.append(own)
    assert reached(program) == []
    net = OWN
    assert reached(program) == [net]


def test_only_calls_of_this_thread_are_seen_and_no_hook_is_left():
    seen, before, x = [], dict(_global_forward_pre_hooks), torch.zeros(1, dtype=torch.float32)
    with pytest.raises(LookupError), watched(seen.append):
        thread = threading.Thread(target=OWN, args=(x,))
        thread.start()
        thread.join()
        GLOBAL(x)
        raise LookupError
    assert seen == [GLOBAL] and dict(_global_forward_pre_hooks) == before


class Counting(nn.Module):
    """Moves a buffer in whatever mode, and drops out as functions do."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 3)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls += 1
        return self.layer(nn.functional.dropout(x, 0.5, self.training))


def pair(way="called"):
    """A model as a plain function, with running statistics and dropout in its closure."""
    nets = nn.Sequential(Normed(2, 4), Counting())

    def model(x):
        if way == "pyro.module":
            pyro.module("nets", nets)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            if way == "called":
                loc = nets(z)
            elif way == "functions":
                loc = nn.functional.linear(nets[0](z), nets[1].layer.weight, nets[1].layer.bias)
            else:
                loc = nets.forward(z)
            pyro.sample("x", dist.Normal(loc, 0.5).to_event(1), obs=x)

    return model, FamilyGuide(model, "mean_scale", encoder=nn.Linear(3, 4)), nets


def quiet(model, guide, **told):
    told = {"num_epochs": 3, "batch_size": 5, "learning_rate": 0.05, "seed": 1, **told}
    return fit(model, guide, data(), progress=False, compile=False, **told)


FEW = {"num_samples": 16, "progress": False}
#: name -> a call that measures or uses a pair
CALLS = {
    "evaluate": lambda *pair: ppvae.evaluate(*pair, data(), **FEW),
    "gaps": lambda *pair: ppvae.gaps(*pair, data(), num_steps=2, seed=0, **FEW),
    "log_prob": lambda *pair: ppvae.log_prob(*pair, data(), num_samples=16),
    "encode": lambda *pair: ppvae.encode(*pair, data()),
    "reconstruct": lambda *pair: ppvae.reconstruct(*pair, data()),
    "refine": lambda *pair: ppvae.refine(*pair, data(), num_steps=2, progress=False),
    "tree": lambda *pair: ppvae.from_pyro_svi(*pair, data(), num_samples=4, seed=0),
}


@pytest.mark.parametrize("name", CALLS)
def test_what_a_function_closes_over_is_not_moved_and_does_not_drop_out(name):
    model, guide, nets = pair()
    quiet(model, guide)
    modes = []
    for module in nets.modules():
        module.register_forward_hook(lambda module, *_: modes.append(module.training))
    with traceless(guide, nets, moved=False):
        CALLS[name](model, guide)
    assert modes and not any(modes) and nets.training


def test_measures_of_a_function_and_of_a_module_are_the_same():
    """Dropout is off in both, and the running statistics are those of the training."""
    model, guide, nets = pair()
    quiet(model, guide)
    first, again = (ppvae.evaluate(model, guide, data(), **FEW) for _ in range(2))
    nets.eval()
    assert ppvae.evaluate(model, guide, data(), **FEW).identical(first) and first.identical(again)
    assert not any(module.training for module in nets.modules())


def test_modes_inside_of_one_another_come_back():
    nets = Normed(2, 4)
    nets[1].eval()
    modes = [module.training for module in nets.modules()]
    with eval_mode():
        with eval_mode(closed(nets)):
            assert not any(module.training for module in nets.modules())
        assert [module.training for module in nets.modules()] == modes
        nets(torch.zeros(3, 2))
        assert not any(module.training for module in nets.modules())
    assert [module.training for module in nets.modules()] == modes


@pytest.mark.parametrize("way", ["called", "functions", "forward", "pyro.module"])
def test_parameters_are_trained_however_a_function_uses_them(way):
    """As the parameters of a module are: the loss depends on them."""
    model, guide, nets = pair(way)
    before = [parameter.detach().clone() for parameter in nets.parameters()]
    nets.eval()
    moved = nets[0][1].running_mean.clone()
    quiet(model, guide)
    assert not any(map(torch.equal, before, nets.parameters()))
    assert not torch.equal(moved, nets[0][1].running_mean)  # they are trained in training mode ...
    assert not any(module.training for module in nets.modules())  # ... and left in their own
    staged = stage(model, guide, data())
    own = {id(parameter) for parameter in staged.parameters()}
    assert own >= {id(parameter) for parameter in nets.parameters()}


def state(*modules):
    return [v.detach().clone() for m in modules for v in (*m.parameters(), *m.buffers())]


@pytest.mark.parametrize("way", ["called", "functions", "forward", "pyro.module"])
def test_nothing_of_them_is_lost_by_a_checkpoint_patience_or_divergence(way, tmp_path):
    torch.manual_seed(0)
    *parts, nets = pair(way)
    quiet(*parts, checkpoint=tmp_path / "run.pt")
    end = state(parts[1], nets)
    torch.manual_seed(1)
    *parts, nets = pair(way)  # another start, which the checkpoint replaces
    quiet(*parts, checkpoint=tmp_path / "run.pt")
    assert all(map(torch.equal, end, state(parts[1], nets)))

    kept = []  # of each epoch
    told = {"validation": data() + 9.0, "patience": 2, "num_epochs": 9, "learning_rate": 0.5}
    result = quiet(*parts, callback=lambda _: kept.append(state(parts[1], nets)), **told)
    assert result.best_epoch < len(kept) - 1
    assert all(map(torch.equal, kept[result.best_epoch], state(parts[1], nets)))

    def raises(row):
        raise LookupError("mine")

    before = state(parts[1], nets)
    with pytest.raises(LookupError, match="mine"):
        quiet(*parts, callback=raises)
    assert all(map(torch.equal, before, state(parts[1], nets)))
    with pytest.raises(Diverged, match="those of step 0"):
        quiet(*parts, learning_rate=1e200, num_epochs=1)
    weights = [parameter.detach() for part in (parts[1], nets) for parameter in part.parameters()]
    assert len(weights) > 9
    assert all(any(torch.equal(weight, was) for was in before) for weight in weights)


def test_a_tensor_that_is_no_parameter_and_a_module_that_comes_late_are_named():
    weight, late = torch.ones(3, requires_grad=True), nn.Linear(2, 3)
    calls = []

    def model(x):
        calls.append(len(x))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            loc = late(z) if len(calls) > 20 else z.sum(-1, keepdim=True) * weight
            pyro.sample("x", dist.Normal(loc, 0.5).to_event(1), obs=x)

    guide = FamilyGuide(model, "mean_scale", encoder=nn.Linear(3, 4))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        quiet(model, guide, num_epochs=20)
    first, later = [f"{each.message}" for each in caught]
    words = "model, guide: the loss depends on tensors that want a gradient and are no parameters"
    assert first.startswith(f"{words}, of shapes [(3,)]: they are not trained; ")
    words = "fit: a module is called that was not in the first run, and is not trained: Linear("
    assert later.startswith(words) and all(each.filename == __file__ for each in caught)


def test_a_module_that_is_compiled_is_measured_as_it_is():
    net, found = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3)), []
    with unchecked():  # which PyTorch's compiler turns off for good
        for fast in (torch.compile(net, fullgraph=True, backend="eager"), net):

            def model(x, fast=fast):
                with pyro.plate("data", len(x)):
                    z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
                    pyro.sample("x", dist.Normal(fast(z), 0.5).to_event(1), obs=x)

            before, guide = state(net), FamilyGuide(model, "noise_only")
            found.append(ppvae.evaluate(model, guide, data(), **FEW))
            assert all(map(torch.equal, before, state(net))) and net[1].training
    torch.testing.assert_close(*(torch.tensor(each.elbo.values) for each in found))
