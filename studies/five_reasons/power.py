"""`python -m studies.five_reasons.power STUDY`: how many seeds and prompts decide a claim, from an earlier study.json.

    p-value, interval and means by seed of a claim ── mean squares ──> variance components
    components, effect ── simulated studies, judged as a study is (`contrasts`) ──> how often the verdict is right
    the fewest seeds at each number of prompts ── minutes of a member ──> the cheapest design

The difference of seed s on prompt p is D[s, p] = effect + seed_s + prompt_p + rest_sp, all normal, as `crossed_error`
takes it. Completions beyond the first on a prompt, instead of more prompts, are not tried: both halve what is left over, and
only more prompts halve the prompts' own part too.
"""

import argparse
import json
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy import optimize, stats

from common.statistics import FloatArray
from studies.five_reasons.contrasts import Estimate, crossed_error, holm_levels, resample, verdict
from studies.five_reasons.registration import Bootstrap, Preregistration, StudyError, parse
from studies.five_reasons.run_missing import MEMBER_MINUTES

BOOTSTRAP = Bootstrap(samples=1000, seed=0)  # of a simulated study; a real one takes more
MOST_SEEDS = 40
TARGET, ALPHA = 0.9, 0.05  # of right verdicts; of the family of claims


@dataclass(frozen=True)
class Components:
    """Variances of a claim's differences, in squares of the gold judge's unit."""

    seeds: float
    prompts: float
    rest: float

    def draw(self, effect: float, seeds: int, prompts: int, rng: np.random.Generator) -> FloatArray:
        """Differences [seeds, prompts] of a simulated study."""
        of_seed = rng.normal(0, math.sqrt(self.seeds), (seeds, 1))
        of_prompt = rng.normal(0, math.sqrt(self.prompts), (1, prompts))
        return effect + of_seed + of_prompt + rng.normal(0, math.sqrt(self.rest), (seeds, prompts))


# ---- variance components from what a study.json keeps


def standard_error(p_value: float, mean: float, reach: float, level: float) -> tuple[float, float]:
    """Standard error and degrees of freedom of the t interval that reaches `reach` from `mean` to either side at `level` and
    whose two-sided p-value against 0 is `p_value`.

    Raises:
        StudyError: there are none: the bootstrap was the wider one, or the effect is 0.
    """

    def off(freedom: float) -> float:
        error = reach / stats.t.ppf((1 + level) / 2, freedom)
        return float(2 * stats.t.sf(abs(mean) / error, freedom) - p_value)

    ends = 1.0, 1e4
    if off(ends[0]) * off(ends[1]) > 0:
        raise StudyError("its p-value and its interval are not those of one t interval: its components are not known")
    freedom = float(optimize.brentq(off, *ends, xtol=1e-13, rtol=1e-13))
    return reach / float(stats.t.ppf((1 + level) / 2, freedom)), freedom


def components_of(claim: Mapping[str, Any]) -> Components:
    """Of one row of `claims` of a study.json with two seeds or more, exactly: `crossed_error` turned round.

    With S seeds, P prompts and the mean squares MS, whole = se^2 S P = MS_seeds + MS_prompts - MS_rest, and
    whole^2 / freedom is the sum of MS^2 over their degrees of freedom; MS_seeds is P times the variance of means by seed.
    Two equations are left for MS_prompts and MS_rest. Components are those of the expected mean squares (Cornfield & Tukey
    1956), and 0 where these say less.

    Raises:
        StudyError: it has one seed or none, or its interval is not the t interval.
    """
    found = claim["estimate"]
    seeds, prompts = len(found["seeds"]), found["prompts"]
    if seeds < 2:
        raise StudyError(f"claim {claim['number']} has {seeds} seeds; variance components need two or more")
    reach = (found["high"] - found["low"]) / 2
    if abs(found["high"] + found["low"] - 2 * found["mean"]) > 1e-9:
        raise StudyError(
            f"claim {claim['number']}: its interval is not the t interval, so its components are not known"
        )
    error, freedom = standard_error(claim["p_value"], found["mean"], reach, found["level"])
    whole = error**2 * seeds * prompts
    of_seeds = prompts * float(np.var(found["by_seed"], ddof=1))
    difference = whole - of_seeds  # MS_prompts - MS_rest
    free = prompts - 1, (seeds - 1) * (prompts - 1)
    left = whole**2 / freedom - of_seeds**2 / (seeds - 1)
    a, b, c = 1 / free[0] + 1 / free[1], 2 * difference / free[0], difference**2 / free[0] - left
    inside = b**2 - 4 * a * c
    if inside < 0:
        raise StudyError(f"claim {claim['number']}: no mean squares give its interval; its components are not known")
    rest = (-b + math.sqrt(inside)) / (2 * a)
    if rest > of_seeds:  # then the lower bound of `crossed_error` counts, and whole is MS_prompts
        rest = math.sqrt((left - whole**2 / free[0]) * free[1])
        difference = whole - rest
    return Components(max(0.0, (of_seeds - rest) / prompts), max(0.0, difference / seeds), rest)


