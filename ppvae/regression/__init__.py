"""The same question where its answer is known exactly: regressions, and their posteriors.

Exactly: `rows` (whose `labels` agree) are reduced to a factor (`factors`); with priors (`priors`,
`conjugate`, `units`, `arguments`) it gives coordinates that are independent in the posterior
(`linear_algebra`), and a `lattice` over noise and scale (`hyper`). All answers are sums over it:
`exact`, `combinations`, `quantiles`, `prediction`, `loo`, `evidence`, `comparison`, `conflict`; or
draws of it: `sampling`, `tree`.

As Pyro programs, for guides: `weights` and `predictor`, then `model` and `generalized`; `scores`.

For one's own data: `ridge` and `worth`, `formulas`, and `estimators` with scikit-learn's manners,
which are imported when they are first used, as only they need it (`pip install ppvae[sklearn]`).
"""

from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from ppvae.regression import plots
from ppvae.regression.comparison import compare
from ppvae.regression.conjugate import ConjugateNormal, g_prior
from ppvae.regression.evidence import EvidenceMaximum, evidence_maximum, log_evidence_curve
from ppvae.regression.exact import ExactPosterior, exact_posterior
from ppvae.regression.factors import Factor, combine, factorize
from ppvae.regression.formulas import Design, design
from ppvae.regression.generalized import GeneralizedLinear
from ppvae.regression.loo import LeaveOneOut
from ppvae.regression.model import LinearRegression
from ppvae.regression.prediction import Prediction
from ppvae.regression.scores import Nats, PredictiveScores, objective, predictive_scores
from ppvae.regression.weights import Horseshoe
from ppvae.regression.worth import Worth, worth_of_bayes

if TYPE_CHECKING:
    from ppvae.regression.estimators import BayesianClassifier, BayesianRegressor

__all__ = [
    "BayesianClassifier",
    "BayesianRegressor",
    "ConjugateNormal",
    "Design",
    "EvidenceMaximum",
    "ExactPosterior",
    "Factor",
    "GeneralizedLinear",
    "Horseshoe",
    "LeaveOneOut",
    "LinearRegression",
    "Nats",
    "Prediction",
    "PredictiveScores",
    "Worth",
    "combine",
    "compare",
    "design",
    "evidence_maximum",
    "exact_posterior",
    "factorize",
    "g_prior",
    "log_evidence_curve",
    "objective",
    "plots",
    "predictive_scores",
    "worth_of_bayes",
]

#: Names that need scikit-learn, which may not be there.
_WITH_SKLEARN = ["BayesianClassifier", "BayesianRegressor"]
if not find_spec("sklearn"):
    __all__ = [name for name in __all__ if name not in _WITH_SKLEARN]


def __getattr__(name: str) -> Any:
    if name not in _WITH_SKLEARN:
        raise AttributeError(f"module 'ppvae.regression' has no attribute {name!r}")
    if not find_spec("sklearn"):
        raise ImportError(f"{name}: expected scikit-learn, got none: pip install ppvae[sklearn]")
    return getattr(import_module("ppvae.regression.estimators"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
