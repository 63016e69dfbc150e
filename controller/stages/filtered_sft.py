"""SFT once more, from the SFT model, on the texts that people rated highest."""

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from contracts.config import TandemConfig
from contracts.methods import method_config
from contracts.stages import Reading, Stage
from controller.stages.sft import UNREAD, different_texts, supervised_settings, train_supervised

if TYPE_CHECKING:
    from controller.data.inputs import Inputs
    from controller.pipeline.context import StageContext

TEXTS = Reading("best_sft", "preferences", "load_best_rated", ("sft.max_tokens", "sft.top_fraction"))


def inputs(context: "StageContext") -> dict[str, Any]:
    return context.common_inputs(unread=UNREAD) | {
        "seed": method_config(context.config).seed,
        "policy": context.fingerprint(context.checkpoint("sft")),
        "sft": supervised_settings(context.config.sft),
        "data": context.data_fingerprint("best_sft"),
    }


def problems(config: TandemConfig, data: "Inputs") -> list[str]:
    ranks, count = config.cluster.num_learner_ranks, len(different_texts(data["best_sft"]))
    if count >= 2 * ranks:
        return []
    return [
        f"sft.top_fraction must leave {2 * ranks} or more different texts of data.preferences to train on and to hold out; "
        f"found {config.sft.top_fraction}, which leaves {count}; write a larger one, or give more texts"
    ]


def run(context: "StageContext") -> dict[str, Any]:
    config, best = method_config(context.config), context.data["best_sft"]
    config = replace(config, model=config.model.at(context.checkpoint("sft")))
    return train_supervised(context, "filtered SFT", config, best) | {"texts": len(best)}


STAGE = Stage(
    name="filtered_sft",
    title="Filtered SFT",
    inputs=inputs,
    run=run,
    position=50,
    methods={"filtered_sft": "Filtered SFT"},
    results={"": "filtered_sft_model"},
    reads=lambda config, role: [TEXTS],
    keys=("sft",),
    problems=problems,
    task="sft",
)
