"""What several test files share."""

from pathlib import Path

import numpy as np

GOLDEN = Path(__file__).parent / "golden"


def relative_error(ours: np.ndarray, reference: np.ndarray) -> float:
    """Largest absolute difference over the scale (standard deviation) of the reference."""
    return float(np.abs(ours - reference).max() / reference.std())
