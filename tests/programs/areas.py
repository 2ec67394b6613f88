"""mmap and munmap: what they promise, and what they refuse."""

import errno
import gc
import os
import sys
import tempfile

import parts

import edm

START, END, PAGE = 0x1B58000, 0x1F40000, edm.PAGE_SIZE


def refuses(error, words, call, *arguments, **options):
    try:
        call(*arguments, **options)
    except error as caught:
        text = str(caught)
        assert words in text and "\n" not in text, text
    else:
        sys.exit(f"{call} took {arguments} {options}")


class Integer:
    def __init__(self, value):
        self.value = value

    def __index__(self):
        return self.value


def app(space):
    area = space.mmap(4 * PAGE, addr=0x1D4C000)
    assert isinstance(area, memoryview) and area.format == "B" and not area.readonly
    assert len(area) == 4 * PAGE and not any(area)

    # What mmap refuses.
    refuses(ValueError, "length", space.mmap, 0)
    refuses(ValueError, "length", space.mmap, -1)
    refuses(ValueError, "PAGE_SIZE", space.mmap, PAGE, addr=0x1D5C001)
    refuses(ValueError, "leaves the space", space.mmap, PAGE, addr=START - PAGE)
    refuses(ValueError, "leaves the space", space.mmap, 2 * PAGE, addr=END - PAGE)
    refuses(ValueError, "overlaps", space.mmap, PAGE, addr=0x1D4F000)
    refuses(ValueError, "overlaps", space.mmap, 2 * PAGE, addr=0x1D4B000)
    refuses(MemoryError, "end_addr", space.mmap, END - START)
    refuses(TypeError, "float", space.mmap, 1e3)
    refuses(TypeError, "float", space.mmap, PAGE, addr=float(0x1D5C000))
    refuses(ValueError, "PAGE_SIZE", space.locations, START + 1, PAGE)
    refuses(ValueError, "PAGE_SIZE", space.locations, START, 1)
    for addr, length in (
        (START - PAGE, PAGE),
        (END - PAGE, 2 * PAGE),
        (END, PAGE),
        (1 << 70, PAGE),
    ):
        refuses(ValueError, "leaves the space", space.locations, addr, length)
    refuses(ValueError, "leaves the space", space.locations, END, -PAGE)
    assert space.locations(END - PAGE, PAGE) == ["NEW"] and space.locations(END, 0) == []
    assert space.areas() == [(0x1D4C000, 4 * PAGE)]

    # A size that is another kind of integer, as NumPy's are; and a name that is long, and no text.
    space.munmap(space.mmap(Integer(PAGE), addr=Integer(0x1D5C000), name="\udce9\u20ac" * 1000))

    # Without an address: in the smallest gap that has room, here the one behind the area.
    low = space.mmap(100)
    assert len(low) == 100 and space.areas()[1] == (0x1D50000, PAGE)
    low[99] = 1

    # munmap refuses while anything uses the area, and then everything is as before.
    area[:] = b"x" * len(area)
    slice_of_it = area[10:20]
    refuses(BufferError, "in use", space.munmap, area)
    assert slice_of_it[0] == area[10] == ord("x")
    del slice_of_it
    numbers = area.cast("Q")
    refuses(BufferError, "in use", space.munmap, area)
    del numbers
    refuses(ValueError, "area", space.munmap, memoryview(bytearray(10)))

    # The pages of an area that is unmapped are freed, those on the disk too.
    low[0] = 2  # a fifth page: LPET evicts two of the area
    locations = space.locations(0x1D4C000, 4 * PAGE)
    assert "DISK" in locations and "INSTANCE_0" in locations, locations
    space.munmap(area)
    refuses(ValueError, "unmapped already", space.munmap, area)
    assert space.locations(0x1D4C000, 4 * PAGE) == ["NEW"] * 4
    parts.check_resident(space)
    again = space.mmap(6 * PAGE, addr=0x1D4A000)
    assert not any(again), "a page mapped again does not read as zeros"
    assert low[99] == 1

    # Mapping and unmapping for ever takes no memory.
    for n in range(300):
        more = space.mmap(3 * PAGE)
        more[PAGE] = n % 256
        assert more[PAGE] == n % 256 and not more[0]
        space.munmap(more)

    # System calls into an area: a file read straight into it, and written from it.
    with tempfile.TemporaryFile() as file:
        file.write(bytes(range(256)) * 64)
        file.seek(0)
        try:
            got = file.readinto(again)
        except OSError as error:
            assert error.errno == errno.EFAULT, error
            print("userfaultfd in user mode only: readinto gives EFAULT")
        else:
            assert got == 4 * PAGE and bytes(again[: 4 * PAGE]) == bytes(range(256)) * 64
            file.seek(0)
            assert file.write(again[: 4 * PAGE]) == 4 * PAGE

    # A process that the application forks reads the memory, writes privately, and can't call Space.
    again[0] = 42
    child = os.fork()
    if child == 0:
        was, again[0] = again[0], 43
        try:
            space.mmap(PAGE)
        except RuntimeError:
            os._exit(was + again[0])
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 42 + 43
    assert again[0] == 42
    gc.collect()
    print("areas SUCCESS")


edm.run(app, edm.Config(START, END, high_threshold=4, low_threshold=2))
