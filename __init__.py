"""EDM: more memory than this machine has, for a Python program. See edm.py."""

import importlib

# The module of each name.
_MODULES = dict.fromkeys(("PAGE_SIZE", "Config", "Space", "main", "run", "space", "start"), "edm")
_MODULES |= dict.fromkeys(("forget", "prefetch", "resident"), "advice")
_MODULES |= {"numpy_allocator": "numpy_mem_handler", "parse_arguments": "launch"}
__all__ = list(_MODULES)


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULES})


def __getattr__(name: str) -> object:
    # Imported when it is used first. `python -m edm` begins with the current folder on sys.path, and
    # would import modules from there; __main__.py takes that folder away.
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"edm.{_MODULES[name]}"), name)
