"""Factors of blocks of rows, combined, give what all rows give at once."""

import copy
import os
import pickle
import subprocess
import sys

import mpmath
import numpy as np
import pandas as pd
import pyro.distributions as dist
import pytest
import torch
from mpmath import mp

from ppvae.regression import (
    LeaveOneOut,
    combine,
    evidence_maximum,
    exact_posterior,
    factorize,
    log_evidence_curve,
)

# what is said of priors that are far from the data is asked for in test_conflict.py
pytestmark = pytest.mark.filterwarnings("ignore:prior and data disagree")

ROWS, COLUMNS = 40, 4


def simulated(rows=ROWS, columns=COLUMNS, seed=0):
    generator = np.random.default_rng(seed)
    X = generator.normal(size=(rows, columns))
    return X, 1 + X @ np.linspace(-1, 2, columns) + 0.7 * generator.normal(size=rows)


X, Y = simulated()


def split(count, seed=0):
    """The numbers of rows that are put at random into so many blocks, each of one row or more."""
    generator = np.random.default_rng(seed)
    ends = np.sort(generator.choice(np.arange(1, ROWS), count - 1, replace=False))
    return np.split(generator.permutation(ROWS), ends)


def in_blocks(parts, intercept=False, **priors):
    """The posterior, and the leave-one-out, of rows in blocks."""
    factors = [factorize(X[part], Y[part], intercept=intercept) for part in parts]
    post = exact_posterior(combine(factors), **priors)
    found = []
    for number, part in enumerate(parts):
        rest = factors[:number] + factors[number + 1 :]
        found.append(post.loo(X[part], Y[part], others=combine(rest) if rest else None))
    return post, LeaveOneOut.combine(found)


HALF = dist.HalfNormal(torch.tensor(1.0, dtype=torch.float64))
PRIORS = {
    "known": dict(noise=0.7),
    "unknown": dict(noise=HALF),
    "both": dict(noise=HALF, scale=dist.LogNormal(0.0, 0.5)),
    "flat": dict(weight=None, noise=None),
}


@pytest.mark.parametrize("name", PRIORS)
@pytest.mark.parametrize("intercept", [False, True])
def test_any_split_gives_the_same_posterior_evidence_and_leave_one_out(name, intercept):
    """To 1e-12, also of blocks with fewer rows than columns, of which there are always some."""
    priors = PRIORS[name]
    whole = exact_posterior(X, Y, intercept=intercept, **priors)
    loo, draws = whole.loo(), whole.sample(20, seed=0)
    for count in (1, 2, 7, ROWS):
        for seed in range(3):
            parts = split(count, seed)
            post, found = in_blocks(parts, intercept, **priors)
            assert post.names == whole.names
            np.testing.assert_allclose((post.mean - whole.mean) / whole.sd, 0, atol=1e-12)
            sds = np.outer(whole.sd, whole.sd)
            np.testing.assert_allclose((post.covariance - whole.covariance) / sds, 0, atol=1e-12)
            np.testing.assert_allclose(post.log_normalizer, whole.log_normalizer, rtol=1e-12)
            np.testing.assert_allclose(post.log_evidence, whole.log_evidence, rtol=1e-12)
            order = np.concatenate(parts)
            np.testing.assert_allclose(found.pointwise, loo.pointwise[order], rtol=1e-12)
            np.testing.assert_allclose(found[1:], loo[1:], rtol=1e-12)
            # quantiles of the noise are inverted numerically, and draws by them
            np.testing.assert_allclose(post.sample(20, seed=0), draws, rtol=1e-9)


def test_combined_factors_against_fifty_digits():
    """The normal equations as they stand, and a refit for each datum, in 50 digits."""
    with mp.workdps(50):
        noise, sd = mp.mpf(7) / 10, mp.mpf(3) / 2

        def solved(rows):
            design, target = mp.matrix(X[rows].tolist()), mp.matrix(Y[rows].tolist())
            precision = design.T * design / noise**2 + mp.eye(COLUMNS) / sd**2
            covariance = precision**-1
            mean = covariance * (design.T * target) / noise**2
            misfit = (target.T * target)[0] / noise**2 - (mean.T * precision * mean)[0]
            volume = mp.log(mp.det(precision)) + 2 * COLUMNS * mp.log(sd)
            size = len(rows) * mp.log(2 * mp.pi * noise**2)
            return mean, covariance, -(size + volume + misfit) / 2

        mean, covariance, evidence = solved(np.arange(ROWS))
        without = [evidence - solved(np.delete(np.arange(ROWS), i))[2] for i in range(ROWS)]
    mean, evidence = np.array(mean, dtype=float).ravel(), float(evidence)
    sds = [float(mpmath.sqrt(covariance[j, j])) for j in range(COLUMNS)]
    weight = dist.Normal(0.0, torch.tensor(1.5, dtype=torch.float64))
    for count in (1, 7, ROWS):
        parts = split(count)
        post, loo = in_blocks(parts, weight=weight, noise=0.7)
        np.testing.assert_allclose(post.mean, mean, rtol=1e-12)
        np.testing.assert_allclose(post.sd, sds, rtol=1e-12)
        np.testing.assert_allclose(post.log_evidence, evidence, rtol=1e-12)
        exact = np.array(without, dtype=float)[np.concatenate(parts)]
        np.testing.assert_allclose(loo.pointwise, exact, rtol=1e-12)


