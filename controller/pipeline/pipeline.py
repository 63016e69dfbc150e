"""The road of InstructGPT: SFT, reward models, PPO, evaluation. Each stage runs alone or in turn, and leaves a normal
Hugging Face checkpoint.

    model ──> SFT ─────────────┬──> PPO ──> evaluation ──> report
    ratings ──> proxy ─────────┘              ▲
    other ratings ──> gold ───────────────────┘   (the judge that PPO never sees)

`method` puts another way from SFT to the evaluation in PPO's place. A stage is a file of `controller/stages/` and what it
says of itself (`contracts.stages`); here are the checks before the first, their order, the cache and the results.

Whatever can be known beforehand is checked before an engine starts: configuration, models, data, memory.
"""

import time
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import psutil

from common.files.durable import replace_text
from common.processes.cores import usable_cores
from common.processes.memory_room import memory_room
from common.strict_json import json_text
from contracts.checks.validation import ConfigError, check_machine
from contracts.config import TandemConfig
from contracts.methods import results_needed, running_stages
from contracts.records import StageResult
from contracts.stages import Stage, all_stages, find_stage
from controller.cluster.runtime import Runtime, embedded_nodes
from controller.cluster.signals import Stop
from controller.commits.resume import RunDirectory
from controller.data.inputs import Inputs, load_inputs
from controller.loop.recovery import once_more
from controller.pipeline.context import StageContext
from controller.pipeline.stage_cache import StageStore, code_of, edited_code, file_name
from controller.plan.room import check_room
from controller.record.run_log import RunLog
from controller.record.terminal import Progress
from controller.start_checks.amounts import check_amounts, check_model
from controller.start_checks.engine_checks import begin_proofs
from controller.start_checks.model_checks import check_weights_and_code, checked_tokenizer
from controller.start_checks.row_checks import check_rows


class NotMade(ConfigError):
    """There is no result of an earlier stage."""


