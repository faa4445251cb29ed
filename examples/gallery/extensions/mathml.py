"""Formulas as MathML, which browsers draw by themselves: no script, no network, no picture."""

import re

from docutils.nodes import SkipNode
from latex2mathml import converter
from sphinx.util.math import get_node_equation_number

# `ln r` and not `lnr`: a name of a function before what has no bracket
_NAME = re.compile(r"(<mi>(?:arg|cosh|exp|inf|ln|log|max|min|sinh|tanh)</mi>)(?=<m(?!o))")


def convert(formula, display="inline"):
    """A formula of LaTeX as MathML."""
    space = r'\1<mspace width="0.17em"></mspace>'
    return _NAME.sub(space, converter.convert(formula, display=display))


def _inline(writer, node):
    writer.body.append(convert(node.astext()))
    raise SkipNode


def _block(writer, node):
    writer.body.append('<div class="formula">')
    if node["number"]:
        number = get_node_equation_number(writer, node)
        writer.body.append(f'<span class="eqno">({number})</span>')
    writer.body.append(convert(node.astext(), display="block"))
    writer.body.append("</div>\n")
    raise SkipNode


def setup(app):
    """Makes `html_math_renderer = "mathml"` known."""
    app.add_html_math_renderer("mathml", (_inline, None), (_block, None))
