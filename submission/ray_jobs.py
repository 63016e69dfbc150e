"""A job on a Ray cluster that runs already, through its Jobs API. The only module that speaks to a cluster."""

import asyncio
import json
import logging
import os
import shlex
import sys
import time
from contextlib import suppress
from dataclasses import replace
from typing import Any

import requests

from common.error_text import error_lines
from contracts.checks.cluster_checks import stated_nodes
from contracts.checks.overrides import override_key
from contracts.checks.validation import ConfigError
from contracts.config import TandemConfig
from contracts.placement import PlacementError, Resources, check_nodes, plan
from submission.job import Job, next_id, recorded
from submission.targets import ROOT, RayJobs

STOPPED_EXIT_CODE = 128 + 15  # Ray keeps no exit code of a job that was stopped; this is SIGTERM's
STOP_WAIT = "RAY_JOB_STOP_WAIT_TIME_S"  # between SIGTERM and SIGKILL, in the job's environment
POLL_S = 0.5
RECONNECT_S = 5.0
MAX_LOST = 60
NEEDED = ("hydra", "omegaconf", "torch", "transformers", "ray")  # of Tandem's packages


class ClusterError(RuntimeError):
    """The cluster cannot be reached, refuses us, or does not know the job."""


def resolve_authentication(address: str) -> None:
    """Turn Ray's token authentication on where the cluster asks for it. Ray reads the mode when it is imported, once.

    Raises:
        ClusterError: nothing answers at the address.
    """
    for name in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS"):  # they would override the address that was asked for
        os.environ.pop(name, None)
    try:
        answer = requests.get(f"{address.rstrip('/')}/api/version", timeout=10)
    except requests.RequestException as error:
        raise ClusterError(
            f"no Ray dashboard answers at target.address={address} ({type(error).__name__}); write the address that "
            "`ray start --head` printed, or forward its port: ssh -L 8265:127.0.0.1:8265 HEAD"
        ) from error
    if answer.status_code == 401:
        os.environ["RAY_AUTH_MODE"] = "token"


def entrypoint(job: Job) -> str:
    """The job's shell line behind a question to its Python, which takes a twentieth of a second: Ray's own is on the PATH of
    every node, and would say no more than that a module is not there. Exit code 2: refused."""
    python = job.target.python
    ask = f"from importlib.util import find_spec; raise SystemExit(None in map(find_spec, {NEEDED}))"
    message = (
        f"target.python={python} must be the Python of Tandem's environment on the head node; it is not there, or lacks "
        f"one of {', '.join(NEEDED)}; write for example target.python=/shared/tandem/.venv/bin/python"
    )
    return f"{shlex.join([python, '-c', ask])} || {{ echo {shlex.quote(message)} >&2; exit 2; }}; {job.command}"


