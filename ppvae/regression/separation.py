"""Whether data can be told apart so well that a flat prior has no proper posterior."""

import numpy as np

from ppvae.regression.priors import Array, Integers

# More numbers than these are not looked through, as that takes long.
_MOST = 1_000_000
_TINY = 1e-7


def separates(X: Array, labels: Integers, classes: int) -> bool:
    """Whether there is a direction of the weights along which no row's class becomes less probable.

    Then the likelihood has no maximum (complete or quasi-complete separation), and is not
    integrable. Of tables of more than a million numbers this is not looked for.

    Args:
        X: shape `(rows, columns)`, with a column of ones for a flat intercept.
        labels: classes from 0, shape `(rows,)`.
        classes: how many there are; the logit of class 0 is zero.

    Reference:
        Albert, Anderson, *On the existence of maximum likelihood estimates in logistic regression
        models*, 1984.
    """
    rows, columns = X.shape
    ahead = []
    for other in range(classes):
        block = np.zeros((rows, classes, columns))
        block[np.arange(rows), labels] += X
        block[:, other] -= X
        ahead.append(block[labels != other, 1:].reshape(-1, (classes - 1) * columns))
    return _falls(-np.concatenate(ahead), np.zeros((0, (classes - 1) * columns)))


def vanishes(X: Array, counts: Array) -> bool:
    """Whether the means of zero counts can go to zero and those of the others stay.

    Args:
        X: as above.
        counts: shape `(rows,)`.

    Reference:
        Santos Silva, Tenreyro, *On the existence of the maximum likelihood estimates in Poisson
        regression*, 2010.
    """
    return _falls(X[counts == 0], X[counts > 0])


def _falls(below: Array, still: Array) -> bool:
    """Whether there is a `b` with `below b <= 0`, not all zero, and `still b = 0`."""
    from scipy import optimize

    if not below.size or below.size + still.size > _MOST:
        return False
    lengths = np.maximum(np.abs(np.vstack([below, still])).max(0), 1e-300)
    below, still = below / lengths, still / lengths
    equal = {"A_eq": still, "b_eq": np.zeros(len(still))} if len(still) else {}
    bounds, zeros = (-1.0, 1.0), np.zeros(len(below))
    found = optimize.linprog(below.sum(0), A_ub=below, b_ub=zeros, bounds=bounds, **equal)
    return bool(found.status == 0 and found.fun < -_TINY)
