"""Answers as people and models write them -> forms in which equal answers can be compared.

    normalise("$1{,}234$.")      == "1234"              # for strings
    prepared(r"2\\text{ million}") == r"2\\cdot1000000"    # for math-verify
    prepared("5 feet six inches")  is None               # prose: only an equal text is equal

math-verify 0.9 reads as much of an answer as it understands and drops the rest: it takes 52_8 for
52, 4^\\frac{3}{2} for 3/2, 1 1/2 for 1, 5 \\text{ hours and } 30 \\text{ minutes} for 5, and any
\\text{...} at the end for a unit. So here every part of an answer becomes mathematics, is known to
be a unit, or makes the answer prose.
"""
import functools
import re

# spellings of one sign, which TeX has as a word or in ASCII
SIGNS = {"−": "-", "–": "-", "×": r"\cdot ", "·": r"\cdot ", "÷": "/", "π": r"\pi ",
         "∞": r"\infty ", "√": r"\sqrt ", "≤": r"\le ", "≥": r"\ge ", "≠": r"\ne ",
         "∅": r"\emptyset ", "∪": r"\cup ", "∈": r"\in ", "°": r"^\circ ", "²": "^2", "³": "^3",
         "º": r"^\circ ", "…": r"\ldots ", "...": r"\ldots ",
         "½": r"\frac{1}{2}", "¼": r"\frac{1}{4}", "¾": r"\frac{3}{4}",
         **dict.fromkeys("\u00a0\u2009\u202f", " ")}  # spaces that do not break, or are thin
SYNONYMS = [(r"\\(?:left|right|displaystyle|big|Big|bigg|Bigg)(?![a-zA-Z])", ""),
            (r"\\[dtc]frac(?![a-zA-Z])", r"\\frac"), (r"\\varnothing", r"\\emptyset"),
            (r"\\(?:degree|textdegree)(?![a-zA-Z])|\^\s*{\s*\\circ\s*}", r"^\\circ"),
            (r"\\dots[a-z]?(?![a-zA-Z])", r"\\ldots"), (r"\\{\s*\\}", r"\\emptyset"), (r"\\%", "%"),
            (r"\\[\[\]()]", ""), (r"\\hspace\*?\s*{[^{}]*}", " "),
            (r"\\pounds(?![a-zA-Z])", "£"), (r"\s+", " ")]
# 52_8, (52)_{8}, 52_{\\text{eight}} without its dress, 52 (base 8)
BASE = re.compile(r"^(-?)\(?([\dA-Fa-f.]+)\)?\s?(?:_|\(?(?:in )?base)\s?{?\(?(?:base ?)?(\w+)"
                  r"\)?}?\)?$")
DRESS = re.compile(r"\\(?:text|textbf|textit|textrm|textnormal|mathrm|mbox|rm)\s*{([^{}]*)}")


@functools.lru_cache(100_000)
def normalise(answer):
    """An answer as written -> a form in which the commonest equal spellings are equal strings.

    "$1{,}234$" -> "1234"; "033" -> "33"; "\\dfrac12" -> "\\frac{1}{2}";
    "\\left( 3, 4 \\right)" -> "(3,4)". Only rewrites that cannot make unequal answers equal belong
    here; math-verify judges the rest.
    """
    s = DRESS.sub(r"\1", clean(answer))
    s = re.sub(r"\\frac\s*(\d)\s*(\d)", r"\\frac{\1}{\2}", s).replace(r"^\circ", "°")
    s = re.sub(r"(?<![0-9A-Za-z])\s+|\s+(?![0-9A-Za-z])", "", s)  # "1 1/2" is not "11/2"
    s = BASE.sub(lambda m: f"{m[1]}{m[2].upper()}_{NUMBERS.get(m[3].lower(), m[3])}", s)
    s = s.removesuffix("_10")
    if re.fullmatch(r"[-+]?\d{1,999}(\.0*)?", s):  # int() refuses more than 4,300 digits
        return str(int(s.split(".")[0]))
    return s


