"""NumPy's large arrays in the space: unchanged programs, with the same answers."""

import re
import subprocess
import sys

import pytest
from conftest import PROGRAMS, needs_userfaultfd

from edm.uffd_ctypes import PAGE_SIZE

pytest.importorskip("numpy", exc_type=ImportError)
pytestmark = needs_userfaultfd
RESIDENT = 8  # MiB
EDM_RUN = (sys.executable, "-m", "edm", "run", "--resident", f"{RESIDENT}M")


def plain(*command, **options):
    return subprocess.run(
        [sys.executable, *map(str, command)], text=True, capture_output=True, check=True, **options
    ).stdout


def test_arrays_live_in_the_space_cost_nothing_untouched_and_give_everything_back(run):
    ended = run(*EDM_RUN, "--resident", "16M", PROGRAMS / "numpy_arrays.py", timeout=120)
    assert (ended.returncode, ended.stdout) == (0, "numpy SUCCESS\n")


def test_arrays_that_are_made_and_freed_while_the_interpreter_ends_are_as_in_plain_python(run):
    ended = run(*EDM_RUN, PROGRAMS / "numpy_ends.py")
    assert (ended.returncode, ended.stdout) == (0, plain(PROGRAMS / "numpy_ends.py"))


SPLITS = """
import ctypes, sys
import numpy as np

libc = ctypes.CDLL(None, use_errno=True)
call, arguments = getattr(libc, sys.argv[1]), [int(word) for word in sys.argv[2:]]
for _ in range(3):
    array = np.ones(2 << 20)
    part = ctypes.c_void_p((array.ctypes.data + (5 << 20)) & -4096)
    assert call(part, ctypes.c_size_t(1 << 20), *arguments) == 0
    for _ in range(2):
        print(array.sum())
    array[:1000] = 3
    print(array.sum(), (array * 2).sum())
    if call is libc.mprotect:
        libc.mprotect(part, ctypes.c_size_t(1 << 20), 3)
    del array
"""


@pytest.mark.parametrize(
    "call", ["madvise 1", "madvise 2", "madvise 10", "madvise 14", "mprotect 1", "mlock"]
)
@pytest.mark.parametrize("tracking", ["auto", "none"])
def test_a_program_may_give_advice_for_a_part_of_an_array_or_lock_or_protect_it(
    run, call, tracking
):
    command = "-c", SPLITS, *call.split()
    ended = run(*EDM_RUN, "--clean-tracking", tracking, *command)
    assert (ended.returncode, ended.stdout) == (0, plain(*command))


@pytest.mark.parametrize(
    "hide",
    [
        "sys.modules['numpy'] = None",
        "sys.modules['numpy'] = unittest.mock.MagicMock()",
        "for name in [name for name in sys.modules if name.startswith('numpy')]: del sys.modules[name]",
        "np.empty = np.dtype = None",
    ],
)
def test_a_program_may_hide_or_replace_numpy(run, hide):
    command = (
        "-c",
        f"""
import sys, unittest.mock
import numpy as np
{hide}
for size in (10, 1 << 20):
    try:
        np.ones(size) + undefined
    except NameError as error:
        print(error)
""",
    )
    ended = run(*EDM_RUN, *command)
    assert (ended.returncode, ended.stdout) == (0, plain(*command))


def test_a_program_may_replace_builtins_where_arrays_are_made_grow_and_are_freed(run):
    code = """
import builtins, numpy as np
from unittest import mock
names = "abs all any bool bytes dict enumerate filter getattr hasattr int iter len list map max memoryview min next"
for name in f"{names} open print range reversed set sorted sum tuple zip".split():
    with mock.patch.object(builtins, name, side_effect=TypeError(name)):
        array = np.empty(1 << 20)
        array.resize(1 << 21, refcheck=False)
        array = np.zeros(1 << 20)
        array = None
    print(name)
"""
    ended = run(*EDM_RUN, "-c", code)
    assert (ended.returncode, ended.stdout) == (0, plain("-c", code))


def test_an_audit_hook_sees_nothing_when_a_large_array_is_made_and_freed(run):
    code = """
import sys, numpy as np
seen = []
np.ones(1 << 20)
sys.addaudithook(lambda event, arguments: seen.append(event))
array = np.ones(1 << 21)
del array
# From Python 3.14 on, each call by ctypes is an event.
print({*seen} - {"ctypes.call_function"} if sys.version_info >= (3, 14) else seen)
"""
    ended = run(*EDM_RUN, "-c", code)
    assert (ended.returncode, ended.stdout) == (0, plain("-c", code))


def test_pages_that_a_program_wants_to_be_huge_leave_and_come_back_with_their_bytes(run):
    code = """
import ctypes, edm, numpy as np
a = np.arange(1 << 20)
madvise, begin = ctypes.CDLL(None).madvise, -(-a.ctypes.data // (2 << 20)) * (2 << 20)
for part in range(begin, begin + (6 << 20), 2 << 20):
    madvise(ctypes.c_void_p(part), ctypes.c_size_t(2 << 20), 25)  # MADV_COLLAPSE; EINVAL is fine
for at in range(0, len(a), 1 << 18):  # half of each huge page
    edm.forget(a[at : at + (1 << 17)])
edm.prefetch(a)
print((a == np.arange(1 << 20)).all())
"""
    assert run(*EDM_RUN, "-c", code).stdout == "True\n"


