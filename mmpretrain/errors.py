"""The base of errors whose message is for the user: entry points catch it alone, so that a bug keeps its traceback."""

from __future__ import annotations

from typing import ClassVar


class MMPretrainError(Exception):
    """An expected failure. The message states what failed, where, and the remedy."""

    status: ClassVar[int] = 1  # exit status of the process; 2: the caller's mistake
