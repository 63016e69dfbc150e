"""How fast each side is: measured by `benchmarks/calibrate.py`, or stated, in one JSON file.

    {"source": "measured", "machine": ..., "shape": {...}, "settings": {...}, "cores": 2, "beside": 0.95,
     "actor":   {"1": {"call_s": ..., "prefill_s": ..., "decode_s": [[1, ...], [16, ...]], "block_tokens": 32}},
     "learner": {"1": {"phases": {"reference": [fixed, a token, a completion token], ...}, "reduce_s": 0.0}},
     "reward":  {"1": {"call_s": ..., "token_s": ...}},
     "publish": {"1": {"pack_s": ..., "pause_s": ..., "rest_s": ..., "actor_s": 0.0}},
     "driver":  {"rollout_s": ..., "update_s": ...}}

Speeds stand by the threads of the process, or by "any": a GPU's. All times are seconds.
"""

import json
from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any

from common.text.tokenizers import load_config
from contracts.config import TandemConfig

ANY = "any"
SIDES = ("actor", "learner", "reward", "publish")
KEYS = ("source", "machine", "shape", "settings", "cores", "beside", *SIDES, "driver")
OPTIONAL: dict[str, Any] = {"machine": "", "settings": {}, "cores": None, "beside": 1.0}
PHASES = ("reference", "policy_forward", "policy_backward", "value_forward", "value_backward", "optimizer", "rest")
SHAPE = (
    "model_type", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    "vocab_size",
)  # fmt: skip
# On which speeds depend, beside threads: a calibration is of their values.
SETTINGS = (
    "model.dtype", "model.lora", "model.lora_by_role", "engine.tensor_parallel_size", "engine.enforce_eager",
    "learner.microbatch_tokens", "learner.attention", "learner.gradient_checkpointing", "learner.checkpointed_layers",
    "learner.zero_stage", "learner.offload", "learner.weight_transfer", "learner.deepspeed", "ppo.estimator",
    "ppo.trainable_layers", "ppo.value_trainable_layers",
    "reward_service.batch_tokens",
)  # fmt: skip


class CalibrationError(ValueError):
    """The file cannot be used, or not for this configuration; the message says what to do."""


@dataclass(frozen=True)
class EngineSpeed:
    call_s: float  # from the dispatcher's call until the engine begins
    prefill_s: float  # of a prompt token
    decode_s: tuple[tuple[int, float], ...]  # (running requests, seconds of a step), linear between and beyond
    block_tokens: int = 0  # of the prefix cache; 0: siblings share nothing

    def step_s(self, running: int, prompt_tokens: int = 0) -> float:
        return self._decoding_s(running) + prompt_tokens * self.prefill_s

    def _decoding_s(self, running: int) -> float:
        points = self.decode_s
        if running <= points[0][0]:
            return points[0][1]
        last = min(max(1, bisect_left(points, (running,))), len(points) - 1)
        (n, low), (m, high) = points[last - 1], points[last]
        return low + (high - low) * (running - n) / (m - n)


@dataclass(frozen=True)
class LearnerSpeed:
    """`phases`: seconds of one, a token and a completion token of the busiest rank; of the optimizer, of a step."""

    phases: Mapping[str, tuple[float, float, float]]
    reduce_s: float = 0.0  # of a step, by which ranks exchange gradients, where they are very many


@dataclass(frozen=True)
class RewardSpeed:
    call_s: float
    token_s: float  # of prompt and completion


@dataclass(frozen=True)
class PublishSpeed:
    pack_s: float  # of rank 0
    pause_s: float  # of each engine
    rest_s: float
    actor_s: float = 0.0  # more, for each actor


@dataclass(frozen=True)
class DriverSpeed:
    rollout_s: float  # to hear of one
    update_s: float  # between two waits


@dataclass(frozen=True)
class Calibration:
    source: str  # measured, or stated
    machine: str
    shape: Mapping[str, Any]
    settings: Mapping[str, Any]
    cores: float | None  # that all processes share; None: each has a device of its own
    beside: float
    actor: Mapping[str, EngineSpeed]
    learner: Mapping[str, LearnerSpeed]
    reward: Mapping[str, RewardSpeed]
    publish: Mapping[str, PublishSpeed]
    driver: DriverSpeed

    def speeds(self, config: TandemConfig) -> tuple[EngineSpeed, LearnerSpeed, RewardSpeed, PublishSpeed]:
        """Of the configured threads. Raises CalibrationError where they were not measured."""
        cluster = config.cluster
        return (
            _of_threads(self.actor, "actor", cluster.threads_per_actor),
            _of_threads(self.learner, "learner_rank", cluster.threads_per_learner_rank),
            _of_threads(self.reward, "reward_replica", cluster.threads_per_reward_replica),
            _of_threads(self.publish, "actor", cluster.threads_per_actor),
        )

    def check(self, config: TandemConfig) -> None:
        """Raises CalibrationError where it is of another model, of other settings or of other threads."""
        self.check_model(config)
        self.speeds(config)

    def check_model(self, config: TandemConfig) -> None:
        """The same, whatever the threads."""
        shape, chosen = model_shape(config), settings(config)
        other = [f"{k} is {v}, {config.model.path} has {shape[k]}" for k, v in self.shape.items() if shape[k] != v]
        if other:
            raise CalibrationError(f"the calibration is of another model: {'; '.join(other)}. {AGAIN}")
        differ = [f"{k} was {_json(v)} and is {_json(chosen[k])}" for k, v in self.settings.items() if chosen[k] != v]
        if differ:
            raise CalibrationError(f"the calibration is of other settings: {'; '.join(differ)}. {AGAIN}")


