"""The code on the first page and in the gallery runs, one block after the other, on few data.

The pages of the site are run when it is built; here their links are followed.
"""

import re
from pathlib import Path

import pyro
import pytest
import reference
import torch

import ppvae
from ppvae import NarrowFamily, NotConverged, data

HOME = Path(__file__).parents[2]
PAGES = [HOME / "README.md", HOME / "examples" / "README.md"]
LINKED = [*PAGES, HOME / ".github" / "CONTRIBUTING.md", *(HOME / "examples/gallery").rglob("*.md")]


def blocks(page):
    return re.findall(r"^```python\n(.*?)^```$", page.read_text(), re.DOTALL | re.MULTILINE)


@pytest.mark.filterwarnings(f"ignore::{NotConverged.__module__}.{NotConverged.__qualname__}")
@pytest.mark.filterwarnings(f"ignore::{NarrowFamily.__module__}.{NarrowFamily.__qualname__}")
def test_the_code_of_the_pages_runs(change, monkeypatch, tmp_path, capsys, plain_pyro, single):
    """In the order of reading, in an empty folder; what a page uses, it or the first page makes.

    Graphs are taken, and not compiled: `.ci/run` runs the same code with the compiler.
    """
    short = {"num_epochs": 2, "progress": False}
    few = {"num_samples": 4, "progress": False}
    shorter = {"fit": short, "fit_replicates": short, "evaluate": few}
    shorter["from_pyro_svi"] = {"num_samples": 40}
    for name, told in shorter.items():
        monkeypatch.setattr(ppvae, name, change(getattr(ppvae, name), told))
    monkeypatch.setattr(torch, "compile", change(torch.compile, {"backend": "eager"}))
    load = data.load
    monkeypatch.setattr(data, "load", lambda name: load(name)[:300])
    monkeypatch.chdir(tmp_path)
    checks = "validate_distributions_torch"  # which `torch.compile`, as a page calls it, turns off
    names: dict[str, object] = {}
    with pyro.settings.context(**{checks: pyro.settings.get(checks)}):
        assert blocks(PAGES[0])
        for page in PAGES:
            for block in blocks(page):
                exec(compile(block, str(page), "exec"), names)
    assert "The ELBO is" in capsys.readouterr().out


def test_the_first_page_can_be_read_in_ten_minutes():
    text = PAGES[0].read_text()
    assert len(text.splitlines()) <= 130 and len(text.split()) <= 1000


@pytest.mark.parametrize("page", LINKED, ids=lambda page: str(page.relative_to(HOME)))
def test_links_lead_somewhere(page):
    """To files, and to the headings of them."""
    for target in re.findall(r"\]\(([^)]*)\)", prose(page)):
        if target.startswith("http"):
            continue
        path, _, part = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), target
        heads = re.findall(r"^##+ (.*)$", prose(file), re.M) if part else []
        assert not part or part in map(anchor, heads), target


def test_links_are_found():
    """On a page without a link the test above would see nothing."""
    found = [page for page in LINKED if re.search(r"\]\([^)]*\)", prose(page))]
    assert {*PAGES, HOME / "examples/gallery/howto/tables.md"} <= set(found)


def prose(page):
    """The text of a page without its blocks of code."""
    return re.sub(r"^ *```.*?^ *```$", "", page.read_text(), flags=re.M | re.S)


def anchor(title):
    """The name of a heading in a link to it."""
    return re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")


def test_the_list_of_public_objects_is_that_of_the_code():
    path, wanted = HOME / "examples" / "REFERENCE.md", reference.page()
    assert path.read_text() == wanted, "python tests/reference.py > examples/REFERENCE.md"
    for name in ppvae.__all__:
        assert f"- `{name}" in wanted or f"## `ppvae.{name}`" in wanted, name


#: sections of the gallery -> what the program printed that their numbers are from; "Fast" is not
#: among them: its table is of another day, which it names
PRINTED = {
    "`ladder.py`": ["ladder", "ladder_linear", "ladder_priors"],
    "`guide_for_your_model.py`": ["guide_for_your_model"],
    "`table.py`": ["table", "table_miwae"],
    "`counts.py`": ["counts"],
    "`labels.py`": ["labels"],
    "`groups.py`": ["groups"],
    "`generalized.py`": ["generalized"],
    "`many_machines.py`": ["many_machines"],
    "`mixture.py`": ["mixture"],
    "`sequences.py`": ["sequences"],
    "`worth_of_bayes.py`": ["worth_of_bayes"],
    "`when_does_noise_help.py`": ["when_does_noise_help"],
}
OTHERS = {"0.287"}  # what the code of the paper prints that `table.py` follows
NUMBER = re.compile(r"\d+\.\d{2,}")


def printed(*names):
    return "\n".join((HOME / "examples" / "output" / f"{name}.txt").read_text() for name in names)


@pytest.mark.parametrize("title", PRINTED)
def test_the_numbers_of_the_gallery_are_those_that_its_programs_print(title):
    """Those of two decimals and more, outside of code."""
    text = re.split(rf"^##+ {re.escape(title)}$", PAGES[1].read_text(), flags=re.M)[1]
    text = re.sub(r"^```.*?^```", "", re.split(r"^##+ ", text, flags=re.M)[0], flags=re.M | re.S)
    known = set(NUMBER.findall(printed(*PRINTED[title]))) | OTHERS
    numbers = NUMBER.findall(text)
    assert len(numbers) > 1 and set(numbers) <= known, set(numbers) - known


def test_the_table_of_the_first_page_is_that_of_the_ladder():
    rows = re.findall(
        r"^\| `(\w+)` \| [^|]* \| (\S+) \| (\S+) \| (\S+) \|", PAGES[0].read_text(), re.M
    )
    assert len(rows) == 7
    for name, *cells in rows:
        line = re.search(rf"^{name} .*$", printed("ladder"), re.M)[0]
        means = re.findall(r"(-?\d+\.\d\d) \(", line)  # rate, distortion, ELBO, log p(x)
        for cell, mean in zip(
            cells, (*means[:2], means[3]) if len(means) > 3 else means, strict=False
        ):
            assert cell in ("-", f"{float(mean):.1f}"), name


def test_an_example_says_in_its_first_line_how_long_it_takes_and_what_it_writes():
    for path in (HOME / "examples").glob("*.py"):
        first = path.read_text().splitlines()[0]
        assert re.search(r"\((.*) (minutes?|seconds); writes .*\)\.$", first), path.name
        words = re.search(r"\((.*?) (minutes?|seconds);", first)[0][1:-1]
        told = PAGES[1].read_text().split(f"### `{path.name}`")[1].split("\n##")[0]
        assert words.capitalize() in told, path.name


def test_every_program_stands_in_the_gallery():
    text = PAGES[1].read_text()
    for path in (HOME / "examples").glob("*.py"):
        assert f"### `{path.name}`" in text and f"python examples/{path.name}" in text, path.name
