from collections.abc import Iterator
from contextlib import contextmanager

import boto3
from moto.server import ThreadedMotoServer
from s3fs import S3FileSystem


@contextmanager
def running_s3(*buckets: str) -> Iterator[dict[str, str]]:
    """Run an S3 server with empty buckets. Yield the environment variables for its clients."""
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    S3FileSystem.clear_instance_cache()  # cached instances would use the server of an earlier test
    try:
        host, port = server.get_host_and_port()
        endpoint = f"http://{host}:{port}"
        keys = {"aws_access_key_id": "k", "aws_secret_access_key": "s"}
        client = boto3.client("s3", region_name="us-east-1", endpoint_url=endpoint, **keys)
        for bucket in buckets:
            client.create_bucket(Bucket=bucket)
        environment = {"AWS_DEFAULT_REGION": "us-east-1", "AWS_ENDPOINT_URL": endpoint}
        yield environment | {name.upper(): key for name, key in keys.items()}
    finally:
        server.stop()
