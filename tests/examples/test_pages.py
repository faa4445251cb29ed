"""The code on the first page and in the gallery runs, one block after the other, on few data."""

import re
from pathlib import Path

import pyro
import pytest
import reference

import ppvae
from ppvae import NarrowFamily, NotConverged, data

HOME = Path(__file__).parents[2]
PAGES = [HOME / "README.md", HOME / "examples" / "README.md"]


def blocks(page):
    return re.findall(r"^```python\n(.*?)^```$", page.read_text(), re.DOTALL | re.MULTILINE)


@pytest.mark.filterwarnings(f"ignore::{NotConverged.__module__}.{NotConverged.__qualname__}")
@pytest.mark.filterwarnings(f"ignore::{NarrowFamily.__module__}.{NarrowFamily.__qualname__}")
def test_the_code_of_the_pages_runs(change, monkeypatch, tmp_path, capsys, plain_pyro, single):
    """In the order of reading, in an empty folder; what a page uses, it or the first page makes."""
    short = {"num_epochs": 2, "progress": False}
    few = {"num_samples": 4, "progress": False}
    for name, told in {"fit": short, "fit_replicates": short, "evaluate": few}.items():
        monkeypatch.setattr(ppvae, name, change(getattr(ppvae, name), told))
    load = data.load
    monkeypatch.setattr(data, "load", lambda name: load(name)[:300])
    monkeypatch.chdir(tmp_path)
    checks = "validate_distributions_torch"  # which `torch.compile`, as a page calls it, turns off
    names: dict[str, object] = {}
    with pyro.settings.context(**{checks: pyro.settings.get(checks)}):
        for page in PAGES:
            assert blocks(page)
            for block in blocks(page):
                exec(compile(block, str(page), "exec"), names)
    assert "The ELBO is" in capsys.readouterr().out


def test_the_first_page_can_be_read_in_ten_minutes_and_its_links_lead_somewhere():
    text = PAGES[0].read_text()
    assert len(text.splitlines()) <= 130 and len(text.split()) <= 1000
    heads = {p: set(map(anchor, re.findall(r"^##+ (.*)$", p.read_text(), re.M))) for p in PAGES}
    for page in PAGES:
        for target in re.findall(r"\]\(([^)]*)\)", page.read_text()):
            if target.startswith("http"):
                continue
            path, _, part = target.partition("#")
            file = (page.parent / path).resolve() if path else page
            assert file.exists(), target
            assert not part or part in heads[file], target


def anchor(title):
    """The name of a heading in a link to it."""
    return re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")


def test_the_list_of_public_objects_is_that_of_the_code():
    path, wanted = HOME / "examples" / "REFERENCE.md", reference.page()
    assert path.read_text() == wanted, "python tests/reference.py > examples/REFERENCE.md"
    for name in ppvae.__all__:
        assert f"- `{name}" in wanted or f"## `ppvae.{name}`" in wanted, name


def test_every_program_stands_in_the_gallery():
    text = PAGES[1].read_text()
    for path in (HOME / "examples").glob("*.py"):
        assert f"### `{path.name}`" in text and f"python examples/{path.name}" in text, path.name
