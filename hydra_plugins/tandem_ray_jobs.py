"""`python train.py -m hydra/launcher=ray_jobs ...`: each member of a sweep is a Ray Job of its own, as `submit.py` sends it.

A member has its own log, stop, exit code and placement group; what it measured comes back through the result file in its run
directory, which this machine must be able to read. A member that fails is a failed result and touches no other.
"""

import copy
import signal
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.core.utils import JobReturn, JobStatus, setup_globals
from hydra.plugins.launcher import Launcher
from omegaconf import DictConfig, open_dict

from common.composing import origin_of_run
from common.files.outcome import read_outcome
from common.override_values import misread_overrides
from contracts.checks.overrides import quoted
from contracts.checks.validation import ConfigError
from contracts.config import to_config
from controller.record.redaction import redact_sweep
from controller.sweep import finished_objective, group_of
from submission.job import CONF, Job, checked_job
from submission.ray_jobs import Cluster, ClusterError
from submission.targets import RayJobs


@dataclass
class RayJobsLauncherConf(RayJobs):
    _target_: str = "hydra_plugins.tandem_ray_jobs.RayJobsLauncher"
    _convert_: str = "all"  # Ray takes lists, not OmegaConf's
    max_parallel: int = 4  # members that run at a time; the others wait here, not in the cluster's queue


ConfigStore.instance().store(group="hydra/launcher", name="ray_jobs", node=RayJobsLauncherConf, provider="tandem")


def check_travels(hydra: DictConfig) -> None:
    """A job has the overrides of its member and conf/ as it is uploaded, and its settings are as they were written.

    Raises:
        ConfigError: it would train another configuration, or in another environment.
    """
    if words := origin_of_run(hydra, CONF).words:
        raise ConfigError(
            f"{' '.join(words)}: a job of hydra/launcher=ray_jobs composes conf/config.yaml with the overrides of its "
            "member alone; write an experiment in conf/experiment and +experiment=NAME instead"
        )
    if misread := misread_overrides(list(hydra.overrides.hydra), "hydra.launcher.", RayJobsLauncherConf):
        raise ConfigError("\n".join(misread))


def refuse(error: Exception) -> int:
    print(f"\nTandem cannot submit:\n{error}", file=sys.stderr)
    return 2


class RayJobsLauncher(Launcher):
    def __init__(self, max_parallel: int, **target: Any):
        self.max_parallel, self.target = max_parallel, RayJobs(**target)

    def setup(self, *, hydra_context: Any, task_function: Any, config: DictConfig) -> None:
        self.loader, self.config = hydra_context.config_loader, config
        try:
            check_travels(config.hydra)
        except ConfigError as error:
            sys.exit(refuse(error))

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        setup_globals()
        members = [self._compose(initial_job_idx + i, list(o)) for i, o in enumerate(job_overrides)]
        self.running, self.is_ending = set[str](), False
        try:
            cluster = Cluster(self.target)
        except ClusterError as error:
            sys.exit(refuse(error))
        redact_sweep(Path(self.config.hydra.sweep.dir))  # the command line, which Hydra has written there
        signal.signal(signal.SIGTERM, lambda signum, frame: sys.exit(128 + signum))
        with ThreadPoolExecutor(self.max_parallel) as pool:
            try:
                return list(pool.map(lambda member: self._run(cluster, *member), members))
            except (
                BaseException
            ):  # above all Ctrl-C and SIGTERM: the jobs would go on, and nobody would read their results
                self.is_ending = True  # for those that are being submitted
                pool.shutdown(wait=False, cancel_futures=True)
                for job_id in list(self.running):
                    cluster.client.stop_job(job_id)
                raise

    def _compose(self, number: int, overrides: list[str]) -> tuple[int, DictConfig, DictConfig]:
        """The configuration of a member, without and with Hydra's part."""
        whole = self.loader.load_sweep_config(self.config, overrides)
        with open_dict(whole):
            whole.hydra.job.id = whole.hydra.job.num = number
        HydraConfig.instance().set_config(whole)
        sweep = whole.hydra.sweep
        task = copy.deepcopy(whole)
        with open_dict(task):
            task.run_dir, task.cluster.address = f"{sweep.dir}/{sweep.subdir}", "auto"
            task.logger.group = group_of(task, sweep.dir)
            del task["hydra"]
        return number, task, whole

    def _run(self, cluster: Cluster, number: int, task: DictConfig, whole: DictConfig) -> JobReturn:
        """Submit a member and wait for it."""
        overrides = list(whole.hydra.overrides.task)
        result = JobReturn(overrides, task, whole, task.run_dir, whole.hydra.job.name, JobStatus.FAILED)
        try:
            config = to_config(copy.deepcopy(task))
            done, value = finished_objective(config)
            if done:
                print(f"#{number}: {config.run_dir} is done already", flush=True)
                result.return_value, result.status = value, JobStatus.COMPLETED
                return result
            job = checked_job(config, [*overrides, f"logger.group={quoted(config.logger.group)}"], self.target)
            cluster.check_capacity(config)
            code = self._wait(cluster, number, job)
            if code:
                raise ClusterError(f"member {number} ended with exit code {code}: python submit.py logs {job.id}")
            result.return_value, result.status = read_outcome(Path(config.run_dir)), JobStatus.COMPLETED
        except (ConfigError, ClusterError, OSError) as error:
            print(f"#{number} failed: {error}", file=sys.stderr)
            result.return_value = error
        return result

    def _wait(self, cluster: Cluster, number: int, job: Job) -> int:
        cluster.submit(job)
        self.running.add(job.id)
        if self.is_ending:
            cluster.client.stop_job(job.id)
        print(f"#{number} {job.id}: python submit.py logs {job.id}", flush=True)
        code = cluster.wait(job.id)
        self.running.remove(job.id)
        print(f"#{number} {job.id} has ended with exit code {code}", flush=True)
        return code
