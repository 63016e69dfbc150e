"""Everything drawn over versions or steps: the PPO small multiples, the frontier, the losses of SFT and reward models."""

import math

from controller.alarms.limits import limits_of
from controller.record.evaluation import judged_model, judged_name, judged_title
from controller.record.number_text import bounds, compact
from controller.record.reader import Run, number
from controller.report import svg
from controller.report.rendering import absent, esc, section
from controller.report.svg import Scale, Series, line_chart


def models_of(run: Run) -> list[tuple[str, str, str]]:
    """(name in evaluation.json, as a reader knows it, colour class) of the models that were judged."""
    third = judged_name(run.evaluation)
    known = [("base", "Base", "base"), ("sft", "SFT", "sft"), (third, judged_title(run.evaluation), "ppo")]
    return [entry for entry in known if isinstance((run.evaluation.get("models") or {}).get(entry[0]), dict)]


# (title, unit, [(name, colour class, metric)]), each drawn where a run has it: not every estimator has all.
PPO_CHARTS: tuple[tuple[str, str, tuple[tuple[str, str, str], ...]], ...] = (
    ("Score", "score", (("learned", "proxy", "reward/score_mean"), ("gold", "gold", "reward/gold_mean"))),
    ("KL from reference", "nats a sequence", (("KL", "plain", "kl/ref_seq"),)),
    ("Length", "tokens", (("mean", "plain", "completion/len_mean"), ("p95", "soft", "completion/len_p95"))),
    ("Ends with EOS", "share of completions", (("EOS share", "plain", "completion/eos_frac"),)),
    ("Explained variance", "share, value model", (("explained variance", "plain", "value/explained_var"),)),
    ("Entropy", "nats a token", (("entropy", "plain", "policy/entropy"),)),
    ("Change in one update", "approximate KL", (("approx_kl", "plain", "policy/approx_kl"),)),
    ("Clipped tokens", "share", (("clipfrac", "plain", "policy/clipfrac"),)),
    ("Sampler against learner", "mismatch k3, nats a token", (("k3", "plain", "kl/mismatch_k3"),)),
    (
        "Gradients",
        "L2 norm before clipping",
        (("policy", "ppo", "policy/grad_norm"), ("value", "soft", "value/grad_norm")),
    ),
    ("Distinct bigrams", "share", (("distinct bigrams", "plain", "completion/distinct_2"),)),
    (
        "Speed",
        "tokens a second",
        (("generate", "plain", "perf/gen_tokens_per_s"), ("train", "soft", "perf/train_tokens_per_s")),
    ),
    ("Kept by RAFT", "share of rollouts", (("kept", "plain", "raft/kept_frac"),)),
    ("Effective sample size of RWR", "share of rollouts", (("share", "plain", "rwr/ess"),)),
    ("DPO margin", "best against worst", (("mean", "plain", "online_dpo/margin_mean"),)),
    ("DPO accuracy", "share of pairs", (("accuracy", "plain", "online_dpo/accuracy"),)),
    ("Lambda", "weight of the policy loss", (("lambda", "plain", "combined/lambda"),)),
)


def ppo_curves(run: Run) -> str:
    charts, constant, longest = [], [], 0
    heading = f"{run.loop_title}, version by version"
    for title, unit, lines in PPO_CHARTS:
        series = [Series(name, css, run.curve("ppo", metric)) for name, css, metric in lines]
        series = [s for s in series if s.curve]
        if not series:
            continue
        values = [value for s in series for _, value in s.curve]
        if len(values) > 1 and len(set(values)) == 1:
            constant.append(f"{title.lower()} {compact(values[0])}")
            continue
        longest = max(longest, *(len(s.curve) for s in series))
        limits = [limit for _, _, metric in lines for limit in limits_of(metric)]
        max_kl = number(run.setting("evaluate.max_kl"))
        if lines[0][2] == "kl/ref_seq" and max_kl is not None:
            limits.append((max_kl, "limit of the verdict"))
        charts.append(line_chart(title, series, unit=unit, limits=limits))
    if not charts and not constant:
        cached = f"{run.loop_title} came from the cache: its curves are in the run that trained it."
        missing = cached if run.stage("ppo").get("cached") else f"No metrics of {run.loop_title} in this run yet."
        return section("curves", heading, absent(missing))
    intro = (
        "One point per update: the rollouts that it trained on, and the step that it took to the next version. The number "
        "is the last value; hover for the others."
    )
    if longest >= svg.SMOOTH_FROM:
        intro += " Thin: each update. Bold: moving mean."
    body = f'<div class="charts">{"".join(charts)}</div>'
    if constant:
        body += f'<p class="note">The same at every version: {esc(", ".join(constant))}.</p>'
    return section("curves", heading, body, intro)


