"""Where zips and tars end. Their readers stop at the end mark and keep quiet about what follows it.

Two tars put together with `cat` would lose the second one that way, and a file that was written over a longer one keeps
the tail of that.
"""

from __future__ import annotations

import os
from typing import IO

END_RECORD = b"PK\5\6"  # of a zip
END_BYTES = 22  # of that record, without its comment
LONGEST_COMMENT = 2**16 - 1
PIECE_BYTES = 2**20


def bytes_after_zip(stream: IO[bytes]) -> int:
    """How many bytes follow the end record of a zip that could be opened; 0 for a whole one."""
    size = stream.seek(0, os.SEEK_END)
    tail_bytes = min(size, END_BYTES + LONGEST_COMMENT)
    for length in (min(END_BYTES, size), tail_bytes):  # without a comment, as torch and numpy write them; then any
        stream.seek(size - length)
        tail = stream.read(length)
        place = tail.rfind(END_RECORD)
        if place >= 0 and len(tail) >= place + END_BYTES:
            comment = int.from_bytes(tail[place + END_BYTES - 2 : place + END_BYTES], "little")
            return max(0, len(tail) - place - END_BYTES - comment)
    return 0


def first_byte_after_tar(stream: IO[bytes], end: int) -> int | None:
    """The place of the first byte that is not 0 behind a tar's end mark at `end`; None: only padding follows."""
    stream.seek(end)
    while piece := stream.read(PIECE_BYTES):
        left = len(piece.lstrip(b"\0"))
        if left:
            return end + len(piece) - left
        end += len(piece)
    return None
