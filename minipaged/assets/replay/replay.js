/* The page: draws the state of state.js with the blocks of blocks.js, and moves through the trace.

   The page is a function of the player's state. `draw` runs after every move and changes only the
   elements that look different. */

// Notes that are not about a block start with a word instead of a sign.
const WORDS = { computed: "compute", pinned: "pinned", ended: "ended", init: "begin" };
const MOST_TABLES = 32; // a page of more is hard to read
const MOST_ENTRIES = 48; // of one block table
const MOST_ARROWS = 8; // more of them would hide the blocks

// ---- the page -----------------------------------------------------------------------------------

class Page {
  constructor(events) {
    this.player = new Player(events);
    this.at = 0; // which stop
    this.stops = this.player.stops.steps;
    this.timer = null;
    this.pointed = null; // the block under the pointer; `chosen`: by click or focus
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
    const place = stops.findLastIndex(
      (stop) => stop > 0 && this.player.events[stop - 1].step <= step,
    );
    this.finely(false);
    this.go(Math.max(0, place));
  }

  /* Stop at every event, or only after every step; stay at the same place of the trace. */
  finely(isFine) {
    byId("finely").checked = isFine;
    const here = this.stops[this.at];
    this.stops = isFine ? this.player.stops.moments : this.player.stops.steps;
    const next = this.stops.findIndex((stop) => stop >= here);
    this.at = next < 0 ? this.stops.length - 1 : next;
  }

  play() {
    if (this.at === this.stops.length - 1) this.go(0);
    byId("words").setAttribute("aria-live", "off"); // too fast to be read aloud
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

  // ---- drawn once

  setPools() {
    const { numBlocks, numSwapBlocks, used } = this.player.shape;
    // Of a pool much larger than its trace needs, draw only the part that is used.
    const shown = (size, reach, few) =>
      size <= few ? size : Math.min(size, Math.max(few, 16 * Math.ceil(reach / 16)));
    const slots = count(this.player.shape.blockSize, "slot");
    const title = `Pool: ${count(numBlocks, "block")} of ${slots}`;
    this.grids = [new PoolGrid("pool", title, numBlocks, shown(numBlocks, used.pool, 64))];
    if (numSwapBlocks > 0 && used.swap > 0) {
      const swapTitle = `Swap pool: ${count(numSwapBlocks, "block")}`;
      this.grids.push(
        new PoolGrid(
          "swap",
          swapTitle,
          numSwapBlocks,
          shown(numSwapBlocks, used.swap, 16),
          "medium",
        ),
      );
    }
    byId("pools").prepend(...this.grids.flatMap((grid) => grid.parts));
  }

  setCurve() {
    const { curve, shape } = this.player;
    const every = Math.max(1, Math.floor(curve.length / 800)); // more points cannot be seen
    const last = Math.max(1, curve.length - 1);
    const line = (valueOf) =>
      curve.flatMap((one, i) =>
        i % every && i < last
          ? []
          : [`${((1000 * i) / last).toFixed(1)},${(96 - 92 * valueOf(one)).toFixed(1)}`],
      );
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
    ];
    const whole =
      "A thick outline marks a block that changed in this step; its sign tells how. A/2 is the " +
      "second sequence of request A. Keys: space plays and pauses, the arrow keys go one step back or " +
      "forward, Home and End go to the beginning and the end.";
    byId("legend-body").replaceChildren(
      ...rows.map(([picture, text]) => element("div", {}, picture, element("p", {}, text))),
      element("p", { class: "whole" }, whole),
    );
  }

  // ---- drawn after every move

  draw(isMove) {
    const { state } = this;
    this.drawWords(); // first: it scrolls, which is cheap before anything else has changed
    const held = Object.fromEntries(
      this.grids.map((grid) => [grid.name, holdings(state, grid.name)]),
    );
    for (const grid of this.grids) grid.draw(state, held[grid.name], isMove);
    this.drawArrows();
    this.drawWhere();
    this.drawCounts(statistics(state, held.pool));
    this.drawQueues();
    this.drawTables(held);
    this.drawAbout(held);
  }

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

  drawWhere() {
    const { steps } = this.player.stops;
    const slider = byId("place");
    slider.max = this.stops.length - 1;
    slider.value = this.at;
    const place = steps.findIndex((stop) => stop >= this.state.numEvents);
    const x = (1000 * Math.max(0, place)) / Math.max(1, steps.length - 1);
    for (const end of ["x1", "x2"]) byId("curve").querySelector(".cursor").setAttribute(end, x);
    const last = this.player.events.at(-1).step;
    const within = byId("finely").checked
      ? `, event ${this.state.numEvents} of ${this.player.events.length}`
      : "";
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

  drawQueues() {
    const { queues } = this.state;
    show(byId("queues"), JSON.stringify([queues, this.state.requests.size]), () =>
      Object.entries(queues).flatMap(([name, requests]) => {
        const shown = requests.slice(0, 12).map((request) => this.request(request));
        const more = requests.length - shown.length;
        if (more > 0) shown.push(element("span", { class: "gap" }, `and ${more} more`));
        if (!requests.length) shown.push(element("span", { class: "gap" }, "none"));
        return [element("dt", {}, `${name}`), element("dd", {}, ...shown)];
      }),
    );
  }

  request(request) {
    const known = this.state.requests.get(request);
    const chip = element(
      "span",
      { class: known ? "chip" : "chip unknown" },
      known ? letterOf(known.number) : "\u2026",
    );
    if (known) paint(chip, [known.number], 1);
    const id = element("span", { class: "id", title: request }, request);
    return element("span", { class: "request" }, chip, id);
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
      lines.push(`It is ${inList(whose, 4)}, since step ${pool.since[block]}.${counted}`);
    }
    if (look.isCached)
      lines.push(holders.length ? "It is cached." : `Written since step ${pool.since[block]}.`);
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

  // ---- listening

  listen() {
    const onClick = {
      first: () => this.go(0),
      back: () => this.go(this.at - 1),
      forward: () => this.go(this.at + 1),
    };
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
    // Controls keep their own keys: a button the space bar, a slider and a choice the arrow keys.
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

/* The events, and why they cannot be replayed: null if they can. */
function readTrace() {
  try {
    const events = JSON.parse(byId("trace").textContent);
    return [events, refusal(events)];
  } catch (error) {
    return [[], `This trace is no JSON (${error.message}): record it again.`];
  }
}

function begin() {
  const [events, why] = readTrace();
  if (why !== null || !events.some((event) => event.event === "schedule")) {
    byId("empty").hidden = false;
    if (why !== null) byId("empty").textContent = why;
    return;
  }
  byId("player").hidden = false;
  const page = new Page(events);
  byId("legend").open = window.innerHeight >= 800 && window.innerWidth > 900;
  // For tests and for the curious: the only global name of this page.
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
