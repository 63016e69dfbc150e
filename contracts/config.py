"""The configuration schema. YAML under conf/ fills it; `contracts/checks/` lists every conflict before a process starts.

Every field that is not self-evident says its unit and what it trades.
"""

from dataclasses import dataclass, field
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING, DictConfig, OmegaConf


@dataclass
class ModelConfig:
    path: str = MISSING  # directory of a Hugging Face checkpoint, or a hub id
    revision: str | None = None
    # Of the engines and of the forward pass; the learner's master weights are always float32. auto: bfloat16 where the
    # hardware multiplies it, float32 on other CPUs.
    dtype: str = "auto"
    trust_remote_code: bool = False
    # The day (ISO 8601) that a chat template writes as today's: the same rows give the same tokens tomorrow.
    template_date: str = "2026-01-01"


@dataclass
class SourceConfig:
    """One data set: a local file, a glob or a directory of them, one saved by `datasets`, or a hub id: docs/data.md."""

    path: str = MISSING
    split: str = "train"
    # text | prompt | prompt_completion | messages | pair | rated; "auto" reads it off the columns
    format: str = "auto"
    prompt_column: str = "prompt"
    completion_column: str = "completion"
    text_column: str = "text"
    messages_column: str = "messages"
    chosen_column: str = "chosen"
    rejected_column: str = "rejected"
    rating_column: str = "rating"  # one number
    ratings_column: str = "ratings"  # a list of numbers, one for each rater
    max_rows: int | None = None


@dataclass
class DataConfig:
    sft: SourceConfig = field(default_factory=SourceConfig)
    prompts: SourceConfig = field(default_factory=SourceConfig)  # what PPO completes
    preferences: SourceConfig = field(default_factory=SourceConfig)  # trains PPO's reward model, and stage preference
    gold: SourceConfig | None = None  # trains the judge that PPO never sees
    test: SourceConfig = field(default_factory=SourceConfig)  # held-out preferences
    eval_prompts: SourceConfig = field(default_factory=SourceConfig)  # held-out prompts
    # Turn a text into a prompt of its first words and a completion of the rest; null takes prompts as they are.
    prompt_words: int | None = None
    chat: bool = False  # wrap prompts in the tokenizer's chat template
    max_prompt_tokens: int = 256
    max_bad_rows: float = 0.001  # share of unusable rows above which a run refuses to start


@dataclass
class OptimizerConfig:
    learning_rate: float = 1e-5
    head_learning_rate: float | None = None  # of a scalar head; null: as the rest
    betas: list[float] = field(default_factory=lambda: [0.9, 0.95])
    eps: float = 1e-5
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    warmup_steps: int = 0  # of the steps that are planned, as `schedule`: PPO may leave some out (ppo.target_approx_kl)
    schedule: str = "constant"  # constant | linear (to zero over the run)


@dataclass
class SFTConfig:
    epochs: int = 1
    batch_size: int = 32
    max_tokens: int = 512  # longer examples are left out and counted
    trainable_layers: int | None = None  # the top ones; null trains everything, embeddings included
    top_fraction: float = 0.5  # stage filtered_sft: share of the rated texts of data.preferences to train on, the best
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)


@dataclass
class RewardModelConfig:
    epochs: int = 1
    batch_size: int = 32  # texts a step; all pairs within a batch count
    max_tokens: int = 512
    trainable_layers: int | None = None
    freeze_embeddings: bool = True
    eval_pairs: int = 4000
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)


@dataclass
class PreferenceConfig:
    """Stage preference trains the SFT model on data.preferences, without a reward model: docs/preference.md."""

    loss: str | None = None  # dpo | rank (log-likelihoods without a reference); null: as `method` says, else dpo
    beta: float | None = None  # of a difference in nats a sequence (dpo) or a token (rank); null: 0.1 and 2
    nll_coef: float | None = None  # of the preferred text's negative log-likelihood a token; null: 0 (dpo) and 1 (rank)
    epochs: int = 1
    batch_size: int = 32  # pairs a step, or rated texts, of which all pairs count
    max_tokens: int = 512
    trainable_layers: int | None = None
    eval_pairs: int = 4000
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)


@dataclass
class SamplingConfig:
    max_completion_tokens: int = 48
    min_completion_tokens: int = 0
    temperature: float = 1.0
    top_p: float = 1.0


@dataclass
class KLConfig:
    coef: float = 0.05  # beta, of each token
    place: str | None = None  # none | reward (k1) | k2 | k3 (loss terms); null: as the estimator's paper has it
    controller: str = "fixed"  # fixed | adaptive (Ziegler 2019)
    target: float = 6.0  # nats a sequence
    horizon: int = 10000  # episodes


