"""Final answers in math: found in a solution's text, and compared with the gold answer."""
import contextlib
import functools
import json
import logging
import os
import re
import resource
import signal
import subprocess
import sys
import threading
from itertools import chain, repeat
from pathlib import Path

from common.grading import judge
from common.grading.notation import normalise, prepared

# "answer is", "answer:", with Markdown's marks; a heading "# Answer"; a line "A:"
STATED = re.compile(r"(?im)(?<![a-z])answer(?: to [^\n.:]{1,80})?[ \t*_`]*"
                    r"(?:(?:is|(?:must|should|would|will) be|comes out to|turns out to be|equals)"
                    r"\b[ \t*_`]*:?|[:=])(?:[ \t*]*(?:therefore|thus|then|indeed|simply|clearly|"
                    r"exactly|just|equal to|given by)\b)?"
                    r"|^(?:#{1,6}[ \t]*[*_]{0,2}|[*_]{2})(?:the[ \t])?(?:final[ \t])?answer"
                    r"[ \t*_#]*$"
                    r"|^\*\*(?:final[ \t])?answer\*\*(?=[ \t])|^A:")
GSM8K = re.compile(r"(?m)^.*?####[ \t]*([^\n]*)")
# a number, not followed by a heading's ". Multiply" or ") Multiply"
VALUE = re.compile(r"[*_`]*-?[\\$€£]*\d[\d.,]*(?!\S*[.):]\s+[A-Za-z])(?<![.)])"
                   r"|[*_`]*(?![A-Z]?[a-z]{3,}[*_`]*\Z)\S*\Z")  # nor a heading's one word
# "42, since ..." and what else may follow an answer without a full stop
CLAUSE = re.compile(r"(?i)[\s,;:(–—-]{1,3}(?:since|because|as|so|which|given|where|thus|hence|due|"
                    r"when|meaning|this|i\.e\.|that is|and (?:we|so|the|this|it|thus|hence|I))\b"
                    # after a value any clause: "42, found by ...", "42 (see above)", "$42$ by ..."
                    r"|(?<=[\d$})\]%])(?:[ \t]*[,;:(–—]|[ \t]-|(?=[ \t]*(?:by the|by [a-z]{4}|"
                    r"for [a-z]|if)\b))[ \t]{0,3}(?!and\b|or\b)(?:[a-z]{2,}\b|I\b)")
QUESTION = re.compile(r"\n\s{0,9}[*#_ ]{0,9}(?:(?:Question|Problem|Q|Human|User)(?: \d{1,3})?\s?"
                      r"[*_]{0,2}:|Instruction)")
THOUGHT = re.compile(r"(?i)<(/?)think(?:ing)?>")


def extract_answer(text):
    """The final answer in a solution text, or None.  "so \\boxed{\\frac{1}{2}}." -> "\\frac{1}{2}"

    The last \\boxed{...}; without one, what is stated last: GSM8K's "#### ..." and "A: ...",
    PRM800K's "# Answer", "answer is ..." or "answer: ...". Nothing else counts: a guess such as
    "the last number" would reward solutions that never committed to an answer. Neither does what
    is thought (<think>...</think>), nor what comes after a question that the model asks itself.
    """
    final = without_thoughts(text)
    first = QUESTION.split(final.strip(), maxsplit=1)[0]
    answer = final_box(first) or stated(first)
    return answer if answer or first == final.strip() else final_box(final) or stated(final)


def without_thoughts(text):
    """What comes after the last thought, or before one that is not closed."""
    tags = list(THOUGHT.finditer(text))
    end = max((tag.end() for tag in tags if tag[1]), default=0)
    cut = next((tag.start() for tag in tags if tag.start() >= end), len(text))
    return text[end:cut]


def final_box(text):
    """What is in the last \\boxed{...} that is closed, in one pass over the text."""
    last, opened = None, []  # braces nest, so a regular expression will not do
    boxes = {match.end() - 1 for match in re.finditer(r"\\(?:boxed|fbox)\s{0,9}{", text)}
    for match in re.finditer(r"\\[\\{}]|[{}]", text):
        i = match.start()
        if text[i] == "\\":  # \{ is a set's, and \\ ends a row
            continue
        if text[i] == "{":
            opened.append(i)
        elif opened and (start := opened.pop()) in boxes and (last is None or start > last[0]):
            last = start, text[start + 1:i].strip()
    # \boxed 7, as Hendrycks et al. read it
    bare = re.findall(r"\\boxed ?([^\s${}\\.,]+)", text) if last is None else ()
    return last and last[1] or (bare[-1] if bare else None)


