"""The data memory handler: NumPy's large arrays live in the space.

In the picture: in the application process, between NumPy and the Space.

Interface:
    numpy_allocator(threshold)          a context manager: arrays made meanwhile, of at least so many
                                        bytes, live in the application's space
    handler().use(space).thresholds[0]  may be set for good

NumPy asks its data memory handler for the memory of every array (NEP 49). A handler is four C functions;
here they are ctypes callbacks, which cost each array some microseconds. PyDataMem_SetHandler sets a
handler for the current context only, and a new thread begins in another context, with NumPy's default
handler. So the functions of the default handler itself are replaced, for all threads.

    malloc, calloc   from the threshold on, an area of its own; calloc's is zeros. Below it, NumPy's
    realloc          moves an array into the space when it grows to the threshold, to a place where it
                     can grow without being moved again, unless the disk is kept; and when it shrinks by half
    free             unmaps the area and frees its pages, here and in the store. A few small areas are
                     kept for the next malloc of the same size, and so is one that is freed in the midst
                     of a call of this thread to the space, until the next calloc or free

Rules: any thread that has the GIL calls these, at any moment: while an exception is being raised, and with
signal handlers that raise in the middle of a callback; see Callback. free and realloc stay replaced
after the context manager, for the arrays that are still in use. A process that the application forks
gets NumPy's own memory. From the interpreter's end on, no array is freed or can grow. At Python's recursion
limit no callback can run: a program that makes or frees arrays there may crash.

Sources: NEP 49; "Memory management in NumPy" in its reference guide; numpy/_core/include/numpy/
ndarraytypes.h; for callbacks, CPython's Modules/_ctypes/callbacks.c, Python/ceval.c and Objects/typeobject.c.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import os
import sys
from _thread import get_ident, get_native_id
from collections.abc import Callable, Iterator
from ctypes import c_char, c_char_p, c_int, c_size_t, c_uint8, c_ulong, c_void_p, py_object, sizeof
from functools import cache, partial, wraps
from itertools import starmap
from opcode import opmap
from operator import index
from posix import fstat, pread  # which a program's mock does not replace
from types import SimpleNamespace

from edm.address_space import PAGE_SIZE, Space, whole_pages
from edm.edm import space

__builtins__ = dict(__builtins__)  # as in address_space.py

DEFAULT_HANDLER = 306  # PyDataMem_DefaultHandler's index in NumPy's C API, since 1.22
PY_TP_BASE, PY_TP_FINALIZE = 48, 80  # CPython's Include/typeslots.h

KEPT = 16  # areas at most are kept, and have at most 1/KEPT of the resident limit together
PIECE = 1 << 20  # bytes that numpy.fromfile reads at once
TRIES = 4  # of one request, if signal handlers raise in the middle of each

# An allocator's functions, by their number of arguments; an address is a c_size_t. The caller has the GIL.
_TWO = ctypes.PYFUNCTYPE(c_size_t, c_size_t, c_size_t)
_THREE = ctypes.PYFUNCTYPE(c_size_t, c_size_t, c_size_t, c_size_t)
# free's size is passed with its bytes reversed: if the lower half of a number is -1, ctypes clears the
# exception that is set.
_FREE = ctypes.PYFUNCTYPE(c_size_t, c_size_t, c_size_t, c_size_t.__ctype_be__)
_KINDS = [("malloc", _TWO), ("calloc", _THREE), ("realloc", _THREE), ("free", _FREE)]


class PyDataMemAllocator(ctypes.Structure):
    _fields_ = [("ctx", c_size_t), *_KINDS]


class PyDataMem_Handler(ctypes.Structure):
    _fields_ = [("name", c_char * 127), ("version", c_uint8), ("allocator", PyDataMemAllocator)]


# Under `edm run` this is registered before the program's exit functions, and so called after them.
_at_exit = contextlib.ExitStack()
atexit.register(_at_exit.close)


@contextlib.contextmanager
def numpy_allocator(threshold: int = 1 << 20) -> Iterator[None]:
    """A context manager: NumPy arrays that any thread makes meanwhile, from threshold bytes on, live in the
    space.

    Raises RuntimeError without a space, and if arrays of an earlier space of this process are left;
    ImportError without NumPy 1.22 or later.
    """
    thresholds = handler().use(space()).thresholds
    thresholds.append(threshold)
    try:
        yield
    finally:  # another thread's block may have begun, or ended, meanwhile
        thresholds.remove(threshold)


@cache
def _replace_fromfile() -> None:
    """Have numpy.fromfile, which np.load calls, read into ordinary memory and copy from there. Where a system
    call may fail on a page that is not here, or by a signal (system_calls.py), it would take that for the end
    of the file, and return zeros."""
    import numpy

    fromfile, empty = numpy.fromfile, numpy.empty

    @wraps(fromfile)
    def in_pieces(file, dtype=float, count=-1, sep="", offset=0, **like):
        dtype, is_path = numpy.dtype(dtype), isinstance(file, str | bytes | os.PathLike)
        simple = dtype.itemsize and not (sep or like or dtype.subdtype or dtype.hasobject)
        with open(file, "rb") if is_path else contextlib.nullcontext(file) as opened:
            if simple and hasattr(opened, "readinto") and opened.readable() and opened.seekable():
                opened.flush()  # what the program has written to it, as numpy.fromfile does
                fd, begin = opened.fileno(), opened.tell() + index(offset)
                size, count, done = fstat(fd).st_size, index(count), 0
                there = (size - begin) // dtype.itemsize
                if there > 0:  # devices and the files of /proc have no size
                    array = empty(there if count < 0 else min(count, there), dtype)
                    content = memoryview(array.view("B"))
                    while part := pread(fd, min(PIECE, len(content) - done), begin + done):
                        content[done : done + len(part)] = part
                        done += len(part)
                    if done == len(content):  # else the file has become shorter
                        opened.seek(size if count > there else begin + done)
                        return array
            return fromfile(opened, dtype, count, sep, offset, **like)

    numpy.fromfile = in_pieces


class MemHandler:
    """What NumPy calls: malloc, calloc, realloc and free. Of NumPy's own, three have a _ before the name.

    `done` is where they note an answer after which they may not be called again: see Callback.
    """

    def __init__(self) -> None:
        import numpy

        core = getattr(numpy, "_core", None) or numpy.core
        if not hasattr(core._multiarray_umath, "get_handler_name"):
            raise ImportError("this NumPy has no data memory handlers; 1.22 has")
        table = _pointer(core._multiarray_umath._ARRAY_API, None)
        api = ctypes.cast(table, ctypes.POINTER(ctypes.POINTER(py_object)))  # void *[]
        handler = PyDataMem_Handler.from_address(_pointer(api[DEFAULT_HANDLER][0], b"mem_handler"))
        numpys = PyDataMemAllocator.from_buffer_copy(handler.allocator)
        self._malloc, self._calloc, self._free = numpys.malloc, numpys.calloc, numpys.free
        self.thresholds = [sys.maxsize]  # bytes; the last one counts
        self.space = space()
        self._kept: dict[int, int] = {}  # address → length, of areas for the next malloc
        self._libraries = os.path.dirname(numpy.__path__[0]), __file__
        callbacks = [made(Callback(self, of, getattr(numpys, of)).call) for of, made in _KINDS]
        # ctx is 1: nobody reads it, and then malloc's size, too, is the product of its last two arguments.
        handler.allocator = self._callbacks = PyDataMemAllocator(1, *callbacks)
        # No callback works while the interpreter finalizes. From then on, realloc and free are the C
        # library's labs, of ctx, which is 0 then: free does nothing, and realloc returns NULL, so it fails.
        at_end = PyDataMemAllocator(0, numpys.malloc, numpys.calloc, _THREE(_LABS), _FREE(_LABS))
        _at_exit.callback(setattr, handler, "allocator", at_end)

    def use(self, space: Space) -> MemHandler:
        """Arrays live in this space from now on. Returns this handler.

        Raises RuntimeError if arrays of an earlier one are left: what frees them can't distinguish them from
        arrays of this space, at the same addresses.
        """
        if self.space is not space:
            if self.space.arrays() > len(self._kept):
                raise RuntimeError("numpy_allocator: delete the arrays of the earlier space first")
            self.space, self._kept = space, {}
        if space.user_mode:
            _replace_fromfile()
        return self

    # Every large array of this process passes through these. Small ones do if an exception is set, see Callback.

    def malloc(self, done: list[int], ctx: int, size: int) -> int:
        """A kept area, if there is one of this size. Its bytes are undefined."""
        if size < self.thresholds[-1] or self.space.is_over:
            return self._malloc(ctx, size)
        wanted = whole_pages(size)
        for address, length in self._kept.copy().items():
            # Another thread may have taken it meanwhile.
            if length == wanted and self._kept.pop(address, 0) == wanted:
                return address
        return self.calloc(done, ctx, 1, size)

    def calloc(self, done: list[int], ctx: int, count: int, size: int, grows: bool = False) -> int:
        if count * size < self.thresholds[-1] or not self.space.can_be_called():
            return self._calloc(ctx, count, size)
        self._release()  # what was freed in the midst of a call
        name = self._made_in() if self.space.config.report else ""
        # Without a gap of this size it is in NumPy's memory: a limit may have made the space small.
        return self.space.allocate(count * size, name, grows) or self._calloc(ctx, count, size)

    def realloc(self, done: list[int], ctx: int, old: int, size: int) -> int:
        inside = old in self.space.lengths
        before = self.space.lengths[old] if inside else _usable_size(old)
        grows = size > before
        can_stay = inside and self.space.can_be_called()
        if can_stay and (self.space.grow(old, size) if grows else before // 2 < size):
            return old
        new = self.calloc(done, ctx, 1, size, True) if grows else self.malloc(done, ctx, size)
        if new and old:
            ctypes.memmove(new, old, min(before, size))
            done += [new]
            self.free([], ctx, old, before)
        return new

    def free(self, done: list[int], ctx: int, address: int, size: int) -> int:
        done += [0]  # first: an area may get lost, but is not given to two arrays
        if address in self.space.lengths:
            # Keep the area for the next array of its size, if it is small: its pages are already here. With a limit
            # of 256 MiB, this makes arithmetic on arrays of 1 to 8 MiB three to five times as fast.
            self._kept[address] = self.space.lengths[address]
            if self.space.can_be_called():
                self._release()
        else:
            self._free(ctx, address, size)
        return 0

    def _release(self) -> None:
        """Release what is kept and too much."""
        most = self.space.config.high_threshold * PAGE_SIZE // KEPT
        while len(kept := self._kept.copy()) > KEPT or sum(kept.values()) > most:
            # One that is too large, if there is any; or the oldest.
            address = max(kept, key=lambda address: kept[address] > most)
            if self._kept.pop(address, 0):
                self.space.release(address)

    def _made_in(self) -> str:
        """file:line of the innermost frame whose file is not installed beside NumPy."""
        frame = sys._getframe(1)
        while frame and frame.f_code.co_filename.startswith(self._libraries):
            frame = frame.f_back
        return f"{frame.f_code.co_filename}:{frame.f_lineno}" if frame else ""


handler = cache(MemHandler)  # a process has one


# ---------------------------------------------------------------- callbacks and exceptions


class Callback:
    """A function for ctypes to call: it calls work(done, ...), and loses no exception.

    A callback can't raise: ctypes prints the exception, and C code goes on with an undefined pointer. But
    there are two kinds of exceptions here. C code frees arrays while an exception is set; no Python code
    may run with it, and it must be set again afterwards. And a signal handler may raise in the middle of
    the callback, and the program has to get that. So an exception that is set is fetched before any Python
    code runs; one that comes is caught, and the work is done nevertheless. Both are raised when no Python
    code of the callback is left: by the destructor of what it returns. That is an int with a CalledWhenFreed,
    whose finalizer is PyObject_CallNoArgs.

        NumPy: malloc, calloc, realloc or free
          │
          ▼              its errcheck
        PyErr_Fetch ─────────────────► __getitem__: work(done, ...)
                                          │ if an exception has come: self[...] does it again
                                          ▼
        ctypes takes the int ◄──────── an Answer, if an exception was set, or has come
          │ and drops it
          ▼
        PyObject_CallNoArgs ─────────► Py_AddPendingCall: the next Python code raises what came
          │                            PyErr_Restore: what was set is set again
          ▼
        NumPy goes on

    With no exception set, NumPy's own function serves small arrays, and those in its memory. It is reached by operators
    alone, which run no signal handler and no other thread, from Python 3.11 on. NumPy relies on that while it
    reads a list.

    Python runs signal handlers after calls, after backward jumps and at the start of a function, but not
    after operators. So what must not be interrupted is written with operators: self[...] is a call, and
    `calls += later` is the last step before the return. What is done again goes on with the answer in `done`,
    if there is one.
    """

    def __init__(self, handler: MemHandler, name: str, numpys: Callable[..., int]) -> None:
        """name: of the handler's method to call. numpys: NumPy's own function of that name."""
        self._handler, self._work = handler, getattr(handler, name)
        self._frees = name == "free"
        self._least = [0] if name == "realloc" else handler.thresholds  # bytes; the last one counts
        self._queue: list[tuple[int, ...]] = []  # arguments for the next step of _numpys
        self._numpys = starmap(numpys, iter(self._queue.pop, None))
        self._set = (c_size_t * 3)()  # type, value and traceback of the exception that is set
        fetch = _function("PyErr_Fetch", None)
        fetch.errcheck = self.__getitem__
        places = (ctypes.byref(self._set, n * sizeof(c_size_t)) for n in range(3))
        self.call = partial(fetch, *places)

    def __getitem__(self, state: tuple | None, fetch: object = None, arguments: tuple = ()) -> int:
        try:
            if state is None:  # PyErr_Fetch's result: this is its errcheck
                # A slice allocates a list first: then Python 3.11 may collect garbage, which may free arrays here.
                was_set = self._set[0] and (self._set[0], self._set[1], self._set[2])
                state = arguments[3:], [], was_set, None, TRIES
            arguments, done, was_set, came, tries = state
            if came is None and not was_set:
                is_small = arguments[-2] * arguments[-1] < self._least[-1]
                if arguments[1] not in self._handler.space.lengths if self._frees else is_small:
                    self._queue += (arguments,)
                    for answer in self._numpys:
                        return answer
                return self._work(done, *arguments)
            answer = Answer(done[0] if done else self._work(done, *arguments) if tries > 0 else 0)
            later = [] if came is None else _raising(came)
            later.append(partial(_restore, *was_set) if was_set else partial(bool, True))
            calls = []
            # This makes the calls until one returns true, or raises; it passes on StopIteration, too.
            answer.after = CalledWhenFreed(next, filter(partial.__call__, calls))
            calls += later
            return answer
        except BaseException as error:  # noqa: BLE001 - whichever it is, the program gets it
            # There may be no memory for an Answer. Then the exception is lost.
            return self[arguments, done, was_set, error, tries - 1] if tries > -TRIES else 0


# No signal handler runs before the try: RESUME looks for signals, but not with 3. Python 3.10 has no RESUME, and
# does not look.
_code = Callback.__getitem__.__code__
_resume = bytes([opmap.get("RESUME", 0)])
_quiet = _code.co_code.replace(_resume + b"\0", _resume + b"\3", 1)
Callback.__getitem__.__code__ = _code.replace(co_code=_quiet)


class Answer(int):
    """What a callback returns. Its attribute `after` is a CalledWhenFreed, and dropped with it."""


def _raising(came: BaseException) -> list[Callable[[], object]]:
    """C calls after which the next Python code raises this exception. Its traceback loses EDM's frames."""
    while (at := came.__traceback__) and at.tb_frame.f_globals.get("__package__") == __package__:
        came.__traceback__ = at.tb_next
    if get_native_id() == os.getpid():  # the main thread: it alone makes pending calls
        return [partial(_came.append, (type(came), came)), partial(_call_soon, _ASK, _RAISES)]
    # Other threads run no signal handlers: it came by this call, which takes a class.
    return [partial(_raise_soon, get_ident(), type(came))]