def clean(answer):
    """Without typesetting, and with one sign for one thing."""
    # what can only be a thousands mark
    s = re.sub(r"(?<=\d)(?:\{,\}|,\s*\\!\s*|\\,|\\text\{,\})(?=\d{3}(?!\d))", "", answer.strip())
    s = s.replace("{,}", ",")
    s = re.sub(r"(?<=[\w)}])\*\*(?=[\w({\\-])", "^", s)  # a power in Python, no Markdown
    for sign, tex in SIGNS.items():
        s = s.replace(sign, tex)
    s = re.sub(r",\s*\\!\s*", ",", s).replace(r"\!", "")
    s = re.sub(r"\\\$|\$|\*\*|`", "", s)  # also Markdown's marks
    s = re.sub(r"(?<!\\)\\[,;: ]|\\q?quad(?![a-zA-Z])|~", " ", s)  # \\ ends a matrix's row
    for pattern, instead in SYNONYMS:
        s = re.sub(pattern, instead, s)
    s = thousands(s.strip()).rstrip(". ")
    return s


def thousands(s):
    """1,234 and 1 234 are one number; 3, 120 and (3,120) are two."""
    if re.search(r"[(\[]|\\{|^{.*}$", s):
        return s
    # a list says so with a semicolon from here on: without its space it would be a number
    s = re.sub(r"(?<=\d),\s+(?=\d)", ";", s)
    for mark, after in ((",", r"\d|,\d"), (" ", r"[\d,/]|\s*/")):
        number = rf"(?<![\d.,])[1-9]\d{{0,2}}(?:{mark}\d{{3}})+(?!{after})"
        s = re.sub(number, lambda match, mark=mark: match[0].replace(mark, ""), s)
    return s


# ------------------------------------------------------------ words

UNITS = ("one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen "
         "sixteen seventeen eighteen nineteen").split()
TENS = "twenty thirty forty fifty sixty seventy eighty ninety".split()
NUMBERS = {"zero": 0, **{word: n for n, word in enumerate(UNITS, 1)},
           **{word: 10 * n for n, word in enumerate(TENS, 2)}}
SCALES = {"hundred": 100, "thousand": 1000, "million": 10 ** 6, "billion": 10 ** 9,
          "trillion": 10 ** 12, "dozen": 12, "gross": 144, "ten": 10, "score": 20,
          "lakh": 10 ** 5, "crore": 10 ** 7}
PARTS = {"half": 2, "halve": 2, "third": 3, "fourth": 4, "quarter": 4, "fifth": 5, "sixth": 6,
         "seventh": 7, "eighth": 8, "ninth": 9, "twelfth": 12,
         **{f"{word}th": n for n, word in enumerate(UNITS, 1) if n in (10, 11) or n > 12},
         **{f"{word[:-1]}ieth": 10 * n for n, word in enumerate(TENS, 2)},
         "hundredth": 100, "thousandth": 1000, "millionth": 10 ** 6, "billionth": 10 ** 9}
# not "second": it is a time
OPERATIONS = {"times": r"\cdot ", "plus": "+", "minus": "-", "over": "/", "divided by": "/",
              "out of": "/", "squared": "^2", "cubed": "^3", "factorial": "!",
              "percent": "%", "percentage": "%",
              "negative": "-", "infinity": r"\infty ", "empty set": r"\emptyset "}
FUNCTIONS = "arcsin|arccos|arctan|sinh|cosh|tanh|sin|cos|tan|cot|csc|log|ln|exp|sqrt|pi"
# these change a value, too, in ways that are not worth a translation; the last: 3 p.m.
CHANGES = re.compile(r"(?i)(?<![\\a-z])(?:root|power|more|less|fewer|than|choose|modulo|mod|"
                     r"remainder|double|triple|twice|thrice|pairs?|couples?|between|out|not|no|or|"
                     r"and|to|in \d|past|before|after|ago|below|under|inverse|reciprocal|\w*fold|"
                     r"\w*illi(?:on|ard)s?|\w+(?:teen|ie|dred|sand|ten|fif|six)ths?|nines|mil|"
                     r"mln|bn|googol|per (?:thousand|hundred|million|billion|mille)|myriads?|"
                     r"\w*root|cis|octal|binary|hex(?:adecimal)?|sin|cos|tan|cot|log|ln|exp|"
                     r"(?<=\d)\s*'?[ap]'?\.?\s?'?m)(?![a-z])")
# m for metre stands after a space: 5m is five times m
SHORT = "cm|mm|km|dm|kg|mg|ml|mL|ft|in|lbs?|oz|yd|mi|hrs?|mph|kph|kmh|cc|sq|cu|Hz|(?<=\\s)[mgshLl]"
NUMBER = r"\d+(?:\.\d*)?|\.\d+"


