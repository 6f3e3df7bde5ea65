"""The tiny world: plain-English sums and small Python functions; a rule checks their every step.

It stands in for GSM8K/MATH and APPS/TACO (paper, §3.1) so that everything in this repository runs
on a laptop with no download. A problem is a list of operations, told in English, and solved one
line per operation:

    math   Ann has 7 shells. In January she finds 5. In February she doubles them. How many now?
           (stories of five to nine months: the models know no shorter ones)
           January: 7+5=12
           February: 12*2=24
           Answer: 24
    code   Let a be xs without its last 2 items. Let b be the items of a that are at least 4.
           Return the sum of b.
           def f(xs):
            a = xs[:-2]
            b = [v for v in a if v >= 4]
            return sum(b)

Text is written by *authors*. An author slips now and then, and has habits: steps that he mostly
gets wrong in the same way (forgets the carry, takes "at least" for "more than", ...). Language
models pre-trained on such text are the policies of this world: their errors are systematic, which
is what makes majority voting weak, on real models too. The careful author of the backbones' text
makes every kind of mistake and corrects each at once ("Wait, ..."), and so a model of that text
must learn to check (compare Ye et al., Physics of Language Models 2.2, arXiv 2408.16293).

    problems(domain, split, n)   dicts {"id", "question", "domain", "answer" | "tests", "meta"},
                                 those of train are in no other split
    write(problem, author, rng)  one solution as a list of steps
    grade(problem, steps)        the truth of every step
"""
import hashlib
import random

MONTHS = ("January February March April May June July August September October November "
          "December").split()
VARIABLES = list("abcdefgh")
NAMES = [("Ann", "she"), ("Ben", "he"), ("Eva", "she"), ("Tom", "he"), ("Mia", "she"),
         ("Leo", "he")]
THINGS = ["shells", "coins", "books", "cards", "pens", "nuts"]
LARGEST = 60  # values stay within 1 .. 60, so that a small model can learn all the sums there are

# An operation is (kind, n). MATH: what the story says, and the sign it stands for.
MATH = {"gain": (["finds {}", "buys {}", "gets {}"], "+"),
        "lose": (["loses {}", "gives away {}", "sells {}"], "-"),
        "double": (["doubles them"], "*"), "halve": (["sells half"], "/")}
# CODE: what the specification says of the list before, and the expression that does it.
CODE = {"drop_first": ("{x} without its first {n} items", "{x}[{n}:]"),
        "keep_first": ("the first {n} items of {x}", "{x}[:{n}]"),
        "drop_last": ("{x} without its last {n} items", "{x}[:-{n}]"),
        "keep_last": ("the last {n} items of {x}", "{x}[-{n}:]"),
        "add": ("{x} with {n} added to each", "[v + {n} for v in {x}]"),
        "subtract": ("{x} with {n} taken from each", "[v - {n} for v in {x}]"),
        "more": ("the items of {x} that are more than {n}", "[v for v in {x} if v > {n}]"),
        "at_least": ("the items of {x} that are at least {n}", "[v for v in {x} if v >= {n}]"),
        "less": ("the items of {x} that are less than {n}", "[v for v in {x} if v < {n}]"),
        "at_most": ("the items of {x} that are at most {n}", "[v for v in {x} if v <= {n}]"),
        "reverse": ("{x} in reverse", "{x}[::-1]"),
        "up": ("{x} sorted upwards", "sorted({x})"),
        "down": ("{x} sorted downwards", "sorted({x})[::-1]")}
# the same expressions as functions of (xs, n)
LISTS = {kind: eval("lambda xs, n: " + code.format(x="xs", n="n"))
         for kind, (_, code) in CODE.items()}
RETURNS = {"sum": ("the sum of {x}", "sum({x})"), "len": ("the number of items of {x}", "len({x})"),
           "all": ("{x}", "{x}")}
# Operations per problem, the knob of difficulty: the shipped policy solves 30 to 60 % of the test
# problems. Those of "hard" are as long as the longest that the models were trained on.
STEPS = {"train": {"math": (5, 9), "code": (4, 7)}, "test": {"math": (5, 9), "code": (4, 6)},
         "hard": {"math": (9, 9), "code": (7, 7)}}

