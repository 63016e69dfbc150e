"""The configuration schema. YAML under conf/ fills it; `contracts/checks/` lists every conflict before a process starts.

Every field that is not self-evident says its unit and what it trades. What a key may hold is declared on it, by `key`:
bounds, choices, or why there are neither; null where the annotation has it.
"""

from dataclasses import dataclass, field, replace
from datetime import date
from typing import TYPE_CHECKING, Any

from contracts.keys import Allowed, Rule, key, names_in, section

if TYPE_CHECKING:
    from omegaconf import DictConfig

MISSING: Any = "???"  # OmegaConf's own; the engines import a configuration's types and need none of it


def _is_day(value: str) -> bool:
    try:
        date.fromisoformat(value)
    except ValueError:
        return False
    return True


MODEL, SOURCE, DIRECTORY = "a checkpoint directory or a hub id", "a file, a directory or a hub id", "a directory"
COLUMN, WORD = "the name of a column", "a name of the user's"
KIND = "the kinds that read it check it"
DTYPES = ("auto", "bfloat16", "float16", "float32")
FORMATS = ("auto", "text", "prompt", "prompt_completion", "messages", "pair", "rated")
LORA_INITS = ("kaiming", "gaussian")
KL_PLACES = ("none", "reward", "k2", "k3")
AGGREGATIONS = ("tokens", "sequences", "sequence_sums", "budget")
HEAD_ALONE = Rule("0 (the head and the norm before it) or more", lambda value: value >= 0)
BETAS = Rule("two numbers in [0, 1)", lambda value: len(value) == 2 and all(0 <= beta < 1 for beta in value))
COLUMNS = Rule("a list of different columns", lambda value: len({*value}) == len(value))
PASS_AT = Rule(
    "a list of different numbers from 1 on", lambda value: len({*value}) == len(value) > 0 and min(value) >= 1
)
TARGETS = Rule(
    "a list of different names, or of all-linear alone",
    lambda value: len({*value}) == len(value) > 0 and ("all-linear" not in value or len(value) == 1),
)
NO_DROPOUT = Rule("0, as PPO compares forward passes", lambda value: value == 0)
NO_PROMPTS = Rule("left to data.prompts and data.eval_prompts", lambda value: False)
BIASED = "the log-probabilities of a truncated, renormalised distribution bias the policy ratio"
UNBIASED = Rule(f"1, as {BIASED}", lambda value: value == 1)


@dataclass
class LoraConfig:
    """Low-rank adapters on a frozen base: docs/lora.md."""

    rank: int = key(16, least=1)
    alpha: float = key(32.0, above=0)  # the product of both matrices counts alpha / rank
    # of what goes into an adapter, in stages sft, filtered_sft and reward_model; others compare two forward passes
    dropout: float = key(0.0, least=0, below=1)
    # Names of linear layers as they end (q_proj), in every decoder layer; all-linear: all of these.
    targets: list[str] = key(["all-linear"], rule=TARGETS)
    init: str = key("kaiming", choices=LORA_INITS)  # of A; B begins with zeros, so the base is the start
    rslora: bool = False  # alpha / sqrt(rank): Kalajdzievski 2023
    dora: bool = False  # a magnitude of each output beside its direction: Liu 2024


@dataclass
class RoleLoraConfig:
    """What the adapters of one role have in place of model.lora's; null: as model.lora, or its defaults where it is null."""

    rank: int | None = key(None, least=1)
    alpha: float | None = key(None, above=0)
    dropout: float | None = key(None, least=0, below=1)
    targets: list[str] | None = key(None, rule=TARGETS)
    init: str | None = key(None, choices=LORA_INITS)
    rslora: bool | None = None
    dora: bool | None = None


@dataclass
class LoraByRoleConfig:
    """Each null: as model.lora, so that a role has adapters where model.lora is set, or where it is set here."""

    policy: RoleLoraConfig | None = None  # in SFT, PPO and what trains in its place
    # of PPO: with the rank, alpha, rslora and dora of what it starts from
    value_model: RoleLoraConfig | None = field(default=None, metadata={"narrower": {"dropout": Allowed(NO_DROPOUT)}})
    reward_model: RoleLoraConfig | None = None  # proxy and gold