def test_who_only_asks_whether_there_is_a_numpy_does_not_turn_edm_off(run):
    code = """
import importlib.util, edm
importlib.util.find_spec("numpy")
import numpy
space = edm.space()
print(space.start_addr <= numpy.ones(1 << 20).ctypes.data < space.end_addr)
"""
    assert run(*EDM_RUN, "-c", code).stdout == "True\n"


def test_an_unchanged_program_sorts_an_array_eight_times_the_resident_limit(run):
    ended = run(*EDM_RUN, "--stats", "-m", "edm.examples.ordinary", 8 * RESIDENT)
    assert ended.returncode == 0 and "SUCCESS" in ended.stdout, ended.stdout
    peak = re.search(r"^resident +(\S+) pages at most", ended.stdout, re.MULTILINE)
    assert peak and int(peak[1]) * PAGE_SIZE <= RESIDENT << 20


def test_the_example_sorts_reduces_and_multiplies_with_known_answers(way):
    ended = way.run("-m", "edm.examples.numpy_sort", "--size", 16, "--high-threshold", 1024)
    assert ended.returncode == 0 and "numpy_sort SUCCESS" in ended.stdout, ended.stdout
    assert int(re.search(r"at most (\d+) pages of them here", ended.stdout)[1]) <= 1024


@pytest.mark.parametrize(
    ("library", "program"), [("pandas", "frames.py"), ("sklearn", "clusters.py")]
)
def test_pandas_and_scikit_learn_give_the_same_answers_on_four_times_the_resident_limit(
    run, library, program
):
    pytest.importorskip(library)
    arguments = [PROGRAMS / program, 4 * RESIDENT]
    ended = run(*EDM_RUN, "--stats", *arguments, timeout=120)
    assert ended.returncode == 0, ended.stdout
    answers, _, stats = ended.stdout.partition("EDM, INSTANCE_0")
    assert answers == plain(*arguments)
    dirty, clean = map(int, re.search(r"evictions +(\d+) pages.*?(\d+) clean", stats).groups())
    assert dirty + clean > 2 * RESIDENT * 256  # it was out of memory indeed


def test_numpys_own_tests_of_its_core_give_the_same_passes(run, request, tmp_path):
    """All of test_multiarray with --long: four minutes; else a part of it."""
    which = [NUMPYS]
    if not request.config.getoption("--long"):
        which = ["-k", "not zeros_big", *(f"{NUMPYS}::{name}" for name in NUMPYS_CLASSES)]
    tests = ["-m", "pytest", "-q", "-p", "no:cacheprovider", "--pyargs", *which]
    limits = ["--numpy-threshold", "4K", "--resident", "16M"]
    command = (sys.executable, "-m", "edm", "run", *limits, *tests)
    ended = run(*command, cwd=tmp_path, timeout=900)  # where no setup.cfg of ours is found
    assert ended.returncode == 0, ended.stdout[-5000:]

    def counts(output):
        return re.search(r"\d+ passed.*?(?=, \d+ warning| in)", output)[0]

    assert counts(ended.stdout) == counts(plain(*tests, cwd=tmp_path))


NUMPYS = "numpy._core.tests.test_multiarray"
NUMPYS_CLASSES = ("TestResize", "TestCreation", "TestTake", "TestPickling")


NO_NUMPY = """
try:
    with edm.numpy_allocator():
        sys.exit("there was a NumPy")
except ImportError:
    pass
"""


def test_without_numpy_everything_else_works(run):
    code = "import edm, sys; assert 'numpy' not in sys.modules; edm.space().mmap(4096)[0] = 1"
    ended = run(*EDM_RUN, "-c", code)
    assert (ended.returncode, ended.stdout) == (0, "")
    ended = run(*EDM_RUN, "-c", "import sys; sys.modules['numpy'] = None; import edm\n" + NO_NUMPY)
    assert (ended.returncode, ended.stdout) == (0, "")


SPACES = """
import edm, numpy as np
kept = []
def app(space):
    with edm.numpy_allocator():
        a = np.ones(1 << 20)
        assert space.start_addr <= a.ctypes.data < space.end_addr and a.sum() == 1 << 20
        kept.append(a if len(kept) == 2 else None)
for _ in range(3):
    edm.run(app)
try:
    edm.run(app)
except RuntimeError as error:
    print(error)
kept.clear()
edm.run(app)
"""


def test_a_process_may_have_spaces_one_after_another_but_no_arrays_of_an_earlier_one(alone):
    ended = alone.run("-c", SPACES)
    words = "numpy_allocator: delete the arrays of the earlier space first\n"
    assert (ended.returncode, ended.stdout) == (0, words)