AGAIN = "Measure again with this configuration: python benchmarks/calibrate.py FILE OVERRIDES"


def _json(value: Any) -> str:
    return json.dumps(value, default=str)


def _of_threads(of_each: Mapping[str, Any], side: str, threads: int) -> Any:
    found = of_each.get(str(threads), of_each.get(ANY))
    if found is None:
        raise CalibrationError(
            f"cluster.threads_per_{side}={threads} has not been measured, {' and '.join(sorted(of_each))} has. {AGAIN}"
        )
    return found


def model_shape(config: TandemConfig) -> dict[str, Any]:
    """Of what `model.path` names: what decides how fast it is."""
    found = load_config(config.model.path, config.model).get_text_config()
    return {name: getattr(found, name, None) for name in SHAPE}


def settings(config: TandemConfig) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name in SETTINGS:
        value: Any = config
        for part in name.split("."):
            value = getattr(value, part)
        found[name] = asdict(value) if is_dataclass(value) and not isinstance(value, type) else value
    return found


# ---- the file


def read_calibration(file: Path) -> Calibration:
    """Raises CalibrationError, naming the file and the key."""
    if not file.exists():
        raise CalibrationError(f"{file} does not exist. python benchmarks/calibrate.py {file} OVERRIDES measures one")
    try:
        rows: Any = json.loads(file.read_text())
    except (ValueError, OSError) as error:
        raise CalibrationError(f"{file} is no JSON: {error}") from None
    try:
        return _calibration(OPTIONAL | rows if isinstance(rows, dict) else rows)
    except CalibrationError as error:
        raise CalibrationError(f"{file}: {error}") from None


def _calibration(rows: Any) -> Calibration:
    _keys(rows, KEYS, KEYS, "")
    if rows["source"] not in ("measured", "stated"):
        raise CalibrationError(f"source is {_json(rows['source'])}; write measured or stated")
    _keys(rows["shape"], SHAPE, SHAPE if rows["source"] == "measured" else (), "shape.")
    _keys(rows["settings"], SETTINGS, (), "settings.")
    kinds = {"actor": EngineSpeed, "learner": LearnerSpeed, "reward": RewardSpeed, "publish": PublishSpeed}
    sides: dict[str, Any] = {side: _by_threads(rows[side], kind, side) for side, kind in kinds.items()}
    driver = _speed(rows["driver"], DriverSpeed, "driver.")
    cores = None if rows["cores"] is None else _seconds(rows["cores"], "cores", above=True)
    return Calibration(
        source=rows["source"],
        machine=rows["machine"],
        shape=rows["shape"],
        settings=rows["settings"],
        cores=cores,
        beside=_seconds(rows["beside"], "beside", above=True),
        driver=driver,
        **sides,
    )


def _by_threads(rows: Any, kind: type, side: str) -> dict[str, Any]:
    if not isinstance(rows, dict) or not rows:
        raise CalibrationError(f'{side} is {_json(rows)}; write speeds by threads, {{"2": {{...}}}}, or by "{ANY}"')
    if wrong := [key for key in rows if key != ANY and not key.isdigit()]:
        raise CalibrationError(f'{side}.{wrong[0]}: speeds stand by threads, "2", or by "{ANY}"')
    return {key: _speed(row, kind, f"{side}.{key}.") for key, row in rows.items()}


def _speed(row: Any, kind: type, where: str) -> Any:
    names = {field.name: field for field in fields(kind)}
    _keys(row, tuple(names), tuple(n for n in names if not hasattr(kind, n)), where)
    return kind(**{name: _value(value, name, where + name) for name, value in row.items()})


def _value(value: Any, name: str, where: str) -> Any:
    if name == "phases":
        _keys(value, PHASES, (), f"{where}.")
        return {phase: _three(times, f"{where}.{phase}") for phase, times in value.items()}
    if name == "decode_s":
        if not isinstance(value, list) or len(value) < 2 or any(not isinstance(p, list) or len(p) != 2 for p in value):
            raise CalibrationError(f"{where} is {_json(value)}; write at least two points: [[1, 0.02], [16, 0.03]]")
        points = tuple((_whole(n, where), _seconds(s, where, above=True)) for n, s in value)
        if [n for n, _ in points] != sorted({n for n, _ in points}):
            raise CalibrationError(f"{where}: the numbers of requests must grow from point to point")
        return points
    return _whole(value, where) if name == "block_tokens" else _seconds(value, where)


def _three(value: Any, where: str) -> tuple[float, float, float]:
    if not isinstance(value, list) or len(value) != 3:
        raise CalibrationError(f"{where} is {_json(value)}; write three times: fixed, a token, a completion token")
    fixed, token, completion = (_seconds(number, where) for number in value)
    return fixed, token, completion


def _seconds(value: Any, where: str, above: bool = False) -> float:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not (0 <= value < float("inf")) or (above and not value):
        raise CalibrationError(f"{where} is {_json(value)}; write a number {'above' if above else 'from'} 0")
    return float(value)


def _whole(value: Any, where: str) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise CalibrationError(f"{where} is {_json(value)}; write a whole number from 0")
    return value


def _keys(row: Any, known: tuple[str, ...], needed: tuple[str, ...], where: str) -> None:
    if not isinstance(row, dict):
        raise CalibrationError(
            f"{where.rstrip('.') or 'the file'} is {_json(row)[:60]}; write an object of {', '.join(known)}"
        )
    if unknown := [key for key in row if key not in known]:
        raise CalibrationError(f"{where}{unknown[0]} is not known here; there are {', '.join(known)}")
    if missing := [key for key in needed if key not in row]:
        raise CalibrationError(f"{where}{missing[0]} is missing")
