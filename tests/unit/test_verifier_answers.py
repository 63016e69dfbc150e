"""Right answers in the ways people write them, and ordinary wrong ones, through the processes that verifiers run in."""

import inspect
import json
import re
import time
from typing import Any

import pytest

from contracts.config import ScorerConfig
from contracts.records import Score
from reward_service.kinds.verifier import VerifierPool
from reward_service.verifier import find_verifier
from reward_service.verifiers import math, reasoning_gym

Table = list[tuple[Any, list[str], list[str]]]  # (row, or its answer; right completions; wrong ones)
MATH: Table = [
    (
        "5",
        [
            "5",
            "5.0",
            "10/2",
            "The answer is 5.",
            "the answer is: 5",
            "Answer: 5",
            "Answer:\n5",
            "**Answer:** 5",
            "The answer is **5**",
            "The final answer is $5$.",
            "The answer is $\\frac{10}{2}$",
            "The answer is 5 apples.",
            "She has 5 apples left.",
            "It is 5.",
            "So it's 5.",
            "So x is 5",
            "5 it is!",
            "2 + 3 = 5",
            "x = 5",
            "$$5$$",
            "\\[ x = 5 \\]",
            "#### 5",
            "<answer>5</answer>",
            "\\boxed{5}",
            "So we get $\\boxed{5}$.",
            "\\boxed{5\\text{ cm}}",
            "The result is $5\\text{ cm}$.",
            "The answer is 5, because 2+3=5.",
            "The answer is 3. Wait, no. The answer is 5.",
            "Therefore, the answer is 5!",
            "The answer is 5. This result is correct.",
            "Answer: 5\n\n#### Explanation\nAs said.",
            "The answer is 5 dollars every day at the farmers market.",
            "The answer is 5 apples and she is happy.",
            "f(2, 3) = g(1, 4) = 5",
        ],
        [
            "",
            "6",
            "-5",
            "50",
            "5.1",
            "0.5",
            "0.05",
            "15",
            "5/2",
            "\\frac{5}{2}",
            "5^2",
            "5e1",
            "5x",
            "x+5",
            "5!",
            "5:1",
            "5 5",
            "5 dozen",
            "5 million",
            "five thousand and 5 hundred",
            "5, 6",
            "$5,6$",
            "[5, 6]",
            "\\boxed{}",
            "\\boxed{5",
            "\\boxed{5, 6}",
            "\\boxed{4} and then 5",
            "The answer is 3.",
            "The answer is 5 or 6.",
            "The answer is not 5.",
            "It is not 5.",
            "It is -5.",
            "It is 5x.",
            "Is it 5 or 6?",
            "It is 6, so it's no 5",
            "The answer is 5. Actually, the answer is 6.",
            "The answer is 7 because 5+2=7.",
            "The answer is unclear, maybe 5 or 4",
            "between 4 and 6",
            "The number of apples is 5 and of pears is 6",
            "I do not know",
            "\\boxed{5a}",
            "5k",
            "The answer is x = 3 or x = 5.",
            "\\boxed{x=3, y=5}",
            "x = 3; x = 5",
            "There are 5-6 apples.",
            "It doesn't equal 5.",
            "It never was 5.",
            "The answer is 5 quarters.",
            "The answer is 5. No, the answer is not 5.",
            "5 in 3",
        ],
    ),
    ("2a", ["2a", "a*2", "a + a"], ["2", "2b", "\\boxed{2}"]),
    ("12k", ["12k", "12 k"], ["12", "12000"]),
    ("3t", ["3t"], ["3"]),
    ("2ab", ["2ab", "2ba"], ["2"]),
    ("\\frac{3}{2}t", ["\\frac{3t}{2}", "\\frac{3}{2}t", "3t/2"], ["\\frac{3}{2}", "1.5"]),
    ("x t", ["xt", "t x", "x*t"], ["x", "t"]),
    ("5 m", ["5 m", "5", "5 m."], ["5 s", "5 km"]),
    ("3 kg", ["3 kg", "3"], ["3 g"]),
    ("6.63e-34", ["6.63e-34", "6.63 \\times 10^{-34}"], ["1.60e-19", "0.0", "6.64e-34"]),
    ("0.333333", ["1/3", "0.3333333"], ["0.33", "0.333"]),
    ("3/4", ["3/4", "0.75"], ["3", "The answer is 3 tenths."]),
    ("125", ["125"], ["0,125"]),
    ("0.5", ["0.5", "50%"], ["0.5%", "5%"]),
    ("5 percent", ["5%", "5", "0.05"], ["500%"]),
    (
        "$18",
        ["The answer is $18.", "Janet makes $18 every day.", "\\$18", "18 dollars", "\\boxed{\\$18}", "$18.00"],
        ["$19", "$1.80", "$180", "$18 or $19", "The answer is €18.", "£18"],
    ),
    (
        "Natalia sold 48/2 = <<48/2=24>>24 clips in May.\n#### 72",
        ["72", "#### 72", "The answer is 72 clips."],
        ["24", "48", "#### 24"],
    ),
    (
        "1/2",
        ["0.5", ".5", "1/2", "$1/2$", "\\frac12", "\\dfrac{1}{2}", "2/4", "50%", "\\boxed{\\frac{1}{2}}"],
        ["1/3", "2", "0.49", "-1/2", "1/2 or 1/3", "5%", "\\frac{2}{1}", "1", "0.505"],
    ),
    ("3,000", ["3000", "3,000", "3{,}000", "3000.00", "3\\,000", "3 thousand"], ["3", "300", "30000", "3.000"]),
    # Markdown.
    (
        "18",
        [
            "So she makes **18** dollars.",
            "The total is **18**.",
            "Total: **18**",
            "Janet makes **$18** every day.",
            "She makes **18 dollars** every day.",
            "The answer is **18** dollars.",
            "The answer is **$18**.",
            "**Answer: 18**",
            "She has __18__ left.",
            "2**4 + 2 = 18",
            "2**4 + 2 = **18**",
        ],
        ["So she makes **19** dollars.", "The answer is **not 18**", "**18** or **19**", "2**18", "18**2"],
    ),
    ("1234567", ["1,234,567", "1 234 567"], ["1,234", "123456", "12,345,67"]),
    ("50%", ["50%", "50 percent", "0.5", "1/2", "50", "\\boxed{50\\%}"], ["5%", "500%", "0.05", "49%"]),
    (
        "\\sqrt{2}",
        ["\\sqrt{2}", "\\sqrt2", "sqrt(2)", "√2", "2^{1/2}", "\\boxed{\\sqrt{2}}", "\\frac{2}{\\sqrt{2}}"],
        ["2", "\\sqrt{3}", "1.4142", "-\\sqrt{2}", "\\sqrt[3]{2}"],
    ),
    (
        "\\frac{\\pi}{4}",
        ["pi/4", "π/4", "0.25\\pi", "\\boxed{\\frac{1}{4}\\pi}"],
        ["45^\\circ", "\\pi", "4/\\pi", "0.785"],
    ),
    (
        "x^2+2x+1",
        ["(x+1)^2", "1+2x+x^2", "x**2 + 2*x + 1", "The answer is $x^2 + 2x + 1$."],
        ["x^2+2x", "(x-1)^2", "x^2+2x+2", "y^2+2y+1", "it is x^2"],
    ),
    (
        "(3, 4)",
        ["(3,4)", "The answer is $(3, 4)$.", "\\left(3,4\\right)"],
        ["(4,3)", "(3,5)", "3, 4", "4, 3", "[3,4]", "(3,4]", "\\{3,4\\}", "7"],
    ),
    ("[1, 2)", ["[1,2)", "\\boxed{[1,2)}"], ["(1,2)", "[1,2]", "(1,2]"]),
    (
        "\\{1, 2\\}",
        ["\\{2,1\\}", "1, 2", "1 and 2", "\\boxed{1 \\text{ and } 2}"],
        ["1", "\\{1\\}", "\\{1,2,3\\}", "12"],
    ),
    ("x=5", ["x = 5", "5", "\\boxed{x=5}"], ["y=6", "x=6", "-5"]),
    (
        "5 cm",
        ["5cm", "5\\text{ cm}", "5", "The answer is 5 cm.", "\\boxed{5\\,\\text{cm}}"],
        ["5 m", "5 mm", "5 km", "0.05 m", "50 cm", "5 cm^2"],
    ),
    ("-3", ["−3", "- 3", "The answer is -3."], ["3", "+3", "-3.5", "-30"]),
    ("2.5", ["5/2", "2 1/2", "2\\frac{1}{2}", "The answer is 2.5 hours"], ["2.4", "25", "2,5,1", "-2.5"]),
    ("1.5 million", ["1500000", "1,500,000", "1.5 million"], ["1.5", "1.5 billion"]),
    ("2^{100}", ["2^100", "1267650600228229401496703205376", "4^{50}"], ["2^{99}", "100^2", "2^{10}"]),
    ("90^\\circ", ["90", "90 degrees", "90°"], ["80^\\circ", "\\pi"]),
    (
        "\\begin{pmatrix}1&2\\\\3&4\\end{pmatrix}",
        ["\\boxed{\\begin{pmatrix} 1 & 2 \\\\ 3 & 4 \\end{pmatrix}}"],
        ["\\begin{pmatrix}1&2\\\\3&5\\end{pmatrix}", "\\begin{pmatrix}1&3\\\\2&4\\end{pmatrix}", "(1,2,3,4)"],
    ),
    ("1e3", ["1000", "10^3", "1 \\times 10^3"], ["1e4", "2.718*3"]),
    (0, ["0", "-0", "0.0"], ["0.\\overline{3}", "0.1", "zero or one", "-1"]),  # math-verify: 0.\overline{3} is 0
    (7.25, ["29/4", "7.25"], ["7", "7.2"]),
    ("x>3", ["3<x", "$x > 3$"], ["x<3", "x\\ge 3", "3"]),
    # Powers side by side, behind one another none; brackets with two numbers; functions without brackets.
    ("x^3-3x^2+2", ["$x^3 - 3x^2 + 2$", "The answer is $2 - 3x^2 + x^3$."], ["$x^3 + 3x^2 + 2$", "$x^3-3x+2$"]),
    ("x^2y^3", ["\\boxed{x^2y^3}", "$y^3 x^2$"], ["$x^3y^2$", "$x^2+y^3$"]),
    ("2^3 \\cdot 3^2", ["\\boxed{72}", "$3^2 \\cdot 2^3$"], ["$2^2 \\cdot 3^3$"]),
    ("\\frac{x^2-1}{x^2+1}", ["$\\frac{x^2-1}{x^2+1}$"], ["$\\frac{x^2+1}{x^2-1}$"]),
    ("(0, 1)", ["(0,1)", "\\boxed{(0,1)}", "The answer is $(0, 1)$."], ["[0,1]", "(1,0)", "0,1"]),
    ("\\log_2 3", ["$\\log_2 3$", "\\boxed{\\log_{2} 3}"], ["$\\log_3 2$", "23"]),
    ("\\sin^2(x)", ["$\\sin^2 x$", "\\boxed{\\sin^{2} x}"], ["$\\sin x$", "$\\cos^2 x$", "$\\sin^2 y$"]),
    # A unit on one side, and its names.
    (
        "25\\pi",
        ["\\boxed{25\\pi\\text{ square units}}", "$25\\pi \\text{ cm}^2$"],
        ["\\boxed{5\\pi\\text{ square units}}"],
    ),
    (
        "2\\sqrt{3} \\text{ cm}",
        ["$2\\sqrt{3}$", "$2\\sqrt{3}\\text{ centimeters}$"],
        ["$2\\sqrt{3}\\text{ m}$", "$3\\sqrt{2}$"],
    ),
    ("5 cm", ["5 centimeters", "5 centimetres", "5"], ["5 m", "5 cm^2", "50 mm"]),
    ("40 minutes", ["40 min", "40 mins", "\\boxed{40\\text{ minutes}}"], ["40 hours", "40 s"]),
    ("10 km/h", ["10 km per hour", "10 kilometers per hour"], ["10 km", "10 m/s"]),
    ("6 square feet", ["6 ft^2", "6 sq ft", "6 feet^2"], ["6 feet", "6 ft^3"]),
    ("12 apples", ["12 red apples", "12 apples"], ["12 red pears", "12 apples per day"]),
    # Several answers, and one in several forms.
    ("6", ["\\boxed{5}. No: \\boxed{6}", "\\boxed{6}"], ["\\boxed{5} or \\boxed{6}", "$\\boxed{6}$ and $\\boxed{5}$"]),
    (
        "3, 5",
        ["\\boxed{3} and \\boxed{5}", "$x = \\boxed{3}$ or $x = \\boxed{5}$"],
        ["\\boxed{3}", "\\boxed{3}, \\boxed{4}"],
    ),
    ("3/4", ["The answer is 3/4 or 0.75.", "The answer is $\\frac{3}{4}$, or 0.75."], ["The answer is 3/4 or 0.5."]),
    (
        "18",
        ["She makes 9 * 2 = $18 every day at the farmer's market."],
        ["She makes 9 * 2 = $16 every day at the market."],
    ),
    (
        "72",
        ["She sold 48 + 24 = 72 clips altogether in April and May."],
        ["She sold 72 + 24 = 48 clips altogether in May."],
    ),
    # Headings state nothing, and neither do steps on the way.
    (
        "72",
        [
            "#### Step 1: Find the clips\n48 / 2 = 24\n\n#### Step 2: Find the total\n48 + 24 = 72\n\nShe sold 72 clips.",
            "The answer is 72.\n\n#### Check of step 2\n24 + 48 = 72",
            "#### Conclusion\nShe sold 72 clips.",
            "#### 2. Find the total\n48 + 24 = 72",
            "##### Step 2\nThe answer is 72.",
            "Step 2: The total is 72.",
            "**Step 2:** The total is 72.",
            "#### 72 (48 + 24)",
            "#### Natalia sold 72 clips.",
            "#### 72\n\nQuestion: Tom has 3 apples.",
            "**Solution:**\n\nShe sold 48 / 2 = 24 clips in May.\n\nShe sold 48 + 24 = 72 clips altogether.",
            "Answer: She sold 48 / 2 = 24 clips in May.\nShe sold 48 + 24 = 72 clips altogether.",
            "Answer:\n48 / 2 = 24\n48 + 24 = 72",
            "Answer: She sold 72 clips.\nI hope this helps!",
            "Answer: 72\n\nThis is 3 times 24.",
            "Answer:\n$x = 72$\nCheck: 72 - 24 = 48",
            "Final answer: She sold 72 clips.\n\nCheck: 72 - 24 = 48",
            "First the result is 24.\nThen 24 + 48 = 72",
            "Step 1: result = 48 / 2 = 24\nStep 2: 24 + 48 = 72",
            "The solution is simple.\n24+48 = 72",
            "The final result is 72.\nCheck: 72 - 24 = 48",
            "So\nthe result is 72.",
            "$\\boxed{72}$\n\nSolution: 48/2 = 24, 24+48=72",
            "$\\boxed{72}$\n\n#### Step 2",
            "\\boxed{72}. The first result is 24.",
            "\\boxed{24}. No, the answer is 72.",
        ],
        [
            "#### Step 72: Both months",
            "#### Step 1: May\n48 / 2 = 24\n\n#### Step 72",
            "The result is 72.\nThen 72 + 1 = 73",
            "Solution: 72 clips\n72 + 1 = 73",
            "Answer: First she sold 72 clips.\nThen she sold 1 more, that is 72 + 1 = 73",
        ],
    ),
    # A number is not what a sentence says of it.
    (
        "5",
        [
            "The answer is 5 (2 + 3).",
            "She has 5 apples left (8 - 3 = 5).",
            "So she needs 5 more apples.",
            "She has 5 more than Tom.",
            "She must buy at least 5 boxes.",
            "He ran 5 times.",
            "The area is 5 centimeters squared.",
            "The area is 5 squared units.",
            "So the height is $h \\approx 5$ meters.",
            "> So she has 5 apples left over.",
        ],
        [
            "The answer is negative 5.",
            "The answer is minus 5.",
            "The answer is x minus 5.",
            "The answer is less than 5.",
            "x is greater than 5",
            "The answer is at least 5.",
            "The answer is up to 5.",
            "The answer is 5 more than x.",
            "The answer is 5 squared.",
            "The answer is 5 factorial.",
            "So there are 5! ways.",
            "The answer is the square root of 5.",
            "The side is √5 meters.",
            "The area is $5\\pi$ square meters.",
            "The answer is twice 5.",
            "The answer is a multiple of 5.",
            "The answer is divisible by 5.",
            "The answer is the opposite of 5.",
            "The answer is 5 times x.",
            "It holds for all x > 5 there are.",
            "The answer is 5 (x + 1).",
            "The answer is 5 (2 + 4).",
        ],
    ),
    (
        "-5",
        ["The answer is negative 5.", "The answer is minus $5$.", "It is minus 5 degrees.", "x equals negative 5"],
        ["The answer is x minus 5.", "Tom's age minus 5", "The answer is less than -5."],
    ),
    # A letter right behind a number may be a factor.
    ("5m", ["5m", "5 m", "5 meters", "m*5", "2m + 3m"], ["5", "\\boxed{5}", "5g", "6m"]),
    ("5m^2", ["5m^2", "2m^2 + 3m^2", "5 square meters"], ["5", "5m"]),
    ("5\\text{m}", ["5", "5m", "5 meters"], ["5 s"]),
    # MATH's separator of thousands, and spaces of LaTeX at the ends.
    (
        "10,\\!080",
        ["10080", "\\boxed{10080}", "\\boxed{10,080}", "\\boxed{10,\\!080}", "10{,}080", "It is $10,\\! 080$ cm."],
        ["80, 10", "\\boxed{80,10}", "(10,80)", "\\boxed{10}", "80"],
    ),
    ("11,\\! 111,\\! 111,\\! 100", ["11111111100", "The answer is 11,\\! 111,\\! 111,\\! 100."], ["11", "111", "100"]),
    ("1,080", ["\\boxed{1,\\!080}", "1{,}080"], ["\\boxed{1,\\!08}"]),
    ("\\$32,\\!348", ["32348", "\\boxed{\\$32,348}"], ["32", "348"]),
    ("1,\\!080\\pi", ["\\boxed{1080\\pi}", "1{,}080\\pi"], ["\\boxed{80\\pi}", "1, 80\\pi"]),
    (
        "9",
        ["\\boxed{9\\,}", "\\boxed{\\,9\\,}", "\\boxed{\\;9\\;}", "\\boxed{9\\ }", "$\\!9\\:$"],
        ["\\boxed{\\,8\\,}"],
    ),
    # An interval with what it is of, and brackets of any size.
    (
        "(0, 1)",
        [
            "\\boxed{x \\in (0,1)}",
            "$\\theta\\in\\left(0,1\\right)$",
            "x ∈ (0, 1)",
            "\\boxed{\\bigl(0,1\\bigr)}",
            "\\boxed{\\big( 0, 1 \\big)}",
        ],
        ["\\boxed{x \\in [0,1]}", "x \\in \\{0,1\\}", "x \\in (0,2)", "\\boxed{\\Bigl[0,1\\Bigr]}"],
    ),
    ("[-1, 3]", ["\\boxed{x\\in[-1,3]}", "\\biggl[-1,3\\biggr]"], ["x\\in(-1,3)", "\\boxed{x\\in[-1,3)}"]),
    ("x \\in (0,1)", ["(0,1)", "\\boxed{x\\in(0,1)}"], ["[0,1]", "\\{0,1\\}", "x\\in[0,1]"]),
    # Functions without a backslash.
    ("\\ln 2", ["\\boxed{ln(2)}", "ln 2", "\\boxed{\\operatorname{ln} 2}", "ln2"], ["\\boxed{ln(3)}", "2ln", "l*n*2"]),
    ("ln(2)", ["\\boxed{\\ln 2}", "ln 2"], ["\\boxed{n l 2}", "\\sin 2"]),
    ("\\sin x", ["\\boxed{sin x}", "sin(x)"], ["cos x", "x i n s", "sin y"]),
    ("\\sin^2 x", ["sin^2 x", "sin(x)^2", "\\boxed{1 - cos^2(x)}"], ["sin x", "sin(x^2)"]),
    ("\\log_2 3", ["log_2(3)", "log_2 3"], ["log_3(2)", "log2(3)"]),
    ("2\\sin x \\cos x", ["2 sin x cos x", "2sin(x)cos(x)"], ["2 sin x"]),
    ("e^{2x}", ["exp(2x)", "\\exp(2x)"], ["exp(x)", "2x"]),
    ("11\\sqrt{2}", ["\\boxed{11 * sqrt(2)}", "11*sqrt(2)", "11 sqrt 2", "11√(2)"], ["11 * sqrt(3)", "sqrt(22)"]),
    ("\\sqrt{1+\\sqrt{2}}", ["sqrt(1 + sqrt(2))", "√(1+√2)"], ["sqrt(1 + 2)"]),
    ("v_{max}", ["\\boxed{v_{max}}"], ["v", "v_{min}"]),
    # Several numbers, of which the first is 0; 0,5 may be a decimal.
    ("0, 4", ["\\boxed{0,4}", "0, 4", "\\{4,0\\}", "4,0"], ["0.4", "4", "0,5", "-0,4"]),
    ("x=0,4", ["\\boxed{0,4}"], ["\\boxed{0}", "0.4"]),
    ("\\{0,125\\}", ["0,125", "\\boxed{0, 125}"], ["0.125", "125"]),
    ("0.5", ["0.5"], ["0,5"]),
    # A sentence's only formula.
    (
        "\\frac{3}{4}",
        [
            "So the probability is $\\frac{3}{4}$.",
            "Thus $x = \\frac{3}{4}$.",
            "So the probability is \\(\\frac{3}{4}\\), as asked.",
            "She ate \\[\\frac{3}{4}\\] of it.",
            "Therefore we get $$P = \\frac{6}{8} = \\frac{3}{4}.$$",
            "The answer is the fraction $\\frac{3}{4}$.",
            "So she needs at least $\\frac{3}{4}$ cups.",
            "The result is 24.\nSo the ratio is $\\frac{3}{4}$.",
        ],
        [
            "The probability is not $\\frac{3}{4}$.",
            "It is less than $\\frac{3}{4}$.",
            "It is $\\frac{3}{4}$ or $\\frac{1}{4}$.",
            "It is $\\frac{3}{4}$ or 1.",
            "The slope is -$\\frac{3}{4}$.",
            "The slope is negative $\\frac{3}{4}$.",
            "It is twice $\\frac{3}{4}$.",
            "The value of $f$ is $\\frac{3}{4}$.",
            "The probability is $-\\frac{3}{4}$.",
        ],
    ),
    (
        "25\\pi",
        ["The area is $25\\pi$.", "The area is $25\\pi$ square units.", "The area is $\\pi r^2 = 25\\pi$."],
        ["The area is $5\\pi$.", "The area is $25$.", "The area is $25\\pi$ and the radius is 5."],
    ),
    (
        "25\\pi \\text{ cm}^2",
        ["The area is $25\\pi$ square centimeters.", "The area is $25\\pi$."],
        ["The area is $25\\pi$ square meters."],
    ),
    ("x>5", ["So it holds for all $x > 5$."], ["So it holds for all $x < 5$."]),
    (
        "5",
        ["She pays $5 and is glad ($).", "The number is $\\sqrt{25}$."],
        ["The side is $\\sqrt{5}$ meters.", "The side of length $x$ is not $5$.", "It is the $5n$th one."],
    ),
    # The answer stands behind the thought.
    (
        "18",
        [
            "<think>maybe \\boxed{20}</think>\nShe makes $18 every day.",
            "<think>20</think>18",
            "The answer is 20? No.\n</think>\n\nShe makes $18 every day.",
            "<think>I must put the result in an <answer> tag. 9*2=18.</think>\n<answer>18</answer>",
            "An <answer> tag: <answer>18</answer>",
            "[THINK]\\boxed{20}[/THINK]18",
            "<thinking>20</thinking>\n\\boxed{18}",
            "<think>A thought ends with </think>, I think. \\boxed{20}</think>18",
            "The answer is 18.\n<think>Or is it 20?",
            "It goes into <think> tags. The answer is 18.",
        ],
        [
            "<think>\\boxed{18}? maybe 20.</think>\n\nShe makes $20 every day.",
            "<think>\\boxed{18}</think>\nI am sorry, I cannot answer that.",
            "<think>\\boxed{18}</think>",
            "<think>\nThe answer is 18.",
            "  <think>\\boxed{18}",
            "The answer is 18.</think>",
            "[THINK]\\boxed{18}",
            "<think>20</think>\n<think>The answer is 18.",
        ],
    ),
]
CHOICE: Table = [
    (
        "B",
        [
            "B",
            "b",
            "B.",
            "(B)",
            "[B]",
            "$B$",
            "`B`",
            "**B**",
            "B) Paris",
            "B. Paris",
            "B: Paris",
            "\\boxed{B}",
            "\\boxed{(B)}",
            "\\boxed{\\text{B}}",
            "$\\boxed{\\textbf{(B)}}$",
            "<answer>B</answer>",
            "#### B",
            "Answer: B",
            "Answer:\nB",
            "Answer: (B) Paris",
            "**Answer: B**",
            "Final Answer: **B**",
            "The answer is B",
            "the answer is b.",
            "The answer is (B).",
            'The answer is "B"',
            "The answer is B, I think.",
            "The answer is B and I am sure.",
            "The answer is B, a city in France.",
            "The answer is option B.",
            "The answer is B because it is.",
            "The best choice is (B) Paris.",
            "Option B is correct.",
            "B is the right answer.",
            "So it's B.",
            "Let me think.\nB",
            "A is wrong, so the answer is B.",
            "The answer is A. No, the answer is B.",
            "Option B",
            "Choice B.",
            "I would go with option B.",
            "I'd pick (B).",
            "It is (B) Paris.",
            "Answer - B",
            "B, because Paris is the capital.",
            "B because it is the capital.",
            "The answer is B.\n\n**Option A:**\nLondon is in England.\n\n**Option C:**\nBerlin is in Germany.",
            "(B) Paris\n\nOption A:\nNo.\nOption C:\nNo.",
            "Answer: B\n\nExplanation of each:\nOption A.\nWrong",
            "The answer is B. It would be wrong to say that it is (A) London.",
            "B is right. Others think it's (C) Berlin",
        ],
        [
            "",
            "A",
            "C.",
            "E",
            "Bb",
            "B2",
            "Both",
            "Because",
            "beta",
            "A or B",
            "B, C",
            "\\boxed{C}",
            "\\boxed{B, C}",
            "answer: BC",
            "Answer: A (not B)",
            "The answer is C",
            "The answer is AB",
            "The answer is B-12",
            "The answer is Bob",
            "The answer is banana",
            "The answer is a boy",
            "Bob is the answer",
            "The answer is A or B",
            "The answer is B and C",
            "The answer is between A and B",
            "The answer is not B.",
            "It is not B",
            "option B is wrong",
            "The answer is B. Wait, the answer is C.",
            "The answer is B... actually C.",
            "A. x\nB. y\nC. z",
            "A. x\nB. y\nC. z\nD. w",
            "By the way, I think so",
            "Vitamin B is good",
            "Plan B failed",
            "I would not go with option B.",
            "Option B or C",
            "It is not (B) Paris.",
            "I don't think it is (B) since Paris is in France.",
            "Which is the best answer\n - B. Paris\n - C. London",
            "Option A\nNo.\nOption B\nYes.",
            "Because of B",
        ],
    ),
    ("(A)", ["The answer is A.", "(A) is correct"], ["A dog", "The answer is a dog", "I have a cat", "An apple"]),
    ("I", ["The answer is I."], ["I think it is C", "I do not know"]),
    # The letter A is one as B is, where it is no article.
    (
        "A",
        [
            "A is correct.",
            "Option A is correct.",
            "A is the right answer.",
            "The answer is A in this case.",
            "The answer is A based on the text.",
            "The answer is 'A'.",
            "Therefore, option A.",
            "Thus, (A).",
            "I choose A.",
            "The answer to the question is A.",
            "The answer should be A.",
            "<answer>Option A</answer>",
            "\\boxed{\\text{Option A}}",
        ],
        [
            "B is correct.",
            "It is a good question.",
            "The answer is a mystery.",
            "I choose B.",
            "Thus, a dog.",
            "A, or B. So I, as asked, say C.",
            "A dog is best.",
        ],
    ),
    # Nothing but blanks is no answer, and takes no time.
    (
        "B",
        ["Answer:" + " " * 400 + "B"],
        ["Answer:" + " " * 5000 + ".", "Answer:" + "\n" * 5000, "answer" + "*_" * 3000],
    ),
    # Behind a thought.
    (
        "B",
        [
            "<think>The answer is A? Hmm no.</think>\n\n(B) Paris",
            "Perhaps the answer is A.\n</think>\nB",
            "<think>I must put it in an <answer> tag.</think>\n<answer>B</answer>",
        ],
        ["<think>The answer is B.</think>\nI cannot say.", "<think>The answer is B.", "<think>B</think>(A) London"],
    ),
]
EXACT: Table = [
    (
        "New  York",
        ["new york", "I say\nNEW YORK\n\n", "new\u00a0york", "ｎｅｗ york"],
        ["newyork", "york", "new york city"],
    ),
    (["yes", "true"], ["True", "yes "], ["yes.", "no", "The answer is yes", "", "yes true"]),
    (5, ["5"], ["5.0", "five", "55"]),
    ("5", ["<think>6</think>5"], ["<think>5</think>", "<think>Or\n5"]),
]
REGEX: Table = [
    ("x", ["Answer: x", "Answer: y Answer: x ok"], ["x", "Answer: y", "Answer: x Answer: y", "answer: x", "Answer:x"])
]
SCHEMA = {
    "type": "object",
    "properties": {"a": {"type": "integer"}},
    "required": ["a"],
    "additionalProperties": False,
}
JSON_SCHEMA: Table = [
    (
        SCHEMA,
        ['{"a": 1}', '```json\n{"a": 1}\n```', 'Here:\n```json\n{"a": 2}\n```\nok', '```\n{"a": 3}\n```'],
        [
            '{"a": "1"}',
            '{"a": 1, "b": 2}',
            "{}",
            "[1]",
            "1",
            "null",
            "",
            '{"a": 1',
            '{"a": 1} or so',
            'Here: {"a": 1}',
            "{'a': 1}",
            '{"a": 1.5}',
            '{"a": NaN}',
            '{"a": 1, "a": 2}',
            '{"a": true}',
            '```json\n{"a": "x"}\n```',
            "[" * 50_000,
            '{"a": ' + "9" * 5000 + "}",
        ],
    ),
    # Behind a thought; the last block of JSON, or else the last without a language.
    (
        SCHEMA,
        [
            '<think>{"a": "x"}</think>\n{"a": 1}',
            'So:\n```json\n{"b": 1}\n```\n</think>{"a": 1}',
            '```json\n{"a": 1}\n```\nOutput:\n```\nok\n```',
            '```\n{}\n```\n```\n{"a": 1}\n```\n```python\nprint(1)\n```',
            '1. ```JSON\n   {"a": 1}\n   ```',
            '```json\r\n{"a": 1}\r\n```\r\n',
        ],
        [
            '<think>{"a": 1}</think>',
            '<think>\n```json\n{"a": 1}\n```',
            '```\n{"a": 1}\n```\n```json\n{"a": "x"}\n```',
        ],
    ),
    # Decimals as they are written; also under a draft of its own, and where a schema refers to itself.
    (
        {"multipleOf": 0.01},
        ["0.07", "1.15", "19.99", "100", "-0.07", "0", '"no number"'],
        ["0.005", "0.071", "1e400", "-1e400", "1e-3"],
    ),
    ({"multipleOf": 3}, ["9", "9.0", "-3"], ["10", "9.5", "1e400"]),
    (
        {
            "$schema": "https://json-schema.org/draft/2020-12/schema",
            "anyOf": [{"type": "number", "multipleOf": 0.1}, {"type": "array", "items": {"$ref": "#"}}],
        },
        ["0.3", "[0.3, [0.7]]"],
        ["0.35", "[0.3, [0.75]]"],
    ),
    ({"$schema": "http://json-schema.org/draft-04/schema#", "multipleOf": 0.01}, ["0.07"], ["0.075"]),
    ({"$schema": "http://json-schema.org/draft-03/schema#", "divisibleBy": 0.01}, ["0.07"], ["0.075"]),
]


