"""Formulas as MathML, which browsers draw by themselves: no script, no network, no picture."""

from latex2mathml.converter import convert
from sphinx.util.math import get_node_equation_number


def _inline(writer, node):
    writer.body.append(convert(node.astext()))
    raise _skip()


def _block(writer, node):
    writer.body.append('<div class="formula">')
    if node["number"]:
        number = get_node_equation_number(writer, node)
        writer.body.append(f'<span class="eqno">({number})</span>')
    writer.body.append(convert(node.astext(), display="block"))
    writer.body.append("</div>\n")
    raise _skip()


def _skip():
    from docutils.nodes import SkipNode

    return SkipNode()


def setup(app):
    """Makes `html_math_renderer = "mathml"` known."""
    app.add_html_math_renderer("mathml", (_inline, None), (_block, None))
