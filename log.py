"""The log: Python's logging, with the lines and the levels of the wiki.

    [Thu Sep 01 2022 12:53:54.328]:[Debug]-[DMS] - page accessed first time, set info - new_page

In the picture: every box writes here.

Interface:
    start(level)             called by edm.run: lines of at least this level go to stderr
    logger(name)             the logger of a box: lines of logger("DMS") begin with [DMS]
    of_box(name)             that, and what else a box needs that writes banners and tables

Rules: a box asks its logger once, at its start, whether a level is on, and keeps the answer. So a silent
log costs a fault one test of a boolean, and formats nothing. Each call is one write, so that the lines of
several ranks don't mix.

To follow a page through all boxes, use --log-level debug --plain: each page comes and leaves alone.

Source of the format: the output of the wiki's "End to End Examples"; for the lines around an eviction,
the original's tests_output/simple_eviction_page_test_debug.txt. Spelling mistakes there are corrected.
"""

import logging


class _WikiFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        _, _, box = record.name.partition(".")
        record.prefix = f"[{box}] {':' if box == 'Usercode' else '-'} " if box else ""
        record.level = record.levelname.capitalize()
        return super().format(record)


def logger(name: str = "") -> logging.Logger:
    """The logger of a box of the picture; without a name, that of the banners."""
    return logging.getLogger(f"edm.{name}" if name else "edm")


def of_box(name: str) -> tuple[logging.Logger, logging.Logger, bool]:
    """The logger of a box, that of the banners, and whether lines of level info are written."""
    return logger(name), logger(), logger(name).isEnabledFor(logging.INFO)


def start(level: str) -> None:
    """Write the lines of at least this level to stderr."""
    handler = logging.StreamHandler()  # to stderr
    line = "[%(asctime)s.%(msecs)03d]:[%(level)s]-%(prefix)s%(message)s"
    handler.setFormatter(_WikiFormatter(line, "%a %b %d %Y %H:%M:%S"))
    edm = logger()
    edm.handlers, edm.propagate = [handler], False
    edm.setLevel(level.upper())
