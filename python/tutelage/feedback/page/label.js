// The labelling page: shows items, takes what a person says about them, and sends it until the server has confirmed it.
//
// Rules. What was sent and not confirmed is sent again, the same, under the same identity, until it is known what became of it;
// meanwhile nothing of it can be changed. What was typed and not sent is kept in the tab's own storage, so a reload loses
// nothing.

import { $, Refusal, ask, capital, clock, fit, keepSending, key, make, newIdentity, say, showKeys, textBlock, typing, withModifier } from "/shared.js";

const listed = (names) => (names.length < 2 ? names.join("") : `${names.slice(0, -1).join(", ")} and ${names.at(-1)}`);
const plural = (count, one, many) => `${count.toLocaleString("en")} ${count === 1 ? one : many}`;

// --- what is shared ---------------------------------------------------------------------------------------------

const page = {
  session: null,
  labeller: "",
  item: null,
  task: null,
  submission: "",
  busy: false, // something was sent and is not confirmed
  conflict: null, // what to go on with after the server has refused an item that was dealt with elsewhere
  singleKeys: true,
};

// --- the wire -------------------------------------------------------------------------------------------------------

/** Sends a change until its fate is known, the page at rest meanwhile. */
async function send(path, body) {
  page.busy = true;
  const focused = document.activeElement;
  $("item").inert = true;
  $("actions").inert = true;
  document.body.dataset.busy = "";
  try {
    return await keepSending(path, body);
  } finally {
    page.busy = false;
    $("item").inert = false;
    $("actions").inert = false;
    delete document.body.dataset.busy;
    if (document.activeElement === document.body && focused?.isConnected) focused.focus({ preventScroll: true });
  }
}

// --- drafts: what was typed and not sent, in the tab's own storage --------------------------------------------------

/** Tells items of different sessions apart that have the same number. */
function fingerprint(item) {
  let hash = 2166136261;
  for (const character of JSON.stringify([item.id, item.prompt, item.answers])) {
    hash = Math.imul(hash ^ character.codePointAt(0), 16777619);
  }
  return hash >>> 0;
}

const draftName = (item) => `draft ${JSON.stringify([page.labeller, item.id, fingerprint(item)])}`;

function readDraft(item) {
  try {
    return JSON.parse(sessionStorage.getItem(draftName(item)));
  } catch {
    return null;
  }
}

let draftTimer = 0;

/** Keeps what is on the page; at once, or when the person pauses. */
function keepDraft(now = false) {
  clearTimeout(draftTimer);
  if (page.item === null) return;
  if (!now) {
    draftTimer = setTimeout(keepDraft, 200, true);
    return;
  }
  const draft = {
    submission: page.submission,
    answer: page.task.draft(),
    comment: $("comment").value,
    seconds: clock.seconds(),
  };
  try {
    sessionStorage.setItem(draftName(page.item), JSON.stringify(draft));
  } catch {
    // The browser keeps nothing for this page: what is typed lives on the page alone.
  }
}

function dropDraft() {
  clearTimeout(draftTimer);
  sessionStorage.removeItem(draftName(page.item));
}

addEventListener("pagehide", () => keepDraft(true));
document.addEventListener("visibilitychange", () => document.hidden && keepDraft(true));

// --- motion -------------------------------------------------------------------------------------------------------------

const still = matchMedia("(prefers-reduced-motion: reduce)");

/** Runs `change`, and lets the elements glide from where they were to where they are. */
function gliding(elements, change) {
  const before = new Map(elements.map((element) => [element, element.getBoundingClientRect()]));
  change();
  if (still.matches) return;
  for (const [element, from] of before) {
    const to = element.getBoundingClientRect();
    const [x, y] = [from.left - to.left, from.top - to.top];
    if (x || y) {
      const moved = [{ transform: `translate(${x}px, ${y}px)` }, { transform: "none" }];
      element.animate(moved, { duration: 160, easing: "cubic-bezier(.2, .7, .3, 1)" });
    }
  }
}

// --- the tasks ------------------------------------------------------------------------------------------------------------
//
// Each has: ask(item), the question; how(item), a line on how to answer; show(item, draft) builds #work; draft(), what is said so
// far, as answer() has it; answer(), what to send, or throws Unfinished; key(event), true if the key was meant for it; keys.

/** There is something left to say: what, and where to say it. */
class Unfinished extends Error {
  constructor(message, where = null) {
    super(message);
    this.where = where;
  }
}

const DIGIT = /^[0-9]$/;

// --- rank

class Rank {
  keys = [
    [["A", "B", "…"], "give that answer the next place; if it has one, go to it"],
    [["="], "tie the answer with the place above; again: a place of its own"],
    [["↑", "↓"], "go to the answer above or below"],
    [["Shift ↑", "Shift ↓"], "move the answer up or down"],
    [["1", "2", "…"], "move the answer to that place"],
    [["Backspace"], "take its place away"],
  ];

  ask() {
    return "Put the answers in order, best first";
  }

