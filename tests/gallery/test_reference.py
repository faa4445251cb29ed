"""Every public object stands in the reference, once, under the name that users write."""

import re
from importlib import import_module
from pathlib import Path

import pytest
import reference

import ppvae

PAGES = Path(__file__).parents[2] / "examples" / "gallery" / "reference"
NOT_OBJECTS = {"plots", "NAMES", *ppvae.families.LADDER, "LADDER"}  # a folder, names, a table


def described(module):
    """The names that are described on some page as those of the module."""
    found = []
    for page in PAGES.glob("*.md"):
        blocks = re.split(r"^\.\. currentmodule:: (\S+)$", page.read_text(), flags=re.M)[1:]
        for name, text in zip(blocks[::2], blocks[1::2], strict=True):
            if name == module:
                found += re.findall(
                    r"^\.\. auto(?:function|class|exception|data):: (\w+)$", text, re.M
                )
    return found


@pytest.mark.parametrize("module", ["", *reference.MODULES])
def test_every_public_name_is_described_once(module):
    name = f"ppvae.{module}".rstrip(".")
    wanted = set(import_module(name).__all__) - NOT_OBJECTS
    if not module:
        wanted = {n for n in wanted if not hasattr(getattr(ppvae, n), "__path__")}
        wanted -= {*reference.MODULES, "Family", "VAE"}  # which stand with families and models
    found = described(name)
    assert len(found) == len(set(found))
    assert wanted <= set(found), wanted - set(found)


def test_every_page_of_the_reference_is_in_its_index():
    index = (PAGES / "index.md").read_text()
    listed = re.search(r"```\{toctree\}.*?\n\n(.*?)```", index, re.S)[1].split()
    assert sorted([*listed, "index"]) == sorted(page.stem for page in PAGES.glob("*.md"))
