"""Finite discrete latents are summed out: held against sums written out, scikit-learn, and Pyro."""

import itertools
import math
import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import TraceEnum_ELBO, config_enumerate
from pyro.ops.indexing import Vindex
from torch import nn

from ppvae import Family, FamilyGuide, evaluate, families, fit, stage
from ppvae._scopes import private_modules, random_state
from ppvae.nn import mlp
from ppvae.objectives import ELBO
from ppvae.objectives.trace_terms import terms
from ppvae.programs.enumeration import draw_discrete, probabilities, values_of
from ppvae.programs.nodes import DRAWS
from ppvae.programs.tracing import draws_plate, run_model, trace_pair

N, K = 5, 3


def data(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


def mixture(x):
    """Weights, locations and scales of a Gaussian mixture, which are continuous and global."""
    weight = pyro.sample("weight", dist.Dirichlet(torch.ones(K)))
    with pyro.plate("components", K):
        loc = pyro.sample("loc", dist.Normal(torch.zeros(x.shape[-1]), 3.0).to_event(1))
        scale = pyro.sample("scale", dist.LogNormal(torch.zeros(x.shape[-1]), 0.5).to_event(1))
    with pyro.plate("data", len(x)):
        part = pyro.sample("part", dist.Categorical(weight))
        fn = dist.Normal(*(Vindex(v.unsqueeze(-3))[..., part, :] for v in (loc, scale)))
        pyro.sample("x", fn.to_event(1), obs=x)


def chain(x):
    """A hidden Markov model with learned transitions, for `(data, steps)`, padded with NaN."""
    start = pyro.sample("start", dist.Dirichlet(torch.ones(K)))
    with pyro.plate("states", K):
        move = pyro.sample("move", dist.Dirichlet(torch.ones(K)))
        loc = pyro.sample("loc", dist.Normal(0.0, 2.0))
    with pyro.plate("data", len(x), dim=-1):
        state = None
        for t in pyro.markov(range(x.shape[1])):
            seen = ~x[:, t].isnan()
            with poutine.mask(mask=seen):
                probs = start if state is None else Vindex(move.unsqueeze(-3))[..., state, :]
                state = pyro.sample(f"state_{t}", dist.Categorical(probs))
                pyro.sample(
                    f"x_{t}",
                    dist.Normal(Vindex(loc.unsqueeze(-2))[..., state], 0.7),
                    obs=x[:, t].nan_to_num(0.0),
                )


def topics(words):
    """Latent Dirichlet allocation: a topic for each word of a document."""
    with pyro.plate("topics", K):
        word = pyro.sample("word", dist.Dirichlet(torch.ones(4)))
    with pyro.plate("data", len(words), dim=-2):
        share = pyro.sample("share", dist.Dirichlet(torch.ones(K)))
        with pyro.plate("words", words.shape[1], dim=-1):
            topic = pyro.sample("topic", dist.Categorical(share))
            pyro.sample("w", dist.Categorical(Vindex(word.unsqueeze(-3))[..., topic, :]), obs=words)


def one_of_all(x):
    """One discrete latent for all the data, and one of each datum."""
    p = pyro.sample("p", dist.Beta(2.0, 2.0))
    kind = pyro.sample("kind", dist.Bernoulli(p))
    with pyro.plate("data", len(x)):
        flip = pyro.sample("flip", dist.Bernoulli(0.3))
        pyro.sample("x", dist.Normal(2 * kind - 1 + flip, 1.0), obs=x[:, 0])


def clusters(x):
    """Codes that come from a mixture: a continuous latent behind a discrete one, both local."""
    with pyro.plate("data", len(x)):
        part = pyro.sample("part", dist.Categorical(torch.tensor([0.2, 0.5, 0.3])))
        loc = torch.tensor([-2.0, 0.0, 2.0])[part]
        z = pyro.sample("z", dist.Normal(loc, 0.5))
        pyro.sample("x", dist.Normal(z[..., None] + part[..., None], 0.8).to_event(1), obs=x)


WORDS = torch.tensor([[0, 1, 3], [2, 2, 1]])
GAPS = data(N, 4)
GAPS[1, 3], GAPS[2, 1:] = math.nan, math.nan
PROGRAMS = {
    "mixture": (mixture, data(N, 2), {}),
    "chain": (chain, GAPS, {}),
    "topics": (topics, WORDS, {}),
    "one of all": (one_of_all, data(N, 1), {}),
    "clusters": (clusters, data(N, 1), {"encoder": nn.Identity()}),
}


@pytest.fixture(params=list(PROGRAMS))
def program(request):
    model, x, options = PROGRAMS[request.param]
    torch.manual_seed(1)
    return model, FamilyGuide(model, "mean_scale", **options).setup(x), x


def test_every_program_has_the_loss_and_slope_of_trace_enum_elbo(program):
    """The same draws give the same number: Pyro's, after three incantations, and ours."""
    model, guide, x = program
    depth = 2 if model is topics else 1
    ours, theirs = [], []
    for losses in (ours, theirs):
        guide.zero_grad()
        torch.manual_seed(4)
        with private_modules(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pyro remarks on a sequence that is not vectorized
            if losses is ours:
                loss = ELBO(kl="sampled")(model, guide, x) * len(x)
            else:
                elbo = TraceEnum_ELBO(max_plate_nesting=depth)
                loss = elbo.differentiable_loss(config_enumerate(model), guide, x)
            loss.backward()
        slopes = {name: p.grad for name, p in guide.named_parameters() if p.grad is not None}
        losses += [loss.detach(), slopes]
    assert torch.allclose(ours[0], theirs[0], rtol=1e-9)
    assert ours[1].keys() == theirs[1].keys()
    for name, slope in ours[1].items():
        assert torch.allclose(slope, theirs[1][name], rtol=1e-6, atol=1e-9), name


def test_draws_in_a_plate_are_like_single_ones(program):
    model, guide, x = program
    with private_modules(), torch.no_grad():
        pair = trace_pair(model, guide, x, draws=draws_plate(model, x, draws=4))
        whole, drawn = terms(*pair), pair[1]
        for number in range(4):
            known = poutine.Trace()
            for name in whole.log_prior:
                node = drawn.nodes[name]
                depth = len(node["fn"].event_shape)
                rank = max((-f.dim for f in node["cond_indep_stack"] if f.name != DRAWS), default=0)
                value = node["value"][number]
                value = value.reshape(value.shape[value.dim() - depth - rank :])
                known.add_node(name, **{**node, "value": value})
            alone = terms(run_model(model, known, (x,)), drawn)
            for kind in ("log_likelihood", "log_prior"):
                for name, value in getattr(alone, kind).items():
                    expected = getattr(whole, kind)[name][number]
                    assert torch.allclose(value, expected, rtol=1e-9), name


def test_every_program_goes_into_a_graph_and_is_fitted(program, plain_pyro):
    model, guide, x = program
    loss = stage(model, guide, x)
    for seed in (0, 1):
        torch.manual_seed(seed)
        staged = loss(x)
        torch.manual_seed(seed)
        assert torch.allclose(staged, ELBO()(model, guide, x), rtol=1e-9)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # so few steps are short of the optimum
        fitted = fit(model, guide, x, num_epochs=3, progress=False)
    assert math.isfinite(fitted.losses[-1])


def test_the_sum_over_paths_of_a_chain_is_that_over_every_path():
    """K^4 paths written out, for sequences of unequal lengths; and the chances of their states."""
    start, move = torch.tensor([0.5, 0.3, 0.2]), torch.softmax(data(K, K), -1)
    loc = torch.tensor([-1.0, 0.0, 2.0])
    values = {"start": start, "move": move, "loc": loc}
    with private_modules():
        known = poutine.trace(lambda: _points(values)).get_trace()
        trace = run_model(chain, known, (GAPS,))
    log_p, chances = [], []
    for row in GAPS:
        seen = int((~row.isnan()).sum())
        paths = list(itertools.product(range(K), repeat=4))
        logs = []
        for path in paths:
            log = start[path[0]].log()
            for t in range(1, seen):
                log = log + move[path[t - 1], path[t]].log()
            for t in range(seen):
                log = log + dist.Normal(loc[path[t]], 0.7).log_prob(row[t])
            for _ in range(seen, 4):  # anything, with the same chance: counted once
                log = log - math.log(K)
            logs.append(log)
        logs = torch.stack(logs)
        log_p.append(logs.logsumexp(0))
        share = logs.softmax(0)
        first = [share[[n for n, path in enumerate(paths) if path[0] == k]].sum() for k in range(K)]
        chances.append(torch.stack(first))
    found = sum(terms(trace, known).log_likelihood.values())
    assert torch.allclose(found, torch.stack(log_p), rtol=1e-10)
    assert torch.allclose(probabilities(trace)["state_0"], torch.stack(chances), rtol=1e-8)


def test_draws_of_a_chain_are_those_of_its_posterior():
    """20,000 joint draws of the states against the chance of each of K^3 paths, written out."""
    start, move = torch.tensor([0.5, 0.3, 0.2]), torch.softmax(2 * data(K, K), -1)
    values = {"start": start, "move": move, "loc": torch.tensor([-1.0, 0.0, 1.0])}
    row = torch.tensor([0.3, -0.5, 1.2])
    count = 20_000
    with private_modules():
        known = poutine.trace(lambda: _points(values)).get_trace()
        trace = run_model(chain, known, (row.expand(count, 3),))
        drawn = draw_discrete(trace, known)
    states = torch.stack([drawn[f"state_{t}"]["value"] for t in range(3)], -1)
    assert states.shape == (count, 3)
    logs = {}
    for path in itertools.product(range(K), repeat=3):
        log = start[path[0]].log() + move[path[0], path[1]].log() + move[path[1], path[2]].log()
        logs[path] = log + dist.Normal(values["loc"][list(path)], 0.7).log_prob(row).sum()
    chances = torch.stack([*logs.values()]).softmax(0)
    for path, chance in zip(logs, chances, strict=True):
        share = (states == torch.tensor(path)).all(-1).double().mean()
        assert (share - chance).abs() < 5 * (chance * (1 - chance) / count).sqrt() + 1e-4, path


def _points(values):
    pyro.sample("start", dist.Delta(values["start"], event_dim=1))
    with pyro.plate("states", K):
        pyro.sample("move", dist.Delta(values["move"], event_dim=1))
        pyro.sample("loc", dist.Delta(values["loc"]))


def test_a_mixture_on_iris_is_that_of_scikit_learn():
    from sklearn.datasets import load_iris
    from sklearn.mixture import GaussianMixture

    x = torch.as_tensor(load_iris().data)
    theirs = GaussianMixture(K, covariance_type="diag", random_state=0).fit(x.numpy())
    values = {"weight": theirs.weights_, "loc": theirs.means_, "scale": theirs.covariances_**0.5}

    def point(x):
        pyro.sample("weight", dist.Delta(torch.as_tensor(values["weight"]), event_dim=1))
        with pyro.plate("components", K):
            for name in ("loc", "scale"):
                pyro.sample(name, dist.Delta(torch.as_tensor(values[name]), event_dim=1))

    with private_modules():
        model_trace, guide_trace = trace_pair(mixture, point, x)
    found = terms(model_trace, guide_trace)
    assert set(found.log_likelihood) == {"x"} and found.log_likelihood["x"].shape == (150,)
    expected = torch.as_tensor(theirs.score_samples(x.numpy()))
    assert torch.allclose(found.log_likelihood["x"], expected, rtol=1e-6)
    shares = torch.as_tensor(theirs.predict_proba(x.numpy()))
    assert torch.allclose(probabilities(model_trace)["part"], shares, atol=1e-10)


def test_what_a_discrete_latent_of_all_data_leaves_is_one_factor():
    """log sum_k p(k) prod_n p(x_n | k) belongs to no datum; local flips are summed in each."""
    x = data(N, 1)
    p = torch.tensor(0.4)
    with private_modules():
        known = poutine.trace(lambda: pyro.sample("p", dist.Delta(p))).get_trace()
        trace = run_model(one_of_all, known, (x,))
    found = terms(trace, known)
    assert found.log_likelihood["kind"].shape == () and (found.log_likelihood["x"] == 0).all()
    total = []
    for kind, chance in ((0, 0.6), (1, 0.4)):
        logs = [
            torch.logaddexp(
                math.log(0.7) + dist.Normal(2.0 * kind - 1, 1.0).log_prob(v),
                math.log(0.3) + dist.Normal(2.0 * kind, 1.0).log_prob(v),
            )
            for v in x[:, 0]
        ]
        total.append(math.log(chance) + torch.stack(logs).sum())
    total = torch.stack(total)
    assert torch.allclose(found.log_likelihood["kind"], total.logsumexp(0), rtol=1e-10)
    assert torch.allclose(probabilities(trace)["kind"], total.softmax(0), rtol=1e-8)
    assert probabilities(trace)["flip"].shape == (N, 2)


def test_a_continuous_latent_behind_a_discrete_one_has_the_density_of_a_mixture():
    """And the likelihood is what is left: log p(x, z) - log p(z), whose parts add up."""
    x = data(N, 1)
    guide = FamilyGuide(clusters, "mean_scale", nn.Identity()).setup(x)
    with private_modules():
        model_trace, guide_trace = trace_pair(clusters, guide, x)
    found, z = terms(model_trace, guide_trace), guide_trace.nodes["z"]["value"]
    weight, loc = torch.tensor([0.2, 0.5, 0.3]), torch.tensor([-2.0, 0.0, 2.0])
    prior = weight.log() + dist.Normal(loc, 0.5).log_prob(z[:, None])
    joint = prior + dist.Normal(z[:, None] + torch.arange(3.0), 0.8).log_prob(x)
    assert torch.allclose(found.log_prior["z"], prior.logsumexp(-1), rtol=1e-10)
    likelihood = joint.logsumexp(-1) - prior.logsumexp(-1)
    assert torch.allclose(found.log_likelihood["x"], likelihood, rtol=1e-9)
    assert torch.allclose(probabilities(model_trace)["part"], joint.softmax(-1), rtol=1e-8)
    assert "z" not in found.kl and found.is_local
    measured = evaluate(clusters, guide, x, num_samples=300, progress=False)
    grid = torch.linspace(-9, 9, 20_001)[:, None, None]
    rows = weight.log() + dist.Normal(loc, 0.5).log_prob(grid)
    rows = rows + dist.Normal(grid + torch.arange(3.0), 0.8).log_prob(x[None])
    exact = rows.logsumexp(-1).logsumexp(0) + math.log(18 / 20_000)
    off = (torch.as_tensor(measured.log_likelihood.values) - exact).abs()
    assert (off < 5 / torch.as_tensor(measured.ess.values).sqrt()).all()


class Labels(nn.Module):
    """Digits of which some have labels, and some a label that is summed out (M2)."""

    def __init__(self):
        super().__init__()
        self.decoder = mlp(2 + K, 8, out=4)

    def forward(self, x, label=None):
        with pyro.plate("data", len(x)):
            y = pyro.sample("y", dist.OneHotCategorical(torch.ones(K) / K), obs=label)
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            shape = torch.broadcast_shapes(y.shape[:-1], z.shape[:-1])
            both = torch.cat([y.expand(*shape, K), z.expand(*shape, 2)], -1)
            pyro.sample("x", dist.Normal(self.decoder(both), 0.5).to_event(1), obs=x)


def test_labels_that_are_missing_are_summed_out():
    torch.manual_seed(0)
    model, x = Labels(), data(N, 4)
    guide = FamilyGuide(model, "mean_scale", mlp(4, 8)).setup(x)
    each = []
    for k in range(K):
        with random_state(3), private_modules():
            label = torch.eye(K)[torch.full((N,), k)]
            pair = trace_pair(lambda x, k=label: model(x, k), guide, x)
        each.append(sum(terms(*pair).log_likelihood.values()))
    with random_state(3), private_modules():
        model_trace, guide_trace = trace_pair(model, guide, x)
    found = sum(terms(model_trace, guide_trace).log_likelihood.values())
    assert torch.allclose(found, torch.stack(each).logsumexp(0), rtol=1e-9)
    chances = probabilities(model_trace)["y"]
    assert torch.allclose(chances, torch.stack(each, -1).softmax(-1), rtol=1e-7)
    node = model_trace.components[0].discrete[0]
    assert torch.equal(values_of(node), torch.eye(K))


def test_subsampled_plates_and_scales_are_counted_outside_of_the_sum():
    x, losses = data(N, 1), {}

    def model(x, size, scale):
        data_plate = pyro.plate("data", size, subsample=torch.arange(len(x)))
        with poutine.scale(scale=scale), data_plate:
            part = pyro.sample("part", dist.Bernoulli(0.3))
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z + part, 1.0), obs=x[:, 0])

    guide = FamilyGuide(model, "mean_scale", _First()).setup(x, 4 * N, 1.0)
    for size, scale in ((N, 1.0), (4 * N, 1.0), (4 * N, 3.0)):
        torch.manual_seed(3)
        with private_modules():
            losses[size, scale] = ELBO(kl="sampled")(model, guide, x, size, scale)
    with private_modules():
        torch.manual_seed(3)
        elbo = TraceEnum_ELBO(max_plate_nesting=1)
        theirs = elbo.differentiable_loss(config_enumerate(model), guide, x, 4 * N, 1.0) / (4 * N)
    assert torch.allclose(losses[N, 1.0], theirs, rtol=1e-9)
    assert torch.allclose(losses[4 * N, 1.0], theirs, rtol=1e-9)
    assert torch.allclose(losses[4 * N, 3.0], 3 * theirs, rtol=1e-9)


