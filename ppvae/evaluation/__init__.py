r"""What a fit is worth, per datum and in total, in nats."""

from ppvae.evaluation.amortization import gaps
from ppvae.evaluation.annealing import annealed_importance
from ppvae.evaluation.evaluation import evaluate
from ppvae.evaluation.refinement import refine
from ppvae.evaluation.report import reading, summary
from ppvae.evaluation.resampling import resample
from ppvae.evaluation.sbc import calibration
from ppvae.evaluation.scores import imputation_error, linear_probe, two_sample

__all__ = [
    "annealed_importance",
    "calibration",
    "evaluate",
    "gaps",
    "imputation_error",
    "linear_probe",
    "reading",
    "refine",
    "resample",
    "summary",
    "two_sample",
]
