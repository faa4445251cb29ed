"""A training that diverges says which number overflowed, where it stands, and what to do."""

import re

import pyro
import pyro.distributions as dist
import pytest
import torch
from cases import LONG, cases
from pairs import NanSlope, build, data, made, traceless, written
from pyro import poutine
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from ppvae import FamilyGuide, families, fit, fit_replicates, likelihoods
from ppvae.nn import Log1p, Standardize, mlp
from ppvae.objectives import negative_elbo
from ppvae.training import Diverged

#: torch, on itself, while it compiles
pytestmark = pytest.mark.filterwarnings("ignore:.*torch._prims_common.check.*:FutureWarning")

STANDARDISE = (
    "take ppvae.nn.Standardize.of(data) as the first layer of the encoder, its inverse as the last "
    "layer of the decoder, a likelihood whose scale is in their units"
)
SQUARES = "standardise them beforehand, since their squares overflow"
LIKELIHOOD = "take a likelihood whose scale is in their units"
LOG1P = "take ppvae.nn.Log1p() as the first layer of the encoder"
SLOWER = "the loss was finite at first: take a smaller learning rate"
START = "it was so before any step, by the initial values"
BACK = "parameters and buffers are back at those of step 0"


def said(pair, x, *, moved=False, **told):
    """What the error says; the parameters are those of before."""
    options = {"num_epochs": 3, "seed": 1, "compile": False, "progress": False, **told}
    with traceless(*pair[:2], moved=moved), pytest.raises(Diverged) as caught:
        fit(*pair[:2], x, **options)
    message = str(caught.value)
    assert "\n" not in message
    return message


def with_one(value, row=7, column=1, rows=10):
    x = data(rows)
    x[row, column] = value
    return x


def bounded():
    """Features that no datum can make large."""
    return build(encoder=nn.Sequential(nn.Tanh(), nn.Linear(3, 4)))


def linear(family="mean_scale", weight=1.0):
    """Channels that are sums of the data, times a weight."""
    model, guide = build(family, encoder=nn.Identity())
    for parameter in guide.parameters():
        nn.init.constant_(parameter, weight if parameter.dim() > 1 else 0.0)
    return model, guide


# ---------------------------------------------------------------------------- the model, the guide


#: all data in a step, and in minibatches, of which only the second may overflow; what is compiled
#: tells of it as what is staged does, and the tests of strides hold that
STEPS = [(way, size) for way in ("eager", "staged") for size in (10, 5)]
STEPS += [("replicates", 5)] + [("replicates", 10), ("compiled", 10), ("compiled", 5)] * LONG


@pytest.mark.parametrize(("way", "size"), STEPS)
def test_the_datum_that_overflows_is_named_with_its_row_in_the_data(way, size, monkeypatch):
    """In minibatches it may come in the second step, and stands elsewhere in its minibatch."""
    monkeypatch.setattr("ppvae.training.execution.STAGE", 1 if way == "staged" else 1000)
    x = with_one(1e200)
    if way == "replicates":
        pairs = made(bounded, 2)
        with traceless(*pairs[0], *pairs[1], moved=False), pytest.raises(Diverged) as caught:
            fit_replicates(pairs, x, seeds=[1, 2], num_epochs=1, batch_size=size, progress=False)
        message = str(caught.value)
        assert re.match(r"the loss of replicate \d is inf at step \d: ", message)
    else:
        compile = {"eager": False, "staged": "auto", "compiled": True}[way]
        message = said(made(bounded)[0], x, batch_size=size, compile=compile)
        assert message.startswith("the loss is inf at step ")
    words = "the log density of the model's 'x' is -inf for row 7 of the data, dimension 1, where "
    assert words + "x = 1e+200, loc = " in message and ", scale = 0.5;" in message
    smallest = x.abs().amax(0).min()
    assert f"the columns of the data are of sizes {smallest:.3g} to 1e+200: {SQUARES};" in message
    assert message.endswith(BACK)


def test_the_guide_is_named_where_it_overflows_first():
    message = said(linear(), with_one(1e200), batch_size=5)
    assert (
        "the guide's scale of 'z' is inf for row 7 of the data, dimension 0, the first of 2;"
        in message
    )
    message = said(linear("full_rank"), with_one(1e200))
    assert "the guide's scale_tril of 'z' is inf for row 7 of the data, dimension (0, 0)" in message
    message = said(linear("deterministic", 1e200), with_one(1e200))
    assert "the guide's draw of 'z' is inf for row 7 of the data, dimension 0," in message


