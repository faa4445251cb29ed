r"""What a fit is worth, per datum and in total, in nats."""

from ppvae.evaluation.amortization import gaps
from ppvae.evaluation.annealing import annealed_importance
from ppvae.evaluation.evaluation import evaluate
from ppvae.evaluation.report import reading, summary
from ppvae.evaluation.sbc import calibration

__all__ = ["annealed_importance", "calibration", "evaluate", "gaps", "reading", "summary"]
