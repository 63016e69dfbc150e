"""What an arm gained for how much drift, and what PPO had gained when it had drifted as far.

The path of a loop is read from its rollouts in training: the KL and the gold score of each version, a mean over
neighbouring versions, gains counted from the first. An arm's end is its held-out evaluation. The two are on different
prompts, so the page shows PPO's own end beside the end of its path.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from controller.record.evaluation import judged_model
from controller.record.number_text import bounds, number
from controller.report.svg import smoothed
from studies.five_reasons.members import Member

WINDOW = 5  # versions


@dataclass
class Path:
    """Of one member: KL in nats a sequence, rising, and the gold gain since the first version."""

    kl: list[float]
    gain: list[float]
    rollouts: int  # behind each version that the gold judge scored

    def at(self, kl: float) -> float:
        """The gain where the path first came as far; NaN where it never did."""
        if not self.kl or not self.kl[0] <= kl <= self.kl[-1]:
            return math.nan
        return float(np.interp(kl, self.kl, self.gain))


def path_of(member: Member) -> Path:
    # They narrow towards both ends: gains count from the first version alone.
    curves = (member.run.curve("ppo", name) for name in ("kl/ref_seq", "reward/gold_mean"))
    kl, gold = (dict(smoothed(curve, WINDOW, narrows=True)) for curve in curves)
    both = [(kl.get(step), score) for step, score in gold.items()]
    known = [(x, y) for x, y in both if x is not None and y is not None]
    scored = number(member.run.setting("ppo.gold_rollouts")) or 0
    if not known:
        return Path([], [], 0)
    # Where the KL goes back the farthest point so far stands: a path is read by where it first came.
    farthest = np.maximum.accumulate([x for x, _ in known]).tolist()
    gains = [y - known[0][1] for _, y in known]
    firsts = [i for i, x in enumerate(farthest) if i == 0 or x > farthest[i - 1]]
    return Path([farthest[i] for i in firsts], [gains[i] for i in firsts], int(scored))


def best_of_n(member: Member, judge: str) -> Path:
    """The best of 1, 2, 4, ... n: gains over the best of one, which is the SFT model, against the bound of the KL."""
    rows = judged_model(member.run.evaluation).get("best_of_n") or []
    means = [(number(row.get("kl")), bounds(row.get(judge))[0]) for row in rows]
    known = [(kl, mean) for kl, mean in means if kl is not None and mean is not None]
    return Path([kl for kl, _ in known], [mean - known[0][1] for _, mean in known], 0)


@dataclass
class Matched:
    """One member beside PPO of the same seed at the KL where the member ended."""

    arm: str
    seed: int
    kl: float
    gain: float  # held-out, over SFT
    ppo_gain: float  # in training, at that KL; NaN where PPO never came so far or has no path
    ppo_error: float  # standard error of `ppo_gain`


def matched_kl(members: Sequence[Member], reference: str = "ppo") -> list[Matched]:
    """Every judged member that plays single turns beside the reference of its seed, the reference included."""
    paths = {m.seed: (path_of(m), m) for m in members if m.arm == reference}
    rows = []
    for member in members:
        own, sft, kl = member.mean("own", "gold"), member.mean("sft", "gold"), member.kl
        one_turn = member.run.setting("environment.name") in (None, "single_turn")
        if own is None or sft is None or kl is None or not one_turn:
            continue
        path, ppo = paths.get(member.seed, (Path([], [], 0), None))
        gold = list(ppo.scores["own"]["gold"].values()) if ppo and ppo.is_judged else []
        # A mean over the window less the first version, which stands alone, of independent rollouts.
        scored = path.rollouts
        error = float(np.nanstd(gold)) * math.sqrt(1 / scored + 1 / (scored * WINDOW)) if gold and scored else math.nan
        rows.append(Matched(member.arm, member.seed, kl, own - sft, path.at(kl), error))
    return rows