  how(item) {
    const [first, second] = item.answers.map((answer) => answer.id);
    return ["Type the letters, best first, as ", key(second), " ", key(first), " …, or drag. ", key("="), " ties an answer with the one above."];
  }

  show(item, draft) {
    this.letters = item.answers.map((answer) => answer.id);
    this.groups = (draft?.ranking ?? []).map((group) => group.filter((letter) => this.letters.includes(letter)));
    this.groups = this.groups.filter((group) => group.length);
    this.selected = this.letters[0];
    this.cards = new Map(item.answers.map((answer) => [answer.id, this.card(answer)]));
    this.places = make("ol", { class: "places", "aria-label": "Ranking, best first" });
    this.pile = make("ul", { class: "pile", "aria-labelledby": "pile-title" });
    this.empty = make("p", { class: "empty" }, "Best first: type a letter, or drag an answer here");
    this.pileTitle = make("h3", { id: "pile-title" }, "Not placed yet");
    $("work").replaceChildren(make("div", { class: "rank" }, this.empty, this.places, this.pileTitle, this.pile));
    this.draw();
  }

  card(answer) {
    const { id: letter } = answer;
    const tool = (text, label, action) =>
      make("button", { type: "button", class: "tool", "aria-label": `${label} ${letter}`, title: label, onclick: action }, text);
    const card = make(
      "div",
      { class: "card lettered", role: "group", onfocusin: () => this.select(letter), onpointerdown: (event) => this.grab(event, letter) },
      make("div", { class: "handle" }, make("button", { type: "button", class: "letter", onclick: () => this.type(letter) }, letter)),
      textBlock(answer.text),
      make(
        "div",
        { class: "card-tools" },
        tool("↑", "Move up", () => this.move(letter, -1)),
        tool("↓", "Move down", () => this.move(letter, 1)),
        tool("=", "Tie with the place above", () => this.tie(letter)),
      ),
    );
    card.dataset.letter = letter;
    return card;
  }

  // Places

  at(letter) {
    return this.groups.findIndex((group) => group.includes(letter));
  }

  without(letter) {
    return this.groups.map((group) => group.filter((other) => other !== letter));
  }

  /** Puts an answer on a place of its own before the group `at`, or (tied) into it; -1: takes it out. */
  put(letter, at, tied = false) {
    const groups = this.without(letter);
    if (tied) groups[at].push(letter);
    else if (at >= 0) groups.splice(at, 0, [letter]);
    this.groups = groups.filter((group) => group.length).map((group) => group.sort());
    this.draw();
    this.focus(letter);
    say(this.where(letter));
    keepDraft();
  }

  type(letter) {
    if (this.dropping) return;
    if (this.at(letter) < 0) this.put(letter, this.groups.length);
    else this.focus(letter);
  }

  move(letter, by) {
    const at = this.at(letter);
    if (at < 0) return by < 0 ? this.put(letter, this.groups.length) : say(`${letter} has no place yet`);
    if (this.groups[at].length > 1) return this.put(letter, by < 0 ? at : at + 1);
    if (by < 0 ? at === 0 : at === this.groups.length - 1) return say(`${letter} is ${by < 0 ? "first" : "last"} already`);
    return this.put(letter, by < 0 ? at - 1 : at + 2);
  }

  tie(letter) {
    const at = this.at(letter);
    if (at >= 0 && this.groups[at].length > 1) return this.put(letter, at + 1);
    const above = at < 0 ? this.groups.length - 1 : at - 1;
    return above < 0 ? say("There is no place above to tie with") : this.put(letter, above, true);
  }

  where(letter) {
    const at = this.at(letter);
    if (at < 0) return `${letter}: no place`;
    const others = this.groups[at].filter((other) => other !== letter);
    return `${letter}: place ${at + 1}${others.length ? `, tied with ${listed(others)}` : ""}`;
  }

  // Drawing

  draw() {
    const cards = [...this.cards.values()];
    gliding(cards, () => {
      this.places.replaceChildren(
        ...this.groups.map((group, at) =>
          make(
            "li",
            { class: group.length > 1 ? "group tied" : "group" },
            make("span", { class: "number", "aria-hidden": "true" }, String(at + 1)),
            make("div", { class: "cards" }, ...group.map((letter) => this.cards.get(letter))),
          ),
        ),
      );
      const left = this.letters.filter((letter) => this.at(letter) < 0);
      this.pile.replaceChildren(...left.map((letter) => make("li", {}, this.cards.get(letter))));
      this.empty.hidden = this.groups.length > 0;
      this.places.hidden = this.groups.length === 0;
      this.pile.hidden = this.pileTitle.hidden = left.length === 0;
      for (const [letter, card] of this.cards) {
        const at = this.at(letter);
        card.classList.toggle("placed", at >= 0);
        card.setAttribute("aria-label", `Answer ${this.where(letter)}`);
        card.querySelector(".letter").setAttribute("aria-label", at < 0 ? `Give ${letter} the next place` : `Answer ${letter}`);
      }
    });
    this.select(this.selected);
  }

