"""`python -m studies.five_reasons.run_missing EXPERIMENT`: run what is missing of a study, in the time there is.

    what EXPERIMENT sweeps ── less what docs/results/STUDY/members has ──> seed by seed, so many at a time
        train.py -m ──> runs/STUDY/<member>/ ── keep ──> docs/results/STUDY/members/

A study of hours is run in pieces on machines that are gone afterwards: commit docs/results after each. The arms of a seed are
compared with each other, so a seed is begun only where there is time for all of them, and where its kept members turn out to
have had other models (SFT and reward models are made anew on a new machine), those run again.
"""

import argparse
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import groupby, product
from pathlib import Path

from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from studies.five_reasons.kept import keep, kept_members
from studies.five_reasons.members import Member, members_of_study
from studies.five_reasons.registration import PREREGISTRATION, StudyError, parse, record

ROOT = Path(__file__).resolve().parents[2]
RESULTS, RUNS = ROOT / "docs/results", ROOT / "runs"
UNKNOWN_MINUTES = 10.0  # of a member that nothing is known of; docs/study.md has what they took
TRIES = 2
POLL_S = 2.0

Job = dict[str, str]  # what the sweep sets of a member: arm, ppo.seed, ...


@dataclass
class Sweep:
    """An experiment of the study, as its configuration says."""

    experiment: str
    name: str
    jobs: list[Job]  # seed by seed
    registration: Path


def sweep_of(experiment: str) -> Sweep:
    """What an experiment sweeps, less the arms that no verdict needs at a registered seed."""
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        composed = compose("config", [f"+experiment={experiment}"], return_hydra_config=True)
    params = {key: str(values).split(",") for key, values in composed.hydra.sweeper.params.items()}
    file = OmegaConf.select(composed, "hydra.callbacks.registration.file") or PREREGISTRATION.name
    path = PREREGISTRATION.with_name(file)
    needed = parse(path.read_text(encoding="utf-8")).needed()
    seeds = {seed for seed, _ in needed}
    jobs = [dict(zip(params, values, strict=True)) for values in product(*params.values())]
    jobs = [job for job in jobs if seed_of(job) not in seeds or (seed_of(job), job["arm"]) in needed]
    return Sweep(experiment, str(composed.name), sorted(jobs, key=seed_of), path)


def seed_of(job: Job) -> int:
    return int(job["ppo.seed"])


def is_of(member: Member, job: Job) -> bool:
    return {f"{key}={value}" for key, value in job.items()} <= set(member.run.overrides or [])


@dataclass
class Pieces:
    """One session's work on a sweep."""

    sweep: Sweep
    kept_in: Path  # docs/results/STUDY
    runs: Path  # runs/STUDY
    start: Callable[[Job], "subprocess.Popen[bytes]"]
    at_a_time: int
    deadline: float  # time.monotonic()
    say: Callable[[str], None] = print
    poll_s: float = POLL_S
    _tries: dict[str, int] = field(default_factory=dict)

    def missing(self) -> list[Job]:
        found = kept_members(self.kept_in)
        return [job for job in self.sweep.jobs if not any(is_of(member, job) for member in found)]

    def minutes(self, jobs: Sequence[Job]) -> float:
        """That these members will take, so many at a time, by what kept ones of their arms took."""
        took: dict[str, list[float]] = {}
        for member in kept_members(self.kept_in):
            if member.run.phases:
                took.setdefault(member.arm, []).append(member.run.phases[-1]["end_s"] / 60)
        known = {arm: sum(times) / len(times) for arm, times in took.items()}
        return sum(known.get(job["arm"], UNKNOWN_MINUTES) for job in jobs) / min(self.at_a_time, max(1, len(jobs)))

    def run(self) -> list[Job]:
        """Run seed after seed while there is time for a whole one; returns what is still missing."""
        for seed, group in groupby(self.missing(), key=seed_of):
            jobs = list(group)
            wanted, left = self.minutes(jobs), (self.deadline - time.monotonic()) / 60
            if wanted > left:
                self.say(f"seed {seed}: {len(jobs)} members would take {wanted:.0f} min; {left:.0f} are left")
                break
            while jobs := [j for j in self.missing() if seed_of(j) == seed and self._tries.get(str(j), 0) < TRIES]:
                self._run_side_by_side(jobs)
        return self.missing()

    def _run_side_by_side(self, jobs: list[Job]) -> None:
        running: list[tuple[Job, subprocess.Popen[bytes]]] = []
        try:
            while jobs or running:
                while len(running) < self.at_a_time and (job := _next(jobs, [job for job, _ in running])):
                    jobs.remove(job)
                    self._tries[str(job)] = self._tries.get(str(job), 0) + 1
                    running.append((job, self.start(job)))
                time.sleep(self.poll_s)
                for job, process in [(j, p) for j, p in running if p.poll() is not None]:
                    running.remove((job, process))
                    self._keep(job, process.returncode)
        finally:  # of an interrupted session: members that have not ended run again in the next
            for _, process in running:
                process.terminate()
            for _, process in running:
                process.wait()

    def _keep(self, job: Job, code: int) -> None:
        member = next((m for m in members_of_study(self.runs) if is_of(m, job) and m.is_judged), None)
        label = " ".join(f"{key}={value}" for key, value in job.items())
        if member is None:
            self.say(f"✗ {label}: exit code {code}, not judged; its log is in {self.runs}")
            return
        path = keep(member, record(self.kept_in, self.sweep.registration)["sha256"], self.kept_in)
        self.say(f"✓ {label}: {self._took(member)}{path.name}")
        for other in kept_members(self.kept_in):
            if other.seed == member.seed and _other_models(other, path, self.kept_in):
                other.run.path.unlink()
                self.say(f"  {other.run.path.name} had other models: it runs again")

    @staticmethod
    def _took(member: Member) -> str:
        return f"{member.run.phases[-1]['end_s'] / 60:.1f} min, " if member.run.phases else ""


