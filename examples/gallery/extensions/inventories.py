"""Links to the pages of PyTorch, Pyro and ArviZ, without asking them while the site is built.

`links.txt` lists the names that our pages and docstrings use, as they are written there, and where
each is described: its page, with the place on it where that is not its own name. From it an
inventory is written for each project, in the format that Sphinx reads.
"""

import zlib
from pathlib import Path


def mapping(home: Path) -> dict[str, tuple[str, str]]:
    """Project -> (address, file of its inventory), as `intersphinx_mapping` wants it."""
    found, project = {}, ""
    for line in (home / "links.txt").read_text().splitlines():
        words = line.split()
        if line.startswith("["):
            project, address = line.strip("[]").split()
            found[project] = address, []
        elif words:
            found[project][1].append(words)
    return {name: (url, str(_written(home, name, rows))) for name, (url, rows) in found.items()}


def _written(home: Path, project: str, rows: list[list[str]]) -> Path:
    """The inventory of one project, of lines `name role page`."""
    text = ""
    for name, role, page in rows:
        text += f"{name} py:{role} 1 {page if '#' in page else page + '#$'} -\n"
    head = f"# Sphinx inventory version 2\n# Project: {project}\n# Version:\n"
    head += "# The remainder of this file is compressed using zlib.\n"
    path = home / "_inventories" / f"{project}.inv"
    path.parent.mkdir(exist_ok=True)
    new = head.encode() + zlib.compress(text.encode())
    if not path.exists() or path.read_bytes() != new:
        path.write_bytes(new)
    return path
