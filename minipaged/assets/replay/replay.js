/* The page: draws the state of state.js, and lets a person move through the trace.

   Everything on the page is a function of the player's state; `draw` is called after every move and
   touches only what changed. All text goes through textContent: names of requests are the user's. */

const SIGNS = {
  evicted: ["\u00d7", "evicted", "The prefix cache gave it up, because no empty block was left."],
  copy: ["\u00bb", "copy", "Copy-on-write: the copy, for whoever writes."],
  source: ["\u00ab", "copied", "Copy-on-write: what was copied; the other owners keep it."],
  in: ["\u2191", "back", "Comes back from the swap pool."],
  out: ["\u2193", "swap", "Goes to the swap pool, because its request is preempted."],
  found: ["\u2713", "found", "Found by the prefix cache: its tokens need not be computed."],
  merged: ["=", "merged", "Another sequence computed the same, and uses this block now."],
  shared: ["&", "shared", "Forked: one more sequence owns it."],
  new: ["+", "new", "Taken for a sequence."],
  known: ["\u25c6", "cached", "Full and written: the prefix cache can find it from now on."],
  idle: ["\u25c7", "idle", "Nobody holds it any more; the prefix cache keeps it."],
  freed: ["\u2212", "freed", "Nobody holds it any more: it is free."],
};
// The most telling first: a block shows one sign. Some speak of a block that is held, some of one left.
const OF_HELD = ["evicted", "copy", "in", "out", "found", "source", "merged", "shared", "new", "known"];
const OF_LEFT = ["out", "in", "evicted", "idle", "freed"];
// Sentences about no block in particular have a word beside them instead.
const WORDS = { computed: "compute", pinned: "pinned", ended: "ended", pool: "begin" };
const NUM_DYES = 8;
const MOST_ARROWS = 8; // more of them would hide what they point at
const MOST_TABLES = 48; // drawn; a page of more helps nobody
const MOST_ENTRIES = 48; // of one block table

const byId = (id) => document.getElementById(id);

/* An element with attributes and children; a child that is a string becomes text, never markup. */
function element(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value !== null && value !== undefined) made.setAttribute(name, value);
  }
  made.append(...children);
  return made;
}

/* Replace the children, but only if what they show is something else than before. */
function show(parent, key, makeChildren) {
  if (parent.shownKey === key) return;
  parent.shownKey = key;
  parent.replaceChildren(...makeChildren());
}

// ---- colours ----------------------------------------------------------------------------------------

function mixed(number, share) {
  return `color-mix(in srgb, var(--dye-${number % NUM_DYES}) var(--${share}), var(--paper))`;
}

/* One colour, or stripes side by side where several requests share. */
function stripes(numbers, share) {
  const shown = numbers.slice(0, 4);
  const stops = shown.map((number, i) => {
    const [from, to] = [(100 * i) / shown.length, (100 * (i + 1)) / shown.length];
    return `${mixed(number, share)} ${from}% ${to}%`;
  });
  return `linear-gradient(90deg, ${stops.join(", ")})`;
}

function paint(made, numbers, level) {
  made.style.setProperty("--paint", stripes(numbers, "filled"));
  made.style.setProperty("--tint", stripes(numbers, "pale"));
  made.style.setProperty("--edge", `var(--dye-${numbers[0] % NUM_DYES})`);
  made.style.setProperty("--level", `${Math.round(100 * level)}%`);
}

function percent(part, whole) {
  return whole ? `${Math.round((100 * part) / whole)}%` : "none";
}

// ---- one block of a pool ----------------------------------------------------------------------------

/* All that is to be seen of a block, as plain values: two that are equal need no drawing. */
function lookOf(state, poolName, block, held) {
  const pool = state.pools[poolName];
  const isKnown = poolName === "pool" && state.cached.has(block);
  const kinds = state.marks.get(`${poolName}:${block}`) ?? [];
  const order = held ? OF_HELD : OF_LEFT;
  const sign = order.find((kind) => kinds.includes(kind)) ?? null;
  const look = { block, kind: "free", numbers: [], times: 0, level: 0, isKnown, sign, filled: 0 };
  if (held) {
    const requests = [...new Set(held.holders.map(({ seq }) => seq.request))];
    look.kind = held.filled === 0 ? "reserved" : "held";
    look.numbers = requests.map((request) => state.requests.get(request).number).sort((a, b) => a - b);
    look.times = held.holders.length;
    look.filled = held.filled;
    look.level = held.filled / state.blockSize;
  } else if (isKnown) {
    look.kind = "idle";
    const last = pool.lastRequest[block];
    if (last !== null) look.numbers = [state.requests.get(last).number];
  } else if (pool.owners[block] > 0) {
    look.kind = "taken";
  }
  return look;
}

