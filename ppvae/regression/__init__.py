"""Linear regression: the model as a Pyro program, and its exact posterior."""

from ppvae.regression import plots
from ppvae.regression.evidence import EvidenceMaximum, evidence_maximum, log_evidence_curve
from ppvae.regression.exact import ExactPosterior, LeaveOneOut, exact_posterior
from ppvae.regression.model import Horseshoe, LinearRegression
from ppvae.regression.scores import PredictiveScores, objective, predictive_scores

__all__ = [
    "EvidenceMaximum",
    "ExactPosterior",
    "Horseshoe",
    "LeaveOneOut",
    "LinearRegression",
    "PredictiveScores",
    "evidence_maximum",
    "exact_posterior",
    "log_evidence_curve",
    "objective",
    "plots",
    "predictive_scores",
]