def planned(claims: Sequence[Mapping[str, Any]]) -> dict[int, Components]:
    """What a second study is planned with, by number of those claims of a study.json that have seeds.

    The variance of seeds is the claim's own, or the mean of all claims where that is larger: each comes from few seeds. The
    first study sampled base and SFT models with one seed, which puts the noise of their completions into the prompts' part;
    the second samples them anew with every seed (`evaluate.seed`), which makes it part of the rest. It is taken to be what
    a claim with such cells has in its part of prompts beyond the largest of those without.
    """
    found = {row["number"]: components_of(row) for row in claims if row["metric"] != "negation_auc"}
    mean = float(np.mean([part.seeds for part in found.values()]))
    before = {row["number"] for row in claims if any(":" in cell for cell in row["contrast"])}
    most = max((part.prompts for number, part in found.items() if number not in before), default=math.inf)
    moved = {number: max(0.0, part.prompts - most) if number in before else 0.0 for number, part in found.items()}
    return {
        number: Components(max(part.seeds, mean), part.prompts - moved[number], part.rest + moved[number])
        for number, part in found.items()
    }


# ---- simulated studies


def judged(table: FloatArray) -> Estimate:
    """As `contrasts.estimate` judges the differences [seeds, prompts] of a study."""
    return Estimate(float(table.mean()), resample(table, BOOTSTRAP), error=crossed_error(table))


def power(
    parts: Components, effect: float, seeds: int, prompts: int, *, margin: float, level: float, studies: int
) -> Counter[str]:
    """How often simulated studies come to each verdict on one claim that is tested at `level` (two-sided)."""
    rng = np.random.default_rng([seeds, prompts])
    found = [judged(parts.draw(effect, seeds, prompts, rng)) for _ in range(studies)]
    return Counter(verdict(row.interval(1 - level), row.interval(1 - level), margin) for row in found)


def right(effect: float) -> str:
    return "reproduced" if effect > 0 else "equivalent" if effect == 0 else "opposite"


def fewest_seeds(
    parts: Components, effect: float, prompts: int, *, margin: float, level: float, studies: int
) -> int | None:
    """That come to the right verdict `TARGET` of the time, by bisection; None where `MOST_SEEDS` are too few."""

    def enough(seeds: int) -> bool:
        said = power(parts, effect, seeds, prompts, margin=margin, level=level, studies=studies)
        return said[right(effect)] >= TARGET * studies

    if not enough(MOST_SEEDS):
        return None
    low, high = 1, MOST_SEEDS
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle, high)
    return high


def family(
    parts: Mapping[int, Components],
    effects: Mapping[int, float],
    seeds: Mapping[int, int],
    prompts: int,
    *,
    margins: Mapping[int, float],
    alpha: float,
    known: Sequence[float] = (),
    studies: int,
) -> dict[int, Counter[str]]:
    """How often whole studies come to each verdict, by claim, at the levels of a study's verdicts.

    Args:
        effects: true ones by claim. Claims are drawn independently, though they share arms.
        known: p-values of further claims of the family, which do not vary.
    """
    rng = np.random.default_rng(prompts)
    said: dict[int, Counter[str]] = {number: Counter() for number in parts}
    for _ in range(studies):
        rows = [judged(parts[n].draw(effects[n], seeds[n], prompts, rng)) for n in parts]
        levels = holm_levels([*(row.p_value for row in rows), *known], alpha)
        for number, row, level in zip(parts, rows, levels, strict=False):
            wide = row.interval(1 - alpha / (len(parts) + len(known)))
            said[number][verdict(row.interval(1 - level), wide, margins[number])] += 1
    return said


# ---- designs


def hours(runs: int, at_a_time: int = 2) -> float:
    return runs * MEMBER_MINUTES / at_a_time / 60


