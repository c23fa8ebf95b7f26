"""Exceptions cross from one process to another as themselves where they can, and always with their traceback."""

import pickle

import pytest

from mmpretrain.picklable import picklable


class TwoArgumentsError(Exception):
    """Pickles, and cannot be unpickled."""

    def __init__(self, name: str, place: str) -> None:
        super().__init__(f"{name} at {place}")


def raised(error: BaseException) -> BaseException:
    with pytest.raises(type(error)) as caught:
        raise error
    return caught.value


@pytest.mark.parametrize(
    ("error", "kind", "text"),
    [
        (KeyError("no 3"), KeyError, "'no 3'"),
        (TwoArgumentsError("a", "b"), RuntimeError, "TwoArgumentsError: a at b"),
        (ValueError(lambda: None), RuntimeError, "ValueError: <function"),
    ],
)
def test_an_exception_arrives_with_its_text_and_traceback(error: BaseException, kind: type, text: str) -> None:
    arrived = pickle.loads(pickle.dumps(picklable(raised(error), "in a worker")))
    assert type(arrived) is kind
    assert text in str(arrived)
    assert arrived.__notes__[0].startswith("in a worker:\nTraceback")
    assert "raise error" in arrived.__notes__[0]
