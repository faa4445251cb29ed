"""Scores by which models of tables are compared: draws, codes, and what was filled in.

The classifiers are scikit-learn's, which is imported when a score is asked for.
"""

import math
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import xarray as xr
from numpy.typing import NDArray
from torch import Tensor

from ppvae._checks import as_doubles, check_array, check_count, check_real, check_seed, expect
from ppvae.data.adapters import real_numbers


class Score(NamedTuple):
    """A score and its standard error."""

    value: float
    se: float

    def __repr__(self) -> str:
        return f"{self.value:.3f} +- {self.se:.3f}"


def two_sample(
    real: Any, drawn: Any, *, classifier: Any = None, folds: int = 5, seed: int = 0
) -> Score:
    """How well a classifier tells draws of a model from data: the area under its ROC curve.

    It is the probability that of a datum and a draw the classifier, trained on others, finds the
    datum the more real one: 0.5 where it cannot tell, 1 where it always can, and less than 0.5
    where draws are copies of the data, one of which it was told is real. Take data that the model
    was not trained on, and draws with as many gaps: these tell, too.

    Args:
        real: data, shape `(N, columns)`; NaN where an entry is missing.
        drawn: draws, of as many columns, such as `generate(model, N)`.
        classifier: one of scikit-learn's, with `predict_proba`; by default gradient boosting, which
            sees what single columns and several together say, and takes missing entries.
        folds: parts of which each is judged by a classifier trained on the others.
        seed: of the folds, and of the default classifier.

    Returns:
        The area and its standard error over the data (Hanley and McNeil).

    Raises:
        ImportError: scikit-learn is not installed.
        TypeError, ValueError: they are no tables of numbers with equally many columns, with at
            least two rows in each fold.

    Lopez-Paz and Oquab, Revisiting classifier two-sample tests, 2017; Hanley and McNeil, The
    meaning and use of the area under a ROC curve, 1982.
    """
    from sklearn.ensemble import HistGradientBoostingClassifier
    from sklearn.model_selection import StratifiedKFold, cross_val_predict

    tables = [_table(name, given) for name, given in (("real", real), ("drawn", drawn))]
    widths = [table.shape[1] for table in tables]
    expect(widths[0] == widths[1], "drawn", f"{widths[0]} columns, as the data", widths[1])
    folds, seed = check_count("folds", folds, 2), check_seed(seed) % 2**32  # as scikit-learn's
    few = min(map(len, tables))
    expect(few >= 2 * folds, "real, drawn", f"at least {2 * folds} rows for {folds} folds", few)
    x = np.concatenate(tables)
    y = np.repeat([1, 0], [len(table) for table in tables])
    chosen: Any = HistGradientBoostingClassifier(random_state=seed)
    if classifier is not None:
        able = all(callable(getattr(classifier, name, None)) for name in ("fit", "predict_proba"))
        able = able and not isinstance(classifier, type)
        wanted, kind = "a classifier with `fit` and `predict_proba`", type(classifier).__name__
        expect(able, "classifier", wanted, kind, TypeError)
        chosen = classifier
    parts = StratifiedKFold(folds, shuffle=True, random_state=seed)
    proba = cross_val_predict(chosen, x, y, cv=parts, method="predict_proba")[:, 1]
    area = _area(proba[y == 1], proba[y == 0])
    q1, q2 = area / (2 - area), 2 * area**2 / (1 + area)
    m, n = (len(table) for table in tables)
    spread = area * (1 - area) + (m - 1) * (q1 - area**2) + (n - 1) * (q2 - area**2)
    return Score(area, math.sqrt(max(spread, 0.0) / (m * n)))


def _area(above: NDArray[np.float64], below: NDArray[np.float64]) -> float:
    """The probability that one of the first is above one of the second; ties count half."""
    ranked = np.sort(below)
    less = np.searchsorted(ranked, above, "left") + np.searchsorted(ranked, above, "right")
    return float(less.mean() / 2 / len(below))


