"""How the site is built: `sphinx-build -W --keep-going -j 2 examples/gallery site`.

Every page is run while it is built, in a process of its own, and an error on a page fails the
build. What a page printed is kept in `.jupyter_cache` until its code changes, or the library, or
what it stands on.
"""

import hashlib
import os
import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))
os.environ["PYTHONPATH"] = os.pathsep.join([str(HERE), os.environ.get("PYTHONPATH", "")])
os.environ.setdefault("OMP_NUM_THREADS", "1")  # of each page: two are built side by side

import torch  # noqa: E402
from extensions import inventories, mathml, poster  # noqa: E402
from jupyter_cache import get_cache  # noqa: E402

import ppvae  # noqa: E402


def _state() -> str:
    """A name for what pages are run with: the library, what they share, and PyTorch."""
    files = [HERE / "pages.py", *sorted(Path(ppvae.__file__).parent.rglob("*.py"))]
    read = b"".join(path.read_bytes() for path in files)
    return hashlib.sha256(read + torch.__version__.encode()).hexdigest()[:12]


project = "ppvae"
author = "the founders of ppvae"
copyright = "2026, the founders of ppvae, Apache-2.0"
version = release = ppvae.__version__

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.napoleon",
    "sphinx.ext.intersphinx",
    "sphinx_copybutton",
]
exclude_patterns = ["**/.ipynb_checkpoints", ".jupyter_cache"]
html_theme = "furo"
html_title = "ppvae"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_copy_source = False
html_show_sourcelink = False
html_math_renderer = "mathml"  # no script and no network

# pages
myst_enable_extensions = ["dollarmath", "amsmath", "deflist", "attrs_inline", "colon_fence"]
myst_heading_anchors = 3
nb_execution_mode = "cache"
nb_execution_cache_path = str(HERE / ".jupyter_cache" / _state())
# its database is made here, where two processes, which would both make it, have not begun
get_cache(nb_execution_cache_path).list_cache_records()
nb_execution_timeout = 900  # of a cell: a minute or less, where nothing else is run
nb_execution_raise_on_error = True
nb_execution_show_tb = True
nb_output_stderr = "remove"  # bars; `pages.py` has warnings printed

# the reference
autodoc_typehints = "none"  # the docstrings say what arguments are
autodoc_member_order = "bysource"
autodoc_default_options = {"members": True, "show-inheritance": True}
autodoc_preserve_defaults = True
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_rtype = False
napoleon_use_ivar = True  # attributes of a class are told once
default_role = "py:obj"  # a name in backticks leads to its page, if it has one
intersphinx_mapping = inventories.mapping(HERE)


def setup(app):
    """Adds what Sphinx has not."""
    mathml.setup(app)
    poster.setup(app)
    app.connect("autodoc-skip-member", _of_others)


def _of_others(app, what, name, thing, skip, options):
    """Whether a member is one that scikit-learn adds to each of its estimators."""
    return skip or name in ("set_fit_request", "set_score_request", "set_predict_request")
