"""How far numbers lie apart, told from the rounding of equal ones: what may be divided by."""

from collections.abc import Sequence

import numpy as np

# Relative to the numbers themselves. Scores and advantages are float32 sums, which keep five digits or more; a spread below
# is the computer's, and dividing by it would make units of its noise.
ROUNDING = 1e-5


def spread(values: Sequence[float] | np.ndarray) -> float:
    """Standard deviation (the population's) of at least one value; 0 where it is rounding: at most `ROUNDING` of the largest
    magnitude."""
    vector = np.asarray(values, dtype=np.float64)
    deviation = float(vector.std())
    return deviation if deviation > ROUNDING * float(np.abs(vector).max()) else 0.0