function lettersOn(look) {
  const letters = look.numbers.map(letterOf);
  return letters.length > 3 ? `${letters.slice(0, 2).join("")}+` : letters.join("");
}

function drawBlock(cell, look, blockSize) {
  const letters = lettersOn(look);
  const classes = ["block", look.kind];
  if (look.kind === "reserved") classes.push("held");
  if (look.times > 1) classes.push("shared");
  if (look.sign) classes.push("changed", OF_LEFT.includes(look.sign) && look.kind !== "held" ? "left" : "stays");
  for (const kept of ["chosen", "linked"]) if (cell.classList.contains(kept)) classes.push(kept);
  cell.className = classes.join(" ");
  if (look.kind === "held" || look.kind === "reserved") paint(cell, look.numbers, look.level);
  const parts = [
    element("span", { class: "number" }, `${look.block}`),
    element("span", { class: letters.length > 2 ? "owner long" : "owner" }, letters),
  ];
  const known = look.isKnown ? (look.kind === "idle" ? "\u25c7" : "\u25c6") : "";
  const times = look.times > 1 ? `\u00d7${look.times}` : "";
  if (known || times) parts.push(element("span", { class: "more" }, known + times));
  if (look.sign) parts.push(drawSign(look.sign));
  cell.replaceChildren(...parts);
  cell.setAttribute("aria-label", labelOf(look, blockSize));
}

function drawSign(kind) {
  const [sign, word] = SIGNS[kind];
  return element("span", { class: "sign" }, `${sign}`, element("span", { class: "word" }, ` ${word}`));
}

function labelOf(look, blockSize) {
  const parts = [`block ${look.block}`];
  if (look.kind === "held") parts.push(inList(look.numbers.map(letterOf)), `${look.filled} of ${blockSize} slots filled`);
  else if (look.kind === "reserved") parts.push(`reserved for ${inList(look.numbers.map(letterOf))}, empty`);
  else if (look.kind === "idle") parts.push("in the prefix cache only");
  else parts.push(look.kind);
  if (look.times > 1) parts.push(`owned ${look.times} times`);
  if (look.sign) parts.push(SIGNS[look.sign][1]);
  return parts.join(", ");
}

/* One pool as a grid of buttons, made once; `draw` changes those that look different. */
class PoolGrid {
  constructor(name, title, size, numShown, most = "large") {
    this.name = name;
    this.looks = new Array(numShown).fill("");
    this.cells = this.looks.map((_, block) =>
      element("button", { type: "button", class: "block", tabindex: block ? -1 : 0, "data-place": `${name}:${block}` }),
    );
    const limits = { large: 48, medium: 260, small: 1200, tiny: Infinity };
    const scales = Object.keys(limits).slice(Object.keys(limits).indexOf(most));
    const scale = scales.find((one) => numShown <= limits[one]);
    const heading = element("h2", { id: `title-${name}` }, title);
    this.grid = element("div", { class: `grid ${scale}`, role: "group", "aria-labelledby": heading.id }, ...this.cells);
    const rest = size - numShown;
    const after = rest ? [element("p", { class: "rest" }, `and ${rest.toLocaleString("en")} more, never used`)] : [];
    this.parts = [heading, this.grid, ...after];
    this.grid.addEventListener("keydown", (event) => this.walk(event));
  }

  draw(state, held, isMove) {
    this.cells.forEach((cell, block) => {
      const look = lookOf(state, this.name, block, held.get(block));
      const key = JSON.stringify(look);
      const isNews = look.sign && isMove;
      if (this.looks[block] !== key) {
        this.looks[block] = key;
        drawBlock(cell, look, state.blockSize);
        if (isNews) cell.classList.add("flash");
      }
    });
  }

