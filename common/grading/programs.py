"""The program in a solution text (§3.1: code), prepared as the benchmarks' graders do."""
import ast
import contextlib
import re
import warnings

FENCE = re.compile(r"([ \t>]*)(?:(?:[-*+]|\d{1,9}[.)])[ \t]+)?(`{3,}|~{3,})[ \t]*([^`\n]*)$")
PYTHON = re.compile(r"(?:lang(?:uage)?=)?(?:py|ipython)")


def fenced_blocks(text):
    """[(the first word after the fence, the block's text)], by the rules of CommonMark.

    A closing fence is at least as long as the opening one, of the same character, without a word,
    and indented by at most three more: ``` inside an indented docstring closes nothing. A block's
    own indent (in a list item) is taken off. An unclosed block runs to the end of the text. One
    pass over the lines; not a parser of all Markdown, for models indent blocks where CommonMark
    sees no fence.
    """
    blocks, fence = [], None
    for line in text.split("\n"):
        opening = FENCE.match(line.rstrip())
        if fence is None:
            if opening:
                quotes = re.compile(rf"(?:[ \t]*>[ ]?){{0,{opening[1].count('>')}}}")
                opening = FENCE.match(line.rstrip()[quotes.match(line).end():])
                # a list marker before the fence is part of the block's indent
                indent, fence = opening.start(2), opening[2]
                blocks.append((opening[3].split(" ")[0].strip("{}.").lower(), []))
            continue
        line = line[quotes.match(line).end():]  # a block in a quotation
        bare = line.strip()
        closes = len(bare) >= len(fence) and not bare.strip(fence[0])
        if closes and len(line) - len(line.lstrip()) <= indent + 3:
            fence = None
        else:
            # no more than white space goes: the first lines may be indented less
            lead = len(line) - len(line.lstrip(" \t"))
            blocks[-1][1].append(line[min(indent, lead):])
    return [(word, "\n".join(lines) + "\n") for word, lines in blocks if any(map(str.strip, lines))]


def parsed(code):
    """The syntax tree, None if there is none."""
    with contextlib.suppress(SyntaxError, ValueError, RecursionError, MemoryError):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # "invalid escape sequence" is the model's business
            return ast.parse(code)


def extract_code(text, problem):
    """The program in a solution text.

    The last fenced block that defines the entry point, else the last that is tagged as Python, else
    the last that is a program (sample output follows many programs), else the text. What lacks the
    entry point goes behind the prompt, which holds its signature and imports. Programs of
    benchmarks with a prompt are sanitized as evalplus does, unless the problem's meta["sanitize"]
    is False.
    """
    _, _, text = text.removeprefix("\ufeff").rpartition("</think>")
    meta, name = problem.meta, (problem.tests or {}).get("entry") or ""
    word = re.escape(name)
    defines = re.compile(rf"^[ \t]*(?:async +)?(?:def|class) +{word}\b"
                         rf"|^{word}[ \t]*(?::[^=\n]+)?=", re.M)
    blocks = fenced_blocks(text)
    # a block that is tagged as another language is none, unless there is nothing else
    blocks = [block for block in blocks if not block[0] or PYTHON.match(block[0])] or blocks
    codes = [code for _, code in blocks]
    candidates = (
        name and [code for code in codes if defines.search(code)]
        or [code for tag, code in blocks if PYTHON.match(tag)]
        or list(filter(is_program, codes))
        # an unfenced program, and a stray fence after it
        or list(filter(is_program, [text.split("```")[0]]))
        or codes or [text])
    code = candidates[-1].removeprefix("\ufeff")
    prompt, helpers = meta.get("prompt"), meta.get("helpers", "")
    if not prompt or not name:
        return code
    if not defines.search(code):
        code, helpers = prompt + code, ""
    # helpers (HumanEval/38): what the prompt defines and the body may call
    return sanitized(code, name, helpers, meta.get("sanitize", True))


def is_program(code):
    """"3" and "a, b" parse, too: there has to be a statement or a call."""
    nodes = ast.walk(parsed(code) or ast.Module([]))
    return any(isinstance(n, ast.Call) or isinstance(n, ast.stmt) and not isinstance(n, ast.Expr)
               for n in nodes)


# ------------------------------------------------------------------ as evalplus sanitizes


def sanitized(code, entry, helpers="", strict=True):
    """Imports, and those definitions and assignments that the entry point needs, in their order.

    A call or an assert of the model's own at the end of its program is no part of the answer. Code
    without a syntax tree loses its prose before and after, or stays as it is. Helpers go behind
    imports from __future__, which must come first.
    """
    tree = parsed(code) or parsed(without_prose(code))
    if tree is None:
        return helpers + code
    imports, needed = (ast.Import, ast.ImportFrom), reachable(tree, entry)
    body = [node for node in tree.body
            if not strict or isinstance(node, imports) or names_of(node) & needed]
    future = [node for node in body if getattr(node, "module", None) == "__future__"]
    body = [node for node in body if node not in future]
    if not any(entry in names_of(node) for node in body):
        return helpers + code
    try:
        texts = ["\n".join(map(ast.unparse, nodes)) for nodes in (future, body)]
    except RecursionError:  # an expression that is nested very deeply
        return helpers + code
    return "\n".join([texts[0], helpers.rstrip("\n"), texts[1]]).lstrip("\n")


def names_of(node):
    """The names that a statement at the top level defines."""
    if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
        return {node.name}
    if not isinstance(node, (ast.Assign, ast.AnnAssign, ast.AugAssign)):
        return set()
    targets = node.targets if isinstance(node, ast.Assign) else [node.target]
    # `table[0] = 1` and `Node.next = None` belong to table and Node
    return {n.id for t in targets for n in ast.walk(t) if isinstance(n, ast.Name)}


def reachable(tree, entry):
    """The entry point and all that it names, directly or not."""
    uses = {}
    for node in tree.body:
        words = {n.id for n in ast.walk(node) if isinstance(n, ast.Name)}
        for name in names_of(node):
            uses.setdefault(name, set()).update(words)
    needed, todo = set(), [entry]
    while todo:
        name = todo.pop()
        if name not in needed:
            needed.add(name)
            todo += uses.get(name, ())
    return needed


def without_prose(code):
    """A program between sentences: from its first line of code to where it stops parsing."""
    start = re.search(r"^(?:import |from \w|def |class |async def |@)", code, re.M)
    lines = (code[start.start():] if start else code).split("\n")
    for _ in range(20):  # each round cuts at one error: prose has few lines that parse
        try:
            ast.parse("\n".join(lines))
            break
        except SyntaxError as error:
            lines = lines[:(error.lineno or 1) - 1]
        except (ValueError, RecursionError, MemoryError):
            break
    return "\n".join(lines)


def examples(question, entry):
    """Literal arguments of the calls that a question shows: ">>> f(1, 2)" -> [[1, 2]]."""
    found = []
    for line in re.findall(r"^[ \t]*(?:>>>|assert\b)(.*)", question, re.M):
        tree = parsed(line.strip())
        calls = [n for n in ast.walk(tree) if isinstance(n, ast.Call)] if tree else ()
        for call in calls:
            if getattr(call.func, "id", None) == entry:
                with contextlib.suppress(ValueError):
                    found.append([ast.literal_eval(a) for a in call.args])
    return found
