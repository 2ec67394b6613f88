"""The data memory handler: NumPy's large arrays live in the space.

In the picture: in the application process, between NumPy and the Space.

Interface:
    numpy_allocator(space, threshold)   a context manager: arrays made meanwhile, of at least so many
                                        bytes, live in the space
    when_numpy_is_imported(action)      for `edm run`, whose script may never import it

NumPy asks its data memory handler for the memory of every array (NEP 49): four C functions, here
ctypes callbacks, so that every array costs a microsecond or two more. PyDataMem_SetHandler would
set a handler for the current context only, and a new thread begins with another context, and
NumPy's default handler; so it is the default handler's functions that are replaced, for all threads.

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

import contextlib
import contextvars
import ctypes
import importlib.util
import os
import site
import sys
import sysconfig
from collections import deque
from collections.abc import Callable, Iterator
from ctypes import c_char, c_size_t, c_uint8, c_void_p
from typing import Any

from edm.address_space import Space, whole_pages

GET_HANDLER = 305  # the index of PyDataMem_GetHandler in NumPy's C API, since 1.22
UNCACHED = 1 << 20  # bytes: NumPy's own free keeps smaller pieces for later, by their size

SPARE = 16  # areas to be used again have at most this part of the resident limit
SPARES = 16  # and are no more than these

# Called by who has the GIL, and calling what needs no more.
_MALLOC = ctypes.PYFUNCTYPE(c_void_p, c_void_p, c_size_t)
_CALLOC = ctypes.PYFUNCTYPE(c_void_p, c_void_p, c_size_t, c_size_t)
_REALLOC = ctypes.PYFUNCTYPE(c_void_p, c_void_p, c_void_p, c_size_t)
_FREE = ctypes.PYFUNCTYPE(None, c_void_p, c_void_p, c_size_t)
_SIZE = ctypes.PYFUNCTYPE(c_size_t, c_void_p)


class PyDataMemAllocator(ctypes.Structure):
    _fields_ = [
        ("ctx", c_void_p),
        ("malloc", c_void_p),
        ("calloc", c_void_p),
        ("realloc", c_void_p),
        ("free", c_void_p),
    ]


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
    before, _handler.threshold = _handler.threshold, threshold
    try:
        yield
    finally:
        _handler.threshold = before


class MemHandler:
    def __init__(self, space: Space) -> None:
        self.threshold = sys.maxsize  # bytes
        self._space = space
        self._spare: deque[tuple[int, int]] = deque()  # (length, address) of areas to be used again
        self._libraries = (*_library_folders(), __file__)
        self._usable_size = _SIZE(("malloc_usable_size", ctypes.CDLL(None)))
        allocator = _default_handler().allocator
        malloc, calloc = _MALLOC(allocator.malloc), _CALLOC(allocator.calloc)
        self._calloc, self._realloc = calloc, _REALLOC(allocator.realloc)
        free = self._free = _FREE(allocator.free)
        start, end = space.start_addr, space.end_addr

        # Every array of this process comes by here: no method, no attribute more than it takes.
        def our_malloc(ctx: int | None, size: int) -> int | None:
            return malloc(ctx, size) if size < self.threshold else self.malloc(ctx, size)

        def our_calloc(ctx: int | None, count: int, size: int) -> int | None:
            if count * size < self.threshold:
                return calloc(ctx, count, size)
            return self.calloc(ctx, count * size)

        def our_free(ctx: int | None, address: int | None, size: int) -> None:
            if address and start <= address < end:
                self.free(address)
            else:
                free(ctx, address, size)

        # Kept here, as NumPy does not know that these are Python objects.
        self._callbacks = (
            _MALLOC(our_malloc), _CALLOC(our_calloc), _REALLOC(self.realloc), _FREE(our_free)
        )  # fmt: skip
        for name, callback in zip(
            ("malloc", "calloc", "realloc", "free"), self._callbacks, strict=True
        ):
            setattr(allocator, name, ctypes.cast(callback, c_void_p).value)
        os.register_at_fork(after_in_child=self._spare.clear)

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

    def realloc(self, ctx: int | None, old: int | None, size: int) -> int | None:
        inside = old and self._space.start_addr <= old < self._space.end_addr
        if size < self.threshold and not inside:
            return self._realloc(ctx, old, size)
        before = 0
        if inside:
            before = self._space.allocated(old)
            if before // 2 < size <= before:
                return old
        elif old:
            before = self._usable_size(old)
        small = size < self.threshold
        new = self._calloc(ctx, 1, size) if small else self.malloc(ctx, size)
        if new and old:
            ctypes.memmove(new, old, min(before, size))
            if inside:
                self.free(old)
            else:
                self._free(ctx, old, UNCACHED)
        return new

    def free(self, address: int) -> None:
        """Keep the area for the next array of its size, if it is small; pages that are here already
        are what makes a program's temporary arrays fast."""
        length = self._space.allocated(address)
        most = self._space.resident_limit // SPARE
        if length > most:
            self._space.release(address)
            return
        self._spare.append((length, address))
        while len(spare := list(self._spare)) > SPARES or sum(length for length, _ in spare) > most:
            with contextlib.suppress(IndexError):  # another thread has just taken it
                self._space.release(self._spare.popleft()[1])

    def _made_in(self) -> str:
        """file:line of the program, as far as it is known: the innermost one of no library."""
        frame: Any = sys._getframe(1)
        while frame and frame.f_code.co_filename.startswith(self._libraries):
            frame = frame.f_back
        return f"{frame.f_code.co_filename}:{frame.f_lineno}" if frame else ""


def _default_handler() -> PyDataMem_Handler:
    import numpy

    core = getattr(numpy, "_core", None) or numpy.core
    if tuple(map(int, numpy.__version__.split(".")[:2])) < (1, 22):
        raise ImportError(f"NumPy {numpy.__version__} has no data memory handlers; 1.22 has")
    pointer = ctypes.pythonapi.PyCapsule_GetPointer
    pointer.argtypes, pointer.restype = (ctypes.py_object, ctypes.c_char_p), c_void_p
    api = pointer(core._multiarray_umath._ARRAY_API, None)
    address = (c_void_p * (GET_HANDLER + 1)).from_address(api)[GET_HANDLER]
    get_handler = ctypes.PYFUNCTYPE(ctypes.py_object)(address)
    # In a context where nobody has set another one.
    capsule = contextvars.Context().run(get_handler)
    return PyDataMem_Handler.from_address(pointer(capsule, b"mem_handler"))


def _library_folders() -> set[str]:
    paths = sysconfig.get_paths()
    found = {paths["stdlib"], paths["platstdlib"], paths["purelib"], paths["platlib"]}
    return {*found, *site.getsitepackages(), "<frozen"}


class _NumpyFinder:
    """Finds NumPy as always, and has something done when it was imported. See sys.meta_path."""

    def __init__(self, action: Callable[[], None]) -> None:
        self._action = action

    def find_spec(self, name: str, path: object = None, target: object = None) -> object:
        if name != "numpy":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec("numpy")
        if spec and spec.loader:
            execute = spec.loader.exec_module

            def exec_module(module: object) -> None:
                execute(module)
                self._action()

            spec.loader.exec_module = exec_module
        return spec


def when_numpy_is_imported(action: Callable[[], None]) -> None:
    """Do this after `import numpy` has been done for the first time; at once, if it was."""
    if "numpy" in sys.modules:
        action()
    else:
        sys.meta_path.insert(0, _NumpyFinder(action))
