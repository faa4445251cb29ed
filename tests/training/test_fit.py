"""Training reaches known optima, reports honestly, goes back after errors, and refuses the rest."""

import copy
import math
from contextlib import nullcontext
from functools import partial
from types import SimpleNamespace

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from cases import FAMILIES
from linear import local
from pairs import NanSlope, Normed, build, data, function, made, same, traceless, values
from pyro import poutine
from torch import nn
from torch.utils.data import DataLoader, Dataset, SubsetRandomSampler, TensorDataset

from ppvae import VAE, FamilyGuide, evaluate, families, fit, fit_replicates, likelihoods
from ppvae._scopes import private_modules
from ppvae.data.batches import batches_of
from ppvae.nn import mlp
from ppvae.objectives import ELBO, negative_elbo
from ppvae.regression import LinearRegression
from ppvae.training import Diverged, Snapshot


def quiet(*args, **kwargs):
    return fit(*args, **{"progress": False, "seed": 1, **kwargs})


def run(train, pairs, data, **told):
    """Trains the last pair by `fit`, or all of them side by side."""
    if train is fit:
        return quiet(*pairs[-1], data, **told)
    return fit_replicates(pairs, data, **{"progress": False, "seeds": [1, 2], **told})


def held_out(model, guide, x):
    """The negative ELBO in evaluation mode."""
    model.eval(), guide.eval()
    with private_modules():
        return negative_elbo(model, guide, x).item()


def test_noise_only_reaches_the_independent_bernoulli_floor():
    """The best decoder of noise is the vector of frequencies, and its loss is their entropy."""
    x = (torch.rand(200, 4) < torch.tensor([0.1, 0.4, 0.7, 0.95])).double()
    p = x.mean(0)
    floor = -(p * p.log() + (1 - p) * (1 - p).log()).sum()
    torch.manual_seed(0)
    model = VAE(nn.Linear(2, 4), 2, likelihoods.Bernoulli())
    guide = FamilyGuide(model, families.noise_only, mlp(4, 8))
    quiet(model, guide, x, num_epochs=1500, learning_rate=0.02, seed=0)
    result = quiet(model, guide, x, num_epochs=500, learning_rate=1e-3, seed=1)
    # Adam at 1e-3 leaves weights w below 0.02, which cost w^2/8 per pixel and latent; one draw of
    # the noise for 200 data moves the loss by w/sqrt(200): together below 2e-3
    assert model.decoder.weight.abs().max() < 0.02
    assert abs(result.losses[-1] - floor) < 2e-3


class Items(Dataset):
    """Rows one by one; some may be infinite."""

    def __init__(self, x, bad=()):
        self.x, self.bad = x, bad

    def __len__(self):
        return len(self.x)

    def __getitem__(self, index):
        return self.x[index] * (math.inf if index in self.bad else 1.0)


KINDS = {
    "tensor": lambda x: x,
    "array": lambda x: x.numpy(),
    "array in reverse": lambda x: x.numpy()[::-1],
    "tuple": lambda x: (x,),
    "tensor dataset": TensorDataset,
    "dataset": Items,
    "loader": lambda x: DataLoader(TensorDataset(x), batch_size=8),
}


@pytest.mark.parametrize("kind", KINDS)
def test_takes_data_of_every_kind(kind):
    size = None if kind == "loader" else 8
    result = quiet(*build(), KINDS[kind](data(20)), num_epochs=2, batch_size=size)
    assert result.num_steps == 6 and all(map(math.isfinite, result.losses))


@pytest.mark.parametrize("train", [fit, fit_replicates])
def test_data_that_want_a_gradient_get_none(train):
    x = data(20).requires_grad_()
    pairs = build() if train is fit else ([build(), build()],)
    train(*pairs, x, num_epochs=2, batch_size=8, progress=False)
    assert x.requires_grad and x.grad is None


def test_arrays_take_the_default_dtype_and_numbers_may_be_those_of_numpy():
    model, guide = build()
    torch.set_default_dtype(torch.float32)
    try:
        told = {"num_epochs": np.int64(2), "batch_size": np.int32(5), "patience": np.int64(1)}
        told |= {"learning_rate": np.float32(0.01), "validation": data(4).numpy()}
        told["objective"] = ELBO(beta=np.float32(2.0), free_bits=np.float64(0.1))
        result = quiet(model.float(), guide.float(), data(9).numpy(), **told)
    finally:
        torch.set_default_dtype(torch.float64)
    assert result.num_steps == 4 and result.objective == ELBO(beta=2.0, free_bits=0.1)