def _next(jobs: Sequence[Job], running: Sequence[Job]) -> Job | None:
    """The next member; two conversations side by side would need more memory than 24 GiB leaves (docs/study.md)."""
    busy = any(job["arm"].startswith("two_turn") for job in running)
    return next((job for job in jobs if not (busy and job["arm"].startswith("two_turn"))), None)


def _other_models(other: Member, path: Path, directory: Path) -> bool:
    mine = next(m for m in kept_members(directory) if m.run.path == path).facts.get("models") or {}
    theirs = other.facts.get("models") or {}
    return any(theirs.get(name, value) != value for name, value in mine.items())


def command(sweep: Sweep, overrides: Sequence[str]) -> list[str]:
    return [sys.executable, "train.py", f"+experiment={sweep.experiment}", *overrides]


def make_models(sweep: Sweep) -> None:
    """SFT and reward models, with every core, before members share the cores."""
    for stage in ("sft", "reward_model"):
        where = RUNS / f"{sweep.name}_models" / stage
        subprocess.run(command(sweep, [f"stage={stage}", f"run_dir={where}"]), cwd=ROOT, check=True)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m studies.five_reasons.run_missing", description=__doc__.splitlines()[0])
    parser.add_argument("experiment", help="of studies/five_reasons/conf/experiment, as five_reasons_2")
    parser.add_argument("--minutes", type=float, default=100.0, help="no seed is begun that would take longer (100)")
    parser.add_argument("--at-a-time", type=int, default=2, help="members side by side, a core each (2)")
    parser.add_argument("--dry-run", action="store_true", help="say what is missing and how long it would take")
    given = parser.parse_args(arguments)
    deadline = time.monotonic() + 60 * given.minutes
    try:
        sweep = sweep_of(given.experiment)
        folder = RESULTS / sweep.name
        if not given.dry_run:
            record(folder, sweep.registration)
        shared = []
        if given.at_a_time > 1:
            shared = [f"cluster.threads_per_{part}=1" for part in ("actor", "learner_rank", "reward_replica")]

        def start(job: Job) -> "subprocess.Popen[bytes]":
            log = RUNS / sweep.name / f"{','.join(f'{k}={v}' for k, v in sorted(job.items()))}.log"
            log.parent.mkdir(parents=True, exist_ok=True)
            words = command(sweep, ["-m", *(f"{key}={value}" for key, value in job.items()), *shared])
            with log.open("wb") as file:
                return subprocess.Popen(words, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT)

        pieces = Pieces(sweep, folder, RUNS / sweep.name, start, given.at_a_time, deadline)
        missing = pieces.missing()
        print(f"{sweep.name}: {len(missing)} of {len(sweep.jobs)} members missing, {pieces.minutes(missing):.0f} min")
        if given.dry_run or not missing:
            return
        make_models(sweep)
        missing = pieces.run()
    except StudyError as error:
        raise SystemExit(f"study: {error}") from error
    print(f"{len(missing)} of {len(sweep.jobs)} members are still missing; commit {folder.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