@dataclass
class ModelConfig:
    path: str = key(MISSING, free=MODEL)
    revision: str | None = key(None, free="a revision of a hub")
    # Of the engines and of the forward pass; the learner's master weights are always float32. auto: bfloat16 where the
    # hardware multiplies it, float32 on other CPUs.
    dtype: str = key("auto", choices=DTYPES)
    trust_remote_code: bool = False
    # The day (ISO 8601) that a chat template writes as today's: the same rows give the same tokens tomorrow.
    template_date: str = key("2026-01-01", rule=Rule("a day as 2026-01-31", _is_day))
    # What trains in every stage; null: the model itself. model.lora={rank:16} switches it on.
    lora: LoraConfig | None = None
    # Where the adapters of a role are others: model.lora_by_role.value_model.rank=8
    lora_by_role: LoraByRoleConfig = field(default_factory=LoraByRoleConfig)

    def revision_of(self, path: str) -> str | None:
        """That of the checkpoint at `path`: `revision` is one of this model alone."""
        return self.revision if path == self.path else None

    def at(self, path: str) -> "ModelConfig":
        """Of the checkpoint at `path`, which is loaded as this model is."""
        return replace(self, path=path, revision=self.revision_of(path))


@dataclass
class SourceConfig:
    """One data set: a local file, a glob or a directory of them, one saved by `datasets`, or a hub id: docs/data.md."""

    path: str = key(MISSING, free=SOURCE)
    split: str = key("train", free="the name of a split")
    # of a hub id with several configurations, as openai/gsm8k has `main`; of a directory the folder of this name; null: none
    subset: str | None = key(None, free="the name of a subset")
    format: str = key("auto", choices=FORMATS)  # auto reads it off the columns
    prompt_column: str = key("prompt", free=COLUMN)
    completion_column: str = key("completion", free=COLUMN)
    text_column: str = key("text", free=COLUMN)
    messages_column: str = key("messages", free=COLUMN)
    chosen_column: str = key("chosen", free=COLUMN)
    rejected_column: str = key("rejected", free=COLUMN)
    rating_column: str = key("rating", free=COLUMN)  # one number
    ratings_column: str = key("ratings", free=COLUMN)  # a list of numbers, one for each rater
    max_rows: int | None = key(None, least=1)
    # prompts, eval_prompts: columns that travel with a prompt to rule functions, environments and samples.jsonl, each with
    # a value in every row; null: all that are not the prompt, a missing value as null
    keep: list[str] | None = key(None, rule=COLUMNS)


@dataclass
class PromptSourceConfig(SourceConfig):
    """One of several sources of prompts: docs/data.md."""

    # its share of the prompts; all of them sum to 1, or all are null: each by its size
    weight: float | None = key(None, above=0)


@dataclass
class CurriculumConfig:
    # Prompts of the first epoch in the order of this column, a number or a text in every row; null: in random order
    column: str | None = key(None, free=COLUMN)
    order: str = key("ascending", choices=("ascending", "descending"))
    # Every later epoch begins with the prompts whose share of scores of at least this was nearest to a half; null: random
    success: float | None = key(None, free="any score")


@dataclass
class DataConfig:
    sft: SourceConfig = section(SourceConfig, keep=NO_PROMPTS)
    prompts: SourceConfig = field(default_factory=SourceConfig)  # what PPO completes
    prompt_sources: dict[str, PromptSourceConfig] = field(default_factory=dict)  # by name, in place of `prompts`
    curriculum: CurriculumConfig = field(default_factory=CurriculumConfig)  # of these prompts
    # trains PPO's reward model, and stage preference
    preferences: SourceConfig = section(SourceConfig, keep=NO_PROMPTS)
    # trains the judge that PPO never sees
    gold: SourceConfig | None = field(default=None, metadata={"narrower": {"keep": Allowed(NO_PROMPTS)}})
    test: SourceConfig = section(SourceConfig, keep=NO_PROMPTS)  # held-out preferences
    eval_prompts: SourceConfig = field(default_factory=SourceConfig)  # held-out prompts
    # Turn a text into a prompt of its first words and a completion of the rest; null takes prompts as they are.
    prompt_words: int | None = key(None, least=1)
    chat: bool = False  # wrap prompts in the tokenizer's chat template
    max_prompt_tokens: int = key(256, least=1)
    max_bad_rows: float = key(0.001, least=0, most=1)  # share of unusable rows above which a run refuses to start
    # Share of rows that a stage's max_tokens leaves out as too long, above which a run refuses to start.
    max_long_rows: float = key(0.5, least=0, most=1)
    # Share of held-out items (of eval_prompts, test, and preferences beside gold) that stand in what they are held out
    # from, above which a run refuses to start.
    max_seen_rows: float = key(0.05, least=0, most=1)