def test_the_number_of_data_is_that_of_the_sampler():
    """A prior counts once for all that are seen: 10 of 1000 rows, or 8 of 10 in a fixed order."""
    rows = TensorDataset(torch.zeros(1000, 3))
    few = DataLoader(rows, batch_size=4, sampler=SubsetRandomSampler(range(10)))
    cut = {"batch_size": 4, "drop_last": True}
    ten = TensorDataset(torch.zeros(10, 3))
    for loader, size in [
        (few, 10),
        (DataLoader(rows, batch_size=4), 1000),
        (DataLoader(ten, **cut), 8),
        (DataLoader(ten, shuffle=True, **cut), 10),  # every datum has its turn
        (DataLoader(ten, batch_sampler=[[0, 1], [2]]), 10),
    ]:
        assert batches_of("data", loader, training=True).size == size


def test_losses_are_nats_per_datum_and_weigh_a_smaller_last_batch_right():
    """With no step (learning rate 1e-300) and a point guide it is the loss of the full batch."""
    losses = []
    for size in (10, 4, 3, 1):
        (pair,) = made(lambda: build("deterministic"))
        losses += quiet(*pair, data(), num_epochs=1, batch_size=size, learning_rate=1e-300).losses
    assert losses == pytest.approx([losses[0]] * 4, rel=1e-12)


def test_modes_come_back_and_training_mode_is_on_inside():
    """Validation data are looked at in evaluation mode, in minibatches of no other size."""
    seen = []
    model, guide = build()
    model.decoder.register_forward_hook(lambda m, _, out: seen.append((m.training, len(out))))
    model.eval()
    guide.encoder.eval()
    quiet(model, guide, data(6), num_epochs=1, batch_size=3, validation=data(7))
    assert seen[-5:] == [(True, 3), (True, 3), (False, 3), (False, 3), (False, 1)]
    assert not model.training and not guide.encoder.training and guide.training


def test_history_is_a_table_and_progress_shows_the_label_and_the_losses(capsys):
    told = {"num_epochs": 3, "validation": data(2), "progress": "my fit"}
    history = quiet(*build(), data(6), **told).history
    assert list(history) == ["epoch", "loss", "validation_loss"]
    assert {len(column) for column in history.values()} == {3}
    shown = capsys.readouterr().err
    assert all(word in shown for word in ("my fit", "loss=", "validation="))


def test_an_optimizer_may_ask_for_the_loss_several_times_in_a_step():
    told = {"num_epochs": 5, "learning_rate": 0.01, "optimizer": torch.optim.LBFGS}
    losses = quiet(*build("deterministic"), data(8), **told).losses
    assert losses[-1] < losses[0]


def test_nothing_to_train_with_an_idle_encoder_or_no_parameter_at_all():
    prior = dist.Normal(torch.zeros(3), 1.0).to_event(1)
    model = local(prior, lambda z: dist.Normal(z, 1.0).to_event(1))
    for family, encoder in ((families.noise_only, mlp(3, 8)), (families.zero, nn.Identity())):
        guide = FamilyGuide(model, family, encoder)
        with traceless(guide, moved=False):
            result = quiet(model, guide, data(6), num_epochs=2)
        assert all(map(math.isfinite, result.losses))


# --------------------------------------------------------- everything that moves, and the way back


def test_early_stopping_goes_back_to_the_best_epoch_with_its_buffers():
    """What is left gives the lowest validation loss, which running statistics have a part in."""
    ((model, guide),) = made(lambda: build("deterministic", encoder=Normed(dropout=False)))
    told = {"num_epochs": 400, "learning_rate": 0.05, "validation": data(20)[6:], "patience": 5}
    result = quiet(model, guide, data(20)[:6], **told)
    best = int(np.argmin(result.validation_losses))
    assert result.best_epoch == best and len(result.losses) == best + 6 < 400
    assert held_out(model, guide, data(20)[6:]) == pytest.approx(
        result.validation_losses[best], rel=1e-12
    )


@pytest.mark.parametrize("steps", [1, 1000])
def test_divergence_names_step_and_term_and_keeps_finite_numbers(steps, monkeypatch):
    monkeypatch.setattr("ppvae.training.execution.STAGE", steps)
    norm = nn.Sequential(nn.Linear(2, 4), nn.BatchNorm1d(4), nn.Linear(4, 3))
    ((model, guide),) = made(lambda: build(likelihood=likelihoods.Poisson()))
    model.decoder = norm
    guide.encoder[0].eval()  # a mode of its own
    x, told = data(20).abs().round(), {"learning_rate": 1e6, "precision": "medium"}
    fails = pytest.raises(Diverged, match=r"(?m)is \w+ at step \d+: the .*of step \d+$")
    with traceless(model, guide), fails:
        quiet(model, guide, x, num_epochs=200, **told)
    assert all(value.isfinite().all() for value in values(model, guide))
    assert norm[1].num_batches_tracked > 0
    assert math.isfinite(held_out(model, guide, x))


