"""A real server that speaks MongoDB's protocol, with authentication, on a free port of this machine."""

import socket
import subprocess
import sys
import time
from pathlib import Path

import pymongo
from pymongo.errors import PyMongoError

SERVER = Path(sys.executable).parent / "secantusd-py"
USER, PASSWORD = "sacred", "s@cred:pass/word"  # what has to be quoted in an address


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


class MongoServer:
    """SecantusDB as a process, stand-alone as docker-compose.yml's MongoDB is; may be stopped and started again."""

    def __init__(self, folder: Path):
        self._folder = folder
        self.port = free_port()
        self.uri = f"mongodb://{USER}:s%40cred%3Apass%2Fword@127.0.0.1:{self.port}/sacred?authSource=admin"
        self._process: subprocess.Popen[bytes] | None = None
        self._start([])
        with self._connect() as client:
            roles = [{"role": "readWrite", "db": "sacred"}]
            client.admin.command("createUser", USER, pwd=PASSWORD, roles=roles)
        self.stop()
        self.start()

    def start(self) -> None:
        self._start(["--auth"])

    def _start(self, flags: list[str]) -> None:
        with (self._folder / "server.log").open("ab") as log:
            command = [str(SERVER), "--host", "127.0.0.1", "--port", str(self.port), "--standalone"]
            command += ["--storage-path", str(self._folder / "data"), "--cache-size", "64M", *flags]
            self._process = subprocess.Popen(command, stdout=log, stderr=log)
        give_up = time.monotonic() + 60
        while True:
            try:
                with self._connect() as client:
                    client.admin.command("ping")
                    return
            except PyMongoError:
                assert self._process.poll() is None and time.monotonic() < give_up, self.log()
                time.sleep(0.1)

    def _connect(self) -> pymongo.MongoClient:
        return pymongo.MongoClient("127.0.0.1", self.port, serverSelectionTimeoutMS=500)

    def stop(self) -> None:
        if self._process is not None:
            self._process.terminate()
            self._process.wait(30)
            self._process = None

    def log(self) -> str:
        return (self._folder / "server.log").read_text()

    def client(self) -> pymongo.MongoClient:
        return pymongo.MongoClient(self.uri, serverSelectionTimeoutMS=5000)
