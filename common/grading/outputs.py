"""Is an output right? Compared in the caller, as evalplus, LiveCodeBench and APPS compare.

Both sides are JSON that encode() of inside.py makes. What a program sent stays JSON: none of it is
hashed, calls code, or is compared in more than linear time.
"""
import contextlib
import json
import math
import re
from decimal import Decimal

from common.grading.inside import answer, encode, plain  # noqa: F401 (for callers)

DECODE = {
    "tuple": tuple, "set": set, "frozenset": frozenset, "dict": dict, "bytes": bytes.fromhex,
    "int": lambda v: int(v, 16), "complex": lambda v: complex(*v),
    "object": lambda v: ("object", v),
}


def decode(code):
    """The inverse of encode(), for what is trusted; an object comes back as ("object", repr)."""
    if isinstance(code, dict):
        return DECODE[code["t"]](decode(code["v"]))
    return [decode(v) for v in code] if isinstance(code, list) else code


def same(out, expected, atol=1e-6):
    """Two codes: equal, floats within atol + 1e-7 relative (evalplus's rule), also in containers.

    A list is no tuple, but a set is a frozenset.
    """
    if isinstance(out, dict) and out["t"] == "int" and isinstance(expected, float):
        out = int(out["v"], 16)
    if isinstance(expected, float) and isinstance(out, (int, float)):
        with contextlib.suppress(OverflowError):  # an int beyond all floats
            both_nan = out != out and expected != expected
            return out == expected or both_nan or abs(out - expected) <= atol + 1e-7 * abs(expected)
    if isinstance(out, list) and isinstance(expected, list):
        return len(out) == len(expected) and all(map(same, out, expected, [atol] * len(out)))
    if not isinstance(out, dict) or not isinstance(expected, dict):
        return type(out) not in (dict, list) and out == expected
    kind, a, b = expected["t"], out["v"], expected["v"]
    if "set" in kind:
        return "set" in out["t"] and {plain(v) for v in a} == {plain(v) for v in b}
    if kind != out["t"]:
        return False
    if kind == "dict":
        a, b = [{plain(key): value for key, value in side} for side in (a, b)]
        return a.keys() == b.keys() and all(same(a[key], value, atol) for key, value in b.items())
    return same(a, b, atol)


NUMBER = re.compile(r"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d{1,4})?")


def same_text(out, expected):
    """stdin programs: equal word by word, numbers as numbers; with a point, to 1e-6.

    Problems with several right answers have checkers that the data sets do not ship: such answers
    are judged wrong.
    """
    a, b = out.split(), expected.split()
    return len(a) == len(b) and all(x == y or same_number(x, y) for x, y in zip(a, b))


def same_number(x, y):
    # no test prints longer ones, and a megabyte of digits would take minutes to convert
    if max(len(x), len(y)) > 400 or not NUMBER.fullmatch(x) or not NUMBER.fullmatch(y):
        return False
    close = "." in y and abs(float(x) - float(y)) <= 1e-6 * max(1.0, abs(float(y)))
    return close or Decimal(x) == Decimal(y)


def oracle_accepts(name, out, args, expected, atol):
    """evalplus's special oracles, for tasks whose statement leaves more than one answer."""
    if name == "set":
        a, b = (code["v"] if isinstance(code, dict) else code for code in (out, expected))
        return same({"t": "set", "v": a}, {"t": "set", "v": b})
    if name == "truth":  # a match object, True, or whatever is not None
        return (out is None or out is False) == (expected is None or expected is False)
    if name == "anything":
        return True
    if name == "root":  # HumanEval/32: any zero of the polynomial, not the reference's
        return abs(sum(c * math.pow(out, k) for k, c in enumerate(args[0]))) <= atol
    if name == "pyramid":  # Mbpp/581: "height" may be the pyramid's own; the reference's is slant
        edge, height = args
        return abs(out - round(edge**2 + 2 * edge * math.hypot(edge / 2, height))) <= atol
    if name == "digits":  # Mbpp/558: digit by digit of two numbers padded to one length
        width = max(len(str(n)) for n in args)
        pairs = zip(*(str(n).zfill(width) for n in args))
        return out == sum(abs(int(x) - int(y)) for x, y in pairs)
    return name == "zero" and out == 0


def right(text, expected, args, oracle=None, atol=1e-6, wrapped=False):
    """Is a JSON text that a program sent right? expected: another one. Malformed is wrong."""
    # what is far longer than the right answer is not read at all; 16 digits may stand for one
    if text == expected and oracle != "root":
        return True
    if len(text) > 1 << 16 and len(text) > 20 * len(expected):
        return False
    try:
        out, expected = json.loads(text), json.loads(expected)
        with contextlib.suppress(TypeError, ValueError, OverflowError):  # a type it does not know
            if oracle and oracle_accepts(oracle, out, args, expected, atol):
                return True
        if wrapped and isinstance(expected, list) and len(expected) == 1:
            if same(out, expected[0], atol):
                return True  # some rows of APPS wrap the result in a list
        return oracle != "root" and same(out, expected, atol)
    except (ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RecursionError):
        return False

