"""Hydra's part of a command line: the flags that say where the configuration lies, what is composed from there, and why
something cannot be, in a line."""

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from hydra import compose, initialize_config_dir
from hydra._internal.hydra import Hydra
from hydra._internal.utils import compute_search_path_dir, create_config_search_path, get_args_parser
from hydra.conf import HydraConf
from hydra.core.config_search_path import SearchPathQuery
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException, MissingConfigException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from common.error_text import error_lines
from contracts.checks.overrides import override_key
from contracts.checks.validation import ConfigError
from contracts.config import TandemConfig, register_schema, to_config

NAME = "config"  # of the file under conf/ that train.py composes
SEARCH_PATH = "hydra.searchpath"
UNCOMPOSED = (HydraException, OmegaConfBaseException)


def hydra_flags(arguments: list[str]) -> argparse.Namespace:
    """As Hydra reads them, abbreviations included."""
    found: argparse.Namespace = get_args_parser().parse_known_args(arguments)[0]
    return found


@dataclass(frozen=True)
class Origin:
    """Where a command line says that its configuration lies. None of it is an override of a key, so Hydra hands it to no
    other process; a command without it composes another configuration."""

    name: str | None = None
    path: str | None = None  # in place of conf/
    folder: str | None = None  # beside conf/
    search_path: list[str] = field(default_factory=list)  # overrides of hydra.searchpath

    @property
    def words(self) -> list[str]:
        flags = {"--config-path": self.path, "--config-name": self.name, "--config-dir": self.folder}
        return [*(f"{flag}={value}" for flag, value in flags.items() if value is not None), *self.search_path]


def origin_of(arguments: list[str]) -> Origin:
    flags = hydra_flags(arguments)
    places = [word for word in arguments if override_key(word) == SEARCH_PATH]
    return Origin(flags.config_name, flags.config_path, flags.config_dir, places)


def origin_of_run(hydra: HydraConf | DictConfig, conf: Path) -> Origin:
    """Of the run that Hydra has composed: of a member of a sweep too, in whichever process it runs."""
    sources = {source.provider: source.path for source in hydra.runtime.config_sources}
    main = sources.get("main", str(conf))
    places = [word for word in hydra.overrides.hydra if override_key(word) == SEARCH_PATH]
    return Origin(
        None if (name := hydra.job.config_name) == NAME else name,
        None if main == str(conf) else main,
        sources.get("command-line"),
        places,
    )


@contextmanager
def composing(conf: Path, origin: Origin) -> Iterator[str]:
    """Hydra as train.py starts it, whose folder `conf` lies in; gives the name of the configuration to compose."""
    register_schema()
    with initialize_config_dir(str(conf), version_base="1.3"):  # puts back at its end what was there before
        if origin.path is not None or origin.folder is not None:
            place = compute_search_path_dir(str(conf.parent / "train.py"), None, origin.path or conf.name)
            search_path = create_config_search_path(place)
            if origin.folder is not None:
                folder = f"file://{Path(origin.folder).absolute()}"
                search_path.prepend("command-line", folder, anchor=SearchPathQuery(provider="schema"))
            GlobalHydra.instance().clear()
            Hydra.create_main_hydra2(task_name="train", config_search_path=search_path)
        yield origin.name or NAME


def compose_config(overrides: list[str], conf: Path) -> TandemConfig:
    """The configuration that overrides describe.

    Raises:
        ConfigError: with the reason.
    """
    try:
        with composing(conf, Origin()) as name:
            return to_config(compose(name, overrides))
    except UNCOMPOSED as error:
        raise ConfigError(reason(error)) from None


def reason(error: BaseException) -> str:
    """Why Hydra or OmegaConf takes no configuration, with the key: Hydra says in which override, OmegaConf what is wrong."""
    lines = [error_lines(error)[0]]
    inner = error if isinstance(error, OmegaConfBaseException) else error.__cause__
    if isinstance(inner, OmegaConfBaseException):
        line, key = error_lines(inner)[0], getattr(inner, "full_key", None)
        lines = [*(lines if inner is not error else []), f"{key}: {line}" if key and key not in line else line]
    elif inner is not None:
        lines.append(error_lines(inner)[0])
    if isinstance(error, MissingConfigException) and error.options:
        lines.append(f"write one of {', '.join(error.options)}")
    return "; ".join(line.rstrip(".") for line in lines)
