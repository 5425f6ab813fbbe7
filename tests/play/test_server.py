"""The page's server, asked by a client of its own library."""

import asyncio
import http.client
import json
import os
import signal
import struct
import threading
from contextlib import asynccontextmanager

import numpy as np
import pytest
from small_world import Beside, made_up
from websockets.asyncio.client import connect
from websockets.exceptions import ConnectionClosed, InvalidStatus

from worldenv.data.episodes import EpisodeWriter, read_episodes
from worldenv.play import command, server
from worldenv.play import session as sessions
from worldenv.play.server import PLAYERS, Server
from worldenv.runtime.errors import UserError

RIGHT = [0, -0.5, 0, 0, 0, 0, -1]


class Page:
    """What the page does with its socket."""

    def __init__(self, socket, hello):
        self.socket, self.hello, self.number = socket, hello, 0

    async def say(self, **message):
        await self.socket.send(json.dumps(message))

    async def act(self, action=RIGHT, go=True, follow=False, press=None):
        self.number += 1
        act = {"action": action, "go": go, "follow": follow, "number": self.number}
        act["press"] = go if press is None else press
        await self.say(do="act", **act)

    async def tap(self):
        await self.act()
        await self.act(go=False)

    async def hear(self):
        async with asyncio.timeout(10):
            message = await self.socket.recv()
        return json.loads(message) if isinstance(message, str) else unpacked(message)

    async def frame(self, draw=True):
        frame = await self.hear()
        assert "number" in frame, frame
        if draw:
            await self.say(do="drawn", frame=frame["number"])
        return frame

    async def silent(self, seconds=0.2):
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(seconds):
                await self.socket.recv()


def unpacked(message):
    (length,) = struct.unpack_from("<I", message)
    header = json.loads(message[4 : 4 + length])
    pixels = np.frombuffer(message, np.uint8, offset=4 + length).reshape(-1, 2, 16, 16, 3)
    assert len(pixels) == 1 + header["real"]
    return {**header, "image": pixels[0], "beside": pixels[-1] if header["real"] else None}


@asynccontextmanager
async def served(world, folder):
    async with Server(world, command.listen(0), folder).running() as running:
        yield running


@asynccontextmanager
async def page(running, session=""):
    origin, host = running.url.rstrip("/"), running.hosts[0]
    async with connect(f"ws://{host}/socket?session={session}", origin=origin) as socket:
        hello = json.loads(await socket.recv())
        assert hello["told"] == "hello"
        yield Page(socket, hello)


@pytest.fixture
def play(world, tmp_path):
    """Run `story(running)` against a server of the small world."""

    def run(story):
        async def whole():
            async with asyncio.timeout(30), served(world, tmp_path / "played") as running:
                await story(running)

        asyncio.run(whole())

    return run


def test_a_key_moves_the_hand_and_the_world_waits_without_one(play, world):
    async def story(running):
        async with page(running) as p:
            assert p.hello["reaches"] == pytest.approx(world.reaches)
            begun = await p.frame()
            assert np.array_equal(begun["image"], made_up().images[0])
            assert begun["reward"] is None
            await p.silent()
            await p.tap()
            moved = await p.frame()
            assert moved["hand"] != begun["hand"]
            assert not np.array_equal(moved["image"], begun["image"])
            assert 0 < moved["reward"] < 1
            assert (moved["act"], moved["chunks"]) == (1, 1)
            assert moved["seconds"] > 0
            await p.silent()
            await p.say(do="pace", frames=None)
            await p.act()
            numbers = [(await p.frame())["chunks"] for _ in range(5)]
            assert numbers == [2, 3, 4, 5, 6]
            await p.act(go=False)
            await p.say(do="begin", origin=1, place=2)
            while (frame := await p.frame())["chunks"]:
                pass
            assert (frame["origin"], frame["place"]) == (1, 2)
            own = made_up("demonstration", seed=4).images[2]
            assert np.array_equal(frame["image"], own)

    play(story)


def test_a_tap_while_another_key_is_held_is_not_lost(play, world):
    """At five frames a second a tap was over before the next chunk, and the held key's release of
    it took its place."""

    async def story(running):
        async with page(running) as p:
            await p.frame()
            still = [0, 0, 0, 0, 0, 0, -1]
            await p.act(still, follow=True)
            await p.act(RIGHT, follow=True)
            await p.act(still, follow=True, press=False)
            for _ in range(3):
                await p.frame()
            own = made_up().actions.reshape(5, 8, 7).clip(-1, 1)[:3]
            done = np.stack(running.seats[0].session.actions[:3])
            assert (done - own)[0] == pytest.approx(0, abs=1e-6)
            assert (done - own)[2] == pytest.approx(0, abs=1e-6)
            assert (done[1, :, 1] <= own[1, :, 1]).all()
            assert done[1, :, 1].mean() < own[1, :, 1].mean() - 0.2

    play(story)


