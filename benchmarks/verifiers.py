"""What verified answers cost: those of `math` and `exact` beside a function that does nothing, in one run, through the
processes that both run in.

    python benchmarks/verifiers.py [--answers 10000] [--processes 2] [--update-s 14] [--rollouts 64]

Each is asked for all answers, a share in turn, so that what else the machine does meets all of them; the cost is what a
verifier takes more than the function, in seconds a rollout. An update of the demo takes `--update-s` for `--rollouts`.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial
from pathlib import Path

sys.path.extend(
    map(str, Path(__file__).resolve().parents[:2])
)  # the processes of a function import this file by its path

from machine import machine, said  # beside this file

from contracts.config import ScorerConfig
from contracts.records import Score
from reward_service.kinds.function import FunctionPool
from reward_service.kinds.verifier import VerifierPool
from reward_service.scorer_kind import Text

HERE = Path(__file__).resolve().parent
ROUNDS = 20
WAYS = (
    "We add both and get {0}.\nThe answer is {0}.",
    "First 3 * 4 = 12, then {0}. So \\boxed{{{0}}}.",
    "{0}",
    "#### {0}",
    "**Answer:** ${0}$",
)


def nothing(completions: list[str]) -> list[float]:
    return [0.0] * len(completions)


def texts(count: int) -> list[Text]:
    """Numbers and, each tenth, expressions; every second answer is wrong."""
    found = []
    for n in range(count):
        right = f"\\frac{{{n}}}{{7}}x + {n % 13}" if n % 10 == 0 else str(n)
        said = right if n % 2 else right.replace(str(n), str(n + 1))
        row = json.dumps({"answer": right})
        found.append(Text("Question?", WAYS[n % len(WAYS)].format(said), row=row))
    return found


def answers_to(pool: VerifierPool, share: list[Text]) -> list[Future[list[Score]]]:
    return pool.submit_items([(t.completion, t.row, t.label) for t in share])


def asked(ask: Callable[[list[Text]], list[Future[list[Score]]]], share: list[Text]) -> tuple[float, int]:
    """(seconds, scores that are there)."""
    start = time.perf_counter()
    scores = [score for future in ask(share) for score in future.result()]
    return time.perf_counter() - start, sum(score.value is not None for score in scores)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for name, default in (("answers", 10_000), ("processes", 2), ("update-s", 14.0), ("rollouts", 64)):
        parser.add_argument(f"--{name}", type=type(default), default=default)
    parser.add_argument("--json", type=Path, default=HERE / "results/verifiers.json")
    chosen, where = parser.parse_args(), machine("math-verify")
    function = ScorerConfig(kind="function", function=f"{__file__}:nothing", processes=chosen.processes)
    nothing_pool = FunctionPool(function)
    pools: list[FunctionPool | VerifierPool] = [nothing_pool]
    asks: dict[str, Callable[[list[Text]], list[Future[list[Score]]]]] = {"nothing": nothing_pool.submit}
    for name in ("exact", "math"):
        pool = VerifierPool(ScorerConfig(kind="verifier", verifier=name, processes=chosen.processes))
        pools.append(pool)
        asks[name] = partial(answers_to, pool)
    answers, spent, scored = texts(chosen.answers), dict.fromkeys(asks, 0.0), dict.fromkeys(asks, 0)
    size = -(-len(answers) // ROUNDS)
    for number in range(ROUNDS):
        for name in list(asks)[:: 1 if number % 2 else -1]:
            seconds, count = asked(asks[name], answers[number * size : (number + 1) * size])
            spent[name] += seconds
            scored[name] += count
    for used in pools:
        used.close()
    rollout_s = chosen.update_s / chosen.rollouts
    print(f"{said(where)}; {chosen.processes} processes each")
    print(f"an update takes {chosen.update_s:g} s for {chosen.rollouts} rollouts, {rollout_s * 1e3:.0f} ms each\n")
    print("| | answers | without a score | a second | ms each | more than nothing, ms | share of a rollout |")
    print("|---|---|---|---|---|---|---|")
    rows = {}
    for name, seconds in spent.items():
        more = (seconds - spent["nothing"]) / len(answers)
        each = seconds / len(answers)
        print(
            f"| {name} | {len(answers)} | {len(answers) - scored[name]} | {1 / each:,.0f} | {each * 1e3:.3f} "
            f"| {more * 1e3:.3f} | {more / rollout_s:.3%} |"
        )
        rows[name] = {"ms": each * 1e3, "more_ms": more * 1e3, "without_a_score": len(answers) - scored[name]}
    record = {"machine": where, "answers": len(answers), "verifiers": rows}
    chosen.json.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