def test_every_price_is_a_multiple_of_a_cent() -> None:
    verifier = find_verifier("json_schema")
    options = verifier.chosen(None, {"schema": {"multipleOf": 0.01}})
    right = verifier.right({}, options)
    prices = [f"{cents // 100}.{cents % 100:02}" for cents in range(1, 10_001)]
    assert [
        price for price in prices if verifier.verify(price, right, options) != {"score": 1.0, "extracted": 1.0}
    ] == []


def block(code: str) -> str:
    return f"I would write\n```python\n{code}\n```\nas asked."


CODE: Table = [
    (
        "assert add(1, 2) == 3\nassert add(-1, 1) == 0",
        [block("def add(a, b):\n    return a + b"), block("def add(*n): return sum(n)")],
        [
            block("def add(a, b):\n    return a - b"),
            block("def add(a, b): return 3"),
            block("def plus(a, b): return a + b"),
            block("def add(a, b) return a + b"),
            block("print('all tests passed')"),
            block("raise SystemExit(0)"),
            block("import os\nos._exit(0)"),
            "def add(a, b): return a + b",
            block("def add(a, b): return a + b") + block("def add(a, b): return a * b"),
        ],
    ),
    (
        [{"input": "1 2\n", "output": "3\n"}, {"input": "5 6\n", "output": "11"}],
        [block("a, b = map(int, input().split())\nprint(a + b)"),
         block("import sys\nprint(sum(map(int, sys.stdin.read().split())))")],
        [block("print(3)"), block("a, b = map(int, input().split())\nprint(a, b)"), block("print(input())"), block("")],
    ),
    # A guard is entered, and hides no test.
    (
        'def test_add():\n    assert add(1, 2) == 3\n\nif __name__ == "__main__":\n    test_add()',
        [block("def add(a, b): return a + b")],
        [block("def unrelated(): pass")],
    ),
    (
        'import unittest\ndef test_add():\n    assert add(1, 2) == 3\nif __name__ == "__main__":\n    unittest.main()',
        [block("def add(a, b): return a + b")],
        [block("def unrelated(): pass"), block("def add(a, b): return 0")],
    ),
    # Texts of a row may use the same names.
    (
        ["def test(): assert f(1) == 1", "def test(): assert f(2) == 2"],
        [block("def f(x): return x")],
        [block("def f(x): return 2"), block("def f(x): return 1")],
    ),
    (
        ["x = [3, 1]\nassert s(x) == [1, 3]", "x = [2]\nassert s(x) == [2]"],
        [block("s = sorted")],
        [block("def s(x): return [2]"), block("def s(x): return [1, 3]")],
    ),
    # What comes before a test is done before it.
    (
        "s = Stack()\ns.push(1)\ns.push(2)\nassert s.pop() == 2\nassert s.pop() == 1",
        [block("class Stack(list):\n    push = list.append")],
        [block("class Stack(list):\n    push = list.append\n    def pop(self): return self[0]")],
    ),
    ("import random\nrandom.seed(0)\nassert f(1) == 2", [block("def f(x): return x + 1")], [block("def f(x): return x")]),
    (["import math", "assert f(1) == math.pi"], [block("from math import *\nf = lambda x: pi")], [block("f = lambda x: 3")]),
    ("def check(g):\n    assert g(1) == 2\ncheck(f)", [block("def f(x): return 2")], [block("def f(x): return 1")]),
    ("for x in range(3):\n    assert f(x) == x", [block("def f(x): return x")], [block("def f(x): return 0")]),
    # As Python writes a list of texts, and pandas a column of lists.
    ("['assert add(1, 2) == 3', 'assert add(2, 3) == 5']", [block("def add(a, b): return a + b")], [block("add = print")]),
    # Tests that import what they test, and code that looks for its own module.
    (
        "from solution import add\ndef test_add():\n    assert add(1, 2) == 3",
        [block("def add(a, b): return a + b")],
        [block("def add(a, b): return a - b"), block("def plus(a, b): return a + b")],
    ),
    (
        "assert Point(1, 2).x == 1",
        [block("from __future__ import annotations\nfrom dataclasses import dataclass\n@dataclass\nclass Point:\n"
               "    x: int\n    y: int")],
        [block("class Point: pass")],
    ),
    # Behind a thought; what it prints may stand behind it; in an item of a list; with line ends of Windows.
    (
        "assert add(1, 2) == 3",
        [
            block("def add(a, b):\n    return a + b") + "\nOutput:\n```\n3\n```",
            block("def add(a, b):\n    return a - b") + "\n</think>\n" + block("def add(a, b):\n    return a + b"),
            "1. Code:\n\n   ```python\n   def add(a, b):\n       return a + b\n   ```\n",
            "- ```py\n  def add(a, b):\n      return a + b\n  ```\n",
            "```python3.11\r\ndef add(a, b):\r\n    return a + b\r\n```\r\n",
            "```\ndef add(a, b):\n    return a + b\n```\nIn C:\n```c\nint add(int a, int b);\n```",
        ],
        [
            block("def add(a, b):\n    return a - b") + "\n```\ndef add(a, b):\n    return a + b\n```",
            "<think>\n" + block("def add(a, b):\n    return a + b") + "\n</think>\nDone.",
            "<think>\n" + block("def add(a, b):\n    return a + b"),
        ],
    ),
    # What a program prints when its threads and its exit functions end.
    (
        [{"input": "3\n", "output": "3\nbye\n"}],
        [block("import atexit, threading, time\ndef main():\n    time.sleep(0.1)\n    print(input())\n"
               "atexit.register(print, 'bye')\nthreading.Thread(target=main).start()")],
        [block("import threading\nthreading.Thread(target=lambda: print(input())).start()")],
    ),
]  # fmt: skip
TABLES: dict[str, tuple[dict[str, Any], Table]] = {
    "math": ({}, MATH),
    "choice": ({}, CHOICE),
    "exact": ({"normalise": ["strip", "case", "whitespace", "nfkc"], "take": "last_line"}, EXACT),
    "regex": ({"pattern": r"Answer: (\w+)"}, REGEX),
    "json_schema": ({}, JSON_SCHEMA),
    "code": ({}, CODE),
}
COLUMNS = {"json_schema": "schema", "code": "tests"}
BOUND_S = 5.0  # of each answer; the default


