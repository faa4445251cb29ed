"""The example programs, with few steps."""

import math
import os
import re
import subprocess
import sys
from pathlib import Path

import arviz_base
import numpy as np
import pytest
import torch
import xarray as xr
from cases import LONG

from ppvae import closed_form, data, families, fit, fit_replicates

EXAMPLES = Path(__file__).parents[2] / "examples"
FEW = {"num_samples": 4}
LONGER = {
    "ladder": 220,
    "poster": 290,
    "labels": 175,
    "table": 175,
    "counts": 160,
    "rate_distortion": 160,
    "does_it_converge": 170,
    "regression": 230,
    "when_does_noise_help": 205,
    "benchmark": 165,
    "mixture": 200,
}


def test_every_example_is_short_and_tested():
    others = {"guide_for_your_model", "inspect_with_arviz", "groups", "sequences"}
    others |= {"many_machines", "generalized", "worth_of_bayes"}
    paths = list(EXAMPLES.glob("*.py"))
    assert {path.stem for path in paths} == others | set(LONGER)
    for path in paths:
        lines = path.read_text().splitlines()
        assert len(lines) <= LONGER.get(path.stem, 150), path
        assert lines[-2:] == ['if __name__ == "__main__":', "    main()"]


def test_ladder(run, load, tmp_path):
    """All families unless some are told: here a point, none, one with channels, and a flow."""
    names = ["deterministic", "zero", "mean_scale", "flow"]
    options = ["--epochs", 1, "--hidden", 8, "--latent", 3, "--out", tmp_path, "--families", *names]
    functions = {"evaluate": FEW, "from_pyro_svi": FEW}
    out = run("ladder.py", *options, rows=300, functions=functions)
    for name in names:
        assert f"\n{name} " in out and (tmp_path / f"{name}.nc").exists()
    with xr.open_datatree(tmp_path / "flow.nc") as tree:
        assert tree["posterior/z"].shape == (1, 4, 60, 3)
    assert "It is no bound" in out
    pictures = {"encodings", "interpolations", "losses", "rate_distortion"}
    pictures |= {"reconstructions", "samples"}
    assert {path.stem for path in tmp_path.glob("*.png")} == pictures
    assert load("ladder.py").parse([])[0].families == list(families.LADDER)


def test_poster(run, load, tmp_path):
    """A PDF of one sheet of A3 with fonts in it, and a picture."""
    out = run("poster.py", "--epochs", 1, "--out", tmp_path, rows=300)
    assert f"The poster is in {tmp_path}" in out
    sheet = (tmp_path / "poster.pdf").read_bytes()
    box = re.search(rb"/MediaBox \[ *0 0 ([\d.]+) ([\d.]+) *\]", sheet)
    assert [round(float(side) / 72 * 25.4) for side in box.groups()] == [297, 420]
    assert sheet.count(b"/MediaBox") == 1 and b"/FontFile2" in sheet
    assert (tmp_path / "poster.png").stat().st_size > 50_000


def test_the_poster_says_what_the_programs_printed(load, single):
    """Its numbers are those of `output`, each beside its family; the bound is derived."""
    module = load("poster.py")
    assert list(module.RUNGS) == list(families.LADDER)
    codes = dict.fromkeys(module.RUNGS, np.zeros((6, 3, 2)))
    figure = module.poster(np.zeros((6, 64)), codes)
    parts = [t.get_text() for t in figure.texts]
    output = EXAMPLES / "output"
    ladder, regression = ((output / f"{n}.txt").read_text() for n in ("ladder", "regression"))
    known = set(re.findall(r"\d+\.\d\d", ladder)) | {
        f"{float(gap):,.2f}" for gap in re.findall(r"\d+\.\d{4}", regression)
    }
    for part in parts:
        assert set(re.findall(r"[\d,]+\.\d\d\b", part)) <= known, part
    for name in families.LADDER:
        row = re.search(rf"^{name} .*$", ladder, re.M)[0]
        start = parts.index(name)
        said = " ".join(parts[start : start + 8])
        rate, distortion, _, *more = re.findall(r"-?(\d+\.\d\d \(\d\.\d\d\))", row)
        assert distortion in said, name
        if "*" not in row:
            assert rate in said and more[0] in said, name
    assert "0.3368" in parts
    x, z = np.linspace(-12, 12, 200_001), 0.5 * np.log(2 * math.pi * math.e)
    density = (np.exp(-((x - 1) ** 2) / 2) + np.exp(-((x + 1) ** 2) / 2)) / math.sqrt(8 * math.pi)
    entropy = -np.trapezoid(density * np.log(density), x)  # of what two points come out as
    assert abs(module.capacity() - (entropy - z)) < 1e-9