def needed_runs(claims: Sequence[Mapping[str, Any]], seeds: Mapping[int, int]) -> int:
    """Members of a study whose claims have so many seeds, each from the same first one on."""
    by_arm: dict[str, int] = {}
    for row in claims:
        for cell in row["contrast"] if row["number"] in seeds else ():
            arm = cell.split(":")[0]
            by_arm[arm] = max(by_arm.get(arm, 0), seeds[row["number"]])
    return sum(by_arm.values())


def what_it_takes(study: Mapping[str, Any], alpha: float, prompts: Sequence[int], studies: int) -> Iterator[str]:
    """Lines: the fewest seeds of each claim at so many prompts, at the strictest level that is left when the claims without
    seeds are decided, and the hours of all claims together."""
    parts, claims = planned(study["claims"]), study["claims"]
    margins = {row["number"]: row["margin"] for row in claims}
    for n, c in parts.items():
        yield f"  {n}. variances: seeds {c.seeds:.4f}, prompts {c.prompts:.3f}, rest {c.rest:.3f}"
    for count in prompts:
        for scale, title in ((1.0, "a true difference of the margin"), (0.0, "no difference")):
            found = {
                n: fewest_seeds(
                    c, scale * margins[n], count, margin=margins[n], level=alpha / len(parts), studies=studies
                )
                for n, c in parts.items()
            }
            runs = needed_runs(claims, {n: seeds or MOST_SEEDS for n, seeds in found.items()})
            cost = f"{'' if all(found.values()) else 'more than '}{runs} runs, {hours(runs):.1f} h"
            seeds = ", ".join(f"{n}: {s or f'> {MOST_SEEDS}'}" for n, s in found.items())
            yield f"  {count} prompts, {title}: seeds by claim {seeds} ({cost})"


def what_it_decides(study: Mapping[str, Any], plan: Preregistration, studies: int) -> Iterator[str]:
    """Lines: verdicts of simulated studies of a plan's design, by what is true."""
    rows = {row["number"]: row for row in study["claims"]}
    parts = {n: part for n, part in planned(study["claims"]).items() if n in {claim.number for claim in plan.claims}}
    claims = {claim.number: claim for claim in plan.claims}
    seeds = {n: claims[n].seeds or plan.seeds for n in parts}
    margins = {n: claims[n].margin for n in parts}
    measured = {n: float(rows[n]["estimate"]["mean"]) for n in parts}
    known = [rows[n]["p_value"] for n in claims if n not in parts]
    runs = len(plan.needed())
    yield f"  seeds by claim {seeds}, {plan.prompts} prompts: {runs} runs, {hours(runs):.1f} h"
    for title, effects in (
        ("differences as measured", measured),
        ("three quarters of them", {n: 0.75 * effect for n, effect in measured.items()}),
        ("all of the margin", margins),
        ("none", dict.fromkeys(parts, 0.0)),
    ):
        assert plan.prompts is not None
        said = family(
            parts, effects, seeds, plan.prompts, margins=margins, alpha=plan.alpha, known=known, studies=studies
        )
        for number, verdicts in said.items():
            shares = ", ".join(f"{name} {share / studies:.0%}" for name, share in verdicts.most_common())
            yield f"  {title}: claim {number} ({effects[number]:+.2f}) {shares}"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m studies.five_reasons.power", description=__doc__.splitlines()[0])
    parser.add_argument("study", type=Path, metavar="STUDY", help="study.json of an earlier study with seeds")
    parser.add_argument("--plan", type=Path, help="a pre-registration whose design is simulated")
    parser.add_argument("--prompts", type=int, nargs="+", default=[160, 256, 384])
    parser.add_argument("--studies", type=int, default=400, help="simulated ones for each number (400)")
    given = parser.parse_args(arguments)
    try:
        study = json.loads(given.study.read_text(encoding="utf-8"))
        if given.plan:
            plan = parse(given.plan.read_text(encoding="utf-8"))
            if plan.prompts is None or plan.first_seed is None:
                raise StudyError(f"{given.plan} registers no prompts or no first_seed: there is no design to simulate")
            lines = what_it_decides(study, plan, given.studies)
        else:
            lines = what_it_takes(study, ALPHA, given.prompts, given.studies)
        for line in lines:
            print(line, flush=True)
    except StudyError as error:
        raise SystemExit(f"power: {error}") from error


if __name__ == "__main__":
    main()
