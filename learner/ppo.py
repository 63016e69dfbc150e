"""PPO on one rank: loads its networks, has DeepSpeed step them, publishes, saves and commits. The update itself is in
`learner/ppo_update.py`.
"""

import torch

from common.models.packed_attention import Packed
from contracts.config import TandemConfig
from contracts.estimators import chosen_estimator, warmup_updates
from contracts.records import Example
from contracts.weights import PublishReport
from learner.adapted_models import reference_of, trained_pair
from learner.engine import TrainEngine
from learner.ppo_update import PPOUpdate, shared_trunk
from learner.rank_state import RankState
from learner.ranks import Ranks
from learner.saved_model import gather_checkpoint, save_checkpoint
from learner.weight_publisher import WeightPublisher
from learner.weight_sources import EngineSource


class PPOTask(PPOUpdate):
    """`policy` and `value` are checkpoints; the reference is the policy as it is there."""

    policy: TrainEngine
    value: TrainEngine | None

    def __init__(
        self, ranks: Ranks, config: TandemConfig, policy: str, value: str, end_ids: tuple[int, ...], ptx: list[Example]
    ):
        ppo, learner = config.ppo, config.learner
        self.policy_path, estimator = policy, chosen_estimator(ppo)
        steps = ppo.epochs * ppo.minibatches
        model, scalar = trained_pair(policy, value if estimator.has_value_model else None, config, ranks)
        self.policy = TrainEngine(model, ppo.optimizer, learner, ranks, ppo.updates * steps)
        self.value = None
        if scalar is not None:
            value_steps = (ppo.updates + warmup_updates(ppo)) * steps
            self.value = TrainEngine(scalar, ppo.value_optimizer, learner, ranks, value_steps)
        reference = reference_of(self.policy, policy, config, ranks)
        trunk = shared_trunk(config, ranks, self.policy, self.value, reference)
        super().__init__(
            ranks,
            config,
            policy=self.policy,
            value=self.value,
            reference=reference,
            trunk=trunk,
            end_ids=end_ids,
            ptx=ptx,
        )
        self._publisher: WeightPublisher | None = None
        engines = {"policy": self.policy} | ({"value": self.value} if self.value else {})
        self.state = RankState(
            ranks, engines, lambda: gather_checkpoint(self.policy, policy, config.model, ranks, taught={*end_ids})
        )

    # ---- commits

    def begin_commit(self, directory: str) -> None:
        """Start to write this rank's state; `state.result` has the outcome."""
        self.state.begin(directory, {"ptx": self._ptx_rng.bit_generator.state})

    def load_commit(self, directory: str) -> None:
        """Go back to a commit; all ranks together, after each has found it good."""
        self._ptx_rng.bit_generator.state = self.state.load(directory)["ptx"]

    # ---- weights

    def connect(self, backend: str, actors: list, policy_version: int = 0) -> PublishReport | None:
        """Open the weight transfer to the actors' engines and give them the weights as they are now: a layout that does
        not fit shows here. Call it again when actors have been replaced."""
        if self._publisher is None:
            engine, cluster = self.config.engine, self.config.cluster
            self._publisher = WeightPublisher(
                backend,
                EngineSource(self.policy),
                self.ranks.rank,
                engine.tensor_parallel_size,
                cluster.publish_timeout_s,
            )
        self._publisher.connect(actors)
        return self._publisher.send(policy_version)

    def publish(self, policy_version: int) -> PublishReport | None:
        if self._publisher is None:
            raise RuntimeError("publish() before connect()")
        return self._publisher.send(policy_version)

    def save(self, path: str) -> None:
        model, taught = self.config.model, {*self.end_ids}
        save_checkpoint(self.policy, path, self.policy_path, model, self.ranks, taught=taught)

    @torch.no_grad()
    def token_logprobs(self, sequences: list[tuple[list[int], int]]) -> list[list[float]]:
        """log p of the tokens from `start` on of each (token_ids, start), under the policy now at temperature 1."""
        result = []
        for token_ids, start in sequences:
            packed = Packed.of([token_ids], self.ranks.device)
            select = torch.arange(start - 1, len(token_ids) - 1, device=self.ranks.device)
            result.append(self.policy(packed, select, packed.input_ids[0, start:])[0].tolist())
        return result


TASK = PPOTask