def test_a_tree_of_factors_is_their_list():
    """And the evidence as a function of the scale, and its maximum, take a factor, too."""
    factors = [factorize(X[part], Y[part]) for part in split(7)]
    flat, tree = combine(factors), combine([combine(factors[3:]), combine(factors[:3])])
    whole = factorize(X, Y)
    for factor in (flat, tree, factorize((X[part], Y[part]) for part in split(7))):
        assert factor.rows == ROWS and factor.triangle.shape == (COLUMNS + 1, COLUMNS + 1)
        np.testing.assert_allclose(factor.triangle, whole.triangle, rtol=1e-12, atol=1e-13)
        assert (np.diag(factor.triangle) > 0).all()
    curve = [log_evidence_curve(*d, scales=[0.1, 2.0], noise=0.7) for d in ((X, Y), (tree,))]
    np.testing.assert_allclose(*curve, rtol=1e-12)
    best = [evidence_maximum(*data, noise=0.7) for data in ((X, Y), (tree,))]
    assert best[0].scale == pytest.approx(best[1].scale, rel=1e-6)  # the top of a curve is flat
    assert best[0].log_evidence == pytest.approx(best[1].log_evidence, rel=1e-12)


@pytest.mark.parametrize("gap", [1e-2, 1e-4, 1e-6, 1e-8])
def test_near_equal_columns_move_by_rounding_times_their_condition(gap):
    near = np.column_stack([X[:, 0], X[:, 0] + gap * X[:, 1], X[:, 2]])
    condition = np.linalg.cond(near / np.linalg.norm(near, axis=0))
    whole = exact_posterior(near, Y, weight=None, noise=0.7)
    for seed in range(5):
        factors = [factorize(near[part], Y[part]) for part in split(7, seed)]
        post = exact_posterior(combine(factors), weight=None, noise=0.7)
        bound = 1e-14 * condition
        np.testing.assert_allclose((post.mean - whole.mean) / whole.sd, 0, atol=bound)
        np.testing.assert_allclose(post.sd, whole.sd, rtol=bound)


def test_a_factor_is_plain_data(tmp_path):
    """Small, and the same after pickle, a copy, and `torch.save`."""
    factor = factorize(X, Y, intercept=True, names=["a", "b", "c", "d"])
    assert len(pickle.dumps(factor)) < 8 * (COLUMNS + 2) ** 2 + 500
    torch.save(factor, tmp_path / "factor.pt")
    loaded = torch.load(tmp_path / "factor.pt", weights_only=False)
    for other in (pickle.loads(pickle.dumps(factor)), copy.deepcopy(factor), loaded):
        np.testing.assert_array_equal(other.triangle, factor.triangle)
        assert other[1:] == factor[1:] == (ROWS, True, ("a", "b", "c", "d"), 0.0, None)
    assert repr(factor) == "Factor of 40 rows, 5 columns (the first of ones)"
    post = exact_posterior(factor, noise=1.0)
    assert len(pickle.dumps(post)) < 10_000  # what the rows are sent to, to be left out
    assert post.names == ["intercept", *(f"weight[{name}]" for name in "abcd")]
    tree = post.to_datatree(3, seed=0)
    assert tree["posterior"]["feature"].values.tolist() == ["a", "b", "c", "d"]


def test_sums_without_the_single_data_are_the_same():
    parts, post = split(7), exact_posterior(factorize(X, Y), noise=HALF)
    loo = exact_posterior(X, Y, noise=HALF).loo()
    short = [post.loo(X[part], Y[part], pointwise=False) for part in parts]
    found = LeaveOneOut.combine([LeaveOneOut.combine(short[:2]), *short[2:]])
    assert found.pointwise.shape == (0,) and repr(found) == repr(loo)
    np.testing.assert_allclose(found[1:], loo[1:], rtol=1e-12)


