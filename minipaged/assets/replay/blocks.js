/* The look of one block, and a pool as a grid of blocks.

   All text is set as textContent, never as markup, because users choose the names of requests. */

const SIGNS = {
  evicted: ["\u00d7", "evicted", "Removed from the prefix cache, as no empty block was left."],
  copy: ["\u00bb", "copy", "Copy-on-write: the copy, for the sequence that writes."],
  source: ["\u00ab", "copied", "Copy-on-write: the original, which its other owners keep."],
  in: ["\u2191", "in", "Swapped in: copied back from the swap pool."],
  out: ["\u2193", "out", "Swapped out: copied to the swap pool, because its request is preempted."],
  hit: ["\u2713", "hit", "Prefix cache hit: its tokens need not be computed."],
  deduplicated: ["=", "same", "Another sequence computed the same content and now shares it."],
  shared: ["&", "shared", "Forked: one more sequence owns it."],
  new: ["+", "new", "Allocated to a sequence."],
  cached: ["\u25c6", "cached", "Full and written: the prefix cache can find it from now on."],
  idle: ["\u25c7", "idle", "Its last sequence gave it back; the prefix cache keeps it."],
  freed: ["\u2212", "freed", "Its last owner gave it back."],
};
// A block shows one sign: the first of these that applies. Blocks in use, then blocks not in use.
const OF_HELD = [
  "copy",
  "in",
  "out",
  "hit",
  "source",
  "evicted",
  "deduplicated",
  "shared",
  "new",
  "cached",
];
const OF_UNHELD = ["out", "in", "evicted", "idle", "freed"];
const NUM_DYES = 8;

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

/* Replace the children, but only if they would look different. */
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

/* The look of a block as plain values: while they stay equal, it need not be drawn again. */
function lookOf(state, poolName, block, held) {
  const pool = state.pools[poolName];
  const isCached = poolName === "pool" && state.cached.has(block);
  const kinds = state.marks.get(`${poolName}:${block}`) ?? [];
  const order = held ? OF_HELD : OF_UNHELD;
  const sign = order.find((kind) => kinds.includes(kind)) ?? null;
  const look = { block, kind: "free", numbers: [], times: 0, level: 0, isCached, sign, filled: 0 };
  if (held) {
    const requests = [...new Set(held.holders.map(({ seq }) => seq.request))];
    look.kind = held.filled === 0 ? "reserved" : "held";
    look.numbers = requests
      .map((request) => state.requests.get(request).number)
      .sort((a, b) => a - b);
    look.times = held.holders.length;
    look.filled = held.filled;
    look.level = held.filled / state.blockSize;
  } else if (isCached) {
    look.kind = "idle";
    const last = pool.lastRequest[block];
    // A live view that began late does not know the last owner, so none shows it.
    if (!state.isLive && state.requests.has(last)) look.numbers = [state.requests.get(last).number];
  } else if (pool.refCounts[block] > 0) {
    look.kind = "taken";
  }
  return look;
}

/* All that `lookOf` depends on, as text: much quicker, and most blocks of a pool do not change. */
function keyOf(state, poolName, block, held) {
  const pool = state.pools[poolName];
  const isCached = poolName === "pool" && state.cached.has(block);
  const kinds = state.marks.size ? state.marks.get(`${poolName}:${block}`) : undefined;
  if (held === undefined) {
    const isTaken = pool.refCounts[block] > 0;
    if (!isCached && kinds === undefined) return isTaken ? "taken" : "free";
    const last = state.requests.get(pool.lastRequest[block]);
    return `${last?.number} ${isCached} ${isTaken} ${kinds}`;
  }
  let owners = ""; // by a loop: it runs for every block, and `map` would take twice as long
  for (const { seq } of held.holders) owners += `${state.requests.get(seq.request).number},`;
  return `${owners} ${held.filled} ${isCached} ${kinds}`;
}

function lettersOn(look) {
  const letters = look.numbers.map(letterOf);
  return letters.length > 3 ? `${letters.slice(0, 2).join("")}+` : letters.join("");
}

