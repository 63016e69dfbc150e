"""Everything drawn over versions or steps: the PPO small multiples, the frontier, the losses of SFT and reward models."""

import math
from collections.abc import Iterable, Mapping, Sequence
from itertools import cycle

from markupsafe import Markup

from contracts.catalogue import catalogue, charted
from contracts.metrics import ESTIMATOR, Metric, declared
from controller.alarms.limits import limits_of
from controller.record.evaluation import judged_model, judged_name, judged_title
from controller.record.number_text import bounds, compact, number
from controller.record.reader import Run
from controller.report import svg
from controller.report.rendering import macros
from controller.report.svg import JUDGES, Scale, Series, across, element, line, line_chart, text, upright

RUN = macros("run.html")


def models_of(run: Run) -> list[tuple[str, str, str]]:
    """(name in evaluation.json, as a reader knows it, colour class) of the models that were judged."""
    third = judged_name(run.evaluation)
    known = [("base", "Base", "base"), ("sft", "SFT", "sft"), (third, judged_title(run.evaluation), "ppo")]
    return [entry for entry in known if isinstance((run.evaluation.get("models") or {}).get(entry[0]), dict)]


Line = tuple[str, str, str]  # name, colour class, metric
# A metric alone, with its own title and unit; several, with a title for all.
Chart = str | tuple[str, tuple[Line, ...]]

BY_SOURCE, COLOURS = "heldout/accuracy", ("plain", "soft", "proxy", "gold", "ppo", "sft", "base")
# Each drawn where a run has it: not every estimator has all. Behind them come those that estimators have of their own.
PPO_CHARTS: tuple[Chart, ...] = (
    ("Score", (("learned", "proxy", "reward/score_mean"), ("gold", "gold", "reward/gold_mean"))),
    "heldout/accuracy",
    "kl/ref_seq",
    "reward/equal_groups_frac",
    ("Length", (("mean", "plain", "completion/len_mean"), ("p95", "soft", "completion/len_p95"))),
    "completion/eos_frac",
    "value/explained_var",
    "policy/entropy",
    "policy/approx_kl",
    "policy/clipfrac",
    "kl/mismatch_k3",
    ("Gradients", (("policy", "ppo", "policy/grad_norm"), ("value", "soft", "value/grad_norm"))),
    "completion/distinct_2",
    ("Speed", (("generate", "plain", "perf/gen_tokens_per_s"), ("train", "soft", "perf/train_tokens_per_s"))),
    "combined/lambda",
)


def described(chart: Chart, metrics: Mapping[str, Metric]) -> tuple[str, str, tuple[Line, ...]]:
    """Title, unit and lines of a chart."""
    if isinstance(chart, str):
        chart = metrics[chart].title, ((metrics[chart].title, "plain", chart),)
    title, lines = chart
    declaration = declared(lines[0][2], metrics)
    assert declaration is not None
    return title, declaration.unit, lines


def series_of(run: Run, stage: str, lines: Iterable[Line]) -> list[Series]:
    """Of the metrics that the run has; not every estimator has all."""
    found = [Series(name, css, run.curve(stage, metric)) for name, css, metric in lines]
    return [s for s in found if s.curve]


# Of the stages that train on data alone: of SFT, and of those in PPO's place.
SFT_CHART: Chart = ("SFT loss", (("training", "sft", "sft/loss"), ("held out", "soft", "sft/eval_loss")))
METHOD_CHARTS: tuple[tuple[str, Chart], ...] = (
    ("filtered_sft", ("Filtered SFT loss", (("training", "ppo", "sft/loss"), ("held out", "soft", "sft/eval_loss")))),
    ("preference", "preference/loss"),
    ("preference", "preference/accuracy"),
    ("preference", "preference/token_logprob"),
)
ON_DATA = ("sft", "reward_model", "preference", "filtered_sft")  # how the names of these stages begin


def _by_source(run: Run) -> list[Chart]:
    """The held-out accuracy of each source that the run tells apart."""
    names = sorted({key for row in run.metrics for key in row if key.startswith(f"{BY_SOURCE}/")})
    lines = tuple((key.rpartition("/")[2], css, key) for key, css in zip(names, cycle(COLOURS), strict=False))
    return [("Held-out accuracy by source", lines)] if lines else []


def ppo_curves(run: Run) -> Markup:
    metrics = catalogue()
    charts, constant, longest = [], [], 0
    for chart in (*PPO_CHARTS, *_by_source(run), *charted(ESTIMATOR, metrics)):
        title, unit, lines = described(chart, metrics)
        series = series_of(run, "ppo", lines)
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
    return RUN.curves(run, charts, constant, is_smoothed=longest >= svg.SMOOTH_FROM)


def frontier(run: Run) -> Markup:
    """Gold and learned score against the distance from the reference (Gao et al. 2022, figure 1)."""
    panels = [panel for judge in JUDGES if (panel := _frontier_panel(run, *judge))]
    versions = [f"{step:.0f}" for step, _ in run.curve("ppo", "kl/ref_seq")]
    return RUN.frontier(panels, versions)


