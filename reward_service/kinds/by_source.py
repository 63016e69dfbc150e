"""Each item by the part that its source has: the column `source` of its row (docs/data.md#several-sources)."""

import json

from contracts.checks.check import Check
from contracts.config import RewardServiceConfig, ScorerConfig
from contracts.records import SOURCE
from reward_service.scorer_kind import CompositeKind


class BySource(CompositeKind):
    """`options` has the part of each source, {source: part}; one that is not there is scored by the part of its name."""

    routes = True

    def parts_of(self, entry: ScorerConfig, row: str | None) -> list[str]:
        source = (json.loads(row) if row else {}).get(SOURCE)
        part = entry.options.get(source, source) if isinstance(source, str) else None
        return [part] if part in entry.parts else []

    def unroutable(self, entry: ScorerConfig, row: str | None) -> str | None:
        if self.parts_of(entry, row):
            return None
        known = sorted({*entry.options, *entry.parts})
        columns = json.loads(row) if row else {}
        found = repr(columns[SOURCE])[:80] if SOURCE in columns else "no such column"
        return f"{SOURCE} must be one of {', '.join(known)}; found {found}"

    def checks(self, key: str, entry: ScorerConfig, service: RewardServiceConfig) -> list[Check]:
        wrong = [f"{name}: {part}" for name, part in entry.options.items() if part not in entry.parts]
        rule = f"parts ({', '.join(entry.parts)}) by source"
        options = Check(not wrong, f"{key}.options", rule, ", ".join(wrong), f"{{SOURCE: PART}}, or add to {key}.parts")
        return [*super().checks(key, entry, service), options]


KIND = BySource()