  /* Arrow keys go from block to block; the page's own keys are for everywhere else. */
  walk(event) {
    const here = this.cells.indexOf(event.target);
    const across = getComputedStyle(this.grid).gridTemplateColumns.split(" ").length;
    const by = { ArrowRight: 1, ArrowLeft: -1, ArrowDown: across, ArrowUp: -across }[event.key];
    if (here < 0 || by === undefined) return;
    event.preventDefault();
    event.stopPropagation();
    const there = this.cells[here + by];
    if (!there) return;
    event.target.tabIndex = -1;
    there.tabIndex = 0;
    there.focus();
  }
}

// ---- the page -----------------------------------------------------------------------------------------

class Page {
  constructor(events) {
    this.player = new Player(events);
    this.at = 0; // which stop
    this.stops = this.player.stops.steps;
    this.timer = null;
    this.pointed = null; // the block under the pointer, and the one chosen by click or focus
    this.chosen = null;
    this.setPools();
    this.setCurve();
    this.setLegend();
    this.listen();
    this.go(0);
  }

  get state() {
    return this.player.state;
  }

  // ---- moving

  go(at) {
    this.at = Math.max(0, Math.min(this.stops.length - 1, at));
    this.player.seek(this.stops[this.at]);
    this.draw(true);
  }

  goToStep(step) {
    const stops = this.player.stops.steps;
    const place = stops.findLastIndex((stop) => stop > 0 && this.player.events[stop - 1].step <= step);
    this.finely(false);
    this.go(Math.max(0, place));
  }

  /* Stop at every event, or only after every step; stay as near as can be to where we are. */
  finely(isFine) {
    byId("finely").checked = isFine;
    const here = this.stops[this.at];
    this.stops = isFine ? this.player.stops.moments : this.player.stops.steps;
    const next = this.stops.findIndex((stop) => stop >= here);
    this.at = next < 0 ? this.stops.length - 1 : next;
  }

  play() {
    if (this.at === this.stops.length - 1) this.go(0);
    byId("words").setAttribute("aria-live", "off"); // nobody can listen that fast
    document.body.classList.add("playing");
    byId("play").setAttribute("aria-label", "Pause");
    const tick = () => {
      this.go(this.at + 1);
      if (this.at === this.stops.length - 1) this.pause();
      else this.timer = setTimeout(tick, 1000 / Number(byId("speed").value));
    };
    this.timer = setTimeout(tick, 1000 / Number(byId("speed").value));
  }

  pause() {
    clearTimeout(this.timer);
    this.timer = null;
    byId("words").setAttribute("aria-live", "polite");
    document.body.classList.remove("playing");
    byId("play").setAttribute("aria-label", "Play");
  }

  // ---- what is made once

  setPools() {
    const { numBlocks, numSwapBlocks, used } = this.player.shape;
    // Of a pool that is much too large for its trace, the part that is used.
    const shown = (size, reach, few) => (size <= few ? size : Math.min(size, Math.max(few, 16 * Math.ceil(reach / 16))));
    const slots = count(this.player.shape.blockSize, "slot");
    const title = `Pool: ${count(numBlocks, "block")} of ${slots}`;
    this.grids = [new PoolGrid("pool", title, numBlocks, shown(numBlocks, used.pool, 64))];
    if (numSwapBlocks > 0 && used.swap > 0) {
      const swapTitle = `Swap pool: ${count(numSwapBlocks, "block")}`;
      this.grids.push(new PoolGrid("swap", swapTitle, numSwapBlocks, shown(numSwapBlocks, used.swap, 16), "medium"));
    }
    byId("pools").prepend(...this.grids.flatMap((grid) => grid.parts));
  }

  setCurve() {
    const { curve, shape } = this.player;
    const every = Math.max(1, Math.floor(curve.length / 800)); // more points than that nobody sees
    const last = Math.max(1, curve.length - 1);
    const line = (valueOf) =>
      curve.flatMap((one, i) => (i % every && i < last ? [] : [`${((1000 * i) / last).toFixed(1)},${(96 - 92 * valueOf(one)).toFixed(1)}`]));
    const used = line((one) => one.used / (shape.numBlocks || 1));
    const filled = line((one) => (one.slots ? one.filled / one.slots : 0));
    const [area, usedLine, filledLine] = byId("curve").querySelectorAll("path");
    area.setAttribute("d", `M0,100 L${used.join(" L")} L1000,100 Z`);
    usedLine.setAttribute("d", `M${used.join(" L")}`);
    filledLine.setAttribute("d", `M${filled.join(" L")}`);
  }

