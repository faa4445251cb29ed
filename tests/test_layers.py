"""The house has floors: a folder imports from floors below its own, and keeps what is private."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "ppvae"
FLOORS = [
    ["_checks", "_scopes"],
    ["families"],
    ["closed_form", "data", "likelihoods", "nn", "priors"],
    ["models", "programs"],
    ["objectives"],
    ["export", "guides", "staging"],
    ["evaluation", "predictive", "training"],
    ["comparison", "plots", "regression"],
]
FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}
FILES = sorted(PACKAGE.rglob("*.py"))


def _room(parts):
    return parts[0].removesuffix(".py")


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
    room = _room(path.relative_to(PACKAGE).parts)
    if room == "__init__":
        return
    for other, whole in _imports(path):
        same = other == room
        assert same or FLOOR[other] < FLOOR[room], f"{room} imports {'.'.join(whole)}"
        if not same:
            private = [part for part in whole[1:] if part.startswith("_")]
            assert not private, f"{room} imports what is private: {'.'.join(whole)}"


def _modules():
    """Module -> the modules of the package that it imports when it is imported."""
    names = {}
    for path in FILES:
        parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
        names[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    found = {}
    for name, path in names.items():
        found[name] = set()
        for _, whole in _imports(path):
            module = ".".join(["ppvae", *whole])
            module = module if module in names else module.rpartition(".")[0]
            found[name].add(module)
    return found


def test_no_file_imports_itself_by_way_of_others():
    imports = _modules()
    state = {}

    def visit(name, path):
        assert state.get(name) != "open", f"a circle: {' -> '.join([*path, name])}"
        if state.get(name) is None:
            state[name] = "open"
            for other in imports.get(name, ()):
                visit(other, [*path, name])
            state[name] = "done"

    for name in imports:
        visit(name, [])


def test_every_folder_opens_with_its_contract_and_says_what_is_public():
    faces = [path for path in FILES if path.name == "__init__.py"]
    assert len(faces) > 5
    for path in faces:
        tree = ast.parse(path.read_text())
        assert ast.get_docstring(tree), path
        assert any(
            isinstance(node, ast.Assign) and node.targets[0].id == "__all__" for node in tree.body
        ), path


def test_no_public_name_hides_a_module_of_its_folder():
    for path in FILES:
        if path.name == "__init__.py":
            exported = next(
                ast.literal_eval(node.value)
                for node in ast.parse(path.read_text()).body
                if isinstance(node, ast.Assign) and node.targets[0].id == "__all__"
            )
            modules = {other.stem for other in path.parent.glob("*.py")}
            own = modules & set(exported)
            reexported = {"closed_form", "likelihoods", "nn", "plots", "regression"}
            assert own <= reexported, f"{path.parent.name}: {own} are modules and something else"
