"""The data memory handler: NumPy's large arrays live in the space.

In the picture: in the application process, between NumPy and the Space.

Interface:
    numpy_allocator(space, threshold)   a context manager: arrays made meanwhile, of at least so many
                                        bytes, live in the space

NumPy asks its data memory handler for the memory of every array (NEP 49): four C functions, here
ctypes callbacks, so that every array costs a microsecond or two more. PyDataMem_SetHandler would
set a handler for the current context only, and a new thread begins with another context, and
NumPy's default handler; so it is the default handler's functions that are replaced, for all threads.
Arrays are freed while an exception is on its way, too; see Guard for what that takes.

    malloc, calloc   from the threshold on an area of its own, which is zeros; else what NumPy does
    realloc          moves an array into the space when it grows to the threshold
    free             an area is unmapped, and its pages are freed, here and on the DMS; but a few
                     small ones are kept, for the next malloc of the same size

Rules: any thread that has the GIL, at any moment. An array outlives the context manager if it is
still in use; free and realloc stay replaced for that. A process that the application forks gets
NumPy's own memory.

Sources: NEP 49; "Memory management in NumPy" in its reference guide; numpy/_core/include/numpy/ndarraytypes.h.
"""

from __future__ import annotations

import atexit
import contextlib
import contextvars
import ctypes
import dis
import functools
import os
import site
import sys
import sysconfig
import threading
import types
from collections import deque
from collections.abc import Callable, Iterator
from ctypes import c_char, c_size_t, c_uint8, c_void_p, py_object

from edm.address_space import Space, whole_pages

TYPE_CHECKING = False  # for type checkers it is true; typing takes long to import
if TYPE_CHECKING:
    from typing import Any

# PyDataMem_SetHandler's and PyDataMem_GetHandler's indices in NumPy's C API, since 1.22.
SET_HANDLER, GET_HANDLER = 304, 305
HANDLER_NAME = b"mem_handler"  # of a capsule with a handler
UNCACHED = 1 << 20  # bytes: NumPy's own free keeps smaller pieces for later, by their size

SPARE = 16  # areas to be used again have at most this part of the resident limit
SPARES = 16  # and are no more than these
TRIES = 4  # of one request, if signal handlers keep raising in the midst of it

# Called by who has the GIL, and calling what needs no more.
_MALLOC = ctypes.PYFUNCTYPE(c_void_p, c_void_p, c_size_t)
_CALLOC = ctypes.PYFUNCTYPE(c_void_p, c_void_p, c_size_t, c_size_t)
_REALLOC = ctypes.PYFUNCTYPE(c_void_p, c_void_p, c_void_p, c_size_t)
_FREE = ctypes.PYFUNCTYPE(None, c_void_p, c_void_p, c_size_t)
_SIZE = ctypes.PYFUNCTYPE(c_size_t, c_void_p)


class PyDataMemAllocator(ctypes.Structure):
    _fields_ = [(name, c_void_p) for name in ("ctx", "malloc", "calloc", "realloc", "free")]


class PyDataMem_Handler(ctypes.Structure):
    _fields_ = [("name", c_char * 127), ("version", c_uint8), ("allocator", PyDataMemAllocator)]


_handler: MemHandler | None = None  # of this process, once there is one


@contextlib.contextmanager
def numpy_allocator(space: Space, threshold: int) -> Iterator[None]:
    """NumPy arrays made meanwhile, by any thread, live in the space from threshold bytes on.

    Raises ImportError if there is no NumPy, or one that is older than 1.22.
    """
    global _handler
    if _handler is None:
        _handler = MemHandler(space)
        if space.user_mode_only:
            _read_through_ordinary_memory()
    before, _handler.threshold = _handler.threshold, threshold
    try:
        yield
    finally:
        _handler.threshold = before


