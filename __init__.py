"""EDM: more memory than this machine has, for a Python program. See edm.py."""

from edm.edm import PAGE_SIZE, Config, Space, main, parse_arguments, run

__all__ = ["PAGE_SIZE", "Config", "Space", "main", "parse_arguments", "run"]