def test_the_row_of_a_loader_is_that_of_the_minibatch():
    message = said(linear(), DataLoader(TensorDataset(with_one(1e200)), batch_size=5))
    assert message.startswith("the loss is nan at step 1: ")  # of the second minibatch
    assert "the guide's scale of 'z' is inf for row 2 of the minibatch, dimension 0" in message
    assert "the columns of a minibatch are of sizes " in message


def test_a_divergence_that_overflows():
    """The variance of a scale of 1e200 does."""
    model, guide = build()
    nn.init.constant_(guide.heads["z"].scale.linear.weight, 0.0)
    nn.init.constant_(guide.heads["z"].scale.linear.bias, torch.tensor(1e200).log())
    message = said((model, guide), data())
    start = "the KL divergence of the guide's 'z' from the model's is nan for row 0 of the data, "
    assert start + "dimension 0, the first of all 20, where loc = " in message
    assert f", scale = 1e+200; {START}; {BACK}" in message


def test_a_sum_that_overflows_is_told_by_its_largest_term():
    """Doubles end at 1.8e308; half the square of a datum over 0.1 is 4e307, or 7.2e307."""
    x = torch.full((10, 3), 0.9e153)
    x[7, 1] = 1.2e153
    model, guide = bounded()
    model.likelihood = likelihoods.Normal(0.1)
    message = said((model, guide), x)
    words = "the log density of the model's 'x', the sum of which overflows, is -7.2e+307 for row 7"
    assert words in message
    assert " of the data, dimension 1, where x = 1.2e+153, loc = " in message
    x[7] = 1.2e153  # and this is one datum
    words = "the log density of the model's 'x' is -inf for row 7 of the data; the columns"
    assert words in said((model, guide), x)


def test_the_density_of_a_joint_draw():
    case = cases()["positive"]
    guide = FamilyGuide(case.model, families.full_rank, encoder=case.encoder).setup(*case.args)
    with torch.no_grad():
        guide.heads["joint"].loc.linear.bias[1] = torch.inf
    with pytest.raises(Diverged, match="the guide's loc of the joint draw is inf for row 0 of the"):
        fit(case.model, guide, case.args, num_epochs=1, progress=False)


class Dispersed(nn.Module):
    """Counts, the second of which has a dispersion that overflows."""

    def __init__(self):
        super().__init__()
        self.log_count = nn.Parameter(torch.tensor([0.0, 1e3, 0.0]))

    def forward(self, out):
        return dist.NegativeBinomial(self.log_count.exp(), logits=out)


def test_an_argument_of_the_likelihood():
    message = said(build(likelihood=Dispersed()), data().abs().round())
    words = (
        "the model's total_count of 'x' is inf for row 0 of the data, dimension 1, the first of 10"
    )
    assert message == f"the loss is nan at step 0: {words}; {START}; {BACK}"


def test_single_precision():
    x = data().float()
    pair = [part.float() for part in bounded()]
    message = said(pair, x * torch.tensor([1.0, 1e3, 1e30]).float())
    words = (
        "the log density of the model's 'x' is -inf for row 0 of the data, dimension 2, the first"
    )
    assert f"{words} of 10" in message
    assert SQUARES in message


def test_further_plates_are_named_and_what_is_masked_is_not():
    def model(x):
        with pyro.plate("rows", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            with pyro.plate("steps", 2, dim=-2), poutine.mask(mask=x[:, 2] > 0):
                pyro.sample("x", dist.Normal(z, 0.5), obs=x[:, :2].T)

    x = torch.ones(6, 3)
    x[1, 0] = x[4, 1] = 1e200
    x[1, 2] = -1.0  # masked
    guide = FamilyGuide(model, families.mean_only, encoder=nn.Sequential(nn.Tanh(), mlp(3, 4)))
    guide.setup(x)
    message = said((model, guide), x)
    assert "'x' is -inf for " in message and "where x = 1e+200" in message
    where = message.partition("is -inf for ")[2].partition(", where")[0]
    assert sorted(where.split(", ")) == ["row 4 of the data", "steps 1"]


# --------------------------------------------------------------------------------- the gradient


@pytest.mark.parametrize(
    ("size", "start"),
    [(10, "a parameter is not finite at step 1: "), (5, "the loss is nan at step 1: ")],
)
def test_a_gradient_is_named_with_its_parameter_and_the_operation(size, start):
    """The root of zero: seen after the epoch, or by the loss of the next step."""
    message = said(build(encoder=NanSlope(0.0)), data(), batch_size=size)
    words = (
        "the gradient of the guide's parameter 'encoder.weight' is nan, by the derivative of sqrt"
    )
    assert message.startswith(f"{start}{words}, where the loss is ")
    assert message.endswith(BACK) and SLOWER not in message


def test_parameters_of_plain_functions_are_named():
    pair = written(encoder=NanSlope(0.0))
    message = said(pair, data(), moved=True)
    words = "the gradient of the parameter 'weight' of the called module 0, a NanSlope, is nan, by"
    assert f"{words} the derivative of sqrt" in message

    def model(x):
        shift = pyro.param("user's", torch.zeros(3))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(3), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z + shift.square().sqrt(), 0.5).to_event(1), obs=x)

    guide = FamilyGuide(model, families.mean_scale, encoder=mlp(3, 4))
    with pyro.get_param_store().scope(), pytest.raises(Diverged) as caught:
        fit(model, guide, data(), num_epochs=1, progress=False)
    assert 'the gradient of the parameter "user\'s" is nan, by the derivative of sqrt' in str(
        caught.value
    )


