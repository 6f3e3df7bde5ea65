"""Final answers in math: found in a solution's text, and compared with the gold answer."""
import contextlib
import functools
import itertools
import json
import os
import re
import resource
import signal
import subprocess
import sys
import threading
from pathlib import Path

from common import judge


def extract_answer(text):
    """The final answer in a solution text, or None.  "so \\boxed{\\frac{1}{2}}." -> "\\frac{1}{2}"

    Looked for in this order, the last of each: \\boxed{...}, GSM8K's "#### ...", "answer is ..." or
    "answer: ...". Nothing else counts: a guess such as "the last number" would reward solutions
    that never committed to an answer.
    """
    boxes = [match.end() for match in re.finditer(r"\\(?:boxed|fbox)\s*{", text)]
    for start in reversed(boxes):
        depth = 1  # braces nest, so a regular expression will not do
        for i in range(start, len(text)):
            depth += (text[i] == "{") - (text[i] == "}")
            if not depth:
                return text[start:i].strip() or None
    # a number, or the last line: else #### is a heading in Markdown
    marked = re.findall(r"####\s*(-?\\?\$?[\d.,][^\n]*)", text)
    marked = marked or re.findall(r"####([^\n]*)\s*\Z", text)
    if marked:
        return marked[-1].strip() or None
    parts = re.split(r"(?i)\banswer\s*(?:is\b\s*:?|:)", text)
    if len(parts) == 1:
        return None
    line = parts[-1].strip(" \t\n*").split("\n")[0]
    sentence = re.split(r"\.(?:\s|$)", line)[0]  # a full stop ends it, the point of 3.14 does not
    return sentence.strip(" \t*$.,;") or None


@functools.lru_cache(100_000)
def normalise(answer):
    """An answer as written -> a form in which the commonest equal spellings are equal strings.

    "$1{,}234$" -> "1234"; "033" -> "33"; "\\dfrac12" -> "\\frac{1}{2}";
    "\\left( 3, 4 \\right)" -> "(3,4)". Only rewrites that cannot make unequal answers equal belong
    here; math-verify judges the rest.
    """
    s = answer.strip().rstrip(".").replace("{,}", ",")
    s = re.sub(r"\\(?:(?:left|right|displaystyle|quad)(?![a-zA-Z])|[,!;: ])", "", s)  # typesetting
    s = re.sub(r"\\[dt]frac", r"\\frac", s)
    s = s.replace("\\$", "").replace("$", "").replace("\\%", "%")
    s = re.sub(r"\\(?:text|mathrm|textbf|mbox)\s*{([^{}]*)}", r"\1", s)
    s = re.sub(r"\^\s*(?:\\circ|{\s*\\circ\s*})", "°", s)
    s = re.sub(r"\\frac\s*(\d)\s*(\d)", r"\\frac{\1}{\2}", s)
    s = re.sub(r"(?<!\d)\s+|\s+(?!\d)", "", s)  # no space, but "1 1/2" is not "11/2"
    s = re.sub(r"_{(\d+)}$", r"_\1", s)  # the base of a number: 52_{8}
    if re.fullmatch(r"[-+]?\d{1,3}(,\d{3})+(\.\d*)?", s):
        s = s.replace(",", "")
    if re.fullmatch(r"[-+]?\d{1,999}(\.0*)?", s):  # int() refuses more than 4,300 digits
        return str(int(s.split(".")[0]))
    return s


