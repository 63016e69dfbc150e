"""What is wrong with a command line, all of it at once, before Hydra composes it.

Hydra stops at the first misspelt key or wrong type, and the checks of values come after it: one error a
try.
"""

import itertools
from collections.abc import Iterable
from dataclasses import field, fields, make_dataclass
from functools import reduce
from pathlib import Path
from typing import Any, get_args, get_type_hints

from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, ValueType
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import ConfigKeyError, OmegaConfBaseException, ValidationError

from common.error_text import error_lines
from contracts.checks.check import shown
from contracts.checks.overrides import quoted, schema_section, unknown_overrides
from contracts.checks.validation import ConfigError, validate
from contracts.config import TandemConfig, register_schema, to_config

MOST_MEMBERS = 64  # of a sweep that are composed and checked beforehand, at about 0.1 s each
HYDRA = ("hydra", "hydra/", "hydra.")
# Flags of Hydra whose value is the next word.
TAKE_VALUE = (
    *("--cfg", "-c", "--package", "-p", "--config-path", "-cp", "--config-name", "-cn", "--config-dir", "-cd"),
    "--experimental-rerun",
)
TYPES = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "a text",
    list[float]: "a list of numbers",
}


def flags_first(arguments: list[str]) -> list[str]:
    """The same words with every override behind Hydra's flags: its parser takes overrides on one side of a flag alone."""
    flags, overrides, takes_value = list[str](), list[str](), False
    for word in arguments:
        is_override = not takes_value and not word.startswith("-") and ("=" in word or word.startswith("~"))
        (overrides if is_override else flags).append(word)
        takes_value = word in TAKE_VALUE
    if flags and flags[-1] in ("--info", "-i"):  # whose value may be left out: an override would be read as it
        flags.append("all")
    return [*flags, *overrides]


def whole_sections(arguments: list[str]) -> list[str]:
    """The same words, with the overrides in sections that may be null (`model.lora={rank:8}`, `model.lora.rank=8`) written
    as one of the section around them (`model={lora:{rank:8}}`): OmegaConf 2.3 merges into a section that is null from there
    alone, and a sweep keeps one override of a key."""
    found = [_whole(word) if "=" in word and not word.startswith(("-", "+", "~")) else None for word in arguments]
    inner: dict[str, list[list[Any]]] = {}
    for section, values in filter(None, found):
        inner.setdefault(section, []).append(values)
    groups = {word.split("=", 1)[0] for word, place in zip(arguments, found, strict=True) if place is None}
    words = []
    for word, place in zip(arguments, found, strict=True):
        if place is None:
            words.append(word)
        elif (chosen := inner.pop(place[0], None)) is not None:  # in the place of the first
            wholes = [reduce(_merged, parts) for parts in itertools.product(*chosen)]
            texts = [Override._get_value_element_as_str(whole) for whole in wholes]
            # Beside a choice of a config group of the same name it needs another key.
            words.append(f"{'++' if place[0] in groups else ''}{place[0]}={','.join(texts)}")
    return words


def _whole(argument: str) -> tuple[str, list[Any]] | None:
    """The section around one that may be null, and what the override sets within it, for each member of a sweep."""
    parts = argument.split("=", 1)[0].split(".")
    for i in range(1, len(parts)):
        section, name = _place(".".join(parts[: i + 1]))
        annotation = get_type_hints(section).get(name) if section else None
        if not schema_section(annotation) or type(None) not in get_args(annotation):
            continue
        try:
            written = OverridesParser.create().parse_override(argument)
            values = [OverridesParser.create().parse_override(setting)._value for setting in _settings(written)]
        except HydraException:  # which `_torn` names
            return None
        if i == len(parts) - 1 and not any(isinstance(value, dict) for value in values):  # null, or of a wrong type
            return None
        wholes = [reduce(lambda whole, part: {part: whole}, reversed(parts[i:]), value) for value in values]
        return (".".join(parts[:i]), wholes) if wholes else None
    return None


def _merged(first: Any, second: Any) -> Any:
    """The second over the first, as one override after the other."""
    if not isinstance(first, dict) or not isinstance(second, dict):
        return second
    return first | {key: _merged(first[key], value) if key in first else value for key, value in second.items()}


def is_multirun(arguments: Iterable[str]) -> bool:
    return any(argument in ("-m", "--multirun") for argument in arguments)


def command_line_problems(arguments: list[str], conf: Path) -> list[str]:
    """Unknown keys, values of a wrong type and, where there are any, the conflicts among the rest; one text each.

    The members of a sweep are all checked against themselves, so that the seventh does not fail after six hours. A single
    run whose overrides are well formed gives an empty list: Hydra composes it and `validate` lists its conflicts.

    Args:
        arguments: `sys.argv[1:]` of a Hydra application.
        conf: absolute path of the configuration directory.
    """
    written = [argument for argument in arguments if "=" in argument and not argument.startswith("-")]
    problems = unknown_overrides(written)
    torn = _torn(written)
    if torn:
        return [*problems, *torn]
    parsed = [o for o in OverridesParser.create().parse_overrides(written) if not unknown_overrides([_line(o)])]
    wrong = {_line(override): text for override in parsed for text in _wrong_types(override)}
    problems += wrong.values()
    sweeps = is_multirun(arguments)
    if sweeps and any(_line(override).startswith("run_dir=") for override in parsed):
        problems.append("run_dir names one run; write hydra.sweep.dir=DIRECTORY for the directory of a sweep")
    # What a sampling sweeper will draw is not known yet.
    sampled = any(_line(override).startswith("hydra/sweeper=") for override in parsed)
    if sweeps and "hydra/sweeper=optuna" in written and "hydra.sweeper.direction=maximize" not in written:
        problems.append(
            "hydra.sweeper.direction must be maximize, as the objective is a gain: by default Optuna looks for the worst; "
            "write hydra.sweeper.direction=maximize as well, or +experiment=sweep_optuna"
        )
    if problems or (sweeps and not sampled):
        kept = [o for o in parsed if _line(o) not in wrong and not _line(o).startswith(HYDRA)]
        problems += _conflicts(_members(kept), conf, _search_path(arguments))
    return problems


