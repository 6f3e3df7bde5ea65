"""Is an output right? Compared in the caller, as evalplus, LiveCodeBench and APPS compare.

What a program sent stays JSON: none of it is hashed, calls code, or is compared in more than linear
time. common/inside.py writes that JSON.
"""
import contextlib
import json
import math
import re
from decimal import Decimal

from common.inside import digest, to_json


def encode(value):
    """A Python value -> what JSON can carry: (1, 2) -> {"t": "tuple", "v": [1, 2]}."""
    return json.loads(to_json(value))


DECODE = {
    "tuple": tuple, "set": set, "frozenset": frozenset, "dict": dict, "bytes": bytes.fromhex,
    "complex": lambda v: complex(*v), "int": lambda v: int(v, 16),
    "object": lambda v: ("object", v), "digest": lambda v: ("digest", v),
}


def decode(value):
    """The inverse of encode(); objects and digests as (kind, text). For what is trusted only."""
    if isinstance(value, dict):
        return DECODE[value["t"]](decode(value["v"]))
    return [decode(v) for v in value] if isinstance(value, list) else value


def same(out, expected, atol=1e-6):
    """Equal, floats within atol + 1e-7 relative (evalplus's rule), also inside containers."""
    return same_code(encode(out), expected, atol)


def same_code(code, expected, atol):
    """same() for what a program sent: it stays JSON, so that none of it is hashed or calls code."""
    kind, inner = (code["t"], code["v"]) if isinstance(code, dict) else (None, code)
    if isinstance(expected, tuple) and len(expected) == 2 and expected[0] in ("digest", "object"):
        return (kind, inner) == expected
    if kind == "digest":
        return inner == digest(expected)
    if kind == "int":
        code = int(inner, 16)
    if isinstance(expected, (list, tuple)):
        if kind != (None if isinstance(expected, list) else "tuple") or not isinstance(inner, list):
            return False
        pairs = zip(inner, expected)
        return len(inner) == len(expected) and all(same_code(a, b, atol) for a, b in pairs)
    if isinstance(expected, (set, frozenset)):
        return kind in ("set", "frozenset") and unordered(inner) == unordered(map(encode, expected))
    if isinstance(expected, dict):
        if kind != "dict":
            return False
        table = {plain(key): value for key, value in inner}
        keys = [(plain(encode(key)), value) for key, value in expected.items()]
        return table.keys() == dict(keys).keys() and all(
            same_code(table[key], value, atol) for key, value in keys)
    if isinstance(expected, complex):
        parts = [expected.real, expected.imag]
        return kind == "complex" and same_code(inner, parts, atol)
    if isinstance(expected, float) and type(code) in (int, float):
        both_nan = code != code and expected != expected
        with contextlib.suppress(OverflowError):  # an int beyond all floats
            close = abs(code - expected) <= atol + 1e-7 * abs(expected)
            return code == expected or both_nan or close
    if isinstance(expected, (bytes, bytearray)):
        return kind == "bytes" and inner == expected.hex()
    return not isinstance(code, (dict, list)) and code == expected


def plain(code):
    """A text that equal values share: 1, 1.0 and True are one key of a dict."""
    def number(code):
        if isinstance(code, bool) or isinstance(code, float) and code.is_integer():
            return encode(int(code))
        if isinstance(code, list):
            return [number(v) for v in code]
        return {"t": code["t"], "v": number(code["v"])} if isinstance(code, dict) else code

    return json.dumps(number(code))


def unordered(codes):
    # texts, since Python randomises their hashes: integers may be chosen to collide
    return {plain(code) for code in codes}


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
    if "." in y and abs(float(x) - float(y)) <= 1e-6 * max(1.0, abs(float(y))):
        return True
    return Decimal(x) == Decimal(y)


def oracle_accepts(name, code, args, want, atol):
    """evalplus's special oracles, for tasks whose statement leaves more than one answer."""
    if name == "set":
        return unordered(code["v"] if isinstance(code, dict) else code) == unordered(
            map(encode, want))
    if name == "truth":  # a match object, True, or whatever is not None
        return (code is None or code is False) == (want is None or want is False)
    if name == "anything":
        return True
    out = float(code) if isinstance(code, float) else int(code)
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


def right(tests, i, text, token=None):
    """Is the JSON text of the i-th answer right? A malformed answer is a wrong one."""
    try:
        if tests["kind"] in ("assert", "unittest"):
            return text == f'"{token}"'
        expected, atol = tests["outputs"][i], tests.get("atol") or 1e-6
        # what is far longer than the right answer is not read at all; 16 digits may stand for one
        if len(text) > 1 << 16 and len(text) > 20 * len(to_json(expected)):
            return False
        code = json.loads(text)
        if tests["kind"] == "stdin":
            return same_text(code, expected)
        name = tests.get("oracle")
        with contextlib.suppress(TypeError, ValueError, OverflowError):  # a type it does not know
            if name and oracle_accepts(name, code, tests["inputs"][i], expected, atol):
                return True
        if tests.get("wrapped") and isinstance(expected, list) and len(expected) == 1:
            if same_code(code, expected[0], atol):
                return True  # some rows of APPS wrap the result in a list
        return name != "root" and same_code(code, expected, atol)
    except (ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RecursionError):
        return False
