"""docker-compose.yml, its .env and what starts in its containers, as far as this can be seen without Docker."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.mongo_server import free_port
from tracking import show
from tracking.addresses import find_address, read_env

ROOT = Path(__file__).resolve().parent.parent
OMNIBOARD = ROOT / "tracking" / "omniboard"
COMPOSE = ROOT / "docker-compose.yml"
SECRETS = ("MONGO_ROOT_PASSWORD", "SACRED_PASSWORD", "OMNIBOARD_PASSWORD")

needs_node = pytest.mark.skipif(shutil.which("node") is None, reason="Node.js is not there")


def services() -> dict[str, dict[str, Any]]:
    return yaml.safe_load(COMPOSE.read_text())["services"]


def test_the_file_is_of_the_compose_specification() -> None:
    checker = Path(sys.executable).parent / "check-jsonschema"
    command = [str(checker), "--builtin-schema", "vendor.compose-spec", str(COMPOSE)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr


def test_docker_accepts_the_file(tmp_path: Path) -> None:
    if (
        shutil.which("docker") is None
        or subprocess.run(["docker", "compose", "version"], capture_output=True).returncode
    ):
        pytest.skip("docker compose is not there")
    env = tmp_path / "env"
    env.write_text((ROOT / ".env.example").read_text().replace("PASSWORD=\n", "PASSWORD=secret\n"))
    command = ["docker", "compose", "--file", str(COMPOSE), "--env-file", str(env), "config", "--format", "json"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    published = [port for service in json.loads(result.stdout)["services"].values() for port in service["ports"]]
    assert {port["host_ip"] for port in published} == {"127.0.0.1"}
    without = subprocess.run([*command[:4], "--env-file", os.devnull, "config"], capture_output=True, text=True)
    assert without.returncode != 0 and "MONGO_ROOT_PASSWORD" in without.stderr


def test_nothing_is_open_by_default_and_no_password_is_in_git() -> None:
    mongodb, omniboard = services()["mongodb"], services()["omniboard"]
    assert mongodb["image"] == "mongo:7" and omniboard["build"] == "./tracking/omniboard"
    for service in (mongodb, omniboard):
        assert all(port.startswith("${BIND_ADDRESS:-127.0.0.1}:${") for port in service["ports"])
        assert service["restart"] == "unless-stopped" and service["healthcheck"]["test"]
        passwords = {value for name, value in service["environment"].items() if "PASSWORD" in name}
        assert all(value.startswith("${") and ":-secret" not in value for value in passwords)
    assert omniboard["depends_on"] == {"mongodb": {"condition": "service_healthy"}}
    assert mongodb["volumes"][0] == "mongodb:/data/db" and "mongodb" in yaml.safe_load(COMPOSE.read_text())["volumes"]
    example = read_env(ROOT / ".env.example")
    assert all(example[name] == "" for name in SECRETS) and example["BIND_ADDRESS"] == "127.0.0.1"
    assert "/.env\n" in (ROOT / ".gitignore").read_text()
    used = {name for name in example if f"${{{name}" in COMPOSE.read_text()}
    assert used == set(example)


def test_run_experiment_finds_the_server_of_the_compose_file(tmp_path: Path) -> None:
    env = tmp_path / ".env"
    env.write_text((ROOT / ".env.example").read_text().replace("SACRED_PASSWORD=", "SACRED_PASSWORD=abc"))
    found = find_address(None, {}, env)
    assert found is not None and found.uri == "mongodb://sacred:abc@127.0.0.1:27017/sacred?authSource=admin"


def test_the_image_is_made_from_the_lock() -> None:
    package, lock = (json.loads((OMNIBOARD / name).read_text()) for name in ("package.json", "package-lock.json"))
    assert lock["packages"][""]["dependencies"] == package["dependencies"] == {"omniboard": "2.16.1"}
    assert all(entry.get("integrity") for name, entry in lock["packages"].items() if name)
    dockerfile = (OMNIBOARD / "Dockerfile").read_text()
    assert "npm ci --omit=dev" in dockerfile and "USER node" in dockerfile
    for name in ("package.json", "package-lock.json", "start.js", "healthcheck.js"):
        assert name in dockerfile and (OMNIBOARD / name).exists()


@needs_node
def test_the_user_is_created() -> None:
    stub = "const db = {getSiblingDB: (name) => ({createUser: (user) => console.log(JSON.stringify([name, user]))})};"
    script = stub + (ROOT / "tracking/mongodb/create_user.js").read_text()
    environment = {**os.environ, "SACRED_PASSWORD": "a'b\"c"}
    result = subprocess.run(["node", "-e", script], capture_output=True, text=True, env=environment)
    assert json.loads(result.stdout) == [
        "admin",
        {"user": "sacred", "pwd": "a'b\"c", "roles": [{"role": "readWrite", "db": "sacred"}]},
    ]


@needs_node
@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"BIND_ADDRESS": "0.0.0.0"}, "BIND_ADDRESS 0.0.0.0 lets other machines in, so Omniboard needs a login"),
        ({"LISTEN_ADDRESS": "0.0.0.0"}, "needs a login"),
        ({"OMNIBOARD_USER": "me"}, "must both be set"),
        ({"OMNIBOARD_USER": "me", "OMNIBOARD_PASSWORD": "a:b"}, "have no colon"),
        ({"MONGO_URI": ""}, "no MongoDB to show"),
    ],
)
def test_omniboard_does_not_start_open_to_others(settings: dict[str, str], says: str) -> None:
    environment = {**os.environ, "MONGO_URI": "mongodb://127.0.0.1:9/sacred", "PORT": str(free_port()), **settings}
    result = subprocess.run(
        ["node", OMNIBOARD / "start.js"], capture_output=True, text=True, env=environment, timeout=60
    )
    assert result.returncode == 2
    assert result.stderr.startswith("error: ") and says in result.stderr and len(result.stderr.splitlines()) == 1


def test_make_omniboard_wants_a_server(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.delenv("SACRED_MONGO_URI", raising=False)
    monkeypatch.setattr(show, "ROOT", Path("/nowhere"))
    assert show.main([]) == 2
    assert "no MongoDB to show is given" in capsys.readouterr().err
