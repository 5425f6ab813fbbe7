// Drives the world: what is held goes to the server when it changes, frames come back and are drawn
// one at a time. Which keys there are, the server says (play/controls.py).

const $ = (id) => document.getElementById(id);
const OTHERS = {
  Enter: "follow the episode",
  KeyT: "let time pass",
  Backspace: "begin again",
  KeyB: "the real benchmark",
  KeyN: "save the episode",
};
const ARROWS = { ArrowUp: "KeyW", ArrowDown: "KeyS", ArrowLeft: "KeyA", ArrowRight: "KeyD" };
const STICK_AT_REST = 0.15;
const PAD = { grip: 0, follow: 7, again: 9 }; // buttons of the standard layout

let facts, socket, pixels;
let waiting = null; // the newest frame that has not been drawn
let frame = null; // the last one that has
let grips = {}; // by place in the action
let sent = { key: "", go: false, number: 0, at: new Map() };
let padButtons = [];
const down = new Set();
const drawn = []; // [time, number] of frames in the last second

// ---------------------------------------------------------------- the socket

function connect() {
  const kept = sessionStorage.getItem("session") ?? "";
  socket = new WebSocket(`ws://${location.host}/socket?session=${encodeURIComponent(kept)}`);
  socket.binaryType = "arraybuffer";
  socket.onmessage = ({ data }) => {
    if (typeof data === "string") hear(JSON.parse(data));
    else waiting = unpacked(data);
  };
  socket.onclose = ({ code, reason }) => {
    release();
    tell(reason || (code === 1001 ? "The server has ended." : "No connection to the server."), true);
    if (code !== 1013) setTimeout(connect, 2000);
  };
}

function say(message) {
  if (socket.readyState === WebSocket.OPEN) socket.send(JSON.stringify(message));
}

function hear(message) {
  if (message.told === "hello") meet(message);
  else if (message.told === "saved") {
    const end = message.success ? "with success, says the reflector" : "without success";
    tell(`Saved ${message.steps} actions, ${end}: ${message.path}`);
  } else if (message.told === "refused") {
    tell(message.why, true);
    release();
  }
}

function tell(text, bad = false) {
  $("told").textContent = text;
  $("told").classList.toggle("bad", bad);
}

function unpacked(data) {
  const length = new DataView(data).getUint32(0, true);
  const header = new TextDecoder().decode(new Uint8Array(data, 4, length));
  return { ...JSON.parse(header), pixels: new Uint8Array(data, 4 + length) };
}

// ---------------------------------------------------------------- what is held

function held() {
  const action = facts.controls.map(() => 0);
  const pad = pads().find((p) => p.mapping === "standard");
  let follow = down.has("Enter") || !!pad?.buttons[PAD.follow]?.pressed;
  let go = follow || down.has("KeyT");
  for (const { index, kind, keys, sign, stick } of facts.controls) {
    if (kind === "grip") {
      action[index] = grips[index] ?? -sign;
      continue;
    }
    let way = down.has(keys[0]) - down.has(keys[1]);
    const tilt = pad && stick !== null ? pad.axes[stick] * (stick % 2 ? -1 : 1) : 0;
    if (Math.abs(tilt) > STICK_AT_REST) way += tilt;
    way = Math.max(-1, Math.min(1, way)) * sign;
    if (way) go = true;
    action[index] = Math.round(way * facts.reaches[index] * $("far").value * 10) / 1000;
  }
  if (pad) hearButtons(pad);
  return { action, follow, go };
}

function pads() {
  return [...(navigator.getGamepads?.() ?? [])].filter(Boolean);
}

function hearButtons(pad) {
  const now = pad.buttons.map((b) => b.pressed);
  const pressed = (button) => now[button] && !padButtons[button];
  const [grip, again] = [pressed(PAD.grip), pressed(PAD.again)];
  padButtons = now;
  if (grip) facts.controls.filter((c) => c.kind === "grip").slice(0, 1).forEach(toggle);
  if (again) begin();
}

function act(press = false) {
  const now = held();
  const key = JSON.stringify(now);
  if (key === sent.key && !press) return;
  press ||= now.go && !sent.go; // a stick that was at rest
  sent.key = key;
  sent.go = now.go;
  sent.number += 1;
  if (press) sent.at.set(sent.number, performance.now());
  say({ do: "act", ...now, press, number: sent.number });
}

