"""`python -m controller.report RUN [-o FILE]`: write the report of a run and print where it is."""

import argparse
from pathlib import Path

from controller.report import ReportError, render


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m controller.report", description="One static HTML page about a run."
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="run directory, finished or not")
    parser.add_argument("-o", "--output", type=Path, metavar="FILE", help="default: RUN/report.html")
    given = parser.parse_args(arguments)
    try:
        target = render(given.run, given.output)
    except ReportError as error:
        raise SystemExit(f"report: {error}") from error
    print(f"report: {target} ({target.stat().st_size / 1024:.0f} KB)")


if __name__ == "__main__":
    main()
