r"""From a Pyro model and its guide to ArviZ: draws, predictions and densities in one tree."""

from ppvae.export.arviz import from_pyro_svi
from ppvae.export.chains import concat_chains
from ppvae.export.files import to_netcdf, to_zarr
from ppvae.export.leave_one_out import loo

__all__ = ["concat_chains", "from_pyro_svi", "loo", "to_netcdf", "to_zarr"]
