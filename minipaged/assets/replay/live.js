/* The live page: a snapshot, then the events of every step, as the server sends them.

   Events are applied as they come, and drawn at most ten times per second. A pause closes the
   connection, and to follow again begins with a new snapshot: so nothing is kept meanwhile. */

const IS_CALM = matchMedia("(prefers-reduced-motion: reduce)").matches;
const FRAME_MS = IS_CALM ? 500 : 100;
const MARKED_MS = 500; // what has happened to a block is shown for so long
const RETRY_MS = 2000;
const MOST_DRAWN = 4096; // blocks of a pool
const MOST_ROWS = 24; // of a list
const REASONS = { stop: "", length: "", abort: "aborted", error: "failed" };

class LivePage extends View {
  constructor() {
    super();
    this.state = null;
    this.source = null;
    this.grids = [];
    this.recent = []; // [time, marks] of the last steps
    this.lastMarks = new Map(); // of the last one
    this.done = []; // newest first
    this.numDone = 0;
    this.listed = { waiting: new Map(), running: new Map(), swapped: new Map(), done: new Map() };
    this.timer = null; // of the next frame
    this.lastFrame = 0;
    this.curves = new Curves(byId("curves"));
    this.setLanes([]);
    this.listen();
    this.follow();
  }

  // ---- the connection

  follow() {
    clearTimeout(this.retry);
    this.say("Connecting", "waits");
    byId("follow").textContent = "Pause";
    this.source = new EventSource(`viz/events${location.search}`);
    this.source.addEventListener("snapshot", (event) => this.begin(JSON.parse(event.data)));
    this.source.addEventListener("step", (event) => this.take(JSON.parse(event.data)));
    this.source.addEventListener("error", () => {
      this.say("The server does not answer: trying again", "waits");
      if (this.source?.readyState !== EventSource.CLOSED) return; // the browser tries again
      clearTimeout(this.retry);
      this.retry = setTimeout(() => this.follow(), RETRY_MS);
    });
  }

  pause() {
    clearTimeout(this.retry);
    this.source.close();
    this.source = null;
    this.recent = [[0, this.lastMarks]]; // what the words tell, and no more
    this.say("Paused", "paused");
    byId("follow").textContent = "Follow";
    this.drawSoon();
  }

  say(text, kind) {
    document.body.className = kind;
    show(byId("status"), text, () => [element("i", { class: `dot ${kind}` }), text]);
  }

  // ---- what the server sends

  begin(event) {
    const why = refusal([event]);
    byId("empty").hidden = why === null;
    byId("player").hidden = why !== null;
    if (why !== null) {
      byId("empty").textContent = "The server has another version than this page: reload the page.";
      return this.pause();
    }
    const before = this.state;
    const shape = shapeOf([event]);
    if (before === null || event.step < before.step) this.forgetDone(); // a new server
    this.state = emptyState(shape);
    this.state.isLive = true;
    apply(this.state, event);
    this.recent = [];
    this.lastMarks = this.state.marks;
    const sizes = [shape.numBlocks, shape.numSwapBlocks, shape.blockSize];
    if (`${sizes}` !== this.sizes) this.setPools(shape);
    this.sizes = `${sizes}`;
    this.say("Live", "live");
    this.drawSoon();
    return undefined;
  }

  take(step) {
    const { state } = this;
    for (const event of step.events) apply(state, event);
    if (state.ranks.length > this.lanes.most) this.setLanes(step.events);
    this.lastMarks = state.marks;
    if (state.marks.size) this.recent.push([performance.now(), state.marks]);
    for (const one of step.done) {
      leaveQueues(state, one.request_id); // also those that waited: no block tells of their end
      this.done.unshift(one);
    }
    this.numDone += step.done.length;
    this.done.length = Math.min(this.done.length, MOST_ROWS);
    this.curves.note(step, state.pools.pool.size || 1);
    this.drawSoon();
  }

  forgetDone() {
    this.done = [];
    this.numDone = 0;
  }

  // ---- drawing

  /* Whether there are several ranks shows when they have computed a step. */
  setLanes(events) {
    this.lanes = new Lanes(events);
    const keys = "Keys: space pauses and follows, the arrow keys go from block to block.";
    this.setLegend(keys, this.lanes.explain());
  }

  setPools({ numBlocks, blockSize }) {
    for (const grid of this.grids) for (const part of grid.parts) part.remove();
    const title = `Pool: ${count(numBlocks, "block")} of ${count(blockSize, "slot")}`;
    this.grids = [this.makeGrid("pool", title, numBlocks, "large")];
  }

  makeGrid(name, title, size, most) {
    const grid = new PoolGrid(name, title, size, Math.min(size, MOST_DRAWN), most, "not drawn");
    byId("pools").querySelector(".over").before(...grid.parts);
    return grid;
  }

  drawSoon() {
    if (this.timer !== null) return;
    const wait = Math.max(0, this.lastFrame + FRAME_MS - performance.now());
    this.timer = setTimeout(() => requestAnimationFrame(() => this.draw()), wait);
  }