  setLegend() {
    const sample = (look) => {
      const cell = element("span", { class: "block" });
      drawBlock(cell, { block: 7, numbers: [0], times: 1, level: 1, isKnown: false, sign: null, filled: 0, ...look }, 16);
      cell.removeAttribute("aria-label");
      cell.setAttribute("aria-hidden", "true");
      return element("span", { class: "large" }, cell);
    };
    const rows = [
      [sample({ kind: "held" }), "A block of request A, all its slots filled. The small number is the block's."],
      [sample({ kind: "held", level: 0.3 }), "Filled in part: the colour rises with every token."],
      [sample({ kind: "held", numbers: [0, 1], times: 3 }), "Shared: three sequences, of requests A and B, have it in their block table."],
      [sample({ kind: "held", isKnown: true }), "\u25c6 The prefix cache knows it by its content."],
      [sample({ kind: "idle", isKnown: true }), "\u25c7 Idle: nobody holds it; it can be found until the room is needed."],
      [sample({ kind: "reserved", level: 0 }), "Reserved and empty: memory that is not paged takes it in advance."],
      [sample({ kind: "free", numbers: [] }), "Free."],
      ...Object.entries(SIGNS).map(([kind, [, , text]]) => [drawSign(kind), text]),
    ];
    const whole = "A thick outline marks a block to which something happened in this step, and a sign says what. " +
      "A/2 is the second sequence of request A. Keys: space plays and pauses, the arrows go step by step, Home and End to either end.";
    byId("legend-body").replaceChildren(
      ...rows.map(([picture, text]) => element("div", {}, picture, element("p", {}, text))),
      element("p", { class: "whole" }, whole),
    );
  }

  // ---- what is drawn after every move

  draw(isMove) {
    const { state } = this;
    const held = Object.fromEntries(this.grids.map((grid) => [grid.name, holdings(state, grid.name)]));
    for (const grid of this.grids) grid.draw(state, held[grid.name], isMove);
    this.drawArrows();
    this.drawWhere();
    this.drawCounts(statistics(state, held.pool));
    this.drawWords();
    this.drawQueues();
    this.drawTables(held);
    this.drawAbout(held);
  }

  /* From the block that was copied to its copy, and between the pools. Of many, those of one block. */
  drawArrows() {
    const { moves } = this.state;
    const place = this.pointed ?? this.chosen;
    const drawn = moves.length > MOST_ARROWS ? moves.filter((ends) => ends.includes(place)) : moves;
    const paths = drawn.map(([from, to]) => this.arrow(from, to));
    byId("arrows").replaceChildren(...paths.filter((path) => path !== null));
  }

  arrow(from, to) {
    const [start, end] = [this.boxOf(from), this.boxOf(to)];
    if (!start || !end) return null;
    // From edge to edge, so that letters stay free: downwards, upwards, or over the top of a row.
    const y1 = end.top > start.bottom ? start.bottom : start.top;
    const y2 = end.bottom < start.top ? end.bottom : end.top;
    const [dx, dy] = [end.middle - start.middle, y2 - y1];
    const bend = Math.sign(dx || 1) * Math.min(22, Math.hypot(dx, dy) / 3);
    const far = Math.hypot(dx, dy) || 1;
    const over = { x: (start.middle + end.middle) / 2 + (dy / far) * bend, y: (y1 + y2) / 2 - (dx / far) * bend };
    const path = document.createElementNS("http://www.w3.org/2000/svg", "path");
    path.setAttribute("d", `M${start.middle},${y1} Q${over.x},${over.y} ${end.middle},${y2}`);
    path.setAttribute("marker-end", "url(#head)");
    return path;
  }

  boxOf(place) {
    const cell = document.querySelector(`.block[data-place="${place}"]`);
    if (!cell) return null;
    const [box, all] = [cell.getBoundingClientRect(), byId("pools").getBoundingClientRect()];
    const inset = Math.min(8, box.height / 6);
    return { middle: box.left + box.width / 2 - all.left, top: box.top - all.top + inset, bottom: box.bottom - all.top - inset };
  }

