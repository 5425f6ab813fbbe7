"""The page in a headless browser: a key press moves the imagined hand, a saved episode loads."""

import asyncio
import threading
import time

import pytest
from browser import NAMES, Browser, find

from worldenv.data.episodes import read_episodes
from worldenv.play import command
from worldenv.play.server import Server


@pytest.fixture
def running(world, tmp_path):
    """A server in a thread of its own, which ends with the test."""
    loop, up, end = asyncio.new_event_loop(), threading.Event(), asyncio.Event()
    server = Server(world, command.listen(0), tmp_path / "played")

    async def serve():
        async with server.running():
            up.set()
            await end.wait()

    thread = threading.Thread(target=loop.run_until_complete, args=(serve(),))
    thread.start()
    assert up.wait(10)
    yield server
    loop.call_soon_threadsafe(end.set)
    thread.join(20)
    loop.close()


@pytest.fixture
def tab(running, tmp_path):
    if find() is None:
        pytest.skip(f"no browser: install one of {', '.join(NAMES)} (apt-get install chromium)")
    browser = Browser(tmp_path / "profile")
    try:
        browser.open(running.url)
        browser.wait("document.querySelectorAll('#frames button').length === 5")
        yield browser
    finally:
        browser.close()


def text(name):
    return f"document.getElementById('{name}')?.textContent"


def test_the_hand_is_driven_and_the_episode_loads(tab, tmp_path):
    assert tab.do("document.querySelectorAll('#imagined canvas').length") == 2
    picture = "document.querySelector('#imagined canvas').toDataURL()"
    hand, before = tab.do(text("hand")), tab.do(picture)
    assert tab.do(text("reward")) == "–"
    tab.key("KeyD")
    tab.wait(f"{text('done')}.startsWith('3 chunks')")
    tab.key("KeyD", "keyUp")
    time.sleep(0.5)
    done = int(tab.do(text("done")).split()[0])
    assert tab.do(text("hand")) != hand
    assert tab.do(picture) != before
    assert 0 < float(tab.do(text("reward"))) < 1
    assert tab.do(text("latency")).endswith(" ms")
    assert float(tab.do(text("shown")).split()[0]) > 0
    tab.key("Space")  # closes the gripper
    tab.key("Space", "keyUp")
    tab.wait(f"{text('done')}.startsWith('{done + 1} chunks')")
    tab.key("KeyN")
    tab.key("KeyN", "keyUp")
    tab.wait(f"{text('told')}.startsWith('Saved ')")
    (episode,) = read_episodes(tmp_path / "played")
    assert str(tmp_path / "played") in tab.do(text("told"))
    held = episode.actions.reshape(-1, 8, 7)
    assert (held[:3, :, 1] < 0).all()
    assert (held[:3, :, 6] == -1).all()
    assert (held[-1, :, 6] == 1).all()

    tab.do("document.querySelectorAll('#frames button')[3].click()")
    tab.wait(f"{text('begun')}.includes('frame 3 of attempt 1')")
    tab.key("Enter")
    tab.wait(f"{text('done')}.includes('(0 to follow)')")
    tab.key("Enter", "keyUp")
    tab.do("window.before = true; location.reload()")
    tab.wait(f"!window.before && {text('begun')}?.includes('frame 3 of attempt 1')")
    assert not tab.do(text("done")).startswith("0 chunks")  # it went on with its session
    assert tab.errors == []


def test_a_gamepad_drives_it_too(tab, running):
    pad = "{mapping: 'standard', axes: [-1, 0.1, 0, 0], buttons: Array(16).fill({pressed: false})}"
    tab.do(f"navigator.getGamepads = () => [null, {pad}]; 0")
    tab.wait(f"{text('done')}.startsWith('2 chunks')")
    tab.do("navigator.getGamepads = () => []; 0")
    (seat,) = running.seats
    done = seat.session.actions[0]
    assert (done[:, 1] > 0).all()  # to the left, as the first camera sees it
    assert (done[:, [0, 2, 3, 4, 5]] == 0).all()


def test_the_page_says_that_the_server_has_ended(running, tab):
    for seat in running.seats:
        asyncio.run_coroutine_threadsafe(
            seat.player.connection.close(1001), seat.player.connection.loop
        ).result(10)
    tab.wait(f"{text('told')}.includes('has ended')")
    tab.wait(f"{text('told')} === ''")  # and comes back by itself
    tab.key("KeyW")
    tab.wait(f"!{text('done')}.startsWith('0 chunks')")
    tab.key("KeyW", "keyUp")