def test_divergence_goes_back_to_a_step_of_the_last_ten():
    """The loss is not finite at step 25: what is there is what 20 steps had made."""

    def objective(model, guide, *args, size=None, step=0):
        return negative_elbo(model, guide, *args, size=size) / (step < 25)

    told = {"batch_size": 5, "learning_rate": 0.01}
    (one,), (other,) = (made(lambda: build(encoder=Normed())) for _ in range(2))
    with pytest.raises(Diverged, match="(?m)the loss is inf at step 25: .*step 20$"):
        quiet(*one, data(), num_epochs=20, objective=objective, **told)
    quiet(*other, data(), num_epochs=10, **told)
    assert same(values(*one)[:-3], values(*other)[:-3])  # parameters
    assert one[1].encoder[1].num_batches_tracked == 21  # which the run of step 20 has seen


def test_divergence_names_the_replicate_and_keeps_finite_numbers():
    """The square of a weight, by a draw above one, is infinite; running statistics stay finite."""
    pairs = made(lambda: build(encoder=Normed(dropout=False)), 3)
    pairs[1][0].decoder[2].weight.data.fill_(1e155)
    fails = pytest.raises(
        Diverged, match="(?m)the loss of replicate 1 is inf at step 0: .*of step 0$"
    )
    with traceless(*(p for pair in pairs for p in pair), moved=False), fails:
        run(fit_replicates, pairs, data(), num_epochs=1, seeds=[1, 2, 3])


@pytest.mark.parametrize(("train", "whose"), [(fit, ""), (fit_replicates, " of replicate 1")])
def test_a_gradient_that_is_not_finite_is_divergence(train, whose):
    pairs = made(lambda: build(encoder=NanSlope()), 2)
    pairs[1][1].encoder.weight.data.zero_()
    message = f"a parameter{whose} is not finite at step 1: the gradient of the guide's parameter"
    with traceless(*pairs[0], *pairs[1], moved=False), pytest.raises(Diverged, match=message):
        run(train, pairs, data(6), num_epochs=1)


@pytest.mark.parametrize("train", [fit, fit_replicates])
def test_an_error_in_a_step_puts_parameters_and_buffers_back(train):
    class Fails(torch.optim.SGD):
        def step(self, closure=None):
            super().step(closure)
            self.steps = getattr(self, "steps", 0) + 1
            if self.steps == 4:
                raise KeyError("mine")

    pairs = made(lambda: build(encoder=Normed()), 2)
    pairs[1][1].encoder.eval()
    told = {"batch_size": 4, "num_epochs": 3, "optimizer": Fails, "precision": "medium"}
    with traceless(*pairs[0], *pairs[1], moved=False), pytest.raises(KeyError, match="mine"):
        run(train, pairs, data(), **told)


def test_a_snapshot_holds_all_that_moves_and_what_is_replaced():
    class Replaces(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("count", torch.zeros(2))
            self.register_buffer("none", None)
            self.register_buffer("wide", torch.zeros(1).expand(3))

    module, parameter = Replaces(), nn.Parameter(torch.ones(2))
    snapshot = Snapshot([parameter], [module, module])
    module.count = module.count + 1.0  # not written to, but another tensor
    snapshot.take(7)
    module.count = module.count + 1.0
    parameter.data += 3.0
    snapshot.put_back()
    assert snapshot.step == 7 and len(snapshot.values) == 3
    assert module.count.tolist() == [1.0, 1.0] and parameter.tolist() == [1.0, 1.0]
    Snapshot([]).take(1)  # of a family without channels


def test_gammas_have_the_distribution_of_a_run():
    """`student_t` draws other numbers than a run would: the first losses have the same mean.

    A step so small that nothing moves, and 50 epochs of one batch. Means within five standard
    errors; a standard deviation of 50 numbers has an error of 10 %.
    """
    told = {"num_epochs": 50, "learning_rate": 1e-300, "progress": False}
    built = [made(lambda: build("student_t"))[0] for _ in range(2)]
    results = fit_replicates(built, data(100), seeds=[1, 2], **told)
    single = fit(*built[0], data(100), seed=3, **told).losses
    assert min(abs(a - b) for a, b in zip(*(r.losses for r in results), strict=True)) > 0
    for result in results:
        error = np.hypot(np.std(result.losses), np.std(single)) / np.sqrt(50)
        assert abs(np.mean(result.losses) - np.mean(single)) < 5 * error
        assert 0.5 < np.std(result.losses) / np.std(single) < 2.0


def test_dropout_is_trained_with_and_differs_between_replicates():
    encoder = nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.5))
    pairs = [made(lambda: build(encoder=copy.deepcopy(encoder)))[0] for _ in range(3)]
    with traceless(*pairs[0], *pairs[1]):
        one, two = run(fit_replicates, pairs[:2], data(), num_epochs=3, learning_rate=0.01)
    assert one.execution == two.execution == "staged"
    assert all(abs(a - b) > 1e-3 for a, b in zip(one.losses, two.losses, strict=True))
    alone = quiet(*pairs[2], data(), num_epochs=3, learning_rate=0.01)  # by the seed of the first
    assert alone.losses == pytest.approx(one.losses, rel=1e-9)