def frontier(run: Run) -> str:
    """Gold and learned score against the distance from the reference (Gao et al. 2022, figure 1)."""
    panels = [
        _frontier_panel(run, "Gold judge", "gold", "reward/gold_mean"),
        _frontier_panel(run, "Learned score (proxy)", "proxy", "reward/score_mean"),
    ]
    drawn = "".join(panel for panel in panels if panel)
    if not drawn:
        return section(
            "frontier", "Frontier", absent("Needs a KL and a score: no metrics of rollouts, no evaluation yet.")
        )
    versions = [step for step, _ in run.curve("ppo", "kl/ref_seq")]
    key = ""
    if versions:
        key = (
            f'<p class="ramp"><span>version {versions[0]:.0f}</span><i></i><span>{versions[-1]:.0f}</span>'
            "<em>small points: rollouts in training</em><em>large marks: evaluation prompts, bars are 95% intervals"
            "</em></p>"
        )
    intro = (
        "How much was gained for how much drift. A good run climbs steeply on the left panel; where the right panel goes "
        "on climbing while the left one bends down, the reward model is being exploited."
    )
    return section("frontier", "Frontier: score against KL", f'{key}<div class="pair">{drawn}</div>', intro)


def _frontier_panel(run: Run, title: str, measure: str, metric: str) -> str:
    kl = dict(run.curve("ppo", "kl/ref_seq"))
    points = [(step, kl.get(step), value) for step, value in run.curve("ppo", metric)]
    trail = [(step, x, y) for step, x, y in points if x is not None and y is not None]
    trail = trail[:: max(1, math.ceil(len(trail) / svg.MAX_POINTS))]
    marks, levels = _evaluation_marks(run, measure, max((x for _, x, _ in trail), default=0.0))
    best = [(bounds(row.get(measure))[0], row) for row in judged_model(run.evaluation).get("best_of_n") or []]
    best_of_n = [(float(row["kl"]), value) for value, row in best if value is not None]
    if not trail and not marks:
        return ""
    xs = [x for _, x, _ in trail] + [x for x, _ in best_of_n] + [v for _, xb, _ in marks for v in xb if v is not None]
    ys = (
        [y for _, _, y in trail]
        + [y for _, y in best_of_n]
        + [v for _, _, yb in marks for v in yb if v is not None]
        + [y for _, y in levels]
    )
    width, height = 480.0, 320.0
    x = Scale(*svg.padded([0.0, *xs], 0.06), 48.0, width - 14.0)
    y = Scale(*room(ys), height - 36.0, 26.0)
    body = [svg.axes(x, y, "KL from the reference, nats a sequence", "score")]
    names = {css: title for _, title, css in models_of(run)}
    for model, level in levels:
        body.append(
            f'<line class="level {model}" x1="{x.start}" x2="{x.end}" y1="{y(level):.1f}" y2="{y(level):.1f}"/>'
            f'<text class="mark-text {model}" x="{x.end - 4:.1f}" y="{y(level) - 5:.1f}" text-anchor="end">'
            f"{esc(names[model])}</text>"
        )
    if best_of_n:  # of 1, 2, 4, ... samples, over the bound of its KL
        line = " ".join(f"{x(kx):.1f},{y(v):.1f}" for kx, v in best_of_n)
        body.append(f'<polyline class="edge" points="{line}"/>')
    if len(trail) > 1:
        line = " ".join(f"{x(kx):.1f},{y(v):.1f}" for _, kx, v in trail)
        body.append(f'<polyline class="trail" points="{line}"/>')
    for i, (step, kx, v) in enumerate(trail):
        share = 100 * i / max(1, len(trail) - 1)
        text = f"version {step:g}\nKL {compact(kx)} nats\n{title.lower()} {compact(v)}"
        body.append(
            f'<circle class="version" style="--at:{share:.0f}%" cx="{x(kx):.1f}" cy="{y(v):.1f}" r="3.4">'
            f"<title>{esc(text)}</title></circle>"
        )
    dots = [(x(kx), y(v)) for _, kx, v in trail]
    body += [_mark(model, names[model], xb, yb, x, y, title, dots) for model, xb, yb in marks]
    return (
        f'<figure class="chart wide"><figcaption><b>{esc(title)}</b></figcaption><svg viewBox="0 0 {width:.0f} '
        f'{height:.0f}" role="img" aria-label="{esc(title)} against KL">{"".join(body)}</svg></figure>'
    )


