"""Answers by kind: what is part of a value, what states it, and that reading takes linear time."""
import time

import pytest

from common.grading.answers import close, decide, equivalent_many, extract_answer, math_equal
from common.grading.notation import normalise, prepared


@pytest.fixture(scope="module", autouse=True)
def stop_workers():
    yield
    close()


# kind: gold, what is equal to it, what is not
EQUAL = {
    "a word that changes the value": ("3", [r"3 \text{ goats}"], [
        r"3\text{ billion}", "3 dozen", "3 fifths", "3 squared", r"3 \text{ pairs}", "3 root two", "3 twentieths",
        "3 quadrillion", "3 tens", "3 lakh", "3 per thousand", "3fold", "3 minutes past noon", r"3\mathrm{i}", "3 cis"]),
    "months are no parts": ("3", ["3 months", "3 times", "3 euros"], []),
    "such a word has a value": ("1250000", [r"\$1.25\text{ million}", "1250 thousand"], ["1.25"]),
    "numbers in words": ("21", ["twenty-one", r"\text{21}"], ["20-1", "two, one"]),
    "parts in words": (r"\frac35", ["three fifths", "3 fifths", "0.6"], ["3"]),
    "a unit in any dress": ("18", [
        r"\mathrm{18\ km/h}", r"18\,\text{m}^2", "18 sq. ft.", "€18", "18°", "18 cm²"], ["18x", "18m"]),
    "a unit of the gold answer": (r"18 \text{ cm}", ["18", "18 cm"], ["19 cm"]),
    "a variable is no unit": ("5t", ["t*5"], ["5"]),
    "a compound quantity": ("6", [], [
        r"6 \text{ feet } 2 \text{ inches}", "6 hours and 5 minutes", "6 pounds four ounces"]),
    "a period": (r"\frac{7}{30}", [r"0.2\overline{3}", r"0.2\bar{3}"], ["0.23"]),
    "signs and their words": (r"(-\infty,\pi]", ["(−∞, π]"], [r"(-\infty,\pi)"]),
    "a half-open interval": (r"[0,\frac12)", [r"[0, \frac{1}{2})", "[0,1/2)"], ["[0,1/2]", "(0,1/2)"]),
    "the empty set": (r"\varnothing", [r"\{\}", r"\emptyset", "∅"], ["0"]),
    "a mixed number": (r"\frac{9}{4}", [r"2\frac14", "2 1/4", "2.25."], ["2", "1/4"]),
    "powers of ten": ("1200", ["1.2e3", r"1.2 \times 10^3", "1.2 × 10^3"], ["1.2"]),
    "small values in a pair": (r"(2.5\times10^{-6}, 1)", ["(0.0000025, 1)"], ["(0.0000024, 1)"]),
    "small values in a matrix": (r"\begin{pmatrix} 10^{-7} & 1 \end{pmatrix}", [r"\begin{pmatrix} 0.0000001 & 1 \end{pmatrix}"],
                                 [r"\begin{pmatrix} 10^{-8} & 1 \end{pmatrix}"]),
    "small values": (r"\frac{1}{3^{40}}", [r"3^{-40}"], [r"\frac{1}{3^{41}}", "0"]),
    "small parts": (r"(1, x+\frac{1}{3^{40}})", [r"(1, x+3^{-40})"], [r"(1, x+\frac{1}{3^{41}})"]),
    "small decimals": ("0.0000025", [r"2.5\times10^{-6}"], ["0.0000024", "0.0000030"]),
    "as many digits as given": (r"\frac{1}{3000}", ["0.000333333"], ["0.000343333"]),
    "nothing is not a little": ("0", ["0.0"], [r"10^{-11}"]),
    "an exponent": ("9", [r"27^\frac{2}{3}", r"3^2"], [r"3^\pi", r"x^9"]),
    "an exponent is no answer": (r"\frac{2}{3}", [], [r"27^\frac{2}{3}", r"\sqrt[5]\frac{2}{3}"]),
    "a base": ("31", [r"31_{10}"], ["31_5", r"31_{\text{five}}", r"31_{(5)}", "31 (base 5)"]),
    "the gold answer's base": ("31_5", [r"31_{5}", r"(31)_5", r"31_{\text{five}}", "31 in base 5"], ["31", "16", "31_6"]),
    "a base of less than nothing": ("-31_5", [r"-31_{5}"], ["-31_6", "-31", "31_5"]),
    "a base within": ("x=31_5", [], ["x=31_6", "x=31"]),
    "a base in words": ("5", [], ["101 in octal", "5 in hexadecimal"]),
    "a power in Python": ("16", ["2**4", "**16**"], ["24"]),
    "what is left out": (r"1,2,\ldots,9", [r"1, 2, \dots, 9", "1,2,...,9"], ["1,2,9"]),
    "a sign in prose": ("-3 or more", ["-3 or more"], ["3 or more"]),
    "a list": ("4215", ["4,215"], ["4, 215", "(4,215)", r"\{4,215\}", "4; 215"]),
    "a list in any order": ("1, 3", ["3, 1", "3 or 1", r"1 \text{ and } 3"], ["1", "1, 3, 5"]),
    "thousands": ("4215000", [r"4{,}215{,}000", r"4,\! 215,\! 000", r"4\,215\,000", "4 215 000"], ["4"]),
    "thousands in a list": ("2000, 3000", ["2,000, 3,000"], ["2, 000, 3, 000"]),
    "thousands in a fraction": (r"\frac{1000}{3}", ["1,000/3"], ["1, 000/3"]),
    "no thousands": ("123", [], ["0,123"]),
    "TeX without braces": (r"\frac{\sqrt{5}}{2}", [r"\frac\sqrt52", r"\sqrt\frac54"], [r"\frac52"]),
    "TeX's infix": ("15", [r"6 \choose 2", r"{30 \over 2}"], ["2"]),
    "prose": (r"\text{Monday}", ["monday", "**Monday**"], [r"\text{damony}", "1"]),
    "a choice": (r"\text{(B)}", ["B", r"\textbf{(B)}"], ["(C)"]),
    "the time of day": (r"3:15 \text{ p.m.}", ["3:15 pm"], ["3:15 a.m."]),
    "a matrix": (r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}", [r"\begin{bmatrix}1\\2\end{bmatrix}"],
                 [r"\begin{pmatrix} 1 & 2 \end{pmatrix}"]),
    "any of the gold answers": (["7", r"\text{seven}", "8"], ["7.0", "8"], ["9", "78"])}


