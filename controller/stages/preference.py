"""The policy on human preferences without a reward model, from the SFT model: docs/preference.md."""

from typing import TYPE_CHECKING, Any

from contracts.config import TandemConfig
from contracts.methods import chosen_preference, method_config
from contracts.plugins import names
from contracts.preference_losses import PREFERENCE_LOSSES, find_preference_loss
from contracts.stages import Reading, Stage

if TYPE_CHECKING:
    from controller.data.inputs import Inputs
    from controller.pipeline.context import StageContext

LIMITS = ("preference.max_tokens",)
READS = [
    Reading("completions", "preferences", "load_rated_examples", LIMITS),
    Reading("test_completions", "test", "load_rated_examples", LIMITS),
]


def inputs(context: "StageContext") -> dict[str, Any]:
    from controller.pipeline.pair_training import interval_inputs

    return context.common_inputs(unread=("weight_transfer",)) | {
        "seed": method_config(context.config).seed,
        "policy": context.fingerprint(context.checkpoint("sft")),
        "preference": chosen_preference(context.config),
        "data": context.data_fingerprint("completions"),
        "test": context.data_fingerprint("test_completions"),
        **interval_inputs(context.config),
    }


def problems(config: TandemConfig, data: "Inputs") -> list[str]:
    """Held-out texts are ranked once the policy has trained."""
    from controller.pipeline.pair_training import few_held_out, lone_texts

    least, texts = max(2, config.cluster.num_learner_ranks), data["completions"]
    rule = f"data.preferences must have at least {least} usable rows for stage preference; found {len(texts)}"
    few = [rule] if len(texts) < least else []
    few += few_held_out("stage preference", least, data["test_completions"])
    return lone_texts("preference", chosen_preference(config).batch_size, [texts]) + few


def run(context: "StageContext") -> dict[str, Any]:
    import numpy as np
    import torch

    from controller.pipeline.pair_training import accuracy, chunks, train_on_pairs

    config, settings = method_config(context.config), chosen_preference(context.config)
    examples, test = context.data["completions"], context.data["test_completions"]
    loss = find_preference_loss(str(settings.loss))
    texts = [text for item in test for text in item.texts]
    tokens = torch.tensor([max(1, sum(text.loss_mask[1:])) for text in texts])
    with context.learner("preference", config, settings, context.checkpoint("sft"), examples) as group:

        def likelihoods() -> torch.Tensor:
            parts = [group.call("logprobs", chunk)[0] for chunk in chunks(texts, len(group.actors))]
            return torch.from_numpy(np.concatenate(parts))

        def ranking(now: torch.Tensor) -> dict[str, float]:
            """Held-out accuracy of the scores that a policy implies."""
            scores = loss.scores(now, before, tokens, 1.0).tolist()
            count = settings.eval_pairs
            return accuracy(config, test, lambda rows: [scores[i] for i in rows], count)

        with context.phase(f"log-probabilities of the reference on {len(test)} held-out and {len(examples)} items"):
            before = likelihoods()
            if loss.has_reference:
                for part in chunks(range(len(examples)), len(group.actors)):
                    group.call("compute_reference", part[0], part[-1] + 1)
        with context.phase(f"{settings.loss} on {len(examples)} preferences"):
            train_on_pairs(context, group, str(settings.loss))
        with context.phase("held-out accuracy of the policy's own ranking"):
            found = ranking(likelihoods())
            # Without a reference SFT ranks too: what it knew before. With one all scores were equal.
            start = ranking(before) if not loss.has_reference else {}
        group.call("save", str(context.path))
    known = f" (SFT: {start['accuracy']:.1%})" if start else ""
    context.progress.line(f"  {settings.loss}: {found['accuracy']:.1%} of {found['pairs']} held-out pairs right{known}")
    return found | {f"sft_{name}": value for name, value in start.items() if name.startswith("accuracy")}


STAGE = Stage(
    name="preference",
    title="Preferences",
    inputs=inputs,
    run=run,
    position=40,
    methods={loss: find_preference_loss(loss).title for loss in names(PREFERENCE_LOSSES)},
    results={"": "preference_model"},
    reads=lambda config, role: READS,
    keys=("preference", "evaluate.bootstrap_samples"),
    problems=problems,
    task="preference",
    plugins=lambda config: [(PREFERENCE_LOSSES, str(chosen_preference(config).loss))],
)