class _First(nn.Module):
    def forward(self, x, *rest):
        return x


def test_a_guide_of_discrete_latents_only_draws_nothing():
    x = data(N, 1)
    loc = nn.Parameter(torch.tensor([-1.0, 1.0]))

    def model(x):
        pyro.param("loc", loc)
        with pyro.plate("data", len(x)):
            part = pyro.sample("part", dist.Bernoulli(0.3)).long()
            pyro.sample("x", dist.Normal(loc[part], 1.0), obs=x[:, 0])

    guide = FamilyGuide(model, "mean_scale")
    with private_modules():
        assert guide(x) == {}
        loss = ELBO()(model, guide, x)
    logs = [math.log(p) + dist.Normal(m, 1.0).log_prob(x[:, 0]) for p, m in ((0.7, -1), (0.3, 1))]
    assert torch.allclose(loss, -torch.logaddexp(*logs).mean(), rtol=1e-10)


def test_a_discrete_family_draws_the_site_itself():
    """Then it is no more summed out, and the estimate is one that needs a score function."""
    x = data(N, 1)
    guide = FamilyGuide(one_of_all, {"kind": Family(dist.Bernoulli), "*": "mean_scale"}).setup(x)
    with private_modules():
        model_trace, guide_trace = trace_pair(one_of_all, guide, x)
        assert "kind" in guide_trace.nodes
        assert [list(c.discrete)[0]["name"] for c in model_trace.components] == ["flip"]
        with pytest.raises(ValueError, match="reparametrized draws; 'kind'"):
            ELBO()(one_of_all, guide, x)


