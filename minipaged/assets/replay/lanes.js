/* What a step took on each of several ranks: one lane per rank.

   Every rank has its own clock. The lanes are put together at the moment when a rank's message had
   been sent (rank 0) or had arrived (the others). */

const SPANS = {
  message: ["message", "rank 0 sends it, and the others wait for it. Dashes: longer than drawn."],
  compute: ["compute", "a rank computes its part of the model."],
  all_reduce: ["all-reduce", "the ranks add up their partial sums, once all have them."],
  gather: ["gather", "rank 0 gets the logits of all ranks."],
};
const MOST_BEFORE = 1 / 3; // of the width after it: a worker may have waited for hours

/* The spans of one rank in their order: [[kind, microseconds], ...]. */
function inOrder({ message, compute, all_reduce: sums, gather }) {
  const layers = sums.flatMap((time, i) => [
    ["compute", compute[i]],
    ["all_reduce", time],
  ]);
  const [last, after] = compute.slice(sums.length);
  const end = [
    ["compute", last],
    ["gather", gather],
    ["compute", after],
  ];
  return [["message", message], ...layers, ...end];
}

/* What a lane says, for a rank whose times are known. */
function inWords(kind, rank) {
  const sums = kind === "all_reduce" ? ` (${rank.numAllReduces})` : "";
  return `${SPANS[kind][0]} ${inMilliseconds(sumOf([rank[kind]].flat()))}${sums}`;
}

class Lanes {
  constructor(events) {
    const lengths = events.map(({ event, spans }) => (event === "ranks" ? spans.length : 0));
    this.most = lengths.reduce((most, length) => Math.max(most, length), 0);
    byId("ranks").hidden = this.most === 0;
    const keys = Object.entries(SPANS).map(([kind, [word]]) =>
      element("span", {}, this.sample(kind), word),
    );
    byId("ranks-key").replaceChildren(...keys);
  }

  sample(kind) {
    return element("i", { class: `span ${kind} sample` });
  }

  /* For the legend of the page: [[picture, text], ...]. */
  explain() {
    if (this.most === 0) return [];
    return Object.entries(SPANS).map(([kind, [word, text]]) => [
      this.sample(kind),
      `${word[0].toUpperCase()}${word.slice(1)}: ${text}`,
    ]);
  }

  /* Until the ranks have computed a step, the lanes are empty, and keep their place on the page. */
  draw(ranks) {
    if (this.most === 0) return;
    const lengths = ranks.map((rank) => sumOf([...rank.compute, ...rank.all_reduce, rank.gather]));
    const after = Math.max(1, ...lengths);
    const before = Math.min(after * MOST_BEFORE, Math.max(0, ...ranks.map((rank) => rank.message)));
    show(byId("lanes"), JSON.stringify(ranks), () =>
      Array.from({ length: this.most }, (_, number) =>
        this.lane(number, ranks[number], before, before + after),
      ),
    );
    byId("ranks-axis").textContent = ranks.length
      ? `The line is when the message had arrived, by each rank's own clock. ` +
        `The longest lane ends ${inMilliseconds(after)} later.`
      : "The ranks have not computed this step yet.";
  }

  lane(number, rank, before, width) {
    const words = rank ? Object.keys(SPANS).map((kind) => inWords(kind, rank)) : ["\u2013"];
    const title = `Rank ${number}`;
    const label = `${title}: ${words.join(", ")}`;
    const bar = element("div", { class: "lane", role: "img", "aria-label": label });
    let at = before;
    for (const [kind, time] of rank ? inOrder(rank) : []) {
      const isMessage = kind === "message"; // it ends where the others begin
      const [from, to] = isMessage ? [Math.max(0, before - time), before] : [at, at + time];
      const isCut = isMessage && time > before;
      const made = element("i", { class: `span ${kind}${isCut ? " cut" : ""}` });
      made.style.left = `${(100 * from) / width}%`;
      made.style.width = `${(100 * (to - from)) / width}%`;
      bar.append(made);
      at = to;
    }
    if (rank) {
      const line = element("i", { class: "arrival" });
      line.style.left = `${(100 * before) / width}%`;
      bar.append(line);
    }
    const texts = words.map((each) => element("span", {}, each));
    const head = element("div", { class: "of-rank" }, element("b", {}, title), ...texts);
    return element("div", {}, head, bar);
  }
}
