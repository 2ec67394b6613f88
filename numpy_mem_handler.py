"""The data memory handler: NumPy's large arrays live in the space.

In the picture: in the application process, between NumPy and the Space.

Interface:
    numpy_allocator(space, threshold)   a context manager: arrays made meanwhile, of at least so many
                                        bytes, live in the space

NumPy asks its data memory handler for the memory of every array (NEP 49): four C functions, here
ctypes callbacks, so that every array costs some microseconds more. PyDataMem_SetHandler would set a
handler for the current context only, and a new thread begins with another context, and NumPy's
default handler; so it is the default handler's functions that are replaced, for all threads.

    malloc, calloc   from the threshold on an area of its own, which is zeros; else what NumPy does
    realloc          moves an array into the space when it grows to the threshold, to where it can
                     grow on without being moved
    free             an area is unmapped, and its pages are freed, here and in the store; but a few
                     small ones are kept, for the next malloc of the same size

Rules: any thread that has the GIL, at any moment; arrays are freed while an exception is on its way,
too, and signal handlers raise in the midst of a callback: see _callback. An array outlives the
context manager if it is still in use; free and realloc stay replaced for that. A process that the
application forks gets NumPy's own memory. Where a recursion has reached Python's limit no callback
can run, and a program that makes or frees arrays just there may crash.

Sources: NEP 49; "Memory management in NumPy" in its reference guide; numpy/_core/include/numpy/
ndarraytypes.h; for callbacks, CPython's Modules/_ctypes/callbacks.c and Python/ceval.c.
"""

from __future__ import annotations

import atexit
import contextlib
import contextvars
import ctypes
import dis
import os
import sys
from _thread import get_ident
from collections import deque
from collections.abc import Callable, Iterator
from ctypes import c_char, c_char_p, c_int, c_size_t, c_uint8, c_ulong, c_void_p, py_object, sizeof
from functools import cache, partial, wraps

from edm.address_space import Space, whole_pages

TYPE_CHECKING = False  # for type checkers it is true; typing takes long to import
if TYPE_CHECKING:
    from typing import Any

# PyDataMem_SetHandler's and PyDataMem_GetHandler's indices in NumPy's C API, since 1.22.
SET_HANDLER, GET_HANDLER = 304, 305
HANDLER_NAME = b"mem_handler"  # of a capsule with a handler

SPARE = 16  # areas to be used again have at most this part of the resident limit
SPARES = 16  # and are no more than these
TRIES = 4  # of one request, if signal handlers keep raising in the midst of it
READ = 1 << 20  # bytes of a file in one piece

# An allocator's functions, by how many arguments they have. They are called by who has the GIL, and
# call what needs no more. An address is a c_size_t.
_TWO = ctypes.PYFUNCTYPE(c_size_t, c_size_t, c_size_t)
_THREE = ctypes.PYFUNCTYPE(c_size_t, c_size_t, c_size_t, c_size_t)
# free's size comes and goes with its bytes reversed: for a number whose lower half is -1, ctypes
# would clear the exception that is set.
_FREE = ctypes.PYFUNCTYPE(c_size_t, c_size_t, c_size_t, c_size_t.__ctype_be__)


class PyDataMemAllocator(ctypes.Structure):
    _fields_ = [
        ("ctx", c_size_t), ("malloc", _TWO), ("calloc", _THREE), ("realloc", _THREE), ("free", _FREE),
    ]  # fmt: skip


class PyDataMem_Handler(ctypes.Structure):
    _fields_ = [("name", c_char * 127), ("version", c_uint8), ("allocator", PyDataMemAllocator)]


# Under `edm run` the program registers its exit functions after this, and they are called before.
_at_exit = contextlib.ExitStack()
atexit.register(_at_exit.close)


@contextlib.contextmanager
def numpy_allocator(space: Space, threshold: int) -> Iterator[None]:
    """NumPy arrays made meanwhile, by any thread, live in the space from threshold bytes on.

    Raises ImportError if there is no NumPy, or one that is older than 1.22.
    """
    handler = _handler_of(space)
    before, handler.threshold = handler.threshold, threshold
    try:
        yield
    finally:
        handler.threshold = before