@dataclass
class OptimizerConfig:
    learning_rate: float = key(1e-5, above=0)
    head_learning_rate: float | None = key(None, above=0)  # of a scalar head; null: as the rest
    betas: list[float] = key([0.9, 0.95], rule=BETAS)
    eps: float = key(1e-5, above=0)  # of Adam: gradients of this size take half a step (docs/algorithms.md)
    weight_decay: float = key(0.0, least=0)
    max_grad_norm: float = key(1.0, above=0)
    # of the steps that are planned, as `schedule`: PPO may leave some out (ppo.target_approx_kl)
    warmup_steps: int = key(0, least=0)
    schedule: str = key("constant", choices=("constant", "linear"))  # linear: to zero over the run


@dataclass
class SFTConfig:
    epochs: int = key(1, least=1)
    batch_size: int = key(32, least=1)
    max_tokens: int = key(512, least=1)  # longer examples are left out and counted
    trainable_layers: int | None = key(None, least=1)  # the top ones; null trains everything, embeddings included
    top_fraction: float = key(0.5, above=0, most=1)  # stage filtered_sft: of the rated texts, the share to train on
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)


@dataclass
class RewardModelConfig:
    epochs: int = key(1, least=1)
    batch_size: int = key(32, least=1)  # rated texts a step, of which all pairs count; or pairs
    max_tokens: int = key(512, least=1)
    # What they start from, with a new head; auto: the SFT model, or model.path where adapters train, which all lie on it, or
    # where there is neither an SFT model nor texts for one.
    init_from: str = key("base", choices=("base", "sft", "auto"))
    trainable_layers: int | None = key(None, rule=HEAD_ALONE)
    freeze_embeddings: bool = True
    eval_pairs: int = key(4000, least=1)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)


@dataclass
class PreferenceConfig:
    """Stage preference trains the SFT model on data.preferences, without a reward model: docs/preference.md."""

    # rank: log-likelihoods without a reference; null: as `method` says, else dpo
    loss: str | None = key(None, choices=names_in("contracts.preference_losses", "PREFERENCE_LOSSES"))
    # of a difference in nats a sequence (dpo) or a token (rank); null: 0.1 and 2
    beta: float | None = key(None, above=0)
    # of the preferred text's negative log-likelihood a token; null: 0 (dpo) and 1 (rank)
    nll_coef: float | None = key(None, least=0)
    epochs: int = key(1, least=1)
    batch_size: int = key(32, least=1)  # pairs a step, or rated texts, of which all pairs count
    max_tokens: int = key(512, least=1)
    trainable_layers: int | None = key(None, least=1)
    eval_pairs: int = key(4000, least=1)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)


@dataclass
class SamplingConfig:
    max_completion_tokens: int = key(48, least=1)
    min_completion_tokens: int = key(0, least=0)
    temperature: float = key(1.0, least=0.01, most=2)  # below it vLLM samples at 0.01, above it refuses
    top_p: float = key(1.0, above=0, most=1)


@dataclass
class KLConfig:
    coef: float = key(0.05, least=0)  # beta, of each token
    # reward: k1; k2, k3: loss terms; null: as the estimator's paper has it
    place: str | None = key(None, choices=KL_PLACES)
    controller: str = key("fixed", choices=("fixed", "adaptive"))  # adaptive: Ziegler 2019
    target: float = key(6.0, above=0)  # nats a sequence
    horizon: int = key(10000, least=1)  # episodes


@dataclass
class OffPolicyConfig:
    """Importance weight w = pi_proximal / pi_behavior of each token, for rollouts that an older policy sampled.

    Without staleness w differs from 1 by the rounding of the engines alone.
    """

    # truncated: min(w, cap) | masked: 0 for w outside [low, high]; null: truncated where ppo.max_staleness > 0
    correction: str | None = key(None, choices=("none", "truncated", "masked"))
    cap: float = key(2.0, least=1)
    low: float = key(0.5, least=0, below=1, why="as tokens with w = 1 must train")
    high: float = key(5.0, above=1, why="as tokens with w = 1 must train")


@dataclass
class DynamicSamplingConfig:
    """Groups whose scores are equal give way to groups of fresh prompts: DAPO. Estimators that compare groups alone."""

    # times rollouts_per_update that an update may sample to fill its batch; null: equal groups stay in it
    max_batches: int | None = key(None, least=2)


