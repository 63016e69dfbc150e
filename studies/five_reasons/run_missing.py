"""`python -m studies.five_reasons.run_missing EXPERIMENT`: run what is missing of a study, in the time there is.

    what EXPERIMENT sweeps ── less what docs/results/STUDY/members has ──> seed by seed, so many at a time
        train.py -m ──> runs/STUDY/<member>/ ── keep ──> docs/results/STUDY/members/

A study of hours is run in pieces on machines that are gone afterwards: commit docs/results after each. The arms of a seed
are compared with each other, so a seed is begun only where there is time for all of them, and where its kept members turn
out to have had other models (SFT and reward models are made anew on a new machine), those run again.
"""

import argparse
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import product
from pathlib import Path

from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from common.files.code_digest import code_digest
from common.models.precision import cpu_dtype
from studies.five_reasons.kept import keep, keep_failed, kept_members, models_of
from studies.five_reasons.members import Member, members_of_study
from studies.five_reasons.registration import PREREGISTRATION, StudyError, parse, record
from studies.five_reasons.tuning import swept

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "docs/results"
# Of a member that nothing is known of, two at a time: estimated from what its parts take on two cores of an AMD EPYC. On an
# Intel Xeon ten of a seed took 81 and 87 in sum (docs/study.md).
MEMBER_MINUTES = 12.0
TRIES = 2
POLL_S = 2.0

Job = dict[str, str]  # what the sweep sets of a member: arm, ppo.seed, ...


@dataclass
class Sweep:
    """An experiment of the study, as its configuration says."""

    experiment: str
    name: str
    runs: Path  # the directory of its members
    jobs: list[Job]  # seed by seed
    registration: Path
    # Seeds by which verdicts are drawn; of others, as a tuning's, an arm is compared with itself alone.
    registered: set[int]
    overrides: list[str]  # that all members share


def sweep_of(experiment: str, overrides: Sequence[str] = ()) -> Sweep:
    """What an experiment sweeps, where overrides do not say otherwise, less the arms that no verdict needs at a registered
    seed."""
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        composed = compose("config", [f"+experiment={experiment}"], return_hydra_config=True)
    params = {key: str(values).split(",") for key, values in composed.hydra.sweeper.params.items()}
    given = dict(word.split("=", 1) for word in overrides)
    params |= {key: value.split(",") for key, value in given.items() if key in params}
    shared = [word for word in overrides if word.split("=")[0] not in params]
    file = OmegaConf.select(composed, "hydra.callbacks.registration.file") or PREREGISTRATION.name
    path = PREREGISTRATION.with_name(file)
    needed = parse(path.read_text(encoding="utf-8")).needed()
    seeds = {seed for seed, _ in needed}
    jobs = [dict(zip(params, values, strict=True)) for values in product(*params.values())]
    jobs = [job for job in jobs if seed_of(job) not in seeds or (seed_of(job), job["arm"]) in needed]
    name = given.get("name", str(composed.name))
    runs = ROOT / given.get("hydra.sweep.dir", f"runs/{name}")
    return Sweep(experiment, name, runs, sorted(jobs, key=seed_of), path, seeds, shared)


def seed_of(job: Job) -> int:
    return int(job["ppo.seed"])


def is_of(member: Member, job: Job, shared: Sequence[str] = ()) -> bool:
    """Whether it ran with what the sweep sets of the job, and with nothing else that arms are tuned by. `shared` are
    overrides of all members."""
    given = set(member.run.overrides or []) - {*shared}
    return {f"{key}={value}" for key, value in job.items()} <= given and {*swept(given)} <= job.keys()


def missing_of(sweep: Sweep, kept_in: Path) -> list[Job]:
    """`kept_in`: docs/results/STUDY."""
    found = kept_members(kept_in)
    return [job for job in sweep.jobs if not any(is_of(member, job, sweep.overrides) for member in found)]


