"""Replicates: each is its own run, whatever trains beside it; and no trace left."""

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from cases import cases
from pairs import (
    KINDS,
    NanSlope,
    Normed,
    branch,
    build,
    data,
    function,
    made,
    one_warning,
    same,
    traceless,
    values,
    written,
)
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from ppvae import VAE, FamilyGuide, concat_chains, families, fit, from_pyro_svi, likelihoods
from ppvae import fit_replicates as together
from ppvae.nn import mlp
from ppvae.objectives import ELBO, IWAE, warm_up
from ppvae.regression import LinearRegression
from ppvae.training import Diverged

#: torch, on itself, while it compiles; an error would be taken for one of the compiler
pytestmark = pytest.mark.filterwarnings("ignore:.*torch._prims_common.check.*:FutureWarning")


def options(told):
    defaults = {"num_epochs": 3, "batch_size": 4, "learning_rate": 0.01, "compile": False}
    return {**defaults, "progress": False, **told}


def hold(build_one, x, *, count=2, objective=None, execution="staged", bound=1e-9, **told):
    """Trains replicates, and each alone: the same losses, parameters and buffers."""
    built, alone = made(build_one, count), made(build_one, count)
    goals = objective if isinstance(objective, list) else [objective] * count
    seeds = [11 + 5 * k for k in range(count)]
    pairs = [(model, guide) for model, guide, *_ in built]
    with traceless(*(program for parts in built for program in parts)):
        results = together(pairs, x, seeds=seeds, objective=objective, **options(told))
    singles = []
    for result, parts, own, seed, goal in zip(results, built, alone, seeds, goals, strict=True):
        before = values(*own)
        single = fit(*own[:2], x, seed=seed, objective=goal, **options({**told, "compile": False}))
        assert result.execution == execution
        assert result.losses == pytest.approx(single.losses, rel=bound)
        after = values(*own)  # late parameters are made in the run
        assert len(before) < len(after) or not same(before, after, 1e-4)
        assert same(values(*parts), after, bound)
        blank = {"losses": [], "seconds": 0.0, "execution": ""}
        assert result._replace(**blank) == single._replace(**blank)
        singles.append(single)
    for one, other in pairwise(singles):
        assert one.losses != pytest.approx(other.losses, rel=1e-3)
    return results, pairs


# --------------------------------------------------------------------- each is as its own run