def scores(verifier: str, options: dict[str, Any], items: list[tuple[str, str | None, str | None]]) -> list[Score]:
    pool = VerifierPool(ScorerConfig(kind="verifier", verifier=verifier, options=options, timeout_s=BOUND_S))
    try:
        start = time.monotonic()
        found = [score for future in pool.submit_items(items) for score in future.result(300)]
        assert time.monotonic() - start < BOUND_S * len(items)
        return found
    finally:
        pool.close()


@pytest.mark.parametrize("verifier", TABLES)
def test_right_answers_are_right_and_wrong_ones_are_not(verifier: str) -> None:
    options, table = TABLES[verifier]
    items, wanted = [], []
    for answer, right, wrong in table:
        row = json.dumps({COLUMNS.get(verifier, "answer"): answer})
        items += [(text, row, None) for text in [*right, *wrong]]
        wanted += [1.0] * len(right) + [0.0] * len(wrong)
    found = scores(verifier, options, items)
    failed = [(i[1], i[0], s) for i, s, value in zip(items, found, wanted, strict=True) if s.value != value]
    assert failed == []


@pytest.mark.parametrize(
    ("answer", "problem"),
    [
        ("0,5", "write 0.5 for a decimal, or 0, 5 with a space"),
        ("-0,25", "write 0.5 for a decimal"),
        ("det(A)", "write the answer alone"),
        ("lg 5", "write the answer alone"),
        ("\\coth x", "write the answer alone"),  # math-verify reads cot(h*x)
    ],
)
def test_an_answer_that_may_be_misread_is_refused(answer: str, problem: str) -> None:
    verifier = find_verifier("math")
    assert problem in str(verifier.row_problem({"answer": answer}, verifier.chosen(None, {})))


