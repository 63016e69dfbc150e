"""The road of InstructGPT: SFT, reward models, PPO, evaluation. Each stage runs alone or in turn, and leaves a normal
Hugging Face checkpoint.

    model ──> SFT ─────────────┬──> PPO ──> evaluation ──> report
    ratings ──> proxy ─────────┘              ▲
    other ratings ──> gold ───────────────────┘   (the judge that PPO never sees)

Whatever can be known beforehand is checked before an engine starts: configuration, models, data, memory.
"""

import json
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import ray
from transformers import AutoTokenizer

from contracts.config import SourceConfig, TandemConfig
from contracts.records import Example, PreferencePair, Prompt, RatedText, StageResult
from contracts.validation import ConfigError, check_machine
from controller import statistics
from controller.checkpoint import About, package_versions
from controller.checks import check_amounts, check_model
from controller.commits import Commit
from controller.data import LoadReport, fingerprint, load_preferences, load_prompts, load_sft
from controller.metrics import RunLog
from controller.objective import evaluation_metrics
from controller.progress import Progress
from controller.prompts import PromptStream
from controller.recovery import once_more
from controller.redaction import redacted
from controller.resume import RunDirectory, flat, other_versions, require_scorers
from controller.runtime import Runtime, embedded_nodes, ray_session, weight_backend
from controller.stages import StageStore, checkpoint_fingerprint
from controller.stop import Stop

# Stages that a pipeline skips where the configuration names a checkpoint.
GIVEN = {"sft": "sft_model", "reward_model/proxy": "proxy_model", "reward_model/gold": "gold_model"}
EVAL_CHUNK = 256  # texts a call, so that progress and deadlines stay fine-grained


@dataclass
class Inputs:
    """All data of a run, loaded and checked; what a stage does not need is empty."""

    sft: list[Example]
    prompts: list[Prompt]
    preferences: dict[str, Sequence[RatedText | PreferencePair]]  # by reward model: proxy, gold
    test: Sequence[RatedText | PreferencePair]
    eval_prompts: list[Prompt]


