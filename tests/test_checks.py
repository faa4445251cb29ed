"""What is no real number is refused, in the same words wherever numbers are taken."""

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import sparse

from ppvae import closed_form, families, plots
from ppvae._checks import check_array, check_real, check_share, check_size
from ppvae._scopes import stacklevel
from ppvae.regression import exact_posterior, log_evidence_curve, predictive_scores

X = np.arange(12.0).reshape(4, 3) % 5
Y, ONE, FULL = np.array([1.0, 0.0, 2.0, 5.0]), np.zeros((1, 3)), families.full_rank
MASKED = np.ma.masked_array(X, mask=X == 4)

#: no real numbers in a dense array: how they are made of the numbers X
BAD = {
    "complex": lambda x: x + 1j,
    "complex tensor": lambda x: torch.tensor(x + 1j),
    "text": lambda x: x.astype(str),
    "text among objects": lambda x: x.astype(str).astype(object),
    "dates": lambda x: x.astype("datetime64[s]"),
    "durations": lambda x: x.astype("timedelta64[s]"),
    "a missing value": lambda x: pd.DataFrame(x).astype("Float64").replace(1.0, pd.NA),
    "masked": lambda x: np.ma.masked_array(x, mask=x == x.flat[0]),
    "sparse": sparse.csr_matrix,
    "sparse tensor": lambda x: torch.tensor(x).to_sparse(),
    "on meta": lambda x: torch.tensor(x, device="meta"),
    "nested": lambda x: torch.nested.nested_tensor([*torch.tensor(x)], layout=torch.jagged),
    "ragged": lambda x: [[1.0, 2.0], [3.0]],
    "None": lambda x: None,
}

#: where numbers are taken: the argument, and a call with it
TAKERS = {
    "exact_posterior": ("X", lambda v: exact_posterior(v, Y)),
    "fixed_decoder": ("x", lambda v: closed_form.fixed_decoder(v, X[:3], X[0], 1.0, FULL)),
    "learned_decoder": ("x", lambda v: closed_form.learned_decoder(v, 1, FULL)),
    "closed regression": ("X", lambda v: closed_form.regression(v, Y, 1.0, 1.0, FULL)),
    "predictive_scores": ("X", lambda v: predictive_scores(v, Y, ONE, 1.0)),
    "curves": ("curves, a", lambda v: plots.rate_distortion_curves({"a": (v, v)})),
    "images": ("rows, a", lambda v: plots.images({"a": v})),
    "evidence": ("scales", lambda v: log_evidence_curve(X, Y, scales=v, noise=1.0)),
}


@pytest.mark.parametrize("kind", BAD)
@pytest.mark.parametrize("taker", TAKERS)
def test_what_is_no_number_is_refused(taker, kind):
    name, call = TAKERS[taker]
    with pytest.raises((TypeError, ValueError), match=f"^{name}: expected .*, got "):
        call(BAD[kind](X))


#: numbers in another dress, which mean what they say
GOOD = {
    "big-endian": lambda x: x.astype(">f8"),
    "read-only": lambda x: np.broadcast_to(x[None], (1, *x.shape))[0],
    "backwards": lambda x: x[::-1].copy()[::-1],
    "long double": lambda x: x.astype(np.longdouble),
    "objects": lambda x: x.astype(object),
    "bfloat16": lambda x: torch.tensor(x).bfloat16(),
    "half": lambda x: x.astype(np.float16),
    "unsigned": lambda x: x.astype(np.uint16),
    "larger unsigned": lambda x: x.astype(np.uint64),
    "with a gradient": lambda x: torch.tensor(x, requires_grad=True),
    "a table": pd.DataFrame,
    "nothing masked": lambda x: np.ma.masked_array(x),
    "lists": lambda x: x.tolist(),
    "lists of tensors": lambda x: [[torch.tensor(v) for v in row] for row in x],
}


@pytest.mark.parametrize("kind", GOOD)
def test_numbers_in_any_dress_are_those_numbers(kind):
    np.testing.assert_array_equal(check_array("x", GOOD[kind](X), ("rows", 3)), X)
    post, plain = exact_posterior(GOOD[kind](X), Y), exact_posterior(X, Y)
    np.testing.assert_array_equal(post.mean, plain.mean)


def test_the_words_of_a_refusal():
    whole = np.array([2**63 + 2**40], dtype=np.uint64)
    assert check_real("x", whole).item() == 2**63 + 2**40
    rows = [
        (lambda: check_array("x", [[1.0, np.inf]], ("a", 2)), "x: expected finite .* got 1 that"),
        (lambda: check_array("x", [1.0], ("a", 2)), r"x: expected shape \(a, 2\), got \(1,\)"),
        (lambda: check_array("x", [[1.0]], ("a", 2)), r"x: expected shape \(a, 2\), got \(1, 1\)"),
        (lambda: check_share("x", 1), "x: expected a number between 0 and 1, got 1"),
        (lambda: check_share("x", True), "x: expected a number between 0 and 1, got True"),
        (lambda: check_size("x", 1e101), "x: expected a number from 1e-100 to 1e.100, got 1e.101"),
        (lambda: check_real("x", MASKED), "x: expected no masked entries, got 2"),
    ]
    for call, words in rows:
        with pytest.raises(ValueError, match=words):
            call()


def test_tables_say_which_columns_are_no_numbers():
    table = pd.DataFrame({"a": [0.5, 1.5], "g": ["u", "v"]})
    with pytest.raises(TypeError, match=r"^X: .*got DataFrame of object .columns 'g': str.$"):
        check_real("X", table)
    with pytest.raises(TypeError, match=r"^X: .*got DataFrame of object, with missing entries$"):
        check_real("X", table[["a"]].assign(b=pd.array([1.0, pd.NA], dtype="Float64")))


def test_a_warning_points_at_code_that_has_no_name():
    """As that of `exec` with globals of its own: the level above one frame of the library."""
    inside = eval("lambda: stacklevel()", {"__name__": "ppvae.inside", "stacklevel": stacklevel})
    names = {"inside": inside}
    exec("level = inside()", names)
    assert names["level"] == 2 and "__name__" not in names