function toggle({ index, sign }) {
  grips[index] = -Math.sign(grips[index] || -sign);
  act(true); // one chunk, for the hand to do it
}

function release() {
  down.clear();
  showKeys();
  if (facts) act();
}

function key(event, pressed) {
  const code = ARROWS[event.code] ?? event.code;
  const typing = event.target.matches?.("select, input[type=range]") && pressed;
  if (!facts || typing || event.ctrlKey || event.metaKey || event.altKey) return;
  const control = facts.controls.find((c) => c.keys.includes(code));
  if (!control && !(code in OTHERS)) return;
  if (event.target.matches?.("button, input") && (code === "Enter" || code === "Space")) return;
  event.preventDefault();
  if (event.repeat) return;
  pressed ? down.add(code) : down.delete(code);
  showKeys();
  if (pressed && control?.kind === "grip") toggle(control);
  else if (pressed && code === "Backspace") begin();
  else if (pressed && code === "KeyB") $("want-real").click();
  else if (pressed && code === "KeyN") say({ do: "save" });
  else act(pressed);
}

function begin(origin = frame?.origin ?? 0, place = frame?.place ?? 0) {
  tell("");
  say({ do: "begin", origin, place });
}

// ---------------------------------------------------------------- what is seen

function draw() {
  requestAnimationFrame(draw);
  if (!facts) return;
  if (pads().length) act();
  if (!waiting) return;
  const before = frame;
  frame = waiting;
  waiting = null;
  const size = facts.views.length * facts.size ** 2 * 3;
  paint("imagined", frame.pixels.subarray(0, size));
  $("beside").hidden = !frame.real;
  if (frame.real) paint("real", frame.pixels.subarray(size));
  say({ do: "drawn", frame: frame.number });
  if (!frame.chunks || frame.followed) {
    facts.controls.filter((c) => c.kind === "grip").forEach((c, n) => (grips[c.index] = frame.grip[n]));
  }
  if (frame.real && !before?.real) tell("");
  $("want-real").checked = frame.real;
  showNumbers();
  if (!before || before.origin !== frame.origin) showFrames();
  if (!before || before.origin !== frame.origin || before.place !== frame.place) showPlace();
}

function paint(row, colours) {
  const { size, views } = facts;
  views.forEach((_, view) => {
    for (let i = 0, p = view * size * size * 3; i < pixels.data.length; i += 4, p += 3) {
      pixels.data[i] = colours[p];
      pixels.data[i + 1] = colours[p + 1];
      pixels.data[i + 2] = colours[p + 2];
      pixels.data[i + 3] = 255;
    }
    $(row).querySelectorAll("canvas")[view].getContext("2d").putImageData(pixels, 0, 0);
  });
}

function showNumbers() {
  const now = performance.now();
  const reward = frame.reward ?? 0;
  $("level").style.width = `${reward * 100}%`;
  $("meter").setAttribute("aria-valuenow", reward.toFixed(3));
  $("meter").classList.toggle("won", reward > facts.threshold);
  $("reward").textContent = frame.reward === null ? "–" : frame.reward.toFixed(3);
  const limit = `succeeds above ${facts.threshold.toFixed(3)}`;
  $("verdict").textContent = frame.won ? `success (${limit})` : limit;
  $("real-won").textContent = frame.real_won ? "success" : "";
  const pressed = sent.at.get(frame.act);
  if (pressed !== undefined) {
    $("latency").textContent = `${(now - pressed).toFixed(0)} ms`;
    for (const number of sent.at.keys()) if (number <= frame.act) sent.at.delete(number);
  }
  if (frame.chunks) drawn.push([now, frame.number]);
  else drawn.length = 0;
  while (drawn.length && drawn[0][0] < now - 1000) drawn.shift();
  if (drawn.length > 1) {
    const seconds = (now - drawn[0][0]) / 1000;
    $("shown").textContent = `${((drawn.length - 1) / seconds).toFixed(1)} a second`;
    $("made").textContent = `${((frame.number - drawn[0][1]) / seconds).toFixed(1)} a second`;
  }
  if (frame.seconds) {
    $("engine").textContent = `${(frame.seconds * 1000).toFixed(1)} ms a frame`;
  }
  $("hand").textContent = facts.hand.map((n, i) => `${n} ${frame.hand[i].toFixed(2)}`).join(" ");
  $("done").textContent = `${frame.chunks} chunks (${frame.left} to follow)`;
}