  draw() {
    this.timer = null;
    this.lastFrame = performance.now();
    if (this.state === null) return;
    this.forgetEnded();
    this.mergeMarks();
    const { state } = this;
    const held = { pool: holdings(state, "pool"), swap: holdings(state, "swap") };
    if (held.swap.size && this.grids.length === 1) {
      const { size } = state.pools.swap;
      this.grids.push(this.makeGrid("swap", `Swap pool: ${count(size, "block")}`, size, "small"));
    }
    for (const grid of this.grids) grid.draw(state, held[grid.name], true);
    if (this.source === null) this.drawArrows(); // else they would flicker
    else byId("arrows").replaceChildren();
    this.used = held.pool.size;
    show(byId("where"), `${state.step}`, () => [`step ${rounded(state.step)}`]);
    this.drawCounts(statistics(state, held.pool));
    if (state.ranks.length) this.lanes.draw(state.ranks); // else those of the last step stay
    this.drawLists();
    if (byId("last-step").open) this.drawWords();
    if (byId("all-tables").open) this.drawTables(held);
    if (this.pointed ?? this.chosen ?? byId("about").shownKey !== "") this.drawAbout(held);
    if (this.recent.length && this.source !== null) this.drawSoon(); // the marks will go
    this.frameMs = performance.now() - this.lastFrame;
  }

  /* Requests without a block and outside the queues: a server never ends, and they would add up. */
  forgetEnded() {
    const { requests, sequences, queues } = this.state;
    const open = new Set(Object.values(queues).flat());
    for (const seq of sequences.values()) open.add(seq.request);
    for (const request of requests.keys()) if (!open.has(request)) requests.delete(request);
  }

  /* Many steps may share a frame: show what has happened to a block in all of them. */
  mergeMarks() {
    const since = performance.now() - MARKED_MS;
    if (this.source !== null) this.recent = this.recent.filter(([time]) => time > since);
    const merged = new Map();
    for (const [, marks] of this.recent) {
      for (const [place, kinds] of marks) merged.set(place, [...(merged.get(place) ?? []), ...kinds]);
    }
    this.state.marks = merged;
  }

  // ---- the lists of requests

  drawLists() {
    const { queues } = this.state;
    const tokens = new Map(); // by request: of its longest sequence, and the number of sequences
    for (const seq of this.state.sequences.values()) {
      const [most, number] = tokens.get(seq.request) ?? [0, 0];
      tokens.set(seq.request, [Math.max(most, seq.tokens), number + 1]);
    }
    const size = (request) => {
      const [most, number] = tokens.get(request) ?? [0, 0];
      return [`${most ? count(most, "token") : ""}`, number > 1 ? `\u00d7${number}` : ""];
    };
    for (const [name, requests] of Object.entries(queues)) {
      this.drawList(
        name,
        requests.length,
        requests.slice(0, MOST_ROWS).map((request) => [request, ...size(request)]),
      );
    }
    const endings = this.done.map((one) => [
      one.request_id,
      REASONS[one.reason] || count(one.output_tokens, "token"),
      one.seconds === null ? "" : inSeconds(one.seconds),
    ]);
    this.drawList("done", this.numDone, endings);
  }

  /* Rows are kept while their request is in the list, so that only new ones light up. */
  drawList(name, number, entries) {
    const parent = byId(name);
    const rows = this.listed[name];
    show(byId(`num-${name}`), `${number}`, () => [rounded(number)]);
    const shown = entries.map(([request, left, right]) => {
      const row = rows.get(request) ?? this.makeRow(request);
      rows.set(request, row);
      show(row.left, left, () => [left]);
      show(row.right, right, () => [right]);
      return row.element;
    });
    const kept = new Set(entries.map(([request]) => request));
    for (const request of rows.keys()) if (!kept.has(request)) rows.delete(request);
    for (const row of [...parent.children]) if (!shown.includes(row)) row.remove();
    shown.forEach((row, i) => {
      if (parent.children[i] !== row) parent.insertBefore(row, parent.children[i] ?? null);
    });
  }

  makeRow(request) {
    const number = numberOf(this.state, request);
    const chip = element("span", { class: "chip" }, letterOf(number));
    paint(chip, [number], 1);
    const [left, right] = [element("span"), element("span", { class: "right" })];
    const row = element("li", { title: `request ${request}` }, chip, left, right);
    return { element: row, left, right };
  }

  // ---- listening, and the clock of the curves

  listen() {
    byId("follow").addEventListener("click", () => this.toggle());
    document.addEventListener("keydown", (event) => this.onKey(event));
    for (const details of document.querySelectorAll("details")) {
      details.addEventListener("toggle", () => this.drawSoon());
    }
    window.addEventListener("resize", () => this.drawSoon());
    this.listenToBlocks();
    let last = performance.now();
    setInterval(() => {
      const now = performance.now();
      for (; last + BUCKET_MS <= now; last += BUCKET_MS) this.tick();
      if (this.source !== null && (!IS_CALM || Math.floor(now / BUCKET_MS) % 4 === 0)) {
        this.curves.draw();
      }
    }, BUCKET_MS);
  }

  /* While the page is paused or the server away, nothing is known. */
  tick() {
    const isLive = this.source?.readyState === EventSource.OPEN && this.state !== null;
    if (!isLive) return this.curves.tick(null, null);
    const { queues, pools } = this.state;
    const batch = queues.running.length ? (this.curves.curves.batch.values.at(-1) ?? 0) : 0;
    return this.curves.tick((this.used ?? 0) / (pools.pool.size || 1), batch);
  }

  toggle() {
    if (this.source === null) this.follow();
    else this.pause();
  }

  onKey(event) {
    if (event.altKey || event.ctrlKey || event.metaKey) return;
    if (event.key === "Escape") {
      this.chosen = this.pointed = null;
      this.drawAbout();
    } else if (event.key === " " && !event.target.closest?.("button, summary, #words")) {
      event.preventDefault();
      this.toggle();
    }
  }
}

const page = new LivePage();
// For tests and for the curious: the only global name of this page.
window.live = {
  state: () => summary(page.state),
  numKnown: () => page.state.requests.size,
  frameMs: () => page.frameMs,
  pause: () => page.pause(),
  follow: () => page.follow(),
};