def side_by_side(row):
    """A `fit_replicates` of one row, whose graph takes a second; others take their steps alone."""

    def trained(pairs, x, *, seeds, progress, **told):
        if LONG or progress == row:
            return fit_replicates(pairs, x, seeds=seeds, progress=False, **told)
        each = zip(pairs, seeds, strict=True)
        return [fit(*pair, x, seed=seed, progress=False, **told) for pair, seed in each]

    return trained


def test_ladder_linear_over_seeds_on_a_file(run, tmp_path):
    """Fitted beside exact: here with data that the exact column is computed for anew."""
    x = np.random.default_rng(0).normal(size=(150, 5)) * [3.0, 2.0, 1.0, 1.0, 1.0]
    np.save(tmp_path / "x.npy", x)
    options = ["--linear", "--seeds", 2, "--epochs", 1, "--latent", 2, "--out", tmp_path / "out"]
    options += ["--families", "mean_scale", "deterministic", "student_t"]
    trained = side_by_side("mean_scale, 2 latents, 2 seed(s)")
    out = run("ladder.py", "--data", tmp_path / "x.npy", *options, fit_replicates=trained)
    assert "120 training and 30 test data of length 5" in out
    names, lines = ("mean_scale", "student_t"), out.splitlines()
    rows = {n: [line for line in lines if line.startswith(n)] for n in names}
    first, second = rows["mean_scale"]
    assert first.count("(") == 7 and second.count("(") == 5
    train = data.split(data.load(str(tmp_path / "x.npy"), binary=False).float())[0]
    exact = closed_form.learned_decoder(train, 2, families.mean_scale)
    assert f"{exact.objective:.2f} (0.00)" in second and f"{exact.rate:.2f} (0.00)" in second
    assert rows["student_t"][1].split().count("-") == 3  # no closed form
    assert "deterministic has no optimum" in out


@pytest.mark.skipif(not LONG, reason="it trains as long as the program does")
def test_ladder_linear_reaches_the_optimum(run, tmp_path):
    """On the digits, with the program's own settings: what it prints as its result."""
    out = run("ladder.py", "--linear", "--families", "mean_only", "--out", tmp_path)
    assert f"{'fitted':>15s} {'exact':>15s} {'short by':>15s}" in out
    row = [line for line in out.splitlines() if line.startswith("mean_only ")][1]
    fitted, exact, short_by, rate, exact_rate = map(float, row.split()[-6:-1])
    assert short_by == pytest.approx(exact - fitted, abs=0.02)  # they are rounded
    assert -0.03 < short_by < 0.05  # measured with a standard error below 0.01
    assert rate == pytest.approx(exact_rate, abs=0.2)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("ladder", ["--families", "nonsense"], "invalid choice: 'nonsense'"),
        ("ladder", ["--epochs", 0], "expected at least 1"),
        ("rate_distortion", ["--steps", 0], "at least 1"),
        ("when_does_noise_help", ["--seeds", 1], "--seeds of at least 2"),
        ("when_does_noise_help", ["--few", 900], "--few <= 0.8"),
        ("benchmark", ["--tables", "nonsense"], "invalid choice: 'nonsense'"),
        ("benchmark", ["--steps", 0], "expected at least 1"),
        ("benchmark", ["--sizes", "64-8"], "expected INPUTS-HIDDEN-LATENT or conv-LATENT"),
    ],
)
def test_refusals(run, capsys, name, options, message):
    with pytest.raises(SystemExit):
        run(f"{name}.py", *options)
    assert message in capsys.readouterr().err


