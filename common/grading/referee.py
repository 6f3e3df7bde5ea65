"""assert and unittest tests, inside of the sandbox: they share the program's process.

sandbox.py sends this file's text along with that of inside.py.
"""
import ast
import builtins
import contextlib
import functools
import importlib
import math
import os
import sys
import unittest
from os.path import isfile  # tests patch os.path

COMPARING = [f"__{name}__" for name in "eq ne lt le gt ge sub rsub abs bool contains hash "
             "getattribute instancecheck round float int complex array array_ufunc array_function "
             "class".split()]
# methods of C, which no Python program can write
NATIVE = (type(int.__eq__), type(dict.__contains__), type(None))


class Referee:
    """assert and unittest tests run beside the program, for they patch its modules.

    So a program can forge a pass: by searching memory for the token, by changing a module that the
    tests use. What is cheap to stop is stopped: the tests have names of their own, the modules that
    judge are those from before the program, and no result may redefine what comparing means.
    """

    def __init__(self, request):
        self.request = request
        # 60 ms: only where it is needed
        self.mock = importlib.import_module("unittest.mock") if "mock" in request["test"] else None
        self.dataclass = importlib.import_module("dataclasses").make_dataclass
        tree = ast.parse(request["test"])
        imported = set()  # what the tests import is there before the program
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom):
                imported.add(node.module)
            elif isinstance(node, ast.Import):
                imported.update(alias.name for alias in node.names)
        for name in imported:
            with contextlib.suppress(Exception):
                importlib.import_module(name)
        self.modules = dict(sys.modules)
        self.code = compile(tree, "<tests>", "exec")
        self.used = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
        judges = [builtins, os, os.path, math, unittest.TestCase, unittest.TestSuite,
                  unittest.TestLoader]
        judges += [m for name, m in self.modules.items()
                   if name.startswith("unittest") or name in imported]
        # of modules only what can be called: mock_open() sets a variable of unittest.mock
        self.before = []
        for thing in judges:
            self.before += [(thing, *item) for item in vars(thing).items() if callable(item[1])]

    def check(self):
        # new names are fine: modules load parts of themselves late
        if any(vars(thing).get(name) is not value for thing, name, value in self.before):
            raise PermissionError("the program changes what judges it")

    def run(self, function, space):
        """Raises what a test raises. -> the token of success"""
        names = {"__name__": "__test__", "__builtins__": builtins}
        sys.modules["__test__"] = type(sys)("__test__")
        # the program's names that the tests use, such as a helper of the prompt; never a builtin
        for name in (self.used & set(space)) - set(vars(builtins)):
            names[name] = vars(math).get(name) or self.plain(space[name])
        names[self.request["entry"]] = self.plain(function)
        sys.modules.update(self.modules)
        self.check()
        exec(self.code, names)
        ran = self.request["kind"] == "assert"
        if "def check(" in self.request["test"]:
            names["check"](names[self.request["entry"]])
        classes = [value for value in names.values() if isinstance(value, type)]
        for case in [c for c in classes if issubclass(c, unittest.TestCase)]:
            suite = unittest.TestLoader().loadTestsFromTestCase(case)
            ran = ran or suite.countTestCases() > 0
            suite.debug()  # a skipped test raises, too
        self.check()
        if not ran:
            raise PermissionError("no test has run")
        return self.request["token"]

    def plain(self, function):
        """The same function (under any decorator), whose results compare as Python's own do."""
        if isinstance(function, type) or not callable(function):
            return function

        @functools.wraps(function)
        def checked(*args, **kwargs):
            value = function(*args, **kwargs)
            self.honest(value)
            return value

        return checked

    def honest(self, value, depth=0):
        kind = type(value)
        if depth > 50 or kind in (int, float, str, bool, type(None)):
            return
        for owner in kind.__mro__[:-1]:
            if not all(self.known(name, vars(owner).get(name), owner) for name in COMPARING):
                raise TypeError("a result that redefines what comparing means")
        if isinstance(value, dict):
            value = [*value.keys(), *value.values()]
        if isinstance(value, (list, tuple, set, frozenset)):
            for item in value:
                self.honest(item, depth + 1)

    def known(self, name, method, owner):
        """Not written by the program? By the file it was compiled from: a class may lie on this."""
        method = getattr(method, "fget", method)
        code = getattr(method, "__code__", None)
        file = getattr(code, "co_filename", "<")
        if file.endswith("mock.py"):  # ANY equals everything
            return self.mock is not None and owner is not type(self.mock.ANY)
        if self.mock and type(method) is self.mock.MagicProxy or type(method) in NATIVE:
            # `__eq__ = int.__ge__` is another's
            return getattr(method, "__name__", name) == name
        if code and file == "<string>" and "__dataclass_fields__" in vars(owner):
            fields = [f.name for f in vars(owner)["__dataclass_fields__"].values() if f.compare]
            twin = vars(self.dataclass("Twin", fields, order=True, frozen=True)).get(name)
            return twin and (code.co_code, code.co_names) == (
                twin.__code__.co_code, twin.__code__.co_names)
        # Mapping is compiled into Python
        return isfile(file) or file == "<frozen _collections_abc>"