@dataclass
class OffPolicyConfig:
    """Importance weight w = pi_proximal / pi_behavior of each token, for rollouts that an older policy sampled.

    Without staleness w differs from 1 by the rounding of the engines alone.
    """

    # none | truncated: min(w, cap) | masked: 0 for w outside [low, high]; null: truncated where ppo.max_staleness > 0
    correction: str | None = None
    cap: float = 2.0
    low: float = 0.5
    high: float = 5.0


@dataclass
class RWRConfig:
    temperature: float = 1.0  # of the weights exp(outcome / temperature), score units


@dataclass
class CombinedConfig:
    """The text loss, subject to a mean score: ptx_coef * NLL + lambda * policy loss, lambda by dual ascent."""

    target: float | None = None  # of the mean score, in normalised units with the EOS penalty; null: lambda is 1
    learning_rate: float = 0.1  # of lambda, for a score unit below the target in one update
    initial: float = 1.0  # lambda of the first update
    max: float = 10.0  # above which lambda does not go, however far the target is


@dataclass
class PPOConfig:
    # A module of learner/estimators, or package.module:NAME of yours: docs/algorithms.md. All but gae do without a value
    # model, and ignore `lam` and every key of the value model; raft, rwr and online_dpo ignore the clips too. grpo, dr_grpo,
    # rloo, raft and online_dpo compare rollouts of a prompt: samples_per_prompt >= 2.
    estimator: str = "gae"
    # Of prompts' order, sampling and minibatches, and of what another `method` trains or samples in place of PPO; null:
    # `seed`. Runs that differ in it alone share SFT and reward models.
    seed: int | None = None
    updates: int = 50
    rollouts_per_update: int = 64
    samples_per_prompt: int = 1
    epochs: int = 1
    minibatches: int = 1  # optimizer steps an epoch
    gamma: float = 1.0
    lam: float = 0.95
    clip: float = 0.2
    dual_clip: float | None = 3.0
    value_clip: float | None = 0.2
    # KL of the policy from before an update, nats a token, beyond which no further epoch of the update begins. The first
    # one is always whole: every rollout trains.
    target_approx_kl: float | None = 0.02
    whiten_advantages: bool | None = None  # null: as the estimator's paper has it
    # Mean over tokens, over means or sums of sequences, or over the token budget: tokens | sequences | sequence_sums |
    # budget; null: as the estimator's paper has it.
    aggregation: str | None = None
    off_policy: OffPolicyConfig = field(default_factory=OffPolicyConfig)
    kl: KLConfig = field(default_factory=KLConfig)
    rwr: RWRConfig = field(default_factory=RWRConfig)
    dpo_beta: float = 0.1  # of online_dpo: how strongly the reference holds the policy
    # Updates that may lie between sampling and training. 0: actors and learner take turns; from 1 on both work all the
    # time, on (max_staleness + 1) * rollouts_per_update rollouts.
    max_staleness: int = 1
    # in_flight: engines take new weights between two decoding steps, a completion may span versions; drain: they
    # finish what they hold before.
    weight_update: str = "in_flight"
    score_batch: int = 16  # completions an actor scores together while others are sampled; all of them at staleness 0
    ptx_coef: float = 0.0  # PPO-ptx: weight of the SFT loss in the same optimizer step
    ptx_batch_size: int = 16
    combined: CombinedConfig = field(default_factory=CombinedConfig)
    missing_eos_penalty: float = 0.3  # score units
    value_warmup_updates: int = 2  # updates that train only the value model
    trainable_layers: int | None = None  # of the policy
    value_trainable_layers: int | None = None
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    value_optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    gold_rollouts: int = 32  # rollouts an update that the gold judge scores too; 0 switches it off
    max_failed_scores: float = 0.01  # share of rollouts without a score above which the run stops
    init_from: str = "sft"  # sft | base: what policy and reference start from
    # What the value model starts from: reward_model (of the scorer proxy) | policy; null: a reward model that scores the
    # rollouts, where there is one.
    init_value_from: str | None = None


@dataclass
class CheckpointConfig:
    """Commits of stage ppo, in run_dir/checkpoints: docs/checkpoints.md."""

    every: int = 4  # updates; 0 makes no commits, and nothing can be resumed
    keep: int = 2  # newest commits that stay, beside the best one
    # auto: go on from the newest valid commit in run_dir, where there is one | never: start afresh, commits are set aside
    resume: str = "auto"
    max_failures: int = 3  # failed commits in a row that end the run
    grace_s: float = 60.0  # after SIGTERM or SIGINT, to save and leave