  /** One card at a time is a stop of the Tab key. */
  select(letter) {
    this.selected = letter;
    for (const [other, card] of this.cards) {
      card.tabIndex = other === letter ? 0 : -1;
      for (const button of card.querySelectorAll("button")) button.tabIndex = other === letter ? 0 : -1;
    }
  }

  focus(letter) {
    const card = this.cards.get(letter);
    card.focus({ preventScroll: true });
    card.scrollIntoView({ block: "nearest" });
  }

  // Dragging

  grab(event, letter) {
    // By mouse any place of the card but its text, which can be selected; by touch the letter, so that the rest scrolls.
    const handle = event.pointerType === "mouse" ? !event.target.closest(".tool, .text") : event.target.closest(".handle");
    if (event.button !== 0 || !handle) return;
    const card = this.cards.get(letter);
    const start = { x: event.clientX, y: event.clientY };
    let drag = null;
    const begin = () => {
      const inside = start.y - card.getBoundingClientRect().top;
      $("work").classList.add("sorting"); // long answers become short, so that places lie close together
      card.classList.add("dragged");
      const home = card.getBoundingClientRect();
      drag = { x: home.left + scrollX, y: home.top + scrollY, inside: Math.min(inside, home.height), left: start.x - home.left };
      card.setPointerCapture(event.pointerId);
    };
    const move = (now) => {
      if (drag === null && Math.hypot(now.clientX - start.x, now.clientY - start.y) < 5) return;
      if (drag === null) begin();
      const x = now.clientX - drag.left + scrollX - drag.x;
      const y = now.clientY - drag.inside + scrollY - drag.y;
      card.style.transform = `translate(${x}px, ${y}px)`;
      this.mark(this.target(now.clientX, now.clientY, letter));
      if (now.clientY < 70) scrollBy(0, -12);
      else if (now.clientY > innerHeight - 90) scrollBy(0, 12);
    };
    const end = (how) => {
      card.removeEventListener("pointermove", move);
      card.removeEventListener("pointerup", drop);
      card.removeEventListener("pointercancel", cancel);
      removeEventListener("keydown", escape, true);
      if (drag === null) return;
      this.mark(null);
      const target = how.type === "pointerup" ? this.target(how.clientX, how.clientY, letter) : null;
      card.classList.remove("dragged");
      $("work").classList.remove("sorting");
      card.style.transform = "";
      this.dropping = true; // the click that may follow on the letter means nothing
      setTimeout(() => (this.dropping = false), 0);
      if (target !== null) this.put(letter, target.at, target.tied);
    };
    const drop = (how) => end(how);
    const cancel = (how) => end(how);
    const escape = (pressed) => {
      if (pressed.key !== "Escape") return;
      pressed.stopPropagation();
      end(pressed);
    };
    card.addEventListener("pointermove", move);
    card.addEventListener("pointerup", drop);
    card.addEventListener("pointercancel", cancel);
    addEventListener("keydown", escape, true);
  }

  /** Where an answer would go that is let fall here: {at, tied} as `put` has them, and the element to mark. */
  target(x, y, letter) {
    if (this.groups.length === 0) return { at: 0, tied: false, element: this.empty, mark: "here" };
    if (!this.pile.hidden && y > this.pileTitle.getBoundingClientRect().top + 8) {
      return { at: -1, tied: false, element: this.pile, mark: "here" };
    }
    const rows = [...this.places.children];
    for (const [at, row] of rows.entries()) {
      const box = row.getBoundingClientRect();
      const edge = Math.min(box.height / 3, 28);
      if (y < box.top + edge) return { at, tied: false, element: row, mark: "before" };
      if (y < box.bottom - edge) {
        const alone = this.groups[at].length === 1 && this.groups[at][0] === letter;
        return alone ? { at, tied: false, element: row, mark: "" } : { at, tied: true, element: row, mark: "tie" };
      }
    }
    return { at: rows.length, tied: false, element: rows.at(-1), mark: "after" };
  }

  mark(target) {
    for (const marked of $("work").querySelectorAll("[data-drop]")) delete marked.dataset.drop;
    if (target?.mark) target.element.dataset.drop = target.mark;
  }

  // Keys

  key(event) {
    const pressed = event.key;
    const letter = this.selected;
    if (pressed === "ArrowUp" || pressed === "ArrowDown") {
      const by = pressed === "ArrowUp" ? -1 : 1;
      if (event.shiftKey) this.move(letter, by);
      else this.go(by);
      return true;
    }
    if (pressed === "Backspace" || pressed === "Delete") {
      if (this.at(letter) >= 0) this.put(letter, -1);
      return true;
    }
    if (!page.singleKeys) return false;
    if (this.letters.includes(pressed.toUpperCase())) this.type(pressed.toUpperCase());
    else if (pressed === "=") this.tie(letter);
    else if (DIGIT.test(pressed) && pressed !== "0") {
      const groups = this.without(letter).filter((group) => group.length);
      this.groups = groups;
      this.put(letter, Math.min(Number(pressed) - 1, groups.length));
    } else return false;
    return true;
  }

