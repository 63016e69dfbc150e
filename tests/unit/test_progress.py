import io
import time

import pytest

from controller.record.terminal import Progress, format_update


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def clock() -> Clock:
    return Clock()


def test_a_phase_is_announced_and_timed(clock):
    out = io.StringIO()
    with Progress(0, stream=out, clock=clock) as progress, progress.phase("starting vLLM"):
        assert out.getvalue() == "… starting vLLM\n"
        clock.now += 12.4
    assert out.getvalue() == "… starting vLLM\n✓ starting vLLM: 12 s\n"


def test_a_phase_that_fails_says_so_and_raises(clock):
    out = io.StringIO()

    def fail() -> None:
        clock.now += 3
        raise RuntimeError

    progress = Progress(0, stream=out, clock=clock)
    with pytest.raises(RuntimeError), progress.phase("starting vLLM"):
        fail()
    assert out.getvalue().endswith("✗ starting vLLM: failed after 3.0 s\n")


def test_the_heartbeat_names_what_it_waits_for_only_after_silence(clock):
    out = io.StringIO()
    with Progress(30, stream=out, clock=clock) as progress:
        progress.waiting_for("rollouts of update 12")
        clock.now = 29.9
        progress.beat()
        assert out.getvalue() == ""
        clock.now = 31.2
        progress.beat()
        assert out.getvalue() == "still waiting for: rollouts of update 12 (31 s)\n"
        clock.now = 50.0
        progress.line("version 12")
        clock.now = 70.0
        progress.beat()
        assert out.getvalue().endswith("version 12\n")
        clock.now = 80.1
        progress.beat()
        assert out.getvalue().endswith("still waiting for: rollouts of update 12 (80 s)\n")


def test_after_a_phase_the_heartbeat_names_what_it_named_before(clock):
    out = io.StringIO()
    with Progress(30, stream=out, clock=clock) as progress:
        progress.waiting_for("update 3")
        with progress.phase("saving"):
            clock.now = 31
            progress.beat()
        assert "still waiting for: saving (31 s)" in out.getvalue()
        clock.now = 70
        progress.beat()
    assert out.getvalue().endswith("still waiting for: update 3 (70 s)\n")


def test_the_thread_beats_by_itself_and_stops_on_close():
    out = io.StringIO()
    progress = Progress(0.05, stream=out)
    progress.waiting_for("nothing")
    deadline = time.monotonic() + 10
    while "still waiting for: nothing" not in out.getvalue() and time.monotonic() < deadline:
        time.sleep(0.02)
    progress.close()
    told = out.getvalue()
    assert "still waiting for: nothing" in told
    time.sleep(0.15)
    assert out.getvalue() == told


def test_a_terminal_gets_colours_a_live_line_and_no_markup_surprises(clock):
    out = Terminal()
    with Progress(30, stream=out, clock=clock) as progress:
        progress.waiting_for("rollouts of update 1")
        progress.line("version 1 | score 0.10 (+0.05) | [bold]literal[/bold]")
    text = out.getvalue()
    assert "\x1b[" in text
    assert "waiting for: rollouts of update 1" in text
    assert "[bold]literal[/bold]" in text


def test_the_summary_shows_every_row_without_markup():
    out = io.StringIO()
    with Progress(0, stream=out) as progress:
        progress.summary([("directory", "/runs/[demo]"), ("gain", "+0.41")], "Done")
    text = out.getvalue()
    assert "Done" in text
    assert "/runs/[demo]" in text
    assert "+0.41" in text
    assert "\x1b[" not in text


def test_format_update_in_full():
    metrics = {
        "progress/version": 12,
        "perf/step_s": 31.04,
        "reward/score_mean": 0.83,
        "reward/score_gain": 0.41,
        "reward/gold_mean": 0.31,
        "kl/ref_seq": 2.13,
        "completion/len_mean": 23.2,
        "completion/eos_frac": 0.968,
        "perf/gen_tokens_per_s": 580.3,
        "perf/train_tokens_per_s": 370.0,
    }
    assert format_update(metrics, 245) == (
        "version 12 | 31.0 s | score 0.83 (+0.41) | gold 0.31 | KL 2.1 | len 23 | EOS 97% | gen 580 tok/s | "
        "train 370 tok/s | ETA 4 min"
    )


def test_format_update_leaves_out_what_is_missing():
    metrics = {"step": 3, "reward/gold_mean": None, "kl/ref_seq": float("nan"), "reward/score_gain": 0.1}
    assert format_update(metrics) == "version 3"
    assert format_update({"step": 3}, 7200) == "version 3 | ETA 2.0 h"


def test_staleness_is_said_where_there_is_any() -> None:
    metrics = {"progress/version": 12, "staleness/mean": 0.9, "staleness/max": 2.0, "perf/gen_tokens_per_s": 580.0}
    assert format_update(metrics) == "version 12 | staleness 0.9 | gen 580 tok/s"
    assert format_update(metrics | {"staleness/max": 0.0, "staleness/mean": 0.0}) == "version 12 | gen 580 tok/s"
