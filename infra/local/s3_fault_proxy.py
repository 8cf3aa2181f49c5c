"""An HTTP proxy before an S3 server that misbehaves on demand, so that one can see what a client makes of it.

    python infra/local/s3_fault_proxy.py --upstream http://127.0.0.1:9000 --port 9001

Clients use the proxy's address as their endpoint. Host header, path and query go on unchanged, so signatures hold.
``POST /__faults`` with the JSON of a `Fault` adds one, ``DELETE`` forgets them all, and ``GET`` gives them and the
requests seen since the last ``DELETE``:

    curl -X POST 127.0.0.1:9001/__faults -d '{"kind": "status", "status": 503, "times": 2, "match": "shard-000001"}'

The first fault that fits a request is applied to it; a request that none fits goes through as it is.
"""

# ruff: noqa: T201  (what it prints is for the shell that started it)

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import json
import random
import re
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

from aiohttp import ClientResponse, ClientSession, ClientTimeout, TCPConnector, web
from yarl import URL

CONTROL: Final = "/__faults"
KINDS: Final = ("status", "latency", "reset", "stall", "truncate", "corrupt", "slow")
# Headers of one connection, not of the message (RFC 9110, section 7.6.1).
HOP_BY_HOP: Final = {"connection", "keep-alive", "proxy-connection", "te", "trailer", "transfer-encoding", "upgrade"}
ERROR_CODES: Final = {403: "AccessDenied", 404: "NoSuchKey", 429: "SlowDown", 500: "InternalError", 503: "SlowDown"}
CHUNK_BYTES: Final = 256 * 1024
SLOW_TICK_S: Final = 0.05


@dataclass(frozen=True, kw_only=True, slots=True)
class Fault:
    """One way to misbehave, and on which requests.

    Attributes:
        kind: ``status``: answer with ``status`` and an S3 error, the server is not asked. ``latency``: wait ``delay_s``
            before asking the server. ``reset``: break the connection after ``after_bytes`` of the body (0: before any
            answer). ``stall``: fall silent for ``delay_s`` after ``after_bytes`` (0: before any answer), then go on.
            ``truncate``: end the connection properly after ``after_bytes`` of the body. ``corrupt``: invert the byte
            ``after_bytes`` of the body. ``slow``: give the body at ``bytes_per_s``.
        match: Regular expression, searched in path and query.
        methods: Such as ``["GET"]``; empty: all.
        times: On how many requests; 0: on all.
        rate: Probability that it is applied to a request that fits.
    """

    kind: str
    match: str = "."
    methods: tuple[str, ...] = ()
    times: int = 0
    rate: float = 1.0
    status: int = 503
    delay_s: float = 1.0
    after_bytes: int = 0
    bytes_per_s: int = 1_000_000

    def __post_init__(self) -> None:
        """Check the fields."""
        if self.kind not in KINDS:
            raise ValueError(f"kind={self.kind!r} is not valid; choose one of: {', '.join(KINDS)}")
        if not 0 <= self.rate <= 1:
            raise ValueError(f"rate={self.rate!r} must lie in [0, 1]")
        if min(self.times, self.delay_s, self.after_bytes) < 0:
            raise ValueError("times, delay_s and after_bytes must be at least 0")
        if not 400 <= self.status <= 599:
            raise ValueError(f"status={self.status!r} must lie in [400, 599]")
        if self.bytes_per_s < 1:
            raise ValueError(f"bytes_per_s={self.bytes_per_s!r} must be at least 1")
        re.compile(self.match)

    @classmethod
    def from_json(cls, text: str) -> Fault:
        """Build one from JSON.

        Raises:
            ValueError: An unknown field or a value out of range.
        """
        values = json.loads(text)
        names = [field.name for field in dataclasses.fields(cls)]
        if unknown := sorted(set(values) - set(names)):
            raise ValueError(f"unknown field {unknown[0]!r}; the fields are: {', '.join(names)}")
        return cls(**values | {"methods": tuple(values.get("methods", ()))})