  go(by) {
    const shown = [...$("work").querySelectorAll(".card")].map((card) => card.dataset.letter);
    const inside = this.cards.get(this.selected).contains(document.activeElement);
    const next = inside ? shown.indexOf(this.selected) + by : by > 0 ? 0 : shown.length - 1;
    this.focus(shown[Math.max(0, Math.min(next, shown.length - 1))]);
  }

  // What was said

  draft() {
    return { ranking: this.groups };
  }

  answer() {
    const left = this.letters.filter((letter) => this.at(letter) < 0);
    if (left.length) {
      const where = this.cards.get(left[0]);
      throw new Unfinished(`${listed(left)} ${left.length > 1 ? "have" : "has"} no place yet`, where);
    }
    return this.draft();
  }
}

// --- compare

class Compare {
  keys = [
    [["A", "B"], "that answer is better (also ← and →)"],
    [["T"], "tie: both are as good"],
    [["X"], "both are bad"],
  ];

  choices = [
    ["A", "A is better", "A"],
    ["tie", "Tie", "T"],
    ["both_bad", "Both are bad", "X"],
    ["B", "B is better", "B"],
  ];

  ask() {
    return "Which answer is better?";
  }

  how() {
    return [key("A"), " or ", key("B"), ", ", key("T"), " for a tie, ", key("X"), " if both are bad; ", key("Enter"), " submits."];
  }

  show(item, draft) {
    this.radios = new Map();
    this.cards = new Map();
    const cards = item.answers.map((answer) => {
      const card = make(
        "div",
        { class: "card lettered", role: "group", "aria-label": `Answer ${answer.id}` },
        make("span", { class: "letter", "aria-hidden": "true" }, answer.id),
        textBlock(answer.text),
      );
      this.cards.set(answer.id, card);
      return card;
    });
    const choices = this.choices.map(([value, label, pressed]) => {
      const radio = make("input", { type: "radio", name: "choice", value, onchange: () => this.choose(value) });
      this.radios.set(value, radio);
      return make("label", { class: "choice" }, radio, make("span", {}, label), " ", key(pressed));
    });
    $("work").replaceChildren(
      make("div", { class: "two" }, ...cards),
      make("div", { class: "choices", role: "radiogroup", "aria-label": "Which is better" }, ...choices),
    );
    if (draft?.choice) this.choose(draft.choice, false);
  }

  choose(value, aloud = true) {
    this.radios.get(value).checked = true;
    for (const [letter, card] of this.cards) card.classList.toggle("chosen", letter === value || value === "tie");
    if (!aloud) return;
    this.radios.get(value).focus({ preventScroll: true });
    say(this.choices.find(([name]) => name === value)[1]);
    keepDraft();
  }

  key(event) {
    const own = event.target.type === "radio";
    if (!own && event.key === "ArrowLeft") this.choose("A");
    else if (!own && event.key === "ArrowRight") this.choose("B");
    else {
      if (!page.singleKeys) return false;
      const found = this.choices.find(([, , pressed]) => pressed === event.key.toUpperCase());
      if (found === undefined) return false;
      this.choose(found[0]);
    }
    return true;
  }

  draft() {
    return { choice: [...this.radios.values()].find((radio) => radio.checked)?.value ?? null };
  }

  answer() {
    const draft = this.draft();
    if (draft.choice === null) throw new Unfinished("Choose first: A, B, tie, or both bad", this.radios.get("A"));
    return draft;
  }
}

// --- rate

const FLAG_KEYS = "QWRTYOPJKZX"; // letters that are neither an answer's (A to I) nor a key of the page

class Rate {
  keys = [
    [["1", "…", "7"], "score of the answer: 1 is poor, 7 excellent"],
    [["A", "B", "…"], "go to that answer (also ↑ and ↓)"],
    [[...FLAG_KEYS.slice(0, 3), "…"], "set or clear a flag, as they stand beside it"],
    [["Enter"], "go to the next answer without a score; submit when all have one"],
  ];

  ask(item) {
    return item.answers.length > 1 ? "How good is each answer?" : "How good is this answer?";
  }

  how() {
    return [key("1"), " poor to ", key("7"), " excellent, then flags; ", key("Enter"), " goes on to the next answer, and submits at the end."];
  }

  show(item, draft) {
    this.letters = item.answers.map((answer) => answer.id);
    this.cards = new Map(item.answers.map((answer) => [answer.id, this.card(answer)]));
    $("work").replaceChildren(make("div", { class: "rate" }, ...this.cards.values()));
    for (const letter of this.letters) {
      const rating = draft?.ratings?.[letter];
      for (const input of this.cards.get(letter).querySelectorAll("input")) {
        input.checked = input.type === "radio" ? Number(input.value) === rating?.score : Boolean(rating?.flags.includes(input.value));
      }
    }
    this.select(this.letters.find((letter) => this.rating(letter).score === null) ?? this.letters[0]);
  }

