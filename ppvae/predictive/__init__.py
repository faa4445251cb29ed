"""What people do with a fitted pair: encode, reconstruct, generate, impute, predict, and score.

All run on the device of the parameters, in evaluation mode, without gradients, and leave no trace.
"""

from ppvae.predictive.codes import encode, interpolate, reconstruct
from ppvae.predictive.density import log_prob
from ppvae.predictive.generation import generate, predict
from ppvae.predictive.imputation import impute

__all__ = ["encode", "generate", "impute", "interpolate", "log_prob", "predict", "reconstruct"]