class FaultProxy:
    """The proxy's state: the faults with what is left of them, and the requests seen."""

    def __init__(self, upstream: str, session: ClientSession, seed: int = 0) -> None:
        self._upstream, self._session, self._random = upstream, session, random.Random(seed)
        self._faults: list[tuple[Fault, int]] = []
        self._requests: list[dict[str, Any]] = []

    async def handle(self, request: web.Request) -> web.StreamResponse:
        """Answer one request."""
        if request.path == CONTROL:
            return await self._control(request)
        fault = self._pick(request)
        kind = fault.kind if fault else None
        seen = {
            "method": request.method,
            "path": request.raw_path,
            "range": request.headers.get("Range"),
            "fault": kind,
        }
        self._requests.append(seen)
        if fault is None:
            return await self._forward(request, None)
        if fault.kind == "status":
            return await _refuse(request, fault.status)
        if fault.kind == "reset" and fault.after_bytes == 0:
            return _abort(request)
        if fault.kind == "latency" or (fault.kind == "stall" and fault.after_bytes == 0):
            await asyncio.sleep(fault.delay_s)
            return await self._forward(request, None)
        return await self._forward(request, fault)

    async def _control(self, request: web.Request) -> web.Response:
        try:
            if request.method == "POST":
                fault = Fault.from_json(await request.text())
                self._faults.append((fault, fault.times or -1))
        except (ValueError, TypeError, re.error) as error:
            return web.Response(status=400, text=f"{error}\n")
        if request.method == "DELETE":
            self._faults, self._requests = [], []
        faults = [dataclasses.asdict(fault) | {"left": left} for fault, left in self._faults]
        return web.json_response({"faults": faults, "requests": self._requests})

    def _pick(self, request: web.Request) -> Fault | None:
        for number, (fault, left) in enumerate(self._faults):
            if (
                left
                and (not fault.methods or request.method in fault.methods)
                and re.search(fault.match, request.raw_path)
                and self._random.random() < fault.rate
            ):
                self._faults[number] = (fault, left - 1 if left > 0 else left)
                return fault
        return None

    async def _forward(self, request: web.Request, fault: Fault | None) -> web.StreamResponse:
        headers = [(name, value) for name, value in request.headers.items() if name.lower() not in HOP_BY_HOP]
        async with self._session.request(
            request.method,
            URL(self._upstream + request.raw_path, encoded=True),
            headers=headers,
            data=request.content if request.body_exists else None,
            allow_redirects=False,
            skip_auto_headers=("User-Agent", "Accept", "Accept-Encoding", "Content-Type"),
        ) as answer:
            response = web.StreamResponse(status=answer.status, reason=answer.reason)
            for name, value in answer.headers.items():
                if name.lower() not in HOP_BY_HOP:
                    response.headers.add(name, value)
            await response.prepare(request)
            if request.method == "HEAD":
                return response
            return await _send_body(request, response, answer, fault)


async def _send_body(
    request: web.Request, response: web.StreamResponse, answer: ClientResponse, fault: Fault | None
) -> web.StreamResponse:
    position = 0
    async for chunk in _pieces(answer, fault):
        before, position = position, position + len(chunk)
        if fault and fault.kind != "slow" and before <= fault.after_bytes < position:
            cut = fault.after_bytes - before
            if fault.kind == "corrupt":
                chunk = chunk[:cut] + bytes([chunk[cut] ^ 0xFF]) + chunk[cut + 1 :]
            else:
                await response.write(chunk[:cut])
                chunk = chunk[cut:]
                if fault.kind == "stall":
                    await asyncio.sleep(fault.delay_s)
                elif fault.kind == "truncate" and request.transport:
                    request.transport.close()  # what was written is sent, then a proper end: FIN, not RST
                    return response
                else:
                    return _abort(request, response)
        await response.write(chunk)
        if fault and fault.kind == "slow":
            await asyncio.sleep(len(chunk) / fault.bytes_per_s)
    return response


async def _pieces(answer: ClientResponse, fault: Fault | None) -> AsyncIterator[bytes]:
    size = max(1, int(fault.bytes_per_s * SLOW_TICK_S)) if fault and fault.kind == "slow" else CHUNK_BYTES
    async for chunk in answer.content.iter_chunked(min(size, CHUNK_BYTES)):
        yield chunk


async def _refuse(request: web.Request, status: int) -> web.Response:
    await request.read()  # the whole request, as a server does before it answers
    code = ERROR_CODES.get(status, "InternalError" if status >= 500 else "InvalidRequest")
    body = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>injected</Message></Error>"
    return web.Response(status=status, content_type="application/xml", text="" if request.method == "HEAD" else body)


def _abort(request: web.Request, response: web.StreamResponse | None = None) -> web.StreamResponse:
    if request.transport is not None:
        request.transport.abort()
    return response or web.Response()


async def serve(upstream: str, port: int, seed: int) -> None:
    """Serve on 127.0.0.1 until the process ends."""
    connector = TCPConnector(limit=0)
    async with ClientSession(connector=connector, auto_decompress=False, timeout=ClientTimeout(total=None)) as session:
        app = web.Application(client_max_size=1 << 40)
        app.router.add_route("*", "/{path:.*}", FaultProxy(upstream.rstrip("/"), session, seed).handle)
        runner = web.AppRunner(app, access_log=None)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", port).start()
        print(f"# ready: http://127.0.0.1:{port} -> {upstream}", flush=True)
        await asyncio.Event().wait()


def main(argv: Sequence[str] | None = None) -> None:
    """Run the proxy until it is stopped."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, prog="s3_fault_proxy.py"
    )
    parser.add_argument("--upstream", required=True, help="the server's address, such as http://127.0.0.1:9000")
    parser.add_argument("--port", type=int, default=9001, help="on 127.0.0.1 (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the draws of `rate` (default %(default)s)")
    arguments = parser.parse_args(argv)
    asyncio.run(serve(arguments.upstream, arguments.port, arguments.seed))


if __name__ == "__main__":
    main()
