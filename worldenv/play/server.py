"""The page and its socket, on loopback: one process, one learned world, a session for each page.

A page says what is held (`act`), where to begin, whether the real benchmark is wanted and when to
save; it gets frames, each a header in JSON and the pixels as they are, and words in JSON. The world
stands still until something is held. One frame is on its way at a time: the page says when it has
drawn it, only the newest waits, and a world that is two frames ahead of its page waits too. What a
page did outlives its socket: a page that comes back, after a message that was refused as well, goes
on with its session.

Other web pages may reach a port on loopback as well: a request must name this host, so that no
other name leads here, and a socket must come from this page (`Origin`).
"""

import asyncio
import json
import math
import secrets
import socket
import struct
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress
from dataclasses import asdict, dataclass
from importlib import resources
from io import BytesIO
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import parse_qs, urlsplit

import numpy as np
import torch
from PIL import Image
from websockets.asyncio.server import ServerConnection, serve
from websockets.datastructures import Headers
from websockets.exceptions import ConnectionClosed
from websockets.frames import CloseCode
from websockets.http11 import Request, Response

from worldenv.data.episode import Episode
from worldenv.data.episodes import DatasetWriter, episode_path
from worldenv.play.session import Frame, Session, World
from worldenv.runtime import strict_json
from worldenv.runtime.errors import UserError

PLAYERS = 4
"""Sessions at once; of those without a page the longest left one makes room for another."""
AHEAD = 2  # frames that the world may be ahead of what its page has drawn
TAPS = 3  # keys pressed faster than chunks are done: so many wait, the oldest gives way
LARGEST = 1 << 16  # bytes of a message from a page
SLOWEST = 0.5  # frames a second that a page may ask for at least
_PAGE = {"/": "page.html", "/page.js": "page.js", "/page.css": "page.css"}
_KINDS = {"html": "text/html", "js": "text/javascript", "css": "text/css"}
_Result = TypeVar("_Result")


class Refusal(Exception):
    """A message that is none of this page's: its socket is closed with the reason."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        # What a closing frame holds; longer ones would be an error of their own.
        self.reason = reason.encode()[:120].decode(errors="ignore")


@dataclass(frozen=True)
class Act:
    """What is held: an action of the embodiment, on top of the episode's own where `follow`."""

    action: np.ndarray  # [A] float32
    follow: bool
    number: int
    """Of the message, for the page to tell how long it took."""