@dataclass
class OverlongConfig:
    """A penalty that grows linearly over the last tokens before sampling.max_completion_tokens: DAPO."""

    buffer_tokens: int | None = key(None, least=1)  # over which it grows; null: there is none
    penalty: float = key(1.0, above=0)  # of a completion that fills the limit, score units


@dataclass
class RWRConfig:
    temperature: float = key(1.0, above=0)  # of the weights exp(outcome / temperature), score units


@dataclass
class CombinedConfig:
    """The text loss, subject to a mean score: ptx_coef * NLL + lambda * policy loss, lambda by dual ascent."""

    # of the mean score, in normalised units with the EOS penalty; null: lambda is 1
    target: float | None = key(None, free="any score")
    learning_rate: float = key(0.1, above=0)  # of lambda, for a score unit below the target in one update
    initial: float = key(1.0, least=0)  # lambda of the first update
    max: float = key(10.0, above=0)  # above which lambda does not go, however far the target is


@dataclass
class PPOConfig:
    # A module of learner/estimators, or package.module:NAME of yours: docs/algorithms.md. All but gae do without a value
    # model, and ignore `lam` and every key of the value model; raft, rwr and online_dpo ignore the clips too. grpo, dr_grpo,
    # rloo, raft and online_dpo compare rollouts of a prompt: samples_per_prompt >= 2.
    estimator: str = key("gae", free="estimator_checks look for it")
    # Of prompts' order, sampling and minibatches, and of what another `method` trains or samples in place of PPO; null:
    # `seed`. Runs that differ in it alone share SFT and reward models.
    seed: int | None = key(None, least=0)
    updates: int = key(50, least=1)
    rollouts_per_update: int = key(64, least=1)
    samples_per_prompt: int = key(1, least=1)
    epochs: int = key(1, least=1)
    minibatches: int = key(1, least=1)  # optimizer steps an epoch
    gamma: float = key(1.0, least=0, most=1)
    lam: float = key(0.95, least=0, most=1)
    # What advantages are multiplied with. clip: PPO's surrogate of each token's ratio | gspo: the same of a sequence's |
    # cispo: log-likelihoods, weighted by the clipped ratio. raft, rwr and online_dpo have none.
    objective: str = key("clip", choices=names_in("contracts.objectives", "objective_names"))
    clip: float = key(0.2, above=0, below=1)  # the ratio stays within 1 - clip and 1 + clip
    # The two bounds apart, as in 1 - clip_low and 1 + clip_high; null: clip, of gspo 3e-4 and 4e-4, of cispo none below.
    clip_low: float | None = key(None, above=0, below=1)
    clip_high: float | None = key(None, above=0)
    # Where A < 0 the loss of clip and gspo is at most -A times this: a larger ratio has no gradient; null: no bound.
    dual_clip: float | None = key(3.0, above=1)
    # Of the entropy of the distributions that tokens are sampled from, nats a token, which joins the policy's loss with a
    # minus. 0 is the advice: the KL penalty keeps a policy broad, and where there is none clip_high does.
    entropy_coef: float = key(0.0, least=0)
    value_clip: float | None = key(0.2, above=0)
    # KL of the policy from before an update, nats a token, beyond which no further epoch of the update begins. The first
    # one is always whole: every rollout trains.
    target_approx_kl: float | None = key(0.02, above=0)
    whiten_advantages: bool | None = None  # null: as the estimator's paper has it
    # Over the tokens of the global batch, or of each rollout group; whitening over groups wants several samples of a prompt.
    whiten_over: str = key("batch", choices=("batch", "group"))
    # Mean over tokens, over means or sums of sequences, or over the token budget; null: as the estimator's paper has it.
    aggregation: str | None = key(None, choices=AGGREGATIONS)
    off_policy: OffPolicyConfig = field(default_factory=OffPolicyConfig)
    kl: KLConfig = field(default_factory=KLConfig)
    rwr: RWRConfig = field(default_factory=RWRConfig)
    dpo_beta: float = key(0.1, above=0)  # of online_dpo: how strongly the reference holds the policy
    dynamic_sampling: DynamicSamplingConfig = field(default_factory=DynamicSamplingConfig)
    # Updates that may lie between sampling and training. 0: actors and learner take turns; from 1 on both work all the
    # time, on (max_staleness + 1) * rollouts_per_update rollouts.
    max_staleness: int = key(1, least=0)
    # in_flight: engines take new weights between two decoding steps, a completion may span versions; drain: they
    # finish what they hold before.
    weight_update: str = key("in_flight", choices=("in_flight", "drain"))
    # completions an actor scores together while others are sampled; all of them at staleness 0
    score_batch: int = key(16, least=1)
    ptx_coef: float = key(0.0, least=0)  # PPO-ptx: weight of the SFT loss in the same optimizer step
    ptx_batch_size: int = key(16, least=1)
    combined: CombinedConfig = field(default_factory=CombinedConfig)
    missing_eos_penalty: float = key(0.3, least=0)  # score units
    overlong: OverlongConfig = field(default_factory=OverlongConfig)
    # Completions that the token limit cut off train nothing; their scores still count in what others are compared with.
    mask_truncated: bool = False
    value_warmup_updates: int = key(2, least=0)  # updates that train only the value model
    trainable_layers: int | None = key(None, least=1)  # of the policy
    value_trainable_layers: int | None = key(None, rule=HEAD_ALONE)
    sampling: SamplingConfig = section(SamplingConfig, top_p=UNBIASED)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    value_optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    gold_rollouts: int = key(32, least=0)  # rollouts an update that the gold judge scores too; 0 switches it off
    max_failed_scores: float = key(0.01, least=0, most=1)  # share of rollouts without a score above which the run stops
    init_from: str = key("sft", choices=("sft", "base"))  # what policy and reference start from
    # What the value model starts from; reward_model: of the scorer proxy; null: a reward model that scores the rollouts,
    # where there is one.
    init_value_from: str | None = key(None, choices=("reward_model", "policy"))


