"""The poster, drawn before the pages are read, if what it is made of has changed since."""

import subprocess
import sys
from pathlib import Path

INPUTS = ("poster.py", "ladder.py", "output/ladder.txt", "output/regression.txt")


def _draw(app):
    examples = Path(app.srcdir).parent
    sheet = Path(app.srcdir) / "poster" / "made" / "poster.pdf"
    newest = max((examples / name).stat().st_mtime for name in INPUTS)
    if sheet.exists() and sheet.stat().st_mtime > newest:
        return
    command = [sys.executable, str(examples / "poster.py"), "--out", str(sheet.parent)]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    if ended.returncode:
        raise RuntimeError(f"examples/poster.py failed:\n{ended.stderr}")


def setup(app):
    """Has it drawn when a build begins."""
    app.connect("builder-inited", _draw)
