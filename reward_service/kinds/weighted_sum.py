"""sum_i w_i s_i for each item."""

from contracts.checks.check import Check
from contracts.config import RewardServiceConfig, ScorerConfig
from reward_service.scorer_kind import CompositeKind


class WeightedSum(CompositeKind):
    def formula(self, entry: ScorerConfig, values: list[float]) -> float:
        return sum(weight * value for weight, value in zip(entry.weights, values, strict=True))

    def checks(self, key: str, entry: ScorerConfig, service: RewardServiceConfig) -> list[Check]:
        count, rule = len(entry.parts), f"{len(entry.parts)} numbers, one a part"
        weights = Check(len(entry.weights) == count, f"{key}.weights", rule, entry.weights, "as many")
        return [*super().checks(key, entry, service), weights]


KIND = WeightedSum()