def test_what_was_done_is_saved_and_loads(play, tmp_path):
    async def story(running):
        async with page(running) as p:
            await p.frame()
            await p.say(do="save")
            assert "got none" in (await p.hear())["why"]
            seen = []
            for _ in range(2):
                await p.tap()
                seen.append(await p.frame())
            await p.say(do="save")
            said = await p.hear()
            assert (said["told"], said["steps"], said["success"]) == ("saved", 16, False)
            (episode,) = read_episodes(said["path"])
            assert np.array_equal(episode.images[1:], np.stack([s["image"] for s in seen]))
            assert episode.actions[:, 1] == pytest.approx([-0.5] * 16)
            # Somebody else writes the file: it is said, and nothing is lost.
            with EpisodeWriter(said["path"]):
                await p.say(do="save")
                assert "only writer" in (await p.hear())["why"]
            await p.say(do="save")
            assert (await p.hear())["told"] == "saved"
            assert len(read_episodes(tmp_path / "played")) == 2

    play(story)


BAD = {
    "no JSON": ("{", "not valid JSON"),
    "NaN": ('{"do": NaN}', "not a number in JSON"),
    "a list": ("[]", "do: expected act"),
    "bytes": (b"\0", "got bytes"),
    "an unknown wish": ('{"do": "fly"}', "got 'fly'"),
    "six numbers": ({"action": [0] * 6}, "expected 7 numbers"),
    "a number too large": ({"action": [1.01] + [0] * 6}, "from -1 to 1"),
    "true for a number": ({"action": [True] + [0] * 6}, "from -1 to 1"),
    "no action": ({"action": None}, "expected 7 numbers"),
    "go by number": ({"go": 1}, "go: expected true or false"),
    "a long number": ({"number": 2**60}, "number: expected a whole number"),
    "a place past the last": ('{"do": "begin", "origin": 0, "place": 5}', "expected 0 to 4, got 5"),
    "a negative episode": ('{"do": "begin", "origin": -1, "place": 0}', "origin: expected"),
    "a number beyond floats": ({"action": [10**400] + [0] * 6}, "expected 7 numbers"),
    "a frame that is to come": ('{"do": "drawn", "frame": 99}', "frame: expected 0 to"),
    "a pace of nothing": ('{"do": "pace", "frames": 0}', "frames: expected null"),
    "a real that is no": ('{"do": "real", "on": "no"}', "on: expected"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_message_is_refused_with_a_reason_and_nothing_is_lost(play, name):
    sent, reason = BAD[name]
    if isinstance(sent, dict):
        act = {"action": RIGHT, "go": False, "press": False, "follow": False, "number": 1}
        sent = json.dumps({"do": "act"} | act | sent)

    async def story(running):
        async with page(running) as p:
            await p.frame()
            await p.tap()
            done = await p.frame()
            await p.socket.send(sent)
            with pytest.raises(ConnectionClosed) as closed:
                await p.hear()
            assert closed.value.rcvd.code == 1008
            assert reason in closed.value.rcvd.reason
        async with page(running, p.hello["session"]) as again:
            assert again.hello["session"] == p.hello["session"]
            frame = await again.frame()
            assert (frame["chunks"], frame["number"]) == (1, done["number"])
            assert np.array_equal(frame["image"], done["image"])
            await again.tap()
            assert (await again.frame())["chunks"] == 2

    play(story)


def test_a_message_of_a_megabyte_is_refused(play):
    async def story(running):
        async with page(running) as p:
            await p.frame()
            await p.socket.send("x" * (1 << 20))
            with pytest.raises(ConnectionClosed) as closed:
                await p.hear()
            assert closed.value.rcvd.code == 1009

    play(story)


def test_each_page_has_a_session_of_its_own_and_the_last_seat_is_the_last(play):
    async def story(running):
        async with page(running) as one, page(running) as other:
            first, second = await one.frame(), await other.frame()
            await one.tap()
            await one.frame()
            await other.silent()
            assert np.array_equal(first["image"], second["image"])
            async with page(running, one.hello["session"]) as copy:  # a tab that was duplicated
                assert copy.hello["session"] != one.hello["session"]
                async with page(running) as fourth:
                    await fourth.frame()
                    origin = running.url.rstrip("/")
                    async with connect(f"ws://{running.hosts[0]}/socket", origin=origin) as fifth:
                        with pytest.raises(ConnectionClosed) as closed:
                            await fifth.recv()
                        assert closed.value.rcvd.code == 1013
                        assert f"{PLAYERS} pages play" in closed.value.rcvd.reason
            async with page(running) as late:  # in the place of one that has left
                await late.frame()
                await other.tap()
                assert (await other.frame())["chunks"] == 1
            assert len(running.seats) == PLAYERS

    play(story)


def test_a_page_that_draws_nothing_gets_the_newest_frame_and_stops_the_world(play):
    async def story(running):
        async with page(running) as p:
            first = await p.frame(draw=False)
            await p.say(do="pace", frames=None)
            await p.act()
            await p.silent(0.4)
            assert running.seats[0].session.frame.number == first["number"] + 1
            await p.act(go=False)
            for place in range(4):
                await p.say(do="begin", origin=0, place=place)
                await asyncio.sleep(0.1)
            await p.silent()
            await p.say(do="drawn", frame=first["number"])
            newest = await p.frame()
            assert newest["place"] == 3
            assert newest["number"] == running.seats[0].session.frame.number
            await p.silent()

    play(story)


def test_the_real_benchmark_comes_beside_on_demand(play, monkeypatch):
    monkeypatch.setattr(sessions, "make_env", Beside)

    async def story(running):
        async with page(running) as p:
            await p.frame()
            await p.say(do="real", on=True)
            assert ((await p.frame())["beside"] == 7).all()
            await p.tap()
            assert ((await p.frame())["beside"] == 8).all()
            await p.say(do="real", on=False)
            assert (await p.frame())["beside"] is None
            await p.say(do="begin", origin=1, place=2)
            await p.frame()
            await p.say(do="real", on=True)
            assert "Noise that was not recorded" in (await p.hear())["why"]
            assert (await p.frame(draw=False))["place"] == 2

    play(story)


def test_no_other_page_can_drive_it(play):
    def get(running, path, host):
        port = int(running.hosts[0].split(":")[1])
        asked = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
        asked.request("GET", path, headers={"Host": host})
        answer = asked.getresponse()
        return answer.status, dict(answer.getheaders()), answer.read()

    async def story(running):
        url = f"ws://{running.hosts[0]}/socket"
        for origin in ("http://example.org", "null", None, "http://127.0.0.1:1"):
            with pytest.raises(InvalidStatus) as refused:
                await connect(url, origin=origin)
            assert refused.value.response.status_code == 403
        own = running.hosts[0]
        for path, host, status, part in (
            ("/", own, 200, b"page.js"),
            ("/page.js?x", running.hosts[1], 200, b"WebSocket"),
            ("/page.css", own, 200, b"prefers-color-scheme"),
            ("/frames/1.png", own, 200, b"PNG"),
            ("/", "rebound.example.org", 403, own.encode()),
            ("/frames/2.png", own, 404, b""),
            ("/frames/-1.png", own, 404, b""),
            ("/../session.py", own, 404, b""),
        ):
            got, headers, content = await asyncio.to_thread(get, running, path, host)
            assert got == status, path
            assert part in content
            assert "default-src 'none'" in headers["Content-Security-Policy"]
        assert running.listening.getsockname()[0] == "127.0.0.1"

    play(story)


def test_a_port_that_is_taken_is_named():
    with command.listen(0) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=rf"--port {port}: expected a port that is free"):
            command.listen(port)


def test_a_signal_ends_it_and_tells_the_page(world, tmp_path):
    """The chunk in progress is finished, the page is told, the former handlers are back."""
    said, before = [], signal.getsignal(signal.SIGTERM)

    async def whole():
        running = Server(world, command.listen(0), tmp_path)

        async def watch():
            while True:
                try:
                    async with page(running) as p:
                        await p.act()
                        threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGTERM)).start()
                        while True:
                            await p.frame()
                except ConnectionClosed as closed:
                    return said.append(closed.rcvd.code)

        watching = asyncio.create_task(watch())
        async with asyncio.timeout(20):
            number = await command._serve(running, browser=False)
            await watching
        return number

    assert asyncio.run(whole()) == signal.SIGTERM
    assert said == [1001]
    assert signal.getsignal(signal.SIGTERM) is before


def test_an_error_of_ours_is_not_kept_quiet(play, monkeypatch, caplog):
    monkeypatch.setattr(server, "packed", lambda *_: 1 / 0)

    async def story(running):
        async with page(running) as p:
            with pytest.raises(ConnectionClosed) as closed:
                await p.hear()
            assert closed.value.rcvd.code == 1011

    play(story)
    assert any(r.exc_info and r.exc_info[0] is ZeroDivisionError for r in caplog.records)