def _poisson(x):
    with pyro.plate("data", len(x)):
        count = pyro.sample("count", dist.Poisson(2.0))
        pyro.sample("x", dist.Normal(count, 1.0), obs=x[:, 0])


def _different_scales(x):
    with pyro.plate("data", len(x)):
        part = pyro.sample("part", dist.Bernoulli(0.3))
        with poutine.scale(scale=2.0):
            pyro.sample("x", dist.Normal(part, 1.0), obs=x[:, 0])


def _funnel(x):
    with pyro.plate("data", len(x)):
        part = pyro.sample("part", dist.Bernoulli(0.3))
        z = pyro.sample("z", dist.Normal(part, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x[:, 0])


def test_what_cannot_be_summed_out_says_what_to_do():
    x = data(N, 1)
    with pytest.raises(ValueError, match=r"'count'.* infinitely many values can be trunc"):
        FamilyGuide(_poisson, "mean_scale", nn.Identity()).setup(x)
    guide = FamilyGuide(_different_scales, "mean_scale").setup(x)
    with private_modules(), pytest.raises(ValueError, match=r"one scale .*'part', 'x'"):
        trace_pair(_different_scales, guide, x)
    guide = FamilyGuide(_funnel, {"*": families.noise_only}).setup(x)
    with private_modules(), pytest.raises(ValueError, match=r"depends on no discrete .*'part'"):
        trace_pair(_funnel, guide, x)


def test_a_discrete_latent_of_one_value_is_certain():
    def one(x):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            part = pyro.sample("part", dist.Categorical(torch.ones(1)))
            pyro.sample("x", dist.Normal(mu + part, 1.0), obs=x)

    x = data(N)
    for draws in (None, 4):
        guide = FamilyGuide(one, "mean_scale").setup(x)
        with private_modules(), torch.no_grad():
            plate = None if draws is None else draws_plate(one, x, draws=draws)
            trace, _ = trace_pair(one, guide, x, draws=plate)
        batch = (N,) if draws is None else (draws, N)
        assert torch.equal(probabilities(trace)["part"], torch.ones(*batch, 1))
        assert torch.equal(draw_discrete(trace, {"mu"})["part"]["value"], torch.zeros(batch))
        trace.compute_log_prob()
        log_p = dist.Normal(trace.nodes["mu"]["value"], 1.0).log_prob(x)
        assert torch.allclose(trace.nodes["x"]["log_prob"], log_p)
