"""The processes of a server, and their memory, as Linux tells them."""

from __future__ import annotations

import os
from pathlib import Path

_STUB = "triton_python_backend_stub"
MIB = 2**20


def stub_processes(server: int) -> dict[str, int]:
    """Process ids of the Python backend's models, by the name of the model.

    Args:
        server: process id of tritonserver.
    """
    found = {}
    for entry in Path("/proc").iterdir():
        if not entry.name.isdecimal() or parent_of(int(entry.name)) != server:
            continue
        words = _command(int(entry.name))
        if words and words[0].endswith(_STUB):
            # REPOSITORY/NAME/VERSION/model.py
            found[Path(words[1]).parent.parent.name] = int(entry.name)
    return found


def parent_of(pid: int) -> int | None:
    """Process id of the parent; None for a process that has ended."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        return None
    # The second field is a name in parentheses, and may itself hold spaces.
    state, parent = text.rpartition(")")[2].split()[:2]
    return None if state in "ZX" else int(parent)


def is_alive(pid: int) -> bool:
    """Whether the process runs; one that ended and was not waited for does not."""
    return parent_of(pid) is not None


def rss_mib(pid: int) -> float:
    """Resident memory, shared pages included."""
    pages = int(Path(f"/proc/{pid}/statm").read_text(encoding="ascii").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / MIB


def _command(pid: int) -> list[str]:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")
    except (FileNotFoundError, ProcessLookupError):
        return []