# Habits: for the kinds of step on the left, an author writes the wrong thing on the right (see
# _habit_math, _write_code).
SWAPS = {"last": {"drop_last": "keep_last", "keep_last": "drop_last"},
         "bound": {"at_least": "more", "at_most": "less"},
         "first": {"drop_first": "keep_first", "keep_first": "drop_first"},
         "order": {"down": "up", "up": "down"}, "sign": {"add": "subtract", "subtract": "add"}}
# slip: rate of random mistakes; fix: share of them corrected in the next step; habits: rate of each
AUTHORS = {
    "careful": dict(slip=0.25, fix=1.0, habits={}),
    "A": dict(slip=0.015, fix=0.1,
              habits={"carry": 0.6, "double": 0.6, "last": 0.6, "bound": 0.6}),
    "B": dict(slip=0.015, fix=0.1,
              habits={"borrow": 0.6, "halve": 0.6, "first": 0.6, "order": 0.6}),
    "C": dict(slip=0.03, fix=0.1, habits={"carry": 0.2, "borrow": 0.4, "sign": 0.6, "bound": 0.2}),
}


# ---------------------------------------------------------------- problems

def problems(domain, split="test", n=None, seed=0, steps=None, strict=True):
    """Yield n problems (without n: no end). steps: (fewest, most) operations.

    Problem i depends on (domain, split, seed, steps, i) alone. A hash of the operations decides who
    may have it, train or the others, whatever their seeds. strict: only functions each of
    whose steps matters, so that the tests notice every mistake; without it one wrong step in five
    is harmless, as when a list is sorted, then summed.
    """
    i = 0
    while n is None or i < n:
        rng = random.Random(f"{domain} {split} {seed} {steps} {i}")
        fewest, most = steps or STEPS[split][domain]
        while True:
            p = (_draw_math if domain == "math" else _draw_code)(rng, rng.randint(fewest, most))
            meta = p["meta"]
            digest = hashlib.blake2b(repr(meta).encode(), digest_size=2).digest()
            if (digest[0] < 26) == (split != "train"):  # one problem in ten is held out
                if not (strict and domain == "code"
                        and harmless(meta["ops"], meta["end"], p["tests"]["inputs"])):
                    break
                fewest = most = len(meta["ops"])  # as long a one: long ones fail more often
        p["meta"]["prompt"] = p["meta"].get("starter")  # as in tasks.py; not hashed with the rest
        yield {"id": f"tiny-{domain}-{split}-{seed}-{i}", **p}
        i += 1