def stated(text):
    """The answer that is stated last in words or after GSM8K's ####."""
    starts = [match.end() for match in STATED.finditer(text)]
    end = len(text.rstrip())
    for match in GSM8K.finditer(text):
        # ####, too, may be a heading: before the end a value is needed
        if match[1].strip() and (match.end() >= end or VALUE.match(match[1])):
            starts.append(match.start(1))
    if not starts:
        return None
    # the first line that is more than delimiters
    lines = text[max(starts):max(starts) + 2000].split("\n")
    n = next((n for n, line in enumerate(lines) if line.strip(" \t*_`$\\[]():>-+")), 0)
    line = lines[n][:1000]
    if n:  # a list's mark, or a quotation's
        line = re.sub(r"^[ \t]*(?:[-+*>][ \t]+)+", "", line)
    # a full stop, not the point of 3.14, nor the mark of 5! or 11,\!111
    line = re.split(r"[.?](?:\s|$)|(?<!\\)!\s+(?=[A-Z])", line)[0]
    line = re.sub(r"(?<![\w)}])\*\*|\*\*(?![\w(\\])|__|`|\\[\[\]()]", "", line)
    clause = CLAUSE.split(line.strip(" \t*$.,;:"), maxsplit=1)[0]
    return clause.strip(" \t*$.,;:") or None


def equivalent_many(pairs):
    """Is each prediction equal to its gold answer? pairs [(gold, pred)] -> [bool]; None never is.
    A list or tuple of gold answers: is it equal to any of them?

    Equal strings, integers, and numbers in a base are decided at once. The rest goes to
    math-verify, which needs milliseconds a pair and can hang on odd input: it runs in a worker
    that can be killed. (math-verify's own limit is SIGALRM, which fails in threads.)
    """
    pairs = [(gold if isinstance(gold, (list, tuple)) else [gold], pred) for gold, pred in pairs]
    singles = chain.from_iterable(zip(golds, repeat(pred)) for golds, pred in pairs)
    equal = {pair: decide(*pair) for pair in singles}
    todo = [pair for pair, verdict in equal.items() if verdict is None]
    equal.update(zip(todo, judge.parallel(verify, todo)))
    return [any(equal[one, pred] for one in golds) for golds, pred in pairs]


def decide(gold, pred):
    """True or False where strings can tell, None where math-verify must."""
    if gold is None or pred is None:
        return False
    a, b = normalise(gold), normalise(pred)
    integers = re.fullmatch(r"-?\d+", a) and re.fullmatch(r"-?\d+", b)
    # 52_8 is not 52_9, nor 52: math-verify drops the base. What is asked for is the notation, so
    # 42 is not 52_8 either.
    in_a_base = any(re.fullmatch(r"-?[\dA-F.]+_\w+", s) for s in (a, b))
    # No answer has 1,000 characters, and parsing one would take up the time limit.
    if a == b or integers or in_a_base or not 0 < len(b) <= 1000:
        return a == b
    return None


# ------------------------------------------------------------ workers that compare

_idle = []  # workers live on between calls: importing sympy costs a second
os.register_at_fork(after_in_child=_idle.clear)  # they belong to the parent


