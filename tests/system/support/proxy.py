"""The path to a broker: a TCP proxy of our own that can be cut, reset, stalled and closed while a test goes on."""

import asyncio
import contextlib
import re
import socket
import struct
import threading

from .processes import free_port

RESET = struct.pack("ii", 1, 0)  # SO_LINGER: close at once, by RST


class Proxy:
    """Looks like its broker to the exporter, and has a thread of its own. When a method returns, it is done."""

    def __init__(self, broker):
        self.broker, self.port = broker, free_port()
        self.name, self.options = broker.name, broker.options
        #: Connections that were accepted, and bytes that a stall has kept back.
        self.attempts = self.held_bytes = 0
        self._target = int(re.search(r"127\.0\.0\.1:(\d+)/", broker.url)[1])
        self._server, self._drops, self._last_words, self._ends, self._near = None, False, None, set(), set()
        self._gates = asyncio.Event(), asyncio.Event()  # inward, outward
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="proxy", daemon=True)
        self._thread.start()
        self.resume()

    @property
    def url(self):
        return self.broker.url.replace(f"127.0.0.1:{self._target}/", f"127.0.0.1:{self.port}/")

    def cut(self):
        """Both ends of every connection are closed."""
        self._do(self._end())

    def reset(self):
        """The same by RST, as from a firewall that has forgotten the connection."""
        self._do(self._end(RESET))

    def stall(self, inward=True, outward=True):
        """Nothing reaches the exporter (inward), the broker (outward); what is sent waits. Nobody is told."""
        self._do(self._open(not inward, not outward))
        self._drops = False

    def send_to_exporter(self, data):
        """Speaks to the exporter on every connection, in the broker's stead."""
        self._do(self._speak(data))

    def refuse(self):
        """New connections are refused, as where nothing listens."""
        self._do(self._shut())

    def drop(self):
        """New connections are accepted and closed at once."""
        self._drops = True

    def resume(self):
        """All is well again; what a stall has kept back goes on its way."""
        self._drops = False
        self._do(self._open())

    def redirect_to(self, broker):
        """New connections are for another broker, as behind an address that has moved."""
        self._target = broker.port

    def close_after(self, text):
        """Connections end when the broker has said this on them (None: no more), in the same breath."""
        self._last_words = text

    def resume_for_new_connections(self):
        """All is well again, but for the connections that were stalled: those stay silent for ever."""
        self._gates = asyncio.Event(), asyncio.Event()
        self.resume()

    def close(self):
        self._do(self._shut())
        self._do(self._give_up())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        self._loop.close()

    def _do(self, coroutine):
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(10)

    # What follows runs on the proxy's own thread.

    async def _open(self, *directions):
        for gate, is_open in zip(self._gates, directions or (True, True)):
            gate.set() if is_open else gate.clear()
        if not self._server:
            self._server = await asyncio.start_server(self._serve, "127.0.0.1", self.port, backlog=64)

    async def _shut(self):
        if self._server:
            self._server.close()
            self._server = None

    async def _end(self, linger=None):
        for writer in self._ends:
            if linger:
                writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            writer.transport.abort()

    async def _speak(self, data):
        for writer in self._near:
            writer.write(data)

    async def _give_up(self):
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)

    async def _serve(self, reader, writer):
        self.attempts += 1
        inward, outward = self._gates
        with contextlib.suppress(OSError), self._among(writer, self._ends, self._near):
            if self._drops:
                return
            far_reader, far_writer = await asyncio.open_connection("127.0.0.1", self._target)
            with self._among(far_writer, self._ends):
                pumps = self._pump(reader, far_writer, outward), self._pump(far_reader, writer, inward)
                tasks = [asyncio.create_task(each) for each in pumps]
                await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
                for task in tasks:
                    task.cancel()

    async def _pump(self, reader, writer, gate):
        """Forwards until the end, which a stall holds up like all the rest."""
        with contextlib.suppress(OSError):
            while data := await reader.read(65536):
                self.held_bytes += 0 if gate.is_set() else len(data)
                await gate.wait()
                writer.write(data)
                await writer.drain()
                if self._last_words and self._last_words in data:
                    break
        await gate.wait()

    @contextlib.contextmanager
    def _among(self, writer, *groups):
        for group in groups:
            group.add(writer)
        try:
            yield
        finally:
            for group in groups:
                group.discard(writer)
            writer.transport.abort()
