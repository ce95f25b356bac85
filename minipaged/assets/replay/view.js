/* What the page of a trace and the live page have in common: everything but time.

   A view draws `this.state`, a state of state.js, with the blocks of blocks.js. Each method changes
   only the elements that look different. */

// Notes that are not about a block start with a word instead of a sign.
const WORDS = {
  computed: "compute",
  pinned: "pinned",
  ended: "ended",
  init: "begin",
  ranks: "ranks",
};
const MOST_TABLES = 32; // a page of more is hard to read
const MOST_ENTRIES = 48; // of one block table
const MOST_ARROWS = 8; // more of them would hide the blocks

class View {
  constructor() {
    this.pointed = null; // the block under the pointer; `chosen`: by click or focus
    this.chosen = null;
  }

  // ---- drawn once

  setLegend(keys, more = []) {
    const sample = (look) => {
      const cell = element("span", { class: "block" });
      drawBlock(
        cell,
        {
          block: 7,
          numbers: [0],
          times: 1,
          level: 1,
          isCached: false,
          sign: null,
          filled: 0,
          ...look,
        },
        16,
      );
      cell.removeAttribute("aria-label");
      cell.setAttribute("aria-hidden", "true");
      return element("span", { class: "large" }, cell);
    };
    const rows = [
      [
        sample({ kind: "held" }),
        "A block of request A with all its slots filled. The small number is the block's.",
      ],
      [sample({ kind: "held", level: 0.3 }), "Partly filled: the colour rises with every token."],
      [
        sample({ kind: "held", numbers: [0, 1], times: 3 }),
        "Shared: three sequences, of requests A and B, have it in their block tables.",
      ],
      [
        sample({ kind: "held", isCached: true }),
        "\u25c6 Cached: the prefix cache can find it by its content.",
      ],
      [
        sample({ kind: "idle", isCached: true }),
        "\u25c7 Idle: cached, but no sequence holds it. It counts as free, and may be evicted.",
      ],
      [
        sample({ kind: "reserved", level: 0 }),
        "Reserved and empty: memory without paging takes it in advance.",
      ],
      [sample({ kind: "free", numbers: [] }), "Free."],
      ...Object.entries(SIGNS).map(([kind, [, , text]]) => [drawSign(kind), text]),
      ...more,
    ];
    const whole =
      "A thick outline marks a block that changed in this step; its sign tells how. A/2 is the " +
      `second sequence of request A. ${keys}`;
    byId("legend-body").replaceChildren(
      ...rows.map(([picture, text]) => element("div", {}, picture, element("p", {}, text))),
      element("p", { class: "whole" }, whole),
    );
  }

  // ---- drawn after every change