def rows_in_steps(x):
    """Two plates of data; in a minibatch of two rows both are of that length."""
    with pyro.plate("steps", 2, dim=-2), pyro.plate("rows", len(x), dim=-1):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 0.5), obs=x[:, :2].T)


def test_the_plate_of_the_data_is_found_once():
    """Six rows in minibatches of four and two: with a step of nothing, the loss of all at once."""
    seen, losses = [], []

    def objective(model, guide, *args, size=None, plate=None, step=0):
        seen.append(plate)
        return negative_elbo(model, guide, *args, size=size, plate=plate)

    for told in ({"batch_size": 6}, {"batch_size": 4}, {"batch_size": 4, "plate": "rows"}):
        guide = FamilyGuide(rows_in_steps, families.deterministic, encoder=mlp(3, 4))
        for p in guide.parameters():
            nn.init.constant_(p, 0.3)
        told |= {"num_epochs": 1, "learning_rate": 1e-300, "validation": data(2)}
        result = quiet(rows_in_steps, guide, data(6), objective=objective, **told)
        losses.append((result.losses[0], result.validation_losses[0]))
    assert losses[1] == pytest.approx(losses[0], rel=1e-12) and losses[2] == losses[1]
    assert set(seen) == {"rows"}
    seen.clear()
    quiet(*function(), data(6), num_epochs=1, objective=objective)
    assert set(seen) == {None}  # where the rule cannot go wrong nothing is said
    plain = lambda *args, size, step: negative_elbo(*args, size=size)  # noqa: E731
    quiet(rows_in_steps, guide, data(6), num_epochs=1, objective=plain)


def with_keywords(x, weight=None, *, power=1, shift=0.0):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        fn = dist.Normal(z.sum(-1) ** power + shift, weight)
        pyro.sample("x", fn, obs=x[:, 0])


class Encoder(nn.Linear):
    def __init__(self):
        super().__init__(3, 4)

    def forward(self, x, weight=None, power=1, shift=0.0):
        return super().forward(x)


def guide_of(model, *args, value=0.1):
    """A guide of the same numbers every time."""
    guide = FamilyGuide(model, families.mean_scale, encoder=Encoder()).setup(*args)
    for p in guide.parameters():
        nn.init.constant_(p, value)
    return guide


@pytest.mark.parametrize("steps", [1, 1000])
def test_keyword_arguments_are_cut_with_the_data_or_passed(steps, monkeypatch):
    """The same as a second tensor of data; a number and a tensor of another length stay whole."""
    monkeypatch.setattr("ppvae.training.execution.STAGE", steps)
    x, weight, shift = data(), data()[:, 1].exp(), torch.tensor(0.5)
    told = {"batch_size": 4, "num_epochs": 2, "learning_rate": 0.01}

    def given(x, w):
        with_keywords(x, w, power=2, shift=shift)

    losses = quiet(given, guide_of(given, x, weight), (x, weight), **told).losses
    kwargs = {"power": 2, "weight": weight.numpy(), "shift": shift}
    pairs = [(with_keywords, guide_of(with_keywords, x, weight, value=0.1 * k)) for k in (1, 2)]
    assert quiet(*pairs[0], x, kwargs=kwargs, **told).losses == losses
    pairs[0] = with_keywords, guide_of(with_keywords, x, weight)
    told |= {"seeds": [1, 2], "progress": False}
    results = fit_replicates(pairs, x, kwargs=kwargs, **told)
    assert results[0].losses == pytest.approx(losses, rel=1e-9)
    assert results[0].execution == "staged" and results[1].losses != results[0].losses


def test_validation_data_have_the_keyword_arguments_that_are_passed():
    guide = FamilyGuide(with_keywords, families.mean_scale, encoder=Encoder())
    told = {"num_epochs": 1, "validation": data(4)}
    quiet(with_keywords, guide, data(), kwargs={"weight": torch.ones(())}, **told)
    with pytest.raises(ValueError, match="kwargs: expected no tensor with as many rows.* valid"):
        quiet(with_keywords, guide, data(), kwargs={"weight": torch.ones(10)}, **told)