@dataclass
class CheckpointConfig:
    """Commits of stage ppo, in run_dir/checkpoints: docs/checkpoints.md."""

    every: int = key(4, least=0)  # updates; 0 makes no commits, and nothing can be resumed
    # newest commits that stay, beside the best one
    keep: int = key(2, least=2, why="as the newest commit may turn out bad")
    # auto: go on from the newest valid commit in run_dir, where there is one | never: start afresh, commits are set aside
    resume: str = key("auto", choices=("auto", "never"))
    max_failures: int = key(3, least=1)  # failed commits in a row that end the run
    grace_s: float = key(60.0, above=0)  # after SIGTERM or SIGINT, to save and leave


@dataclass
class EvaluateConfig:
    prompts: int = key(256, least=2, why="as one prompt has no confidence interval")
    seed: int = key(1234, least=0)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    bootstrap_samples: int = key(2000, least=1)
    # The proxy's score from which an answer is right, which has answers counted: pass@k, also of each value of the column
    # `by` (source, ...); null: where a score says more or less, and not whether. Of a verifier 1.0.
    success: float | None = key(None, free="any score")
    pass_at: list[int] = key([1], rule=PASS_AT)  # each k
    samples: int = key(1, least=1)  # completions a prompt that it is estimated from; the first one is judged
    by: str | None = key(None, free=COLUMN)
    # Policy versions after which PPO has the held-out prompts answered, beside what it trains on; null: never.
    every: int | None = key(None, least=1)
    # method best_of_n: completions a prompt, of which the proxy's favourite is judged
    best_of_n: int = key(16, least=2, why="as the best of one is SFT")
    # What must hold for the verdict "better than SFT".
    max_length_change: float = key(0.25, above=0)
    min_eos_share: float = key(0.9, least=0, most=1)
    max_kl: float = key(10.0, above=0)  # nats a sequence


@dataclass
class EngineConfig:
    """vLLM."""

    max_num_seqs: int = key(64, least=1)
    max_model_len: int = key(512, least=1)
    kv_cache_gib: float = key(1.0, above=0)  # CPU only; a GPU engine uses gpu_memory_utilization
    gpu_memory_utilization: float = key(0.8, above=0, most=1)
    tensor_parallel_size: int = key(1, least=1)
    enforce_eager: bool = True


