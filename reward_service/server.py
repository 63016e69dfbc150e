"""The socket of the HTTP side: uvicorn within the front's process and event loop."""

import asyncio
import socket

import uvicorn
from starlette.applications import Starlette

from contracts.config import HttpConfig

CONNECTIONS = 1024  # above which uvicorn itself answers 503
IDLE_S = 30
STOP_S = 15  # for answers that have begun


class HttpServer:
    def __init__(self, application: Starlette, http: HttpConfig):
        self._http = http
        config = uvicorn.Config(
            application,
            log_config=None,
            log_level="error",
            access_log=False,
            server_header=False,
            limit_concurrency=CONNECTIONS,
            timeout_keep_alive=IDLE_S,
            timeout_graceful_shutdown=STOP_S,
        )
        self._server = uvicorn.Server(config)
        self._task: asyncio.Task | None = None

    async def start(self) -> None:
        """Returns once connections are accepted. Raises OSError where the address cannot be had."""
        family = socket.AF_INET6 if ":" in self._http.host else socket.AF_INET
        listening = socket.socket(family, socket.SOCK_STREAM)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        # The successor of a front listens before it goes.
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        listening.bind((self._http.host, self._http.port))
        self._task = asyncio.create_task(self._server.serve(sockets=[listening]))
        while not self._server.started:
            if self._task.done():
                self._task.result()
            await asyncio.sleep(0.01)

    async def stop(self) -> None:
        """Accept no more, and return when what has begun is answered."""
        self._server.should_exit = True
        if self._task is not None:
            await self._task
