"""The house has floors: a folder imports from floors below its own, and keeps what is private."""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "ppvae"
FLOORS = [
    ["_checks", "_reach"],
    ["_files", "_look", "_process", "_scopes"],
    ["data", "families"],
    ["closed_form", "likelihoods", "models", "nn", "priors"],
    ["models", "programs"],
    ["objectives"],
    ["export", "guides", "staging"],
    ["evaluation", "predictive", "training"],
    ["comparison", "plots", "regression"],
]
FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}
FILES = sorted(PACKAGE.rglob("*.py"))


def _imports(path):
    """What a file takes from the package, as (room, path of the module, name), wherever it does."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            parts = (node.module or "").split(".")
            if parts[0] == "ppvae":
                for alias in node.names:
                    whole = [*parts[1:], alias.name]
                    yield whole[0], whole
        elif isinstance(node, ast.Import):
            for alias in node.names:
                parts = alias.name.split(".")
                if parts[0] == "ppvae" and len(parts) > 1:
                    yield parts[1], parts[1:]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_file_imports_only_from_its_own_folder_or_from_floors_below(path):
    room = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    if room == "__init__":
        return
    for other, whole in _imports(path):
        same = other == room
        assert same or FLOOR[other] < FLOOR[room], f"{room} imports {'.'.join(whole)}"
        if not same:
            private = [part for part in whole[1:] if part.startswith("_")]
            assert not private, f"{room} imports what is private: {'.'.join(whole)}"


def test_no_file_imports_itself_by_way_of_others():
    names = {}
    for path in FILES:
        parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
        names[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    graph = TopologicalSorter()
    for name, path in names.items():
        modules = [".".join(["ppvae", *whole]) for _, whole in _imports(path)]
        graph.add(name, *(m if m in names else m.rpartition(".")[0] for m in modules))
    graph.prepare()  # raises a CycleError that names the circle


def test_every_folder_opens_with_its_contract_and_no_public_name_hides_a_module():
    faces = [path for path in FILES if path.name == "__init__.py"]
    assert len(faces) > 5
    for path in faces:
        tree = ast.parse(path.read_text())
        assert ast.get_docstring(tree), path
        public = next(
            ast.literal_eval(node.value)
            for node in tree.body
            if isinstance(node, ast.Assign) and node.targets[0].id == "__all__"
        )
        own = {other.stem for other in path.parent.glob("*.py")} & set(public)
        reexported = {"closed_form", "likelihoods", "nn", "plots", "regression"}
        assert own <= reexported, f"{path.parent.name}: {own} are modules and something else"
