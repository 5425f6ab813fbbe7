"""worldenv-play: its arguments, and the server from the first page to Ctrl-C."""

import asyncio
import errno
import os
import signal
import socket
import webbrowser
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from worldenv.fields import Range
from worldenv.play.server import Server
from worldenv.play.session import open_world
from worldenv.ranges import FromZero
from worldenv.runtime import signals
from worldenv.runtime.errors import UserError
from worldenv.stages.run import open_run

PORT = 8642


@dataclass(frozen=True)
class PlayArguments:
    """Drive a run's learned world by hand, on a page of this machine.

    Keys or a gamepad move the hand in the world of a round, from any frame of the run's episodes;
    the page shows what the reflector makes of it, and on demand the real benchmark beside it. What
    was done can be saved as an episode in LIBERO's HDF5 layout. The page is served on loopback
    alone, to browsers on this machine. Ctrl-C ends it.
    """

    run_dir: tyro.conf.Positional[Path] = Path("runs/default")
    """Run folder with the simulator and reflector."""
    port: Annotated[int, Range(0, 65535)] = PORT
    """Port of the page on 127.0.0.1; 0 takes any that is free."""
    round: FromZero | None = None
    """Round whose world to play in; default: the last that is finished."""
    out: Path = Path("played")
    """Folder for the episodes that are saved."""
    browser: bool = True
    """Open the page in the browser; either way its address is printed."""


def main(arguments: PlayArguments) -> None:
    """Serve until a signal to stop, which is then raised as ever."""
    with closing(open_run(arguments.run_dir)) as run, listen(arguments.port) as listening:
        print("reading the world and the run's episodes", flush=True)
        world = open_world(run, arguments.round)
        number = asyncio.run(_serve(Server(world, listening, arguments.out), arguments.browser))
    raise signals.Stopped(number)


def listen(port: int) -> socket.socket:
    """A socket that listens on this port of loopback. UserError if it is taken."""
    try:
        return socket.create_server(("127.0.0.1", port))
    except OSError as error:
        if error.errno not in (errno.EADDRINUSE, errno.EACCES):
            raise
        raise UserError(
            f"--port {port}: expected a port that is free, got one that is taken or reserved "
            f"({os.strerror(error.errno)}). Name another, or 0 for any that is free."
        ) from error


async def _serve(server: Server, browser: bool) -> int:
    """The number of the signal that ended it; a second one ends the process as elsewhere."""
    loop, stopped = asyncio.get_running_loop(), asyncio.get_running_loop().create_future()
    before = {n: signal.getsignal(n) for n in signals.STOPPING}
    caught = [n for n, handler in before.items() if handler is not signal.SIG_IGN]

    def stop(number: int) -> None:
        for n in caught:
            loop.remove_signal_handler(n)
            signal.signal(n, before[n])
        stopped.set_result(number)

    for n in caught:
        loop.add_signal_handler(n, stop, n)
    async with server.running():
        print(f"drive the world at {server.url} (Ctrl-C ends it)", flush=True)
        if browser:
            await asyncio.to_thread(webbrowser.open, server.url)
        return await stopped
