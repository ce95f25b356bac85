/* The page that replays a trace: draws the state of state.js with view.js, and moves through it.

   The page is a function of the player's state. `draw` runs after every move and changes only the
   elements that look different. */

// ---- the page -----------------------------------------------------------------------------------

class Page extends View {
  constructor(events) {
    super();
    this.player = new Player(events);
    this.at = 0; // which stop
    this.stops = this.player.stops.steps;
    this.timer = null;
    this.setPools();
    this.setCurve();
    this.lanes = new Lanes(events);
    this.setLegend(
      "Keys: space plays and pauses, the arrow keys go one step back or forward, Home and End go to " +
        "the beginning and the end.",
      this.lanes.explain(),
    );
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
    this.lanes.draw(state.ranks);
    this.drawQueues();
    this.drawTables(held);
    this.drawAbout(held);
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
