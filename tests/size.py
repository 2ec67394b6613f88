"""How many lines of code the library has, without blanks, comments and docstrings.

    python tests/size.py

The core is what a fault or an eviction passes through.
"""

import ast
import io
import tokenize
from pathlib import Path

ROOT = Path(__file__).parents[1]
CORE = (
    "edm", "address_space", "pager", "dm_handler", "lpet", "lspt", "readahead", "page_idle",
    "page_store", "dms", "mpi_client", "messages", "uffd_ctypes", "log",
)  # fmt: skip
NO_CODE = (
    tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT,
    tokenize.ENDMARKER,
)  # fmt: skip


def lines_of_code(source: str) -> int:
    """The lines that have a token, but for those of docstrings."""
    code = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in NO_CODE:
            code.update(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(
            node
        ):
            code.difference_update(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    return len(code)


def sizes() -> dict[str, int]:
    """The lines of each module of the library, by its path from here."""
    modules = [*ROOT.glob("*.py"), *ROOT.glob("startup/*.py")]
    return {str(path.relative_to(ROOT)): lines_of_code(path.read_text()) for path in modules}


def core(found: dict[str, int]) -> int:
    """The lines of the core."""
    return sum(found[f"{name}.py"] for name in CORE)


if __name__ == "__main__":
    found = sizes()
    for name, lines in sorted(found.items()):
        print(f"{lines:5} {name}")
    print(f"{core(found):5} the core\n{sum(found.values()):5} the library")