# ----------------------------------------------------------------------------- what is refused


X = np.zeros((6, 3))
INFINITE = np.where(np.eye(6, 3) > 0, np.inf, 0.0)
HALF = np.where(np.arange(6)[:, None] == 2, 0.5, X)
EMPTY = TensorDataset(torch.zeros(0, 3, dtype=torch.float64))
LOADER = DataLoader(Items(X), batch_size=4)
NO_BATCH = DataLoader(Items(X), batch_size=7, drop_last=True, shuffle=True)
NEGATIVE = ELBO(beta=lambda step: -1.0)

NO_GROUPS = lambda parameters, lr: SimpleNamespace(step=print)  # noqa: E731

#: data, options, and what the error says; both for `fit` and for `fit_replicates`
BAD = {
    "infinite": (INFINITE, {}, "data: expected finite numbers, or NaN, got 3"),
    "one by one": (Items(X + 1, [5]), {"batch_size": 3}, "data: .* numbers, or NaN, got 3"),
    "empty": (X[:0], {}, "data: expected at least one datum, got none"),
    "empty set": (EMPTY, {}, "data: expected at least one datum, got none"),
    "no batch": (NO_BATCH, {}, "data: expected a DataLoader with at least one batch, got none"),
    "nothing": ((), {}, "data: expected at least one tensor or array, got none"),
    "list of text": (["a"], {}, "data: expected tensors, arrays"),
    "text": (np.array([["a"]]), {}, "data: .* arrays of numbers.* got <U1 ndarray"),
    "lengths": ((X, X[:3]), {}, r"data: expected equal first dimensions, got \[3, 6\]"),
    "number": ((X, X, X), {}, r"data: expected tensors for the arguments \(x.*of the model, got 3"),
    "width": (X[:, :2], {}, r"encoder: expected a module that takes \[\(6, 2\)\]"),
    "batch 0": (X, {"batch_size": 0}, "batch_size: .* at least 1, got 0"),
    "batch 7": (X, {"batch_size": 7}, "batch_size: expected at most 6.* got 7"),
    "batch 2.5": (X, {"batch_size": 2.5}, "batch_size: .* got 2.5"),
    "loader": (LOADER, {"batch_size": 2}, "batch_size: expected None with a DataLoader, got 2"),
    "epochs": (X, {"num_epochs": 0}, "num_epochs: .* at least 1, got 0"),
    "rate": (X, {"learning_rate": -1.0}, "learning_rate: .* got -1.0"),
    "optimizer": (X, {"optimizer": 3}, "optimizer: .* or function, got int"),
    "objective": (X, {"objective": ELBO}, "objective: expected a function, such as ELBO"),
    "no loss": (X, {"objective": lambda *args, **_: 1.0}, "objective: .* tensor, got float"),
    "no optimizer": (X, {"optimizer": NO_GROUPS}, "optimizer: .* an optimizer, got namespace"),
    "beta": (X, {"objective": NEGATIVE}, "beta: .* at least 0, got -1.0"),
    "compile": (X, {"compile": 1}, 'compile: expected "auto", True or False, got 1'),
    "compile text": (X, {"compile": "yes"}, "compile: .*, got 'yes'"),
    "precision": (X, {"precision": "low"}, "precision: expected one of .* got 'low'"),
    "plate": (X, {"plate": "rows"}, r"plate: expected one of \['data'\], got 'rows'"),
    "kwargs": (X, {"kwargs": 3}, "kwargs: expected a mapping from names to arguments"),
    "rows": (Items(X), {"kwargs": {"w": X[:, 0]}}, "kwargs: expected no tensor with as many rows"),
}
TYPES = {
    "list of text",
    "text",
    "number",
    "optimizer",
    "objective",
    "kwargs",
    "no loss",
    "no optimizer",
}


@pytest.mark.parametrize("train", [fit, fit_replicates])
@pytest.mark.parametrize("name", BAD)
def test_bad_input_changes_nothing(name, train):
    x, options, message = BAD[name]
    pairs = made(build, 2)
    fails = pytest.raises(TypeError if name in TYPES else ValueError, match=message)
    with traceless(*pairs[0], *pairs[1], moved=False), fails:
        run(train, pairs, x, **{"num_epochs": 2, **options})


def shared():
    first, second = made(build, 2)
    second[1].encoder = first[1].encoder
    return [first, second]


def flat():
    """A posterior that is improper if two columns are the same."""
    models = [LinearRegression(3, weight=None, noise=1.0) for _ in range(2)]
    return [(model, FamilyGuide(model, families.mean_scale)) for model in models]


def two():
    return made(build, 2)