def test_the_others_are_asked_for_where_a_datum_decides_much():
    """The only datum of a column, and an outlier that changes the posterior of the noise."""
    single = np.column_stack([np.ones(9), np.eye(9)[0]])
    outlier = Y[:9] + 80.0 * (np.arange(9) == 1)
    rows = {
        "column": (single, Y[:9], dict(weight=dist.Normal(0.0, 1e6), noise=1.0)),
        "improper": (single, Y[:9], dict(weight=None, noise=1.0)),
        "outlier": (X[:9, :2], outlier, dict(noise=dist.HalfCauchy(2.5))),
    }
    for design, target, priors in rows.values():
        one, two = factorize(design[:4], target[:4]), factorize(design[4:], target[4:])
        post = exact_posterior(combine([one, two]), **priors)
        with pytest.raises(ValueError, match="^others: expected the factor .* 1 such data"):
            post.loo(design[:4], target[:4])
        first = post.loo(design[:4], target[:4], others=two)
        rest = post.loo(design[4:], target[4:])  # needs none here
        whole = exact_posterior(design, target, **priors).loo()
        both = LeaveOneOut.combine([first, rest])
        # a refit is a difference of two log evidences
        bound = 1e-12 * abs(post.log_normalizer)
        np.testing.assert_allclose(both.pointwise, whole.pointwise, rtol=1e-12, atol=bound)
        assert np.isnan(both.total) == (priors["weight"] is None if "weight" in priors else False)


ONE, TWO = factorize(X, Y), factorize(X[:3], Y[:3])
NAMED = factorize(X, Y, names=["a", "b", "c", "d"])
TABLE = pd.DataFrame(X, columns=["a", "b", "c", "d"])
POST = exact_posterior(ONE, noise=1.0)
NAN = np.where(X == X[2, 1], np.nan, X)
#: a call and the words of the refusal
BAD = {
    "no rows": (lambda: factorize(X[:0], Y[:0]), "^X: expected at least one row, got none"),
    "nan": (lambda: factorize(NAN, Y), "^X: expected finite"),
    "infinite": (lambda: factorize(X, Y * np.inf), "^y: expected finite"),
    "names": (lambda: factorize(X, Y, names=["a"]), "^names: expected 4 names"),
    "tables": (
        lambda: factorize([(TABLE, Y), (TABLE[["b", "a", "c", "d"]], Y)]),
        "^X: expected the columns .*'a', 'b'.* got .*'b', 'a'",
    ),
    "none": (lambda: combine([]), "^factors: expected at least one, got none"),
    "columns": (
        lambda: combine([ONE, factorize(X[:, :3], Y)]),
        "^factors.1.: expected 4 columns, as the others, got 3",
    ),
    "intercept": (
        lambda: combine([ONE, factorize(X, Y, intercept=True)]),
        "^factors.1.: expected an intercept in all",
    ),
    "other names": (
        lambda: combine([TWO, NAMED, factorize(TABLE[["a", "b", "d", "c"]], Y)]),
        "^factors.2.: expected the columns .*'c', 'd'",
    ),
    "cut": (lambda: combine([ONE._replace(rows=2)]), "^factors.0.: expected a triangle of 2 rows"),
    "not finite": (
        lambda: combine([ONE, TWO._replace(triangle=TWO.triangle * np.nan)]),
        "^factors.1.: expected finite",
    ),
    "intercept later": (lambda: exact_posterior(ONE, intercept=True), "^intercept: "),
    "too few": (lambda: POST.loo(X[:3], Y[:3], others=TWO), "^others: .* 3 rows and 3 others"),
    "too many": (lambda: POST.loo(np.vstack([X, X]), np.tile(Y, 2)), "^X, y: .*40 rows"),
    "one of two": (lambda: POST.loo(X), "^X, y: expected both"),
    "not kept": (lambda: POST.loo(), "^X, y: .*blocks, .*loo"),
    "block's columns": (lambda: POST.loo(X[:, :2], Y), "^X: expected 4 columns"),
    "other rows": (lambda: POST.loo(9 * X, Y), "^X: expected rows of the posterior's own data"),
    "other targets": (lambda: POST.loo(X[3:], 1e200 * Y[3:]), "^y: expected rows of the posterior"),
    "block's nan": (lambda: POST.loo(NAN, Y), "^X: expected finite"),
    "others' columns": (
        lambda: POST.loo(X[:3], Y[:3], others=factorize(X[3:, :2], Y[3:])),
        "^others: expected 4 columns",
    ),
    "no parts": (lambda: LeaveOneOut.combine([]), "^parts: expected at least one"),
}
BAD_KINDS = {
    "dtype": (
        lambda: combine([ONE, TWO._replace(triangle=TWO.triangle.astype(np.float32))]),
        "^factors.1.: expected a triangle in float64, got float32",
    ),
    "no factor": (lambda: combine([ONE, X]), "^factors.1.: expected a Factor, got ndarray"),
    "one factor": (lambda: combine(ONE), "^factors: expected a list of them, got Factor"),
    "of a factor": (lambda: factorize(ONE), "^X: expected rows, got a Factor"),
    "a list": (lambda: exact_posterior([ONE, TWO]), r"^X: .*Factor as block 0 \(combine"),
    "y too": (lambda: exact_posterior(ONE, Y), "^y: expected nothing beside a Factor"),
    "others": (lambda: POST.loo(X[:3], Y[:3], others=X), "^others: expected a Factor"),
    "flag": (lambda: POST.loo(X, Y, pointwise=3), "^pointwise: expected True or False"),
    "parts": (lambda: LeaveOneOut.combine([ONE]), "^parts: expected each a LeaveOneOut"),
    "one part": (lambda: LeaveOneOut.combine(POST.loo(X, Y)), "^parts: expected a list"),
}