@dataclass
class LearnerConfig:
    zero_stage: int = key(0, choices=(0, 1, 2, 3))
    microbatch_tokens: int = key(4096, least=1)  # of one forward pass
    # Tokens of a rank whose graphs a policy may keep from its first forward pass until the losses are known, which saves the
    # second one; 0 computes it again. About 0.6 MB a token for 135M. It waits with preference losses, and in PPO with a
    # value model, whitened token advantages, a KL in the reward where rollouts are compared, or an estimator that reads
    # log-ratios.
    held_tokens: int = key(0, least=0)
    # auto: short_causal on CPU, where alone it may be; sdpa on GPUs
    attention: str = key("auto", choices=("auto", "sdpa", "eager", "short_causal", "flash_attention_2"))
    gradient_checkpointing: bool = False
    checkpointed_layers: int | None = key(None, least=1)  # the top so many recompute their activations; null: all
    # What ZeRO keeps in the CPU's memory, not the device's: masters and moments (zero_stage 1 to 3), weights as well (3)
    offload: str = key("none", choices=("none", "optimizer", "parameters"))
    # More of DeepSpeed's own configuration, by its names, as {zero_optimization: {reduce_bucket_size: 200000000}}
    deepspeed: dict[str, Any] = field(default_factory=dict)
    # auto: on GPUs nccl or (colocated) ipc; on CPU, with LoRA and in an elastic fleet shared_memory
    weight_transfer: str = key("auto", choices=names_in("contracts.transports", "TRANSPORTS", "auto"))


@dataclass
class JudgeConfig:
    """Of a scorer of kind `judge`, a language model that writes: docs/judges.md."""

    # One of the two: a checkpoint with an engine of its own, or the base URL of a server with OpenAI's protocol.
    model: str | None = key(None, free=MODEL)
    address: str | None = key(None, free="a URL as http://host:8000/v1")
    model_name: str | None = key(None, free="the server's name of the model; wanted with an address")
    token_file: str | None = key(None, free="a file")  # for the address: it holds the bearer token and nothing else
    # A Jinja template, or the path of one: what the judge is asked. It shows {{ completion }} (pairwise: {{ first }} and
    # {{ second }}), and has {{ prompt }}, {{ label }} and the columns of the row, as {{ row.answer }}.
    rubric: str = key("", free="a template or a file")
    mode: str = key("pointwise", choices=("pointwise", "pairwise"))  # pairwise: against the column `reference`
    reference: str | None = key(None, free=COLUMN)  # pairwise: with the completion to be compared with
    # probabilities: the expected value over the scale, by the probabilities of the answers' first tokens | text: the value
    # of the answer that is written
    read: str = key("probabilities", choices=("probabilities", "text"))
    # The answers that the judge may give. Empty: 1 to 5; pairwise A (the first is better) and B.
    scale: list[str] = key([], free="the kind judge checks it")
    # What each answer is worth. Empty: pointwise the number that it is; pairwise 1 and 0, the first one's share.
    values: list[float] = key([], free="the kind judge checks it")
    # read: probabilities: probability on the scale below which an item has no score
    min_on_scale: float = key(0.5, least=0, most=1)
    max_tokens: int = key(0, least=0)  # of a text in which the judge reasons before it is asked for its answer
    # read: text, at an address: how the server is asked to allow the answers alone. json_schema: OpenAI's response_format |
    # choice: vLLM's structured_outputs | none: an answer with anything around it is an error of its item
    constrain: str = key("json_schema", choices=("json_schema", "choice", "none"))
    concurrency: int = key(16, least=1, most=64)  # requests at a time to the address, of each replica
    timeout_s: float = key(60.0, above=0)  # of one request to the address, which is then made again
    engine: EngineConfig = section(EngineConfig, tensor_parallel_size=Rule("1 of a judge", lambda value: value == 1))


@dataclass
class ScorerConfig:
    """One scorer of the reward service: docs/reward_service.md."""

    # model | function | verifier | judge | weighted_sum | ensemble | by_source (reward_service/kinds), or
    # package.module:KIND: docs/extending.md
    kind: str = key("model", free=KIND)
    path: str | None = key(None, free=MODEL)  # model: directory of a checkpoint with one label, or a hub id
    # model: where the score is read. eos | last (as transformers' own class does, of what the chat template writes); null:
    # eos where the checkpoint says so, else last: docs/reward_service.md.
    read_at: str | None = key(None, free=KIND)
    # model: text in place of a completion's EOS, read at last; null: what the template writes
    append: str | None = key(None, free="a text")
    function: str | None = key(None, free=KIND)  # function: package.module:name or path/file.py:name
    # verifier: math | choice | exact | regex | json_schema | code | reasoning_gym, or package.module:NAME:
    # docs/verifiers.md
    verifier: str | None = key(None, free=KIND)
    # verifier: the column of a row with what is right; null: the verifier's own, answer for most
    answer: str | None = key(None, free="a column")
    # function: for one call, verifier: for one item, after which its process is ended
    timeout_s: float = key(5.0, free=KIND)
    processes: int = key(1, free=KIND)  # function, verifier: calls at a time
    batch_size: int = key(32, free=KIND)  # function, verifier: items a call, at most; a slow one gets fewer
    memory_gib: float = key(2.0, free=KIND)  # function, verifier: address space of one process
    parts: list[str] = key([], free=KIND)  # weighted_sum, ensemble, by_source: names of scorers
    weights: list[float] = key([], free=KIND)  # weighted_sum: of each part
    std_coef: float = key(1.0, free=KIND)  # ensemble: k in mean - k x standard deviation of the parts
    judge: JudgeConfig = field(default_factory=JudgeConfig)
    options: dict[str, Any] = field(default_factory=dict)  # of a verifier, by_source or a kind of your own