@pytest.mark.parametrize(
    ("pairs", "told", "error", "message"),
    [
        (list, {}, ValueError, "pairs: expected at least one model and its guide, got none"),
        (lambda: [1, 2], {}, TypeError, "pairs: expected pairs of a model and its guide"),
        (shared, {}, ValueError, r"pairs: .* shape \(4, 3\) that pair 1 shares with pair 0"),
        (two, {"num_epochs": None}, ValueError, "num_epochs: expected a number: a training that"),
        (flat, {"data": (torch.ones(10, 3), torch.ones(10))}, ValueError, "a proper prior"),
        (two, {"seeds": [1]}, ValueError, "seeds: expected 2, one for each pair, got 1"),
        (two, {"seeds": [None, None]}, TypeError, "seeds: expected a whole number"),
        (two, {"objective": [ELBO()] * 3}, ValueError, "objective: expected 2, .*, got 3"),
        (two, {"objective": [ELBO(), 3]}, TypeError, "objective: expected a function"),
    ],
)
def test_bad_arguments_move_nothing(pairs, told, error, message):
    pairs, told = pairs(), {"data": data(), **told}
    programs = [program for pair in pairs if isinstance(pair, tuple) for program in pair]
    with traceless(*programs, moved=False), pytest.raises(error, match=message):
        run(fit_replicates, pairs, **{"num_epochs": 3, **told})


def sweep():
    """Families, sizes of the latent and what is frozen, in turn; two pairs are of equal make."""
    families_and_sizes = [("mean_scale", 2), ("shared_scale", 2), ("mean_scale", 3)]
    pairs = []
    for seed, (family, latent) in enumerate([*families_and_sizes, *[("mean_scale", 2)] * 2]):
        torch.manual_seed(seed)
        model = VAE(nn.Linear(latent, 3), latent, likelihoods.Normal(0.5))
        pairs.append((model, FamilyGuide(model, FAMILIES[family], encoder=nn.Linear(3, 4))))
    pairs[-1][1].encoder.bias.requires_grad_(False)
    return pairs


def test_pairs_of_different_make_are_trained_in_groups(tmp_path):
    """In the order of their first ones, and each as alone; of one make are 0 and 3."""
    pairs, rows, file = sweep(), [], tmp_path / "run.pt"
    told = {"num_epochs": 3, "learning_rate": 0.01, "batch_size": 4, "progress": False}
    more = {"callback": rows.append, "checkpoint": file, "seeds": range(5)}
    results = fit_replicates(pairs, data(), **told, **more)
    lengths = [len(row["loss"]) if isinstance(row["loss"], list) else 1 for row in rows]
    assert lengths == [2] * 3 + [1] * 9
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"run-{k}.pt" for k in (0, 1, 2, 4)]
    for seed, (pair, result, own) in enumerate(zip(pairs, results, sweep(), strict=True)):
        alone = fit(*own, data(), seed=seed, **told)
        assert result.losses == pytest.approx(alone.losses, rel=1e-9)
        assert same(values(*pair), values(*own), 1e-9)


def test_a_constant_whose_elements_share_memory_is_no_value_to_give_back():
    """The scale of this prior is one number, expanded; validation runs the programs themselves."""
    told = {"num_epochs": 2, "learning_rate": 0.01, "progress": False}

    def pairs():
        built = []
        for seed in range(2):
            torch.manual_seed(seed)
            prior = dist.Normal(torch.zeros(2), 3.0).to_event(1)
            model = VAE(nn.Linear(2, 3), 2, likelihoods.Normal(0.5), prior)
            built.append((model, FamilyGuide(model, families.mean_scale, nn.Linear(3, 4))))
        return built

    results = fit_replicates(pairs(), data(), seeds=[0, 1], validation=data(5), **told)
    for seed, (result, own) in enumerate(zip(results, pairs(), strict=True)):
        alone = fit(*own, data(), seed=seed, validation=data(5), **told)
        assert result.execution == "staged"
        assert result.losses == pytest.approx(alone.losses, rel=1e-9)
        assert result.validation_losses == pytest.approx(alone.validation_losses, rel=1e-9)


@pytest.mark.parametrize("train", [fit, fit_replicates])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"patience": 2}, "patience: .*validation"),
        ({"patience": 0, "validation": X}, "patience: .* at least 1, got 0"),
        ({"validation": INFINITE}, "validation: expected finite"),
        ({"validation": X[:, :2]}, r"encoder: .*\(6, 2\)"),
        ({"validation": DataLoader(EMPTY)}, "validation: .* at least one datum, got none"),
        ({"validation": HALF}, "validation: .* of 'x'.* got 1 of 6 .* outside, first in row 2"),
        ({"data": HALF}, "data: .* of 'x'.* got 1 of 6 data outside, first in row 2"),
    ],
)
def test_bad_validation_and_data_outside_of_the_support_change_nothing(options, message, train):
    pairs = made(lambda: build(likelihood=likelihoods.Bernoulli()), 2)
    with traceless(*pairs[1], moved=False), pytest.raises(ValueError, match=message):
        run(train, pairs, **{"data": X, "num_epochs": 2, **options})


