"""The two pictures of a study: the claims with their intervals, and every arm by drift and gain."""

import math

from controller.record.number_text import bounds, num
from controller.report import svg
from controller.report.curves import room
from controller.report.rendering import esc
from controller.report.svg import Scale
from studies.five_reasons.contrasts import NOT_JUDGED
from studies.five_reasons.frontier import best_of_n, path_of
from studies.five_reasons.results import Arm, Judged, Study

TONES = {"reproduced": "good", "opposite": "bad", "equivalent": "none", "inconclusive": "unsure", NOT_JUDGED: "none"}
# For the picture that stands alone, which has no style sheet and may lie on a light or a dark page.
ALONE = {"good": "#2a9d63", "bad": "#d1574d", "none": "#8b919b", "unsure": "#c08a1e", "ink": "#808894"}


def forest(study: Study, alone: bool = False) -> str:
    """One row a claim: estimate, interval at Holm's level, and the margin as a band around 0.

    Args:
        alone: as a file of its own, with its colours in it.
    """
    width, row, left = 860.0, 46.0, 330.0
    height = row * len(study.claims) + 44.0
    reach = [abs(v) for j in study.claims for v in (*j.interval, j.estimate.mean, j.claim.margin) if math.isfinite(v)]
    most = max(reach, default=1.0) * 1.1
    x = Scale(-most, most, left, width - 130.0)
    end = height - 34.0
    body = []
    for mark in svg.ticks(-most, most, 6):
        at, css = f"{x(mark):.1f}", "axis strong" if mark == 0 else "grid"
        body.append(f'<line class="{css}" x1="{at}" x2="{at}" y1="6" y2="{end:.1f}"/>')
        body.append(
            f'<text class="tick" x="{at}" y="{end + 15:.1f}" text-anchor="middle">{svg.tick_text(mark, 0.1)}</text>'
        )
    for i, judged in enumerate(study.claims):
        body.append(_forest_row(judged, x, 6 + row * (i + 0.5), width))
    body.append(
        f'<text class="label" x="{x(0):.1f}" y="{height - 4:.1f}" text-anchor="middle">against the claim · 0 · for it: '
        "score units (claim 3: area under the curve)</text>"
    )
    style = ""
    if alone:
        rules = "".join(f".{name}{{--c:{ALONE[name]}}}" for name in ("good", "bad", "none", "unsure"))
        style = (
            f"<style>{rules}text{{font:12px sans-serif;fill:{ALONE['ink']}}}.grid{{stroke:{ALONE['ink']};opacity:.15}}"
            f".strong{{stroke:{ALONE['ink']}}}.whisker{{stroke:var(--c);stroke-width:3}}.mark{{fill:var(--c)}}"
            f".band{{fill:{ALONE['ink']};opacity:.18}}.said{{fill:var(--c);font-weight:bold}}</style>"
        )
    namespace = ' xmlns="http://www.w3.org/2000/svg"' if alone else ""
    return (
        f'<svg{namespace} class="forest" viewBox="0 0 {width:.0f} {height:.0f}" role="img" '
        f'aria-label="the claims with their intervals">{style}{"".join(body)}</svg>'
    )


def _forest_row(judged: Judged, x: Scale, y: float, width: float) -> str:
    tone, margin = TONES[judged.verdict], judged.claim.margin
    low, high = judged.interval
    words = _wrapped(f"{judged.claim.number}. {judged.claim.title}", 46)
    first = y + 4 - 7 * (len(words) - 1)
    body = "".join(
        f'<text class="name" x="0" y="{first + 14 * k:.1f}">{esc(line)}</text>' for k, line in enumerate(words)
    )
    body += (
        f'<rect class="band" x="{x(-margin):.1f}" y="{y - 12:.1f}" width="{x(margin) - x(-margin):.1f}" height="24"/>'
    )
    if math.isfinite(low):
        body += f'<line class="whisker {tone}" x1="{x(low):.1f}" x2="{x(high):.1f}" y1="{y:.1f}" y2="{y:.1f}"/>'
        body += f'<circle class="mark {tone}" cx="{x(judged.estimate.mean):.1f}" cy="{y:.1f}" r="5.5"/>'
    said = judged.verdict + (" *" if judged.is_preliminary else "")
    return body + f'<text class="said {tone}" x="{width:.1f}" y="{y + 4:.1f}" text-anchor="end">{said}</text>'


def _wrapped(text: str, most: int) -> list[str]:
    lines = [""]
    for word in text.split():
        if len(lines[-1]) + len(word) > most:
            lines.append("")
        lines[-1] = f"{lines[-1]} {word}".strip()
    return lines


def frontier(study: Study, metric: str, title: str) -> str:
    """Every arm that answers single turns: gain over SFT against KL; the paths of PPO's seeds and of best of n."""
    arms = [(i + 1, arm) for i, arm in enumerate(study.arms) if _plays_one_turn(arm)]
    marks = [(place, arm, arm.kl, _gain(arm, metric)) for place, arm in arms]
    known = [(p, a, kl, g) for p, a, kl, g in marks if kl is not None and g[0] is not None]
    if not known:
        return ""
    paths = [("ppo", path_of(m)) for m in study.members if m.arm == "ppo" and metric == "gold"]
    paths += [("plain", best_of_n(m, metric)) for m in study.members if m.arm == "best_of_n"]
    xs = [0.0, *(kl for _, _, kl, _ in known), *(v for _, p in paths for v in p.kl)]
    ys = [0.0, *(v for *_, g in known for v in g if v is not None), *(v for _, p in paths for v in p.gain)]
    width, height = 520.0, 340.0
    x = Scale(*svg.padded(xs, 0.06), 48.0, width - 14.0)
    y = Scale(*room(ys), height - 36.0, 26.0)
    body = [svg.axes(x, y, "KL from SFT, nats a sequence", "gain over SFT")]
    for css, path in paths:
        points = " ".join(f"{x(kx):.1f},{y(v):.1f}" for kx, v in zip(path.kl, path.gain, strict=True))
        body.append(f'<polyline class="line thin {css}" points="{points}"/>')
    for place, arm, kl, (mean, low, high) in known:
        css = f"m{(place - 1) % 8}"
        text = f"{arm.name}\nKL {num(kl, 1)} nats\ngain {num(mean, 2, signed=True)}"
        whisker, cx, cy = "", f"{x(kl):.1f}", y(mean or 0.0)
        if low is not None and high is not None:
            whisker = f'<line class="whisker thin" x1="{cx}" x2="{cx}" y1="{y(low):.1f}" y2="{y(high):.1f}"/>'
        body.append(
            f'<g class="{css}"><title>{esc(text)}</title>{whisker}<circle class="mark" cx="{cx}" cy="{cy:.1f}" r="8.5"/>'
            f'<text class="place" x="{cx}" y="{cy + 3.6:.1f}" text-anchor="middle">{place}</text></g>'
        )
    return (
        f'<figure class="chart wide"><figcaption><b>{esc(title)}</b></figcaption>'
        f'<svg viewBox="0 0 {width:.0f} {height:.0f}" role="img" aria-label="{esc(title)} of every arm against KL">'
        f"{''.join(body)}</svg></figure>"
    )


def _plays_one_turn(arm: Arm) -> bool:
    return arm.members[0].run.setting("environment.name") in (None, "single_turn")


def _gain(arm: Arm, metric: str) -> tuple[float | None, float | None, float | None]:
    return bounds((arm.gain if metric == "gold" else arm.proxy_gain).as_dict())