class Cluster:
    """A connection. Every method raises ClusterError where the cluster refuses."""

    def __init__(self, target: RayJobs):
        resolve_authentication(target.address)
        from ray.exceptions import AuthenticationError
        from ray.job_submission import JobSubmissionClient

        # Ray tells of every file that it leaves out, twice.
        for name in ("ray", "ray.dashboard.modules.dashboard_sdk", "ray.dashboard.modules.job.sdk"):
            logging.getLogger(name).setLevel(logging.ERROR)
        self.target = target
        try:
            self.client = JobSubmissionClient(target.address)
        except AuthenticationError as error:
            raise ClusterError(
                f"the cluster at {target.address} wants a token: {error_lines(error)[0]}\nwrite the cluster's token "
                "(`ray get-auth-token` on its head node) to ~/.ray/auth_token, or its path to RAY_AUTH_TOKEN_PATH"
            ) from error
        except (ConnectionError, RuntimeError) as error:
            raise ClusterError(f"target.address={target.address}: {error}") from error

    def nodes(self) -> list[Resources]:
        """CPUs and GPUs of each node that is alive."""
        from ray.util.state import list_nodes

        # Not filtered by Ray: it takes the dead nodes that it leaves out for missing ones, and raises.
        alive = [node for node in list_nodes(self.target.address, limit=10000, detail=True) if node.state == "ALIVE"]
        return [{name: node.resources_total.get(name, 0.0) for name in ("CPU", "GPU")} for node in alive]

    def check_capacity(self, config: TandemConfig) -> None:
        """Ray would keep a job that can never be placed waiting for ever.

        Raises:
            ConfigError: with the arithmetic, of the fewest actors: for others nodes may come. A stated size
                (`cluster.num_nodes`) has been checked without the cluster, which may still grow to it.
        """
        if stated_nodes(config) is not None:
            return
        try:
            check_nodes(plan(config), self.nodes())
        except PlacementError as error:
            raise ConfigError(str(error)) from error

    def submit(self, job: Job) -> None:
        """Upload the working directory and queue the job."""
        target = job.target
        assert isinstance(target, RayJobs)
        environment = {**target.env, STOP_WAIT: str(target.stop_wait_s)}
        files = {"working_dir": str(ROOT), "excludes": target.excludes}
        try:
            self.client.submit_job(
                entrypoint=entrypoint(job),
                submission_id=job.id,
                metadata=job.metadata,
                runtime_env={**files, "env_vars": environment},
            )
        except RuntimeError as error:
            raise ClusterError(f"the cluster refuses {job.id}: {error_lines(error)[-1]}") from error
        job.record()

    def info(self, job_id: str) -> Any:
        """Ray's JobDetails."""
        try:
            return self.client.get_job_info(job_id)
        except RuntimeError as error:
            raise ClusterError(f"{self.target.address}: {error_lines(error)[0]}") from error

    def job(self, job_id: str) -> Job:
        """Any job that was submitted with `submit.py`, by whomever."""
        metadata = self.info(job_id).metadata or {}
        if "overrides" not in metadata:
            raise ClusterError(f"{job_id} was not submitted with submit.py")
        return Job(job_id, json.loads(metadata["overrides"]), metadata["run_dir"], self.target)

    def follow(self, job_id: str) -> int:
        """Print a job's log as it grows. Returns its exit code once it has ended."""
        self.info(job_id)
        printed = 0
        while True:
            printed = asyncio.run(self._print_log(job_id, printed))
            if self._has_ended(job_id):
                return self.exit_code(job_id)
            time.sleep(POLL_S)

    def _has_ended(self, job_id: str) -> bool:
        """A closed tunnel or a restarted dashboard ends no job: only MAX_LOST missed answers in a row are an error."""
        for _ in range(MAX_LOST):
            try:
                return self.info(job_id).status.is_terminal()
            except OSError:
                time.sleep(RECONNECT_S)
        raise ClusterError(f"{self.target.address} has not answered {MAX_LOST} times; {job_id} may still run")

    async def _print_log(self, job_id: str, printed: int) -> int:
        """Ray sends a log from its beginning; the first `printed` characters are left out. Returns the new number."""
        position = 0
        # RuntimeError and OSError: the connection is lost. `follow` connects again.
        with suppress(RuntimeError, OSError):
            async for text in self.client.tail_job_logs(job_id):
                sys.stdout.write(text[max(0, printed - position) :])
                sys.stdout.flush()
                position += len(text)
        return max(printed, position)

    def wait(self, job_id: str) -> int:
        """Returns the exit code of a job when it has ended."""
        while not self._has_ended(job_id):
            time.sleep(POLL_S)
        return self.exit_code(job_id)

    def exit_code(self, job_id: str) -> int:
        """Of the driver; Ray's command line would say 1 for every failure."""
        info = self.info(job_id)
        if info.driver_exit_code is not None:
            return info.driver_exit_code if info.driver_exit_code >= 0 else 128 - info.driver_exit_code
        if info.status == "STOPPED":
            return STOPPED_EXIT_CODE
        print(f"{job_id}: {info.message}", file=sys.stderr)  # it never started
        return 1

    def stop(self, job_id: str) -> None:
        """SIGTERM, and SIGKILL `stop_wait_s` later. Returns when the job has ended."""
        self.info(job_id)
        self.client.stop_job(job_id)
        self.wait(job_id)

    def resume(self, job_id: str) -> Job:
        """The same command in the same run directory, as a new job; it goes on, however the first one was to begin."""
        info = self.info(job_id)
        if not info.status.is_terminal():
            raise ClusterError(f"{job_id} is {info.status.value}: stop it first")
        old, is_same = self.job(job_id), recorded(job_id) is not None
        target = self.target if is_same else self._target_of(info)
        overrides = [o for o in old.overrides if override_key(o) != "checkpoint.resume"]
        job = replace(old, id=next_id(job_id), overrides=overrides, target=target)
        self.submit(job)
        return job

    def _target_of(self, info: Any) -> RayJobs:
        """As another machine has submitted the job, where this one's command line says nothing else."""
        there = dict((info.runtime_env or {}).get("env_vars", {}))
        there.pop(STOP_WAIT, None)
        python = self.target.python if self.target.python != RayJobs.python else (info.metadata or {}).get("python")
        return replace(self.target, env=there | self.target.env, python=python or self.target.python)

    def describe(self, job_id: str) -> list[tuple[str, str]]:
        """Rows for a reader."""
        info, job = self.info(job_id), self.job(job_id)
        rows = [("job", job_id), ("status", info.status.value)]
        if info.status.is_terminal():
            rows.append(("exit code", str(self.exit_code(job_id))))
        for name, moment in (("started", info.start_time), ("ended", info.end_time)):
            if moment:
                rows.append((name, time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(moment / 1000))))
        return [*rows, ("run directory", job.run_dir), ("overrides", shlex.join(job.overrides))]
