"""Tables with names and categories, and what came out as such a table again."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from ppvae._checks import as_doubles, expect
from ppvae.data.adapters import Form, real_numbers


class Labels:
    """The names of the rows and columns of an argument.

    Attributes:
        rows: of the rows; None where they are only numbered.
        columns: of the columns, likewise.
    """

    def __init__(self, arg: Any) -> None:
        self.rows: list[Any] | None = None
        self.columns: list[Any] | None = None
        kind = type(arg).__module__.split(".")[0]
        if kind == "pandas" and hasattr(arg, "columns"):
            self.rows, self.columns = _told(arg.index), [str(name) for name in arg.columns]
        elif kind == "xarray" and getattr(arg, "ndim", 0) == 2:
            self.rows, self.columns = (
                list(arg.coords[dim].values) if dim in arg.coords else None for dim in arg.dims
            )


def _told(index: Any) -> list[Any] | None:
    """The labels of rows, unless they are 0, 1, ..., or two are the same."""
    if type(index).__name__ == "RangeIndex" or not index.is_unique:
        return None
    return list(index)


def labels_of(args: Sequence[Any], shape: Sequence[int], form: Form) -> Labels:
    """The names of the first argument that has any and is of a given shape.

    Columns are in the order that the programs know, see `Form.schema`.
    """
    for position, arg in enumerate(args):
        found, known = Labels(arg), form.schema(position)
        if found.columns is not None and known is not None and known.columns is not None:
            found.columns = list(known.columns)
        named = found.rows is not None or found.columns is not None
        if named and tuple(arg.shape) == tuple(shape):
            return found
    return Labels(None)


def to_frame(values: Any, like: Any) -> Any:
    """Data as a table of pandas with the names and categories of another one.

    Args:
        values: shape `(rows, columns)`: an array, a tensor or a variable of `impute`.
        like: a table with as many columns, such as that which a model was fitted to.

    Returns:
        A table. Columns of categories have the category of each code, those of True and False what
        is nearer, and whole numbers are rounded, where none is missing.

    Raises:
        TypeError: `like` is no table, or the values are no numbers.
        ValueError: there are other columns than in `like`, or a code that is none.

    Example:
        >>> import pandas as pd
        >>> table = pd.DataFrame({"age": [30, 40], "sex": pd.Categorical(["f", "m"])})
        >>> to_frame([[35.2, 1.0]], table).sex[0]
        'm'
    """
    import pandas as pd

    framed = isinstance(like, pd.DataFrame)
    expect(framed, "like", "a table of pandas", type(like).__name__, TypeError)
    array = as_doubles(real_numbers("values", values))
    expect(not np.isinf(array).any(), "values", "finite numbers, or NaN", "infinite ones")
    fits = array.ndim == 2 and array.shape[1] == like.shape[1]
    expect(fits, "values", f"shape (rows, {like.shape[1]}), as the table", array.shape)
    index = like.index if len(like) == len(array) else None
    columns = {}
    for number, name in enumerate(like.columns):
        column, kind = array[:, number], like.dtypes.iloc[number]
        whole = not np.isnan(column).any()
        if isinstance(kind, pd.CategoricalDtype):
            codes = np.where(np.isnan(column), -1, column)
            known = np.isin(codes, np.arange(-1, len(kind.categories)))
            wanted = f"codes from 0 to {len(kind.categories) - 1} in column {name!r}"
            expect(known.all(), "values", wanted, column[~known][:1])
            columns[name] = pd.Categorical.from_codes(codes.astype(int), dtype=kind)
        elif getattr(kind, "kind", "f") == "b" and whole:
            columns[name] = column > 0.5
        elif getattr(kind, "kind", "f") in "iu" and whole:
            columns[name] = np.rint(column).astype(np.int64)
        else:
            columns[name] = column
    return pd.DataFrame(columns, index=index)


def from_anndata(adata: Any, *keys: str, layer: str | None = None) -> tuple[Any, ...]:
    """The arguments of a model from an AnnData object: its matrix, and columns of `obs`.

    A sparse matrix stays sparse, and `fit` makes only minibatches of it dense.

    Args:
        adata: the object.
        *keys: names of columns of `obs`, such as labels or batches; categories become codes.
        layer: name of the layer to take in place of `X`.

    Returns:
        The matrix, and an array for each key.

    Raises:
        TypeError: `adata` is something else, or a column is neither numbers nor categories.
        ValueError: there is no layer or column of that name.

    Example:
        `fit(model, guide, from_anndata(adata, "batch"))`
    """
    known = all(hasattr(adata, name) for name in ("X", "obs", "layers"))
    expect(known, "adata", "an AnnData object", type(adata).__name__, TypeError)
    layers = list(adata.layers)
    expect(layer is None or layer in layers, "layer", f"one of {layers}", repr(layer))
    for key in keys:
        expect(isinstance(key, str), "keys", "names of columns of obs", repr(key), TypeError)
        expect(key in adata.obs, "keys", f"columns of obs, {list(adata.obs)}", repr(key))
    matrix = adata.X if layer is None else adata.layers[layer]
    return (matrix, *(real_numbers("keys", adata.obs[key]).numpy() for key in keys))