@dataclass
class HttpConfig:
    port: int | None = key(None, free="a port: contracts.checks.scorer_checks")  # null: no HTTP
    host: str = key("127.0.0.1", free="a host's name or address")
    # One bearer token a line; several, so that a token can be replaced without a gap. Required beyond loopback.
    token_file: str | None = key(None, free="a file")
    max_items: int = key(256, least=1)  # of one request
    max_body_mib: float = key(8.0, above=0)
    # Bodies of all requests together, above which new ones are turned away; of one client (a token used from one address)
    # half as much.
    max_pending_mib: float = key(64.0, above=0)
    # that wait for one scorer or are scored by it, of one client; of all of them: max_queued_items
    max_client_items: int = key(1024, least=1)


@dataclass
class RewardServiceConfig:
    # Beside, or in place of, the reward models `proxy` (PPO trains on it) and `gold` (only measures), whose checkpoints
    # composites name `proxy_model` and `gold_model`.
    scorers: dict[str, ScorerConfig] = field(default_factory=dict)
    replicas: int = key(1, least=1)  # of each model and each function
    # to which they grow while they have enough to do, and shrink again, as Ray Serve scales them; null: they do not
    max_replicas: int | None = key(None, least=1)
    batch_tokens: int = key(1024, least=1)  # of one forward pass, longest x count
    dtype: str = key("auto", choices=DTYPES)  # as model.dtype
    max_tokens: int = key(1024, least=1)
    deadline_s: float = key(120.0, above=0)
    # Of each scorer, above which requests are turned away; the PPO loop's own are counted for themselves.
    max_queued_items: int = key(4096, least=1)
    cache_items: int = key(16384, least=0)  # scores that are remembered
    # mean deviation from the checkpoint's golden scores above which it is not served
    golden_tolerance: float = key(0.15, above=0)
    http: HttpConfig = field(default_factory=HttpConfig)

    @property
    def most_replicas(self) -> int:
        return self.replicas if self.max_replicas is None else self.max_replicas


@dataclass
class ClusterConfig:
    # local starts an embedded Ray, auto joins a running cluster
    address: str = key("local", free="local, auto or an address")
    # disaggregated: actors and learner ranks have devices of their own; colocated: actor i shares one with learner rank i
    layout: str = key("disaggregated", choices=("disaggregated", "colocated"))
    # What the cluster has, or will have grown to when it is needed; null: it is asked when it has been joined.
    num_nodes: int | None = key(None, least=1)
    gpus_per_node: float | None = key(None, least=0)
    cpus_per_node: float | None = key(None, above=0)
    num_actors: int = key(1, least=1)
    # A fleet that changes while the run goes on: it begins with min_actors, for which there must be room, and takes in
    # others as there is room for them, up to num_actors, or to what `python -m controller.scale` asks for, which is at most
    # max_actors: docs/elastic.md. null: num_actors.
    min_actors: int | None = key(None, least=1)
    max_actors: int | None = key(None, least=1)
    # in which an actor that is asked to leave finishes what it holds; others get the rest
    leave_grace_s: float = key(20.0, least=0)
    num_learner_ranks: int = key(1, least=1)
    # One phase runs at a time in a synchronous run, so each may use every core of a laptop.
    threads_per_actor: int = key(2, least=1)
    threads_per_learner_rank: int = key(2, least=1)
    threads_per_reward_replica: int = key(2, least=1)
    cpus_per_process: float = key(0.1, least=0)  # what Ray books for each of our processes
    gpus_per_actor: float = key(0.0, least=0)
    gpus_per_learner_rank: float = key(0.0, least=0)
    gpus_per_reward_replica: float = key(0.0, least=0)
    object_store_gib: float = key(1.0, above=0)
    min_memory_gib: float = key(6.0, least=0)  # free memory below which nothing starts
    start_timeout_s: float = key(300.0, above=0)
    step_timeout_s: float = key(900.0, above=0)  # longest wait for one generation, update or weight transfer
    # lost rollout actors that are replaced, and failed starts of one in a row, before the run gives up
    max_actor_restarts: int = key(3, least=0)
    # returns to the last commit after a rank was lost, before the run gives up
    max_learner_restarts: int = key(3, least=0)
    # Without a decoding step, asked for or its own, an actor is taken for lost; longer than the longest step.
    actor_silence_s: float = key(60.0, above=0)
    # An update in which a rank makes no forward, backward or optimizer step for so long hangs; longer than the longest.
    learner_silence_s: float = key(180.0, above=0)
    # A rollout that takes longer, and 3 x as long as 95% of the last ones, is given to an idle actor too: the first counts.
    hedge_after_s: float = key(30.0, above=0)
    # longest wait for an actor to take new weights; the others go on without it
    publish_timeout_s: float = key(120.0, above=0)