@pytest.mark.parametrize("name", [*BAD, *BAD_KINDS])
def test_bad_input_is_named(name):
    error, (call, words) = (ValueError, BAD[name]) if name in BAD else (TypeError, BAD_KINDS[name])
    with pytest.raises(error, match=words):
        call()


def test_names_that_one_of_them_lacks_are_those_of_the_other():
    """A table brings its own, and arrays fit any."""
    for factors in ([ONE, NAMED], [NAMED, ONE], [factorize(TABLE, Y), ONE]):
        assert combine(factors).names == ("a", "b", "c", "d")


#: one of two processes, of which each holds half of the rows
PROCESS = """
import datetime, pickle, sys
import numpy as np
import torch.distributed as dist
from ppvae.regression import LeaveOneOut, combine, exact_posterior, factorize

rank, folder = int(sys.argv[1]), sys.argv[2]
X, y = (half[rank::2] for half in np.load(f"{folder}/rows.npz").values())
store = dist.FileStore(f"{folder}/store", 2)
told = {"rank": rank, "world_size": 2, "timeout": datetime.timedelta(seconds=120)}
dist.init_process_group("gloo", store=store, **told)

factors = [None, None]
dist.all_gather_object(factors, factorize(X, y))
posterior = exact_posterior(combine(factors), noise=0.7)

parts = [None, None]
dist.all_gather_object(parts, posterior.loo(X, y, others=factors[1 - rank]))
found = posterior.mean, posterior.log_evidence, LeaveOneOut.combine(parts)[1:]
with open(f"{folder}/found{rank}", "wb") as file:
    pickle.dump(found, file)
dist.barrier()
dist.destroy_process_group()
"""


@pytest.mark.skipif(not torch.distributed.is_available(), reason="PyTorch without distributed")
def test_two_processes_of_torch_distributed(tmp_path, monkeypatch):
    """The first of them is this one."""
    np.savez(tmp_path / "rows.npz", X=X, y=Y)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, sys.path)))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo" if sys.platform == "linux" else "lo0")
    command = [sys.executable, "-c", PROCESS, "1", str(tmp_path)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as other:
        try:
            monkeypatch.setattr(sys, "argv", ["", "0", str(tmp_path)])
            exec(PROCESS, {})
            error = other.communicate(timeout=120)[1]
        finally:
            other.kill()
    assert other.returncode == 0, error
    whole = exact_posterior(X, Y, noise=0.7)
    for rank in range(2):
        mean, log_evidence, loo = pickle.loads((tmp_path / f"found{rank}").read_bytes())
        np.testing.assert_allclose(mean, whole.mean, rtol=1e-12)
        np.testing.assert_allclose(log_evidence, whole.log_evidence, rtol=1e-12)
        np.testing.assert_allclose(loo, whole.loo()[1:], rtol=1e-12)


def test_dask_in_three_lines():
    dask = pytest.importorskip("dask")
    blocks = [(X[part], Y[part]) for part in split(7)]

    factors = [dask.delayed(factorize)(*block) for block in blocks]
    posterior = exact_posterior(dask.delayed(combine)(factors).compute(), noise=HALF)
    parts = dask.compute(*(dask.delayed(posterior.loo)(*block) for block in blocks))

    whole = exact_posterior(X, Y, noise=HALF)
    np.testing.assert_allclose(posterior.mean, whole.mean, rtol=1e-12)
    np.testing.assert_allclose(LeaveOneOut.combine(parts)[1:], whole.loo()[1:], rtol=1e-12)