class Pipeline:
    _is_running = False

    def __init__(self, config: TandemConfig, log: RunLog, progress: Progress, directory: RunDirectory, stop: Stop):
        self.config = config
        self.log = log
        self.progress = progress
        self.run_dir = Path(config.run_dir)
        self.store = StageStore(
            Path(config.cache_dir),
            log,
            config.reuse_stages,
            progress.line,
            code=partial(code_of, config),
            edited=partial(edited_code, config),
        )
        self.results: dict[str, StageResult] = {}
        self.seconds: dict[str, float] = {}
        self._begun: set[str] = set()
        check_model(config)
        with progress.phase("proving the models"):
            check_weights_and_code(config)
        tokenizer = checked_tokenizer(config)
        with progress.phase("reading the data"):
            data = load_inputs(config, tokenizer, progress.line)
        self.context = StageContext(
            config=config,
            data=data,
            tokenizer=tokenizer,
            log=log,
            progress=progress,
            directory=directory,
            stop=stop,
            runtime=Runtime(config),
            checkpoint=self.checkpoint,
            will_run=self._will_run,
            begin=self._begin,
        )
        ends = self.context.end_ids([config.model.path], "prompts", "eval_prompts")
        if len(ends) > 1:
            names = [f"{tokenizer.convert_ids_to_tokens(end)} ({end})" for end in ends]
            progress.line(f"completions end with any of {', '.join(names)}")
        check_amounts(config, data)
        check_rows(config, data)
        rehearse_environment(config, tokenizer, data, progress)
        self._check_stages()
        nodes = embedded_nodes() if config.cluster.address == "local" else None
        free_gib = psutil.virtual_memory().available / 2**30
        for warning in check_machine(config, free_gib, usable_cores(), nodes):
            progress.line(warning)
        if nodes:
            for warning in check_room(config, data.__getitem__, memory_room(), self._will_run):
                progress.line(warning)
        self.context.proofs.append(begin_proofs(config))

    def _will_run(self, stage: Stage) -> bool:
        """Whether a result of a stage is neither given nor in the cache."""
        if not stage.results:
            return True
        needed, keys = results_needed(self.config), stage.checkpoint_keys
        try:
            found = [
                self.store.look(name, stage.inputs(self.context.made_for(name))) for name in keys if name in needed
            ]
        except NotMade:
            return True
        return None in found

    def _check_stages(self) -> None:
        """Refuse what a stage would refuse after hours of earlier ones. Raises ConfigError."""
        for name in results_needed(self.config):
            self.store.code(name)  # as it is now; what is started later may import other
        for stage in running_stages(self.config):
            if stage.check and self._will_run(stage):
                stage.check(self.context.made_for(stage.name))

    def run(self) -> dict[str, Any]:
        """Run `config.stage`. Returns the numbers of the summary."""
        self.results.clear()  # what the checks before have looked up: its lines are not in the log
        self._is_running = True
        with self.context.runtime:
            for stage in running_stages(self.config):
                self._run(stage)
        return {name: result.metrics for name, result in self.results.items()}

    def _begin(self, result: str) -> None:
        """What an earlier attempt has found out, and has logged of this stage, is not of this one. Until here a refusal
        leaves it as it was."""
        if result in self._begun:
            return
        if not self._begun:
            set_aside_reports(self.run_dir, self.log, self.progress.line)
            self.context.directory.has_begun = True
        self._begun.add(result)
        stage = find_stage(result)
        if stage and not stage.resumes:  # else its commits say which lines stay
            self.log.forget(result)

    def _run(self, stage: Stage) -> None:
        if not stage.results:
            self._run_anew(stage)
        needed = results_needed(self.config)
        for name, key in stage.checkpoint_keys.items():
            given = getattr(self.config, key) if key and self.config.stage == "pipeline" else None
            if given:
                self.progress.line(f"✓ {name}: {given} (given)")
            elif name in needed:
                self._make_or_find(stage, name)

    def _run_anew(self, stage: Stage) -> None:
        start, path = time.time(), self.run_dir / stage.report
        work = partial(stage.run, self.context.made_for(stage.name, path))
        metrics = once_more(work, stage.name, self.log, self.progress.line)
        self._finish(StageResult(stage.name, str(path), False, metrics), start)

    def _make_or_find(self, stage: Stage, name: str) -> None:
        inputs = stage.inputs(self.context.made_for(name))
        start = time.time()
        result = self.store.find(name, inputs) or self._make(stage, name, inputs)
        if result.cached:
            self.progress.line(f"✓ {name}: nothing has changed, reusing {result.path}")
        else:
            self.progress.line(f"✓ {name}: {result.path}")
            self.log.artifact(f"{self.config.name}-{file_name(name)}", "model", result.path)
        self._finish(result, start)

    def _make(self, stage: Stage, name: str, inputs: dict[str, Any]) -> StageResult:
        """Or find what another run makes meanwhile."""
        work = partial(self.store.run, name, inputs, lambda path: stage.run(self.context.made_for(name, path)))
        with self.store.alone(name, inputs, lambda: self.progress.phase(f"waiting for the run that makes {name}")):
            if found := self.store.find(name, inputs):
                return found
            return work() if stage.resumes else once_more(work, name, self.log, self.progress.line)

    def _finish(self, result: StageResult, start: float) -> None:
        self.results[result.name] = result
        self.seconds[result.name] = time.time() - start
        rows = [asdict(result) | {"seconds": self.seconds.get(name, 0.0)} for name, result in self.results.items()]
        replace_text(self.run_dir / "stages.json", json_text(rows, indent=1) + "\n")

    def checkpoint(self, name: str) -> str:
        """The checkpoint of an earlier stage: made in this run, given in the configuration, or in the cache; or `base`.
        Raises NotMade where there is none."""
        if name in self.results:
            return self.results[name].path
        if name == "base":
            return self.config.model.path
        stage = find_stage(name)
        assert stage is not None
        key = stage.checkpoint_keys[name]
        if key and (given := getattr(self.config, key)):
            return given
        if self.config.reuse_stages is False:  # and `find` finds nothing, whatever was run first
            raise NotMade(
                f"stage={self.config.stage} needs the result of {name}, and reuse_stages=false takes none that is there: "
                "write reuse_stages=auto or stage=pipeline" + (f", or set {key}=PATH" if key else "")
            )
        look = self.store.find if self._is_running else self.store.look
        found = look(name, stage.inputs(self.context.made_for(name)))
        if found is None:
            raise NotMade(
                f"stage={self.config.stage} needs the result of {name}, which has not run with this configuration and code: "
                f"run stage={stage.name} or stage=pipeline first" + (f", or set {key}=PATH" if key else "")
            )
        self.results[name] = found
        return found.path


def rehearse_environment(config: TandemConfig, tokenizer: Any, data: Inputs, progress: Progress) -> None:
    """Play it on the prompts that have been read, by how they are sampled. Raises ConfigError."""
    sampled = {"ppo.sampling": data["prompts"], "evaluate.sampling": data["eval_prompts"]}
    in_chat = sorted(data.in_chat & {"prompts", "eval_prompts"})
    if in_chat and not config.data.chat and config.environment.name == "two_turn":
        raise ConfigError(
            f"data.chat must be True with environment.name two_turn and messages in data.{in_chat[0]}, which the chat "
            f"template writes: what the policy is told then would be plain text; found {config.data.chat}; write "
            "data.chat=true"
        )
    if any(sampled.values()) and config.environment.name != "single_turn":
        from controller.start_checks.rehearsal import rehearse

        with progress.phase(f"rehearsing {config.environment.name}"):
            rehearse(config, tokenizer, {key: found for key, found in sampled.items() if found}, data.in_chat)


def set_aside_reports(run_dir: Path, log: RunLog, say: Callable[[str], None]) -> None:
    """What another attempt in the same directory has found out, in evaluation.json and in the lines of its stage, is not of
    the one that begins."""
    reports = {stage.report: stage.name for stage in all_stages() if stage.report}
    for name, stage in sorted(reports.items()):
        log.forget(stage)
        path = run_dir / name
        if path.exists():
            before = path.with_name(f"{path.stem}.before{path.suffix}")
            path.replace(before)
            say(f"{name} of an earlier attempt is {before.name} now")
