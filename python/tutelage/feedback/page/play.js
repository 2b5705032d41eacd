// The page to talk at: sends what a person says, shows two answers as they come, and takes which of them is better.
//
// The page holds the conversation, in the tab's own storage: a reload loses nothing of it. A judgement is sent until the server
// has confirmed it; a message whose answers broke off is put back where it was typed.

import { $, Refusal, Silence, ask, capital, clock, fit, keepSending, key, make, newIdentity, say, showKeys, textBlock, typing, withModifier } from "/shared.js";

const CHOICES = [
  ["A", "A is better", "A"],
  ["tie", "Tie", "T"],
  ["both_bad", "Both are bad", "X"],
  ["B", "B is better", "B"],
  [null, "No judgement", "0"],
];

// --- what is known ----------------------------------------------------------------------------------------------------------

const page = {
  session: null,
  // Of each turn: said; answers [{id, text, finish_reason}], by letter; item, its number; choice, null where none was made;
  // picked, the letter that the conversation goes on with, null until then; names, whose answers they were, by letter.
  talk: { conversation: newIdentity(), turns: [] },
  stop: null, // ends the answers that are coming
  judging: false, // a judgement was sent and is not confirmed
  singleKeys: true,
};

const last = () => page.talk.turns.at(-1);
const isChoosing = () => last() !== undefined && last().picked === null && page.stop === null;

function keep() {
  try {
    sessionStorage.setItem("talk", JSON.stringify({ talk: page.talk, message: $("message").value }));
  } catch {
    // The browser keeps nothing for this page: the conversation lives on the page alone.
  }
}

function remember() {
  try {
    const kept = JSON.parse(sessionStorage.getItem("talk"));
    if (kept === null) return;
    page.talk = kept.talk;
    $("message").value = kept.message;
  } catch {
    // What was kept cannot be read: the page begins anew.
  }
}

/** The conversation as the models read it. */
function messages() {
  return page.talk.turns.flatMap(({ said, answers, picked }) => [
    { role: "user", content: said },
    ...(picked === null ? [] : [{ role: "assistant", content: answers.find(({ id }) => id === picked).text }]),
  ]);
}

// --- what is shown ----------------------------------------------------------------------------------------------------------

function show() {
  const { turns } = page.talk;
  $("empty").hidden = turns.length > 0;
  const before = page.session.system.map((text) => make("li", {}, message("System", text, "system")));
  $("talk").replaceChildren(...before, ...turns.map((turn, at) => shownTurn(turn, at === turns.length - 1)));
  $("send").hidden = page.stop !== null;
  $("stop").hidden = page.stop === null;
  $("send").disabled = isChoosing();
  document.body.dataset.view = page.stop !== null ? "answering" : isChoosing() ? "choosing" : "ready";
  fit($("message"));
}

function message(who, text, role) {
  const found = make("div", { class: "message said" }, make("h3", {}, who), textBlock(text));
  found.dataset.role = role;
  return found;
}

function shownTurn(turn, isLast) {
  const said = message("You", turn.said, "user");
  if (turn.picked === null) {
    const cards = make("div", { class: "two" }, ...["A", "B"].map((letter) => card(turn, letter)));
    return make("li", {}, said, cards, ...(isChoosing() ? [choices()] : []));
  }
  const other = turn.picked === "A" ? "B" : "A";
  const more = make("details", { class: "other" }, make("summary", {}, "The other answer"), card(turn, other));
  const foot = make("div", { class: "turn-foot" }, make("p", { class: "hint" }, told(turn)));
  if (isLast && turn.choice !== null) foot.append(make("button", { type: "button", class: "quiet", id: "undo", onclick: undo }, "Undo ", key("U")));
  return make("li", {}, said, card(turn, turn.picked, turn.choice !== null), foot, more);
}

const told = ({ choice, picked }) =>
  ({ A: "You found A better.", B: "You found B better.", tie: `A tie; it goes on with ${picked}.`, both_bad: `Both bad; it goes on with ${picked}.` })[choice] ??
  `Not judged; it goes on with ${picked}.`;

function card(turn, letter, chosen = false) {
  const answer = turn.answers.find(({ id }) => id === letter);
  const found = make(
    "div",
    { class: "card lettered", role: "group", "aria-label": `Answer ${letter}` },
    make("span", { class: "letter", "aria-hidden": "true" }, letter),
    textBlock(answer.text),
  );
  const name = turn.names?.[letter];
  const cut = answer.finish_reason === "length" ? "cut off: as long as it may be" : "";
  const line = [name, cut].filter(Boolean).join(" · ");
  if (line) found.append(make("p", { class: "hint", dir: "auto" }, line));
  found.classList.toggle("chosen", chosen && (turn.choice === letter || turn.choice === "tie"));
  found.dataset.letter = letter;
  return found;
}

