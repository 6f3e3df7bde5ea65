"""The judge inside of the sandbox, for assert and unittest tests: they share the program's process.

common/sandbox.py sends this file's compiled text along with common/inside.py.
"""
import os
import sys


class Tests:
    """assert and unittest tests run beside the program, for they patch its modules.

    So a program can forge a pass: by searching memory for the token, by changing a module that the
    tests use. What is cheap to stop is stopped: the tests have names of their own, the modules that
    judge are those from before the program, and no result may redefine what comparing means.
    """

    def __init__(self, request):
        import builtins
        import math
        import unittest
        import unittest.mock

        self.request, self.any = request, type(unittest.mock.ANY)
        self.code = compile(request["test"], "<tests>", "exec", dont_inherit=True)
        self.modules = dict(sys.modules)
        # methods of C, which no Python program can write
        self.native = (type(int.__eq__), type(dict.__contains__), type(None),
                       unittest.mock.MagicProxy)
        self.watched = [builtins, os, math, unittest.TestCase, unittest.TestSuite,
                        unittest.TestLoader]
        self.watched += [m for name, m in self.modules.items() if name.startswith("unittest")]
        # of modules only what can be called: mock_open() sets a variable of unittest.mock
        self.before = [{name: value for name, value in vars(x).items()
                        if callable(value) or isinstance(x, type)} for x in self.watched]

    def changed(self):
        # new names are fine: modules load parts of themselves late
        for thing, names in zip(self.watched, self.before):
            if any(vars(thing).get(name) is not value for name, value in names.items()):
                return True
        return False

    def runner(self, function, space):
        return lambda: self.run(function, space)

    def run(self, function, space):
        import builtins
        import math
        import unittest

        names = {"__name__": "__test__", "__builtins__": builtins}
        sys.modules["__test__"] = type(sys)("__test__")
        # the program's names that the tests use, such as a helper of the prompt; never a builtin
        used = read_names(self.code)
        for name in used & set(space) - set(vars(builtins)):
            names[name] = vars(math).get(name) or self.plain(space[name])
        names[self.request["entry"]] = self.plain(function)
        sys.modules.update(self.modules)
        self.check()
        exec(self.code, names)
        ran = self.request["kind"] == "assert"
        if "def check(" in self.request["test"]:
            names["check"](names[self.request["entry"]])
        cases = [c for c in names.values() if isinstance(c, type)]
        for case in [c for c in cases if issubclass(c, unittest.TestCase)]:
            suite = unittest.TestLoader().loadTestsFromTestCase(case)
            ran = ran or suite.countTestCases() > 0
            suite.debug()  # raises what a test raises; a skipped test does too
        self.check()
        if not ran:
            raise PermissionError("no test has run")
        return self.request["token"]

    def check(self):
        if self.changed():
            raise PermissionError("the program changes what judges it")

    def plain(self, function):
        """The same function (under any decorator), whose results compare as Python's own do."""
        if isinstance(function, type) or not callable(function):
            return function
        import functools

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
            for name in COMPARING:
                if not self.known(vars(owner).get(name), owner):
                    raise TypeError(f"a result that redefines {name}")
        mock = self.request["kind"] == "assert" and kind.__module__ == "unittest.mock"
        if kind is self.any or mock:
            raise TypeError("a result that equals everything")
        if isinstance(value, dict):
            value = [*value.keys(), *value.values()]
        if isinstance(value, (list, tuple, set, frozenset)):
            for item in value:
                self.honest(item, depth + 1)

    def known(self, method, owner):
        # by the file that it was compiled from: a class may lie about its module
        if type(method) in self.native:
            return True
        file = getattr(getattr(method, "__code__", None), "co_filename", "<")
        written = file == "<string>" and "__dataclass_fields__" in vars(owner)
        return written or not file.startswith("<")


COMPARING = [f"__{name}__" for name in "eq ne lt le gt ge sub rsub abs bool contains hash "
             "getattribute instancecheck round float int complex array".split()]


def read_names(code):
    """All names that compiled code may look up."""
    names = set(code.co_names)
    for constant in code.co_consts:
        if isinstance(constant, type(code)):
            names |= read_names(constant)
    return names
