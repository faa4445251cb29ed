"""Linear regression: the model as a Pyro program, and its exact posterior."""

from ppvae.regression import plots
from ppvae.regression.comparison import compare
from ppvae.regression.evidence import EvidenceMaximum, evidence_maximum, log_evidence_curve
from ppvae.regression.exact import ExactPosterior, exact_posterior
from ppvae.regression.factors import Factor, combine, factorize
from ppvae.regression.generalized import GeneralizedLinear
from ppvae.regression.loo import LeaveOneOut
from ppvae.regression.model import LinearRegression
from ppvae.regression.prediction import Prediction
from ppvae.regression.priors import ConjugateNormal, g_prior
from ppvae.regression.scores import Nats, PredictiveScores, objective, predictive_scores
from ppvae.regression.weights import Horseshoe

__all__ = [
    "ConjugateNormal",
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
    "combine",
    "compare",
    "evidence_maximum",
    "exact_posterior",
    "factorize",
    "g_prior",
    "log_evidence_curve",
    "objective",
    "plots",
    "predictive_scores",
]