  card(answer) {
    const { id: letter } = answer;
    const scores = [1, 2, 3, 4, 5, 6, 7].map((score) =>
      make(
        "label",
        { class: "score" },
        make("input", { type: "radio", name: `score-${letter}`, value: String(score), onchange: () => this.changed(letter) }),
        make("span", {}, String(score)),
      ),
    );
    const flags = page.session.flags.map((flag, at) =>
      make(
        "label",
        { class: "flag" },
        make("input", { type: "checkbox", value: flag.id, onchange: () => this.changed(letter) }),
        make("span", {}, flag.label),
        " ",
        key(FLAG_KEYS[at] ?? ""),
      ),
    );
    const card = make(
      "div",
      { class: "card lettered", role: "group", "aria-label": `Answer ${letter}`, onfocusin: () => this.select(letter) },
      make("span", { class: "letter", "aria-hidden": "true" }, letter),
      textBlock(answer.text),
      make(
        "div",
        { class: "scale" },
        make("span", { class: "end", "aria-hidden": "true" }, "poor"),
        make("div", { class: "scores", role: "radiogroup", "aria-label": `Score of ${letter}, 1 poor to 7 excellent` }, ...scores),
        make("span", { class: "end", "aria-hidden": "true" }, "excellent"),
      ),
      make("div", { class: "flags", role: "group", "aria-label": `Flags of ${letter}` }, ...flags),
    );
    card.addEventListener("pointerdown", () => this.select(letter));
    return card;
  }

  changed(letter) {
    const { score, flags } = this.rating(letter);
    say(`${letter}: ${score === null ? "no score" : `score ${score}`}${flags.length ? `, ${plural(flags.length, "flag", "flags")}` : ""}`);
    keepDraft();
  }

  select(letter) {
    this.selected = letter;
    for (const [other, card] of this.cards) card.classList.toggle("active", other === letter);
  }

  rating(letter) {
    const checked = [...this.cards.get(letter).querySelectorAll("input:checked")];
    const score = checked.find((input) => input.type === "radio");
    const flags = checked.filter((input) => input.type === "checkbox").map((input) => input.value);
    return { score: score === undefined ? null : Number(score.value), flags };
  }

  /** Goes to an answer: to its score. */
  focus(letter) {
    this.select(letter);
    const card = this.cards.get(letter);
    const radio = card.querySelector("input[type=radio]:checked") ?? card.querySelector("input[type=radio]");
    radio.focus({ preventScroll: true });
    card.scrollIntoView({ block: "nearest" });
  }

  key(event) {
    const pressed = event.key.toUpperCase();
    if (event.key === "ArrowUp" || event.key === "ArrowDown") {
      const inside = this.cards.get(this.selected).contains(document.activeElement);
      const next = this.letters.indexOf(this.selected) + (inside ? (event.key === "ArrowUp" ? -1 : 1) : 0);
      this.focus(this.letters[Math.max(0, Math.min(next, this.letters.length - 1))]);
      return true;
    }
    if (!page.singleKeys) return false;
    const card = this.cards.get(this.selected);
    const at = pressed.length === 1 ? FLAG_KEYS.indexOf(pressed) : -1;
    if (this.letters.includes(pressed)) this.focus(pressed);
    else if (DIGIT.test(pressed) && pressed >= "1" && pressed <= "7") {
      const radio = card.querySelector(`input[type=radio][value="${pressed}"]`);
      radio.checked = true;
      radio.focus({ preventScroll: true });
      this.changed(this.selected);
    } else if (at >= 0 && at < page.session.flags.length) {
      const flag = card.querySelectorAll("input[type=checkbox]")[at];
      flag.checked = !flag.checked;
      this.changed(this.selected);
    } else return false;
    return true;
  }

  draft() {
    return { ratings: Object.fromEntries(this.letters.map((letter) => [letter, this.rating(letter)])) };
  }

  answer() {
    const left = this.letters.filter((letter) => this.rating(letter).score === null);
    if (left.length) {
      this.focus(left[0]);
      throw new Unfinished(`${listed(left)} ${left.length > 1 ? "have" : "has"} no score yet`);
    }
    return this.draft();
  }
}

// --- write

class Write {
  keys = [
    [["Ctrl Enter"], "submit, also while you write"],
    [["Esc"], "leave the text; single keys work then"],
    [["E"], "back into the text"],
  ];
  submitKey = "Ctrl Enter";

  ask(item) {
    return item.answers.length ? "Correct this answer" : "Write the answer";
  }

  how() {
    return ["As you would want it to be. ", key("Ctrl Enter"), " submits, ", key("Esc"), " leaves the text."];
  }

  show(item, draft) {
    const given = item.answers[0]?.text.trim() ?? "";
    this.text = make("textarea", { id: "written", class: "written", maxlength: "200000", rows: "6", dir: "auto", oninput: () => this.changed() });
    this.text.value = draft?.text ?? given;
    this.count = make("span", { class: "hint", id: "written-count" });
    const put = (text) => {
      this.text.value = text;
      this.changed();
      this.text.focus();
    };
    const tools = given
      ? [
          make("button", { type: "button", class: "quiet", onclick: () => put(given) }, "As it was"),
          make("button", { type: "button", class: "quiet", onclick: () => put("") }, "Empty"),
        ]
      : [];
    $("work").replaceChildren(
      make(
        "div",
        { class: "write card" },
        make("div", { class: "card-head" }, make("label", { for: "written" }, "Your answer"), this.count, make("span", { class: "card-tools" }, ...tools)),
        this.text,
      ),
    );
    this.changed(false);
    this.text.focus({ preventScroll: true });
    this.text.setSelectionRange(this.text.value.length, this.text.value.length);
  }

