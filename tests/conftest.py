"""What several folders of tests use."""

import urllib.request
from collections.abc import Iterator
from typing import Any

import fsspec
import pytest


@pytest.fixture
def object_store(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """An S3 server of this machine with a bucket named "bucket", as fsspec's file system; s3:// means it while the test runs."""
    files = pytest.importorskip("s3fs").S3FileSystem
    server = pytest.importorskip("moto.server").ThreadedMotoServer(port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    try:
        for name, value in {"AWS_ACCESS_KEY_ID": "x", "AWS_SECRET_ACCESS_KEY": "x", "AWS_ENDPOINT_URL": f"http://{host}:{port}"}.items():
            monkeypatch.setenv(name, value)
        urllib.request.urlopen(urllib.request.Request(f"http://{host}:{port}/moto-api/reset", method="POST")).close()
        files.clear_instance_cache()  # those of an earlier server
        store = fsspec.filesystem("s3")
        store.mkdir("bucket")
        yield store
    finally:
        files.clear_instance_cache()
        server.stop()
