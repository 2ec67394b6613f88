"""EDM: more memory than this machine has, for a Python program. See edm.py."""

from edm.edm import PAGE_SIZE, Config, Space, main, numpy_allocator, parse_arguments, run, space

__all__ = [
    "PAGE_SIZE",
    "Config",
    "Space",
    "main",
    "numpy_allocator",
    "parse_arguments",
    "run",
    "space",
]