@pytest.mark.parametrize("kind", EQUAL)
def test_equal_and_not(kind):
    gold, right, wrong = EQUAL[kind]
    verdicts = equivalent_many([(gold, pred) for pred in right + wrong])
    wanted = [True] * len(right) + [False] * len(wrong)
    assert dict(zip(right + wrong, verdicts)) == dict(zip(right + wrong, wanted))


def test_a_hidden_zero_is_zero():
    assert math_equal("0", r"\sqrt{2}\sqrt{3}-\sqrt{6}")


@pytest.mark.parametrize("answer", ["3, 120", r"\text{ 18 apples }", r"52_{8}", "1 1/2", r"2 \pi r"])
def test_a_normal_form_is_its_own_and_keeps_the_value(answer):
    assert normalise(normalise(answer)) == normalise(answer)
    assert decide(answer, normalise(answer)) in (True, None)
    assert math_equal(answer, normalise(answer))


@pytest.mark.parametrize("answer, tex", [
    (r"2\text{ million}", r"2\cdot 1000000"), ("5 feet six inches", None), (r"\frac\pi6", r"\frac{\pi}{6}"),
    (r"4^\frac12", r"4^{\frac{1}{2}}"), ("pi/2", r"\pi/2"), (r"24~\text{cm}", "24")])
def test_what_math_verify_is_given(answer, tex):
    assert prepared(answer) == tex


# ------------------------------------------------------------ found in the text

STATED = {
    "Markdown": ("30", ["so\n\n**Final Answer:** 30", "_Answer_: 30", "### Answer: **30**", "The answer is `30`.",
                        "#### *30*", "**Answer**\n\n30", "answer is:\n\n$$\n30\n$$\nas asked", r"answer is \(30\)."]),
    "headings": ("30", ["#### 1. Add\n2+3\n\nThe answer is 30.", "#### 2) Divide\n\n#### 30", "#### Answer: 30"]),
    "PRM800K": ("30", ["2+28\n\n# Answer\n\n30"]),
    "GSM8K's example solutions": ("30", ["5*6=30\nA: 30", "5*6=30\nA: $30"]),
    "a clause": ("30", ["The answer is 30, because 5*6=30.", "The answer is 30 (as 5*6=30)", "the answer is $30$, which is even",
                        "The answer is 30; thus we are done.", "The answer is 30 and so we are done",
                        "The answer is 30, found by adding 28.", "The answer is $30$ (see above).", "The answer must be 30"]),
    "a factorial": ("5!", ["Answer: 5!"]),
    "a set in a box": (r"\left\{3,4\right\}", [r"so \boxed{\left\{3,4\right\}}"]),
    "a box without braces": ("7", [r"so \boxed 7."]),
    "a list's mark is no minus": ("30", ["**Answer:**\n\n- 30", "**Answer:**\n> 30"]),
    "a heading after it": ("30", ["The answer is 30.\n\n#### Explanation\n5*6=30"]),
    "no clause": ("(3, 4)", ["The answer is (3, 4)."]),
    "thinking": ("30", [r"<think>\boxed{8}</think>The answer is 30", r"the answer is 8</think>\boxed{30}",
                        "The answer is 30 <think> is it 8?", r"<thinking>\boxed{8}</thinking>The answer is 30"]),
    "nothing but thinking": (None, [r"<think>\boxed{30}</think>I give up.", r"<think>so \boxed{30}"]),
    "a question of its own": ("30", ["#### 30\n\nQuestion: And twice that?\n#### 60", "A: 30\nQ: 1+1?\nA: 2",
                              "#### 30\n\n**Question 2:** And?\n#### 60", "The answer is 30\nHuman: And?\nThe answer is 60"]),
    "the last of all": ("30", ["The answer is 20. No.\n#### 30", "#### 20\n\nThe answer is 30."])}


@pytest.mark.parametrize("kind, text", [(kind, text) for kind, (_, texts) in STATED.items() for text in texts])
def test_stated(kind, text):
    assert extract_answer(text) == STATED[kind][0]


@pytest.mark.parametrize("part", [r"\boxed{", "{", "#### ", "####\n", "answer ", "answer is ", "answer to ", "\n", "**",
                                  "<think>", "</think>", "\nQuestion", " ,", "1.", "answer is 5 ,"], ids=repr)
def test_extraction_is_linear(part):
    """Half a million characters take about 0.3 s; a quadratic rule would take minutes."""
    start = time.process_time()
    extract_answer(part * (500_000 // len(part)))
    assert time.process_time() - start < 5
