"""`python -m controller.report RUN [-o FILE]`: write the report of a run and print where it is. Several runs, or the
directory of a sweep, are compared on one page."""

import argparse
from pathlib import Path

from controller.record.reader import ReportError, is_run
from controller.report.comparison_page import render_comparison
from controller.report.members import members_of
from controller.report.run_page import render


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m controller.report", description="One static HTML page about a run, or several compared."
    )
    told = "run directory, finished or not, or that of a sweep"
    parser.add_argument("run", type=Path, nargs="+", metavar="RUN", help=told)
    told = "default: report.html in RUN, or here for several"
    parser.add_argument("-o", "--output", type=Path, metavar="FILE", help=told)
    given = parser.parse_args(arguments)
    alone = len(given.run) == 1 and (is_run(given.run[0]) or not given.run[0].is_dir())
    try:
        if alone:
            target = render(given.run[0], given.output)
        else:
            default = (given.run[0] if len(given.run) == 1 else Path()) / "report.html"
            target = render_comparison(members_of(given.run), given.output or default)
    except ReportError as error:
        raise SystemExit(f"report: {error}") from error
    print(f"report: {target} ({target.stat().st_size / 1024:.0f} KB)")


if __name__ == "__main__":
    main()