def equivalent_many(pairs):
    """Is each prediction equal to its gold answer? pairs [(gold, pred)] -> [bool]; None never is.

    Equal strings, integers, and numbers in a base are decided at once. The rest goes to
    math-verify, which needs milliseconds a pair and can hang on odd input: it runs in a worker
    that can be killed. (math-verify's own limit is SIGALRM, which fails in threads.)
    """
    equal = {pair: decide(*pair) for pair in pairs}
    todo = [pair for pair, verdict in equal.items() if verdict is None]
    size = max(1, min(64, len(todo) // judge.cores()))  # in chunks: a bar that moves
    chunks = [(todo[i:i + size],) for i in range(0, len(todo), size)]
    for (chunk,), verdicts in zip(chunks, judge.parallel(_verify_chunk, chunks)):
        equal.update(zip(chunk, verdicts))
    return [equal[gold, pred] for gold, pred in pairs]


def decide(gold, pred):
    """True or False where strings can tell, None where math-verify must."""
    if gold is None or pred is None:
        return False
    a, b = normalise(gold), normalise(pred)
    integers = re.fullmatch(r"-?\d+", a) and re.fullmatch(r"-?\d+", b)
    in_a_base = re.fullmatch(r"\w+_\d+", a) and re.fullmatch(r"\w+_\d+", b)
    # math-verify overlooks that 52_8 is not 52_9. No answer has 1,000 characters, and parsing one
    # would take up the time limit.
    if a == b or integers or in_a_base or not 0 < len(b) <= 1000:
        return a == b
    return None


# ------------------------------------------------------------ workers that compare

_idle = []  # workers live on between calls: importing sympy costs a second
os.register_at_fork(after_in_child=_idle.clear)  # they belong to the parent


def _verify_chunk(pairs):
    """Compare in a worker. A pair that hangs or kills it is unequal; a new one takes the rest."""
    verdicts, limit = [], 5 * judge.slowness()
    while len(verdicts) < len(pairs):
        rest = pairs[len(verdicts):]
        try:
            worker = _idle.pop()
        except IndexError:
            serve_it = [sys.executable, "-c", "from common.answers import serve; serve()"]
            worker = subprocess.Popen(serve_it, cwd=Path(__file__).parents[1],
                                      stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        # its CPU time is limited by itself; the wall clock is for one that waits for ever
        patience = threading.Timer((20 * limit + 60) * len(pairs), worker.kill)
        patience.start()
        with contextlib.suppress(BrokenPipeError):
            worker.stdin.write(json.dumps([limit, rest]).encode() + b"\n")
            worker.stdin.flush()
        replies = itertools.takewhile(bool, (worker.stdout.readline() for _ in rest))
        verdicts += [json.loads(reply) for reply in replies]
        patience.cancel()
        if "missing" in verdicts:
            raise RuntimeError("math answers need math-verify: "
                               "pip install 'math-verify[antlr4_13_2]'")
        if len(verdicts) < len(pairs):
            verdicts.append(False)
            stop(worker)
        else:
            _idle.append(worker)
    return verdicts


def stop(worker):
    worker.kill()
    worker.communicate()  # no zombie, no open pipes


def close():
    """Stop the workers; the next use starts new ones."""
    while _idle:
        stop(_idle.pop())


def serve():
    """A worker's whole life: a line [limit, pairs] in, a line for each pair out.

    Beyond its CPU time a signal ends it.
    """
    resource.setrlimit(resource.RLIMIT_AS, (4 << 30, resource.getrlimit(resource.RLIMIT_AS)[1]))
    for line in sys.stdin:
        limit, pairs = json.loads(line)
        for gold, pred in pairs:
            signal.setitimer(signal.ITIMER_PROF, limit)
            try:
                verdict = math_equal(gold, pred)
            except ModuleNotFoundError:
                verdict = "missing"
            except Exception:  # math-verify raises whatever sympy raises
                verdict = False
            signal.setitimer(signal.ITIMER_PROF, 0)
            print(json.dumps(verdict), flush=True)


@functools.lru_cache(10_000)
def parse(answer):
    """An answer as math-verify's expressions. Remembered: a vote compares each with many."""
    import math_verify

    return math_verify.parse(f"\\boxed{{{answer}}}", parsing_timeout=None)


def math_equal(gold, pred):
    """Runs in a worker. The gold answer comes first: math-verify's comparison is asymmetric."""
    import math_verify

    if re.fullmatch(r"-?[\d.,]+", gold.strip()):
        # cut off a unit: math-verify knows some units, and reads others as d * o * l * ...
        no_units = ("hundred|thousand|million|billion|trillion|dozen|times|plus|minus|over|divided|"
                    "squared|cubed|sqrt|factorial|half")
        number = r"^(\\?\$?-?\d[\d,]*(?:\.\d+)?)"
        unit = r"(?!.*\b(?:" + no_units + r"))[A-Za-z]{3,}[A-Za-z ]*$"
        pred = re.sub(number + r"\s+" + unit, r"\1", pred.strip())
    pred = re.sub(r"(?<![\\a-zA-Z])(pi|sqrt)(?![a-zA-Z])", r"\\\1", pred)  # pi/2 is not p times i
    pred = re.sub(r"\\sqrt\s*\(([^()]*)\)", r"\\sqrt{\1}", pred)
    return bool(math_verify.verify(parse(gold), parse(pred), timeout_seconds=None))
