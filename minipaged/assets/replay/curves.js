/* Small curves over the last minute: one value per quarter of a second, newest at the right. */

const BUCKETS = 240;
const BUCKET_MS = 250;
const PER_SECOND = 1000 / BUCKET_MS;

/* What is drawn: its name, how a value is written, and the value at the top (null: the largest). */
const CURVES = {
  usage: { title: "KV usage", write: (value) => `${Math.round(100 * value)}%`, top: 1 },
  batch: { title: "Batch size", write: (value) => `${value}`, top: null },
  ttft: { title: "TTFT", write: (value) => inSeconds(value), top: null, isDots: true },
  speed: { title: "Tokens per second", write: (value) => rounded(value), top: null },
};

function inSeconds(seconds) {
  if (seconds < 0.01) return `${(1000 * seconds).toFixed(1)} ms`;
  return seconds < 1 ? `${Math.round(1000 * seconds)} ms` : `${seconds.toFixed(1)} s`;
}

function rounded(value) {
  return Math.round(value).toLocaleString("en");
}

/* One curve: a name, the value now, the largest of the minute, and the line or dots. */
class Curve {
  constructor({ title, write, top, isDots = false }) {
    Object.assign(this, { title, write, top, isDots });
    this.values = new Array(BUCKETS).fill(null); // null: nothing is known
    this.now = element("b", {}, "\u2013");
    this.most = element("span", { class: "most" });
    const svg = "http://www.w3.org/2000/svg";
    this.paths = ["area", "line"].map((name) => {
      const path = document.createElementNS(svg, "path");
      path.setAttribute("class", isDots ? "dots" : name);
      return path;
    });
    this.picture = document.createElementNS(svg, "svg");
    this.picture.setAttribute("viewBox", "0 0 1000 100");
    this.picture.setAttribute("preserveAspectRatio", "none");
    this.picture.setAttribute("role", "img");
    this.picture.append(...this.paths);
    const caption = element("figcaption", {}, element("span", {}, title), this.now);
    this.figure = element("figure", { class: "curve" }, caption, this.picture, this.most);
  }

  /* The minute moves on by one value. */
  push(value) {
    this.values.shift();
    this.values.push(value);
  }

  /* The values with their places, cut where nothing is known: while the page was paused. */
  runs() {
    const runs = [];
    this.values.forEach((value, i) => {
      if (value === null) return;
      if (i > 0 && this.values[i - 1] !== null) runs.at(-1).push([value, i]);
      else runs.push([[value, i]]);
    });
    return runs;
  }

  draw() {
    const known = this.values.filter((value) => value !== null);
    const last = known.at(-1) ?? null;
    const most = Math.max(0, ...known);
    const top = this.top ?? (most || 1);
    const place = (value, i) =>
      `${((1000 * i) / (BUCKETS - 1)).toFixed(1)},${(94 - (88 * value) / top).toFixed(1)}`;
    const [area, line] = this.paths;
    if (this.isDots) {
      const dots = this.values.map((value, i) => (value === null ? "" : `M${place(value, i)}h.01`));
      line.setAttribute("d", dots.join(""));
    } else {
      const runs = this.runs().map((run) => run.map(([value, i]) => place(value, i)));
      line.setAttribute("d", runs.map((points) => `M${points.join("L")}`).join(""));
      const x = (point) => point.split(",")[0];
      const closed = runs.map(
        (points) => `M${points.join("L")}L${x(points.at(-1))},100L${x(points[0])},100Z`,
      );
      area.setAttribute("d", closed.join(""));
    }
    this.now.textContent = last === null ? "\u2013" : this.write(last);
    this.most.textContent = known.length ? `max ${this.write(most)}` : "";
    const label = last === null ? "nothing yet" : `${this.write(last)} now, most ${this.write(most)}`;
    this.picture.setAttribute("aria-label", `${this.title} in the last minute: ${label}`);
  }
}

/* All curves, and what has happened since the last value of each. */
class Curves {
  constructor(parent) {
    this.curves = Object.fromEntries(
      Object.entries(CURVES).map(([name, what]) => [name, new Curve(what)]),
    );
    this.sampled = new Array(PER_SECOND).fill(0); // tokens, by the buckets of the last second
    this.clear();
    parent.replaceChildren(...Object.values(this.curves).map((curve) => curve.figure));
    for (const curve of Object.values(this.curves)) curve.draw();
  }

  clear() {
    this.next = { usage: null, batch: null, ttft: null, sampled: 0 };
  }

  /* The numbers of one step, and the requests that it ended. */
  note({ sequences, sampled, blocks, done }, numBlocks) {
    const { next } = this;
    if (sequences !== undefined) {
      next.usage = Math.max(next.usage ?? 0, blocks / numBlocks);
      next.batch = Math.max(next.batch ?? 0, sequences);
      next.sampled += sampled;
    }
    for (const { ttft } of done) if (ttft !== null) next.ttft = Math.max(next.ttft ?? 0, ttft);
  }

  /* Close a bucket. Without a step in it, usage and batch size are those of now. */
  tick(usage, batch) {
    const { next } = this;
    this.sampled = [...this.sampled.slice(1), next.sampled];
    this.curves.usage.push(next.usage ?? usage);
    this.curves.batch.push(next.batch ?? batch);
    this.curves.ttft.push(next.ttft);
    this.curves.speed.push(this.sampled.reduce((sum, number) => sum + number, 0));
    this.clear();
  }

  draw() {
    for (const curve of Object.values(this.curves)) curve.draw();
  }
}
