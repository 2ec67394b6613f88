"""The wiki's memory-layout pictures: areas as boxes, each page marked by where it is now.

In the picture: nothing; the examples draw with it what they did. In the terminal always; as an SVG
with one picture a step where a file is named.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import sys
from html import escape

import edm

NEVER = "NEW"
ADDR_NO_RANDOMIZE = 0x0040000  # <sys/personality.h>
COLOURS = {"instance": "#4c9a5f", "disk": "#c8813c", "never touched": "#e8e8e8"}


def parse_arguments(doc: str, **defaults: object) -> tuple[argparse.Namespace, edm.Config]:
    """As edm.parse_arguments, with the wiki's addresses and log, its plain way, and --layout."""
    _leave_the_wikis_addresses_free()
    parser = argparse.ArgumentParser(description=doc and doc.splitlines()[0])
    parser.add_argument("--layout", metavar="FILE.svg", help="draw the steps into this file too")
    wikis = {"start_addr": 0x1B58000, "end_addr": 0x1F40000, "log_level": "info", "plain": True}
    return edm.parse_arguments(parser, **wikis, **defaults)


def _leave_the_wikis_addresses_free() -> None:
    """Start this program anew if its heap may get in the way.

    A Python that is not position-independent (Debian's) has its heap at low addresses, a random
    distance behind its code; without the distance it ends before the wiki's. Source: personality(2).
    """
    with open("/proc/self/maps") as maps:
        heap = [int(line.split("-")[0], 16) for line in maps if line.endswith("[heap]\n")]
    libc = ctypes.CDLL(None)
    persona = libc.personality(0xFFFFFFFF)  # this only asks
    if not heap or heap[0] >= 1 << 32 or persona & ADDR_NO_RANDOMIZE:
        return
    if libc.personality(persona | ADDR_NO_RANDOMIZE) >= 0:  # a container may forbid it
        os.execv(sys.executable, sys.orig_argv)


def check(space: edm.Space, step: int, address: int, expected: list[str]) -> None:
    """End the program if these are not the places of the pages from this address on."""
    found = space.locations(address, len(expected) * edm.PAGE_SIZE)
    if found != expected:
        sys.exit(f"step {step}: the SPT says {found} from {address:#x}, not {expected}")


class Layout:
    """Draws a space, step by step."""

    def __init__(self, space: edm.Space, names: dict[int, str], svg: str | None = None) -> None:
        """names: what the area at an address is called. svg: the path of the file, if any."""
        self._space, self._names, self._svg = space, names, svg
        self._steps: list[tuple[str, list[tuple[int, str, list[str]]]]] = []

    def step(self, title: str) -> None:
        """Draw the space as it is now."""
        areas = [
            (address, self._names.get(address, ""), self._space.locations(address, length))
            for address, length in self._space.areas()
        ]
        self._steps.append((title, areas))
        lines = [title]
        for address, name, locations in areas:
            boxes = "".join(f"[{_mark(location)}]" for location in locations)
            lines.append(f"  {address:#011x}  {name:8} {boxes}")
        print("\n".join([*lines, "  I instance   D disk   . never touched", ""]), flush=True)
        if self._svg:
            with open(self._svg, "w") as file:
                file.write(self._picture())

    def _picture(self) -> str:
        box, row, left = 26, 40, 230
        most = max((len(pages) for _, areas in self._steps for _, _, pages in areas), default=1)
        width = max(left + box * most + 20, 480)
        parts: list[str] = []
        y = 20
        for title, areas in self._steps:
            y += 14
            parts.append(f'<text x="14" y="{y}" font-weight="bold">{escape(title)}</text>')
            y += 12
            for address, name, locations in areas:
                label = f"{address:#x}  {name}"
                parts.append(f'<text x="14" y="{y + 18}">{escape(label)}</text>')
                for index, location in enumerate(locations):
                    at = address + index * edm.PAGE_SIZE
                    parts.append(
                        f'<rect x="{left + index * box}" y="{y}" width="{box}" height="{box}" '
                        f'fill="{COLOURS[_place(location)]}" stroke="#333">'
                        f"<title>{at:#x} {location}</title></rect>"
                    )
                y += row
            y += 8
        for index, (place, colour) in enumerate(COLOURS.items()):
            x = 14 + 150 * index
            parts.append(
                f'<rect x="{x}" y="{y}" width="14" height="14" fill="{colour}" stroke="#333"/>'
                f'<text x="{x + 20}" y="{y + 12}">{place}</text>'
            )
        height = y + 30
        return (
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" '
            f'viewBox="0 0 {width} {height}" font-family="monospace" font-size="13">\n'
            f'<rect width="{width}" height="{height}" fill="white"/>\n'
            + "\n".join(parts)
            + "\n</svg>\n"
        )


def _place(location: str) -> str:
    return {NEVER: "never touched", "DISK": "disk"}.get(location, "instance")


def _mark(location: str) -> str:
    return {NEVER: ".", "DISK": "D"}.get(location, "I")