function showFrames() {
  const { origin } = frame;
  $("origin").value = origin;
  $("instruction").textContent = facts.origins[origin].instruction;
  $("frames").replaceChildren(
    ...Array.from({ length: facts.origins[origin].places }, (_, place) => {
      const button = document.createElement("button");
      button.type = "button";
      button.title = `frame ${place}`;
      button.setAttribute("aria-label", `Begin at frame ${place}`);
      button.style.backgroundImage = `url(frames/${origin}.png)`;
      button.style.backgroundPosition = `${-50 * place}px 0`;
      button.onclick = () => (button.blur(), begin(origin, place));
      return button;
    }),
  );
}

function showPlace() {
  [...$("frames").children].forEach((b, place) => b.setAttribute("aria-current", place === frame.place));
  $("begun").textContent = `from frame ${frame.place} of ${facts.origins[frame.origin].name}`;
}

function showKeys() {
  document.querySelectorAll("kbd").forEach((k) => k.classList.toggle("down", down.has(k.dataset.code)));
}

// ---------------------------------------------------------------- the page itself

function meet(message) {
  facts = message;
  sessionStorage.setItem("session", facts.session);
  frame = null;
  sent.key = "";
  pixels = new ImageData(facts.size, facts.size);
  $("title").textContent = `${facts.title} · ${facts.robot}`;
  $("threshold").style.left = `${facts.threshold * 100}%`;
  for (const row of ["imagined", "real"]) {
    $(row).replaceChildren(...facts.views.map(view));
  }
  const names = facts.origins.map((o, n) => new Option(`${o.name} (${o.won ? "success" : "failure"})`, n));
  $("origin").replaceChildren(...names);
  const paces = [1, 2, 4].map((k) => [facts.rate * k, `${facts.rate * k} frames a second`]);
  paces[0][1] += ", as in reality";
  const chosen = $("pace").options.length ? $("pace").value : String(paces[1][0]);
  $("pace").replaceChildren(...paces.map(([v, t]) => new Option(t, v)), new Option("as fast as the engine", ""));
  $("pace").value = chosen;
  $("pace").onchange();
  const lines = facts.controls.map((c) => [c.keys, c.words]);
  for (const [code, what] of Object.entries(OTHERS)) lines.push([[code], [what]]);
  $("keys").replaceChildren(...lines.map(line));
  tell("");
}

function view(name) {
  const figure = document.createElement("figure");
  const canvas = document.createElement("canvas");
  canvas.width = canvas.height = facts.size;
  canvas.setAttribute("role", "img");
  canvas.setAttribute("aria-label", name);
  const caption = document.createElement("figcaption");
  caption.textContent = name.replaceAll("_", " ");
  figure.append(canvas, caption);
  return figure;
}

function line([codes, words]) {
  const text = document.createElement("p");
  for (const code of codes) {
    const mark = document.createElement("kbd");
    mark.dataset.code = code;
    mark.textContent = code.replace(/^Key/, "").replace("Enter", "↵").replace("Backspace", "⌫");
    text.append(mark);
  }
  const what = words.join(", ").replaceAll("_", " ");
  text.append(codes.length ? ` ${what}` : ` ${what}: no key left`);
  return text;
}

addEventListener("keydown", (event) => key(event, true));
addEventListener("keyup", (event) => key(event, false));
addEventListener("blur", release);
addEventListener("visibilitychange", release);
document.querySelectorAll("button").forEach((b) => b.addEventListener("click", () => b.blur()));
$("again").onclick = () => begin();
$("save").onclick = () => say({ do: "save" });
$("want-real").onchange = ({ target }) => {
  target.blur();
  if (target.checked) tell("The real benchmark is on its way.");
  say({ do: "real", on: target.checked });
};
$("origin").onchange = ({ target }) => (target.blur(), begin(Number(target.value), 0));
$("pace").onchange = () => {
  const frames = $("pace").value ? Number($("pace").value) : null;
  $("pace").blur();
  say({ do: "pace", frames });
};
$("far").oninput = () => {
  $("far-said").textContent = `${$("far").value}%`;
  if (facts) act();
};
$("far").onchange = ({ target }) => target.blur();
$("far").oninput();
connect();
requestAnimationFrame(draw);
