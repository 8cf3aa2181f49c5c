"""Runs OpenStack Swift with its S3 API from one folder: no root rights, no memcached, loopback only.

Started by `s3_server.py` with the Python of Swift's own environment; nothing of this project is imported here.
Two processes: the front (S3 API, signatures) and the back (account, container and object servers). Objects are plain
files below ``ROOT/srv`` and stay when the server stops.

    python swift_launcher.py ROOT PORT ACCOUNT:USER SECRET
"""

from __future__ import annotations

import os
import socket
import sys
import warnings
from pathlib import Path
from time import time as now
from typing import Any

os.environ.setdefault("EVENTLET_NO_GREENDNS", "yes")
warnings.simplefilter("ignore")  # eventlet announces its own end at every start

import eventlet  # noqa: E402

eventlet.patcher.monkey_patch(all=False, socket=True, select=True, thread=True, time=True)

import eventlet.wsgi  # noqa: E402
from swift.common import utils  # noqa: E402
from swift.common.http_protocol import SwiftHttpProtocol  # noqa: E402
from swift.common.ring import RingBuilder  # noqa: E402
from swift.common.utils import NullLogger  # noqa: E402
from swift.common.wsgi import loadapp  # noqa: E402

HOST = "127.0.0.1"
BACK_SERVERS = ("account", "container", "object")
FILTERS = (
    "catch_errors gatekeeper healthcheck cache listing_formats bulk s3api tempauth "
    "copy slo dlo versioned_writes symlink"
)
# Filters that need more than their name.
SETTINGS = {
    "s3api": "location = us-east-1",
    "tempauth": "user_{account}_{user} = {secret} .admin",
    "versioned_writes": "allow_object_versioning = true",
}
PARENT_CHECK_S = 0.5


class MemoryCache:
    """What Swift asks of memcached, in this process: entries with an optional time to live."""

    def __init__(self) -> None:
        self._entries: dict[str, tuple[Any, float]] = {}

    def get(self, key: str, raise_on_error: bool = False) -> Any:
        """Give an entry, None if there is none or its time is over."""
        value, ends = self._entries.get(key, (None, 0.0))
        if ends and ends < now():
            self._entries.pop(key, None)
            return None
        return value

    def set(self, key: str, value: Any, serialize: bool = True, time: float = 0, **_: Any) -> bool:
        """Put an entry, for ``time`` seconds (0: for ever)."""
        self._entries[key] = (value, now() + time if time else 0.0)
        return True

    def incr(self, key: str, delta: int = 1, time: float = 0) -> int:
        """Add to a number, which stays at 0 or above."""
        value = max(int(self.get(key) or 0) + int(delta), 0)
        self.set(key, value, time=time)
        return value

    def decr(self, key: str, delta: int = 1, time: float = 0) -> int:
        """Subtract from a number."""
        return self.incr(key, -delta, time)

    def delete(self, key: str, server_key: str | None = None) -> None:
        """Drop an entry."""
        self._entries.pop(key, None)

    def set_multi(self, mapping: dict[str, Any], server_key: str, serialize: bool = True, time: float = 0) -> None:
        """Put several entries."""
        for key, value in mapping.items():
            self.set(key, value, time=time)

    def get_multi(self, keys: list[str], server_key: str) -> list[Any]:
        """Give several entries."""
        return [self.get(key) for key in keys]


def cache_filter(global_conf: dict[str, str], **_: Any) -> Any:
    """The paste filter ``cache``: puts a `MemoryCache` where Swift's own filter would put memcached."""
    cache = MemoryCache()

    def wrap(app: Any) -> Any:
        def call(environ: dict[str, Any], start_response: Any) -> Any:
            environ["swift.cache"] = cache
            return app(environ, start_response)

        return call

    return wrap


def write_rings(etc: Path, ports: dict[str, int]) -> None:
    """Write one ring for each back server: one partition group, one replica, one device."""
    for name, port in ports.items():
        builder = RingBuilder(2, 1, 1)
        device = {"region": 1, "zone": 1, "weight": 1, "device": "d1", "meta": ""}
        builder.add_dev(device | {"ip": HOST, "port": port, "replication_ip": HOST, "replication_port": port})
        builder.rebalance()
        builder.get_ring().save(str(etc / f"{name}.ring.gz"))


def write_configs(root: Path, account: str, user: str, secret: str) -> None:
    """Write swift.conf and the paste configs of all servers to ``root/etc``."""
    etc = root / "etc"
    (etc / "swift.conf").write_text(
        "[swift-hash]\nswift_hash_path_prefix = local\nswift_hash_path_suffix = local\n"
        "[storage-policy:0]\nname = default\ndefault = yes\n"
    )
    default = (
        f"[DEFAULT]\nswift_dir = {etc}\ndevices = {root / 'srv'}\nmount_check = false\nfallocate_reserve = 0\n"
        "disable_fallocate = true\nlog_level = WARNING\n"
    )
    for name in BACK_SERVERS:
        text = f"{default}[pipeline:main]\npipeline = server\n[app:server]\nuse = egg:swift#{name}\n"
        (etc / f"{name}-server.conf").write_text(text)
    sections = [
        default,
        f"[pipeline:main]\npipeline = {FILTERS} proxy-server",
        "[app:proxy-server]\nuse = egg:swift#proxy\naccount_autocreate = true",
        "object_chunk_size = 1048576\nclient_chunk_size = 1048576",
    ]
    for name in FILTERS.split():
        use = "call:swift_launcher:cache_filter" if name == "cache" else f"egg:swift#{name}"
        setting = SETTINGS.get(name, "").format(account=account, user=user, secret=secret)
        sections.append(f"[filter:{name}]\nuse = {use}\n{setting}")
    (etc / "proxy-server.conf").write_text("\n".join(sections) + "\n")


def serve(listener: socket.socket, config: Path) -> None:
    """Serve one paste config until the process ends; header names keep their case, as S3 metadata needs it."""
    app, pool = loadapp(str(config)), eventlet.GreenPool(256)
    eventlet.wsgi.server(
        listener, app, NullLogger(), protocol=SwiftHttpProtocol, custom_pool=pool, capitalize_response_headers=False
    )


def end_with(parent: int) -> None:
    """End this process when its parent is gone, also where that was killed."""
    while os.getppid() == parent:
        eventlet.sleep(PARENT_CHECK_S)
    os._exit(0)


def main(root: Path, port: int, key: str, secret: str) -> None:
    """Run both processes until the parent ends or a signal comes."""
    etc = root / "etc"
    for folder in (etc, root / "srv" / "d1"):
        folder.mkdir(parents=True, exist_ok=True)
    account, _, user = key.partition(":")
    write_configs(root, account, user, secret)
    utils.set_swift_dir(str(etc))
    listeners = {name: eventlet.listen((HOST, 0)) for name in BACK_SERVERS}
    write_rings(etc, {name: listener.getsockname()[1] for name, listener in listeners.items()})
    front, parent = eventlet.listen((HOST, port), reuse_port=False), os.getppid()
    me = os.getpid()
    if os.fork() == 0:
        eventlet.hubs.use_hub()  # an event loop of its own
        front.close()
        for name, listener in listeners.items():
            eventlet.spawn(serve, listener, etc / f"{name}-server.conf")
        end_with(me)
    for listener in listeners.values():
        listener.close()
    eventlet.spawn(end_with, parent)
    serve(front, etc / "proxy-server.conf")


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent))
    main(Path(sys.argv[1]).resolve(), int(sys.argv[2]), sys.argv[3], sys.argv[4])