class Seat:
    """A session, the thread it lives in, and the player at it, if there is one."""

    def __init__(self, world: World) -> None:
        self.name = secrets.token_urlsafe(12)
        self.session = Session(world)
        self.player: Player | None = None
        self._thread = ThreadPoolExecutor(1, "play", torch.set_num_threads, (1,))

    async def run(self, work: Callable[[Session], _Result]) -> _Result:
        """Something done with the session, after whatever is under way."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._thread, work, self.session)

    async def close(self) -> None:
        """Wait for what is under way, and end the session."""
        await self.run(Session.close)
        self._thread.shutdown()


class Player:
    """One page at one seat: what it asks for, what it is to be shown, what it has drawn."""

    def __init__(self, connection: ServerConnection, seat: Seat, server: "Server") -> None:
        self.connection, self.seat, self.server = connection, seat, server
        self.held: Act | None = None  # as long as a key is down
        self.due: deque[Act] = deque(maxlen=TAPS)  # of keys pressed: each is good for a chunk
        self.begin: tuple[int, int] | None = None
        self.real: bool | None = None
        self.save = False
        self.pace = server.world.rate * 2
        self.drawn = 0
        self.act = 0
        self.newest: tuple[Frame, int] | None = None
        self.wake, self.fresh, self.seen = asyncio.Event(), asyncio.Event(), asyncio.Event()

    async def stay(self) -> None:
        """Until the page leaves. Refusal for a message that cannot be right."""
        jobs = [asyncio.create_task(job()) for job in (self._listen, self._drive, self._show)]
        try:
            done, _ = await asyncio.wait(jobs, return_when=asyncio.FIRST_COMPLETED)
            for job in done:
                job.result()
        finally:
            for job in jobs:
                job.cancel()
            await asyncio.gather(*jobs, return_exceptions=True)

    def show(self, frame: Frame) -> None:
        """Of frames that wait to be shown only the newest is."""
        self.newest = (frame, self.act)
        self.fresh.set()

    async def say(self, told: str, **facts: Any) -> None:
        """Words for the page."""
        await self.connection.send(json.dumps({"told": told, **facts}))

    async def _listen(self) -> None:
        async for message in self.connection:
            self._hear(message)
            self.wake.set()

    def _hear(self, message: str | bytes) -> None:
        if isinstance(message, bytes):
            raise Refusal("expected a message in JSON, got bytes")
        try:
            said = strict_json.parse(message, "the message")
        except UserError as error:
            raise Refusal(str(error)) from error
        kind = said.get("do") if isinstance(said, dict) else None
        if kind == "act":
            act = self._act(said)
            self.held = act if _of(said, "go", bool) else None
            if _of(said, "press", bool):
                self.due.append(act)
        elif kind == "drawn":
            # More than there are would let the world run ahead of a page that draws none.
            self.drawn = max(self.drawn, _within(said, "frame", self.seat.session.number + 1))
            self.seen.set()
        elif kind == "begin":
            origins = self.server.world.origins
            origin = _within(said, "origin", len(origins))
            self.begin = (origin, _within(said, "place", origins[origin].places))
        elif kind == "pace":
            pace = said.get("frames")
            if pace is not None and not (_number(pace) and pace >= SLOWEST):
                raise Refusal(f"frames: expected null or at least {SLOWEST}, got {pace!r}")
            self.pace = math.inf if pace is None else float(pace)
        elif kind == "real":
            self.real = _of(said, "on", bool)
        elif kind == "save":
            self.save = True
        else:
            raise Refusal(f"do: expected act, drawn, begin, pace, real or save, got {kind!r}")

    def _act(self, said: dict) -> Act:
        count, action = self.server.world.robot.A, said.get("action")
        right = isinstance(action, list) and len(action) == count
        if not right or not all(_number(a) and -1 <= a <= 1 for a in action):
            raise Refusal(f"action: expected {count} numbers from -1 to 1, got {action!r}")
        follow, number = _of(said, "follow", bool), _of(said, "number", int)
        return Act(np.array(action, np.float32), follow, number)

    async def _drive(self) -> None:
        """What is asked for, in turn; while something is held, chunk after chunk at the pace."""
        while True:
            await self.wake.wait()
            self.wake.clear()
            work = self._next()
            while work is not None or self.save:
                if work is not None:
                    await self._do(work)
                if self.save:
                    self.save = False
                    await self._store()
                work = self._next()

    async def _do(self, work: Callable[[Session], Frame]) -> None:
        """One frame, and the rest of its time."""
        loop = asyncio.get_running_loop()
        begun = loop.time()
        try:
            self.show(await self.seat.run(work))
        except UserError as error:
            self._let_go()
            await self.say("refused", why=str(error))
            if self.seat.session.frame is not None:
                self.show(self.seat.session.frame)
        await asyncio.sleep(max(0.0, begun + 1 / self.pace - loop.time()))

    def _next(self) -> Callable[[Session], Frame] | None:
        if self.begin is not None:
            origin, place = self.begin
            self.begin = None
            self._let_go()
            return lambda session: session.begin(origin, place)
        if self.real is not None:
            on, self.real = self.real, None
            return lambda session: session.show_real(on)
        ahead = self.seat.session.frame.number - self.drawn
        if ahead >= AHEAD or not (self.due or self.held):
            return None
        act = self.due.popleft() if self.due else self.held
        self.act = act.number
        return lambda session: session.advance(act.action, act.follow)

    def _let_go(self) -> None:
        self.held = None
        self.due.clear()

    async def _store(self) -> None:
        try:
            episode = await self.seat.run(Session.episode)
            path = await self.server.store(episode)
        except UserError as error:
            await self.say("refused", why=str(error))
        else:
            await self.say("saved", path=str(path), steps=len(episode), success=episode.success)

    async def _show(self) -> None:
        while True:
            await self.fresh.wait()
            self.fresh.clear()
            frame, act = self.newest
            await self.connection.send(packed(frame, act))
            while self.drawn < frame.number:
                await self.seen.wait()
                self.seen.clear()


class Server:
    """Serves `world` on a socket that listens on loopback; episodes are saved to `folder`."""

    def __init__(self, world: World, listening: socket.socket, folder: Path) -> None:
        self.world, self.listening, self.folder = world, listening, folder
        port = listening.getsockname()[1]
        self.hosts = [f"{name}:{port}" for name in ("127.0.0.1", "localhost")]
        self.url = f"http://{self.hosts[0]}/"
        self.seats: list[Seat] = []  # the longest left first
        self._ending: list[asyncio.Task] = []
        self._storing = asyncio.Lock()

    @asynccontextmanager
    async def running(self):
        """Within, pages are served. On leaving they are told, and sessions end."""
        async with serve(
            self._welcome,
            sock=self.listening,
            origins=[f"http://{host}" for host in self.hosts],
            process_request=self._request,
            compression=None,  # nothing leaves this machine
            max_size=LARGEST,
        ):
            yield self
        await asyncio.gather(*self._ending, *(seat.close() for seat in self.seats))

    async def store(self, episode: Episode) -> Path:
        """Where the episode lies then, whole, beside those that lay there."""

        def write() -> None:
            with DatasetWriter(self.folder) as writer:
                writer.append(episode)

        async with self._storing:
            await asyncio.to_thread(write)
        facts = (episode.suite, episode.task, episode.instruction, episode.benchmark)
        return episode_path(self.folder, *facts).resolve()

    # ------------------------------------------------------------ plain requests

    async def _request(self, connection: ServerConnection, request: Request) -> Response | None:
        """The page's files; None for the socket, which goes on to its handshake."""
        if request.headers.get("Host") not in self.hosts:
            return _answer(403, "text/plain", b"This page is at " + self.url.encode())
        path = urlsplit(request.path).path
        if path == "/socket":
            return None
        if path in _PAGE:
            file = _PAGE[path]
            content = resources.files("worldenv.play").joinpath("page", file).read_bytes()
            return _answer(200, f"{_KINDS[file.split('.')[-1]]}; charset=utf-8", content)
        number = path.removeprefix("/frames/").removesuffix(".png")
        known = number.isascii() and number.isdigit() and len(number) < 9
        if path == f"/frames/{number}.png" and known and int(number) < len(self.world.origins):
            return _answer(200, "image/png", await asyncio.to_thread(self._frames, int(number)))
        return _answer(404, "text/plain", b"There is nothing of this name.")

    def _frames(self, number: int) -> bytes:
        """The places of an episode, seen by its first camera, side by side as a PNG."""
        origin, file = self.world.origins[number], BytesIO()
        frames = origin.sequence.images[: origin.places, 0].numpy()
        Image.fromarray(np.concatenate(list(frames), axis=1)).save(file, "png")
        return file.getvalue()

    # ------------------------------------------------------------ the socket

    async def _welcome(self, connection: ServerConnection) -> None:
        seat = self._seat(connection.request)
        if seat is None:
            said = f"{PLAYERS} pages play in this world already: close one, and reload this one"
            return await connection.close(CloseCode.TRY_AGAIN_LATER, said)
        player = seat.player = Player(connection, seat, self)
        try:
            await player.say("hello", session=seat.name, **self._facts())
            if seat.session.frame is None:
                player.begin = (0, 0)
                player.wake.set()
            else:
                player.drawn = seat.session.frame.number - 1
                player.show(seat.session.frame)
            await player.stay()
        except Refusal as refusal:
            await connection.close(CloseCode.POLICY_VIOLATION, refusal.reason)
        except ConnectionClosed:
            pass
        finally:
            seat.player = None
            with suppress(ValueError):
                self.seats.remove(seat)
                self.seats.append(seat)

    def _seat(self, request: Request) -> Seat | None:
        """The one that a page comes back to, if nobody sits there; else a new one; None where all
        are taken."""
        asked = parse_qs(urlsplit(request.path).query).get("session", [""])[0]
        free = [seat for seat in self.seats if seat.player is None]
        for seat in free:
            if seat.name == asked:
                return seat
        if len(self.seats) >= PLAYERS:
            if not free:
                return None
            self.seats.remove(free[0])
            self._ending.append(asyncio.create_task(free[0].close()))
        seat = Seat(self.world)
        self.seats.append(seat)
        return seat

    def _facts(self) -> dict[str, Any]:
        """All that a page has to know of the world."""
        world, robot = self.world, self.world.robot
        return {
            "title": f"{world.config.run_dir.name} · round {world.number}",
            "robot": robot.name,
            "views": robot.views,
            "size": robot.image_size,
            "controls": [asdict(c) for c in world.controls],
            "reaches": world.reaches,
            "rate": world.rate,
            "hand": [robot.proprio[i].name for i in robot.entries("position")],
            "threshold": world.threshold,
            "origins": [
                {
                    "name": o.name,
                    "instruction": o.sequence.instruction,
                    "won": o.won,
                    "places": o.places,
                }
                for o in world.origins
            ],
        }


