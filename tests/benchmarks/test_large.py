"""The script for a GPU, on a processor with tiny shapes."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "large.py"


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="resident memory by /proc")
def test_it_measures_and_checks_everything() -> None:
    """Both methods have every figure; the policy is its reference; a step is repeatable, and right in bfloat16."""
    sizes = {"size": "tiny", "batch": 4, "prompt": 8, "length": 8, "device": "cpu", "repeats": 1, "most": 8}
    given = [f"--{name}={value}" for name, value in sizes.items()]
    run = subprocess.run([sys.executable, str(SCRIPT), *given], capture_output=True, text=True, check=True)
    rows = [line.strip("| ").split(" | ") for line in run.stdout.splitlines() if line.startswith("| ")]
    steps = {name: cells for name, *cells in rows if name in ("GradeSTE", "RLOO")}
    assert set(steps) == {"GradeSTE", "RLOO"}
    for sampling, speed, share, training, utilisation, memory, largest in steps.values():
        assert all(float(cell) > 0 for cell in (sampling, speed, training))
        assert re.fullmatch(r"\d+%", share)
        assert re.fullmatch(r"\d+\.\d%", utilisation)
        assert float(memory) >= 0
        assert largest == "8"
    checked = {what: float(cells[0]) for what, *cells in rows if cells and what not in {*steps, "step", "check"}}
    kl, logps, cosine, length, twice = checked.values()
    assert kl == 0
    assert logps < 0.1
    assert cosine > 0.98
    assert 0.9 < length < 1.1
    assert twice < 1e-3