# ---------------------------------------------------------------- C functions


def _function(name: str, result: type | None, *arguments: type) -> Callable[..., object]:
    """A function of Python's C API, or of the C library."""
    return ctypes.PYFUNCTYPE(result, *arguments)((name, ctypes.pythonapi))


_pointer = _function("PyCapsule_GetPointer", c_void_p, py_object, c_char_p)
_raise_soon = _function("PyThreadState_SetAsyncExc", None, c_ulong, py_object)
_call_soon = _function("Py_AddPendingCall", None, c_void_p, py_object)
_ASK = ctypes.cast(ctypes.pythonapi.PyObject_AsFileDescriptor, c_void_p)
_set_error = _function("PyErr_SetObject", None, py_object, py_object)
_restore = _function("PyErr_Restore", None, c_void_p, c_void_p, c_void_p)
_usable_size = _function("malloc_usable_size", c_size_t, c_size_t)
_LABS = "labs", ctypes.pythonapi
_CALL = ctypes.cast(ctypes.pythonapi.PyObject_CallNoArgs, c_void_p)

_came: list[tuple[type, BaseException]] = []  # exceptions that are to be raised
# Asking it for its descriptor raises the exception that was noted last. In C code only, so no traceback, debugger or
# profile shows it.
_RAISES = SimpleNamespace(fileno=partial(next, starmap(_set_error, iter(_came.pop, 0))))


class PyType_Spec(ctypes.Structure):
    _fields_ = [("name", c_char_p), ("sizes", c_int * 2), ("flags", c_int), ("slots", c_void_p)]


# A functools.partial that C code calls when it is freed. Python's __del__ keeps exceptions from the caller; this does
# not. A PyType_Slot is a number and a pointer, and zeros end the list.
_slots = (c_size_t * 6)(PY_TP_BASE, id(partial), PY_TP_FINALIZE, _CALL.value)
_spec = PyType_Spec(b"edm.CalledWhenFreed", slots=ctypes.addressof(_slots))
CalledWhenFreed = _function("PyType_FromSpec", py_object, c_void_p)(ctypes.byref(_spec))
