"""The network path to a broker: a TCP proxy that can cut, reset, stall and refuse connections during a test."""

import asyncio
import contextlib
import re
import socket
import struct
import threading

from .processes import free_port

RESET = struct.pack("ii", 1, 0)  # SO_LINGER: close at once, by RST


class Proxy:
    """Looks like its broker to the exporter. It runs on a separate thread; when a method returns, its effect is complete."""

    def __init__(self, broker):
        self.broker, self.port = broker, free_port()
        self.name, self.options = broker.name, broker.options
        #: Accepted connections, and bytes that a stall has delayed.
        self.attempts = self.held_bytes = 0
        self._target = int(re.search(r"127\.0\.0\.1:(\d+)/", broker.url)[1])
        self._server, self._drops, self._close_after, self._writers, self._exporter_writers = None, False, None, set(), set()
        self._gates = asyncio.Event(), asyncio.Event()  # inward, outward
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="proxy", daemon=True)
        self._thread.start()
        self.resume()

    @property
    def url(self):
        return self.broker.url.replace(f"127.0.0.1:{self._target}/", f"127.0.0.1:{self.port}/")

    def cut(self):
        """Closes both ends of every connection."""
        self._do(self._close_connections())

    def reset(self):
        """Closes them by RST, like a firewall that no longer knows the connection."""
        self._do(self._close_connections(RESET))

    def stall(self, inward=True, outward=True):
        """Delays all data to the exporter (inward) or to the broker (outward), and closes no connection."""
        self._do(self._set_gates(not inward, not outward))
        self._drops = False

    def send_to_exporter(self, data):
        """Sends data to the exporter on every connection, as if it came from the broker."""
        self._do(self._send_to_exporter(data))

    def refuse(self):
        """Refuses new connections, as if nothing listened."""
        self._do(self._stop_listening())

    def drop(self):
        """Accepts new connections and closes them immediately."""
        self._drops = True

    def resume(self):
        """Returns to normal operation and forwards all delayed data."""
        self._drops = False
        self._do(self._set_gates())

    def redirect_to(self, broker):
        """Connects new connections to another broker, like an address that has moved."""
        self._target = broker.port

    def close_after(self, text):
        """Closes each connection right after the broker has sent this text on it (None: no longer)."""
        self._close_after = text

    def resume_for_new_connections(self):
        """Returns to normal operation for new connections. The stalled ones stay stalled."""
        self._gates = asyncio.Event(), asyncio.Event()
        self.resume()

    def close(self):
        self._do(self._stop_listening())
        self._do(self._cancel_tasks())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        self._loop.close()

    def _do(self, coroutine):
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(10)

    # The methods below run on the proxy's thread.

    async def _set_gates(self, *directions):
        for gate, is_open in zip(self._gates, directions or (True, True)):
            gate.set() if is_open else gate.clear()
        if not self._server:
            self._server = await asyncio.start_server(self._serve, "127.0.0.1", self.port, backlog=64)

    async def _stop_listening(self):
        if self._server:
            self._server.close()
            self._server = None

    async def _close_connections(self, linger=None):
        for writer in self._writers:
            if linger:
                writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            writer.transport.abort()

    async def _send_to_exporter(self, data):
        for writer in self._exporter_writers:
            writer.write(data)

    async def _cancel_tasks(self):
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)

    async def _serve(self, reader, writer):
        self.attempts += 1
        inward, outward = self._gates
        with contextlib.suppress(OSError), self._registered(writer, self._writers, self._exporter_writers):
            if self._drops:
                return
            broker_reader, broker_writer = await asyncio.open_connection("127.0.0.1", self._target)
            with self._registered(broker_writer, self._writers):
                pumps = self._pump(reader, broker_writer, outward), self._pump(broker_reader, writer, inward)
                tasks = [asyncio.create_task(each) for each in pumps]
                await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
                for task in tasks:
                    task.cancel()

    async def _pump(self, reader, writer, gate):
        """Forwards data until the end of the stream. A stall delays the end, too."""
        with contextlib.suppress(OSError):
            while data := await reader.read(65536):
                self.held_bytes += 0 if gate.is_set() else len(data)
                await gate.wait()
                writer.write(data)
                await writer.drain()
                if self._close_after and self._close_after in data:
                    break
        await gate.wait()

    @contextlib.contextmanager
    def _registered(self, writer, *groups):
        for group in groups:
            group.add(writer)
        try:
            yield
        finally:
            for group in groups:
                group.discard(writer)
            writer.transport.abort()
