"""The two pictures of a study: the claims with their intervals, and every arm by drift and gain."""

import math
import textwrap

from markupsafe import Markup

from controller.record.number_text import bounds, num
from controller.report import svg
from controller.report.svg import Scale, element, line, text, upright
from studies.five_reasons.contrasts import NOT_JUDGED
from studies.five_reasons.frontier import best_of_n, path_of
from studies.five_reasons.results import Arm, Finding, Study

TONES = {"reproduced": "good", "opposite": "bad", "equivalent": "none", "inconclusive": "unsure", NOT_JUDGED: "none"}
# For the picture that stands alone, which has no style sheet and may lie on a light or a dark page.
ALONE = """
.good{--c:#2a9d63}.bad{--c:#d1574d}.none{--c:#8b919b}.unsure{--c:#c08a1e}
text{font:12px sans-serif;fill:#808894}.grid{stroke:#808894;opacity:.15}.strong{stroke:#808894}
.whisker{stroke:var(--c);stroke-width:3}.mark{fill:var(--c)}.band{fill:#808894;opacity:.18}
.said{fill:var(--c);font-weight:bold}
"""


def forest(study: Study, alone: bool = False) -> Markup:
    """One row a claim: estimate, interval at Holm's level, and the margin as a band around 0.

    Args:
        alone: as a file of its own, with its colours in it.
    """
    width, row, left = 860.0, 46.0, 330.0
    height = row * len(study.claims) + 44.0
    reach = [abs(v) for f in study.claims for v in (*f.interval, f.estimate.mean, f.claim.margin) if math.isfinite(v)]
    most = max(reach, default=1.0) * 1.1
    x = Scale(-most, most, left, width - 130.0)
    end = height - 34.0
    body = [element("style", "", Markup(ALONE))] if alone else []
    for mark in svg.ticks(-most, most, 6):
        body.append(upright("axis strong" if mark == 0 else "grid", x(mark), 6, end))
        body.append(text("tick", x(mark), end + 15, svg.tick_text(mark, 0.1)))
    for i, finding in enumerate(study.claims):
        body += _forest_row(finding, x, 6 + row * (i + 0.5), width)
    axis = "against the claim · 0 · for it: score units (claim 3: area under the curve)"
    body.append(text("label", x(0), height - 4, axis))
    return element(
        "svg", "forest", *body,
        viewBox=f"0 0 {width:.0f} {height:.0f}", role="img", aria_label="the claims with their intervals",
        **({"xmlns": "http://www.w3.org/2000/svg"} if alone else {}),
    )  # fmt: skip


def _forest_row(finding: Finding, x: Scale, y: float, width: float) -> list[Markup]:
    tone, margin = TONES[finding.verdict], finding.claim.margin
    low, high = finding.interval
    words = textwrap.wrap(f"{finding.claim.number}. {finding.claim.title}", 46, break_long_words=False)
    first = y + 4 - 7 * (len(words) - 1)
    body = [element("text", "name", words, x=0, y=first + 14 * k) for k, words in enumerate(words)]
    body.append(element("rect", "band", x=x(-margin), y=y - 12, width=x(margin) - x(-margin), height=24))
    if math.isfinite(low):
        body.append(svg.across(f"whisker {tone}", x(low), x(high), y))
        body.append(element("circle", f"mark {tone}", cx=x(finding.estimate.mean), cy=y, r=5.5))
    body.append(text(f"said {tone}", width, y + 4, finding.verdict + (" *" if finding.is_preliminary else ""), "end"))
    return body


def frontier(study: Study, metric: str, title: str) -> Markup | None:
    """Every arm that answers single turns: gain over SFT against KL; the paths of PPO's seeds and of best of n."""
    arms = [(i + 1, arm, bounds(_gain(arm, metric))) for i, arm in enumerate(study.arms) if _plays_one_turn(arm)]
    marks = [(p, arm, (arm.kl, g[0]), g) for p, arm, g in arms if arm.kl is not None and g[0] is not None]
    if not marks:
        return None
    paths = [("ppo", path_of(m)) for m in study.members if m.arm == "ppo" and metric == "gold"]
    paths += [("plain", best_of_n(m, metric)) for m in study.members if m.arm == "best_of_n"]
    xs = [*(kl for _, _, (kl, _), _ in marks), *(v for _, p in paths for v in p.kl)]
    ys = [0.0, *(v for *_, gain in marks for v in gain if v is not None), *(v for _, p in paths for v in p.gain)]
    plane = svg.plane(xs, ys, ("KL from SFT, nats a sequence", "gain over SFT"), (520.0, 340.0))
    plane.body += [line(f"line thin {css}", plane.at(zip(p.kl, p.gain, strict=True))) for css, p in paths]
    for place, arm, (kl, mean), (_, low, high) in marks:
        [spot] = plane.at([(kl, mean)])
        whisker = []
        if low is not None and high is not None:
            whisker.append(upright("whisker thin", spot[0], plane.y(low), plane.y(high)))
        tooltip = f"{arm.name}\nKL {num(kl, 1)} nats\ngain {num(mean, 2, signed=True)}"
        plane.body.append(svg.numbered_mark(place, tooltip, spot, *whisker))
    return plane.figure(title, f"{title} of every arm against KL")


def _plays_one_turn(arm: Arm) -> bool:
    return arm.members[0].run.setting("environment.name") in (None, "single_turn")


def _gain(arm: Arm, metric: str) -> dict[str, float | None]:
    return (arm.gain if metric == "gold" else arm.proxy_gain).as_dict()
