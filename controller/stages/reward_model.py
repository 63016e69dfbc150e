"""The reward models: the proxy, on which PPO trains, and the gold judge, which no training sees."""

from typing import TYPE_CHECKING, Any

from contracts.config import TandemConfig
from contracts.records import RatedText
from contracts.scorer_roles import ROLES, reward_model_origin
from contracts.stages import REWARD_MODEL, Reading, Stage

if TYPE_CHECKING:
    from controller.data.inputs import Inputs
    from controller.pipeline.context import StageContext

UNREAD = ("held_tokens", "weight_transfer")  # of the learner
LIMITS = ("reward_model.max_tokens",)
TEST = Reading("test", "test", "load_preferences", LIMITS)


def reads(config: TandemConfig, role: str) -> list[Reading]:
    source = "gold" if role == "gold" else "preferences"
    return [Reading(f"preferences/{role}", source, "load_preferences", LIMITS), TEST]


def inputs(context: "StageContext") -> dict[str, Any]:
    from controller.pipeline.pair_training import interval_inputs

    return context.common_inputs("reward_model", UNREAD) | {
        "reward_model": context.config.reward_model,
        "start": context.fingerprint(_start(context)),
        "data": context.data_fingerprint(f"preferences/{context.role}"),
        "test": context.data_fingerprint("test"),
        **interval_inputs(context.config),
    }


def run(context: "StageContext") -> dict[str, Any]:
    from controller.pipeline.pair_training import accuracy, chunks, train_on_pairs

    name, examples, test = context.role, context.data[f"preferences/{context.role}"], context.data["test"]
    texts = [ids for item in test for ids in ([item.token_ids] if isinstance(item, RatedText) else _sides(item))]
    with context.learner("reward_model", context.config, _start(context), examples) as group:
        origin = {"sft": "SFT's layers", "base": "the base's layers"}[reward_model_origin(context.config)]
        with context.phase(f"{name} reward model on {len(examples)} preferences, from {origin}"):
            train_on_pairs(context, group, f"{name} reward model")

        def score(rows: list[int]) -> list[float]:
            parts = chunks([texts[i] for i in rows], len(group.actors))
            return [score for part in parts for score in group.call("score", part)[0]]

        with context.phase(f"held-out accuracy of the {name} reward model"):
            count = context.config.reward_model.eval_pairs
            found = accuracy(context.config, test, score, count)
            if test and isinstance(test[0], RatedText):
                vader = accuracy(context.config, test, lambda rows: _vader(test), count)
                found |= {f"vader_{name}": value for name, value in vader.items() if name.startswith("accuracy")}
        group.call("save", str(context.path))
    context.progress.line(
        f"  {name} reward model: {found['accuracy']:.1%} of {found['pairs']} held-out pairs right"
        + (f" (VADER's rules: {found['vader_accuracy']:.1%})" if "vader_accuracy" in found else "")
    )
    return found


def problems(config: TandemConfig, data: "Inputs") -> list[str]:
    """Held-out texts are scored once the model has trained."""
    from controller.pipeline.pair_training import few_held_out, lone_texts

    read, test = [data[f"preferences/{role}"] for role in ROLES], data["test"]
    least = max(2 if test and isinstance(test[0], RatedText) else 1, config.cluster.num_learner_ranks)
    few = few_held_out("reward models", least, test) if test else []
    return lone_texts("reward_model", config.reward_model.batch_size, read) + few


def _start(context: "StageContext") -> str:
    return context.checkpoint(reward_model_origin(context.config))


def _sides(pair: Any) -> tuple[list[int], list[int]]:
    return pair.chosen_ids, pair.rejected_ids


def _vader(test: list[RatedText]) -> list[float]:
    from controller.evaluation.judging import vader_scores

    return vader_scores([item.text for item in test])


STAGE = Stage(
    name="reward_model",
    title="Reward models",
    inputs=inputs,
    run=run,
    position=20,
    starts_from=lambda config: ("sft",) if reward_model_origin(config) == "sft" else (),
    results={"proxy": "proxy_model", "gold": "gold_model"},
    reads=reads,
    problems=problems,
    keys=("reward_model", "evaluate.bootstrap_samples"),
    trains=REWARD_MODEL,
    task="reward_model",
)
