"""From configured scorers to what the service runs: their order, versions and application names."""

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from common.error_text import error_lines, typed_line
from common.files.code_digest import foreign_digest, said
from common.files.fingerprints import json_digest
from common.files.source_code import TANDEM, own_files
from contracts.config import RewardServiceConfig, ScorerConfig
from reward_service.scorer_kind import ScorerSpec, scorer_kind, version_of


class ScorerError(ValueError):
    """The scorers cannot be served as they are configured; the message lists every reason."""


def content_of(entry: ScorerConfig, memory: Path | None = None) -> str:
    """A digest of the files that a scorer's values come from, the source of a kind that is not ours among them; empty where
    there are none. Raises OSError, ValueError where something is not there."""
    return scorer_kind(entry.kind).content(entry, memory) + _foreign_source(entry.kind)


def _foreign_source(kind: str) -> str:
    return foreign_digest(kind) if ":" in kind else ""


def _built_on(kind: str) -> str:
    """What a kind that is not ours has of Tandem beside what every kind is made with; empty where that is nothing."""
    if ":" not in kind:
        return ""
    every = said([TANDEM / "reward_service/scorer_kind.py"])
    more = {name: digest for name, digest in said(own_files(kind)).items() if name not in every}
    return json_digest(more) if more else ""


def resolve(
    scorers: dict[str, ScorerConfig], config: RewardServiceConfig, tokenizer: str | None = None
) -> dict[str, ScorerSpec]:
    """A spec for each scorer, in the order given.

    Args:
        tokenizer: the checkpoint whose token ids are scored; a model that reads them otherwise is refused.

    Raises:
        ScorerError: naming every checkpoint and function that does not exist or cannot be read, and composites of
            themselves.
    """
    specs: dict[str, ScorerSpec] = {}
    shared: dict[str, str] = {}  # two names for one checkpoint or function share its replicas
    problems: list[str] = []

    def spec(name: str, above: tuple[str, ...]) -> ScorerSpec | None:
        if name in specs:
            return specs[name]
        if name in above:
            raise ScorerError(f"{name} is a part of itself: {' -> '.join((*above, name))}")
        if name not in scorers:
            raise ScorerError(f"{above[-1]} has the part {name}, which is no scorer; there are {', '.join(scorers)}")
        entry = scorers[name]
        try:
            kind = scorer_kind(entry.kind)
            if kind.is_composite:
                parts = [part for part in (spec(part, (*above, name)) for part in entry.parts) if part]
                if len(parts) < len(entry.parts):
                    return None
                found = _composite(name, entry, parts)
            else:
                found = kind.spec(name, entry, config, tokenizer)
            if source := _foreign_source(entry.kind) + _built_on(entry.kind):
                settings = json.dumps(asdict(entry), sort_keys=True, default=str)
                found = replace(found, version=version_of(found.version, source, settings))
            if not kind.is_composite:
                ours = f"reward-{name}-{found.version}"
                found = replace(found, application=shared.setdefault(f"{entry} {found.version}", ours))
        except ScorerError:
            raise
        except (
            Exception
        ) as error:  # whatever a library raises on a file that it cannot read; it is this scorer's reason
            known = isinstance(error, OSError | ValueError)
            problems.append(f"{name}: {error_lines(error)[0] if known else typed_line(error)}")
            return None
        specs[name] = found
        return found

    for name in scorers:
        spec(name, ())
    if problems:
        raise ScorerError("\n".join(problems))
    return {name: specs[name] for name in scorers}


def _composite(name: str, entry: ScorerConfig, parts: list[ScorerSpec]) -> ScorerSpec:
    """Its version is its formula and the versions of its parts."""
    parameters: dict[str, Any] = {"std_coef": entry.std_coef, "weights": entry.weights}
    if scorer_kind(entry.kind).routes:
        parameters |= {"parts": entry.parts, "options": entry.options}  # whose names decide which part scores
    formula = json.dumps(parameters, sort_keys=True, default=str)
    version = version_of(entry.kind, formula, *(part.version for part in parts))
    return ScorerSpec(name, entry, version, parts=tuple(part.name for part in parts))