def test_guide_for_your_model(run):
    functions = {"evaluate": FEW, "Predictive": FEW}
    out = run("guide_for_your_model.py", "--steps", 2, functions=functions, SHOPS=40)
    assert all(name in out for name in families.LADDER)


@pytest.mark.filterwarnings("ignore:The inplace keyword:DeprecationWarning")  # of ArviZ's own
def test_inspect_with_arviz(run, tmp_path):
    options = ["--epochs", 1, "--out", tmp_path]
    functions = {"evaluate": FEW, "from_pyro_svi": {"num_samples": 50}}
    if not LONG:  # a step of each, and no search
        functions |= {"fit": {"num_epochs": 1, "optimizer": torch.optim.Adam}}
    with arviz_base.rc_context({}):
        out = run("inspect_with_arviz.py", *options, rows=500, functions=functions)
    assert "elpd" in out and (tmp_path / "fit.nc").exists()


def only(row, **more):
    """A `fit` that trains one row, the one that is looked at; of the others guides are made."""

    def trained(model, guide, args, *, progress, **told):
        if progress == row:
            fit(model, guide, args, progress=False, **told, **more)
        guide.setup(*args)

    return trained


def test_regression(run, tmp_path):
    options = ["--draws", 50, "--nuts", 30, "--out", tmp_path]
    out = run("regression.py", *options, fit=only("full_rank"))
    assert "Log evidence of the 342 training data: -387.9509 nats" in out
    row = next(line for line in out.splitlines() if line.startswith("full_rank"))
    assert row.split()[1:3] == ["-387.9509", "0.0000"]
    pictures = {"forest", "paths", "bands", "overconfidence"}
    assert {path.stem for path in tmp_path.glob("*.png")} == pictures
    assert len(list(tmp_path.glob("*.nc"))) == 11


def test_worth_of_bayes(run, tmp_path):
    """With its guides by `.ci/run` and `.ci/long`; the tests of regression hold their scores."""
    constants = {"PER_COLUMN": [1.0, 3.0], "NOISES": [0.7], "TEST": 100}
    functions = {} if LONG else {"worth_of_bayes": {"guides": False}}
    options = ["--repeats", 2, "--sparse", "--out", tmp_path]
    out = run("worth_of_bayes.py", *options, functions=functions, **constants)
    assert out.count("full posterior gains") == 2 and ("horseshoe, mean field" in out) == LONG
    rows = [line.split() for line in out.splitlines() if line.startswith("  0.7")]
    # without rows beyond the columns least squares has no noise
    assert [(row[1], row[4] == "-") for row in rows] == [("1", True), ("3", False)]
    assert {path.stem for path in tmp_path.glob("*.png")} == {"diabetes", "map"}


@pytest.mark.filterwarnings("ignore:(divide by zero|invalid value):RuntimeWarning")  # an sd of zero
def test_does_it_converge(run, load, tmp_path):
    """With a NUTS that is too short to be true; the linear one has the exact posterior.

    Means of 400 draws have an error of 0.05 sd, and sds one of 3.5 %: five of them are allowed.
    Two of the posteriors stand for all; in the long form of the tests they are fitted all.
    """
    options = ["--nuts", 5, "--families", "full_rank", "--out", tmp_path]
    all_of_them = load("does_it_converge.py").posteriors()
    functions = {"NUTS": {"max_tree_depth": 1}}
    chosen = {n: all_of_them[n] for n in (all_of_them if LONG else ("raw diabetes", "counts"))}
    told = {"SAMPLES": 400, "posteriors": lambda: chosen}
    lines = run("does_it_converge.py", *options, functions=functions, **told).splitlines()
    assert sum("NUTS, " in line for line in lines) == len(chosen) - 1
    rows = [line for line in lines if "full_rank" in line]
    assert len(rows) == len(chosen)
    assert all("at the optimum" in row or "too narrow" in row for row in rows)
    exact = rows[list(chosen).index("raw diabetes")].split()
    assert float(exact[1]) < 0.25 and all(0.82 < float(v) < 1.18 for v in exact[2].split("-"))
    assert (tmp_path / "posteriors.png").exists()


