"""Which keys of the configuration decide the result of a stage: all of them name its directory."""

import json
from collections.abc import Iterator
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any, get_args

import pytest

from common.flatten import flat
from contracts.config import LoraConfig, RoleLoraConfig, ScorerConfig, TandemConfig
from contracts.lora_roles import Role
from contracts.stages import find_stage
from controller.commits.resume import differences
from controller.data.inputs import Inputs
from controller.pipeline.context import StageContext
from controller.pipeline.stage_cache import _plain

EVERY = ("sft", "filtered_sft", "preference", "reward_model/proxy", "ppo")
# By hand: the sections and keys that each stage computes with. Of data and checkpoints the content counts, not the path.
DECIDES = {
    "seed": EVERY,
    "model.dtype": EVERY,
    "model.trust_remote_code": EVERY,
    "model.lora": EVERY,
    "model.lora_by_role.policy": ("sft", "filtered_sft", "preference", "ppo"),
    "model.lora_by_role.value_model": ("ppo",),
    "model.lora_by_role.reward_model": ("reward_model/proxy",),
    "learner": EVERY,
    "learner.held_tokens": ("preference", "ppo"),  # where losses wait for what other texts give
    "learner.weight_transfer": ("ppo",),
    "cluster.num_learner_ranks": EVERY,
    "sft": ("sft", "filtered_sft"),
    "sft.top_fraction": (),  # of what is in the data then
    "preference": ("preference",),
    "reward_model": ("reward_model/proxy",),
    "ppo": ("ppo",),
    "ppo.seed": ("filtered_sft", "preference", "ppo"),
    "environment": ("ppo",),
    "engine": ("ppo",),
    **{f"cluster.{name}_actors": ("ppo",) for name in ("num", "min", "max")},
    "reward_service.scorers": ("ppo",),
    "reward_service.dtype": ("ppo",),
    "reward_service.max_tokens": ("ppo",),
    "reward_service.batch_tokens": ("ppo",),
    "evaluate.bootstrap_samples": ("preference", "reward_model/proxy"),  # of the intervals of held-out accuracy
}
OTHER = {"preference.loss": "rank", "ppo.init_from": "base", "reward_service.scorers": {"x": ScorerConfig()}}
OTHER |= {"reward_model.init_from": "sft"}
OTHER |= {"environment.options": {"x": 1}, "learner.deepspeed": {"dump_state": True}, "model.lora": LoraConfig()}
OTHER |= {f"model.lora_by_role.{role}": RoleLoraConfig(rank=4) for role in get_args(Role)}
APART = ("data", "model.path", "model.revision")


def leaves(section: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for f in fields(section):
        value = getattr(section, f.name)
        yield from leaves(value, f"{prefix}{f.name}.") if is_dataclass(value) else [(prefix + f.name, value)]


def changed(section: Any, key: str, value: Any) -> Any:
    name, _, rest = key.partition(".")
    return replace(section, **{name: changed(getattr(section, name), rest, value) if rest else value})


def another(key: str, value: Any) -> Any:
    if key in OTHER or value is None:
        return OTHER.get(key, 7)
    if isinstance(value, bool):
        return not value
    return [0.5, 0.5] if isinstance(value, list) else f"{value}x" if isinstance(value, str) else value + 1


@pytest.fixture
def inputs(small_vocab: Path, tmp_path: Path) -> Any:
    config = TandemConfig(run_dir=str(tmp_path), cache_dir=str(tmp_path))
    config.model.path = config.sft_model = config.proxy_model = config.gold_model = str(small_vocab)

    def of(key: str, value: Any) -> dict[str, Any]:
        context: Any = object.__new__(StageContext)  # without what inputs do not need
        context.config = changed(config, key, value) if key else config
        context.data, context.checkpoint = Inputs(), lambda name: str(small_vocab)
        found = {}
        for context.result in EVERY:
            stage = find_stage(context.result)
            assert stage is not None
            found[context.result] = _plain(stage.inputs(context))
        return found

    of.config = config  # type: ignore[attr-defined]
    return of


def test_every_key_that_decides_a_result_names_its_directory(inputs: Any) -> None:
    before, wrong = inputs("", None), {}
    for key, value in leaves(inputs.config):
        if key.startswith(APART) or key.endswith(("_model", "_dir")):
            continue
        parts = key.split(".")
        prefixes = (".".join(parts[:count]) for count in range(len(parts), 0, -1))
        expected = next((DECIDES[prefix] for prefix in prefixes if prefix in DECIDES), ())
        after = inputs(key, another(key, value))
        found = tuple(stage for stage in EVERY if after[stage] != before[stage])
        if found != expected:
            wrong[key] = found
    assert wrong == {}


def test_what_is_blanked_of_an_environment_is_named_by_a_resume(inputs: Any) -> None:
    film, movie = (flat(inputs("environment.options", {"keyword": word})["ppo"]) for word in ("film", "movie"))
    seen = [{key: value for key, value in found.items() if key not in ("hidden", "scoring")} for found in (film, movie)]
    [line] = differences(*seen)
    assert line.startswith("environment_hidden.options.keyword: the commit has ")
    assert "film" not in json.dumps([film, movie])


def test_a_judge_that_ppo_does_not_ask_is_none_of_its_inputs(inputs: Any) -> None:
    ppo = inputs("ppo.gold_rollouts", 2)["ppo"]
    assert isinstance(ppo["gold"], str)
    assert ppo["gold"] == ppo["proxy"]
    assert inputs("ppo.gold_rollouts", 0)["ppo"]["gold"] is None


def test_adapters_name_a_local_base_by_its_directory_and_a_hub_id_as_it_is(
    inputs: Any, small_vocab: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(small_vocab.parent)
    monkeypatch.setattr(StageContext, "fingerprint", lambda *_: "of no hub")
    inputs.config.model.lora = LoraConfig()
    for path, base in ((small_vocab.name, str(small_vocab)), ("owner/model", "owner/model")):
        assert inputs("model.path", path)["sft"]["base"] == base
