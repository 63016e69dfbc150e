"""What a person sees while a run goes on: one line per policy version, announced phases, and never half a minute of
silence without a word on what is being waited for.

On a terminal the lines are coloured and a live line at the bottom counts the seconds. Anywhere else (a log file, a
pipe) there are plain lines, and a heartbeat takes the place of the live line.
"""

import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TextIO

from rich.console import Console
from rich.live import Live
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

from controller.record.number_text import spoken

PLAIN_WIDTH = 110  # columns of a table that goes to a file


class Progress:
    """Prints to `stream`. Thread-safe, since the heartbeat speaks from a thread of its own."""

    def __init__(
        self,
        heartbeat_s: float = 30.0,
        *,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._stream = stream or sys.stdout
        if hasattr(self._stream, "reconfigure"):
            # A log file in an ASCII locale must not end a run over a dash.
            self._stream.reconfigure(errors="replace")
        self._heartbeat_s, self._clock = heartbeat_s, clock
        self._lock = threading.RLock()
        self._what, self._since = "", clock()
        self._last_output = clock()
        self._terminal = self._stream.isatty()
        width = None if self._terminal else PLAIN_WIDTH
        self._console = Console(file=self._stream, width=width, highlight=False, markup=False, emoji=False)
        self._live: Live | None = None
        self._closed = threading.Event()
        if self._terminal:
            self._spinner = Spinner("dots", style="cyan")
            # Two frames a second: the engines need the cores more than an animation does.
            self._live = Live(console=self._console, get_renderable=self._status, refresh_per_second=2, transient=True)
            self._live.start()
        elif heartbeat_s > 0:
            threading.Thread(target=self._watch, name="progress-heartbeat", daemon=True).start()

    def line(self, text: str) -> None:
        """Print one line."""
        self._print(text, _coloured(text))

    @contextmanager
    def phase(self, text: str) -> Iterator[None]:
        """Announce what starts, and say how long it took. The heartbeat names it meanwhile."""
        started, before = self._clock(), (self._what, self._since)
        self._print(f"… {text}", Text(f"… {text}", style="cyan"))
        self.waiting_for(text)
        try:
            yield
        except BaseException:
            took = spoken(self._clock() - started)
            self._print(f"✗ {text}: failed after {took}", Text(f"✗ {text}: failed after {took}", style="bold red"))
            raise
        else:
            took = spoken(self._clock() - started)
            self._print(f"✓ {text}: {took}", Text.assemble(("✓ ", "green"), text, (f": {took}", "dim")))
        finally:
            with self._lock:
                self._what, self._since = before

    def waiting_for(self, what: str) -> None:
        """Set what the heartbeat and the live line name, such as "rollouts of update 12"; empty for nothing."""
        with self._lock:
            self._what, self._since = what, self._clock()

    def waiting(self) -> tuple[str, float]:
        """What is being waited for, and since how many seconds."""
        with self._lock:
            return self._what, self._clock() - self._since

    def beat(self) -> None:
        """Print a heartbeat if nothing has been printed for `heartbeat_s`. The thread calls it; so do tests."""
        with self._lock:
            now = self._clock()
            if self._closed.is_set() or now - self._last_output < self._heartbeat_s:
                return
            text = f"still waiting for: {self._what}" if self._what else "still working"
            self._print(f"{text} ({spoken(now - self._since)})", None)

    def summary(self, rows: list[tuple[str, str]], title: str) -> None:
        """Print a two-column table; the first column names, the second says."""
        table = Table(title=Text(title, style="bold"), title_justify="left", show_header=False)
        table.add_column(style="cyan", no_wrap=True)
        table.add_column(overflow="fold")
        for name, value in rows:
            table.add_row(Text(name), Text(value))
        with self._lock:
            self._console.print(table)
            self._stream.flush()
            self._last_output = self._clock()

    def close(self) -> None:
        """End the live line and the heartbeat. Closing twice does nothing."""
        with self._lock:
            self._closed.set()
        if self._live is not None:
            self._live.stop()
            self._live = None

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _print(self, text: str, coloured: Text | None) -> None:
        with self._lock:
            if self._terminal and coloured is not None:
                self._console.print(coloured)
            else:
                print(text, file=self._stream, flush=True)
            self._last_output = self._clock()

    def _status(self) -> Spinner:
        # rich calls this from its own thread. No lock: whoever prints a line holds it and waits for rich.
        what, since = self._what, self._since
        label = f"waiting for: {what}" if what else "working"
        self._spinner.update(text=Text(f"{label} ({spoken(self._clock() - since)})", style="dim"))
        return self._spinner

    def _watch(self) -> None:
        while not self._closed.wait(min(1.0, self._heartbeat_s / 4)):
            self.beat()


def format_update(metrics: Mapping[str, float | None], eta_s: float | None = None) -> str:
    """One line for one policy version; what is missing is left out.

    The names are those of docs/metrics.md; `step` stands for `progress/version` where that is missing.
    """
    parts = []

    def add(name: str, form: str) -> None:
        value = metrics.get(name)
        if value is not None and value == value:
            parts.append(form.format(value))

    version = metrics.get("progress/version", metrics.get("step"))
    if version is not None:
        parts.append(f"version {version:.0f}")
    add("perf/step_s", "{:.1f} s")
    add("reward/score_mean", "score {:.2f}")
    gain = metrics.get("reward/score_gain")
    if gain is not None and gain == gain and metrics.get("reward/score_mean") is not None:
        parts[-1] += f" ({gain:+.2f})"
    add("reward/gold_mean", "gold {:.2f}")
    add("kl/ref_seq", "KL {:.1f}")
    add("completion/len_mean", "len {:.0f}")
    add("completion/eos_frac", "EOS {:.0%}")
    if metrics.get("staleness/max"):
        add("staleness/mean", "staleness {:.1f}")
    add("perf/gen_tokens_per_s", "gen {:.0f} tok/s")
    add("perf/train_tokens_per_s", "train {:.0f} tok/s")
    if eta_s is not None and eta_s == eta_s:
        parts.append(f"ETA {spoken(eta_s)}")
    return " | ".join(parts)


def _coloured(text: str) -> Text:
    line = Text(text)
    line.highlight_regex(r" \| ", "dim")
    line.highlight_regex(r"^version \d+", "bold cyan")
    line.highlight_regex(r"\(\+[\d.]+\)", "green")
    line.highlight_regex(r"\(-[\d.]+\)", "red")
    line.highlight_regex(r"^(WARNING|ERROR).*", "bold red")
    return line
