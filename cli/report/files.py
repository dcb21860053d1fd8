"""Objects and numbers from files that may be absent, damaged, or something else."""

import json
import math
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]


def read_yaml(path: Path) -> dict[str, Any]:
    """An object from a file; empty where there is none."""
    try:
        found = yaml.safe_load(path.read_text())
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    return found if isinstance(found, dict) else {}


def read_json(path: Path, missing: list[str], so: str) -> dict[str, Any]:
    """An object from a file; empty, with a note, where there is none."""
    try:
        found = json.loads(path.read_text())
    except FileNotFoundError:
        missing.append(f"{path}: not there; {so}.")
        return {}
    except (OSError, ValueError) as error:
        missing.append(f"{path}: cannot be read ({error}); {so}.")
        return {}
    if isinstance(found, dict) and found:
        return found
    missing.append(f"{path}: holds no object; {so}.")
    return {}


def as_number(value: Any) -> float:
    """NaN for all that is no finite number."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) < 1e300:
        return math.nan
    return float(value)
