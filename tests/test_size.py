"""size.py: how many lines of code there are."""

import size


def test_blanks_comments_and_docstrings_are_no_lines_of_code():
    source = '''"""A module.

It does nothing."""

# A comment.
import os  # another


class Empty:
    """A class."""

    text = """two
    lines"""
'''
    assert size.lines_of_code(source) == 4


def test_the_library_does_not_grow_unnoticed():
    found = size.sizes()
    assert size.core(found) <= 2200
    assert sum(found.values()) <= 3400