def _frontier_panel(run: Run, title: str, measure: str, metric: str) -> Markup | None:
    kl = dict(run.curve("ppo", "kl/ref_seq"))
    points = [(step, kl.get(step), value) for step, value in run.curve("ppo", metric)]
    trail = [(step, x, y) for step, x, y in points if x is not None and y is not None]
    trail = trail[:: max(1, math.ceil(len(trail) / svg.MAX_POINTS))]
    marks, levels = _evaluation_marks(run, measure, max((x for _, x, _ in trail), default=0.0))
    best = [(bounds(row.get(measure))[0], row) for row in judged_model(run.evaluation).get("best_of_n") or []]
    best_of_n = [(float(row["kl"]), value) for value, row in best if value is not None]
    if not trail and not marks:
        return None
    known = [(x, y) for _, x, y in trail] + best_of_n
    xs = [x for x, _ in known] + [v for _, xb, _ in marks for v in xb if v is not None]
    ys = [y for _, y in known] + [v for _, _, yb in marks for v in yb if v is not None] + [y for _, y in levels]
    plane = svg.plane(xs, ys, ("KL from the reference, nats a sequence", "score"))
    x, y = plane.x, plane.y
    names = {css: name for _, name, css in models_of(run)}
    for model, level in levels:
        plane.body.append(across(f"level {model}", x.start, x.end, y(level)))
        plane.body.append(text(f"mark-text {model}", x.end - 4, y(level) - 5, names[model], "end"))
    if best_of_n:  # of 1, 2, 4, ... samples, over the bound of its KL
        plane.body.append(line("edge", plane.at(best_of_n)))
    dots = plane.at((kx, v) for _, kx, v in trail)
    if len(trail) > 1:
        plane.body.append(line("trail", dots))
    for i, ((step, kx, v), (cx, cy)) in enumerate(zip(trail, dots, strict=True)):
        share = f"--at:{100 * i / max(1, len(trail) - 1):.0f}%"
        tooltip = element("title", "", f"version {step:g}\nKL {compact(kx)} nats\n{title.lower()} {compact(v)}")
        plane.body.append(element("circle", "version", tooltip, style=share, cx=cx, cy=cy, r=3.4))
    for model, xb, yb in marks:
        told = f"{names[model]}, evaluation\nKL {compact(xb[0])} nats\n{title.lower()} {compact(yb[0])}"
        plane.body.append(_mark(plane, model, names[model], told, xb, yb, dots))
    return plane.figure(title, f"{title} against KL")


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
    for model, kl, score in found:
        if score[0] is None:
            continue
        if kl[0] is not None and kl[0] <= 2 * (furthest or math.inf):
            marks.append((model, kl, score))
        else:
            levels.append((model, score[0]))
    return marks, levels


def _emptiest(at: svg.Point, dots: Sequence[svg.Point], x: Scale) -> tuple[float, float, str]:
    """Of the four corners beside a mark, the one where a label covers the fewest points."""
    corners = [(dx, dy, "start" if dx > 0 else "end") for dx in (11.0, -11.0) for dy in (-11.0, 20.0)]

    def covered(corner: tuple[float, float, str]) -> int:
        left = at[0] + (corner[0] if corner[0] > 0 else corner[0] - 32)
        inside = [1 for px, py in dots if left <= px <= left + 32 and abs(py - (at[1] + corner[1] - 4)) < 9]
        return len(inside) + (1000 if left + 32 > x.end or left < x.start else 0)

    return min(corners, key=covered)


def _mark(
    plane: svg.Plane, model: str, name: str, tooltip: str, xb: Bounds, yb: Bounds, dots: Sequence[svg.Point]
) -> Markup:
    [(at_x, at_y)] = plane.at([(xb[0] or 0.0, yb[0] or 0.0)])
    out = [element("title", "", tooltip)]
    if xb[1] is not None and xb[2] is not None:
        out.append(across(f"whisker {model}", plane.x(xb[1]), plane.x(xb[2]), at_y))
    if yb[1] is not None and yb[2] is not None:
        out.append(upright(f"whisker {model}", at_x, plane.y(yb[1]), plane.y(yb[2])))
    # Shape as well as colour tells the models apart.
    shape = {
        "base": element("rect", "mark base", x=at_x - 5, y=at_y - 5, width=10, height=10),
        "sft": element("path", "mark sft", d=f"M{at_x:.1f} {at_y - 7:.1f}l7 7-7 7-7-7z"),
        "ppo": element("circle", "mark ppo", cx=at_x, cy=at_y, r=6.2),
    }[model]
    dx, dy, anchor = _emptiest((at_x, at_y), dots, plane.x)
    return element("g", "", *out, shape, text(f"mark-text {model}", at_x + dx, at_y + dy, name, anchor))


def training_losses(run: Run) -> Markup:
    """Loss of SFT, loss and accuracy of the reward models and of stage preference."""
    models = run.stages_of("reward_model/")
    colours = {"reward_model/proxy": "proxy", "reward_model/gold": "gold"}
    drawn = []
    for stage, chart in (("sft", SFT_CHART), *METHOD_CHARTS):
        title, unit, lines = described(chart, catalogue())
        drawn.append((title, unit, series_of(run, stage, lines)))
    of_models = []
    for metric in ("reward_model/loss", "reward_model/accuracy"):
        title, unit, _ = described(metric, catalogue())
        found = [Series(m.partition("/")[2], colours.get(m, "plain"), run.curve(m, metric)) for m in models]
        of_models.append((title, f"{unit}, reward models", found))
    charts = [
        line_chart(title, series, unit=unit, x_label="step")
        for title, unit, series in [drawn[0], *of_models, *drawn[1:]]
        if any(s.curve for s in series)
    ]
    cached = [
        stage["name"]
        for stage in run.stages
        if stage.get("cached") and str(stage.get("name")).startswith(ON_DATA) and not run.stages_of(str(stage["name"]))
    ]
    sft = run.stage("sft").get("metrics") or {}
    before, after = (number(sft.get(name)) for name in ("eval_loss_before", "eval_loss"))
    return RUN.losses(charts, cached, None if before is None or after is None else (before, after))
