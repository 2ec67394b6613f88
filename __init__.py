"""EDM: more memory than this machine has, for a Python program. See edm.py."""

import importlib

# The modules of what is not in edm.py.
_MODULES = dict.fromkeys(("forget", "prefetch", "resident"), "advice")
_MODULES |= {"numpy_allocator": "numpy_mem_handler", "parse_arguments": "launch"}
__all__ = [
    "PAGE_SIZE", "Config", "Space", "forget", "main", "numpy_allocator", "parse_arguments", "prefetch",
    "resident", "run", "space", "start",
]  # fmt: skip


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def __getattr__(name: str) -> object:
    # Imported when it is used first. `python -m edm` begins with the current folder on sys.path, and
    # would import modules from there; __main__.py takes that folder away.
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"edm.{_MODULES.get(name, 'edm')}"), name)