OVERLAPPING = """
import edm, numpy as np
def app(space):
    def inside():
        return space.start_addr <= np.ones(1 << 20).ctypes.data < space.end_addr
    small, large = edm.numpy_allocator(1 << 12), edm.numpy_allocator(1 << 30)
    with small:
        print(inside())
        with large:
            print(inside())
        print(inside())
    small, large = edm.numpy_allocator(1 << 12), edm.numpy_allocator(1 << 30)
    small.__enter__()  # as in two threads
    large.__enter__()
    small.__exit__(None, None, None)
    print(inside())
    large.__exit__(None, None, None)
    print(inside())
edm.run(app)
"""


def test_the_allocator_is_off_when_all_blocks_have_ended_in_whatever_order(alone):
    ended = alone.run("-c", OVERLAPPING)
    assert (ended.returncode, ended.stdout.split()) == (
        0,
        ["True"] + ["False", "True"] + ["False"] * 2,
    )


OUTLIVES_ITS_SPACE = """
import contextlib, edm, numpy as np
stack = contextlib.ExitStack()
def app(space):
    stack.enter_context(edm.numpy_allocator())
    for array in [np.ones(1 << 18)]:  # which is kept for the next one of its size
        pass
edm.run(app)
array = np.empty(1 << 18)
array[:] = 1
print(array.sum())
"""


def test_arrays_of_a_block_that_outlives_its_space_are_in_ordinary_memory(alone):
    ended = alone.run("-c", OUTLIVES_ITS_SPACE)
    assert (ended.returncode, ended.stdout) == (0, "262144.0\n")


ON_A_KEPT_DISK = """
import sys, edm, numpy as np
def app(space):
    if sys.argv[2] == "fill":
        area = space.mmap(16 << 20)
        area[:] = b"x" * len(area)
    else:
        with edm.numpy_allocator():
            array = np.zeros(8 << 20, "u1")  # where the other job had its area
        print(space.start_addr <= array.ctypes.data < space.end_addr, array.any())
        area = space.mmap(8 << 20)
        print(bytes(area) == b"x" * len(area))
start = edm.Config.start_addr
where = dict(end_addr=start + (16 << 20), high_threshold=512)
edm.run(app, edm.Config(disk=sys.argv[1], keep=True, **where))
"""


def test_an_array_on_a_kept_disk_is_zeros_and_the_rest_is_as_an_earlier_job_has_left_it(
    way, tmp_path
):
    filled = way.run("-c", ON_A_KEPT_DISK, tmp_path / "disk", "fill")
    assert (filled.returncode, filled.stdout) == (0, "")
    ended = way.run("-c", ON_A_KEPT_DISK, tmp_path / "disk", "use")
    assert (ended.returncode, ended.stdout) == (0, "True False\nTrue\n")


# In one of the rounds, the garbage is collected when the result of np.array is freed for the exception.
COLLECTS = """
import gc, numpy as np
class Fails:
    def __float__(self):
        for _ in range(3):
            cycle = [np.empty(10)]
            cycle.append(cycle)
        del cycle
        kept.extend([] for _ in range(many))
        raise ValueError
kept, raised = [], 0
gc.set_threshold(300)
for many in range(150, 500):
    kept.clear()
    gc.collect()
    try:
        np.array([1.0, Fails()], float)
    except ValueError:
        raised += 1
print(raised)
"""


def test_no_exception_is_lost_if_garbage_is_collected_while_an_array_is_freed(run):
    ended = run(*EDM_RUN, "-c", COLLECTS)
    assert (ended.returncode, ended.stdout) == (0, "350\n")


def test_numpys_fromfile_reads_what_the_program_has_not_flushed(tmp_path, monkeypatch):
    import numpy as np

    from edm.numpy_mem_handler import _replace_fromfile

    monkeypatch.setattr(np, "fromfile", np.fromfile)
    _replace_fromfile.__wrapped__()
    with open(tmp_path / "written", "w+b") as file:
        file.write(bytes(80))
        file.seek(0)
        file.read(8)
        file.write(b"\1" * 24)
        file.seek(0)  # in what is in the buffer: Python does not flush it
        assert np.fromfile(file, np.uint8).tolist() == [0] * 8 + [1] * 24 + [0] * 48


@pytest.mark.parametrize("count", [-1, 0, 1, 2, 1000])
def test_a_file_is_left_where_numpys_fromfile_leaves_it(tmp_path, count, monkeypatch):
    import numpy as np

    from edm.numpy_mem_handler import _replace_fromfile

    numpys = np.fromfile
    monkeypatch.setattr(np, "fromfile", numpys)
    _replace_fromfile.__wrapped__()
    (tmp_path / "file").write_bytes(b"0123456789ab")  # two items, and a part of the third
    with open(tmp_path / "file", "rb") as file, open(tmp_path / "file", "rb") as other:
        ours = np.fromfile(file, "V5", count, offset=1)
        theirs = numpys(other, "V5", count, offset=1)
        assert (ours.tobytes(), file.tell()) == (theirs.tobytes(), other.tell())