@pytest.mark.parametrize("swapped", [True, False])
def test_a_model_that_observes_nothing_is_refused(swapped):
    """Model and guide swapped, or a forgotten `obs=`."""

    def forgets(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z.sum(-1), 0.5))

    pair = tuple(reversed(build())) if swapped else function(forgets)
    for train in (fit, fit_replicates):
        with pytest.raises(ValueError, match="model: expected observed sites, got none"):
            run(train, [pair, pair], data(6), num_epochs=1)


def test_what_is_never_observed_is_told():
    """Nothing is learned of a column without a value, and nothing at all without any."""
    x = torch.randn(12, 3)
    pair = build()
    with pytest.raises(ValueError, match="data: expected observed values, got nothing but missing"):
        quiet(*pair, torch.full_like(x, math.nan), num_epochs=1)
    x[:, 1], x[0, 2] = math.nan, math.nan
    words = "data: 1 of 3 columns, first 1, have no observed value, so that nothing is learned"
    with pytest.warns(UserWarning, match=words) as caught:
        quiet(*pair, x, num_epochs=1)
    assert caught[0].filename == quiet.__code__.co_filename


def chain(x, seen, keep):
    """Steps of which some are masked; what comes after sees them, unless it is kept from it."""
    z = torch.zeros(len(x))
    with pyro.plate("data", len(x)):
        for step in range(3):
            with poutine.mask(mask=seen[:, step]):
                new = pyro.sample(f"z_{step}", dist.Normal(z, 1.0))
                pyro.sample(f"x_{step}", dist.Normal(new, 0.5), obs=x[:, step])
            z = torch.where(seen[:, step], new, z) if keep else new


def test_a_masked_latent_that_counts_elsewhere_is_refused():
    """Its entropy is masked, too: it would shrink to the point where the data are most likely."""
    words = r"^model: expected latents that a mask leaves out .*, got 'w', on which other densities"

    def flat(x):
        with poutine.mask(mask=False):
            w = pyro.sample("w", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(w, 1.0), obs=x)

    x = torch.randn(6)
    guide = FamilyGuide(flat, "mean_scale").setup(x)
    for call in (quiet, evaluate):
        with pytest.raises(ValueError, match=words):
            call(flat, guide, x)

    x, seen = torch.randn(5, 3), torch.ones(5, 3, dtype=torch.bool)
    ended = seen.clone()
    ended[2:, 2] = False  # nothing comes behind
    gap = seen.clone()
    gap[2:, 1] = False
    for mask, keep, refused in [(ended, False, False), (gap, True, False), (gap, False, True)]:
        guide = FamilyGuide(partial(chain, keep=keep), "mean_scale").setup(x, mask)
        with pytest.raises(ValueError, match="got 'z_1'") if refused else nullcontext():
            evaluate(guide.model, guide, x, mask, num_samples=4, progress=False)


