"""The base of errors whose message is for the user: entry points catch it alone, so that a bug keeps its traceback."""

from __future__ import annotations

from typing import ClassVar


class MMPretrainError(Exception):
    """Something known to go wrong. The message states what, where, and the remedy."""

    status: ClassVar[int] = 1  # what the process exits with; 2: the caller's mistake