@dataclass
class EnvironmentConfig:
    """What the policy talks to. A turn is what it samples until EOS or `max_turn_tokens`; `sampling.max_completion_tokens`
    bounds all turns of a conversation and the observations between them."""

    name: str = key("single_turn", free="single_turn, two_turn, or an import path: docs/environments.md")
    # Where a conversation is paid: cumulative (the sum, at its last token) | per_turn (each turn at its own last token) |
    # separate (as per_turn, and every turn is an episode of its own: what comes later does not count for it).
    reward: str = key("cumulative", choices=("cumulative", "per_turn", "separate"))
    max_turn_tokens: int | None = key(None, least=1)  # null: what is left of sampling.max_completion_tokens
    # no turn ends before: EOS cannot be sampled, nor is it expected by the learner
    min_turn_tokens: int = key(0, least=0)
    options: dict[str, Any] = field(default_factory=dict)  # keyword arguments of the environment


@dataclass
class LoggerConfig:
    # or package.module:NAME: docs/dashboards.md
    trackers: list[str] = key(["wandb"], free="tracker_checks look for them")
    wandb: str = key("auto", choices=("auto", "offline", "online", "disabled"))  # docs/dashboards.md
    project: str = key("tandem", free=WORD)
    wandb_text: bool = False  # also send sampled prompts and completions to all trackers; they may be confidential
    table_every: int = key(10, least=1)  # policy versions between two of the trackers' sample tables
    group: str | None = key(None, free=WORD)  # the trackers' group; null: the run, in a sweep its directory
    samples_per_update: int = key(4, least=0)
    heartbeat_s: float = key(30.0, above=0)


@dataclass
class TandemConfig:
    stage: str = key("pipeline", choices=names_in("contracts.stages", "stage_names", "pipeline"))
    # what follows SFT: docs/preference.md
    method: str = key("ppo", choices=names_in("contracts.stages", "method_titles"))
    name: str = key("demo", free=WORD)
    seed: int = key(1, least=0)
    run_dir: str = key(MISSING, free=DIRECTORY)
    cache_dir: str = key(MISSING, free=DIRECTORY)
    # Finished stages with the same inputs: auto: those that today's code has made | true: whatever code has | false: none
    reuse_stages: Any = key("auto", choices=("auto", True, False))
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
    sft_model: str | None = key(None, free=MODEL)
    proxy_model: str | None = key(None, free=MODEL)
    gold_model: str | None = key(None, free=MODEL)
    ppo_model: str | None = key(None, free=MODEL)
    preference_model: str | None = key(None, free=MODEL)
    filtered_sft_model: str | None = key(None, free=MODEL)


def register_schema() -> None:
    """Let Hydra find the schema by the name that conf/config.yaml gives it."""
    from hydra.core.config_store import ConfigStore

    ConfigStore.instance().store(name="tandem", node=TandemConfig)


def to_config(composed: "DictConfig") -> TandemConfig:
    """What Hydra has composed, as an object. A path that is still open (`???`) is empty: which of them a stage needs is for
    `validate` to say, all at once.

    Raises:
        OmegaConfBaseException: where the composed values are not of the schema's types.
    """
    from omegaconf import OmegaConf

    for missing in OmegaConf.missing_keys(composed):
        OmegaConf.update(composed, missing, "")
    config = OmegaConf.to_object(composed)
    assert isinstance(config, TandemConfig)
    return config
