"""The memory hierarchy and the limits of the machine, as the operating system tells them."""

from __future__ import annotations

import contextlib
import ctypes
import os
import platform
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from .values import Kind

MEMORY = "memory"
KIB, MIB, GIB = 2**10, 2**20, 2**30


@dataclass(frozen=True)
class Cache:
    level: int
    nbytes: int
    shared_by: int  # logical cores that share one instance
    kind: Kind  # "measured": reported by the operating system; "estimate": a common size was assumed


def home(nbytes: int, caches: Sequence[Cache], threads: int) -> str:
    """ "L2", "L3", ... or "memory". Private caches count once for every thread that has one."""
    for cache in caches:
        if nbytes <= cache.nbytes * -(-threads // cache.shared_by):
            return f"L{cache.level}"
    return MEMORY


def _size(text: str) -> int:
    units = {"K": KIB, "M": MIB, "G": GIB}
    return int(text[:-1]) * units[text[-1]] if text[-1] in units else int(text)


def caches(root: Path = Path("/sys/devices/system/cpu/cpu0/cache")) -> tuple[Cache, ...]:
    """The data caches that serve the first core, from level 2 up. Where the system does not say (Windows, containers
    without /sys), 1 MiB a core and 16 MiB in all, marked as estimates."""
    found: list[Cache] = []
    for index in sorted(root.glob("index*")):
        try:
            kind, level = (index / "type").read_text().strip(), int((index / "level").read_text())
            shared = sum(
                int(high or low) - int(low) + 1
                for low, _, high in (part.partition("-") for part in (index / "shared_cpu_list").read_text().split(","))
            )
            if kind != "Instruction" and level >= 2:
                found.append(Cache(level, _size((index / "size").read_text().strip()), max(1, shared), "measured"))
        except (OSError, ValueError):
            continue
    if not found and sys.platform == "darwin":
        cluster = _sysctl("hw.perflevel0.l2cachesize") or _sysctl("hw.l2cachesize")
        sharing = _sysctl("hw.perflevel0.cpusperl2") or 1
        found = [Cache(2, cluster, sharing, "measured")] if cluster else []
        last = _sysctl("hw.l3cachesize")
        found += [Cache(3, last, os.cpu_count() or 1, "measured")] if last else []
    if not found:
        found = [Cache(2, MIB, 1, "estimate"), Cache(3, 16 * MIB, os.cpu_count() or 1, "estimate")]
    return tuple(sorted(found, key=lambda cache: cache.level))


def _sysctl(name: str) -> int:
    value, size = ctypes.c_uint64(0), ctypes.c_size_t(8)
    library = ctypes.CDLL("libSystem.dylib")
    failed = library.sysctlbyname(name.encode(), ctypes.byref(value), ctypes.byref(size), None, 0)
    return 0 if failed else value.value


def memory_limit(cgroup: Path = Path("/sys/fs/cgroup")) -> int:
    """Bytes of RAM that this process may use: the machine's, or the control group's limit where that is lower."""
    limit = int(psutil.virtual_memory().total)
    folder = cgroup
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/cgroup").read_text().splitlines():
            if line.startswith("0::"):
                folder = cgroup / line[3:].strip().lstrip("/")
    above = [parent for parent in (folder, *folder.parents) if cgroup in (parent, *parent.parents)]
    for file in [*(parent / "memory.max" for parent in above), cgroup / "memory" / "memory.limit_in_bytes"]:
        try:
            limit = min(limit, int(file.read_text()))
        except (OSError, ValueError):
            continue
    return limit


def usable_cores() -> int:
    """Cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)


def processor_name() -> str:
    """What the processor calls itself."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