  changed(keep = true) {
    fit(this.text);
    const words = this.text.value.trim().split(/\s+/).filter(Boolean).length;
    this.count.textContent = plural(words, "word", "words");
    if (keep) keepDraft();
  }

  key(event) {
    if (!page.singleKeys || event.key.toUpperCase() !== "E") return false;
    this.text.focus();
    return true;
  }

  draft() {
    return { text: this.text.value };
  }

  answer() {
    if (!this.text.value.trim()) throw new Unfinished("Write an answer first, or skip the item", this.text);
    return this.draft();
  }
}

/** As high as what is in it. */
const TASKS = { rank: Rank, compare: Compare, rate: Rate, write: Write };

// --- what is shown --------------------------------------------------------------------------------------------------------

const VIEWS = ["start", "item", "waiting", "finished"];

function view(name) {
  for (const other of VIEWS) $(other).hidden = other !== name;
  document.body.dataset.view = name;
  $("actions").hidden = name === "start";
  $("submit").hidden = $("skip-open").hidden = name !== "item";
  $("who").hidden = name === "start";
  showGuidelines();
}

function showProgress(found) {
  const { progress, agreement } = found;
  $("meter").value = progress.total ? progress.done / progress.total : 0;
  const parts = [`${progress.done.toLocaleString("en")} of ${progress.total.toLocaleString("en")} done`];
  if (page.labeller) parts.push(`${progress.done_by_me.toLocaleString("en")} by you`);
  if (progress.ready < progress.total) parts.push(`${progress.ready.toLocaleString("en")} ready`);
  if (agreement.percent !== null) parts.push(`agreement ${percent(agreement.percent)}${agreement.alpha === null ? "" : `, α ${agreement.alpha.toFixed(2)}`}`);
  $("counts").replaceChildren(...parts.map((part) => make("span", {}, part)));
  $("undo").disabled = progress.done_by_me + progress.skipped_by_me === 0;
}

const percent = (value) => `${Math.round(value)} %`;

const ROLES = { user: "User", assistant: "Assistant", system: "System", text: "Prompt", tool: "Tool", developer: "Developer" };

function showPrompt(messages) {
  $("prompt").replaceChildren(
    ...messages.map((message) => {
      const role = Object.hasOwn(ROLES, message.role) ? ROLES[message.role] : message.role;
      const block = make("div", { class: "message" }, make("h3", { dir: "auto" }, role), textBlock(message.content));
      block.dataset.role = Object.hasOwn(ROLES, message.role) ? message.role : "other";
      return block;
    }),
  );
}

/** Shows an item, with what was said of it before: on this page, or (after undo) what the server has. */
function showItem(item) {
  page.item = item;
  page.conflict = null;
  const own = readDraft(item);
  page.submission = own?.submission ?? newIdentity();
  view("item");
  showProgress(item);
  $("item-number").textContent = `Item ${item.number.toLocaleString("en")}`;
  $("item-ask").textContent = page.task.ask(item);
  $("item-how").replaceChildren(...page.task.how(item));
  showPrompt(item.prompt);
  $("told").hidden = !item.note;
  $("told").replaceChildren(make("h3", {}, "For you to know"), textBlock(item.note ?? ""));
  $("comment").value = own?.comment ?? item.comment;
  scrollTo(0, 0);
  $("item-title").focus({ preventScroll: true });
  page.task.show(item, own?.answer ?? item.draft);
  fit($("comment"));
  clock.start(own?.seconds ?? 0);
}

let waitingTimer = 0;

/** Shows what the server has answered: an item, or that there is none now, or none left. */
function show(found) {
  clearTimeout(waitingTimer);
  if (found.item) {
    showItem(found.item);
    return;
  }
  const was = document.body.dataset.view;
  page.item = null;
  showProgress(found);
  const name = found.waiting ? "waiting" : "finished";
  view(name);
  if (was !== name) {
    scrollTo(0, 0);
    $(`${name}-title`).focus({ preventScroll: true });
  }
  if (found.waiting) {
    const { ready, total } = found.progress;
    const what = ready < total ? `${ready.toLocaleString("en")} of ${total.toLocaleString("en")} items are ready.` : "Others are at the items that are left.";
    $("waiting-what").textContent = `${what} The next one is shown here as soon as it can be.`;
    $("waiting-problem").hidden = !found.problem;
    $("waiting-problem").textContent = found.problem ? `No more answers will come: ${found.problem}` : "";
    $("waiting-dots").hidden = Boolean(found.problem);
    waitingTimer = setTimeout(lookAgain, 1000);
  } else {
    const { progress, agreement } = found;
    $("finished-what").textContent = "There is nothing left here for you to judge. Thank you.";
    const figures = [
      ["Judged by you", progress.done_by_me.toLocaleString("en")],
      ["Skipped by you", progress.skipped_by_me.toLocaleString("en")],
      ["Done by all", `${progress.done.toLocaleString("en")} of ${progress.total.toLocaleString("en")}`],
    ];
    if (progress.seconds_median !== null) figures.push(["Your median time", `${progress.seconds_median.toFixed(1)} s`]);
    if (agreement.percent !== null) figures.push(["Agreement", percent(agreement.percent)]);
    if (agreement.alpha !== null) figures.push(["Krippendorff’s α", agreement.alpha.toFixed(2)]);
    $("finished-figures").replaceChildren(...figures.map(([name, value]) => make("div", {}, make("dt", {}, name), make("dd", {}, value))));
  }
}