@pytest.mark.parametrize(
    ("means", "events", "column", "fits"),
    [
        ("(n,)", 0, False, True),
        ("(n, 1)", 0, False, False),  # all data against all means
        ("(n,)", 0, True, False),
        ("(n, 1)", 1, False, False),  # one datum for all of them
        ("(n, 1)", 1, True, True),
        ("(n,)", 1, False, False),  # all data in each member of the plate
    ],
)
def test_data_and_means_that_are_broadcast_are_refused(means, events, column, fits):
    X = torch.randn(12, 2)
    y = X.sum(1)

    def lines(X, y):
        w = pyro.sample("w", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        mean = X @ w
        mean = mean if means == "(n,)" else mean[:, None]
        with pyro.plate("data", len(X)):
            pyro.sample("y", dist.Normal(mean, 1.0).to_event(events), obs=y)

    args = X, y[:, None] if column else y
    guide = FamilyGuide(lines, "full_rank").setup(*args)
    for call in (quiet, evaluate):
        told = {"data": args} if call is quiet else {"num_samples": 4}
        given = () if call is quiet else args
        match = r"^model: expected data and distribution at 'y' of one shape, got data of shape"
        with nullcontext() if fits else pytest.raises(ValueError, match=match):
            call(lines, guide, *given, **told, progress=False)
    if fits:
        exact = dist.MultivariateNormal(torch.zeros(12), torch.eye(12) + X @ X.T).log_prob(y)
        found = evaluate(lines, guide, *args, progress=False)
        assert float(found.total_elbo) == pytest.approx(exact.item())


def test_one_datum_for_all_and_no_plate_at_all_are_no_fault():
    """As in survival: what is censored is observed to be 1."""

    def model(x):
        w = pyro.sample("w", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(w, 1.0), obs=x)
        with pyro.plate("data", len(x)):
            pyro.sample("c", dist.Bernoulli(torch.full((len(x),), 0.5)), obs=torch.tensor(1.0))

    x = torch.randn(6)
    guide = FamilyGuide(model, "full_rank")
    quiet(model, guide, x)
    exact = dist.MultivariateNormal(torch.zeros(6), torch.eye(6) + 1).log_prob(x)
    found = evaluate(model, guide, x, progress=False)
    assert float(found.total_elbo) == pytest.approx(exact.item() - 6 * math.log(2))


def test_the_model_and_the_data_agree_on_their_number():
    """Of latents of all data; those of each datum do not depend on it."""

    def mean(x):
        w = pyro.sample("w", dist.Normal(0.0, 1.0))
        with pyro.plate("data", 1000, subsample=torch.arange(len(x))):
            pyro.sample("x", dist.Normal(w, 1.0), obs=x)

    def each(x):
        with pyro.plate("data", 1000, subsample=torch.arange(len(x))):
            w = pyro.sample("w", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(w, 1.0), obs=x[:, 0])

    words = "model: expected a plate 'data' of 200 members, as there are data, got one of 1000"
    for told in ({}, {"batch_size": 50}):
        with pytest.raises(ValueError, match=words):
            quiet(mean, FamilyGuide(mean, "mean_scale"), torch.randn(200), num_epochs=1, **told)
    quiet(mean, FamilyGuide(mean, "mean_scale"), torch.randn(1000), num_epochs=1, batch_size=50)
    guide = FamilyGuide(each, "mean_scale", nn.Linear(1, 4))
    quiet(each, guide, torch.randn(200, 1), num_epochs=1)


def test_nothing_can_be_trained_in_inference_mode():
    pair = build()
    with torch.inference_mode(), pytest.raises(ValueError, match="outside of torch.inference_mode"):
        quiet(*pair, data(6))


def test_modules_that_do_not_fit_are_named():
    model, guide = build()
    guide.encoder.register_forward_hook(lambda module, args, output: output[:4])
    with pytest.raises(ValueError, match=r"encoder: .*batch of the arguments \[\(6, 3\)\], got"):
        quiet(model, guide, data(6))
    model, guide = build()
    model.decoder = mlp(2, 8, out=5)
    with pytest.raises(ValueError, match=r"decoder: expected output of shape \(6, 3\), as x"):
        quiet(model, guide, data(6))


def test_the_quasi_newton_method_takes_a_plate_and_starts_at_the_mode():
    """Where the parameters were before is of no matter, also where they were not finite."""
    x, model = data(), LinearRegression(3, noise=0.7)
    guide = FamilyGuide(model, families.full_rank)
    args = (x, x.sum(-1))
    result = quiet(model, guide, args, num_epochs=5, plate="data")
    assert result.method == "L-BFGS" and result.converged
    guide.heads["weight"].loc.raw.data.fill_(math.nan)
    assert quiet(model, guide, args, plate="data").losses == result.losses


@pytest.mark.parametrize(("rows", "steps"), [(1024, 1), (1025, 9)])
def test_an_encoder_sees_more_than_1024_data_in_minibatches_of_128(rows, steps):
    (pair,) = made()
    assert quiet(*pair, torch.randn(rows, 3), num_epochs=1).num_steps == steps


@pytest.mark.parametrize("missing", ["data", "validation"])
def test_numbers_may_be_missing_in_one_of_data_and_validation(missing):
    x = {"data": data(), "validation": data(6)}
    x[missing][0, 0] = torch.nan
    (pair,) = made()
    result = quiet(*pair, x["data"], validation=x["validation"], num_epochs=1)
    assert math.isfinite(result.losses[0]) and math.isfinite(result.validation_losses[0])


@pytest.mark.filterwarnings("ignore::ppvae.NotConverged")
def test_a_training_that_ends_by_itself_is_staged_and_never_compiled(monkeypatch):
    """Nobody knows that it is long: it has at most eight steps, and five would be compiled."""
    for name, steps in (("fitting.COMPILE", 5), ("execution.COMPILE", 5), ("execution.STAGE", 1)):
        monkeypatch.setattr(f"ppvae.training.{name}", steps)
    (pair,) = made()
    assert quiet(*pair, data(), max_epochs=8).execution == "staged"
