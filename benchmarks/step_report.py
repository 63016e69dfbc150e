"""From seconds to the table of `ppo_step.py` and `grpo_step.py`: floating-point operations of an update, limits, ratio."""

from statistics import median
from typing import Any

from rich.console import Console
from rich.table import Table

# Phase -> (title, keys in Tandem's metrics, keys in TRL's). TRL runs one backward pass through both models.
PHASES = {
    "generate": ("generate", ["perf/generate_s"], ["generate_s"]),
    "score": ("score", ["perf/score_s"], ["score_s"]),
    "reference": ("reference forward", ["perf/reference_s"], ["reference_s"]),
    "policy_forward": ("policy forward", ["perf/policy_forward_s"], ["policy_forward_s"]),
    "value_forward": ("value forward", ["perf/value_forward_s"], ["value_forward_s"]),
    "policy_backward": ("policy backward", ["perf/policy_backward_s"], []),
    "value_backward": ("value backward", ["perf/value_backward_s"], []),
    "backward": ("backward, whole", [], ["backward_s"]),
    "optimizer": ("optimizer", ["perf/optimizer_s"], ["optimizer_s"]),
    "publish": ("publish weights", ["perf/sync_s"], []),
}


def operations(job: dict[str, Any]) -> dict[str, float]:
    """Floating-point operations that one update needs, by phase.

    A token costs 2 N in a forward pass through the N weights of the linear layers, 2 V d more where it needs logits, and
    twice that in a backward pass (Kaplan et al. 2020, arXiv 2001.08361, section 2.1). Left out: attention scores (3% at
    88 tokens), the optimizer, norms and softmax. A second policy forward pass is not needed, so it is not counted, nor is a
    prompt that a group shares but once; scores are of whole texts. Without a value model there is nothing of it.
    """
    rollouts, completion = job["rollouts"], job["completion_tokens"]
    prompt = len(job["prompts"][0])
    body, head, prompts = 2 * job["body_parameters"], 2 * job["head_parameters"], rollouts // job["samples"]
    forward = (prompts * prompt + rollouts * completion) * body
    logits = rollouts * completion * head
    value = {"value_forward": forward, "value_backward": 2 * forward} if job["estimator"] == "gae" else {}
    return {
        # The last sampled token is never fed; a prompt needs logits at its last token alone.
        "generate": forward - rollouts * body + logits,
        "score": rollouts * (prompt + completion + 1) * body,  # an EOS is appended
        "reference": forward + logits,
        "policy_forward": forward + logits,
        "policy_backward": 2 * (forward + logits),
        **value,
    }


def medians(blocks: list[dict[str, Any]]) -> dict[str, float]:
    """Median of every number over all updates of all blocks, and of `rest`, what an update spends outside the phases.

    The first update of a block is warm-up. Medians of parts need not add up to the median of the whole.
    """
    known = [key for _, ours, theirs in PHASES.values() for key in (*ours, *theirs)]
    updates = [
        update | {"rest": update.get("perf/step_s", update.get("step_s")) - sum(update.get(key, 0.0) for key in known)}
        for block in blocks
        for update in block["updates"][1:]
    ]
    return {key: median(u.get(key, 0.0) for u in updates) for key in updates[0]}


def step_seconds(block: dict[str, Any]) -> float:
    """Median seconds of an update of one block."""
    return median(u.get("perf/step_s", u.get("step_s")) for u in block["updates"][1:])


def summarize(
    job: dict[str, Any], tandem: list[dict[str, Any]], trl: list[dict[str, Any]], limits: dict[str, Any]
) -> dict[str, Any]:
    """All derived numbers. `trl` and the parts of `limits` may be empty where they could not be measured.

    `tandem[i]` and `trl[i]` are the blocks of round i.
    """
    rollouts = job["rollouts"]
    ours, theirs = medians(tandem), medians(trl) if trl else {}
    needs = operations(job)
    peak = max(limits.get("training", {}).get("matmul_gflops", {}).values(), default=None)
    phases = {}
    for name, (_, our_keys, their_keys) in PHASES.items():
        row: dict[str, Any] = {}
        if name.startswith("value") and name not in needs:
            continue
        if our_keys:
            row["tandem_s"] = sum(ours.get(k, 0.0) for k in our_keys)
        if theirs and their_keys:
            row["trl_s"] = sum(theirs.get(k, 0.0) for k in their_keys)
        if name in needs:
            row["tflop"] = needs[name] / 1e12
            row["tandem_gflops"] = needs[name] / 1e9 / row["tandem_s"]
            if peak:
                row["peak_share"] = row["tandem_gflops"] / peak
        phases[name] = row
    total = sum(needs.values())
    tandem_s, trl_s = median(map(step_seconds, tandem)), median(map(step_seconds, trl)) if trl else None
    phases["rest"] = {"tandem_s": ours["rest"]} | ({"trl_s": theirs["rest"]} if theirs else {})
    phases["total"] = {"tandem_s": tandem_s, "tflop": total / 1e12, "tandem_gflops": total / 1e9 / tandem_s}
    summary: dict[str, Any] = {
        "tandem_rollouts_per_s": rollouts / tandem_s,
        "start_s": median(b["start_s"] for b in tandem),
        "first_update_s": median(b["start_s"] + b["updates"][0]["perf/step_s"] for b in tandem),
        "learner_peak_gib": max(b["learner_peak_gib"] for b in tandem),
        "phases": phases,
    }
    if peak:
        phases["total"]["peak_share"] = total / 1e9 / tandem_s / peak
        summary |= {"matmul_peak_gflops": peak, "ideal_s": total / 1e9 / peak}
    if trl and trl_s:
        ratios = [step_seconds(b) / step_seconds(a) for a, b in zip(tandem, trl, strict=False)]
        phases["total"]["trl_s"] = trl_s
        summary |= {
            "trl_rollouts_per_s": rollouts / trl_s,
            "trl_peak_gib": max(b["peak_gib"] for b in trl),
            "ratio": {"median": median(ratios), "min": min(ratios), "max": max(ratios), "rounds": len(ratios)},
        }
    return summary | {"limits": _against_limits(job, ours, limits)}