/** Asks for an item while there was none. Silent about a server that has ended. */
async function lookAgain() {
  if (page.busy || document.body.dataset.view !== "waiting") return;
  if (document.hidden) {
    waitingTimer = setTimeout(lookAgain, 1000);
    return;
  }
  try {
    const found = await ask("/api/next", { labeller: page.labeller });
    if (document.body.dataset.view !== "waiting" || page.busy) return;
    say("");
    show(found);
  } catch (error) {
    say(`${error.message}. This page goes on asking.`, "error");
    waitingTimer = setTimeout(lookAgain, 2000);
  }
}

// --- what a person does -------------------------------------------------------------------------------------------------

/** Tells why something was not done, and stays where it is. */
function refused(error) {
  if (!(error instanceof Refusal)) throw error;
  if (error.next === undefined) {
    say(`${capital(error.message)}.`, "error");
    return;
  }
  page.conflict = error.next;
  say(`${capital(error.message)}.`, "error", ["Go on to the next item", goOn]);
}

/** Leaves an item that was dealt with elsewhere. */
function goOn() {
  const next = page.conflict;
  page.conflict = null;
  dropDraft();
  say("");
  show(next);
}

async function deal(path, fields, done) {
  if (page.busy || page.item === null) return;
  keepDraft(true);
  const { labeller, item, submission } = page;
  const body = { labeller, item: item.id, submission, seconds: clock.seconds(), comment: $("comment").value, ...fields };
  try {
    const found = await send(path, body);
    dropDraft();
    show(found);
    say(done);
  } catch (error) {
    refused(error);
  }
}

async function submit() {
  if (page.busy || page.item === null) return;
  if (page.conflict !== null) {
    goOn();
    return;
  }
  let answer;
  try {
    answer = page.task.answer();
  } catch (error) {
    if (!(error instanceof Unfinished)) throw error;
    say(`${error.message}.`, "warn");
    error.where?.focus();
    return;
  }
  await deal("/api/submit", { answer }, "Stored.");
}

async function skip(reason) {
  $("skip").close();
  await deal("/api/skip", { reason }, "Skipped.");
}

async function undo() {
  if (page.busy || $("undo").disabled) return;
  keepDraft(true);
  try {
    const found = await send("/api/undo", { labeller: page.labeller, submission: newIdentity() });
    show(found);
    say("Taken back: change it, and submit it again.");
  } catch (error) {
    refused(error);
  }
}

async function begin(labeller) {
  try {
    const session = await ask(`/api/session?${new URLSearchParams({ labeller })}`);
    page.session = session;
    page.labeller = labeller;
    $("who-name").textContent = labeller;
    const found = await send("/api/next", { labeller });
    sessionStorage.setItem("labeller", labeller);
    show(found);
  } catch (error) {
    page.labeller = "";
    if ($("start").hidden) welcome();
    say(error instanceof Refusal ? `${capital(error.message)}.` : `${error.message}. Try again.`, "error");
    $("name").focus();
  }
}

/** Asks who is there. */
function welcome() {
  keepDraft(true);
  clearTimeout(waitingTimer);
  page.item = null;
  page.labeller = "";
  sessionStorage.removeItem("labeller");
  view("start");
  showProgress(page.session);
  const { labellers, guidelines } = page.session;
  $("start-before").hidden = labellers.length === 0;
  $("start-names").replaceChildren(
    ...labellers.map((name) => make("li", {}, make("button", { type: "button", dir: "auto", onclick: () => begin(name) }, name))),
  );
  $("start-guidelines").hidden = !guidelines;
  $("start-guidelines").replaceChildren(make("h3", {}, "Guidelines"), ...paragraphs(guidelines));
  $("name").focus({ preventScroll: true });
}

async function switchLabeller() {
  if (page.busy) return;
  keepDraft(true);
  try {
    page.session = await ask("/api/session");
  } catch {
    // The names as they were will do.
  }
  welcome();
  say("");
}

// --- guidelines, help, skip ------------------------------------------------------------------------------------------------

const paragraphs = (text) =>
  text
    .split(/\n\s*\n/)
    .filter((part) => part.trim())
    .map((part) => make("p", { dir: "auto" }, part.trim()));

const wide = matchMedia("(min-width: 76rem)");
let guidelinesOpen = wide.matches;