def worded(s):
    """Words for numbers and operations -> signs: "two thirds" -> "2\\cdot\\frac{1}{3}"."""
    tens = rf"(?i)\b({'|'.join(TENS)})[- ]({'|'.join(UNITS[:9])})\b"
    s = re.sub(tens, lambda m: str(NUMBERS[m[1].lower()] + NUMBERS[m[2].lower()]), s)
    names = rf"(?i)\b({'|'.join(NUMBERS)})\b"
    s = re.sub(names, lambda m: str(NUMBERS[m[1].lower()]), s)
    s = re.sub(r"(?i)\b(?:square )?root (?:of )?(\d+)\b", r"\\sqrt{\1}", s)
    for word, sign in OPERATIONS.items():
        # "5 times" and nothing more is a unit
        last = r"(?!\s*$)" if sign in (r"\cdot ", "+", "-", "/") else ""
        s = re.sub(rf"(?i)(?<![a-z\\]){word}\b{last}", lambda _, sign=sign: sign, s)
    one = "|".join([*SCALES, *PARTS])
    s = re.sub(rf"(?i)^(?:an?\s+)?(?=(?:{one})\b)", "1 ", s)
    scales = rf"(?i)(?<=[\d}})])[\s'-]*({'|'.join(SCALES)})s?(?![a-z])"
    s = re.sub(scales, lambda m: rf"\cdot {SCALES[m[1].lower()]}", s)
    parts = rf"(?i)(?<=[\d}})])[\s'-]*({'|'.join(PARTS)})s?(?![a-z])"
    return re.sub(parts, lambda m: rf"\cdot \frac{{1}}{{{PARTS[m[1].lower()]}}}", s)


def without_unit(s):
    """A quantity -> its value, None if words are left whose part in the value nobody knows."""
    s = re.sub(r"(?i)^(?:(?:about|approximately|roughly|around|exactly|usd)\s+|[€£¥₹]\s*)", "", s)
    s = re.sub(r"\s*[€£¥₹]$|(?<=\d)\s*\^?\s*{?\s*'?(?:st|nd|rd|th)\s*}?$", "", s)
    s = re.sub(r"[\s']+(?=%)|(?<=\\circ)\s*'?[CFK]$", "", s)  # 20 °C is 20
    # dressed words, which prepared() marks with a ', may be short; bare ones might be xyz
    word = rf"(?:'[A-Za-z]+|(?:(?<=\s)[A-Za-z]{{3,}}|[A-Za-z]{{4,}}|(?:{SHORT})(?![A-Za-z])))"
    unit = rf"\s*{word}(?:(?:[\s./'-]|\\cdot)+[A-Za-z]+)*(?:\s*\^{{?-?\d}}?)?\.?"
    match = re.fullmatch(rf"(.*[\d}})!%]|.*\\(?:pi|circ)\s*)({unit})", s)
    if match and not re.search(r"\d", match[2].split("^")[0]) and not CHANGES.search(match[2]):
        s = match[1]
    s = s.replace("'", "")
    bare = re.sub(r"\\(?:begin|end|operatorname|math[a-z]+)\s*{[^{}]*}|\\[a-zA-Z]+", " ", s)
    if re.search(r"\\[lc]dots|\d\)?\s*_", s):  # left out; in a base: math-verify drops both
        return None
    return None if CHANGES.search(bare) or re.search(r"[A-Za-z]{4,}", bare) else s


# ------------------------------------------------------------ TeX

TOKEN = re.compile(r"\\[a-zA-Z]+|\\.|\d+(?:\.\d+)?|.", re.S)
ARGUMENTS = {r"\frac": 2, r"\binom": 2, r"\sqrt": 1, r"\overline": 1, "^": 1, "_": 1}
INFIX = {r"\choose": r"\binom", r"\over": r"\frac"}
CLOSING = {"{": "}", "(": ")]", "[": ")]"}  # [0, 1) is an interval


def braced(s):
    """TeX with all its braces: \\frac\\pi6 -> \\frac{\\pi}{6}; 4^\\frac12 -> 4^{\\frac{1}{2}};
    7 \\choose 5 -> \\binom{7}{5}."""
    return group(TOKEN.findall(s)[::-1], "")[0]


