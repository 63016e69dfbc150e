"""The pre-registration: what it may say, its hash, and the record that a sweep makes of it before its first member."""

import hashlib
import json
import time
from pathlib import Path
from typing import Any, Literal

import yaml
from hydra.experimental.callback import Callback
from omegaconf import DictConfig
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

PREREGISTRATION = Path(__file__).with_name("preregistration.yaml")  # of the first study; others lie beside it
RECORD = "registration.json"
MEASURES = ("proxy", "gold", "cross_entropy", "cross_entropy_sum", "cross_entropy_signed")  # of the negation test


class StudyError(ValueError):
    """The study cannot be judged: what was found and what to do instead."""


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Contrast(_Strict):
    """A weighted sum of cells."""

    title: str
    metric: Literal["gold", "proxy", "vader", "length", "kl", "ended", "negation_auc"]
    contrast: dict[str, float] = Field(min_length=2)

    @model_validator(mode="after")
    def _adds_up(self) -> "Contrast":
        if abs(sum(self.contrast.values())) > 1e-9:
            raise ValueError(f"the weights of a contrast must add up to 0, or it compares nothing: {self.contrast}")
        for cell in self.contrast:
            if self.metric == "negation_auc" and cell not in MEASURES:
                raise ValueError(f"{cell} is no measure of the negation test: write one of {', '.join(MEASURES)}")
            if ":" in cell and cell.split(":")[1] not in ("base", "sft"):
                raise ValueError(f"{cell} names no model: write arm, arm:sft or arm:base")
        return self

    @property
    def formula(self) -> str:
        """`ppo − rank`, with `arm (SFT)` for the model before an arm."""
        text = ""
        for cell, weight in self.contrast.items():
            arm, _, model = cell.partition(":")
            size = "" if abs(weight) == 1 else f"{abs(weight):g} × "
            before = f" ({model.upper() if model == 'sft' else model})" if model else ""
            text += f" {'−' if weight < 0 else '+'} {size}{arm}{before}"
        return text.strip().removeprefix("+ ")

    @property
    def arms(self) -> list[str]:
        """The arms whose runs it needs, in order; none for the negation test."""
        if self.metric == "negation_auc":
            return []
        return list(dict.fromkeys(cell.split(":")[0] for cell in self.contrast))


class Claim(Contrast):
    number: int = Field(ge=1)
    claim: str
    test: str
    margin: float = Field(gt=0)
    seeds: int | None = Field(default=None, ge=1)  # null: as all
    secondary: list[Contrast] = []


class Bootstrap(_Strict):
    samples: int = Field(ge=1000)
    seed: int


class Diverged(_Strict):
    max_kl: float
    min_eos_share: float
    min_distinct_2: float


class Check(_Strict):
    """What an arm must have done for a contrast with it to say anything about the claim."""

    arm: str
    # Share of held-out pairs that its likelihoods order right, the lower bound of 95%, less SFT's share: at least this.
    pairs_over_sft: float


class Preregistration(_Strict):
    format: Literal[1]
    alpha: float = Field(gt=0, lt=1)
    bootstrap: Bootstrap
    seeds: int = Field(ge=1)
    first_seed: int | None = Field(default=None, ge=1)  # its seeds are this one and those after it; null: whichever ran
    prompts: int | None = Field(default=None, ge=2)  # held-out ones, at least; null: as the experiment has it
    design: list[str] = []  # how many seeds and prompts, and why
    diverged: Diverged
    tuning: str = ""  # the rule by which a setting of an arm is chosen
    tuning_avoids_divergence: bool = False  # as that rule says
    checks: list[Check] = []
    exclusions: list[str]
    max_missing_prompts: float = Field(ge=0, le=1)
    min_seed_share: float = Field(ge=0, le=1)
    claims: list[Claim] = Field(min_length=1)

    @model_validator(mode="after")
    def _numbers(self) -> "Preregistration":
        numbers = [claim.number for claim in self.claims]
        if numbers != sorted(set(numbers)):
            raise ValueError(f"claims must be numbered in order, each once; found {numbers}")
        if self.first_seed is None and any(claim.seeds for claim in self.claims):
            raise ValueError("seeds of a claim need first_seed, or nothing says which they are")
        return self

    def seeds_of(self, claim: Claim) -> list[int] | None:
        """The seeds that the claim is judged by; None for whichever ran."""
        if self.first_seed is None:
            return None
        return list(range(self.first_seed, self.first_seed + (claim.seeds or self.seeds)))

    def needed(self) -> list[tuple[int, str]]:
        """(seed, arm) of every run that a verdict needs, seed by seed."""
        pairs = {(s, arm): None for claim in self.claims for arm in claim.arms for s in self.seeds_of(claim) or ()}
        return sorted(pairs, key=lambda pair: pair[0])


def sha256(path: Path = PREREGISTRATION) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def parse(text: str) -> Preregistration:
    """Raises StudyError, with every fault, where the text does not follow the schema."""
    try:
        return Preregistration.model_validate(yaml.safe_load(text))
    except ValidationError as error:
        faults = [f"{'.'.join(map(str, fault['loc']))}: {fault['msg']}" for fault in error.errors()]
        raise StudyError("\n  - ".join(["this is no pre-registration:", *faults])) from None


def recorded(note: Path) -> dict[str, Any]:
    """Raises StudyError where the note cannot be read or its text is not the one of its hash."""
    try:
        known = json.loads(note.read_text())
        genuine = hashlib.sha256(known["text"].encode()).hexdigest() == known["sha256"]
        float(known["time"])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise StudyError(f"{note} cannot be read ({error}); it is written when a study starts") from None
    if not genuine:
        raise StudyError(f"{note} has been changed: its text is not the one whose SHA-256 it gives")
    return known


def record(directory: Path, path: Path = PREREGISTRATION) -> dict[str, Any]:
    """Note the hash in the directory of a sweep; the second time, check that it is still the same.

    Raises:
        StudyError: the file has changed since the first member of this sweep started.
    """
    text = path.read_text(encoding="utf-8")
    parse(text)
    note, found = directory / RECORD, sha256(path)
    if note.exists():
        known = recorded(note)
        if known["sha256"] != found:
            raise StudyError(
                f"{path.name} has changed since {directory} began ({known['sha256'][:12]} -> {found[:12]}): its "
                "members belong to the old one; write hydra.sweep.dir=ANOTHER for a new study, or put the file back"
            )
        return known
    directory.mkdir(parents=True, exist_ok=True)
    content = {"sha256": found, "time": time.time(), "file": path.name, "text": text}
    note.write_text(json.dumps(content, indent=1) + "\n")
    return content


class Registration(Callback):
    """Hydra's hook: the record is made before the first member of a study is composed."""

    def __init__(self, file: str = PREREGISTRATION.name) -> None:
        self._path = PREREGISTRATION.with_name(file)

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        try:
            record(Path(config.hydra.sweep.dir), self._path)
        except StudyError as error:
            # Hydra makes a warning of what a callback raises, and goes on; an exit it lets through.
            raise SystemExit(f"study: {error}") from error