Bounds = tuple[float | None, float | None, float | None]


def _evaluation_marks(
    run: Run, measure: str, furthest: float
) -> tuple[list[tuple[str, Bounds, Bounds]], list[tuple[str, float]]]:
    """Models, by their colour class, to mark as points, and those to draw as a level, because their KL is unknown or would
    squeeze the axis."""
    found = []
    for model, _, css in models_of(run):
        values = run.evaluation["models"][model]
        found.append((css, bounds(values.get("kl")), bounds(values.get(measure))))
        if css != "base":
            furthest = max(furthest, bounds(values.get("kl"))[0] or 0.0)
    marks, levels = [], []
    for model, kl_bounds, bounds_ in found:
        if bounds_[0] is None:
            continue
        if kl_bounds[0] is not None and kl_bounds[0] <= 2 * (furthest or math.inf):
            marks.append((model, kl_bounds, bounds_))
        else:
            levels.append((model, bounds_[0]))
    return marks, levels


def room(values: list[float]) -> tuple[float, float]:
    """As `svg.padded`, but scores have no natural zero to stop at."""
    room = (max(values) - min(values)) * 0.1 or 1.0
    return min(values) - room, max(values) + room


def _emptiest(at: tuple[float, float], dots: list[tuple[float, float]], x: Scale) -> tuple[float, float, str]:
    """Of the four corners beside a mark, the one where a label covers the fewest points."""
    corners = [(dx, dy, "start" if dx > 0 else "end") for dx in (11.0, -11.0) for dy in (-11.0, 20.0)]

    def covered(corner: tuple[float, float, str]) -> int:
        left = at[0] + (corner[0] if corner[0] > 0 else corner[0] - 32)
        inside = [1 for px, py in dots if left <= px <= left + 32 and abs(py - (at[1] + corner[1] - 4)) < 9]
        return len(inside) + (1000 if left + 32 > x.end or left < x.start else 0)

    return min(corners, key=covered)


