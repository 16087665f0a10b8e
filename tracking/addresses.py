"""Where runs are recorded: which MongoDB, and whether it answers."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

import pymongo
from pymongo import errors

from config import read_text
from errors import UserError

VARIABLE = "SACRED_MONGO_URI"
DEFAULT_DATABASE = "sacred"
_PING_MS = 3000  # milliseconds for the server to answer
_CALL_MS = 20_000  # milliseconds for one answer later on
_UNAUTHORIZED, _AUTHENTICATION_FAILED = 13, 18  # MongoDB's error codes
_START = "start it (docker compose up -d), correct the address, or give --mongo_uri '' to record in files"


@dataclass(frozen=True)
class Address:
    """A MongoDB address and where it was given, for sentences."""

    uri: str
    origin: str

    def __str__(self) -> str:
        return f"{self.origin} {without_password(self.uri)!r}"


def find_address(flag: str | None, environment: Mapping[str, str], compose_env: Path) -> Address | None:
    """The address that --mongo_uri, SACRED_MONGO_URI or the compose file's .env gives, in this order.

    None where nobody gives one; an empty --mongo_uri means none, whatever the others say.
    """
    if flag is not None:
        return Address(flag, "--mongo_uri") if flag.strip() else None
    if environment.get(VARIABLE, "").strip():
        return Address(environment[VARIABLE].strip(), VARIABLE)
    uri = compose_uri(read_env(compose_env)) if compose_env.is_file() else None
    return Address(uri, f"the address in {compose_env.name}") if uri else None


def read_env(path: Path) -> dict[str, str]:
    """The variables of a compose file's .env: NAME=value lines, comments and quotes as there."""
    values = {}
    for line in read_text(path).splitlines():
        name, equals, value = line.strip().removeprefix("export ").partition("=")
        value = value.strip()
        quoted = value[:1] in ("'", '"')
        value = value[1:].partition(value[0])[0] if quoted else value.partition(" #")[0].strip()
        if equals and not name.startswith("#"):
            values[name.strip()] = value
    return values


def compose_uri(values: Mapping[str, str]) -> str | None:
    """The address of the MongoDB that docker-compose.yml starts with these variables; None without a password."""
    password = values.get("SACRED_PASSWORD")
    if not password:
        return None
    host = values.get("BIND_ADDRESS") or "127.0.0.1"
    host = "127.0.0.1" if host in ("0.0.0.0", "::", "[::]") else host
    port = values.get("MONGO_PORT") or "27017"
    return f"mongodb://sacred:{quote(password, safe='')}@{host}:{port}/sacred?authSource=admin"


def without_password(uri: str) -> str:
    """The address as it may be shown."""
    scheme, separator, rest = uri.partition("://")
    credentials, at, hosts = rest.rpartition("@")
    if not at:
        return uri
    return f"{scheme}{separator}{credentials.partition(':')[0]}:***@{hosts}"


def connect(address: Address) -> tuple[pymongo.MongoClient, str]:
    """(client, database name) of a server that answers and lets us read.

    Raises:
      UserError: the address is none, nobody answers there within 3 seconds, or the password is wrong.
    """
    try:
        client: pymongo.MongoClient = pymongo.MongoClient(
            address.uri,
            serverSelectionTimeoutMS=_PING_MS,
            connectTimeoutMS=_PING_MS,
            socketTimeoutMS=_CALL_MS,
            appname="run_experiment",
        )
        database = client.get_default_database(DEFAULT_DATABASE).name
        with pymongo.timeout(_PING_MS / 1000):
            client[database]["runs"].find_one({}, {"_id": 1})
    except (errors.InvalidURI, errors.ConfigurationError, ValueError, TypeError) as error:
        raise UserError(
            f"{address} is no MongoDB address ({error}); it looks like mongodb://user:password@host:27017/sacred"
        ) from error
    except errors.OperationFailure as error:
        if error.code in (_UNAUTHORIZED, _AUTHENTICATION_FAILED):
            raise UserError(
                f"MongoDB refuses the user or password of {address}; correct it, and give authSource if the user is "
                "not of that database"
            ) from error
        raise UserError(f"{address} answers with an error ({error}); {_START}") from error
    except errors.PyMongoError as error:
        raise UserError(f"no MongoDB answers at {address} within {_PING_MS // 1000} seconds; {_START}") from error
    return client, database