function showGuidelines() {
  const some = Boolean(page.session?.guidelines) && document.body.dataset.view !== "start";
  $("guidelines-toggle").hidden = !some;
  $("guidelines").hidden = !(some && guidelinesOpen);
  $("guidelines-toggle").setAttribute("aria-expanded", String(some && guidelinesOpen));
  $("stage").classList.toggle("with-guidelines", some && guidelinesOpen);
}

function toggleGuidelines() {
  if ($("guidelines-toggle").hidden) return;
  guidelinesOpen = !guidelinesOpen;
  showGuidelines();
  if (guidelinesOpen) {
    $("guidelines-title").focus({ preventScroll: wide.matches });
  } else {
    $("guidelines-toggle").focus({ preventScroll: true });
  }
}

function openHelp() {
  const common = [
    [[page.task?.submitKey ?? "Enter"], "submit"],
    [["Ctrl Enter"], "submit, also from the comment"],
    [["U"], "undo: take the last one back"],
    [["S"], "skip, then the number of a reason"],
    [["N"], "write a comment; Esc leaves it"],
    ...($("guidelines-toggle").hidden ? [] : [[["L"], "show or hide the guidelines"]]),
    [["?"], "these keys"],
  ];
  const own = page.task?.keys ?? [];
  const all = [...own, ...common.filter(([keys]) => !own.some(([others]) => others[0] === keys[0]))];
  const rows = all.filter(([keys], at) => all.findIndex(([others]) => others[0] === keys[0]) === at);
  showKeys(rows);
  $("help").showModal();
}

function openSkip() {
  if (page.busy || page.item === null) return;
  $("skip-reasons").replaceChildren(
    ...page.session.skip_reasons.map((reason, at) =>
      make("li", {}, make("button", { type: "button", onclick: () => skip(reason.id) }, make("span", {}, reason.label), " ", key(String(at + 1)))),
    ),
  );
  $("skip").showModal();
}

$("skip").addEventListener("keydown", (event) => {
  const reason = DIGIT.test(event.key) && !withModifier(event) ? page.session.skip_reasons[Number(event.key) - 1] : undefined;
  if (reason === undefined) return;
  event.preventDefault();
  skip(reason.id);
});
$("skip-close").addEventListener("click", () => $("skip").close());
$("help-close").addEventListener("click", () => $("help").close());
$("help-single").addEventListener("change", () => {
  page.singleKeys = $("help-single").checked;
  document.body.classList.toggle("no-single-keys", !page.singleKeys);
});
$("help-open").addEventListener("click", openHelp);
$("guidelines-toggle").addEventListener("click", toggleGuidelines);
$("guidelines-close").addEventListener("click", toggleGuidelines);
$("skip-open").addEventListener("click", openSkip);
$("undo").addEventListener("click", undo);
$("submit").addEventListener("click", submit);
$("who").addEventListener("click", switchLabeller);
$("finished-again").addEventListener("click", async () => {
  if (page.busy) return;
  try {
    const found = await ask("/api/next", { labeller: page.labeller });
    show(found);
    say(found.finished ? "There is nothing new." : "");
  } catch (error) {
    say(`${capital(error.message)}.`, "error");
  }
});
$("comment").addEventListener("input", () => {
  fit($("comment"));
  keepDraft();
});
$("start-form").addEventListener("submit", (event) => {
  event.preventDefault();
  const name = $("name").value.trim();
  if (name) begin(name);
  else say("Type a name first.", "warn");
});

// --- keys -----------------------------------------------------------------------------------------------------------------

const SINGLE = { U: undo, S: openSkip, L: toggleGuidelines, N: () => $("comment").focus(), "?": openHelp };

document.addEventListener("keydown", (event) => {
  if (event.defaultPrevented || event.isComposing || document.querySelector("dialog[open]")) return;
  const here = document.body.dataset.view;
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey) && here === "item") {
    event.preventDefault();
    if (!event.repeat) submit();
    return;
  }
  if (withModifier(event)) return;
  if (typing(event.target)) {
    if (event.key === "Escape" && here === "item") $("item-title").focus({ preventScroll: true });
    return;
  }
  if (here === "start" && event.key !== "?") return;
  if (event.key === "Enter") {
    if (event.repeat || here !== "item" || page.task.submitKey || event.target.matches("button, a, summary")) return;
    event.preventDefault();
    submit();
    return;
  }
  if (here === "item" && !page.busy && page.task.key(event)) {
    event.preventDefault();
    return;
  }
  const action = page.singleKeys ? SINGLE[event.key.toUpperCase()] : undefined;
  if (action === undefined || event.repeat) return;
  event.preventDefault();
  action();
});

// --- the beginning ----------------------------------------------------------------------------------------------------------

async function start() {
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
  const { task, title, guidelines } = page.session;
  page.task = new TASKS[task]();
  $("submit-key").textContent = page.task.submitKey ?? "Enter";
  if (title) $("title").textContent = document.title = title;
  $("guidelines-text").replaceChildren(...paragraphs(guidelines));
  const labeller = sessionStorage.getItem("labeller");
  if (labeller) await begin(labeller);
  else welcome();
}

start();