@dataclass
class Pieces:
    """One session's work on a sweep."""

    sweep: Sweep
    kept_in: Path  # docs/results/STUDY
    start: Callable[[Job], "subprocess.Popen[bytes]"]
    at_a_time: int
    deadline: float  # time.monotonic()
    say: Callable[[str], None]
    poll_s: float = POLL_S
    _tries: dict[str, int] = field(default_factory=dict)
    # Since one was judged. A fault of the machine, as a full disk, ends one member after another within seconds.
    _unjudged: set[str] = field(default_factory=set)

    def missing(self) -> list[Job]:
        return missing_of(self.sweep, self.kept_in)

    def minutes(self, jobs: Sequence[Job]) -> float:
        """That these members will take, so many at a time, by what kept ones of their arms took."""
        took: dict[str, list[float]] = {}
        for member in kept_members(self.kept_in):
            if member.run.wall_s is not None:
                took.setdefault(member.arm, []).append(member.run.wall_s / 60)
        known = {arm: sum(times) / len(times) for arm, times in took.items()}
        each = [(job["arm"], known.get(job["arm"], MEMBER_MINUTES)) for job in jobs]
        side_by_side = sum(minutes for _, minutes in each) / min(self.at_a_time, max(1, len(jobs)))
        return max(side_by_side, sum(minutes for arm, minutes in each if _is_alone(arm)))

    def _registration(self) -> str:
        return str(record(self.kept_in, self.sweep.registration)["sha256"])

    def run(self) -> list[Job]:
        """Run seed after seed while there is time for a whole one; returns what is still missing."""
        for seed in dict.fromkeys(map(seed_of, self.missing())):
            # Of one that was broken off the kept members too: they may have had other models.
            jobs = [job for job in self.sweep.jobs if seed_of(job) == seed]
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
        found = self._members(job)
        member = next((m for m in found if m.is_judged), None)
        label = " ".join(f"{key}={value}" for key, value in job.items())
        if member is None:
            state = found[-1].state if found else "without a run directory"  # as its status.json says
            self.say(f"✗ {label}: exit code {code}, {state}, not judged; its log is in {self.sweep.runs}")
            self._unjudged.add(label)
            if state != "failed" or len(self._unjudged) > 1:
                raise StudyError(
                    f"{' and '.join(sorted(self._unjudged))} ended without a judged model ({state}), which is no result: "
                    f"mend what its log in {self.sweep.runs} says; nothing more is begun"
                )
            if self._tries.get(str(job), 0) >= TRIES:
                file = keep_failed(job, f"exit code {code}, {TRIES} times", self._registration(), self.kept_in)
                self.say(f"  it counts as failed: {file.name}")
            return
        self._unjudged.clear()
        path = keep(member, self._registration(), self.kept_in)
        took = f"{member.run.wall_s / 60:.1f} min, " if member.run.wall_s is not None else ""
        self.say(f"✓ {label}: {took}{path.name}")
        mine = models_of(member.run)
        for other in kept_members(self.kept_in):
            together = other.seed == member.seed and (other.seed in self.sweep.registered or other.arm == member.arm)
            if together and any(other.facts["models"].get(name, value) != value for name, value in mine.items()):
                other.run.path.unlink()
                self.say(f"  {other.run.path.name} had other models: it runs again")

    def _members(self, job: Job) -> list[Member]:
        try:
            found = members_of_study(self.sweep.runs)
        except StudyError:  # the first of all has left no run directory
            return []
        return [member for member in found if is_of(member, job, self.sweep.overrides)]


def _next(jobs: Sequence[Job], running: Sequence[Job]) -> Job | None:
    """The next member that may run beside these."""
    busy = any(_is_alone(job["arm"]) for job in running)
    return next((job for job in jobs if not (busy and _is_alone(job["arm"]))), None)


def _is_alone(arm: str) -> bool:
    """Two conversations side by side would need more memory than 24 GiB leaves (docs/study.md)."""
    return arm.startswith("two_turn")


def command(sweep: Sweep, overrides: Sequence[str]) -> list[str]:
    return [sys.executable, "train.py", f"+experiment={sweep.experiment}", *sweep.overrides, *overrides]


