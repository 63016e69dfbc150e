"""From configured scorers to what the service runs: their order, versions and application names."""

from dataclasses import asdict, replace

from common.error_text import error_lines
from contracts.config import RewardServiceConfig, ScorerConfig
from reward_service.front import ScorerSpec
from reward_service.reading import EOS, chosen_read_at
from reward_service.versions import composite_version, function_version, model_version, vocabulary

MODEL_CALLS, MODEL_CALL_ITEMS = (
    4,
    32,
)  # to a replica: enough for its batches, few enough to try one at a time if it dies


class ScorerError(ValueError):
    """The scorers cannot be served as they are configured; the message lists every reason."""


def resolve(
    scorers: dict[str, ScorerConfig], config: RewardServiceConfig, tokenizer: str | None = None
) -> dict[str, ScorerSpec]:
    """A spec for each scorer, in the order given.

    Args:
        tokenizer: the checkpoint whose token ids are scored; a model that reads them otherwise is refused.

    Raises:
        ScorerError: naming every checkpoint and function that does not exist, and composites of themselves.
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
            if entry.kind in ("weighted_sum", "ensemble"):
                parts = [spec(part, (*above, name)) for part in entry.parts]
                if None in parts:
                    return None
                found = _composite(name, entry, [part for part in parts if part])
            else:
                found = _leaf(name, entry, config)
                if entry.kind == "model" and tokenizer is not None:
                    _check_vocabulary(str(entry.path), tokenizer)
                same = shared.setdefault(f"{entry} {found.version}", str(found.application))
                found = replace(found, application=same)
        except (OSError, ValueError) as error:
            if isinstance(error, ScorerError):
                raise
            problems.append(f"{name}: {error_lines(error)[0]}")
            return None
        specs[name] = found
        return found

    for name in scorers:
        spec(name, ())
    if problems:
        raise ScorerError("\n".join(problems))
    return {name: specs[name] for name in scorers}


def _leaf(name: str, entry: ScorerConfig, config: RewardServiceConfig) -> ScorerSpec:
    if entry.kind == "model":
        from reward_service.model import check_reward_model

        source = entry.path or ""
        check_reward_model(source, "path")
        read_at = chosen_read_at(source, entry.read_at, entry.append)
        reading = "" if read_at == EOS else f"{read_at} {entry.append}"
        version, calls = model_version(source, config.dtype, reading), MODEL_CALLS * config.replicas
        return ScorerSpec(
            name,
            entry.kind,
            version,
            f"reward-{name}-{version}",
            config.max_tokens,
            calls,
            MODEL_CALL_ITEMS,
            source=source,
            read_at=read_at,
        )
    # What is in one call waits for the slowest of it: a function that may hang is called as the pool calls it.
    source = entry.function or ""
    version, calls = function_version(source), entry.processes * config.replicas
    return ScorerSpec(
        name, entry.kind, version, f"reward-{name}-{version}", None, calls, entry.batch_size, source=source
    )


def _check_vocabulary(path: str, tokenizer: str) -> None:
    """Another model's token ids would be scored without any error, and mean nothing. Raises ValueError."""
    own, ours = vocabulary(path), vocabulary(tokenizer)
    if own is not None and ours is not None and own != ours:
        raise ValueError(f"{path} has another vocabulary than {tokenizer}, whose token ids are scored")


def _composite(name: str, entry: ScorerConfig, parts: list[ScorerSpec]) -> ScorerSpec:
    formula = {key: value for key, value in asdict(entry).items() if key in ("weights", "std_coef")}
    version = composite_version(entry.kind, formula, [part.version for part in parts])
    names = tuple(part.name for part in parts)
    weights = tuple(entry.weights)
    return ScorerSpec(name, entry.kind, version, parts=names, weights=weights, std_coef=entry.std_coef)
