"""Calls per second of `saetool autointerp`'s client, and the memory it needs, against a service that waits 50 ms.

    python tests/bench/bench_calls.py [--calls 3000] [--concurrency 16] [--delay 0.05]

The service is another process of this machine. Ideal is calls · delay / concurrency; beside it the same calls by
httpx2 alone, without keeping, counting or retrying.
"""

import argparse
import asyncio
import json
import multiprocessing
import resource
import tempfile
import time
from pathlib import Path
from typing import Any

from saetool.engines.calls import Caller, each
from saetool.llm.client import USER, Message, Request
from saetool.llm.endpoint import endpoint
from saetool.llm.http import HTTPClient, Limits
from saetool.llm.store import CallStore
from saetool.llm.wire import WIRES

ANSWER = {"choices": [{"message": {"content": "{}"}, "finish_reason": "stop"}], "usage": {}}


def serve(delay: float, ready: Any) -> None:
    """A bare HTTP/1.1 service with kept-alive connections."""
    body = json.dumps(ANSWER).encode()
    sent = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body)

    async def connection(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                length = next(int(x.split(b":")[1]) for x in head.lower().split(b"\r\n") if b"content-length" in x)
                await reader.readexactly(length)
                await asyncio.sleep(delay)
                writer.write(sent)
        except asyncio.IncompleteReadError:
            writer.close()

    async def main() -> None:
        server = await asyncio.start_server(connection, "127.0.0.1", 0)
        ready.send(server.sockets[0].getsockname()[1])
        await server.serve_forever()

    asyncio.run(main())


def requests(n: int) -> list[Request]:
    text = "Excerpt: " + "the cat sat on the mat " * 100
    return [Request((Message(USER, f"{i} {text}"),)) for i in range(n)]


async def ours(url: str, n: int, concurrency: int, path: Path) -> float:
    wire = WIRES["openai"]
    there = endpoint(wire, url, allow_http=False, environment={})
    client = HTTPClient(wire, there, "m", Limits(concurrency))
    with CallStore(path) as store:
        caller = Caller(client, store)
        start = time.perf_counter()
        await each(requests(n), lambda r: caller.ask(r, lambda reply: None), concurrency)
        seconds = time.perf_counter() - start
    await client.close()
    assert caller.usage.calls == n
    return seconds


async def bare(url: str, n: int, concurrency: int) -> float:
    import httpx2

    bodies = [{"model": "m", "messages": [{"role": "user", "content": r.messages[0].content}]} for r in requests(n)]
    async with httpx2.AsyncClient() as client:
        start = time.perf_counter()
        await each(bodies, lambda body: client.post(f"{url}/chat/completions", json=body), concurrency)
        return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--calls", type=int, default=3000)
    parser.add_argument("--concurrency", type=int, default=16)
    parser.add_argument("--delay", type=float, default=0.05)
    args = parser.parse_args()
    here, there = multiprocessing.Pipe()
    service = multiprocessing.Process(target=serve, args=(args.delay, there), daemon=True)
    service.start()
    url = f"http://127.0.0.1:{here.recv()}/v1"
    ideal = args.calls * args.delay / args.concurrency
    with tempfile.TemporaryDirectory() as folder:
        plain = asyncio.run(bare(url, args.calls, args.concurrency))
        mine = asyncio.run(ours(url, args.calls, args.concurrency, Path(folder) / "calls.sqlite"))
    service.terminate()
    for name, seconds in (("ideal", ideal), ("httpx2 alone", plain), ("saetool, kept and counted", mine)):
        print(f"{name:<28} {seconds:7.2f} s {args.calls / seconds:8,.0f} calls/s   {seconds / ideal:6.2f}")
    print(f"largest memory {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:,.0f} MB")


if __name__ == "__main__":
    main()
