"""mean_i s_i - k std_i s_i for each item: what the parts disagree on is worth less (Coste et al. 2023, who take the
variance; the standard deviation keeps the unit). The population's formula: two parts at distance d have d / 2. The
disagreement itself is the `spread` of the score.
"""

import math

from contracts.checks.check import Check
from contracts.config import RewardServiceConfig, ScorerConfig
from reward_service.scorer_kind import CompositeKind


class Ensemble(CompositeKind):
    least = 2

    def formula(self, entry: ScorerConfig, values: list[float]) -> float:
        return _mean(values) - entry.std_coef * self.spread(values)

    def spread(self, values: list[float]) -> float:
        center = _mean(values)
        return math.sqrt(math.fsum((value - center) ** 2 for value in values) / len(values))

    def checks(self, key: str, entry: ScorerConfig, service: RewardServiceConfig) -> list[Check]:
        std_coef = Check(entry.std_coef >= 0, f"{key}.std_coef", "0 or more", entry.std_coef, "1.0 (the default)")
        return [*super().checks(key, entry, service), std_coef]


def _mean(values: list[float]) -> float:
    return math.fsum(values) / len(values)


KIND = Ensemble()
