"""The road of InstructGPT: SFT, reward models, PPO, evaluation. Each stage runs alone or in turn, and leaves a normal
Hugging Face checkpoint.

    model ──> SFT ─────────────┬──> PPO ──> evaluation ──> report
    ratings ──> proxy ─────────┘              ▲
    other ratings ──> gold ───────────────────┘   (the judge that PPO never sees)

`method` puts another way from SFT to the evaluation in PPO's place (`contracts.methods`); `controller.stages.offline`
has the stages that train on data alone.

Whatever can be known beforehand is checked before an engine starts: configuration, models, data, memory.
"""

import json
import time
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import ray

from common.files.code_digest import package_versions
from common.files.durable import replace_text
from common.files.fingerprints import checkpoint_fingerprint
from common.flatten import flat
from common.text.chat_template import load_tokenizer
from common.text.end_tokens import end_ids
from contracts.checks.validation import ConfigError, check_machine
from contracts.config import SFTConfig, TandemConfig
from contracts.methods import GIVEN, chosen_preference, method_stage, method_title, stages_to_run
from contracts.placement import weight_backend
from contracts.records import StageResult
from contracts.scorer_roles import ROLES, judges, scoring_models, starts_value_model
from controller.cluster.runtime import Runtime, embedded_nodes, ray_session
from controller.cluster.signals import Stop
from controller.commits.commit_store import Commit
from controller.commits.committer import About
from controller.commits.resume import RunDirectory, other_versions, require_scorers
from controller.data.datasets import fingerprint
from controller.data.inputs import load_inputs
from controller.data.prompts import PromptStream
from controller.loop.recovery import once_more
from controller.record.evaluation import evaluation_metrics
from controller.record.redaction import redacted
from controller.record.run_log import RunLog
from controller.record.terminal import Progress
from controller.stages import offline
from controller.stages.store import MEMORY, UNSEEN, StageStore, environment_source, unseen
from controller.start_checks.amounts import check_amounts, check_model
from controller.start_checks.engine_checks import begin_proofs, first_publish
from controller.start_checks.model_checks import check_weights_and_code