class Pipeline:
    def __init__(self, config: TandemConfig, log: RunLog, progress: Progress, directory: RunDirectory, stop: Stop):
        self.config, self.log, self.progress, self.directory, self.stop = config, log, progress, directory, stop
        self.run_dir = Path(config.run_dir)
        self.store = StageStore(Path(config.cache_dir), self.run_dir, config.reuse_stages)
        self.results: dict[str, StageResult] = {}
        self.seconds: dict[str, float] = {}
        check_model(config)
        options = {"revision": config.model.revision, "trust_remote_code": config.model.trust_remote_code}
        self.tokenizer = AutoTokenizer.from_pretrained(config.model.path, **options)
        if self.tokenizer.eos_token_id is None:
            raise ConfigError(f"model.path={config.model.path}: its tokenizer names no EOS token")
        with progress.phase("reading the data"):
            self.data = self._load()
        check_amounts(config, len(self.data.sft))
        self._rehearse()
        nodes = embedded_nodes() if config.cluster.address == "local" else None
        free_gib = psutil.virtual_memory().available / 2**30
        for warning in check_machine(config, free_gib, psutil.cpu_count() or 1, nodes):
            progress.line(warning)

    def _rehearse(self) -> None:
        sampled = {"ppo.sampling": self.data.prompts, "evaluate.sampling": self.data.eval_prompts}
        if any(sampled.values()) and self.config.environment.name != "single_turn":
            from controller.rehearsal import rehearse

            with self.progress.phase(f"rehearsing {self.config.environment.name}"):
                rehearse(self.config, self.tokenizer, {key: prompts for key, prompts in sampled.items() if prompts})

    # ---- what a user asks for

    def run(self) -> dict[str, Any]:
        """Run `config.stage`. Returns the numbers of the summary."""
        stage = self.config.stage
        with Runtime(self.config) as self.runtime:
            if stage in ("pipeline", "sft"):
                self._stage("sft", self._sft)
            if stage in ("pipeline", "reward_model"):
                for name in self.data.preferences:
                    self._stage(f"reward_model/{name}", lambda path, name=name: self._reward_model(name, path))
            if stage in ("pipeline", "ppo"):
                self._stage("ppo", self._ppo)
            if stage in ("pipeline", "evaluate"):
                once_more(self._evaluate, "evaluate", self.log, self.progress.line)
        return {name: result.metrics for name, result in self.results.items()}

    # ---- inputs

    def _load(self) -> Inputs:
        config, data, stage = self.config, self.config.data, self.config.stage
        wants = {"pipeline": {"sft", "reward_model", "ppo", "evaluate"}}.get(stage, {stage})
        tokenizer = self.tokenizer

        def kept(name: str, report: LoadReport, items: Any) -> Any:
            if report.left_out:
                left = ", ".join(f"{count} {reason}" for reason, count in report.left_out.most_common())
                self.progress.line(f"  {name}: {report.used} of {report.rows} rows used; left out: {left}")
            return items

        def prompts(name: str, source: SourceConfig, completion_tokens: int) -> list[Prompt]:
            report = LoadReport()
            limit = config.engine.max_model_len
            return kept(name, report, load_prompts(source, data, tokenizer, completion_tokens, limit, report, name))

        def preferences(name: str, source: SourceConfig) -> Any:
            report = LoadReport()
            limit = config.reward_model.max_tokens
            return kept(name, report, load_preferences(source, data, tokenizer, limit, report, name))

        inputs = Inputs([], [], {}, [], [])
        if wants & {"sft", "ppo", "evaluate"}:
            report = LoadReport()
            inputs.sft = kept("data.sft", report, load_sft(data.sft, data, tokenizer, config.sft.max_tokens, report))
        if wants & {"reward_model", "ppo", "evaluate"}:
            inputs.preferences["proxy"] = preferences("data.preferences", data.preferences)
            if data.gold is not None:
                inputs.preferences["gold"] = preferences("data.gold", data.gold)
            inputs.test = preferences("data.test", data.test)
        if wants & {"ppo", "evaluate"}:
            inputs.prompts = prompts("data.prompts", data.prompts, config.ppo.sampling.max_completion_tokens)
        if wants & {"evaluate"}:
            sampling = config.evaluate.sampling
            every = prompts("data.eval_prompts", data.eval_prompts, sampling.max_completion_tokens)
            order = np.random.default_rng(config.evaluate.seed).permutation(len(every))[: config.evaluate.prompts]
            inputs.eval_prompts = [every[i] for i in sorted(order)]
        return inputs

    def _inputs_of(self, name: str) -> dict[str, Any]:
        """What decides the result of a stage, without secrets: its hash names the directory of the result."""
        config = self.config
        common: dict[str, Any] = {
            "format": 1,
            "seed": config.seed,
            "model": checkpoint_fingerprint(config.model.path, config.model.revision),
            "dtype": config.model.dtype,
            "learner": config.learner,
            "ranks": config.cluster.num_learner_ranks,
        }
        if name == "sft":
            return common | {"sft": config.sft, "data": fingerprint(self.data.sft)}
        if name.startswith("reward_model/"):
            data = fingerprint(self.data.preferences[name.split("/")[1]])
            test = fingerprint(self.data.test)
            return common | {"reward_model": config.reward_model, "data": data, "test": test}
        return common | {
            "ppo": config.ppo,
            "environment": redacted(asdict(config.environment)),
            "engine": config.engine,
            "actors": config.cluster.num_actors,
            "prompts": fingerprint(self.data.prompts),
            "ptx": fingerprint(self.data.sft) if config.ppo.ptx_coef else None,
            "policy": checkpoint_fingerprint(self._checkpoint(self.config.ppo.init_from)),
            "proxy": checkpoint_fingerprint(self._checkpoint("reward_model/proxy")),
            "gold": checkpoint_fingerprint(self._checkpoint("reward_model/gold")) if self._has_gold() else None,
            "scorers": redacted({n: asdict(s) for n, s in config.reward_service.scorers.items()}),
        }

    def _checkpoint(self, name: str) -> str:
        """The checkpoint of an earlier stage: made in this run, given in the configuration, or in the cache; or `base`."""
        if name in self.results:
            return self.results[name].path
        if name == "base":
            return self.config.model.path
        key = GIVEN.get(name, f"{name}_model")
        if given := getattr(self.config, key):
            return given
        found = self.store.find(name, self._inputs_of(name))
        if found is None:
            stage = name.split("/")[0]
            raise ConfigError(
                f"stage={self.config.stage} needs the result of {name}, which has not run with this configuration: "
                f"run stage={stage} or stage=pipeline first, or set {key}=PATH"
            )
        self.results[name] = found
        return found.path

    def _has_gold(self) -> bool:
        return self.config.gold_model is not None or "gold" in self.data.preferences

    # ---- stages

    def _stage(self, name: str, work: Any) -> None:
        given = GIVEN.get(name)
        if self.config.stage == "pipeline" and given and getattr(self.config, given):
            self.progress.line(f"✓ {name}: {getattr(self.config, given)} (given)")
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
        (self.run_dir / "stages.json").write_text(json.dumps(rows, indent=1) + "\n")

    def _sft(self, path: Path) -> dict[str, Any]:
        order = np.random.default_rng(self.config.seed).permutation(len(self.data.sft))
        held = max(self.config.cluster.num_learner_ranks, len(order) // 20)
        examples = [self.data.sft[i] for i in order]
        with self._learner("sft", "sft", self.config, examples[held:], examples[:held]) as group:
            with self._phase("sft", f"SFT on {len(examples) - held} texts"):
                steps = group.call("num_steps")[0]
                before = group.call("evaluate")[0]
                self.log.log("sft", 0, before)
                for step in range(steps):
                    metrics = group.call("step", step)[0]
                    last = step == steps - 1
                    if last or step % 10 == 9:
                        metrics |= group.call("evaluate")[0] if last else {}
                        loss = " ".join(f"{k.split('/')[1]} {v:.3f}" for k, v in metrics.items() if "loss" in k)
                        speed = metrics["perf/train_tokens_per_s"]
                        self.progress.line(f"  SFT step {step + 1}/{steps} | {loss} | {speed:.0f} tok/s")
                    self.log.log("sft", step + 1, metrics)
            group.call("save", str(path))
        return {"eval_loss_before": before.get("sft/eval_loss"), "eval_loss": metrics.get("sft/eval_loss")}

    def _reward_model(self, name: str, path: Path) -> dict[str, Any]:
        stage, examples = f"reward_model/{name}", self.data.preferences[name]
        with self._learner(stage, "reward_model", self.config, examples) as group:
            with self._phase(stage, f"{name} reward model on {len(examples)} preferences"):
                steps = group.call("num_steps")[0]
                recent: list[dict[str, float]] = []
                for step in range(steps):
                    metrics = group.call("step", step)[0]
                    self.log.log(stage, step + 1, metrics)
                    recent.append(metrics)
                    if step == steps - 1 or step % 20 == 19:
                        means = {k: float(np.mean([m[k] for m in recent])) for k in metrics}
                        recent = []
                        self.progress.line(
                            f"  {name} reward model step {step + 1}/{steps} | loss {means['reward_model/loss']:.3f} | "
                            f"pairs right {means['reward_model/accuracy']:.1%} | "
                            f"{means['perf/train_tokens_per_s']:.0f} tok/s"
                        )
            with self._phase(stage, f"held-out accuracy of the {name} reward model"):
                accuracy = self._pair_accuracy(group)
            group.call("save", str(path))
        self.progress.line(
            f"  {name} reward model: {accuracy['accuracy']:.1%} of {accuracy['pairs']} held-out pairs right"
            + (f" (VADER's rules: {accuracy['vader_accuracy']:.1%})" if "vader_accuracy" in accuracy else "")
        )
        return accuracy

    def _pair_accuracy(self, group: Any) -> dict[str, float]:
        """Held-out pairs on which the higher score goes to the text that people rated higher, with 95% intervals."""
        config, test = self.config, self.data.test
        options = {"samples": config.evaluate.bootstrap_samples, "seed": config.seed}

        def score(texts: list[list[int]]) -> list[float]:
            chunks = [texts[i : i + EVAL_CHUNK] for i in range(0, len(texts), EVAL_CHUNK)]
            return [s for chunk in chunks for s in group.call("score", chunk)[0]]

        rated = [item for item in test if isinstance(item, RatedText)]
        if not rated:
            pairs = [item for item in test if isinstance(item, PreferencePair)]
            chosen, rejected = score([p.chosen_ids for p in pairs]), score([p.rejected_ids for p in pairs])
            interval = statistics.win_rate(chosen, rejected, **options)
            return interval.row("accuracy") | {"pairs": len(pairs)}
        ratings = [float(np.mean(item.ratings)) for item in rated]
        chosen_pairs = statistics.random_pairs(ratings, config.reward_model.eval_pairs, config.seed)
        model = statistics.pair_accuracy(score([item.token_ids for item in rated]), ratings, chosen_pairs, **options)
        from controller.evaluate import vader_scores

        vader = statistics.pair_accuracy(vader_scores([i.text for i in rated]), ratings, chosen_pairs, **options)
        rows = model.row("accuracy") | vader.row("vader_accuracy")
        return rows | {"pairs": len(chosen_pairs), "texts": len(rated)}

    def _ppo(self, path: Path) -> dict[str, Any]:
        from controller.controller import PPOController
        from controller.fleet import Fleet

        config = self.config if self.config.ppo.seed is None else replace(self.config, seed=self.config.ppo.seed)
        identity = flat(self._inputs_of("ppo"))
        commit = self._find_commit(identity)
        policy, proxy = self._checkpoint(self.config.ppo.init_from), self._checkpoint("reward_model/proxy")
        scorers = {"proxy": proxy}
        if self._has_gold() and config.ppo.gold_rollouts:
            scorers["gold"] = self._checkpoint("reward_model/gold")
        value = proxy if config.ppo.init_value_from == "reward_model" else policy
        backend, eos = weight_backend(config), self.tokenizer.eos_token_id
        ptx = self.data.sft if config.ppo.ptx_coef else []
        stream = PromptStream(self.data.prompts, config.ppo.samples_per_prompt, config.seed)
        self._start_ray("ppo")
        with ExitStack() as engines:
            learner = engines.enter_context(self.runtime.learner("ppo", config, policy, value, eos, ptx))
            # Side by side: each spends most of its start importing and reading.
            with self._phase("ppo", "starting reward service, vLLM and learner"):
                client = self.runtime.service(scorers)
                actors = engines.enter_context(self.runtime.actors(policy, backend, eos, client))
                self.runtime.wait_for_service()
                learner.wait_ready()
                learner.call("connect", backend, actors)[0].require_all()
            restarts, say = config.cluster.max_actor_restarts, self.progress.line
            fleet = Fleet(actors, learner, backend, self.runtime.replace_actor, restarts, say)
            about = About(identity, redacted(asdict(config)), client.versions)
            logs = (self.log, self.progress)
            controller = PPOController(config, stream, fleet, learner, *logs, "gold" in scorers, about, self.stop)
            if commit:
                require_scorers(commit, client.versions)
                with self._phase("ppo", f"going on from {commit.path}, after update {commit.step}"):
                    controller.restore(commit)
            with self._phase("ppo", f"PPO: {config.ppo.updates} updates of {config.ppo.rollouts_per_update} rollouts"):
                controller.run()
            learner.call("save", str(path))
            ended = {"versions": controller.version, "learner_peak_gib": learner.peak_memory_gib()}
            return ended | {"scorers": client.versions}

    def _find_commit(self, identity: dict[str, Any]) -> Commit | None:
        """Where stage ppo goes on; what an earlier attempt has logged and not committed goes."""
        if not self.config.checkpoint.every:
            return None
        with self.progress.phase("looking for commits"):
            commit = self.directory.find(self.config.checkpoint.resume, identity)
        self.store.starts = self.directory.start_log(self.log.mark())
        self.log.cut(self.store.starts if commit is None else commit.driver_state()[0]["logs"])
        if commit:
            other_versions(commit, package_versions(), self.progress.line)
        return commit

    def _evaluate(self) -> None:
        from controller.evaluate import REFERENCE, judge_models, sample_rows, summarize
        from learner.weight_publisher import BACKEND

        config = self.config
        models = {"base": config.model.path, "ppo": self._checkpoint("ppo"), REFERENCE: self._checkpoint("sft")}
        scorers = {"proxy": self._checkpoint("reward_model/proxy")}
        if self._has_gold():
            scorers["gold"] = self._checkpoint("reward_model/gold")
        start = time.time()
        eos = self.tokenizer.eos_token_id
        self._start_ray("evaluate")
        with ExitStack() as engines:
            with self._phase("evaluate", "starting the reward service and vLLM"):
                client = self.runtime.service(scorers)
                actors = engines.enter_context(self.runtime.actors(models["base"], BACKEND, eos, client))
                self.runtime.wait_for_service()
            with self.log.phase("evaluate", "evaluation"):
                judged = judge_models(config, models, self.data.eval_prompts, actors, list(scorers), self.progress)
        result = summarize(judged, list(scorers), config)
        known = evaluation_metrics(result, config.evaluate.max_kl)
        self.log.log("evaluate", 0, {f"evaluate/{name}": value for name, value in known.items()})
        self.log.samples(sample_rows(judged, list(scorers)))
        (self.run_dir / "evaluation.json").write_text(json.dumps(result, indent=1) + "\n")
        self.results["evaluate"] = StageResult("evaluate", str(self.run_dir / "evaluation.json"), False, result)
        self.seconds["evaluate"] = time.time() - start
        self._write_stages()

    # ---- engines and phases

    def _start_ray(self, stage: str) -> None:
        if not ray.is_initialized():
            with self.stop.kept(), self._phase(stage, "starting Ray"):
                self.runtime.start()
            self.directory.started_ray(ray_session() if self.config.cluster.address == "local" else None)

    @contextmanager
    def _learner(self, stage: str, task: str, *arguments: Any) -> Iterator[Any]:
        """The ranks of a stage, ready."""
        self._start_ray(stage)
        with self.runtime.learner(task, *arguments) as group:
            with self._phase(stage, f"starting the learner for {stage}"):
                group.wait_ready()
            yield group

    @contextmanager
    def _phase(self, stage: str, text: str) -> Iterator[None]:
        """Announce a phase on the terminal and record it for the report."""
        with self.progress.phase(text), self.log.phase(stage, text):
            yield