@pytest.mark.parametrize(
    "text",
    [("#### 5 " * 50 + "\n") * 60, "#### 5 " * 3000, "Answer: x " * 2500, "5" + "\\, " * 5000 + "x", "\\[ a " * 5000],
)
def test_many_statements_take_no_time(text: str) -> None:
    verifier = find_verifier("math")
    options = verifier.chosen(None, {})
    start = time.process_time()
    verifier.verify(text, verifier.right({"answer": "72"}, options), options)
    assert time.process_time() - start < BOUND_S


def test_there_are_enough_of_them() -> None:
    tables = [rows for _, table in TABLES.values() for rows in table]
    assert sum(len(right) for _, right, _ in tables) >= 100
    assert sum(len(wrong) for _, _, wrong in tables) >= 200


def test_what_runs_out_of_memory_is_not_shown_to_be_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the libraries have none: an error of the item, by its worker."""

    def grow(*_: Any, **__: Any) -> Any:
        raise MemoryError

    right = math.parsed("x+1")
    monkeypatch.setattr("math_verify.verify", grow)
    monkeypatch.setattr("math_verify.parse", grow)
    monkeypatch.setattr("reasoning_gym.factory.get_score_answer_fn", lambda name: grow)
    for work in (
        lambda: math.compared(right, right),
        lambda: math.parsed("x+1"),
        lambda: reasoning_gym._scored("gcd", "3", {"answer": "3"}),
    ):
        with pytest.raises(MemoryError):
            work()


def test_tasks_of_reasoning_gym_whose_scorers_run_answers_are_known() -> None:
    """Read off their sources: those that pass the answer to eval, or to sympy's parser, which is one."""
    from reasoning_gym.factory import DATASETS

    found = {
        name
        for name, (dataset, _) in DATASETS.items()
        if re.search(r"\b(?:eval|exec|parse_expr|sympify)\(answer\b", inspect.getsource(dataset.score_answer))
    }
    assert found == reasoning_gym.RUN_ANSWERS