def _read_through_ordinary_memory() -> None:
    """Replace numpy.fromfile, which np.load calls: where system calls fail on a page that is not
    here, it would take that for the end of the file, and say nothing."""
    import numpy

    fromfile = numpy.fromfile

    @functools.wraps(fromfile)
    def in_parts(
        file: Any, dtype: Any = float, count: int = -1, sep: str = "", offset: int = 0, **like: Any
    ) -> Any:
        dtype = numpy.dtype(dtype)
        if sep or not dtype.itemsize:
            return fromfile(file, dtype, count, sep, offset, **like)
        with contextlib.nullcontext(file) if hasattr(file, "seek") else open(file, "rb") as opened:
            opened.seek(offset, os.SEEK_CUR)
            if count < 0:
                count = (os.fstat(opened.fileno()).st_size - opened.tell()) // dtype.itemsize
            array, at = numpy.empty(count, dtype), 0
            step = max(1, min(_handler.threshold - 1, UNCACHED) // dtype.itemsize)
            while len(part := fromfile(opened, dtype, min(step, count - at))):
                array[at : at + len(part)] = part
                at += len(part)
        return array[:at]

    numpy.fromfile = in_parts


class MemHandler:
    def __init__(self, space: Space) -> None:
        self.threshold = sys.maxsize  # bytes
        self._space = space
        self._spare: deque[tuple[int, int]] = deque()  # (length, address) of areas to be used again
        paths = map(sysconfig.get_path, ("stdlib", "platstdlib", "purelib", "platlib"))
        self._libraries = (*paths, *site.getsitepackages(), "<frozen", __file__)
        self._usable_size = _SIZE(("malloc_usable_size", ctypes.CDLL(None)))
        allocator = _default_handler().allocator
        self._malloc, self._calloc = _MALLOC(allocator.malloc), _CALLOC(allocator.calloc)
        self._free = _FREE(allocator.free)
        self._start, self._end = space.start_addr, space.end_addr
        guard = Guard()
        # Kept here, as NumPy does not know that these are Python objects.
        self._callbacks = {
            "malloc": _MALLOC(guard.callback(self._malloc_any)),
            "calloc": _CALLOC(guard.callback(self._calloc_any)),
            "realloc": _REALLOC(guard.callback(self.realloc, self._realloc_again)),
            "free": _FREE(guard.callback(self._free_any, self._free_again)),
        }
        for name, callback in self._callbacks.items():
            setattr(allocator, name, ctypes.cast(callback, c_void_p).value)
        os.register_at_fork(after_in_child=self._spare.clear)
        atexit.register(self._let_go, allocator)

    @staticmethod
    def _let_go(allocator: PyDataMemAllocator) -> None:
        """When the interpreter takes itself apart, no callback works any more. What is freed then is
        left to the kernel: abs(3) is a function that does nothing."""
        allocator.free = ctypes.cast(ctypes.CDLL(None).abs, c_void_p).value

    # Every array of this process comes by these: no attribute more than it takes.

    def _malloc_any(self, done: list, ctx: int | None, size: int) -> int | None:
        return self._malloc(ctx, size) if size < self.threshold else self.malloc(ctx, size)

    def _calloc_any(self, done: list, ctx: int | None, count: int, size: int) -> int | None:
        if count * size < self.threshold:
            return self._calloc(ctx, count, size)
        return self.calloc(ctx, count * size)

    def _free_any(self, done: list, ctx: int | None, address: int | None, size: int) -> None:
        done.append(address)
        if address and self._start <= address < self._end:
            self.free(address)
        else:
            self._free(ctx, address, size)

    # ------------------------------------------------------------ what NumPy calls

    def malloc(self, ctx: int | None, size: int) -> int | None:
        """An area that is spare, if there is one of this size; its bytes are anything."""
        for spare in list(self._spare):
            if spare[0] == whole_pages(size):
                with contextlib.suppress(ValueError):  # another thread has just taken it
                    self._spare.remove(spare)
                    return spare[1]
        return self.calloc(ctx, size)

    def calloc(self, ctx: int | None, size: int) -> int | None:
        try:
            # When the space can't be asked now, NumPy's own memory has to do.
            return self._space.allocate(size, self._made_in()) or self._calloc(ctx, 1, size)
        except (MemoryError, OSError):
            return None  # NumPy raises MemoryError

    def realloc(self, done: list[int], ctx: int | None, old: int | None, size: int) -> int | None:
        """done: gets the new address, as soon as the bytes are there."""
        if old and self._start <= old < self._end:
            before = self._space.allocated(old)
            if before // 2 < size <= before:
                return old
        else:
            before = self._usable_size(old) if old else 0
        new = self._malloc_any(done, ctx, size)
        if new and old:
            ctypes.memmove(new, old, min(before, size))
            done.append(new)
            self._free_any([], ctx, old, UNCACHED)
        return new

    def free(self, address: int) -> None:
        """Keep the area for the next array of its size, if it is small; pages that are here already
        are what makes a program's temporary arrays fast."""
        if self._space.is_forked:
            return
        length = self._space.allocated(address)
        most = self._space.resident_limit // SPARE
        if length > most:
            self._space.release(address)
            return
        self._spare.append((length, address))
        while len(spare := list(self._spare)) > SPARES or sum(length for length, _ in spare) > most:
            with contextlib.suppress(IndexError):  # another thread has just taken it
                self._space.release(self._spare.popleft()[1])

    # The second try of what was interrupted: see Guard.

    def _realloc_again(self, done: list, ctx: int | None, old: int | None, size: int) -> int | None:
        return done[0] if done else self.realloc(done, ctx, old, size)

    def _free_again(self, done: list, ctx: int | None, address: int, size: int) -> None:
        # If in doubt it is lost, rather than given to two.
        if not done:
            self._free_any(done, ctx, address, size)

    def _made_in(self) -> str:
        """file:line of the program, as far as it is known: the innermost one of no library."""
        frame: Any = sys._getframe(1)
        while frame and frame.f_code.co_filename.startswith(self._libraries):
            frame = frame.f_back
        return f"{frame.f_code.co_filename}:{frame.f_lineno}" if frame else ""


class Guard:
    """Callbacks that leave exceptions as they were, and that no exception keeps from returning.

    C code frees arrays while an exception is on its way, and that must stay set. A ctypes callback
    can't do that: it may not return with an exception set. And Python runs signal handlers in the
    midst of a callback; what they raise there is printed and forgotten, and C code is handed a
    pointer that is anything. So what a callback is kept from raising is raised after it:

    What it returns loses its last reference when it has returned. This is then an int that has an
    array, and the array has a memory handler of its own, whose free(ctx, data, size) is a function
    of C's API: PyErr_SetObject(type, value), to leave an exception set; or
    PyThreadState_SetAsyncExc(thread, type), to raise one as soon as Python code runs again.
    """

    def __init__(self) -> None:
        self._set_handler = ctypes.PYFUNCTYPE(py_object, py_object)(_numpy_api(SET_HANDLER))
        self._malloc = _MALLOC(_second)
        self._handlers: dict[tuple[str, int], tuple[PyDataMem_Handler, object]] = {}

    def callback(
        self, work: Callable[..., int | None], again: Callable[..., int | None] | None = None
    ) -> Callable[..., int | None]:
        """The same function, guarded. again: what is called instead of it after an interruption.

        Both get the same list first, empty in the beginning, to note what is done.
        """
        pending, again = _Pending(), again or work

        @_not_interrupted_at_first
        def guarded(*args: int | None) -> int | None:
            try:
                none_set, done = False, []
                pending.exception  # noqa: B018 - raises it
                none_set = True
                return work(done, *args)
            except BaseException as error:  # noqa: BLE001 - whichever it is, it has to go on
                return finish((error,), none_set, again if none_set else work, (done, *args))

        @_not_interrupted_at_first
        def finish(
            errors: tuple[BaseException, ...], none_set: bool, call: Callable, args: tuple
        ) -> int:
            try:
                answer = _Answer((call(*args) if len(errors) < TRIES else None) or 0)
                first, *others = errors
                first.__traceback__ = _without_ours(first.__traceback__)
                answer.after = [self._raise_later(first) if none_set else self._set(first)]
                answer.after += map(self._raise_later, others)
                return answer
            except BaseException as error:  # noqa: BLE001 - another signal handler's
                return finish((*errors, error), none_set, again, args)

        return guarded

    def _set(self, error: BaseException) -> object:
        """Leave this exception set when the object that this returns is gone."""
        return self._array("PyErr_SetObject", id(type(error)), error)

    def _raise_later(self, error: BaseException) -> object:
        """Raise it in this thread some time after the object that this returns is gone."""
        # PyThreadState_SetAsyncExc wants a class, and calls it.
        kind = type(error).__name__, (type(error),), {"__new__": lambda cls, *_: error}
        return self._array("PyThreadState_SetAsyncExc", threading.get_ident(), type(*kind))

    def _array(self, function: str, first: int, second: object) -> object:
        """When the array that this returns is gone, that function will have got these arguments."""
        import numpy

        if (function, first) not in self._handlers:
            allocator = PyDataMemAllocator(
                ctx=first,
                malloc=ctypes.cast(self._malloc, c_void_p).value,
                free=ctypes.cast(getattr(ctypes.pythonapi, function), c_void_p).value,
            )
            handler = PyDataMem_Handler(b"after a callback", 1, allocator)
            capsule = _new_capsule(ctypes.addressof(handler), HANDLER_NAME, None)
            self._handlers[function, first] = handler, capsule
        capsule = self._handlers[function, first][1]

        def make() -> object:
            self._set_handler(capsule)
            # malloc's size becomes the address of the data, which nobody touches. The dtype's
            # metadata keep the second argument until the function has taken it.
            return numpy.empty(id(second), numpy.dtype(numpy.uint8, metadata={"second": second}))

        return contextvars.Context().run(make)  # so that nothing else ever gets this handler


def _without_ours(trace: types.TracebackType | None) -> types.TracebackType | None:
    """A traceback without its first frames, as far as they are of this file."""
    while trace and trace.tb_frame.f_code.co_filename == __file__:
        trace = trace.tb_next
    return trace


class _Answer(int):
    """What a callback returns, and in the attribute `after` what is done by letting go of it."""


class _Pending(ctypes.c_int):
    # To read it raises the exception that C code has set, if there is one: see ctypes.PyDLL, any
    # function will do. A call would do that as well, but after a call signal handlers are run.
    exception = property(ctypes.PYFUNCTYPE(ctypes.c_int)(("Py_IsInitialized", ctypes.pythonapi)))


def _not_interrupted_at_first(function: types.FunctionType) -> types.FunctionType:
    """Have no signal handlers run before the first statement, a try: with 3, RESUME does not look."""
    code = bytearray(function.__code__.co_code)
    if "RESUME" in dis.opmap:  # Python 3.10 does not look before a try
        at = code[::2].index(dis.opmap["RESUME"])
        code[2 * at + 1] = 3
    function.__code__ = function.__code__.replace(co_code=bytes(code))
    return function


@_not_interrupted_at_first
def _second(first: int, second: int) -> int:
    try:
        return second
    finally:  # for the sake of the try
        pass


def _default_handler() -> PyDataMem_Handler:
    # In a context where nobody has set another one.
    get_handler = ctypes.PYFUNCTYPE(py_object)(_numpy_api(GET_HANDLER))
    capsule = contextvars.Context().run(get_handler)
    return PyDataMem_Handler.from_address(_pointer(capsule, HANDLER_NAME))


def _numpy_api(index: int) -> int:
    """The address of a function of NumPy's C API."""
    import numpy

    core = getattr(numpy, "_core", None) or numpy.core
    if tuple(map(int, numpy.__version__.split(".")[:2])) < (1, 22):
        raise ImportError(f"NumPy {numpy.__version__} has no data memory handlers; 1.22 has")
    table = _pointer(core._multiarray_umath._ARRAY_API, None)
    return (c_void_p * (index + 1)).from_address(table)[index]


_pointer = ctypes.PYFUNCTYPE(c_void_p, py_object, ctypes.c_char_p)(
    ("PyCapsule_GetPointer", ctypes.pythonapi)
)
_new_capsule = ctypes.PYFUNCTYPE(py_object, c_void_p, ctypes.c_char_p, c_void_p)(
    ("PyCapsule_New", ctypes.pythonapi)
)