function choices() {
  const buttons = CHOICES.map(([choice, label, pressed]) =>
    make("button", { type: "button", class: choice === null ? "choice quiet" : "choice", onclick: () => judge(choice) }, make("span", {}, label), " ", key(pressed)),
  );
  return make("div", { class: "choices", id: "choices", role: "group", "aria-label": "Which is better?", tabindex: "-1" }, ...buttons);
}

function showTally(tally) {
  const parts = [`${tally.judged.toLocaleString("en")} judged`];
  for (const [name, count] of Object.entries(tally.better ?? {})) parts.push(`${name} ${count.toLocaleString("en")}`);
  if (tally.ties) parts.push(`neither ${tally.ties.toLocaleString("en")}`);
  $("counts").replaceChildren(...parts.map((part) => make("span", { dir: "auto" }, part)));
}

/** Runs `change`; who was at the end of the page stays there. */
function following(change) {
  const root = document.documentElement;
  const atEnd = root.scrollHeight - root.scrollTop - root.clientHeight < 80;
  change();
  if (atEnd) root.scrollTop = root.scrollHeight;
}

// --- what a person does -------------------------------------------------------------------------------------------------------

/** Reads an answer's lines as they come. */
async function read(path, body, signal, take) {
  let response;
  try {
    response = await fetch(path, { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(body), signal });
  } catch {
    throw new Silence("The server does not answer");
  }
  if (!response.ok) throw new Refusal(response.status, String((await response.json().catch(() => ({}))).error ?? "the server could not answer"));
  const lines = response.body.pipeThrough(new TextDecoderStream()).getReader();
  for (let rest = ""; ; ) {
    let part;
    try {
      part = await lines.read();
    } catch {
      throw new Silence("The answers broke off");
    }
    if (part.done) return;
    const whole = (rest + part.value).split("\n");
    rest = whole.pop();
    for (const line of whole) take(JSON.parse(line));
  }
}

async function send() {
  const said = $("message").value;
  if (page.stop !== null) return;
  if (isChoosing()) {
    say("Say first which answer is better, or press 0 for no judgement.", "warn");
    return;
  }
  if (!said.trim()) {
    say("Type a message first.", "warn");
    return;
  }
  const turn = { said, answers: [{ id: "A", text: "" }, { id: "B", text: "" }], item: null, choice: null, picked: null, names: {} };
  page.talk.turns.push(turn);
  const body = { messages: messages(), conversation: page.talk.conversation };
  page.stop = new AbortController();
  $("message").value = "";
  following(show);
  say("The models answer.");
  try {
    await read("/api/say", body, page.stop.signal, (line) => {
      if (line.error !== undefined) throw new Refusal(422, line.error);
      following(() => take(turn, line));
    });
    if (turn.item === null) throw new Silence("The answers broke off");
    page.stop = null;
    keep();
    following(show);
    say("Which is better?");
    clock.start(0);
    if (!typing(document.activeElement) || $("message").value === "") $("choices").focus({ preventScroll: true });
  } catch (error) {
    const stopped = page.stop?.signal.aborted;
    page.stop = null;
    page.talk.turns.pop();
    $("message").value = said + ($("message").value && `\n${$("message").value}`);
    keep();
    show();
    if (stopped) say("Stopped; your message is back.");
    else if (error instanceof Refusal || error instanceof Silence) say(`${capital(error.message)}. Your message is back.`, "error");
    else throw error;
    $("message").focus();
  }
}

/** One line of the answers: more of a text, its end, or what was kept of both. */
function take(turn, line) {
  if (line.item !== undefined) {
    Object.assign(turn, { item: line.item, answers: line.answers });
    showTally(line.tally);
    return;
  }
  const answer = turn.answers.find(({ id }) => id === line.id);
  if (line.finish_reason !== undefined) answer.finish_reason = line.finish_reason;
  if (line.text === undefined) return;
  answer.text += line.text;
  $("talk").lastElementChild.querySelector(`[data-letter="${answer.id}"] .text`).append(line.text);
}