def _read_through_ordinary_memory(handler: MemHandler) -> None:
    """Replace numpy.fromfile, which np.load calls: where system calls fail on a page that is not
    here, it would take that for the end of the file, and say nothing."""
    import numpy

    fromfile = numpy.fromfile

    @wraps(fromfile)
    def in_parts(file, dtype=float, count=-1, sep="", offset=0, **like):
        dtype = numpy.dtype(dtype)
        if sep or not dtype.itemsize:
            return fromfile(file, dtype, count, sep, offset, **like)
        with contextlib.nullcontext(file) if hasattr(file, "seek") else open(file, "rb") as opened:
            opened.seek(offset, os.SEEK_CUR)
            if count < 0:
                count = (os.fstat(opened.fileno()).st_size - opened.tell()) // dtype.itemsize
            array, at = numpy.empty(count, dtype), 0
            step = max(1, min(handler.threshold - 1, READ) // dtype.itemsize)
            while len(part := fromfile(opened, dtype, min(step, count - at))):
                array[at : at + len(part)] = part
                at += len(part)
        return array[:at]

    numpy.fromfile = in_parts


class MemHandler:
    """What NumPy calls: malloc, calloc, realloc and free. NumPy's own ones have a _ before the name.

    `done` is for work that may not be done twice: see _callback.
    """

    def __init__(self, space: Space) -> None:
        # In a context where nobody has set another handler.
        capsule = contextvars.Context().run(_numpy_api(GET_HANDLER))
        handler = PyDataMem_Handler.from_address(_pointer(capsule, HANDLER_NAME))
        numpys = PyDataMemAllocator.from_buffer_copy(handler.allocator)
        self._malloc, self._calloc = numpys.malloc, numpys.calloc
        self._realloc, self._free = numpys.realloc, numpys.free
        self.threshold = sys.maxsize  # bytes
        self._space, self._start, self._end = space, space.start_addr, space.end_addr
        self._spare: deque[tuple[int, int]] = deque()  # (length, address) of areas to be used again
        self._libraries = os.path.dirname(sys.modules["numpy"].__path__[0]), __file__
        handler.allocator = self._callbacks = PyDataMemAllocator(
            0,
            _TWO(_callback(self.malloc, numpys)),
            _THREE(_callback(self.calloc, numpys)),
            _THREE(_callback(self.realloc, numpys)),
            _FREE(_callback(self.free, numpys, raising=True)),
        )
        os.register_at_fork(after_in_child=self._spare.clear)
        # When the interpreter takes itself apart, no callback works any more. Arrays are made in
        # NumPy's own memory then, and what is freed is left to the kernel: abs(ctx) is 0, or NULL.
        at_end = PyDataMemAllocator(0, numpys.malloc, numpys.calloc, _THREE(_abs), _FREE(_abs))
        _at_exit.callback(setattr, handler, "allocator", at_end)
        if space.user_mode_only:
            _read_through_ordinary_memory(self)

    # Every array of this process comes by these: no attribute more than it takes.

    def malloc(self, done: list[int], ctx: int, size: int) -> int:
        """An area that is spare, if there is one of this size; its bytes are anything."""
        if size < self.threshold:
            return self._malloc(ctx, size)
        for spare in list(self._spare):
            if spare[0] == whole_pages(size):
                with contextlib.suppress(ValueError):  # another thread has just taken it
                    self._spare.remove(spare)
                    return spare[1]
        return self.calloc(done, ctx, 1, size)

    def calloc(self, done: list[int], ctx: int, count: int, size: int, grows: bool = False) -> int:
        # What is larger than the whole space can never be there: a limit may have made it small.
        fits = self.threshold <= count * size <= self._end - self._start
        if not fits or not self._space.can_be_called():
            return self._calloc(ctx, count, size)
        try:
            return self._space.allocate(count * size, self._made_in(), grows)
        except (MemoryError, OSError):
            return 0  # NumPy raises MemoryError

    def realloc(self, done: list[int], ctx: int, old: int, size: int) -> int:
        inside = self._start <= old < self._end
        if not inside and size < self.threshold:
            done += map(self._realloc, [ctx], [old], [size])
            return done[0]
        before = self._space.allocated(old) if inside else _usable_size(old)
        grows = size > before
        if inside and not grows and before // 2 < size:
            return old
        if inside and grows and self._space.can_be_called() and self._space.grow(old, size):
            return old
        new = self.calloc(done, ctx, 1, size, True) if grows else self.malloc(done, ctx, size)
        if new and old:
            ctypes.memmove(new, old, min(before, size))
            done += [new]
            self.free([], ctx, old, before)
        return new

    def free(self, done: list[int], ctx: int, address: int, size: int) -> int:
        done += [0]  # if this is interrupted, an area is lost, rather than given to two
        if self._start <= address < self._end:
            self._free_area(address)
        else:
            self._free(ctx, address, size)
        return 0

    # ------------------------------------------------------------ areas

    def _free_area(self, address: int) -> None:
        """Keep the area for the next array of its size, if it is small: its pages are here already.

        With a limit of 256 MiB, arithmetic on arrays of 1 to 8 MiB is three to five times as fast so.
        """
        length, most = self._space.allocated(address), self._space.resident_limit // SPARE
        if length > most or self._space.is_forked:
            self._space.release(address)
            return
        self._spare.append((length, address))
        while len(spare := list(self._spare)) > SPARES or sum(length for length, _ in spare) > most:
            with contextlib.suppress(IndexError):  # another thread has just taken it
                self._space.release(self._spare.popleft()[1])

    def _made_in(self) -> str:
        """file:line of the program: the innermost one that is not installed beside NumPy."""
        frame: Any = sys._getframe(1)
        while frame and frame.f_code.co_filename.startswith(self._libraries):
            frame = frame.f_back
        return f"{frame.f_code.co_filename}:{frame.f_lineno}" if frame else ""


_handler_of = cache(MemHandler)  # for each space


# ---------------------------------------------------------------- callbacks and exceptions


def _callback(
    work: Callable[..., int], numpys: PyDataMemAllocator, raising: bool = False
) -> Callable[..., int]:
    """For ctypes to call: it calls work(done, ...), and leaves exceptions to the program.

    A ctypes callback can't raise. What it raises is printed and forgotten, and C code is handed a
    pointer that is anything. But C code frees arrays while an exception is set, and that must stay
    set (`raising`: it may be so). And Python runs signal handlers in the midst of a callback, and
    what they raise the program must get. So an exception that is set is fetched before any Python
    code runs, and one that comes meanwhile is caught. The work is done all the same. Both are raised
    after the callback, when ctypes lets go of what the callback has returned: an int that has an
    array, whose memory handler is one of its own with PyObject_CallNoArgs for free(ctx, ...).

        NumPy: free(ctx, address, size)
          │
          ▼                                errcheck
        ctypes: PyErr_Fetch, if raising ──────────► guarded: work(done, ctx, address, size)
                                                      │ if an exception was set, or came
                                                      ▼
                takes the result ◄─────────────────  finish: an _Answer, with an _array
                lets go of the _Answer, so the array is freed: PyObject_CallNoArgs calls
                  PyThreadState_SetAsyncExc: what came is raised where Python code runs next
                  PyErr_Restore: what was set is set again
          ┌───────┘
          ▼
        NumPy goes on

    Signal handlers run after calls and jumps, and at the beginning of a function, but not after
    operators. So what must not be interrupted is written with operators: `done += map(function, ..)`
    calls a C function and notes its result, `calls += later` is the last that happens before the
    return, and finish[...] is a call. Work that was interrupted is done again, unless its result is
    in `done`.
    """
    fetched = (c_size_t * 3)()  # type, value and traceback

    @_begins_in_its_try
    def guarded(*arguments: Any) -> int:
        try:
            was_set, done = fetched[:], []
            if raising:
                arguments = arguments[2][3:]  # an errcheck's; PyErr_Fetch has got three more
            if not was_set[0]:
                return work(done, *arguments)
        except BaseException as error:  # noqa: BLE001 - whichever it is, it has to go on
            return finish[arguments, done, was_set, error, TRIES]
        return finish[arguments, done, was_set, None, TRIES]

    class Finish:
        @_begins_in_its_try
        def __getitem__(self, state: tuple) -> int:
            try:
                arguments, done, was_set, came, tries = state
                answer = _Answer(done[0] if done else work(done, *arguments) if tries > 0 else 0)
                calls, later = [], []
                if came is not None:
                    kind = type(came)  # a class is wanted, and called
                    kind = type(kind.__name__, (kind,), {"__new__": lambda *_: came})
                    later.append(partial(_raise_soon, get_ident(), kind))
                if was_set[0]:
                    later.append(partial(_restore, *was_set))
                answer.after = _array(calls, numpys)
                calls += later
                return answer
            except BaseException as error:  # noqa: BLE001
                return self[arguments, done, was_set, error, tries - 1]

    finish = Finish()
    if not raising:
        return guarded
    fetch = _function("PyErr_Fetch", None)
    fetch.errcheck = guarded
    return partial(fetch, *(ctypes.byref(fetched, n * sizeof(c_size_t)) for n in range(3)))


def _begins_in_its_try(function: Any) -> Any:
    """Have no signal handler run before the first statement, a try: with 3, RESUME does not look."""
    code = bytearray(function.__code__.co_code)
    if "RESUME" in dis.opmap:  # Python 3.10 does not look before a try
        code[2 * code[::2].index(dis.opmap["RESUME"]) + 1] = 3
    function.__code__ = function.__code__.replace(co_code=bytes(code))
    return function


class _Answer(int):
    """What a callback returns, and in the attribute `after` what is done by letting go of it."""


def _array(calls: list[Callable[[], object]], numpys: PyDataMemAllocator) -> object:
    """When the array that this returns is freed, the calls will have been made, by C code."""
    import numpy

    call = partial(list, map(partial.__call__, calls))
    allocator = PyDataMemAllocator(id(call), numpys.malloc, free=_call_ctx)
    handler = PyDataMem_Handler(b"after a callback", 1, allocator)
    capsule = _new_capsule(ctypes.addressof(handler), HANDLER_NAME, None)
    dtype = numpy.dtype(numpy.uint8, metadata={"kept": (handler, call)})
    # By C code too, and in a context of its own: nothing else ever gets this handler.
    set_handler = partial(_numpy_api(SET_HANDLER, py_object), capsule)
    steps = map(partial.__call__, [set_handler, partial(numpy.empty, 1, dtype)])
    _, array = contextvars.Context().run(list, steps)
    calls += [partial(numpys.free, 0, array.ctypes.data, 1)]
    return array


# ---------------------------------------------------------------- C functions


@cache
def _numpy_api(index: int, *arguments: type) -> Callable[..., Any]:
    """A function of NumPy's C API that returns an object."""
    import numpy

    core = getattr(numpy, "_core", None) or numpy.core
    if tuple(map(int, numpy.__version__.split(".")[:2])) < (1, 22):
        raise ImportError(f"NumPy {numpy.__version__} has no data memory handlers; 1.22 has")
    table = _pointer(core._multiarray_umath._ARRAY_API, None)
    address = (c_void_p * (index + 1)).from_address(table)[index]
    return ctypes.PYFUNCTYPE(py_object, *arguments)(address)


def _function(name: str, result: type | None, *arguments: type) -> Callable[..., Any]:
    """A function of Python's C API, or of the C library."""
    return ctypes.PYFUNCTYPE(result, *arguments)((name, ctypes.pythonapi))


_pointer = _function("PyCapsule_GetPointer", c_void_p, py_object, c_char_p)
_new_capsule = _function("PyCapsule_New", py_object, c_void_p, c_char_p, c_void_p)
_raise_soon = _function("PyThreadState_SetAsyncExc", c_int, c_ulong, py_object)
_restore = _function("PyErr_Restore", None, c_void_p, c_void_p, c_void_p)
_usable_size = _function("malloc_usable_size", c_size_t, c_size_t)
_call_ctx = _FREE(("PyObject_CallNoArgs", ctypes.pythonapi))
_abs = "abs", ctypes.pythonapi
