"""The columns of a regression from a formula, by formulaic (`pip install ppvae[formula]`)."""

from __future__ import annotations

import warnings
from importlib.util import find_spec
from typing import Any, NamedTuple

from ppvae._checks import expect

#: What formulaic calls its column of ones.
_ONES = "Intercept"


class Design(NamedTuple):
    """What a formula makes of a table. `design` makes it.

    Attributes:
        X: the columns, a table of pandas whose names a posterior keeps; none of ones.
        y: the target, shape `(rows,)`.
        intercept: whether the formula has one.
        spec: formulaic's specification of the columns, with their levels and statistics.
    """

    X: Any
    y: Any
    intercept: bool
    spec: Any

    def __repr__(self) -> str:
        ones = " and an intercept" if self.intercept else ""
        return f"Design of {len(self.X)} rows: {', '.join(self.X.columns)}{ones}"

    def of(self, data: Any) -> Any:
        """The same columns for other rows: the same levels, and means and sds of the first ones.

        Args:
            data: a table with the columns that the right side of the formula names.

        Returns:
            A table like `X`.

        Raises:
            ValueError: something is missing, or there is a level that was not there before.
        """
        return _without_ones(_made(self.spec.get_model_matrix, data), intercept=self.intercept)


def design(formula: str, data: Any) -> Design:
    """Makes X and y of a table by a formula, such as `"y ~ x + C(group) + center(age)"`.

    It is for all of the library that takes X and y: `exact_posterior`, `worth_of_bayes`, the models
    and the estimators. The intercept that a formula has unless it says `0 +` is no column here, as
    it has a prior of its own: hand on `intercept=design.intercept`.

    Args:
        formula: in Wilkinson's notation, with one target on the left.
        data: a table of pandas.

    Raises:
        ImportError: formulaic is not installed.
        TypeError: the formula is no string.
        ValueError: it has no target, or several; a column is not there, or is called as that of the
            intercept beside it; or an entry is missing.

    Example:
        >>> import pandas as pd
        >>> from ppvae.regression import exact_posterior
        >>> data = pd.DataFrame({"y": [1.0, 2.0, 4.0], "x": [0.0, 1.0, 2.0], "g": ["a", "b", "b"]})
        >>> made = design("y ~ x + C(g)", data)
        >>> made
        Design of 3 rows: x, C(g)[T.b] and an intercept
        >>> post = exact_posterior(made.X, made.y, noise=1.0, intercept=made.intercept)
        >>> post.names
        ['intercept', 'weight[x]', 'weight[C(g)[T.b]]']
        >>> post.predict(made.of(pd.DataFrame({"x": [3.0], "g": ["a"]}))).mean.shape
        (1,)
    """
    if not find_spec("formulaic"):
        raise ImportError("design: expected formulaic, got none: pip install ppvae[formula]")
    from formulaic import Formula

    expect(isinstance(formula, str), "formula", "a string", type(formula).__name__, TypeError)
    left, _, right = (part.strip() for part in formula.partition("~"))
    expect(left and right, "formula", "a target and columns, as in 'y ~ x'", repr(formula))
    made = _made(lambda table, **how: Formula(formula).get_model_matrix(table, **how), data)
    target = made.lhs
    parts = isinstance(target, tuple) or isinstance(made.rhs, tuple)
    expect(not parts, "formula", "one target and one right side, without |", repr(formula))
    expect(target.shape[1] == 1, "formula", "one numeric target", list(target.columns))
    spec = made.rhs.model_spec
    columns = {f"{part.term}": part.columns for part in spec.structure}
    intercept = columns.pop("1", None) == [_ONES]
    clear = not intercept or not any(_ONES in names for names in columns.values())
    told = f"another name of the column {_ONES!r}, which the formula has as its own (0 + for none)"
    expect(clear, "data", told, f"a formula with both: {formula!r}")
    X = _without_ones(made.rhs, intercept=intercept)
    expect(X.shape[1], "formula", "at least one column on the right", repr(formula))
    return Design(X, target.iloc[:, 0], intercept, spec)


def _made(make: Any, data: Any) -> Any:
    from formulaic.errors import DataMismatchWarning, FormulaicError

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", DataMismatchWarning)
            return make(data, na_action="raise")
    except (FormulaicError, DataMismatchWarning, ValueError) as error:
        told = "a table with all columns of the formula, nothing missing, and known levels"
        raise ValueError(f"data: expected {told}, got: {error}") from error


def _without_ones(matrix: Any, *, intercept: bool) -> Any:
    import pandas as pd

    return pd.DataFrame(matrix).drop(columns=[_ONES] * intercept).astype(float)