async function judge(choice) {
  const turn = last();
  if (!isChoosing() || page.judging) return;
  if (choice !== null) {
    page.judging = true;
    turn.submission ??= newIdentity();
    try {
      const body = { item: turn.item, submission: turn.submission, answer: { choice }, seconds: clock.seconds() };
      const found = await keepSending("/api/judge", body);
      turn.names = found.names;
      showTally(found.tally);
    } catch (error) {
      if (!(error instanceof Refusal)) throw error;
      say(`${capital(error.message)}.`, "error");
      return;
    } finally {
      page.judging = false;
    }
  }
  Object.assign(turn, { choice, picked: choice === "B" ? "B" : "A", submission: undefined });
  keep();
  following(show);
  say(choice === null ? "Not judged." : "Stored.");
  $("message").focus({ preventScroll: true });
}

async function undo() {
  const turn = last();
  if (page.judging || page.stop !== null || turn === undefined || turn.choice === null) return;
  page.judging = true;
  try {
    const found = await keepSending("/api/undo", { item: turn.item, submission: newIdentity() });
    showTally(found.tally);
  } catch (error) {
    if (!(error instanceof Refusal)) throw error;
    say(`${capital(error.message)}.`, "error");
    return;
  } finally {
    page.judging = false;
  }
  Object.assign(turn, { choice: null, picked: null, names: {} });
  keep();
  show();
  say("Taken back. Which is better?");
  $("choices").focus({ preventScroll: true });
}

function anew() {
  if (page.stop !== null || page.judging) return;
  page.talk = { conversation: newIdentity(), turns: [] };
  keep();
  show();
  say("A new conversation.");
  $("message").focus();
}

function openHelp() {
  showKeys([
    [["Enter"], "send the message; Shift Enter: a new line"],
    [["Esc"], "stop the answers, or leave the message"],
    [["A", "B"], "that answer is better (also ← and →)"],
    [["T"], "tie: both are as good"],
    [["X"], "both are bad"],
    [["0"], "no judgement"],
    [["U"], "undo the judgement"],
    [["M"], "write a message"],
    [["N"], "a new conversation"],
    [["?"], "these keys"],
  ]);
  $("help").showModal();
}

// --- keys -----------------------------------------------------------------------------------------------------------------

const SINGLE = { U: undo, N: anew, M: () => $("message").focus(), "?": openHelp };

document.addEventListener("keydown", (event) => {
  if (event.defaultPrevented || event.isComposing || withModifier(event) || document.querySelector("dialog[open]")) return;
  if (event.key === "Escape") {
    if (page.stop !== null) page.stop.abort();
    else if (typing(event.target)) (isChoosing() ? $("choices") : $("main")).focus({ preventScroll: true });
    return;
  }
  if (typing(event.target)) {
    if (event.key !== "Enter" || event.shiftKey) return;
    event.preventDefault();
    if (!event.repeat) send();
    return;
  }
  const arrow = { ArrowLeft: "A", ArrowRight: "B" }[event.key];
  const pressed = page.singleKeys ? event.key.toUpperCase() : "";
  const choice = CHOICES.find(([value, , own]) => own === pressed || (arrow !== undefined && value === arrow));
  const action = isChoosing() && choice !== undefined ? () => judge(choice[0]) : SINGLE[pressed];
  if (action === undefined || event.repeat) return;
  event.preventDefault();
  action();
});

$("composer").addEventListener("submit", (event) => {
  event.preventDefault();
  send();
});
$("message").addEventListener("input", () => {
  fit($("message"));
  keep();
});
$("stop").addEventListener("click", () => page.stop?.abort());
$("anew").addEventListener("click", anew);
$("help-open").addEventListener("click", openHelp);
$("help-close").addEventListener("click", () => $("help").close());
$("help-single").addEventListener("change", () => {
  page.singleKeys = $("help-single").checked;
  document.body.classList.toggle("no-single-keys", !page.singleKeys);
});

// --- the beginning ----------------------------------------------------------------------------------------------------------

async function start() {
  remember();
  for (let pause = 500; ; pause = Math.min(2 * pause, 4000)) {
    try {
      page.session = await ask("/api/session");
      break;
    } catch (error) {
      say(`${capital(error.message)}.`, "error");
      await new Promise((resolve) => setTimeout(resolve, pause));
    }
  }
  say("");
  const { title, models, blind, tally, labeller } = page.session;
  if (title) $("title").textContent = document.title = title;
  const whose = models.length === 1 ? `Two draws of ${models[0]}.` : blind ? "Whose answer is which is not told." : `Answers of ${models[0]} and ${models[1]}; whose is which is told when you have judged.`;
  $("who").textContent = `${whose} Judgements are kept as those of ${labeller}.`;
  showTally(tally);
  show();
  if (isChoosing()) {
    say("Which is better?");
    clock.start(0);
    $("choices").focus({ preventScroll: true });
  } else $("message").focus();
}

start();