def falling(parameters, lr):
    """A schedule, as that of the ladder."""
    adam = torch.optim.Adam(parameters, lr=lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(adam, 9)
    adam.register_step_post_hook(lambda *_: schedule.step())
    return adam


def sgd(parameters, lr):
    return torch.optim.SGD(parameters, lr=lr, momentum=0.9, weight_decay=0.1)


def learned():
    return likelihoods.Normal(torch.ones(3), learned=True)


AUTOENCODERS: dict[str, Any] = {
    "deterministic": (likelihoods.Bernoulli, {}),
    "mean_scale": (learned, {"batch_size": None, "num_epochs": 9, "optimizer": falling}),
    "full_rank": (likelihoods.Poisson, {"optimizer": sgd}),
    "low_rank": (learned, {"objective": IWAE(3), "num_epochs": 2}),
    "flow": (None, {"objective": ELBO(free_bits=0.3, num_samples=2), "num_epochs": 2}),
}


@pytest.mark.parametrize("family", AUTOENCODERS)
def test_an_autoencoder_of_every_sort(family):
    """Batches of four: the last has two; or one batch of all, which is one tensor for all."""
    likelihood, told = AUTOENCODERS[family]
    x = (data() > 0).double() if likelihood is likelihoods.Bernoulli else data().abs().round()
    hold(lambda: build(family, likelihood and likelihood()), x, **told)


@pytest.mark.parametrize(
    ("name", "family"),
    [
        ("positive", "mean_scale"),
        ("left of pixels", "mean_only"),
        ("told rows", "mean_scale"),
        ("regression", "mean_scale"),
    ],
)
def test_several_sites_plates_and_arguments(name, family):
    def one():
        case = cases()[name]
        return case.model, FamilyGuide(case.model, KINDS[family], encoder=case.encoder)

    hold(one, cases()[name].args, num_epochs=2)


def test_functions_that_call_modules_of_their_own():
    hold(written, data())


def test_running_statistics_are_those_of_the_own_run():
    hold(lambda: build(encoder=Normed(dropout=False).eval()), data())  # a mode of its own


def test_data_from_a_loader():
    torch.manual_seed(0)
    hold(build, DataLoader(TensorDataset(data()), batch_size=4, shuffle=True), batch_size=None)


def test_compiled_with_weights_of_the_rate_and_their_chains():
    objective = [ELBO(beta=0.5), ELBO(), ELBO(beta=warm_up(5))]
    told = {"objective": objective, "execution": "compiled", "compile": True, "bound": 1e-8}
    with torch._dynamo.config.patch(error_on_recompile=True):
        results, pairs = hold(build, data(), count=3, **told)
    assert [result.objective for result in results] == objective
    trees = [from_pyro_svi(*pair, data(), num_samples=5) for pair in pairs]
    tree = concat_chains(trees)
    assert tree["posterior"].sizes["chain"] == 3
    for chain, alone in enumerate(trees):
        assert np.array_equal(tree["posterior"].z.values[chain], alone["posterior"].z.values[0])


def test_gammas_have_the_distribution_of_a_run():
    """`student_t` draws other numbers than a run would: the first losses have the same mean.

    A step so small that nothing moves, and 50 epochs of one batch. Means within five standard
    errors; a standard deviation of 50 numbers has an error of 10 %.
    """
    told = options({"num_epochs": 50, "batch_size": None, "learning_rate": 1e-300})
    built = [made(lambda: build("student_t"))[0] for _ in range(2)]
    results = together(built, data(100), seeds=[1, 2], **told)
    single = fit(*built[0], data(100), seed=3, **told).losses
    assert min(abs(a - b) for a, b in zip(*(r.losses for r in results), strict=True)) > 0
    for result in results:
        error = np.hypot(np.std(result.losses), np.std(single)) / np.sqrt(50)
        assert abs(np.mean(result.losses) - np.mean(single)) < 5 * error
        assert 0.5 < np.std(result.losses) / np.std(single) < 2.0


def dropped():
    return build(encoder=nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.5)))


def gammas():
    case = cases()["positive"]
    return case.model, FamilyGuide(case.model, families.student_t, encoder=case.encoder)


@pytest.mark.parametrize("build_one", [dropped, gammas])
def test_noise_of_every_kind_is_trained_with_and_differs_between_replicates(build_one):
    pairs = [made(build_one)[0] for _ in range(2)]
    with traceless(*pairs[0], *pairs[1]):
        one, two = together(pairs, data(), seeds=[1, 2], **options({"batch_size": None}))
    assert one.execution == two.execution == "staged"
    assert all(abs(a - b) > 1e-3 for a, b in zip(one.losses, two.losses, strict=True))


# ---------------------------------------------------------------------- what is trained in turn


ONE_BY_ONE: dict[str, Any] = {
    "branch": (
        lambda: function(branch),
        {},
        "model, guide: cannot be staged: a decision depends on the values of tensors",
    ),
    "kinds": (build, {"objective": [ELBO(), IWAE(2)]}, "objective: they differ in more"),
    "one left": (build, {"batch_size": 3}, "data: a batch of one datum"),
}


@pytest.mark.parametrize("name", ONE_BY_ONE)
def test_what_cannot_be_stacked_is_trained_one_after_the_other(name, capfd):
    build_one, told, message = ONE_BY_ONE[name]
    pairs, alone = made(build_one, 2), made(build_one, 2)
    goals = told.get("objective", [None, None])
    told = options({**told, "objective": goals})
    with (
        traceless(*pairs[0], *pairs[1]),
        one_warning(f"fit_replicates: one after the other; {message}"),
    ):
        results = together(pairs, data(), seeds=[1, 2], **told)
    assert capfd.readouterr() == ("", "")
    for result, pair, goal, seed in zip(results, alone, goals, (1, 2), strict=True):
        single = fit(*pair, data(), seed=seed, **{**told, "objective": goal})
        assert result.losses == single.losses and result.execution == "eager"


def regression():
    model = LinearRegression(3)
    return model, FamilyGuide(model, families.mean_scale)