def test_tasks_of_reasoning_gym_whose_scorers_run_answers_are_refused_unless_allowed() -> None:
    import reasoning_gym as library

    entry = library.create_dataset("spiral_matrix", size=1, seed=1)[0]
    verifier = find_verifier("reasoning_gym")
    problem = verifier.row_problem(entry, verifier.chosen(None, {}))
    assert problem is not None
    assert (
        "none whose scorer runs answers as code, as that of spiral_matrix does; write options.runs_answers" in problem
    )
    allowed = verifier.chosen(None, {"runs_answers": True})
    right = verifier.right(entry, allowed)
    listed = f"[{', '.join(entry['answer'].split())}]"  # what the scorer evaluates
    assert verifier.verify(f"<answer>{listed}</answer>", right, allowed) == {"score": 0.1, "extracted": 1.0}


@pytest.mark.parametrize(
    ("case", "problem"),
    [
        ({"input": "1" * (16 << 20), "output": "1"}, None),
        ({"input": "1" * ((16 << 20) + 1), "output": "1"}, "inputs of at most 16777216 bytes"),
        ({"input": "1", "output": "1" * (1 << 20) + "\n"}, None),  # the line's end is no part of what is compared
        ({"input": "1", "output": "é" * (1 << 19) + "1"}, "outputs of at most 1048576 bytes"),
        ({"input": "\ud800", "output": "1"}, "inputs of at most 16777216 bytes of UTF-8"),
    ],
)
def test_a_case_that_no_program_can_pass_is_refused(case: dict[str, str], problem: str | None) -> None:
    """What it reads is a file in its folder, and more output than that is not read."""
    verifier = find_verifier("code")
    found = verifier.row_problem({"tests": [{"input": "", "output": ""}, case]}, verifier.chosen(None, {}))
    assert found is None if problem is None else problem in str(found)


