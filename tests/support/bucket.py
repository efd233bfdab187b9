"""An object store that speaks S3, in a process of its own, and the environment that leads to it."""

import contextlib
import os
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator

import boto3
import botocore.exceptions
from botocore.config import Config

_SERVER = """
import logging
from moto.server import ThreadedMotoServer
logging.getLogger("werkzeug").setLevel(logging.ERROR)
server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
server.start()
print(server.get_host_and_port()[1], flush=True)
input()
"""


@contextlib.contextmanager
def object_store() -> Iterator[dict[str, str]]:
    """Inside, the store runs; yields the environment that clients find it by. It ends with this process."""
    server = subprocess.Popen(
        [sys.executable, "-c", _SERVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert server.stdout is not None
        port = server.stdout.readline().strip()
        yield {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
            "AWS_ACCESS_KEY_ID": "someone",
            "AWS_SECRET_ACCESS_KEY": "something",
            "AWS_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
        }
    finally:
        server.kill()
        server.wait()


class Bucket:
    """A bucket of its own in the store of the environment, reached by another client than the product's."""

    def __init__(self) -> None:
        self.name = f"bucket-{uuid.uuid4().hex[:12]}"
        self._client = boto3.client(
            "s3", endpoint_url=os.environ["AWS_ENDPOINT_URL"], config=Config(retries={"max_attempts": 1})
        )
        for _ in range(50):
            with contextlib.suppress(botocore.exceptions.EndpointConnectionError):
                self._client.create_bucket(Bucket=self.name)
                break
            time.sleep(0.1)
        self.uri = f"s3://{self.name}"

    def put(self, key: str, data: bytes) -> str:
        """Store an object; its URI."""
        self._client.put_object(Bucket=self.name, Key=key, Body=data)
        return f"{self.uri}/{key}"

    def get(self, key: str) -> bytes:
        body: bytes = self._client.get_object(Bucket=self.name, Key=key)["Body"].read()
        return body

    def keys(self, under: str = "") -> list[str]:
        """Keys of all objects, but for the empty ones that stand for folders."""
        pages = self._client.get_paginator("list_objects_v2").paginate(Bucket=self.name, Prefix=under)
        return sorted(
            item["Key"] for page in pages for item in page.get("Contents", []) if item["Key"][-1] != "/"
        )