def verify(gold, pred):
    """Compare in a worker. What hangs or kills it is unequal."""
    try:
        worker = _idle.pop()
        while worker.poll() is not None:  # killed meanwhile, by a system without memory say
            worker = _idle.pop()
    except IndexError:
        serve_it = [sys.executable, "-c", "from common.grading.answers import serve; serve()"]
        worker = subprocess.Popen(serve_it, cwd=Path(__file__).parents[2], text=True,
                                  stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    # its CPU time is limited by itself; the wall clock is for one that waits for ever
    limit = 5 * judge.slowness()
    patience = threading.Timer(20 * limit + 60, worker.kill)
    patience.start()
    with contextlib.suppress(BrokenPipeError):
        print(json.dumps([limit, gold, pred]), file=worker.stdin, flush=True)
    reply = worker.stdout.readline()
    patience.cancel()
    if reply:
        _idle.append(worker)
    else:
        stop(worker)
    if reply == "missing\n":
        raise RuntimeError("math answers need math-verify: pip install 'math-verify[antlr4_13_2]'")
    return reply == "true\n"


def stop(worker):
    worker.kill()
    worker.communicate()  # no zombie, no open pipes


def close():
    """Stop the workers; the next use starts new ones."""
    while _idle:
        stop(_idle.pop())


def serve():
    """A worker's whole life: a line [limit, gold, pred] in, a line true, false or missing out.

    Beyond its CPU time a signal ends it.
    """
    logging.disable(logging.WARNING)  # math-verify warns that it has no time limit of its own
    resource.setrlimit(resource.RLIMIT_AS, (4 << 30, resource.getrlimit(resource.RLIMIT_AS)[1]))
    for line in sys.stdin:
        limit, gold, pred = json.loads(line)
        signal.setitimer(signal.ITIMER_PROF, limit)
        try:
            verdict = "true" if math_equal(gold, pred) else "false"
        except ImportError:  # math-verify, or the parser that it needs
            verdict = "missing"
        except Exception:  # math-verify raises whatever sympy raises
            verdict = "false"
        signal.setitimer(signal.ITIMER_PROF, 0)
        print(verdict, flush=True)


@functools.lru_cache(10_000)
def parse(tex):
    """LaTeX as math-verify's expressions. Remembered: a vote compares each with many."""
    from math_verify import LatexExtractionConfig, parse
    from math_verify.parser import NormalizationConfig

    # units are gone already: math-verify's would take the t of 5t for one. Nor is it asked for any
    # number in a text that it cannot read as a whole.
    config = NormalizationConfig(basic_latex=True, units=False, malformed_operators=True,
                                 nits=True, boxed="last")
    latex = LatexExtractionConfig(normalization_config=config)
    return parse(f"\\boxed{{{tex}}}", [latex], parsing_timeout=None)


def math_equal(gold, pred):
    """Runs in a worker. The gold answer comes first: math-verify's comparison is asymmetric."""
    import math_verify
    import sympy

    a, b = prepared(gold), prepared(pred)
    if a is None or b is None:  # prose
        return plain(gold) == plain(pred)
    a, b = comparable(parse(a), parse(b))
    # equal: Floats to 6 decimals, exact ones to as many digits; 50% is 50 and is 0.5
    exact = not any(isinstance(x, sympy.Basic) and x.has(sympy.Float) for x in (*a, *b))
    return math_verify.verify(a, b, timeout_seconds=None, numeric_precision=100 if exact else 15)


def plain(text):
    # -5 or more is not 5 or more
    return re.sub(r"(?![-+.:/^<>=]\s?[\d\\])[^\w]", "", normalise(text)).casefold()


def comparable(gold, pred):
    """Numbers below 0.01 -> the same times a power of ten: math-verify rounds to 6 decimals, and
    1.2e-6 would be 1.3e-6. In pairs, sets, intervals and matrices all numbers get the same factor.
    """
    import sympy

    sizes = [list(filter(None, map(magnitude, numbers(x)))) for x in (gold[:1], pred[:1])]
    if all(sizes) and 0 < (least := min(map(min, sizes))) < 0.01:
        if all(isinstance(x, sympy.Expr) for x in (gold[0], pred[0])):
            least = max(map(max, sizes))  # one of them may be a little below the other's power
        if least < 0.01:
            scale = 10 ** -int(sympy.floor(sympy.log(least, 10)) + 2)
            return [[scaled(x[0], scale)] for x in (gold, pred)]
    return gold, pred


def containers():
    import sympy
    from sympy.sets import FiniteSet, Interval, Union

    return sympy.Tuple, FiniteSet, Interval, Union, sympy.MatrixBase


def numbers(x):
    """The numbers that a value or a container holds."""
    import sympy

    if isinstance(x, (list, *containers())):
        items = x.flat() if isinstance(x, sympy.MatrixBase) else getattr(x, "args", x)
        return list(chain.from_iterable(map(numbers, items)))
    return [x] if isinstance(x, sympy.Expr) and x.is_number and x.is_finite is not False else []


def magnitude(x):
    # a hidden zero, such as sqrt(2) sqrt(3) - sqrt(6), is not comparable
    return abs(x.evalf(15)) if x.is_comparable else 0


def scaled(x, scale):
    import sympy

    if isinstance(x, sympy.MatrixBase):
        return x.applyfunc(lambda item: scaled(item, scale))
    if isinstance(x, containers()):
        return x.func(*(scaled(item, scale) for item in x.args))
    return x.doit() * scale if numbers(x) else x
