"""Runs the notebooks of docs/tutorials and stores their outputs in them: ``tools/run_tutorials.py [NAME ...]``.

The stored outputs are what the documentation site and a reader in the checkout see. Progress bars and what goes to standard
error are left out, and the folder that a notebook worked in is called ``FOLDER``.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient

ROOT = Path(__file__).resolve().parents[1]
TUTORIALS = ROOT / "docs" / "tutorials"
SECONDS = 1800
"""That a cell may take."""
FOLDER = "/tmp/tutorial"  # noqa: S108 - a name in a text
KINDS = ("image/png", "text/html", "text/plain")
"""Of one output only the first of these that it has is stored."""


def main() -> None:
    """Runs the notebooks that are named, by default all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help="without the suffix, such as which-layer")
    names = parser.parse_args().names or sorted(path.stem for path in TUTORIALS.glob("*.ipynb"))
    os.environ["PYTHONPATH"] = str(ROOT)  # the package of this tree, whatever is installed
    for name in names:
        path = TUTORIALS / f"{name}.ipynb"
        print(f"running {path.relative_to(ROOT)}", file=sys.stderr)
        notebook = nbformat.read(path, as_version=4)
        NotebookClient(notebook, timeout=SECONDS, kernel_name="python3", record_timing=False).execute()
        nbformat.write(as_stored(notebook), path)


def as_stored(notebook: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """The notebook with the outputs that are worth storing, changed in place."""
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = [stored for output in cell.outputs if (stored := _stored(output)) is not None]
    return notebook


def _stored(output: Any) -> Any:
    if output.output_type == "stream":
        if output.name == "stderr":
            return None
        output.text = _without_folder(output.text)
        return output
    kind = next(kind for kind in KINDS if kind in output.data)
    if "<progress" in output.data[kind]:
        return None
    output.data = {kind: output.data[kind] if kind == "image/png" else _without_folder(output.data[kind])}
    return output


def _without_folder(text: str) -> str:
    made = re.escape(tempfile.gettempdir() + "/" + tempfile.gettempprefix())
    return re.sub(rf"{made}\w+", FOLDER, text)


if __name__ == "__main__":
    main()
