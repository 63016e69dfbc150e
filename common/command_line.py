"""What is wrong with a command line, all of it at once, before Hydra composes it.

Hydra stops at the first misspelt key or wrong type, and the checks of values come after it: one error a
try.
"""

import copy
import itertools
import os
from collections.abc import Callable, Iterable
from functools import reduce
from pathlib import Path
from typing import Any, get_args, get_origin

from hydra import compose
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, Quote, QuotedString, ValueType
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf, open_dict

from common.composing import UNCOMPOSED, Origin, composing, hydra_flags, origin_of, reason
from common.error_text import error_lines
from common.override_values import schema_place, value_problems
from contracts.checks.check import shown
from contracts.checks.overrides import override_key, schema_section, unknown_overrides
from contracts.checks.validation import ConfigError, validate
from contracts.config import TandemConfig, to_config

MOST_MEMBERS = 64  # of a sweep that are composed and checked beforehand, at about 0.1 s each
HYDRA = ("hydra", "hydra/", "hydra.")
# Flags of Hydra whose value is the next word.
TAKE_VALUE = (
    *("--cfg", "-c", "--package", "-p", "--config-path", "-cp", "--config-name", "-cn", "--config-dir", "-cd"),
    "--experimental-rerun",
)


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
    alone, and a sweep keeps one override of a key. So are those that add a section under a name of its own
    (`+data.prompt_sources.a.path=x`), which it makes from there alone."""
    found = [_whole(word) if "=" in word and not word.startswith(("-", "~")) else None for word in arguments]
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
            texts = [Override._get_value_element_as_str(_with_quotes(whole)) for whole in wholes]
            # Beside a choice of a config group of the same name it needs another key.
            is_other = place[0] in groups or get_origin(schema_place(place[0])[1]) is dict
            words.append(f"{'++' if is_other else ''}{place[0]}={','.join(texts)}")
    return words


def _whole(argument: str) -> tuple[str, list[Any]] | None:
    """The section around one that may be null, or is added, and what the override sets within it, for each member of a
    sweep."""
    parts = override_key(argument).split(".")
    count = _closed(parts, adds=argument.startswith("+"))
    if count is None:
        return None
    try:
        written = OverridesParser.create().parse_override(argument)
        values = [OverridesParser.create().parse_override(setting)._value for setting in _settings(written)]
    except HydraException:  # which `_torn` names
        return None
    if count == len(parts) and not any(isinstance(value, dict) for value in values):  # null, or of a wrong type
        return None
    wholes = [reduce(lambda whole, part: {part: whole}, reversed(parts[count - 1 :]), value) for value in values]
    return (".".join(parts[: count - 1]), wholes) if wholes else None


def _closed(parts: list[str], adds: bool) -> int | None:
    """How many parts of a key name the outermost section that may be null; where the override adds, or that a user names."""
    for count in range(2, len(parts) + 1):
        (_, annotation), (_, around) = schema_place(".".join(parts[:count])), schema_place(".".join(parts[: count - 1]))
        may_be_null = type(None) in get_args(annotation) or (adds and get_origin(around) is dict)
        if may_be_null and get_origin(annotation) is not dict and schema_section(annotation):
            return count
    return None


def _with_quotes(value: Any) -> Any:
    """With quotes around texts that are empty: without them there is no value."""
    if isinstance(value, dict):
        return {key: _with_quotes(inner) for key, inner in value.items()}
    return QuotedString("", Quote.single) if isinstance(value, str) and not value else value


def _merged(first: Any, second: Any) -> Any:
    """The second over the first, as one override after the other."""
    if not isinstance(first, dict) or not isinstance(second, dict):
        return second
    return first | {key: _merged(first[key], value) if key in first else value for key, value in second.items()}


def is_multirun(arguments: Iterable[str]) -> bool:
    return bool(hydra_flags(list(arguments)).multirun)


def command_line_problems(
    arguments: list[str], conf: Path, check: Callable[[TandemConfig], None] = validate, starts: bool = False
) -> list[str]:
    """Unknown keys, values of a wrong type and, where there are any, the conflicts among the rest; one text each.

    The members of a sweep are all checked against themselves, so that the seventh does not fail after six hours. A single
    run whose overrides are well formed gives an empty list: Hydra composes it and `validate` lists its conflicts.

    Args:
        arguments: `sys.argv[1:]` of a Hydra application.
        conf: absolute path of the configuration directory.
        check: raises ConfigError with the conflicts of a configuration.
        starts: whether Hydra goes on from here. It makes the directory of a run before anything else can refuse it, and
            ends with a traceback where that or a value cannot be had.
    """
    origin = origin_of(arguments)
    if origin.folder is not None and not Path(origin.folder).is_dir():
        return [f"--config-dir must be a directory; found {origin.folder}"]
    written = [argument for argument in arguments if "=" in argument and not argument.startswith("-")]
    problems = unknown_overrides(written)
    torn = _torn(written)
    if torn:
        return [*problems, *torn]
    parsed = [o for o in OverridesParser.create().parse_overrides(written) if not unknown_overrides([_line(o)])]
    wrong = {_line(override): texts for override in parsed if (texts := _wrong_values(override))}
    problems += itertools.chain(*wrong.values())
    sweeps, keys = is_multirun(arguments), {override.key_or_group for override in parsed}
    if sweeps and "run_dir" in keys:
        problems.append("run_dir names one run; write hydra.sweep.dir=DIRECTORY for the directory of a sweep")
    deleted = [argument for argument in arguments if argument.startswith("~") and "=" not in argument]
    # What a sampling sweeper will draw is not known yet.
    sampled = "hydra/sweeper" in keys
    if sweeps and "hydra/sweeper=optuna" in written and "hydra.sweeper.direction=maximize" not in written:
        problems.append(
            "hydra.sweeper.direction must be maximize, as the objective is a gain: by default Optuna looks for the worst; "
            "write hydra.sweeper.direction=maximize as well, or +experiment=sweep_optuna"
        )
    if problems or (sweeps and not sampled):
        kept = [o for o in parsed if _line(o) not in wrong and not _line(o).lstrip("+").startswith(HYDRA)]
        problems += _conflicts([(*member, *deleted) for member in _members(kept)], conf, origin, check)
    if not problems and starts and not _only_shows(arguments):
        problems = _start_problems(parsed, deleted, conf, origin, sweeps)
    return problems


def _only_shows(arguments: list[str]) -> bool:
    flags = hydra_flags(arguments)
    return any((flags.cfg, flags.info, flags.help, flags.hydra_help, flags.shell_completion, flags.experimental_rerun))


def _start_problems(parsed: list[Override], deleted: list[str], conf: Path, origin: Origin, sweeps: bool) -> list[str]:
    """Of the first member: values that cannot be resolved, sections that a sweeper cannot set, directories that Hydra cannot
    make."""
    first, before = _members(parsed)[0], HydraConfig.instance().cfg
    try:
        with composing(conf, origin) as name:
            composed = compose(name, whole_sections([*first, *deleted]), return_hydra_config=True)
        HydraConfig.instance().set_config(composed)  # for ${hydra:...}
        task = copy.deepcopy(composed)
        with open_dict(task):
            del task["hydra"]
        null = _null_sections(task, [o.key_or_group for o in parsed if not _settings(o)])
        run_dir = to_config(task).run_dir
        places = [OmegaConf.select(composed, key) for key in ("hydra.sweep.dir", "hydra.run.dir")]
    except UNCOMPOSED as error:
        return [reason(error)]
    finally:
        HydraConfig.instance().cfg = before
    made = {places[0]: "hydra.sweep.dir"} if sweeps else {places[1]: "hydra.run.dir", run_dir: "run_dir"}
    return null + [text for path, key in made.items() for text in directory_problems(key, path)]


def _null_sections(task: DictConfig, keys: list[str]) -> list[str]:
    """Where a sweeper draws a value: it is an override of its own then, which no section that is null takes."""
    found = []
    for key in keys:
        parts = key.split(".")
        count = _closed(parts, adds=False)
        section = ".".join(parts[:count])
        if count is not None and count < len(parts) and OmegaConf.select(task, section) is None:
            found.append(
                f"{section} is null, where a sweeper draws {key}; write it in an experiment (conf/experiment/lora.yaml has "
                "model.lora), or the values: choice(...) in place of interval(...)"
            )
    return found


def directory_problems(key: str, path: Any) -> list[str]:
    """Whether a directory is there or can be made."""
    rule = f"{key} must be a directory that is there or can be made; found "
    if not path:
        return [f"{rule}{shown(path) or 'nothing'}; write for example {key}=runs/demo"]
    place = Path(path).absolute()
    for there in (place, *place.parents):
        try:
            there.lstat()
        except (FileNotFoundError, NotADirectoryError):
            continue
        except (OSError, ValueError) as error:
            return [f"{rule}{path} ({getattr(error, 'strerror', error)}); write another path"]
        if not there.is_dir():
            return [f"{rule}{path}, and {there} is no directory; write another path"]
        if not os.access(there, os.W_OK | os.X_OK):
            return [f"{rule}{path}, and {there} takes no files of this user; write another path"]
        break
    return []


def _torn(arguments: list[str]) -> list[str]:
    """What Hydra's grammar does not take, as a comma or a bracket out of place, or a path with an equals sign."""
    found = []
    for argument in arguments:
        key, value = argument.split("=", 1)
        try:
            OverridesParser.create().parse_override(argument)
        except HydraException as error:
            needs_quotes = "=" in value or not value.isascii()
            quotes = f"; write {key}='\"{value}\"'" if needs_quotes and not set("'\"[]{}") & set(value) else ""
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


