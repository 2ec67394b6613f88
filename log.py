"""The log: Python's logging, with the lines, the tables and the levels of the wiki.

    [Thu Sep 01 2022 12:53:54.328]:[Debug]-[DMS] - page accessed first time, set info - new_page

In the picture: nothing; every box writes here.

Interface:
    start(level)             where edm.run begins: lines of at least this level go to stderr
    logger(name)             a box's logger: "DMS" gives lines that begin with [DMS]
    spt_table, lspt_table    the two tables, as the wiki prints them

Rules: a box asks its logger once, when it starts, which levels are on, and keeps the answers; so
a silent log costs a fault one test of a boolean and formats nothing. One call is one write, so
that lines of several ranks don't mix.

A page is followed through all boxes with --log-level debug --plain: nothing else comes or goes with it.

Source of the format: the output of the wiki's "End to End Examples", and of the lines around an
eviction, the original's tests_output/simple_eviction_page_test_debug.txt. Words that are spelled wrong
there are spelled right here.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterable


class _WikiFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        _, _, box = record.name.partition(".")
        record.prefix = f"[{box}] {':' if box == 'Usercode' else '-'} " if box else ""
        record.level = record.levelname.capitalize()
        return super().format(record)


def logger(name: str = "") -> logging.Logger:
    """The logger of a box of the picture; without a name, the banners'."""
    return logging.getLogger(f"edm.{name}" if name else "edm")


def start(level: str) -> None:
    """Write the log's lines of at least this level, to stderr."""
    handler = logging.StreamHandler(sys.stderr)
    line = "[%(asctime)s.%(msecs)03d]:[%(level)s]-%(prefix)s%(message)s"
    handler.setFormatter(_WikiFormatter(line, "%a %b %d %Y %H:%M:%S"))
    edm = logger()
    edm.handlers, edm.propagate = [handler], False
    edm.setLevel(level.upper())


def spt_table(rows: Iterable[tuple[int, str]]) -> str:
    """The SPT as the wiki prints it, from (address, location) of every page that was accessed."""
    lines = [f"address : {address:#x}  location : {location}" for address, location in rows]
    return "\n".join(["DMS- Print SPT STATE", "-----START SPT ----", *lines, "------END SPT-----"])


def lspt_table(rows: Iterable[tuple[int, int, bool]]) -> str:
    """The LSPT as the wiki prints it, from (address, page frame number, idle) of every page.

    The page frame number is 0 for who may not know it (pagemap shows it to CAP_SYS_ADMIN only).
    """
    lines = [f"address : {a:#x}  pfn : {pfn}  is_idle: {int(idle)}" for a, pfn, idle in rows]
    return "\n".join(["page list state: ", "-----START LSPT ----", *lines, "-----END LSPT ----"])