  drawWhere() {
    const { steps } = this.player.stops;
    const slider = byId("place");
    slider.max = this.stops.length - 1;
    slider.value = this.at;
    const place = steps.findIndex((stop) => stop >= this.state.numEvents);
    const x = (1000 * Math.max(0, place)) / Math.max(1, steps.length - 1);
    for (const end of ["x1", "x2"]) byId("curve").querySelector(".cursor").setAttribute(end, x);
    const last = this.player.events.at(-1).step;
    const within = byId("finely").checked ? `, event ${this.state.numEvents} of ${this.player.events.length}` : "";
    const now = this.state.step === 0 ? "before the first step" : `step ${this.state.step}`;
    slider.setAttribute("aria-valuetext", `${now} of ${last}${within}`);
    show(byId("where"), `${now}${within}`, () => [
      element("b", {}, this.state.step === 0 ? "Before the first step" : `Step ${this.state.step}`),
      ` of ${last}${within}`,
    ]);
  }

  drawCounts(now) {
    const { size } = this.state.pools.pool;
    const rows = [
      ["blocks in use", `${now.used} of ${size}`],
      ["free", `${now.free}`],
      ["shared", `${now.shared}`],
      ["cached", now.idle ? `${now.cached} (${now.idle} idle)` : `${now.cached}`],
      ["of their slots filled", percent(now.filled, now.slots)],
    ];
    show(byId("counts"), JSON.stringify(rows), () =>
      rows.map(([name, value]) => element("div", {}, element("dt", {}, name), element("dd", {}, value))),
    );
  }

  drawWords() {
    const { notes } = this.state;
    show(byId("words"), `${this.state.step} ${JSON.stringify(notes)}`, () => {
      byId("words").scrollTop = 0;
      if (!notes.length) return [element("li", { class: "none" }, "No block is taken, shared or given up.")];
      return notes.map(({ kind, text }) => {
        const sign = kind in SIGNS ? drawSign(kind) : element("span", { class: "sign quiet" }, WORDS[kind] ?? "");
        return element("li", {}, sign, element("span", {}, text));
      });
    });
  }

  drawQueues() {
    const { queues } = this.state;
    show(byId("queues"), JSON.stringify([queues, this.state.requests.size]), () =>
      Object.entries(queues).flatMap(([name, requests]) => {
        const shown = requests.slice(0, 12).map((request) => this.request(request));
        const more = requests.length - shown.length;
        if (more > 0) shown.push(element("span", { class: "gap" }, `and ${more} more`));
        if (!requests.length) shown.push(element("span", { class: "gap" }, "nobody"));
        return [element("dt", {}, `${name}`), element("dd", {}, ...shown)];
      }),
    );
  }

  request(request) {
    const known = this.state.requests.get(request);
    const chip = element("span", { class: known ? "chip" : "chip unknown" }, known ? letterOf(known.number) : "\u2026");
    if (known) paint(chip, [known.number], 1);
    const id = element("span", { class: "id", title: request }, request);
    return element("span", { class: "request" }, chip, id);
  }

  drawTables(held) {
    const all = [...this.state.sequences.values()].sort((a, b) => a.isSwapped - b.isSwapped || this.order(a) - this.order(b) || a.id - b.id);
    const shown = all.slice(0, MOST_TABLES);
    const parent = byId("tables");
    this.rows ??= new Map();
    const rows = shown.map((seq) => this.tableRow(seq, held[poolOf(seq)] ?? new Map()));
    const more = all.length - shown.length;
    if (more > 0) rows.push(element("p", { class: "rest" }, `and the tables of ${more} more sequences`));
    if (!rows.length) rows.push(element("p", { class: "rest" }, "No sequence holds a block."));
    for (const id of this.rows.keys()) if (!this.state.sequences.has(id)) this.rows.delete(id);
    const isSame = rows.length === parent.children.length && rows.every((row, i) => row === parent.children[i]);
    if (!isSame) parent.replaceChildren(...rows);
  }

  order(seq) {
    return this.state.requests.get(seq.request).number;
  }

