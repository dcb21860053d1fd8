"""Execute the tutorials from the first cell to the last, each in a fresh kernel and an empty folder.

    pip install -e '.[tutorials]'
    python docs/tutorials/execute.py              # all; what they print and draw is stored in the notebooks
    python docs/tutorials/execute.py 1 6          # those whose names begin so
    python docs/tutorials/execute.py --check      # store nothing: do they run?

A cell that raises ends the command with an error. What goes to stderr (progress, log lines, warnings) is not stored.
"""

import argparse
import os
import tempfile
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient

from grade_lightning.bundled import prepare

FOLDER = Path(__file__).parent


def executed(path: Path, timeout: int = 3600) -> nbformat.NotebookNode:
    """A notebook with the outputs that it has now.

    Args:
        path: of the notebook.
        timeout: seconds that a cell may take.

    Raises:
        CellExecutionError: a cell raises.
    """
    notebook = nbformat.read(path, as_version=4)
    with tempfile.TemporaryDirectory() as folder:
        client = NotebookClient(
            notebook,
            timeout=timeout,
            record_timing=False,
            resources={"metadata": {"path": folder}},
            kernel_name="python3",
        )
        client.execute()
    for cell in notebook.cells:
        cell.metadata.clear()
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
            for output in cell.outputs:
                if "metadata" in output:
                    output.metadata.clear()
    notebook.metadata = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    return notebook


def processor_seconds() -> float:
    """What the processes that were started here, and have ended, have used."""
    times = os.times()
    return times.children_user + times.children_system


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="what the names begin with; all by default")
    parser.add_argument("--check", action="store_true", help="store nothing")
    given = parser.parse_args()
    paths = sorted(path for path in FOLDER.glob("*.ipynb") if path.name.startswith(tuple(given.names or [""])))
    if not paths:
        parser.error(f"{' '.join(given.names)}: no tutorial begins so")
    prepare()  # else the first one stores the progress of it
    for path in paths:
        began, used = time.monotonic(), processor_seconds()
        notebook = executed(path)
        seconds, of_processor = time.monotonic() - began, processor_seconds() - used
        print(f"{path.name}: {seconds:.0f} s, {of_processor:.0f} s of processor", flush=True)
        if not given.check:
            nbformat.write(notebook, path)


if __name__ == "__main__":
    main()