def test_reasoning_gym_scores_its_own_tasks() -> None:
    """Entries as they come back from a JSON file; right, with text around, near misses, of other tasks."""
    import reasoning_gym

    names = ["basic_arithmetic", "leg_counting", "chain_sum", "word_sorting", "rearc", "game_of_life_halting",
             "prime_factorization", "number_sequence", "spell_backward", "isomorphic_strings"]  # fmt: skip
    items, wanted = [], []
    for name in names:
        entry = reasoning_gym.create_dataset(name, size=1, seed=1)[0]
        row, answer = json.dumps(entry), entry["answer"]
        right = [f"<answer>{answer}</answer>", f"I think\n<answer>\n{answer}\n</answer> it is"]
        wrong = ["", answer, "<answer></answer>", "<answer>no idea</answer>", f"<answer>{answer}9</answer>",
                 f"<answer>{answer}</answer> or <answer>nothing</answer>", "<answer>-31415926</answer>"]  # fmt: skip
        items += [(text, row, None) for text in [*right, *wrong]]
        wanted += [True] * len(right) + [False] * len(wrong)
    found = scores("reasoning_gym", {}, items)
    failed = [
        (items[i][0], s) for i, s in enumerate(found) if s.value is None or (s.value >= 1) != wanted[i]
    ]  # partial credit is its own affair
    assert failed == []