def _wrong_values(override: Override) -> list[str]:
    section, annotation = schema_place(override.key_or_group)
    if annotation is None or override.is_delete():  # a config group
        return []
    found = []
    for setting in _settings(override):
        value, written = OverridesParser.create().parse_override(setting).value(), setting.split("=", 1)[1]
        if not (schema_section(annotation) and isinstance(value, str)):  # a choice of a config group
            found += value_problems(override.get_key_element(), annotation, value, written, section)
    return found


def _conflicts(
    members: list[tuple[str, ...]], conf: Path, origin: Origin, check: Callable[[TandemConfig], None]
) -> list[str]:
    """Of all members, each named once and with the first member that has it where there are several."""
    found: dict[str, str] = {}
    with composing(conf, origin) as name:
        for number, member in enumerate(members):
            where = f" (in member {number}: {' '.join(member)})" if len(members) > 1 else ""
            for text in _member_conflicts(name, [*member, *origin.search_path], check):
                found.setdefault(text, where)
    return [text + where for text, where in found.items()]


def _member_conflicts(name: str, overrides: list[str], check: Callable[[TandemConfig], None]) -> list[str]:
    try:
        check(to_config(compose(name, whole_sections(overrides))))
    except ConfigError as error:
        return error.conflicts
    except UNCOMPOSED as error:
        return [reason(error)]
    return []