def make_models(sweep: Sweep) -> None:
    """SFT and reward models, with every core, before members share the cores."""
    for stage in ("sft", "reward_model"):
        where = sweep.runs.with_name(f"{sweep.runs.name}_models") / stage
        subprocess.run(command(sweep, [f"stage={stage}", f"run_dir={where}"]), cwd=ROOT, check=True)


def run_sweep(
    sweep: Sweep, results: Path, at_a_time: int, deadline: float, dry_run: bool, other_code: bool
) -> list[Job]:
    """Run what is missing of one experiment; returns what is missing then.

    Raises:
        StudyError: what is there was made by other code, and `other_code` does not allow for it.
    """
    folder, shared = results / sweep.name, list[str]()
    if all(_is_alone(job["arm"]) for job in sweep.jobs):
        at_a_time = 1  # with every core
    if at_a_time > 1:
        keys = [f"cluster.threads_per_{part}" for part in ("actor", "learner_rank", "reward_replica")]
        given = {word.partition("=")[0] for word in sweep.overrides}
        shared = [f"{key}=1" for key in keys if key not in given]

    def start(job: Job) -> "subprocess.Popen[bytes]":
        log = sweep.runs / f"{','.join(f'{key}={value}' for key, value in sorted(job.items()))}.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        words = command(sweep, ["-m", *(f"{key}={value}" for key, value in job.items()), *shared])
        with log.open("wb") as file:
            return subprocess.Popen(words, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT)

    pieces = Pieces(sweep, folder, start, at_a_time, deadline, say=partial(print, flush=True))
    missing = pieces.missing()
    there = kept_members(folder)
    used = sum(member.run.wall_s or 0.0 for member in there) / 3600
    said = f"{sweep.experiment}: {len(missing)} of {len(sweep.jobs)} members missing, {pieces.minutes(missing):.0f} min"
    print(f"{said}; kept ones took {used:.1f} h in sum, {used / at_a_time:.1f} h {at_a_time} at a time", flush=True)
    if dry_run or not missing:
        return missing
    others = {str(code)[:12] for member in there if (code := member.facts.get("code")) not in (None, code_digest())}
    if others and not other_code:
        raise StudyError(
            f"members in {folder} were made by other code ({', '.join(sorted(others))}): check out the commit that made "
            "them, or give --other-code, which the page will say"
        )
    if cpu_dtype() != "bfloat16":
        said = "this CPU does not multiply bfloat16: members train in float32 and take longer (docs/study.md)"
        print(said, flush=True)
    for directory in (folder, sweep.runs):  # before members, which start side by side, look for it
        record(directory, sweep.registration)
    make_models(sweep)
    return pieces.run()


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m studies.five_reasons.run_missing", description=__doc__.splitlines()[0]
    )
    words = "of studies/five_reasons/conf/experiment, and key=value for all members"
    parser.add_argument("words", nargs="+", metavar="EXPERIMENT", help=words)
    parser.add_argument("--into", type=Path, default=RESULTS, help="where STUDY/members are kept (docs/results)")
    parser.add_argument("--minutes", type=float, default=100.0, help="no seed is begun that would take longer (100)")
    parser.add_argument("--at-a-time", type=int, default=2, help="members side by side, a core each (2)")
    parser.add_argument("--dry-run", action="store_true", help="say what is missing and how long it would take")
    words = "go on though kept members were made by other code"
    parser.add_argument("--other-code", action="store_true", help=words)
    given = parser.parse_args(arguments)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that members do not outlive it
    deadline = time.monotonic() + 60 * given.minutes
    try:
        overrides = [word for word in given.words if "=" in word]
        sweeps = [sweep_of(word, overrides) for word in given.words if "=" not in word]
        for sweep in sweeps:
            run_sweep(sweep, given.into, given.at_a_time, deadline, given.dry_run, given.other_code)
        for sweep in sweeps:  # at the end: a later one may have had other models than what was kept of an earlier one
            missing = missing_of(sweep, given.into / sweep.name)
            print(
                f"{sweep.experiment}: {len(missing)} members are missing now; what is kept is in {given.into}",
                flush=True,
            )
    except StudyError as error:
        raise SystemExit(f"study: {error}") from error


if __name__ == "__main__":
    main()
