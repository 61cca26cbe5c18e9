"""Files that are whole or not there."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from shoal.protos.files import mapped, write_synced, write_whole


def test_a_file_is_replaced_as_a_whole(tmp_path: Path) -> None:
    path = tmp_path / "state"
    write_whole(path, [b"old"])
    write_whole(path, [b"ne", memoryview(b"w")])

    assert path.read_bytes() == b"new"
    assert [path.name for path in tmp_path.iterdir()] == ["state"]


def test_a_write_that_breaks_leaves_the_old_file(tmp_path: Path) -> None:
    def parts() -> Iterator[bytes]:
        yield b"half of the ne"
        raise OSError(28, "No space left on device")

    path = tmp_path / "state"
    write_whole(path, [b"old"])
    with pytest.raises(OSError, match="No space"):
        write_whole(path, parts())
    assert path.read_bytes() == b"old"

    write_whole(path, [b"new"])
    assert path.read_bytes() == b"new"


def test_a_mapped_file_is_its_bytes(tmp_path: Path) -> None:
    path = tmp_path / "payload"
    write_synced(path, [b"abc", b"", b"de"])
    view = mapped(path)
    path.unlink()

    assert (bytes(view), view.readonly, bytes(view[1:3])) == (b"abcde", True, b"bc")


def test_an_empty_file_can_be_mapped(tmp_path: Path) -> None:
    (tmp_path / "payload").touch()

    assert bytes(mapped(tmp_path / "payload")) == b""