def _mark(
    model: str, name: str, xb: Bounds, yb: Bounds, x: Scale, y: Scale, title: str, dots: list[tuple[float, float]]
) -> str:
    at_x, at_y = x(xb[0] or 0.0), y(yb[0] or 0.0)
    out = ""
    if xb[1] is not None and xb[2] is not None:
        out += (
            f'<line class="whisker {model}" x1="{x(xb[1]):.1f}" x2="{x(xb[2]):.1f}" y1="{at_y:.1f}" y2="{at_y:.1f}"/>'
        )
    if yb[1] is not None and yb[2] is not None:
        out += (
            f'<line class="whisker {model}" x1="{at_x:.1f}" x2="{at_x:.1f}" y1="{y(yb[1]):.1f}" y2="{y(yb[2]):.1f}"/>'
        )
    # Shape as well as colour tells the models apart.
    shape = {
        "base": f'<rect class="mark base" x="{at_x - 5:.1f}" y="{at_y - 5:.1f}" width="10" height="10"/>',
        "sft": f'<path class="mark sft" d="M{at_x:.1f} {at_y - 7:.1f}l7 7-7 7-7-7z"/>',
        "ppo": f'<circle class="mark ppo" cx="{at_x:.1f}" cy="{at_y:.1f}" r="6.2"/>',
    }[model]
    dx, dy, anchor = _emptiest((at_x, at_y), dots, x)
    text = f"{name}, evaluation\nKL {compact(xb[0])} nats\n{title.lower()} {compact(yb[0])}"
    return (
        f"<g><title>{esc(text)}</title>{out}{shape}"
        f'<text class="mark-text {model}" x="{at_x + dx:.1f}" y="{at_y + dy:.1f}" text-anchor="{anchor}">'
        f"{esc(name)}</text></g>"
    )


def training_losses(run: Run) -> str:
    """Loss of SFT, loss and accuracy of the reward models and of stage preference."""
    charts = []
    sft = [
        Series("training", "sft", run.curve("sft", "sft/loss")),
        Series("held out", "soft", run.curve("sft", "sft/eval_loss")),
    ]
    if any(s.curve for s in sft):
        charts.append(line_chart("SFT loss", sft, unit="nats a token", x_label="step"))
    models = run.stages_of("reward_model/")
    colours = {"reward_model/proxy": "proxy", "reward_model/gold": "gold"}
    for title, unit, metric in (
        ("Pair loss", "nats a pair, reward models", "reward_model/loss"),
        ("Pairs right", "share of pairs, reward models", "reward_model/accuracy"),
    ):
        series = [Series(m.partition("/")[2], colours.get(m, "plain"), run.curve(m, metric)) for m in models]
        if any(s.curve for s in series):
            charts.append(line_chart(title, series, unit=unit, x_label="step"))
    charts += _method_charts(run)
    notes = [
        f"{esc(stage.get('name'))} came from the cache: its curve is in the run that trained it."
        for stage in run.stages
        if stage.get("cached")
        and str(stage.get("name")).startswith(("sft", "reward_model", "preference", "filtered_sft"))
        and not run.stages_of(str(stage["name"]))
    ]
    body = f'<div class="charts">{"".join(charts)}</div>' if charts else ""
    body += "".join(absent(note) for note in notes)
    intro = "Each should flatten out; a held-out loss that turns up again means too many epochs." if charts else ""
    before, after = (number((run.stage("sft").get("metrics") or {}).get(k)) for k in ("eval_loss_before", "eval_loss"))
    if before is not None and after is not None:
        intro = f"SFT took the held-out loss from {compact(before)} to {compact(after)} nats a token. {intro}"
    missing = absent("No losses of stages that train on data alone yet.")
    return section("losses", "Trained on data alone: losses", body or missing, intro)


# (title, unit, stage, [(name, colour class, metric)]) of the stages that stand in PPO's place
METHOD_CHARTS: tuple[tuple[str, str, str, tuple[tuple[str, str, str], ...]], ...] = (
    (
        "Filtered SFT loss",
        "nats a token",
        "filtered_sft",
        (("training", "ppo", "sft/loss"), ("held out", "soft", "sft/eval_loss")),
    ),
    ("Preference loss", "nats a pair", "preference", (("loss", "ppo", "preference/loss"),)),
    ("Preferred pairs", "share, by the policy's own scores", "preference", (("right", "ppo", "preference/accuracy"),)),
    ("Likelihood of the texts", "log p, nats a token", "preference", (("log p", "ppo", "preference/token_logprob"),)),
)


def _method_charts(run: Run) -> list[str]:
    charts = []
    for title, unit, stage, lines in METHOD_CHARTS:
        series = [Series(name, css, run.curve(stage, metric)) for name, css, metric in lines]
        if any(s.curve for s in series):
            charts.append(line_chart(title, series, unit=unit, x_label="step"))
    return charts