/* A bare block is too small for letters: only its colours and its outline are drawn. */
function drawBlock(cell, look, blockSize, isBare = false) {
  const classes = ["block", look.kind];
  if (look.kind === "reserved") classes.push("held");
  if (look.times > 1) classes.push("shared");
  if (look.sign) classes.push("changed");
  if (look.sign && look.times === 0) classes.push("left");
  for (const kept of ["chosen", "linked"]) if (cell.classList.contains(kept)) classes.push(kept);
  cell.className = classes.join(" ");
  if (look.kind === "held" || look.kind === "reserved") paint(cell, look.numbers, look.level);
  cell.setAttribute("aria-label", labelOf(look, blockSize));
  if (isBare) return;
  const letters = lettersOn(look);
  const parts = [
    element("span", { class: "number" }, `${look.block}`),
    element("span", { class: letters.length > 2 ? "owner long" : "owner" }, letters),
  ];
  const more = element("span", { class: "more" });
  if (look.times > 1) more.append(element("span", { class: "times" }, `\u00d7${look.times}`));
  if (look.isCached)
    more.append(element("span", { class: "cached" }, look.kind === "idle" ? "\u25c7" : "\u25c6"));
  if (more.firstChild) parts.push(more);
  if (look.sign) parts.push(drawSign(look.sign));
  cell.replaceChildren(...parts);
}

function drawSign(kind) {
  const [sign, word] = SIGNS[kind];
  return element(
    "span",
    { class: "sign" },
    `${sign}`,
    element("span", { class: "word" }, ` ${word}`),
  );
}

function labelOf(look, blockSize) {
  const parts = [`block ${look.block}`];
  if (look.kind === "held")
    parts.push(inList(look.numbers.map(letterOf)), `${look.filled} of ${blockSize} slots filled`);
  else if (look.kind === "reserved")
    parts.push(`reserved for ${inList(look.numbers.map(letterOf))}, empty`);
  else if (look.kind === "idle") parts.push("in the prefix cache only");
  else parts.push(look.kind);
  if (look.times > 1) parts.push(`${look.times} owners`);
  if (look.sign) parts.push(SIGNS[look.sign][1]);
  return parts.join(", ");
}

/* One pool as a grid of buttons, made once; `draw` redraws only those that have changed. */
class PoolGrid {
  constructor(name, title, size, numShown, most = "large", why = "never used") {
    this.name = name;
    this.keys = new Array(numShown).fill("");
    this.cells = this.keys.map((_, block) =>
      element("button", {
        type: "button",
        class: "block",
        tabindex: block ? -1 : 0,
        "data-place": `${name}:${block}`,
      }),
    );
    const limits = {
      large: window.innerWidth < 900 ? 48 : 96,
      medium: 260,
      small: 1200,
      tiny: 2400,
      bare: Infinity,
    };
    const scales = Object.keys(limits).slice(Object.keys(limits).indexOf(most));
    const scale = scales.find((one) => numShown <= limits[one]);
    this.isBare = scale === "bare";
    const heading = element("h2", { id: `title-${name}` }, title);
    this.grid = element(
      "div",
      { class: `grid ${scale}`, role: "group", "aria-labelledby": heading.id },
      ...this.cells,
    );
    const rest = size - numShown;
    const after = rest
      ? [element("p", { class: "rest" }, `and ${rest.toLocaleString("en")} more, ${why}`)]
      : [];
    this.parts = [heading, this.grid, ...after];
    this.grid.addEventListener("keydown", (event) => this.walk(event));
  }

  draw(state, held, isMove) {
    this.cells.forEach((cell, block) => {
      const key = keyOf(state, this.name, block, held.get(block));
      if (this.keys[block] === key) return;
      this.keys[block] = key;
      const look = lookOf(state, this.name, block, held.get(block));
      drawBlock(cell, look, state.blockSize, this.isBare);
      if (look.sign && isMove) cell.classList.add("flash");
    });
  }

  /* Inside the grid, arrow keys move between blocks instead of between steps. */
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
