"""Exceptions that can be sent to another process."""

from __future__ import annotations

import pickle
import traceback


def picklable(error: BaseException, where: str) -> BaseException:
    """Return `error`, or a RuntimeError with its text where it cannot be pickled.

    The traceback, which pickling loses, is added as a note that begins with `where`.
    """
    trace = "".join(traceback.format_exception(error))
    try:
        survives = type(pickle.loads(pickle.dumps(error))) is type(error)
    except Exception:  # whatever its own __reduce__ or __init__ raises
        survives = False
    result = error if survives else RuntimeError(f"{type(error).__name__}: {error}")
    result.add_note(f"{where}:\n{trace}")
    return result