def apply_math(x, kind, n):
    return {"gain": x + n, "lose": x - n, "double": x * 2, "halve": x // 2}[kind]


def _draw_math(rng, n_ops):
    (name, pronoun), thing = rng.choice(NAMES), rng.choice(THINGS)
    x = start = rng.randint(2, 30)
    story, ops = [f"{name} has {x} {thing}."], []
    for month in MONTHS[:n_ops]:
        while True:
            kind = rng.choices(list(MATH), weights=[4, 4, 1, 1])[0]
            n = rng.randint(2, 9) if kind in ("gain", "lose") else 2
            y = apply_math(x, kind, n)
            if 1 <= y <= LARGEST and not (kind == "halve" and x % 2):
                break
        story.append(f"In {month} {pronoun} {rng.choice(MATH[kind][0]).format(n)}.")
        ops.append((kind, n))
        x = y
    question = " ".join(story) + " How many now?"
    return dict(question=question, domain="math", answer=str(x), meta=dict(start=start, ops=ops))


def _draw_code(rng, n_ops):
    source, spec, ops = "xs", [], []
    for var in VARIABLES[:n_ops]:
        kind = rng.choice([k for k in CODE if not ops or k != ops[-1][0]])
        slices = kind in ("drop_first", "drop_last", "keep_first", "keep_last")
        n = rng.randint(1, 3) + 4 * kind.startswith("keep") if slices else rng.randint(2, 9)
        ops.append((kind, n))
        spec.append(f"Let {var} be {CODE[kind][0].format(x=source, n=n)}.")
        source = var
    end = rng.choice(list(RETURNS))
    question = " ".join(spec) + f" Return {RETURNS[end][0].format(x=source)}.\ndef f(xs):"
    inputs = [[[rng.randint(0, 20) for _ in range(rng.randint(9, 14))]] for _ in range(24)]
    outputs = [run_ops(xs, ops, end) for (xs,) in inputs]
    tests = dict(kind="call", entry="f", inputs=inputs[4:], outputs=outputs[4:],
                 example_inputs=inputs[:4])
    return dict(question=question, domain="code", tests=tests,
                meta=dict(ops=ops, end=end, starter="def f(xs):\n"))


def run_ops(xs, ops, end):
    """What the function should return: the specification carried out, no written code run."""
    for kind, n in ops:
        xs = LISTS[kind](xs, n)
    return {"sum": sum, "len": len, "all": list}[end](xs)


def harmless(ops, end, inputs):
    """Could a step be left out, swapped, or be off by one in its number, unnoticed by the tests?"""
    outputs = [run_ops(xs, ops, end) for (xs,) in inputs]
    for k, (kind, n) in enumerate(ops):
        wrong = [[]] + [[(swap[kind], n)] for swap in SWAPS.values() if kind in swap]
        wrong += [[(kind, n + d)] for d in (-1, 1) if "{n}" in CODE[kind][1] and n + d]
        if any(all(run_ops(xs, ops[:k] + other + ops[k + 1:], end) == out
                   for (xs,), out in zip(inputs, outputs)) for other in wrong):
            return True
    return False


# ---------------------------------------------------------------- authors

def write(problem, author, rng):
    """One solution of an author: a list of steps, with mistakes and corrections, no separators."""
    return (_write_math if problem["domain"] == "math" else _write_code)(
        problem["meta"], AUTHORS[author], rng)


def _habit_math(x, kind, n):
    """(habit, wrong result) of a step that invites a habitual mistake, else (None, None)."""
    if kind == "gain" and n >= 7 and x % 10 + n >= 10:
        return "carry", x + n - 10          # 15+8=13
    if kind == "lose" and n >= 7 and x % 10 < n:
        return "borrow", x - n + 10         # 42-8=44
    if kind == "double" and x % 10 >= 5:
        return "double", 2 * x - 10         # 17*2=24
    if kind == "halve" and x // 10 % 2:
        return "halve", x // 2 - 5          # 34/2=12
    return None, None


def _write_math(meta, author, rng):
    x, steps, k = meta["start"], [], 0
    while k < len(meta["ops"]):
        kind, n = meta["ops"][k]
        line = MONTHS[k] + ": {}{}{}={}"
        sign = MATH[kind][1]
        habit, wrong = _habit_math(x, kind, n)
        y = y_bad = apply_math(x, kind, n)
        good = bad = line.format(x, sign, n, y)
        if rng.random() < author["habits"].get(habit, 0):
            bad, y_bad = line.format(x, sign, n, wrong), wrong
        elif rng.random() < author["slip"]:
            bad, y_bad = _slip_math(meta, k, x, line, rng)
        if bad == good or y_bad < 0:
            steps.append(good)
        elif rng.random() < author["fix"]:
            steps += [bad, "Wait, " + good]
        else:
            steps.append(bad)
            y = y_bad
            if not bad.startswith(MONTHS[k]):  # he skipped a month and goes on from there
                k += 1
        x, k = y, k + 1
    return steps + [f"Answer: {x}"]


def _slip_math(meta, k, x, line, rng):
    """A random mistake at operation k on value x: (line, its result)."""
    kind, n = meta["ops"][k]
    what = rng.random()
    if what < 0.6:                                      # errs as somebody's habit is, or miscounts
        habit, wrong = _habit_math(x, kind, n)
        y = wrong if habit else apply_math(x, kind, n) + rng.choice([-10, -2, -1, 1, 2, 10])
        return line.format(x, MATH[kind][1], n, y), y
    if what < 0.75:                                     # misreads the number
        n = rng.randint(2, 9)
    elif what < 0.85:                                   # misreads the verb
        kind = rng.choice(["gain", "lose"])
    elif what < 0.93 and k + 1 < len(meta["ops"]):      # skips a month
        (kind, n), line = meta["ops"][k + 1], MONTHS[k + 1] + ": {}{}{}={}"
    else:                                               # copies the value wrongly
        x = max(1, x + rng.choice([-10, -1, 1, 10]))
    n = n if kind in ("gain", "lose") else 2
    y = apply_math(x, kind, n)
    return line.format(x, MATH[kind][1], n, y), y


def _code_line(k, kind, n, source=None):
    return f" {VARIABLES[k]} = " + CODE[kind][1].format(
        x=source or (VARIABLES[k - 1] if k else "xs"), n=n)


def _write_code(meta, author, rng):
    steps, ops = [], meta["ops"]
    for k, (kind, n) in enumerate(ops):
        good = bad = _code_line(k, kind, n)
        swap = next((h for h in author["habits"] if kind in SWAPS.get(h, ())), None)
        if swap and rng.random() < author["habits"][swap]:
            bad = _code_line(k, SWAPS[swap][kind], n)
        elif rng.random() < author["slip"]:
            bad = _slip_code(ops, k, rng)
        if bad == good:
            steps.append(good)
        elif rng.random() < author["fix"]:
            steps += [bad, good + "  # wait"]
        else:
            steps.append(bad)
    return steps + [" return " + RETURNS[meta["end"]][1].format(x=VARIABLES[len(ops) - 1])]


def _slip_code(ops, k, rng):
    """A random mistake at operation k."""
    (kind, n), what = ops[k], rng.random()
    swaps = [s[kind] for s in SWAPS.values() if kind in s]
    if swaps and what < 0.5:
        return _code_line(k, rng.choice(swaps), n)
    if "{n}" in CODE[kind][1] and what < 0.75:
        return _code_line(k, kind, max(1, n + rng.choice([-1, 1, 2])))
    if k and what < 0.85:                               # works on an older list: skips a step
        return _code_line(k, kind, n, source=(["xs"] + VARIABLES)[rng.randrange(k)])
    return _code_line(k, rng.choice(list(CODE)), n)


# ---------------------------------------------------------------- the truth

def grade(problem, steps):
    """True for each step after which the solution is right so far; a step that corrects the one
    before is right."""
    return (_grade_math if problem["domain"] == "math" else _grade_code)(problem["meta"], steps)


def _grade_math(meta, steps):
    values = [meta["start"]]  # values[k]: the number before operation k
    for kind, n in meta["ops"]:
        values.append(apply_math(values[-1], kind, n))
    right = [f"{MONTHS[k]}: {values[k]}{MATH[kind][1]}{n}={values[k + 1]}"
             for k, (kind, n) in enumerate(meta["ops"])]
    return _follow(right + [f"Answer: {values[-1]}"], steps, lambda s: s.removeprefix("Wait, "))


def _grade_code(meta, steps):
    right = [_code_line(k, kind, n) for k, (kind, n) in enumerate(meta["ops"])]
    end = " return " + RETURNS[meta["end"]][1].format(x=VARIABLES[len(right) - 1])
    return _follow(right + [end], steps, lambda s: s.removesuffix("  # wait"))


def _follow(right, steps, plain):
    """Walk the steps beside the right ones. k: right steps so far; broken: wrong ones since."""
    k, broken, labels = 0, 0, []
    for step in steps:
        body = plain(step)
        redo = body != step
        if redo and k and body == right[k - 1] and not broken:
            labels.append(True)  # says again what was right already: no harm
        elif k < len(right) and body == right[k] and (not broken or (redo and broken == 1)):
            k, broken = k + 1, 0
            labels.append(True)
        else:
            broken += 1
            labels.append(False)
    return labels