def test_a_parameter_behind_keyword_arguments_has_its_own_name():
    def model(x, *, shift):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z.sum(-1) + shift, 0.5), obs=x[:, 0])

    guide = FamilyGuide(model, families.mean_scale, encoder=NanSlope(0.0)).setup(data(), shift=0.0)
    message = said((model, guide), data(), kwargs={"shift": 1.0})
    assert "the gradient of the guide's parameter 'encoder.weight' is nan, by the" in message


def test_a_step_that_leaves_the_numbers():
    """All gradients are finite, but not times the learning rate."""
    pair = made(bounded)[0]
    told = {"learning_rate": 1e308, "optimizer": torch.optim.SGD}
    message = said(pair, 10 * data(), num_epochs=1, **told)
    assert "'s parameter '" in message
    assert f"inf: its gradient, or the step by it, was not finite; {SLOWER}; {BACK}" in message


# ----------------------------------------------------------------------------------- what to do


@pytest.mark.parametrize("likelihood", [likelihoods.Normal(0.5), likelihoods.Poisson()])
def test_a_learning_rate_that_is_too_large(likelihood):
    message = said(
        build(likelihood=likelihood), data().abs().round(), learning_rate=1e6, num_epochs=50
    )
    assert SLOWER in message and "sizes" not in message


@pytest.mark.parametrize(
    ("size", "unusual"),
    [(29.0, False), (31.0, True), (1 / 29, False), (1 / 31, True), (0.0, False)],
)
def test_only_columns_of_an_unusual_size_are_told_of(size, unusual):
    def objective(model, guide, *args, size=None, step=0):
        return negative_elbo(model, guide, *args, size=size) * torch.nan

    x = torch.tensor([[1.0, size, -1.0], [0.0, -size / 2, 0.5]])
    message = said(build(), x, objective=objective)
    sizes = sorted([1.0, size])
    words = f"the columns of the data are of sizes {sizes[0]:.3g} to {sizes[1]:.3g}: {STANDARDISE}"
    assert (f"; {words}; {BACK}" in message) == unusual
    assert (f"; {START}; {BACK}" in message) != unusual


def test_counts_are_told_of_their_logarithm():
    x = torch.tensor([[1.0, 2.0, 1e6], [0.0, 3.0, 2e6]])

    def counted(first):
        model, guide = linear()
        guide.encoder = first
        model.likelihood = likelihoods.Poisson()
        return model, guide

    message = said(counted(nn.Identity()), x)
    assert f"the columns of the data are of sizes 1 to 2e+06: {LOG1P}; {BACK}" in message
    pair = counted(Log1p())
    nn.init.constant_(pair[1].heads["z"].scale.linear.bias, 800.0)
    message = said(pair, x)
    assert f"; {START}; {BACK}" in message and "sizes" not in message


def test_layers_that_are_there_are_not_advised_and_the_advice_helps():
    """In single precision, where the scale of a guide that is fed with 1e6 overflows."""
    x = (data() * torch.tensor([1.0, 1e3, 1e6])).float()
    reach = f"{x.abs().amax(0).min():.3g} to {x.abs().max():.3g}"
    layer = Standardize.of(x)

    model, guide = (part.float() for part in linear())
    assert f"the columns of the data are of sizes {reach}: {STANDARDISE}; {BACK}" in said(
        (model, guide), x
    )
    guide.encoder = nn.Sequential(layer)
    nn.init.constant_(guide.heads["z"].scale.linear.bias, 100.0)  # another reason to overflow
    words = "take its inverse as the last layer of the decoder, a likelihood whose "
    assert f": {words}" in said((model, guide), x)
    model.decoder = nn.Sequential(model.decoder, layer.inverse)
    assert f": {LIKELIHOOD}; {BACK}" in said((model, guide), x)
    nn.init.zeros_(guide.heads["z"].scale.linear.bias)
    model.likelihood = likelihoods.Normal(layer.scale)
    assert fit(model, guide, x, num_epochs=9, seed=1, progress=False).num_steps == 9


