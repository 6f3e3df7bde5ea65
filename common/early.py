"""--help and wrong flags answer in half a second: torch and transformers take four to import.

A script imports this before what is slow. If Python was started with that script, it runs once
with stand-ins for the slow libraries, up to `with parser:`, where its flags have been read and
checked (Sphinx's autodoc_mock_imports is the same idea). --help and errors end there. If the flags
are fine, our own modules are forgotten, and the script goes on as if nothing had been.
"""
import importlib.util
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType

SLOW = ("torch", "transformers", "safetensors", "huggingface_hub")
ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = ("annotate", "evaluate", "prm_model", "search", "similarity", "train")
rehearsing = False


class FlagsAreFine(BaseException):
    """Raised by `with parser:` in the rehearsal. No Exception: nobody is to catch it."""


class Standin(ModuleType):
    """A module, function, class or decorator of a slow library, as far as definitions need one."""
    __path__ = ()

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return Standin(name)

    def __call__(self, *arguments, **_):
        # as a decorator it leaves the function as it is
        return arguments[0] if arguments and callable(arguments[0]) else self

    def __mro_entries__(self, bases):
        return ()  # a class derived from it is derived from nothing

    def __bool__(self):
        return False  # dist.is_initialized()


class Finder:
    """Finds Standins in place of the slow libraries."""

    def find_spec(self, name, path=None, target=None):
        return ModuleSpec(name, self) if name.partition(".")[0] in SLOW else None

    def create_module(self, spec):
        return Standin(spec.name)

    def exec_module(self, module):
        pass


def is_ours(module):
    file = getattr(module, "__file__", None)
    return bool(file) and ROOT in Path(file).resolve().parents and module.__name__ != __name__


def rehearse(script):
    """Run a script's main() as far as `with parser:`. SystemExit: its flags were not fine."""
    global rehearsing
    before = dict(sys.modules)
    for name, module in before.items():
        if name != "__main__" and is_ours(module):
            del sys.modules[name]  # half imported, if another module asked for this one
    spec = importlib.util.spec_from_file_location("rehearsal", script)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    sys.meta_path.insert(0, finder := Finder())
    rehearsing = True
    try:
        spec.loader.exec_module(module)
        module.main()
    except (FlagsAreFine, Exception):
        pass  # a real error comes again with the real libraries, and is reported then
    finally:
        rehearsing = False
        sys.meta_path.remove(finder)
        for name, module in list(sys.modules.items()):
            # what else was imported may stay: compiled modules cannot be imported twice
            if is_ours(module) or isinstance(module, Standin):
                del sys.modules[name]
        sys.modules.update(before)


def flags_are_fine():
    """Called by `with parser:`."""
    if rehearsing:
        raise FlagsAreFine


def is_script(file):
    """Is it one of ours? In a Python prompt there is none, and a fork's own may not run twice."""
    path = Path(file or "").resolve()
    return path.parent == ROOT / "paper" or path.parent == ROOT and path.stem in SCRIPTS


main = getattr(sys.modules["__main__"], "__file__", None)
if is_script(main) and not any(map(sys.modules.__contains__, SLOW)):
    rehearse(Path(main).resolve())