def packed(frame: Frame, act: int) -> bytes:
    """A frame as a page reads it: the header's length in four bytes, the first the lowest; the
    header; the pixels `[V, H, W, 3]`, and those of the real benchmark where it is beside."""
    header = json.dumps({**frame.facts, "act": act, "real": frame.real is not None}).encode()
    parts = [frame.image] if frame.real is None else [frame.image, frame.real]
    pixels = b"".join(np.ascontiguousarray(part).tobytes() for part in parts)
    return struct.pack("<I", len(header)) + header + pixels


def _answer(status: int, kind: str, content: bytes) -> Response:
    """A file for the page, which may use nothing but what comes from here."""
    headers = Headers()
    headers["Content-Type"], headers["Content-Length"] = kind, str(len(content))
    headers["Cache-Control"], headers["X-Content-Type-Options"] = "no-store", "nosniff"
    headers["Cross-Origin-Resource-Policy"] = "same-origin"
    headers["Content-Security-Policy"] = (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; "
        "connect-src 'self'; frame-ancestors 'none'; base-uri 'none'; form-action 'none'"
    )
    headers["Connection"] = "close"
    return Response(
        status, {200: "OK", 403: "Forbidden", 404: "Not Found"}[status], headers, content
    )


def _number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and -1e9 < value < 1e9


def _of(said: dict, name: str, kind: type[_Result]) -> _Result:
    """A field that is true or false, or a whole number from 0."""
    value = said.get(name)
    if type(value) is not kind or (kind is int and not 0 <= value < 2**53):
        expected = "true or false" if kind is bool else "a whole number from 0"
        raise Refusal(f"{name}: expected {expected}, got {value!r}")
    return value


def _within(said: dict, name: str, count: int) -> int:
    value = _of(said, name, int)
    if value >= count:
        raise Refusal(f"{name}: expected 0 to {count - 1}, got {value}")
    return value