def test_without_an_encoder_the_data_are_to_be_standardised():
    def model(x):
        w = pyro.sample("w", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(w, 1.0), obs=x)

    guide = FamilyGuide(model, families.mean_scale).setup(data()[:, 0])
    message = said((model, guide), with_one(1e200)[:, 1], optimizer=torch.optim.Adam)
    assert "'x' is -inf for row 7 of the data, where x = 1e+200, loc = " in message
    assert f"the columns of the data are of sizes 1e+200 to 1e+200: {SQUARES};" in message


def test_an_objective_of_ones_own():
    def objective(model, guide, *args, size=None, step=0):
        return negative_elbo(model, guide, *args, size=size) / (step < 2)

    message = said(build(), data(), objective=objective, moved=True)
    words = "from the objective, or from a rare draw: guide and model are finite in other draws"
    assert message == f"the loss is inf at step 2: {words}; {SLOWER}; {BACK}"


def test_a_program_that_raises_on_what_is_not_finite():
    class Raises(nn.Linear):
        def forward(self, x):
            if not torch.is_grad_enabled() and not self.weight.isfinite().all():
                raise KeyError("mine")
            return super().forward(x)

    def objective(model, guide, *args, size=None, plate=None, step=0):
        return negative_elbo(model, guide, *args, size=size) + torch.nan

    model, guide = build()
    model.decoder = Raises(2, 3)
    model.decoder.weight.requires_grad_(False).fill_(torch.inf)
    message = said(
        (model, guide), data(), objective=objective, plate="data", moved=True, check_support=False
    )
    assert "the loss is nan at step 0: a run of guide and model raises KeyError: 'mine'" in message


def test_images_outside_of_the_support_are_refused_before_any_step():
    """Before it; or, if that is left out, by Pyro in it, and where it is not finite."""
    x = (255 * data().abs() / 4).round()
    pair = build(likelihood=likelihoods.Bernoulli())
    with traceless(*pair, moved=False):
        with pytest.raises(ValueError, match=r"within the support \(Boolean"):
            fit(*pair, x, num_epochs=1, progress=False, seed=1, check_support=False)
        with pytest.raises(ValueError, match="^data: expected values in the support of 'x'"):
            fit(*pair, x, num_epochs=1, progress=False, seed=1)
    model, guide = linear(weight=1e200)
    model.likelihood = likelihoods.Bernoulli()
    first = tuple(((x != 0) & (x != 1)).nonzero()[0].tolist())
    count = int(((x != 0) & (x != 1)).sum())
    where = f"for row {first[0]} of the data, dimension {first[1]}, the first of {count}"
    end = "outside of the support of its likelihood, Boolean()"
    words = f"the datum of 'x' is {x[first]:.4g} {where}, {end}; {BACK}"
    message = said((model, guide), x, check_support=False)
    assert message == f"the loss is nan at step 0: {words}"


def test_a_datum_that_is_a_vector_and_a_distribution_without_a_support():
    class Silent(dist.Normal):
        @property
        def support(self):
            raise NotImplementedError

    def model(x, hot):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(3), 1.0).to_event(1))
            pyro.sample("x", Silent(z, 1.0).to_event(1), obs=x)
            pyro.sample("hot", dist.OneHotCategorical(logits=z), obs=hot)

    hot = torch.eye(3)[[0, 1, 2, 0, 1, 2]]
    guide = FamilyGuide(model, families.mean_scale, encoder=First()).setup(data(6), hot)
    message = said((model, guide), (1e6 * data(6), hot))
    assert "the guide's scale of 'z' is inf for row " in message
    assert "the last layer of the decoder" in message  # since not all is known to be counts
    hot[4] = 1.0
    words = "the datum of 'hot' for row 4 of the data, outside of the support of its likelihood, On"
    message = said((model, guide), (1e6 * data(6), hot), check_support=False)
    assert f"the loss is nan at step 0: {words}" in message


class First(nn.Module):
    """The first of two arguments."""

    def forward(self, x, _):
        return x