def group(tokens, closing):
    """Read tokens (last first) up to a closing bracket. -> (what was before it, the bracket)"""
    parts = []
    while tokens:
        token = tokens.pop()
        if token in closing:
            return "".join(parts), token
        if token in INFIX:  # of all that stands before and after it in this group
            rest, bracket = group(tokens, closing)
            return f"{INFIX[token]}{{{''.join(parts)}}}{{{rest}}}", bracket
        parts.append(one(token, tokens, "".join(parts[-1:])))
    return "".join(parts), closing[:1]  # it is missing at the end


def one(token, tokens, before=""):
    """A token with all that belongs to it."""
    if token in CLOSING:
        return token + "".join(group(tokens, CLOSING[token]))
    text = token
    if token == r"\sqrt" and tokens and tokens[-1] == "[":  # \sqrt[3]{8}
        text += one(tokens.pop(), tokens)
    for _ in range(ARGUMENTS.get(token, 0)):
        text += f"{{{argument(token, tokens, before)}}}"
    ends = not re.fullmatch(r"\\[a-zA-Z]+", text) or not "".join(tokens[-1:]).isalnum()
    return text if ends else text + " "  # a word of TeX ends where no letter follows


def argument(macro, tokens, before):
    while tokens and tokens[-1].isspace():
        tokens.pop()
    if not tokens:
        return ""
    token = tokens.pop()
    if token == "{":
        return group(tokens, "}")[0]
    if macro in ("^", "_", r"\sqrt") and token == "(":  # plain text: 2^(1/2), sqrt(2)
        return group(tokens, ")")[0]
    if macro == "^" and token in ("-", "+"):  # plain text: x^-1
        return token + argument(macro, tokens, before)
    # TeX takes one digit; a number that follows ^ was meant whole: 2^10
    if token.isdigit() and (macro not in ("^", "_") or before.startswith(r"\log")):
        if token[1:]:
            tokens.append(token[1:])
        return token[0]
    return one(token, tokens).strip()


def exact_decimals(s):
    """0.1\\overline{6} -> \\frac{15}{90}; 1.5e3 -> 1.5\\cdot 10^{3}; 1 1/2 -> 1\\frac{1}{2}."""
    def fraction(match):
        whole, first, period = match[1] or "0", match[2], match[3]
        top = int(whole + first + period) - int(whole + first)
        return rf"\frac{{{top}}}{{{'9' * len(period)}{'0' * len(first)}}}"
    s = re.sub(r"(\d*)\.(\d*)\\(?:overline|bar|dot)\s*{?(\d+)}?", fraction, s)
    s = re.sub(rf"(?<![\w.])({NUMBER})[eE]([-+]?\d+)(?!\w)", r"\1\\cdot 10^{\2}", s)
    s = re.sub(r"(?<=\d)\s*x\s*(?=10\s*\^)", r"\\cdot ", s)
    return re.sub(r"(?<![\w.}])(\d+)[\s-]+(\d+)/(\d+)(?![\w.])", r"\1\\frac{\2}{\3}", s)


# ------------------------------------------------------------ the whole

@functools.lru_cache(10_000)
def prepared(answer):
    """An answer -> LaTeX that math-verify reads as it is meant, or None: it is prose."""
    def marked(match):  # each word of \text{...} gets a ' in front: it is no product of letters
        # but \mathrm{e} and \mathrm{i} are values
        return " " + re.sub(r"(?<![\\A-Za-z])(?!(?:i|e|pi)(?![a-z]))([A-Za-z]+)", r"'\1",
                            match[1]) + " "
    s = DRESS.sub(marked, clean(answer))
    s = re.sub(r"'(and|or)\b", r"\1", s)
    # two and a half
    s = re.sub(rf"(?i)(?<=\w)\s+and\s+'?(?:an?|one)\s+'?({'|'.join(PARTS)})\b",
               lambda m: rf"\frac{{1}}{{{PARTS[m[1].lower()]}}}", s)
    items = []
    # an "and" between two values makes a list; other ones belong to a unit
    for item in re.split(r"\s*(?:;|(?:,\s*)?\s(?:and|or)\s(?=.*[\d\\=]))\s*", s):
        item = exact_decimals(worded(item))
        item = re.sub(rf"(?<![\\a-zA-Z'])({FUNCTIONS})(?![a-zA-Z])", r"\\\1", item.strip())
        items.append(without_unit(item))
    return None if None in items else braced(", ".join(items))
