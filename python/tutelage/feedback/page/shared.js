// What the pages have in common: elements, the status line, the wire.
//
// Whatever comes from elsewhere (prompts, answers, names, comments) becomes a text node and nothing else.

export const $ = (id) => document.getElementById(id);

/** An element; children are elements, or strings that become text nodes. */
export function make(tag, properties = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name === "class") element.className = value;
    else if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (value === true) element.setAttribute(name, "");
    else if (value !== false && value !== null) element.setAttribute(name, value);
  }
  element.append(...children);
  return element;
}

export const key = (name) => make("kbd", {}, name);

/** A text as it is, in the direction of its own letters. */
export function textBlock(text, className = "text") {
  return make("div", { class: className, dir: "auto" }, text);
}

export function fit(area) {
  area.style.height = "auto";
  area.style.height = `${area.scrollHeight + 2}px`;
}

export const capital = (text) => text.charAt(0).toUpperCase() + text.slice(1);

// --- the status line ----------------------------------------------------------------------------------------------

/** Says something to everybody, also to screen readers. action: [label, function] of a button beside it. */
export function say(text, kind = "", action = null) {
  const line = $("status");
  if (line.textContent !== text) line.replaceChildren(text);
  line.dataset.kind = kind;
  const button = $("status-do");
  button.hidden = action === null;
  button.replaceChildren(action === null ? "" : action[0]);
  button.onclick = action === null ? null : action[1];
}

// --- the wire -------------------------------------------------------------------------------------------------------

/** The server's word that it was not so. */
export class Refusal extends Error {
  constructor(status, message, next) {
    super(message);
    this.status = status;
    this.next = next;
  }
}

/** No answer, so that nobody knows whether the request was taken. */
export class Silence extends Error {}

export async function ask(path, body) {
  let response, data;
  try {
    response = await fetch(path, {
      method: body === undefined ? "GET" : "POST",
      headers: body === undefined ? {} : { "Content-Type": "application/json" },
      body: body === undefined ? undefined : JSON.stringify(body),
      signal: AbortSignal.timeout(20_000),
    });
    data = await response.json();
  } catch {
    throw new Silence("The server does not answer");
  }
  if (response.ok) return data;
  throw new Refusal(response.status, String(data.error ?? "the server could not answer"), data.next);
}

const LATER = new Set([403, 408, 429, 500, 502, 503]); // of these requests nothing was taken, and the same may be sent again

/** Sends a change until its fate is known: the answer, or a Refusal. */
export async function keepSending(path, body) {
  for (let pause = 250; ; pause = Math.min(2 * pause, 4000)) {
    try {
      const found = await ask(path, body);
      say("");
      return found;
    } catch (error) {
      if (!(error instanceof Silence) && !LATER.has(error.status)) throw error;
      const why = error instanceof Refusal && error.status === 403 ? `Not let in: ${error.message}` : error.message;
      await new Promise((resolve) => {
        const timer = setTimeout(resolve, pause);
        const now = () => (clearTimeout(timer), resolve());
        say(`${why}. What you said is kept on this page and will be sent again.`, "error", ["Try now", now]);
      });
    }
  }
}

/** An identity for a submission. crypto.randomUUID is there on the loopback and over HTTPS only. */
export function newIdentity() {
  return [...crypto.getRandomValues(new Uint8Array(16))].map((byte) => byte.toString(16).padStart(2, "0")).join("");
}

// --- the time that something is looked at -------------------------------------------------------------------------------

/** Runs while the page is seen and the person has done something within two minutes. */
export const clock = {
  total: 0,
  since: null,
  until: 0,
  start(seconds) {
    this.total = seconds;
    this.since = null;
    this.touch();
  },
  touch() {
    this.pause();
    if (!document.hidden) this.since = performance.now();
    this.until = performance.now() + 120_000;
  },
  pause() {
    if (this.since !== null) this.total += Math.max(0, Math.min(performance.now(), this.until) - this.since) / 1000;
    this.since = null;
  },
  seconds() {
    this.touch();
    return Math.round(this.total * 1000) / 1000;
  },
};

for (const happening of ["keydown", "pointerdown", "pointermove", "wheel", "scroll"]) {
  addEventListener(happening, () => clock.since !== null && clock.touch(), { passive: true, capture: true });
}
document.addEventListener("visibilitychange", () => (document.hidden ? clock.pause() : clock.touch()));

// --- keys -----------------------------------------------------------------------------------------------------------------

export const withModifier = (event) => event.ctrlKey || event.metaKey || event.altKey;
export const typing = (target) => target.matches?.("textarea, input:not([type=radio], [type=checkbox])") ?? false;

/** Fills the dialog of keys; rows: [keys, what they do]. */
export function showKeys(rows) {
  $("help-keys").replaceChildren(
    ...rows.map(([keys, what]) => make("div", {}, make("dt", {}, ...keys.map((name) => (name === "…" ? "…" : key(name)))), make("dd", {}, what))),
  );
}