@dataclass
class EvaluateConfig:
    prompts: int = 256
    seed: int = 1234
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    bootstrap_samples: int = 2000
    best_of_n: int = 16  # method best_of_n: completions a prompt, of which the proxy's favourite is judged
    # What must hold for the verdict "better than SFT".
    max_length_change: float = 0.25
    min_eos_share: float = 0.9
    max_kl: float = 10.0  # nats a sequence


@dataclass
class EngineConfig:
    """vLLM."""

    max_num_seqs: int = 64
    max_model_len: int = 512
    kv_cache_gib: float = 1.0  # CPU only; a GPU engine uses gpu_memory_utilization
    gpu_memory_utilization: float = 0.8
    tensor_parallel_size: int = 1
    enforce_eager: bool = True


@dataclass
class LearnerConfig:
    zero_stage: int = 0
    microbatch_tokens: int = 4096  # of one forward pass
    # Tokens whose activations may be kept from the log-probability pass to the backward pass, which saves the second
    # forward pass of the first epoch; 0 recomputes everything. About 1.2 MB a token for a 135M policy and value.
    held_tokens: int = 0
    attention: str = "auto"  # auto | sdpa | eager | short_causal | flash_attention_2; auto: short_causal on CPU
    gradient_checkpointing: bool = False
    # auto | shared_memory | ray_object | nccl | ipc; auto: shared_memory on CPU, on GPUs nccl or (colocated) ipc
    weight_transfer: str = "auto"


@dataclass
class ScorerConfig:
    """One scorer of the reward service: docs/reward_service.md."""

    # model | function | weighted_sum | ensemble (reward_service/kinds), or package.module:KIND: docs/extending.md
    kind: str = "model"
    path: str | None = None  # model: directory of a checkpoint with one label, or a hub id
    # model: where the score is read. eos | last (as transformers' own class does, of what the chat template writes); null:
    # eos where the checkpoint says so, else last: docs/reward_service.md.
    read_at: str | None = None
    append: str | None = (
        None  # model: text in place of a completion's EOS, read at last; null: what the template writes
    )
    function: str | None = None  # function: package.module:name or path/file.py:name
    timeout_s: float = 5.0  # function: for one call, after which its process is ended
    processes: int = 1  # function: calls at a time
    batch_size: int = 1  # function: items a call
    memory_gib: float = 2.0  # function: address space of one process
    parts: list[str] = field(default_factory=list)  # weighted_sum, ensemble: names of scorers
    weights: list[float] = field(default_factory=list)  # weighted_sum: of each part
    std_coef: float = 1.0  # ensemble: k in mean - k x standard deviation of the parts
    options: dict[str, Any] = field(default_factory=dict)  # of a kind of your own


@dataclass
class HttpConfig:
    port: int | None = None  # null: no HTTP
    host: str = "127.0.0.1"
    # One bearer token a line; several, so that a token can be replaced without a gap. Required beyond loopback.
    token_file: str | None = None
    max_items: int = 256  # of one request
    max_body_mib: float = 8.0
    max_pending_mib: float = 64.0  # bodies of all requests together, above which new ones are turned away


@dataclass
class RewardServiceConfig:
    # Beside, or in place of, the reward models `proxy` (PPO trains on it) and `gold` (only measures), whose checkpoints
    # composites name `proxy_model` and `gold_model`.
    scorers: dict[str, ScorerConfig] = field(default_factory=dict)
    replicas: int = 1  # of each model and each function
    batch_tokens: int = 1024  # of one forward pass, longest x count
    dtype: str = "auto"  # as model.dtype
    max_tokens: int = 1024
    deadline_s: float = 120.0
    max_queued_items: int = 4096  # above which requests are turned away
    cache_items: int = 16384  # scores that are remembered
    golden_tolerance: float = 0.15  # mean deviation from the checkpoint's golden scores above which it is not served
    http: HttpConfig = field(default_factory=HttpConfig)