class Pipeline:
    def __init__(self, config: TandemConfig, log: RunLog, progress: Progress, directory: RunDirectory, stop: Stop):
        self.config, self.log, self.progress, self.directory, self.stop = config, log, progress, directory, stop
        self.run_dir = Path(config.run_dir)
        self.store = StageStore(Path(config.cache_dir), log, config.reuse_stages, progress.line)
        self.results: dict[str, StageResult] = {}
        self.seconds: dict[str, float] = {}
        check_model(config)
        with progress.phase("proving the models"):
            check_weights_and_code(config)
        self.tokenizer = load_tokenizer(config.model.path, config.model)
        if self.tokenizer.eos_token_id is None:
            raise ConfigError(f"model.path={config.model.path}: its tokenizer names no EOS token")
        with progress.phase("reading the data"):
            self.data = load_inputs(config, self.tokenizer, progress.line)
        ends = self._end_ids([config.model.path], "prompts", "eval_prompts")
        if len(ends) > 1:
            names = [f"{self.tokenizer.convert_ids_to_tokens(end)} ({end})" for end in ends]
            progress.line(f"completions end with any of {', '.join(names)}")
        check_amounts(config, self.data)
        self._rehearse()
        nodes = embedded_nodes() if config.cluster.address == "local" else None
        free_gib = psutil.virtual_memory().available / 2**30
        for warning in check_machine(config, free_gib, psutil.cpu_count() or 1, nodes):
            progress.line(warning)
        self._engine_proofs = begin_proofs(config)

    def _end_ids(self, paths: Iterable[str], *sources: str) -> tuple[int, ...]:
        """What ends a completion of an engine that serves the checkpoints at `paths`, one after another, and is asked the
        prompts of `sources`."""
        base, in_chat = self.config.model, not self.data.in_chat.isdisjoint(sources)
        models = [base if path == base.path else replace(base, path=path, revision=None) for path in paths]
        return tuple(dict.fromkeys(end for model in models for end in end_ids(self.tokenizer, model, in_chat)))

    def _rehearse(self) -> None:
        sampled = {"ppo.sampling": self.data.prompts, "evaluate.sampling": self.data.eval_prompts}
        chat, in_chat = self.config.data.chat, sorted(self.data.in_chat & {"prompts", "eval_prompts"})
        if in_chat and not chat and self.config.environment.name == "two_turn":
            raise ConfigError(
                f"data.chat must be True with environment.name two_turn and messages in data.{in_chat[0]}, which the chat "
                f"template writes: what the policy is told then would be plain text; found {chat}; write data.chat=true"
            )
        if any(sampled.values()) and self.config.environment.name != "single_turn":
            from controller.start_checks.rehearsal import rehearse

            with self.progress.phase(f"rehearsing {self.config.environment.name}"):
                rehearse(self.config, self.tokenizer, {key: prompts for key, prompts in sampled.items() if prompts})

    # ---- what a user asks for

    def run(self) -> dict[str, Any]:
        """Run `config.stage`. Returns the numbers of the summary."""
        with Runtime(self.config) as self.runtime:
            for stage in stages_to_run(self.config):
                self._run(stage)
        return {name: result.metrics for name, result in self.results.items()}

    def _run(self, stage: str) -> None:
        config = self.config
        if stage == "evaluate":
            once_more(self._evaluate, "evaluate", self.log, self.progress.line)
        elif stage == "reward_model":
            for name in ("proxy", "gold"):
                given = config.stage == "pipeline" and getattr(config, f"{name}_model")
                if given or name in self.data.preferences:
                    work = partial(offline.train_reward_model, self, name)
                    self._stage(f"reward_model/{name}", work)
        else:
            works = {
                "sft": partial(offline.train_sft, self),
                "filtered_sft": partial(offline.train_filtered_sft, self),
                "preference": partial(offline.train_preference, self),
                "ppo": self._ppo,
            }
            self._stage(stage, works[stage])

    def _inputs_of(self, name: str) -> dict[str, Any]:
        """What decides the result of a stage, without secrets: its hash names the directory of the result."""
        config = self.config
        common: dict[str, Any] = {
            "format": 2,
            "seed": config.seed,
            "model": self._fingerprint(config.model.path, config.model.revision),
            "remote_code": config.model.trust_remote_code,  # transformers may have a class of its own for it
            "dtype": config.model.dtype,
            "learner": config.learner,
            "ranks": config.cluster.num_learner_ranks,
        }
        if name == "sft":
            return common | {"sft": _plain_sft(config.sft), "data": fingerprint(self.data.sft)}
        if name in ("filtered_sft", "preference"):
            after = {
                "seed": offline.method_config(config).seed,
                "policy": self._fingerprint(self.checkpoint("sft")),
            }
            if name == "filtered_sft":
                return common | after | {"sft": _plain_sft(config.sft), "data": fingerprint(self.data.best_sft)}
            data, test = fingerprint(self.data.completions), fingerprint(self.data.test_completions)
            return common | after | {"preference": chosen_preference(config), "data": data, "test": test}
        if name.startswith("reward_model/"):
            data = fingerprint(self.data.preferences[name.split("/")[1]])
            test = fingerprint(self.data.test)
            return common | {"reward_model": config.reward_model, "data": data, "test": test}
        return common | {
            "ppo": config.ppo,
            "environment": redacted(asdict(config.environment)),
            "environment_source": environment_source(config),
            "engine": config.engine,
            "actors": config.cluster.num_actors,
            "prompts": fingerprint(self.data.prompts),
            "ptx": fingerprint(self.data.sft) if config.ppo.ptx_coef else None,
            "policy": self._fingerprint(self.checkpoint(config.ppo.init_from)),
            **{role: self._judge_fingerprint(role) for role in ROLES},
            "scorers": redacted({n: asdict(s) for n, s in config.reward_service.scorers.items()}),
            **unseen(config),
        }

    def _fingerprint(self, path: str, revision: str | None = None) -> str:
        """Raises ConfigError where there is no such checkpoint."""
        try:
            return checkpoint_fingerprint(path, revision, Path(self.config.cache_dir) / MEMORY)
        except (OSError, ValueError) as error:
            raise ConfigError(f"{path} is no checkpoint that can be read: {error}") from error

    def checkpoint(self, name: str) -> str:
        """The checkpoint of an earlier stage: made in this run, given in the configuration, or in the cache; or `base`."""
        if name in self.results:
            return self.results[name].path
        if name == "base":
            return self.config.model.path
        key = GIVEN[name]
        if given := getattr(self.config, key):
            return given
        found = self.store.find(name, self._inputs_of(name))
        if found is None:
            stage = name.split("/")[0]
            raise ConfigError(
                f"stage={self.config.stage} needs the result of {name}, which has not run with this configuration and code: "
                f"run stage={stage} or stage=pipeline first, or set {key}=PATH"
            )
        self.results[name] = found
        return found.path

    def _judges(self, roles: tuple[str, ...]) -> dict[str, str | None]:
        """The reward model of each role; None where it is scored without one."""
        scoring = scoring_models(self.config)
        return {role: self.checkpoint(f"reward_model/{role}") if role in scoring else None for role in roles}

    def _judge_fingerprint(self, role: str) -> str | None:
        """Of the reward model of a role, where PPO has anything of it."""
        is_value = role == "proxy" and starts_value_model(self.config)
        if not is_value and role not in scoring_models(self.config):
            return None
        return self._fingerprint(self.checkpoint(f"reward_model/{role}"))

    # ---- stages

    def _stage(self, name: str, work: Any) -> None:
        given = getattr(self.config, GIVEN[name])
        if self.config.stage == "pipeline" and given:
            self.progress.line(f"✓ {name}: {given} (given)")
            return
        inputs = self._inputs_of(name)
        start = time.time()
        with self.store.alone(name, inputs, lambda: self.progress.phase(f"waiting for the run that makes {name}")):
            found = self.store.find(name, inputs)
            if found:
                self.results[name] = found
                self.progress.line(f"✓ {name}: nothing has changed, reusing {found.path}")
            else:
                run = partial(self.store.run, name, inputs, work)
                self.results[name] = run() if name == "ppo" else once_more(run, name, self.log, self.progress.line)
                self.progress.line(f"✓ {name}: {self.results[name].path}")
                self.log.artifact(f"{self.config.name}-{name.replace('/', '-')}", "model", self.results[name].path)
        self.seconds[name] = time.time() - start
        self._write_stages()

    def _write_stages(self) -> None:
        rows = [asdict(result) | {"seconds": self.seconds.get(name, 0.0)} for name, result in self.results.items()]
        replace_text(self.run_dir / "stages.json", json.dumps(rows, indent=1) + "\n")

    def _ppo(self, path: Path) -> dict[str, Any]:
        from controller.loop.controller import PPOController
        from controller.loop.fleet import Fleet

        config = offline.method_config(self.config)
        title = method_title("ppo", config.ppo.estimator)
        inputs = self._inputs_of("ppo")
        # Of a commit `require_scorers` compares what scored, and a run with a new key for the same service is the same run.
        identity = flat({name: value for name, value in inputs.items() if name not in UNSEEN})
        identity = {name: value for name, value in identity.items() if value != {}}
        commit = self._find_commit(identity)
        policy = self.checkpoint(config.ppo.init_from)
        scorers = self._judges(judges(config) if config.ppo.gold_rollouts else ROLES[:1])
        value = self.checkpoint("reward_model/proxy") if starts_value_model(config) else policy
        backend, ends = weight_backend(config), self._end_ids([policy], "prompts")
        ptx = self.data.sft if config.ppo.ptx_coef else []
        stream = PromptStream(self.data.prompts, config.ppo.samples_per_prompt, config.seed)
        self._start_ray("ppo")
        with ExitStack() as engines:
            learner = engines.enter_context(self.runtime.learner("ppo", config, policy, value, ends, ptx))
            # Side by side: each spends most of its start importing and reading.
            with self.phase("ppo", "starting reward service, vLLM and learner"):
                client = self.runtime.service(scorers)
                actors = engines.enter_context(self.runtime.actors(policy, backend, ends, client))
                self.runtime.wait_for_service()
                learner.wait_ready()
                self._prove_engines()
                first_publish(
                    learner,
                    backend,
                    actors,
                    model=replace(config.model, path=policy),
                    prompts=self.data.prompts,
                    max_model_len=config.engine.max_model_len,
                    timeout_s=config.cluster.start_timeout_s,
                )
            restarts, say = config.cluster.max_actor_restarts, self.progress.line
            fleet = Fleet(actors, learner, backend, self.runtime.replace_actor, restarts, say)
            about = About(identity, redacted(asdict(config)), client.versions)
            logs = (self.log, self.progress)
            controller = PPOController(config, stream, fleet, learner, *logs, "gold" in scorers, about, self.stop)
            if commit:
                require_scorers(commit, client.versions)
                with self.phase("ppo", f"going on from {commit.path}, after update {commit.step}"):
                    controller.restore(commit)
            with self.phase(
                "ppo", f"{title}: {config.ppo.updates} updates of {config.ppo.rollouts_per_update} rollouts"
            ):
                controller.run()
            learner.call("save", str(path))
            ended = {"versions": controller.version, "learner_peak_gib": learner.peak_memory_gib()}
            return ended | {"scorers": client.versions}

    def _find_commit(self, identity: dict[str, Any]) -> Commit | None:
        """Where stage ppo goes on; what an earlier attempt has logged and not committed goes."""
        commit = None
        if self.config.checkpoint.every:
            with self.progress.phase("looking for commits"):
                commit = self.directory.find(self.config.checkpoint.resume, identity)
        if commit is None:
            self.log.forget("ppo")
        else:
            self.log.cut("ppo", commit.driver_state()[0]["logs"])
            other_versions(commit, package_versions(), self.progress.line)
        return commit

    def _evaluate(self) -> None:
        from controller.stages.evaluate import REFERENCE, judge_models, sample_rows, summarize
        from learner.weight_publisher import BACKEND

        config = self.config
        trained = method_stage(config)
        models = {"base": config.model.path} | ({config.method: self.checkpoint(trained)} if trained else {})
        models[REFERENCE] = self.checkpoint("sft")
        scorers = self._judges(judges(config))
        start = time.time()
        ends = self._end_ids(models.values(), "eval_prompts")
        self._start_ray("evaluate")
        with ExitStack() as engines:
            with self.phase("evaluate", "starting the reward service and vLLM"):
                client = self.runtime.service(scorers)
                actors = engines.enter_context(self.runtime.actors(models["base"], BACKEND, ends, client))
                self.runtime.wait_for_service()
                self._prove_engines()
            with self.log.phase("evaluate", "evaluation"):
                judged = judge_models(config, models, self.data.eval_prompts, actors, list(scorers), self.progress)
        result = summarize(judged, list(scorers), config)
        known = evaluation_metrics(result, config.evaluate.max_kl)
        self.log.log("evaluate", 0, {f"evaluate/{name}": value for name, value in known.items()})
        self.log.samples(sample_rows(judged, list(scorers)))
        replace_text(self.run_dir / "evaluation.json", json.dumps(result, indent=1) + "\n")
        self.results["evaluate"] = StageResult("evaluate", str(self.run_dir / "evaluation.json"), False, result)
        self.seconds["evaluate"] = time.time() - start
        self._write_stages()

    # ---- engines and phases

    def _prove_engines(self) -> None:
        """Wait for the proofs, which were begun with the run: the processes of the first stage start meanwhile."""
        proofs, self._engine_proofs = self._engine_proofs(), list
        for proof in proofs:
            worst = {name: max(d.loaded, d.published) for name, d in proof.formats.items()}
            numbers = ", ".join(f"{error:.1g} nats in {name}" for name, error in worst.items())
            self.progress.line(f"✓ vLLM computes what transformers does, with other weights too: to {numbers}")

    def _start_ray(self, stage: str) -> None:
        if not ray.is_initialized():
            with self.stop.kept(), self.phase(stage, "starting Ray"):
                self.runtime.start()
            self.directory.started_ray(ray_session() if self.config.cluster.address == "local" else None)

    @contextmanager
    def learner(self, stage: str, task: str, *arguments: Any) -> Iterator[Any]:
        """The ranks of a stage, ready."""
        self._start_ray(stage)
        with self.runtime.learner(task, *arguments) as group:
            with self.phase(stage, f"starting the learner for {stage}"):
                group.wait_ready()
                self._prove_engines()
            yield group

    @contextmanager
    def phase(self, stage: str, text: str) -> Iterator[None]:
        """Announce a phase on the terminal and record it for the report."""
        with self.progress.phase(text), self.log.phase(stage, text):
            yield


def _plain_sft(sft: SFTConfig) -> dict[str, Any]:
    """What decides a supervised stage; `top_fraction` only decides which texts it gets."""
    return {key: value for key, value in asdict(sft).items() if key != "top_fraction"}