def test_table(run, tmp_path):
    """With imputers that stop at once, and few draws."""
    functions = {"IterativeImputer": {"max_iter": 1, "tol": 1e9}, "impute": {"num_samples": 40}}
    functions |= {"log_prob": {"num_samples": 40}, "two_sample": {"folds": 2}}
    out = run("table.py", "--epochs", 1, "--out", tmp_path, functions=functions)
    assert "column means                               1.028" in out  # as the paper's mask has it
    assert "19 entries are missing" in out and "bill_length_mm" in out and "female" in out
    assert {path.stem for path in tmp_path.glob("*.png")} == {"cancer", "penguins"}


def test_counts(run, tmp_path):
    """The density is that of statsmodels to its last printed digit."""
    options = ["--epochs", 1, "--cells", 200, "--rows", 300, "--out", tmp_path]
    out = run("counts.py", *options, functions={"log_prob": {"num_samples": 40}})
    theirs, ours = (line.split()[-1] for line in out.splitlines() if line.startswith("  ") and (
        "statsmodels'" in line or "that of likelihoods" in line))  # fmt: skip
    assert theirs == ours
    assert out.count("over Poisson") == 3 and (tmp_path / "dispersions.png").exists()


def test_labels(run, tmp_path):
    functions = {"log_prob": {"num_samples": 4}, "evaluate": FEW}
    out = run("labels.py", "--epochs", 1, "--out", tmp_path, functions=functions)
    assert "no labels" in out and "A plain classifier" in out and "With 100 labels" in out
    assert {path.stem for path in tmp_path.glob("*.png")} == {"drawn", "latents"}


def test_sequences(run, load, tmp_path):
    """The filter is a Gaussian density of all that is seen, and the smoother its posterior."""
    functions = {"evaluate": FEW, "from_pyro_svi": FEW}
    options = ["--epochs", 1, "--size", 100, "--out", tmp_path]
    program = load("sequences.py")
    few = {"draw": lambda model, size: program.draw(model, {200: 30}.get(size, size))}
    out = run("sequences.py", *options, functions=functions, **few)
    assert all(name in out for name in ("each step alone", "banded precision", "Kalman filter"))
    assert {path.stem for path in tmp_path.glob("*.png")} == {"bands"}
    x = torch.randn(1, program.STEPS, 1, dtype=torch.float64)
    x[0, [2, 7, 8]] = torch.nan
    place = torch.arange(program.STEPS, dtype=x.dtype)
    spread = program.MOVE**2 / (1 - program.KEPT**2)
    states = spread * program.KEPT ** (place[:, None] - place).abs()
    seen = ~x[0, :, 0].isnan()
    noisy = states[seen][:, seen] + program.NOISE**2 * torch.eye(int(seen.sum()), dtype=x.dtype)
    value, weight = x[0, seen, 0], torch.linalg.solve(noisy, states[seen]).T
    fn = torch.distributions.MultivariateNormal(torch.zeros_like(value), noisy)
    variance = (states - weight @ states[seen]).diagonal()
    for found, expected in zip(
        program.kalman(x), (fn.log_prob(value), weight @ value, variance.sqrt()), strict=True
    ):
        torch.testing.assert_close(found[0], expected, rtol=1e-9, atol=1e-9)


