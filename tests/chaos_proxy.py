"""A TCP proxy that delays what passes and cuts connections, to stand between a genuine client and a trainer."""

from __future__ import annotations

import asyncio
import contextlib
import random
import socket
import struct
import threading
from collections.abc import Iterator
from urllib.parse import urlsplit

RESET_ON_CLOSE = struct.pack("ii", 1, 0)


class ChaosProxy:
    """Cuts a connection with probability `cut_rate` at every read, and holds what it read for up to `delay_s`."""

    def __init__(self, upstream: str, cut_rate: float, delay_s: float, seed: int) -> None:
        address = urlsplit(upstream)
        self._upstream = (address.hostname, address.port)
        self._cut_rate, self._delay_s = cut_rate, delay_s
        self._random = random.Random(seed)
        self.num_cut = 0

    async def serve(self, connected: asyncio.StreamReader, client: asyncio.StreamWriter) -> None:
        reader, server = await asyncio.open_connection(*self._upstream)
        pumps = [asyncio.create_task(self._pump(*way)) for way in ((connected, server), (reader, client))]
        try:
            await asyncio.wait(pumps, return_when=asyncio.FIRST_COMPLETED)
        except asyncio.CancelledError:
            pass  # the proxy is being stopped
        finally:
            for task in pumps:
                task.cancel()
            for writer in (client, server):
                writer.close()

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError):
            while data := await reader.read(2**16):
                await asyncio.sleep(self._random.random() * self._delay_s)
                if self._random.random() < self._cut_rate:
                    self.num_cut += 1
                    sock = writer.get_extra_info("socket")
                    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET_ON_CLOSE)
                    return
                writer.write(data)
                await writer.drain()


@contextlib.contextmanager
def chaos(upstream: str, *, cut_rate: float = 0.0, delay_s: float = 0.0, seed: int) -> Iterator[tuple[str, ChaosProxy]]:
    """Run a proxy inside the block; yields its URL and itself."""
    proxy = ChaosProxy(upstream, cut_rate, delay_s, seed)
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, name="chaos")
    thread.start()
    server = asyncio.run_coroutine_threadsafe(asyncio.start_server(proxy.serve, "127.0.0.1", 0), loop).result(10)
    try:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}", proxy
    finally:
        asyncio.run_coroutine_threadsafe(_stop(server), loop).result(10)
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


async def _stop(server: asyncio.Server) -> None:
    server.close()
    others = asyncio.all_tasks() - {asyncio.current_task()}
    for task in others:
        task.cancel()
    await asyncio.gather(*others, return_exceptions=True)