def test_a_regression_is_fitted_by_the_quasi_newton_method_without_a_word():
    x = data()
    arguments, told = (x, x.sum(-1) + 0.1 * x[:, 0] ** 2), {"batch_size": None, "num_epochs": 10}
    results, _ = hold(regression, arguments, execution="eager", bound=0.0, **told)
    assert {result.method for result in results} == {"L-BFGS"}
    fits = []
    for seeds in (None, None, [1, 1]):  # by default from the stream of the caller
        torch.manual_seed(0)
        pairs = [regression() for _ in range(2)]
        torch.manual_seed(0)
        results = together(pairs, arguments, seeds=seeds, **options(told))
        fits.append([result.losses for result in results])
    assert fits[0] == fits[1] and fits[0][0] != fits[0][1]
    assert fits[2][0] == fits[2][1]


# ----------------------------------------------------------------------------------- refusals


def shared():
    first, second = made(build, 2)
    second[1].encoder = first[1].encoder
    return [first, second]


def different():
    model = VAE(mlp(2, 5, out=3), 2, likelihoods.Normal(0.5))
    return [build(), (model, FamilyGuide(model, families.mean_scale, encoder=mlp(3, 4)))]


def frozen():
    """The same shapes, and other layers that are trained."""
    pairs = made(lambda: build(encoder=mlp(3, 4, 4, 4)), 2)
    for layer, (_, guide) in zip([2, 4], pairs, strict=True):
        guide.encoder[layer].requires_grad_(False)
    return pairs


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
        (different, {}, ValueError, "pairs: .* got other shapes, .* in pair 1 than in pair 0"),
        (frozen, {}, ValueError, "pairs: expected models and guides of the same make"),
        (flat, {"data": (torch.ones(10, 3), torch.ones(10))}, ValueError, "a proper prior"),
        (two, {"seeds": [1]}, ValueError, "seeds: expected 2, one for each pair, got 1"),
        (two, {"seeds": [None, None]}, TypeError, "seeds: expected whole numbers"),
        (two, {"objective": [ELBO()] * 3}, ValueError, "objective: expected 2, .*, got 3"),
        (two, {"objective": [ELBO(), 3]}, TypeError, "objective: expected a function"),
    ],
)
def test_bad_arguments_move_nothing(pairs, told, error, message):
    pairs, told = pairs(), {"data": data(), "seeds": [1, 2], **told}
    programs = [program for pair in pairs if isinstance(pair, tuple) for program in pair]
    with traceless(*programs, moved=False), pytest.raises(error, match=message):
        together(pairs, told.pop("data"), **options(told))


def test_an_error_in_a_step_moves_nothing_and_leaves_no_trace():
    class Fails(torch.optim.SGD):
        def step(self, closure=None):
            super().step(closure)
            self.steps = getattr(self, "steps", 0) + 1
            if self.steps == 4:
                raise KeyError("mine")

    pairs = made(build, 2)
    pairs[1][1].encoder.eval()
    fails = pytest.raises(KeyError, match="mine")
    with traceless(*pairs[0], *pairs[1], moved=False), fails:
        told = options({"optimizer": Fails, "precision": "medium"})
        together(pairs, data(), seeds=[1, 2], **told)


def test_divergence_names_the_replicate_and_keeps_finite_numbers():
    """The square of a weight, by a draw above one, is infinite; running statistics stay finite."""
    pairs = made(lambda: build(encoder=Normed(dropout=False)), 3)
    pairs[1][0].decoder[2].weight.data.fill_(1e155)
    fails = pytest.raises(Diverged, match="the loss of replicate 1 is inf at step 0; .*of step 0$")
    with traceless(*(p for pair in pairs for p in pair), moved=False), fails:
        together(pairs, data(), seeds=[1, 2, 3], **options({}))


def test_a_gradient_that_is_not_finite_is_divergence_of_a_replicate():
    pairs = made(lambda: build(encoder=NanSlope()), 2)
    pairs[1][1].encoder.weight.data.zero_()
    fails = pytest.raises(Diverged, match="parameter of replicate 1 is not finite at step 1")
    with traceless(*pairs[0], *pairs[1], moved=False), fails:
        told = options({"batch_size": None, "num_epochs": 1})
        together(pairs, data(), seeds=[1, 2], **told)
