"""How long completions will be: as those of a run's samples, or as stated."""

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import NormalDist

from controller.plan.schedule.calibration import CalibrationError

FEWEST = 20  # samples from which lengths can be drawn
STATED = "write a number of tokens (48), a mean and a 95th percentile (48,200), or the directory of a run"

Quantile = Callable[[float], int]  # from a number in (0, 1) to tokens


def read_lengths(text: str, most: int) -> Quantile:
    """Of `--lengths`, at most `most` tokens each.

    Raises:
        CalibrationError: it is neither a run nor numbers, or the run has too few samples.
    """
    if Path(text).is_dir():
        return empirical(_of_run(Path(text)), most)
    try:
        numbers = [float(part) for part in text.split(",")]
    except ValueError:
        raise CalibrationError(f"--lengths {text}: there is no such run; {STATED}") from None
    if len(numbers) > 2 or any(not 1 <= number < math.inf for number in numbers):
        raise CalibrationError(f"--lengths {text}: {STATED}")
    if len(numbers) == 1:
        return fixed(round(numbers[0]), most)
    return long_tailed(numbers[0], numbers[1], most)


def fixed(tokens: int, most: int) -> Quantile:
    return lambda share: min(tokens, most)


def empirical(lengths: Sequence[int], most: int) -> Quantile:
    ordered = sorted(lengths)
    return lambda share: min(ordered[int(share * len(ordered))], most)


def long_tailed(mean: float, p95: float, most: int) -> Quantile:
    """Log-normal. Raises CalibrationError where no such distribution has these: p95 / mean lies between 1 and 3.87."""
    # mean = exp(m + s^2 / 2) and p95 = exp(m + z s), so that s^2 / 2 - z s + log(p95 / mean) = 0: the smaller root.
    z, ratio = NormalDist().inv_cdf(0.95), math.log(p95 / mean)
    if not 0 <= ratio <= z * z / 2:
        raise CalibrationError(
            f"--lengths {mean:g},{p95:g}: of a mean of {mean:g} the 95th percentile lies between {mean:g} and "
            f"{mean * math.exp(z * z / 2):.0f}"
        )
    sigma = z - math.sqrt(z * z - 2 * ratio)
    middle, normal = math.log(mean) - sigma * sigma / 2, NormalDist()

    def quantile(share: float) -> int:
        at = normal.inv_cdf(min(max(share, 1e-9), 1 - 1e-9))
        return min(max(1, round(math.exp(middle + sigma * at))), most)

    return quantile


def _of_run(run: Path) -> list[int]:
    file = run / "samples.jsonl"
    if not file.exists():
        raise CalibrationError(f"--lengths {run}: {file} does not exist")
    rows = [json.loads(line) for line in file.read_text().splitlines() if line]
    found = [int(row["tokens"]) for row in rows if row.get("stage") == "ppo" and row.get("tokens")]
    if len(found) < FEWEST:
        raise CalibrationError(
            f"--lengths {run}: {len(found)} samples of its PPO are there, {FEWEST} are needed; run with a larger "
            "logger.samples_per_update"
        )
    return found