def test_groups(run, tmp_path):
    options = ["--steps", 2, "--nuts", 10, "--out", tmp_path]
    functions = {"evaluate": FEW, "from_pyro_svi": FEW, "NUTS": {"max_tree_depth": 1}}
    steps = {} if LONG else {"optimizer": torch.optim.Adam}  # two, and no search
    out = run("groups.py", *options, functions=functions, fit=only("all jointly", **steps))
    names = ("mean field", "globals jointly", "groups given", "groups around", "all jointly")
    assert all(f"\n{name}" in out for name in names) and "321 rows in 20 groups" in out
    width = float(out.split(" (least squares, each alone)")[0].split()[-1])
    assert width > 1.0  # 2 x 1.645 sds of a slope from at most 6 rows of noise 1
    assert (tmp_path / "slopes.png").exists()


def test_generalized(run, tmp_path):
    """What it prints of one kind of data for each score; `.ci/run` lets it go to the optima."""
    options = ["--nuts", 4, "--steps", 2, "--data", "counts", "classes", "--out", tmp_path]
    functions = {"evaluate": FEW, "NUTS": {"max_tree_depth": 1}, "objective": FEW}
    functions |= {} if LONG else {"fit": {"optimizer": torch.optim.Adam}}  # two steps, no search
    out = run("generalized.py", *options, functions=functions)
    rows = ("point", "mean field", "full rank", "scale, too", "NUTS")
    assert all(out.count(f"\n{row} ") == 2 for row in rows)
    point = re.search(r"^point +(\S+)\*", out, re.M)[1]
    assert "counts: visits to doctors, 9 columns, 200 rows, 1000 to predict" in out
    assert "cover" in out and "Brier" in out and math.isfinite(float(point))
    assert (tmp_path / "gains.png").exists()


def test_many_machines(run, tmp_path):
    """The regression is exact: what it prints does not depend on the number of processes.

    `.ci/run` starts two, too; what they print is compared by `.ci/long`.
    """
    options = ["--epochs", 1, "--hidden", 8, "--rows", 1000, "--resume", "--out", tmp_path]
    out = run("many_machines.py", *options, rows=400, functions={"evaluate": {"num_samples": 4}})
    assert "processes: 1" in out and (tmp_path / "digits.pt").exists()
    if not LONG:
        return
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node"]
    program = [str(EXAMPLES / "many_machines.py"), *map(str, options[:-1]), str(tmp_path / "two")]
    path = {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OMP_NUM_THREADS": "1"}
    both = subprocess.run(
        [*command, "2", *program], env=os.environ | path, capture_output=True, text=True
    )
    assert both.returncode == 0, both.stderr
    assert "processes: 2" in both.stdout
    evidence = [line for line in out.splitlines() if line.startswith("log evidence")]
    assert evidence == [line for line in both.stdout.splitlines() if line.startswith("log evid")]


def test_mixture(run, tmp_path):
    """The mixture is at a maximum after few steps; the topics are not."""
    options = ["--topic-epochs", 3, "--topic-starts", 1, "--documents", 100, "--starts", 1]
    out = run("mixture.py", *options, "--epochs", 200, "--out", tmp_path)
    for name in ("diag", "full"):
        ours, theirs = map(float, re.search(rf"^{name} +(\S+) +(\S+)", out, re.M).groups())
        assert ours > theirs - 0.2
    assert "start 0" in out and "start 1" not in out
    assert {path.stem for path in tmp_path.glob("*.png")} == {"irises", "topics"}


def test_ladder_with_another_prior(run, capsys, tmp_path):
    options = ["--epochs", 1, "--hidden", 8, "--latent", 3, "--out", tmp_path, "--prior", "vamp"]
    functions = {"evaluate": FEW, "from_pyro_svi": FEW, "two_sample": {"folds": 2}}
    out = run("ladder.py", *options, "--families", "full_rank", rows=200, functions=functions)
    assert "\nfull_rank " in out and "  full_rank    " in out
    with pytest.raises(SystemExit):
        run("ladder.py", *options)
    assert "have no such density for --prior vamp" in capsys.readouterr().err