@dataclass
class ClusterConfig:
    address: str = "local"  # "local" starts an embedded Ray; "auto" joins a running cluster
    # disaggregated: actors and learner ranks have devices of their own; colocated: actor i shares one with learner rank i
    layout: str = "disaggregated"
    # What the cluster has, or will have grown to when it is needed; null: it is asked when it has been joined.
    num_nodes: int | None = None
    gpus_per_node: float | None = None
    cpus_per_node: float | None = None
    num_actors: int = 1
    num_learner_ranks: int = 1
    # One phase runs at a time in a synchronous run, so each may use every core of a laptop.
    threads_per_actor: int = 2
    threads_per_learner_rank: int = 2
    threads_per_reward_replica: int = 2
    cpus_per_process: float = 0.1  # what Ray books for each of our processes
    gpus_per_actor: float = 0.0
    gpus_per_learner_rank: float = 0.0
    gpus_per_reward_replica: float = 0.0
    object_store_gib: float = 1.0
    min_memory_gib: float = 6.0  # free memory below which nothing starts
    start_timeout_s: float = 300.0
    step_timeout_s: float = 900.0  # longest wait for one generation, update or weight transfer
    max_actor_restarts: int = 3  # lost rollout actors that are replaced before the run gives up
    max_learner_restarts: int = 3  # returns to the last commit after a rank was lost, before the run gives up
    # Without a decoding step, asked for or its own, an actor is taken for lost; longer than the longest step.
    actor_silence_s: float = 60.0
    # An update in which a rank makes no forward, backward or optimizer step for so long hangs; longer than the longest.
    learner_silence_s: float = 180.0
    # A rollout that takes longer, and 3 x as long as 95% of the last ones, is given to an idle actor too: the first counts.
    hedge_after_s: float = 30.0
    publish_timeout_s: float = 120.0  # longest wait for an actor to take new weights; the others go on without it


@dataclass
class EnvironmentConfig:
    """What the policy talks to. A turn is what it samples until EOS or `max_turn_tokens`; `sampling.max_completion_tokens`
    bounds all turns of a conversation and the observations between them."""

    name: str = "single_turn"  # single_turn | two_turn | module:Class, an import path: docs/environments.md
    # Where a conversation is paid: cumulative (the sum, at its last token) | per_turn (each turn at its own last token) |
    # separate (as per_turn, and every turn is an episode of its own: what comes later does not count for it).
    reward: str = "cumulative"
    max_turn_tokens: int | None = None  # null: what is left of sampling.max_completion_tokens
    min_turn_tokens: int = 0  # no turn ends before: EOS cannot be sampled, nor is it expected by the learner
    options: dict[str, Any] = field(default_factory=dict)  # keyword arguments of the environment


@dataclass
class LoggerConfig:
    trackers: list[str] = field(default_factory=lambda: ["wandb"])  # or package.module:NAME: docs/dashboards.md
    wandb: str = "auto"  # auto | offline | online | disabled: docs/dashboards.md
    project: str = "tandem"
    wandb_text: bool = False  # also send sampled prompts and completions to all trackers; they may be confidential
    table_every: int = 10  # policy versions between two of the trackers' sample tables
    group: str | None = None  # the trackers' group; null: the run, in a sweep its directory
    samples_per_update: int = 4
    heartbeat_s: float = 30.0


@dataclass
class TandemConfig:
    stage: str = "pipeline"  # pipeline | sft | reward_model | ppo | preference | filtered_sft | evaluate
    method: str = "ppo"  # what follows SFT: ppo | dpo | rank | filtered_sft | best_of_n | none (docs/preference.md)
    name: str = "demo"
    seed: int = 1
    run_dir: str = MISSING
    cache_dir: str = MISSING
    # Finished stages with the same inputs: auto: those that today's code has made | true: whatever code has | false: none
    reuse_stages: Any = "auto"
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    sft: SFTConfig = field(default_factory=SFTConfig)
    reward_model: RewardModelConfig = field(default_factory=RewardModelConfig)
    preference: PreferenceConfig = field(default_factory=PreferenceConfig)
    ppo: PPOConfig = field(default_factory=PPOConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    environment: EnvironmentConfig = field(default_factory=EnvironmentConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    learner: LearnerConfig = field(default_factory=LearnerConfig)
    reward_service: RewardServiceConfig = field(default_factory=RewardServiceConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    logger: LoggerConfig = field(default_factory=LoggerConfig)
    # Checkpoints to use instead of running the stage that makes them.
    sft_model: str | None = None
    proxy_model: str | None = None
    gold_model: str | None = None
    ppo_model: str | None = None
    preference_model: str | None = None
    filtered_sft_model: str | None = None


def register_schema() -> None:
    """Let Hydra find the schema by the name that conf/config.yaml gives it."""
    ConfigStore.instance().store(name="tandem", node=TandemConfig)


def to_config(composed: DictConfig) -> TandemConfig:
    """What Hydra has composed, as an object. A path that is still open (`???`) is empty: which of them a stage needs is for
    `validate` to say, all at once.

    Raises:
        OmegaConfBaseException: where the composed values are not of the schema's types.
    """
    for key in OmegaConf.missing_keys(composed):
        OmegaConf.update(composed, key, "")
    config = OmegaConf.to_object(composed)
    assert isinstance(config, TandemConfig)
    return config
