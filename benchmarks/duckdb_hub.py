"""Does DuckDB's own `hf://` read what `synth push` sends?

    unshare --mount --net python benchmarks/duckdb_hub.py --duckdb PYTHON

PYTHON has an environment with `duckdb` and `duckdb-extension-httpfs` of one release from PyPI: DuckDB fetches the extension
from its own server, which not every machine reaches. The address of the Hub is fixed in it. So in namespaces of its own, this
script gives loopback the name huggingface.co, and a TLS certificate that DuckDB is told to trust; behind it stands the
Hub-protocol server of the tests. Needs root and openssl. Prints what DuckDB read, and the requests that it sent.
"""

import argparse
import json
import socket
import ssl
import subprocess
import sys
import tempfile
import threading
from contextlib import suppress
from pathlib import Path

from tests.hostile.namespace import bring_up
from tests.hub.server import running_hub

HOST, IMAGES = "huggingface.co", 30
QUERIES = {
    "rows of a split at a tag": "SELECT count(*) FROM 'hf://datasets/me/scenes@v1.0.0/train-*.parquet'",
    "captions by style": "SELECT c.style, count(*) FROM (SELECT unnest(captions) AS c FROM 'hf://datasets/me/scenes/*-*.parquet')"
    " GROUP BY 1 ORDER BY 1",
    "plain column": "SELECT count(text) FROM 'hf://datasets/me/scenes/*-*.parquet'",
}
READ = """
import importlib.util, json, sys
from pathlib import Path
import duckdb
folder = Path(importlib.util.find_spec("duckdb_extension_httpfs").origin).parent
(extension,) = folder.rglob("httpfs.duckdb_extension")
db = duckdb.connect(config={"allow_unsigned_extensions": "true"})
db.execute(f"LOAD '{extension}'")
db.execute(f"SET ca_cert_file='{sys.argv[1]}'")
print(json.dumps({name: db.sql(query).fetchall() for name, query in json.loads(sys.argv[2]).items()}))
"""


def name_loopback(folder: Path) -> None:
    """Give loopback the name of the Hub, in this mount namespace alone."""
    hosts = folder / "hosts"
    hosts.write_text(f"127.0.0.1 localhost {HOST}\n")
    subprocess.run(["mount", "--bind", str(hosts), "/etc/hosts"], check=True)


def make_certificate(folder: Path) -> Path:
    """Write a certificate for the name of the Hub, with its key in the same file."""
    key, certificate = folder / "key.pem", folder / "hub.pem"
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", f"/CN={HOST}"]
    command += ["-addext", f"subjectAltName=DNS:{HOST}", "-keyout", str(key), "-out", str(certificate)]
    subprocess.run(command, check=True, capture_output=True)
    certificate.write_text(certificate.read_text() + key.read_text())
    return certificate


def serve_tls(certificate: Path, port: int) -> None:
    """Pass what comes to port 443 on to a port of plain HTTP, in threads that end with the process."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    listener = socket.create_server(("127.0.0.1", 443))

    def pump(source: socket.socket, target: socket.socket) -> None:
        with suppress(OSError):
            while data := source.recv(1 << 16):
                target.sendall(data)
        with suppress(OSError):
            target.shutdown(socket.SHUT_RDWR)

    def serve() -> None:
        while True:
            raw, _ = listener.accept()
            with suppress(OSError):
                client = context.wrap_socket(raw, server_side=True)
                hub = socket.create_connection(("127.0.0.1", port))
                for ends in ((client, hub), (hub, client)):
                    threading.Thread(target=pump, args=ends, daemon=True).start()

    threading.Thread(target=serve, daemon=True).start()


def main() -> None:
    """Push a version of drawn scenes, and have DuckDB read it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--duckdb", type=Path, required=True, metavar="PYTHON", help="with duckdb and duckdb-extension-httpfs")
    options = parser.parse_args()
    bring_up()
    with tempfile.TemporaryDirectory() as name, running_hub(Path(name) / "hub") as hub:
        folder = Path(name)
        name_loopback(folder)
        environment = hub.env(folder / "home")
        for command in (
            ["generate", "--source", "scenes", "--limit", str(IMAGES), "--out", "d"],
            ["push", "d", "--repo", "me/scenes"],
        ):
            subprocess.run([sys.executable, "-m", "pipeline", *command], cwd=folder, env=environment, check=True)
        certificate = make_certificate(folder)
        serve_tls(certificate, int(hub.endpoint.rpartition(":")[2]))
        pushed = len(hub.hub.log)
        arguments = [str(options.duckdb), "-c", READ, str(certificate), json.dumps(QUERIES)]
        done = subprocess.run(arguments, stdout=subprocess.PIPE, text=True, check=True)
        for what, rows in json.loads(done.stdout).items():
            print(f"{what}: {rows}")
        for method, path in hub.hub.log[pushed:]:
            print(f"  {method} {path}")


if __name__ == "__main__":
    main()