def linear_probe(codes: Any, labels: Any, *, folds: int = 5, seed: int = 0) -> Score:
    """How well labels are told from codes by a linear classifier: its accuracy on other data.

    Args:
        codes: shape `(N, latent)`, such as `encode(model, guide, x).mean`.
        labels: the class of each, of shape `(N,)`.
        folds: parts of which each is judged by a classifier trained on the others.
        seed: of the folds.

    Returns:
        The accuracy and its standard error over the data.

    Raises:
        ImportError: scikit-learn is not installed.
        TypeError, ValueError: the codes are no finite table of numbers, or there is not one label
            for each, or not as many data of a class as folds.

    Alain and Bengio, Understanding intermediate layers using linear classifier probes, 2017.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import StratifiedKFold, cross_val_predict
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    x = check_array("codes", codes, ("N", "latent"))
    y = _classes(labels, len(x))
    folds, seed = check_count("folds", folds, 2), check_seed(seed) % 2**32
    counts = np.bincount(y)
    several = len(counts) > 1 and counts.min() >= folds
    expect(several, "labels", f"two classes or more, of {folds} data or more each", list(counts))
    chosen = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
    parts = StratifiedKFold(folds, shuffle=True, random_state=seed)
    right = cross_val_predict(chosen, x, y, cv=parts) == y
    return Score(float(right.mean()), float(right.std() / math.sqrt(len(y))))


def _classes(labels: Any, count: int) -> NDArray[np.int_]:
    """The class of each datum as a number."""
    if isinstance(labels, Tensor):
        labels = check_real("labels", labels).detach().cpu().double().numpy()
    listed = isinstance(labels, (list, tuple, np.ndarray)) or hasattr(labels, "to_numpy")
    expect(listed, "labels", "a list or an array", type(labels).__name__, TypeError)
    array = np.asarray(labels)
    expect(array.dtype.kind in "biufUSO", "labels", "numbers or names", array.dtype, TypeError)
    expect(array.shape == (count,), "labels", f"shape ({count},), one for each code", array.shape)
    classes = np.unique(array.astype(str) if array.dtype == object else array, return_inverse=True)
    return np.asarray(classes[1])


def imputation_error(found: xr.Dataset, truth: Any) -> pd.DataFrame:
    """How far what `impute` filled in is from the truth, and how often its intervals hold that.

    Args:
        found: a result of `impute`, of a table.
        truth: the table without the gaps, of shape `(datum, columns)`.

    Returns:
        A row for each column, and `all`: `missing`, how many entries were; `rmse`, the root of the
        mean squared error; `nrmse`, that in standard deviations of the true column (for `all` the
        root of the mean of their squares over entries); `wrong`, for categories and grades, the
        share of wrong codes; `coverage`, the share inside of the intervals, to be compared with
        `found.level`, and its standard error `coverage_se`. NaN where it is of no use.

    Raises:
        TypeError: `found` is no result of `impute`, or `truth` no table of numbers.
        ValueError: `truth` has another shape, or an entry is missing there that was filled in.
    """
    known = isinstance(found, xr.Dataset) and {"value", "missing", "category"} <= set(found)
    expect(known, "found", "a result of impute", type(found).__name__, TypeError)
    values, missing = found.value.values.astype(float), found.missing.values
    table = as_doubles(real_numbers("truth", truth))
    fits = table.shape == values.shape and table.ndim == 2
    expect(fits, "truth", f"shape {values.shape}, as what was filled in", table.shape)
    gone = int(np.isnan(table[missing]).sum())
    expect(not gone, "truth", "a value for each entry that was filled in", f"NaN for {gone}")
    error, inside = values - table, (found.lower.values <= table) & (table <= found.upper.values)
    with np.errstate(all="ignore"):
        scaled = error / np.nanstd(table, 0)
    coded = np.broadcast_to(found.category.values, missing.shape)
    names = found.value.coords.get(found.value.dims[1], range(values.shape[1]))
    masks = {name: _only(missing, at) for at, name in enumerate(np.asarray(names).tolist())}
    rows = {}
    for name, mask in {**masks, "all": missing}.items():
        number, code = mask & ~coded, mask & coded
        count = int(mask.sum())
        share = inside[mask].mean() if count else math.nan
        rows[name] = {
            "missing": count,
            "rmse": _root(error[number]) if name != "all" else math.nan,
            "nrmse": _root(scaled[number]),
            "wrong": float((error[code] != 0).mean()) if code.any() else math.nan,
            "coverage": float(share),
            "coverage_se": math.sqrt(share * (1 - share) / count) if count else math.nan,
        }
    return pd.DataFrame.from_dict(rows, orient="index")


def _only(missing: NDArray[np.bool_], column: int) -> NDArray[np.bool_]:
    """The missing entries of one column."""
    return missing & (np.arange(missing.shape[1]) == column)


def _root(errors: NDArray[np.float64]) -> float:
    return float(np.sqrt(np.mean(errors**2))) if len(errors) else math.nan


def _table(name: str, given: Any) -> NDArray[np.float64]:
    """Numbers of shape `(N, columns)`, which may be missing."""
    array = as_doubles(real_numbers(name, given))
    expect(array.ndim == 2 and array.size, name, "shape (N, columns)", array.shape)
    expect(not np.isinf(array).any(), name, "finite numbers, or NaN", "infinite ones")
    return array
