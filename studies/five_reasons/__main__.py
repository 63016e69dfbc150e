"""`python -m controller.study RUNDIR`: draw a study again from its directory: study.html, study.json, study.svg."""

import argparse
import json
from pathlib import Path

from common.files.durable import replace_text
from studies.five_reasons.charts import forest
from studies.five_reasons.registration import StudyError
from studies.five_reasons.results import NAME, as_json, study_of
from studies.five_reasons.study_page import study_page


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m controller.study", description="Verdicts and page of a study.")
    parser.add_argument("directory", type=Path, metavar="RUNDIR", help="of a sweep over `arm`, finished or not")
    parser.add_argument(
        "--tuning",
        type=Path,
        nargs="+",
        default=[],
        metavar="SOURCE",
        help="directory of a tuning sweep, or an earlier study.json; of an arm the first that has it counts (default: "
        "RUNDIR_tuning beside RUNDIR, or five_reasons_tuning where there is none)",
    )
    given = parser.parse_args(arguments)
    try:
        study = study_of(given.directory, given.tuning)
    except StudyError as error:
        raise SystemExit(f"study: {error}") from error
    replace_text(given.directory / NAME, json.dumps(as_json(study), indent=1) + "\n")
    replace_text(given.directory / "study.svg", forest(study, alone=True) + "\n")
    target = given.directory / "study.html"
    replace_text(target, study_page(study))
    for finding in study.claims:
        low, high = finding.interval
        print(
            f"  {finding.claim.number}. {finding.claim.title}: "
            f"{finding.verdict}{' (preliminary)' if finding.is_preliminary else ''} | {finding.estimate.mean:+.3f} "
            f"[{low:+.3f}, {high:+.3f}] {finding.estimate.missing}"
        )
    for problem in study.problems:
        print(f"  warning: {problem}")
    print(f"study: {target}")


if __name__ == "__main__":
    main()