  /* The row of one sequence: the one there is, if it would look the same. */
  tableRow(seq, held) {
    const pool = poolOf(seq);
    const isChanged = (block) => (this.state.marks.get(`${pool}:${block}`) ?? []).some((kind) => OF_HELD.includes(kind));
    const entries = seq.blocks.map((block) => [block, held.get(block)?.holders.length > 1, isChanged(block)]);
    const key = JSON.stringify([seq.tokens, pool, entries]);
    const old = this.rows.get(seq.id);
    if (old?.key === key) return old.row;
    const made = entries.map(([block, isShared, changed], logical) => this.entry(seq, block, logical, isShared, changed));
    if (made.length > MOST_ENTRIES) {
      const gap = element("span", { class: "gap" }, `\u2026 ${made.length - MOST_ENTRIES} more \u2026`);
      made.splice(MOST_ENTRIES / 2, made.length - MOST_ENTRIES, gap);
    }
    const chip = element("span", { class: "chip" }, seq.name);
    paint(chip, [this.order(seq)], 1);
    const what = seq.isPinned ? "pinned" : seq.isSwapped ? "swapped" : "";
    const tokens = element("span", {}, count(seq.tokens, "token"), ...(what ? [element("br"), what] : []));
    const who = element("div", { class: "who" }, chip, tokens);
    const row = element("div", { class: `table ${what}` }, who, element("div", { class: "entries" }, ...made));
    this.rows.set(seq.id, { key, row });
    return row;
  }

  entry(seq, block, logical, isShared, isChanged) {
    const filled = Math.max(0, Math.min(this.state.blockSize, seq.tokens - logical * this.state.blockSize));
    const classes = `entry${isShared ? " is-shared" : ""}${isChanged ? " changed" : ""}`;
    const pool = poolOf(seq);
    const label = `logical block ${logical} of ${seq.name} is block ${block}${seq.isSwapped ? " of the swap pool" : ""}`;
    const made = element(
      "button",
      { type: "button", class: classes, "data-place": `${pool}:${block}`, "aria-label": label, tabindex: logical ? -1 : 0 },
      element("span", { class: "logical" }, `${logical}`),
      element("span", { class: "physical" }, `${block}`),
    );
    paint(made, [this.order(seq)], filled / this.state.blockSize);
    return made;
  }

  // ---- one block in detail

  drawAbout(held) {
    const place = this.pointed ?? this.chosen;
    byId("about").classList.toggle("idle", !place);
    for (const cell of document.querySelectorAll(".linked")) cell.classList.remove("linked");
    for (const cell of document.querySelectorAll(".block.chosen")) cell.classList.remove("chosen");
    if (this.state.moves.length > MOST_ARROWS) this.drawArrows();
    if (this.chosen) document.querySelector(`.block[data-place="${this.chosen}"]`)?.classList.add("chosen");
    if (!place) {
      show(byId("about"), "", () => [element("p", { class: "quiet" }, "Point at a block, or tap it, to see whose it is.")]);
      return;
    }
    for (const other of document.querySelectorAll(`[data-place="${place}"]`)) other.classList.add("linked");
    const [pool, number] = place.split(":");
    const lines = this.about(pool, Number(number), (held ?? {})[pool] ?? holdings(this.state, pool));
    show(byId("about"), JSON.stringify(lines), () =>
      lines.map((line, i) => element("p", { class: i ? "" : "title" }, line)),
    );
  }

  about(poolName, block, held) {
    const { state } = this;
    const pool = state.pools[poolName];
    const look = lookOf(state, poolName, block, held.get(block));
    const where = poolName === "swap" ? " of the swap pool" : "";
    const lines = [`Block ${block}${where}: ${this.inShort(look)}`];
    const holders = held.get(block)?.holders ?? [];
    if (holders.length) {
      const whose = holders.map(({ seq, logical }) => `logical block ${logical} of ${seq.name}`);
      const counted = state.isCounted ? ` Reference count: ${pool.owners[block]}${look.isKnown ? ", the prefix cache included" : ""}.` : "";
      lines.push(`It is ${inList(whose, 4)}, since step ${pool.since[block]}.${counted}`);
    }
    if (look.isKnown) lines.push(holders.length ? "The prefix cache knows it." : `The prefix cache knows it still; written since step ${pool.since[block]}.`);
    const kinds = (state.marks.get(`${poolName}:${block}`) ?? []).filter((kind) => kind in SIGNS);
    if (kinds.length) lines.push(`In this step: ${kinds.map((kind) => SIGNS[kind][1]).join(", then ")}.`);
    return lines;
  }