def _against_limits(job: dict[str, Any], ours: dict[str, float], limits: dict[str, Any]) -> dict[str, float]:
    """Tokens per second of generation and of policy training, beside their limits."""
    made = job["rollouts"] * job["completion_tokens"]
    trained = job["rollouts"] * (len(job["prompts"][0]) + job["completion_tokens"])
    rates = {
        "generate": made / ours["perf/generate_s"],
        "train_policy": trained / (ours["perf/policy_forward_s"] + ours["perf/policy_backward_s"]),
    }
    if found := limits.get("generation"):
        rates |= {"bare_vllm": made / found["bare_s"], "vllm_same_options": made / found["same_options_s"]}
    if found := limits.get("training"):
        rates |= {"bare_packed_loop": trained / found["packed_s"], "bare_hf_loop": trained / found["padded_s"]}
    return rates


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def show(summary: dict[str, Any], console: Console, title: str) -> None:
    """Print the table and the lines under it."""
    table = Table()
    table.add_column("phase of one update")
    for name in ("Tandem s", "TRL s", "TFLOP", "GFLOP/s", "% of peak"):
        table.add_column(name, justify="right")
    titles = {name: entry[0] for name, entry in PHASES.items()}
    for name, row in summary["phases"].items():
        if not row:
            continue
        table.add_row(
            titles.get(name, name),
            _number(row.get("tandem_s"), ".2f"),
            _number(row.get("trl_s"), ".2f"),
            _number(row.get("tflop"), ".3g"),
            _number(row.get("tandem_gflops"), ".0f"),
            _number(row.get("peak_share"), ".0%"),
            end_section=name == "rest",
        )
    console.print(title, soft_wrap=True)
    console.print(table)
    for line in lines(summary):
        console.print(line, soft_wrap=True)


def lines(summary: dict[str, Any]) -> list[str]:
    """What the table says, in words."""
    rates, total = summary["limits"], summary["phases"]["total"]
    result = [
        f"Tandem: {summary['tandem_rollouts_per_s']:.2f} rollouts/s, learner peak {summary['learner_peak_gib']:.1f} GiB, "
        f"first update {summary['first_update_s']:.0f} s after the start"
    ]
    if ratio := summary.get("ratio"):
        result.append(f"TRL: {summary['trl_rollouts_per_s']:.2f} rollouts/s, peak {summary['trl_peak_gib']:.1f} GiB")
        result.append(
            f"Tandem / TRL: {ratio['median']:.2f} x ({ratio['min']:.2f} .. {ratio['max']:.2f} over {ratio['rounds']} rounds)"
        )
    if "ideal_s" in summary:
        result.append(
            f"arithmetic: {total['tflop']:.3g} TFLOP take {summary['ideal_s']:.3g} s at "
            f"{summary['matmul_peak_gflops']:.0f} GFLOP/s, the best measured product; measured "
            f"{total['tandem_s']:.3g} s: {total['peak_share']:.0%} of the peak"
        )
    pairs = [
        ("generation", "generate", "bare_vllm", "bare vLLM"),
        ("generation", "generate", "vllm_same_options", "bare vLLM with Tandem's sampling options"),
        ("policy training", "train_policy", "bare_packed_loop", "bare packed loop"),
        ("policy training", "train_policy", "bare_hf_loop", "bare Hugging Face loop"),
    ]
    for what, ours, limit, name in pairs:
        if limit in rates:
            share = rates[ours] / rates[limit]
            result.append(f"{what}: {rates[ours]:.0f} tok/s, {name} {rates[limit]:.0f}: {share:.0%}")
    return result