def _search_path(arguments: list[str]) -> list[str]:
    """An override for where Hydra finds more configuration, as the words of a command line say it."""
    folders = [word for flag, word in itertools.pairwise(arguments) if flag in ("--config-dir", "-cd")]
    folders += [word.partition("=")[2] for word in arguments if word.startswith("--config-dir=")]
    places = ["pkg://studies.five_reasons.conf", *(f"file://{Path(folder).absolute()}" for folder in folders)]
    given = [word for word in arguments if word.startswith("hydra.searchpath=")]
    return given or ([f"hydra.searchpath=[{','.join(map(quoted, places))}]"] if folders else [])


def _torn(arguments: list[str]) -> list[str]:
    """What Hydra's grammar does not take, as a comma or a bracket out of place, or a path with an equals sign."""
    found = []
    for argument in arguments:
        key, value = argument.split("=", 1)
        try:
            OverridesParser.create().parse_override(argument)
        except HydraException as error:
            quotes = f"; write {key}='\"{value}\"'" if "=" in value else ""
            found.append(f"{key}: {error_lines(error)[0]}{quotes}")
    return found


def _line(override: Override) -> str:
    assert override.input_line is not None
    return override.input_line


def _settings(override: Override) -> list[str]:
    """`key=value` of every value that an override stands for; none for a range without steps, or for what Hydra looks up
    among the choices of a group."""
    if not override.is_sweep_override():
        return [_line(override)]
    if not override.is_discrete_sweep() or override.value_type is ValueType.GLOB_CHOICE_SWEEP:
        return []
    return [f"{override.get_key_element()}={value}" for value in override.sweep_string_iterator()]


def _members(overrides: list[Override]) -> list[tuple[str, ...]]:
    """The overrides of each member of a sweep; one member where nothing is swept."""
    choices = [settings for override in overrides if (settings := _settings(override))]
    return list(itertools.islice(itertools.product(*choices), MOST_MEMBERS))


def _wrong_types(override: Override) -> list[str]:
    key = override.key_or_group
    section, name = _place(key)
    annotation = get_type_hints(section).get(name) if section else None
    if annotation is None or override.is_delete():  # a config group, or a name that the user chooses
        return []
    found = []
    for setting in _settings(override):
        value = OverridesParser.create().parse_override(setting).value()
        if schema_section(annotation) and isinstance(value, str):
            continue  # a choice of a config group
        written = setting.split("=", 1)[1]
        # As 12e4567, a revision, is infinity, and the tag 1.10 is 1.1.
        is_text, is_other = str in (annotation, *get_args(annotation)), isinstance(value, bool | int | float)
        if is_text and is_other and str(value) != written:
            read = f"{written}, which is read as {value}"
            found.append(f"{key} must be a text; found {read}; write {key}='\"{written}\"'")
        try:
            OmegaConf.merge(OmegaConf.structured(_alone(section, name, annotation)), {name: value})
        except ConfigKeyError as error:
            found.append(f"{setting}: {error_lines(error)[0]}")
        except ValidationError:
            found.append(f"{key} must be {_kind(annotation)}; found {value}; write {_example(section, name)}")
    return found


def _alone(section: Any, name: str, annotation: Any) -> Any:
    """A schema with one key of a section, where it holds no keys of its own: OmegaConf would make and copy all that
    the section has."""
    if schema_section(annotation):
        return section
    (found,) = (entry for entry in fields(section) if entry.name == name)
    same: Any = field()
    same.default, same.default_factory = found.default, found.default_factory
    return make_dataclass(section.__name__, [(name, annotation, same)])


def _place(key: str) -> tuple[Any, str]:
    """The section of the schema that a dotted key lies in, or None, and the key's last part."""
    *sections, name = key.split(".")
    place: Any = TandemConfig
    for part in sections:
        place = schema_section(get_type_hints(place).get(part)) if place else None
    return place, name


def _kind(annotation: Any) -> str:
    if schema_section(annotation):
        return "a section with keys of its own"
    kinds = get_args(annotation)
    if type(None) not in kinds:
        return TYPES.get(annotation, str(annotation))
    return f"{TYPES.get(next(kind for kind in kinds if kind is not type(None)), str(annotation))} or null"


def _example(section: Any, name: str) -> str:
    default = OmegaConf.select(OmegaConf.structured(section), name, throw_on_missing=False)
    return f"for example {shown(default)} (the default)"


def _conflicts(members: list[tuple[str, ...]], conf: Path, search_path: list[str]) -> list[str]:
    """Of all members, each named once and with the first member that has it where there are several."""
    register_schema()
    found: dict[str, str] = {}
    with initialize_config_dir(str(conf), version_base="1.3"):
        for number, member in enumerate(members):
            where = f" (in member {number}: {' '.join(member)})" if len(members) > 1 else ""
            for text in _member_conflicts([*member, *search_path]):
                found.setdefault(text, where)
    return [text + where for text, where in found.items()]


def _member_conflicts(overrides: list[str]) -> list[str]:
    try:
        validate(to_config(compose("config", whole_sections(overrides))))
    except ConfigError as error:
        return error.conflicts
    except (HydraException, OmegaConfBaseException) as error:
        return [error_lines(error)[0]]
    return []