  inShort(look) {
    if (look.kind === "free") return "free";
    if (look.kind === "taken") return "just taken";
    if (look.kind === "idle") return "held by nobody, idle in the prefix cache";
    const whose = `${look.numbers.length > 1 ? "requests" : "request"} ${inList(look.numbers.map(letterOf), 4)}`;
    if (look.kind === "reserved") return `reserved for ${whose}, empty`;
    return `${whose}, ${look.filled} of ${this.state.blockSize} slots filled`;
  }

  // ---- listening

  listen() {
    const onClick = { first: () => this.go(0), back: () => this.go(this.at - 1), forward: () => this.go(this.at + 1) };
    onClick.last = () => this.go(this.stops.length - 1);
    for (const [id, move] of Object.entries(onClick)) {
      byId(id).addEventListener("click", () => {
        this.pause();
        move();
      });
    }
    byId("play").addEventListener("click", () => this.toggle());
    byId("place").addEventListener("input", (event) => {
      this.pause();
      this.go(Number(event.target.value));
    });
    byId("finely").addEventListener("change", (event) => {
      this.finely(event.target.checked);
      this.go(this.at);
    });
    byId("curve").addEventListener("click", (event) => this.jump(event));
    window.addEventListener("resize", () => this.drawArrows());
    document.addEventListener("keydown", (event) => this.onKey(event));
    this.listenToBlocks();
  }

  listenToBlocks() {
    const placeOf = (event) => event.target.closest?.("[data-place]")?.dataset.place ?? null;
    const point = (place) => {
      if (place === this.pointed) return;
      this.pointed = place;
      this.drawAbout();
    };
    document.addEventListener("pointerover", (event) => {
      if (event.pointerType === "mouse") point(placeOf(event));
    });
    const choose = (event) => {
      const place = placeOf(event);
      if (place === null) return;
      this.chosen = place;
      this.drawAbout();
    };
    document.addEventListener("focusin", choose);
    document.addEventListener("click", choose); // some browsers do not focus a button that is tapped
  }

  toggle() {
    if (this.timer === null) this.play();
    else this.pause();
  }

  jump(event) {
    const { left, width } = byId("curve").getBoundingClientRect();
    this.pause();
    this.go(Math.round(((event.clientX - left) / width) * (this.stops.length - 1)));
  }

  onKey(event) {
    if (event.altKey || event.ctrlKey || event.metaKey) return;
    if (event.key === "Escape") {
      this.chosen = this.pointed = null;
      this.drawAbout();
      return;
    }
    // What has keys of its own keeps them: a button its space, a slider and a choice their arrows.
    const own = event.target.closest?.("button, select, summary, input, #words");
    const isSpace = event.key === " ";
    if (own && (isSpace || own.matches("select, input[type=range]"))) return;
    const moves = {
      " ": () => this.toggle(),
      ArrowRight: () => this.go(this.at + 1),
      ArrowLeft: () => this.go(this.at - 1),
      Home: () => this.go(0),
      End: () => this.go(this.stops.length - 1),
    };
    if (!Object.hasOwn(moves, event.key)) return;
    event.preventDefault();
    if (!isSpace) this.pause();
    moves[event.key]();
  }
}

// ---- begin ------------------------------------------------------------------------------------------

function begin() {
  const events = JSON.parse(byId("trace").textContent);
  if (!events.some((event) => event.event === "schedule")) {
    byId("empty").hidden = false;
    return;
  }
  byId("player").hidden = false;
  const page = new Page(events);
  byId("legend").open = window.innerHeight >= 800 && window.innerWidth > 900;
  // For tests, and for those who like to look behind: the one name that this page adds.
  window.replay = {
    state: () => summary(page.state),
    statistics: () => statistics(page.state),
    steps: events.at(-1).step,
    stops: page.player.stops,
    goTo: (step) => page.goToStep(step),
    goToEvent: (number) => {
      page.finely(true);
      page.go(page.stops.findIndex((stop) => stop >= number));
    },
    play: () => page.play(),
    pause: () => page.pause(),
  };
}

begin();
