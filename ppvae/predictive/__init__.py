"""What people do with a fitted pair: fill in what is missing.

All run on the device of the parameters, in evaluation mode, without gradients, and leave no trace.
"""

from ppvae.predictive.imputation import impute

__all__ = ["impute"]