  /* From each copied block to its copy. If there are too many, only those of the pointed block. */
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
    // From edge to edge, so that no letter is covered: down, up, or over the top of a row.
    const y1 = end.top > start.bottom ? start.bottom : start.top;
    const y2 = end.bottom < start.top ? end.bottom : end.top;
    const [dx, dy] = [end.middle - start.middle, y2 - y1];
    const bend = Math.sign(dx || 1) * Math.min(22, Math.hypot(dx, dy) / 3);
    const far = Math.hypot(dx, dy) || 1;
    const over = {
      x: (start.middle + end.middle) / 2 + (dy / far) * bend,
      y: (y1 + y2) / 2 - (dx / far) * bend,
    };
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
    return {
      middle: box.left + box.width / 2 - all.left,
      top: box.top - all.top + inset,
      bottom: box.bottom - all.top - inset,
    };
  }

  drawCounts(now) {
    const { size } = this.state.pools.pool;
    const rows = [
      ["blocks in use", `${now.used} of ${size}`],
      ["idle", `${now.idle}`],
      ["free", `${now.free}`],
      ["shared", `${now.shared}`],
      ["cached", `${now.cached}`],
      ["slots filled", percent(now.filled, now.slots)],
    ];
    show(byId("counts"), JSON.stringify(rows), () =>
      rows.map(([name, value]) =>
        element("div", {}, element("dt", {}, name), element("dd", {}, value)),
      ),
    );
  }

  drawWords() {
    const { notes } = this.state;
    show(byId("words"), `${this.state.step} ${JSON.stringify(notes)}`, () => {
      byId("words").scrollTop = 0;
      if (!notes.length)
        return [element("li", { class: "none" }, "No block changes its owner.")];
      return notes.map(({ kind, text }) => {
        const sign =
          kind in SIGNS
            ? drawSign(kind)
            : element("span", { class: "sign quiet" }, WORDS[kind] ?? "");
        return element("li", {}, sign, element("span", {}, text));
      });
    });
  }

  drawTables(held) {
    const all = [...this.state.sequences.values()].sort(
      (a, b) => a.isSwapped - b.isSwapped || this.order(a) - this.order(b) || a.id - b.id,
    );
    const shown = all.slice(0, MOST_TABLES);
    const parent = byId("tables");
    this.rows ??= new Map();
    const rows = shown.map((seq) => this.tableRow(seq, held[poolOf(seq)] ?? new Map()));
    const more = all.length - shown.length;
    if (more > 0)
      rows.push(element("p", { class: "rest" }, `and the tables of ${more} more sequences`));
    if (!rows.length) rows.push(element("p", { class: "rest" }, "No sequence holds a block."));
    for (const id of this.rows.keys()) if (!this.state.sequences.has(id)) this.rows.delete(id);
    const isSame =
      rows.length === parent.children.length && rows.every((row, i) => row === parent.children[i]);
    if (!isSame) parent.replaceChildren(...rows);
  }

  order(seq) {
    return this.state.requests.get(seq.request).number;
  }

  /* The row of one sequence: the one there is, if it would look the same. */
  tableRow(seq, held) {
    const pool = poolOf(seq);
    const isChanged = (block) =>
      (this.state.marks.get(`${pool}:${block}`) ?? []).some((kind) => OF_HELD.includes(kind));
    const entries = seq.blocks.map((block) => [
      block,
      held.get(block)?.holders.length > 1,
      isChanged(block),
    ]);
    const key = JSON.stringify([seq.tokens, pool, entries]);
    const old = this.rows.get(seq.id);
    if (old?.key === key) return old.row;
    const made = entries.map(([block, isShared, changed], logical) =>
      this.entry(seq, block, logical, isShared, changed),
    );
    if (made.length > MOST_ENTRIES) {
      const gap = element(
        "span",
        { class: "gap" },
        `\u2026 ${made.length - MOST_ENTRIES} more \u2026`,
      );
      made.splice(MOST_ENTRIES / 2, made.length - MOST_ENTRIES, gap);
    }
    const chip = element("span", { class: "chip" }, seq.name);
    paint(chip, [this.order(seq)], 1);
    const what = seq.isPinned ? "pinned" : seq.isSwapped ? "swapped" : "";
    const tokens = element(
      "span",
      {},
      count(seq.tokens, "token"),
      ...(what ? [element("br"), what] : []),
    );
    const who = element("div", { class: "who" }, chip, tokens);
    const row = element(
      "div",
      { class: `table ${what}` },
      who,
      element("div", { class: "entries" }, ...made),
    );
    this.rows.set(seq.id, { key, row });
    return row;
  }

  entry(seq, block, logical, isShared, isChanged) {
    const filled = Math.max(
      0,
      Math.min(this.state.blockSize, seq.tokens - logical * this.state.blockSize),
    );
    const classes = `entry${isShared ? " is-shared" : ""}${isChanged ? " changed" : ""}`;
    const pool = poolOf(seq);
    const label = `logical block ${logical} of ${seq.name} is block ${block}${seq.isSwapped ? " of the swap pool" : ""}`;
    const made = element(
      "button",
      {
        type: "button",
        class: classes,
        "data-place": `${pool}:${block}`,
        "aria-label": label,
        tabindex: logical ? -1 : 0,
      },
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
    if (this.chosen)
      document.querySelector(`.block[data-place="${this.chosen}"]`)?.classList.add("chosen");
    if (!place) {
      show(byId("about"), "", () => [
        element("p", { class: "quiet" }, "Point at a block, or tap it, to see its owners."),
      ]);
      return;
    }
    for (const other of document.querySelectorAll(`[data-place="${place}"]`))
      other.classList.add("linked");
    const [pool, number] = place.split(":");
    const lines = this.about(
      pool,
      Number(number),
      (held ?? {})[pool] ?? holdings(this.state, pool),
    );
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
      const byLogical = new Map(); // nearly always one entry: the holders share a prefix
      for (const { seq, logical } of holders)
        byLogical.set(logical, [...(byLogical.get(logical) ?? []), seq.name]);
      const whose = [...byLogical].map(
        ([logical, names]) => `logical block ${logical} of ${inList(names, 6)}`,
      );
      const counted = state.isCounted
        ? ` Reference count: ${pool.refCounts[block]}${look.isCached ? ", including the prefix cache" : ""}.`
        : "";
      lines.push(`It is ${inList(whose, 4)}, ${sinceWhen(state, poolName, block)}.${counted}`);
    }
    if (look.isCached)
      lines.push(holders.length ? "It is cached." : `Written ${sinceWhen(state, poolName, block)}.`);
    const kinds = (state.marks.get(`${poolName}:${block}`) ?? []).filter((kind) => kind in SIGNS);
    if (kinds.length)
      lines.push(`In this step: ${kinds.map((kind) => SIGNS[kind][1]).join(", then ")}.`);
    return lines;
  }

  inShort(look) {
    if (look.kind === "free") return "free";
    if (look.kind === "taken") return "just allocated";
    if (look.kind === "idle") return "idle: cached, but held by no sequence";
    const whose = `${look.numbers.length > 1 ? "requests" : "request"} ${inList(look.numbers.map(letterOf), 4)}`;
    if (look.kind === "reserved") return `reserved for ${whose}, empty`;
    return `${whose}, ${look.filled} of ${this.state.blockSize} slots filled`;
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
    byId("tables").addEventListener("keydown", (event) => {
      const to = { ArrowRight: "nextElementSibling", ArrowLeft: "previousElementSibling" }[
        event.key
      ];
      if (to === undefined || !event.target.matches(".entry")) return;
      event.preventDefault();
      event.stopPropagation();
      event.target[to]?.focus();
    });
    document.addEventListener("focusin", choose);
    document.addEventListener("click", choose); // some browsers do not focus a button that is tapped
  }
}
