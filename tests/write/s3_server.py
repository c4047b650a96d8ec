"""A server that speaks S3, for the tests of remote input and output."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

from moto.server import ThreadedMotoServer
from pyarrow import fs


@contextmanager
def s3_server(bucket: str) -> Iterator[str]:
    """Serves an empty `bucket`; gives the query that an address needs so that it is found there.

    The keys of the environment are set while it runs: an address must not hold them.
    """
    keys = {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_EC2_METADATA_DISABLED": "true"}
    before = {name: os.environ.get(name) for name in keys}
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        os.environ.update(keys)
        host, port = server.get_host_and_port()
        query = f"endpoint_override={host}:{port}&scheme=http&region=us-east-1&allow_bucket_creation=true"
        filesystem, _ = fs.FileSystem.from_uri(f"s3://{bucket}?{query}")
        filesystem.create_dir(bucket)
        yield query
    finally:
        server.stop()
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
