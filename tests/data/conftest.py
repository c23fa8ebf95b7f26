from collections.abc import Callable
from pathlib import Path

import pytest

from tests.data.generated import tar_bytes


@pytest.fixture
def shard(tmp_path: Path) -> Callable[..., Path]:
    """Write one shard of members as others would, without an index."""

    def write(members: list[tuple[str, bytes]], name: str = "00000.tar", cut: int | None = None) -> Path:
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(tar_bytes(members)[:cut])
        return path

    return write
