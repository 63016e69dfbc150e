"""What a run is made of: the content of what it reads, and what decides a reward though no configuration shows it."""

from dataclasses import asdict
from glob import glob
from pathlib import Path
from typing import Any

from common.files.code_digest import code_digest, foreign_digest, package_versions, stage_code
from common.files.fingerprints import MEMORY, checkpoint_fingerprint, file_hashes, json_digest
from common.flatten import flat
from contracts.checks.validation import ConfigError
from contracts.config import SourceConfig, TandemConfig
from contracts.environments import is_import_path
from contracts.methods import checkpoints_read, running_stages, samples, sources_read
from controller.record.redaction import redacted
from reward_service.resolve import content_of

UNSEEN = ("scoring", "hidden")  # the keys of `unseen`


def unseen(config: TandemConfig) -> dict[str, Any]:
    """What decides a reward and what the configuration without secrets does not show: how and with what each configured
    scorer scores, and a hash of the values that `redacted` may have blanked.

    Raises:
        ConfigError: a function's source or a checkpoint is not there.
    """
    service, memory, contents = config.reward_service, Path(config.cache_dir) / MEMORY, dict[str, str]()
    for name, scorer in service.scorers.items():
        try:
            if content := content_of(scorer, memory):
                contents[name] = content
        except (ValueError, OSError) as error:
            raise ConfigError(f"reward_service.scorers.{name}: {error}") from None
    values = [asdict(config.environment), {name: asdict(scorer) for name, scorer in service.scorers.items()}]
    return {"scoring": [service.dtype, service.max_tokens, contents], "hidden": json_digest(values)}


def environment_hidden(config: TandemConfig) -> dict[str, str]:
    """A digest of each of the environment's values that `redacted` blanks, by its key: `keyword` is no secret and decides
    what a prompt is."""
    values = asdict(config.environment)
    whole, shown = flat(values), flat(redacted(values))
    return {name: json_digest([name, value])[:16] for name, value in whole.items() if shown.get(name, ...) != value}


def own_source(key: str, name: str) -> str | None:
    """A digest of the source of what `key` names; None of what is Tandem's. Raises ConfigError where it is not there."""
    try:
        return (foreign_digest(name) or None) if is_import_path(name) else None
    except ValueError as error:
        raise ConfigError(f"{key}: {error}") from None


def made_of(config: TandemConfig) -> str:
    """SHA-256 (hex) over the content of what a run reads (data, checkpoints, functions, stages that are not ours), over
    Tandem's code and the versions of packages.

    Raises:
        OSError, ValueError: something is not there.
    """
    memory = Path(config.cache_dir) / MEMORY
    sources = [source for name in sorted(sources_read(config)) for source in _sources(config, name)]
    files = [file for source in sources for file in _files(source.path)]
    read = {"model.path": config.model.path, **checkpoints_read(config)}
    checkpoints = {
        key: checkpoint_fingerprint(path, config.model.revision_of(path), memory) for key, path in read.items()
    }
    named = {"environment.name": config.environment.name, "ppo.estimator": config.ppo.estimator}
    scoring = [unseen(config), *(own_source(*item) for item in named.items())] if samples(config) else []
    elsewhere = {stage.name: stage_code(stage.name) for stage in running_stages(config) if ":" in stage.name}
    return json_digest([code_digest(), package_versions(), file_hashes(files, memory), checkpoints, scoring, elsewhere])


def _sources(config: TandemConfig, name: str) -> list[SourceConfig]:
    mixed = config.data.prompt_sources if name == "prompts" else {}
    return [mixed[key] for key in sorted(mixed)] or [getattr(config.data, name)]


def _files(source: str) -> list[Path]:
    """Of a file, a directory or a pattern; none of a hub id."""
    path = Path(source).expanduser()
    found = (
        [path] if path.is_file() else path.rglob("*") if path.is_dir() else map(Path, glob(str(path), recursive=True))
    )
    return sorted(file for file in found if file.is_file())
