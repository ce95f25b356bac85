/* What a trace says, and nothing about how it is drawn.

   A trace is a list of events (minipaged/tracing/events.py describes each kind). The whole picture is a
   function of it:

       state = apply(apply(apply(emptyState(shape), event 0), event 1), event 2) ...

   To go back, begin again from an earlier copy of the state: nothing is ever undone. There are two
   pools, "pool" (the one that attention reads) and "swap". A block is a number in one of them.
   Kinds of events that are not known here are passed over. */

// ---- a state, and the shape of its pools ----------------------------------------------------------

function emptyPool(size) {
  return {
    size,
    holders: new Array(size).fill(0), // how many sequences have the block in their block table
    owners: new Array(size).fill(0), // what the allocator counts; the prefix cache is an owner too
    since: new Array(size).fill(0), // the step in which its content began
    lastRequest: new Array(size).fill(null), // who held it last: a cached block outlives its request
  };
}

function emptyState(shape) {
  return {
    numEvents: 0,
    step: 0,
    time: 0,
    blockSize: shape.blockSize,
    pools: { pool: emptyPool(shape.numBlocks), swap: emptyPool(shape.numSwapBlocks) },
    isCounted: false, // whether an allocator reported its counts; rivals of paging have none
    sequences: new Map(), // those that hold blocks, by id
    requests: new Map(), // all that ever ran, by name: their number, and the names of their sequences
    cached: new Set(), // blocks of the pool that can be found by their content
    queues: { running: [], waiting: [], swapped: [] },
    totals: { preempted: 0, copied: 0, evicted: 0, found: 0 },
    // What happened in this step:
    isScheduled: true, // the scheduler has decided it; before the first step there is nothing to decide
    marks: new Map(), // "pool:7" -> kinds of what happened to the block
    moves: [], // [["pool:7", "swap:2"], ...]: keys and values that were copied
    notes: [], // the same in words
    givenUp: new Map(), // request -> blocks that the scheduler took from it
  };
}

/* The sizes of the pools: as the trace says or, where it does not, as large as what it speaks of. */
function shapeOf(events) {
  const said = events.find((event) => event.event === "pool");
  const used = { pool: 0, swap: 0 };
  const size = { least: 1, most: Infinity };
  for (const event of events) {
    for (const [pool, block] of blocksNamedBy(event)) used[pool] = Math.max(used[pool], block + 1);
    if (!said && event.event === "admit") narrowBlockSize(size, event);
  }
  if (said) {
    const numBlocks = Math.max(said.num_blocks, used.pool);
    const numSwapBlocks = Math.max(said.num_swap_blocks, used.swap);
    return { numBlocks, numSwapBlocks, blockSize: said.block_size, used };
  }
  return { numBlocks: used.pool, numSwapBlocks: used.swap, blockSize: likelyBlockSize(size), used };
}

function blocksNamedBy(event) {
  if (Number.isInteger(event.block)) return [[event.pool ?? "pool", event.block]];
  const from = event.event === "swap_in" ? "swap" : "pool";
  const to = event.event === "swap_out" ? "swap" : "pool";
  const named = (event.pairs ?? []).flatMap(([a, b]) => [
    [from, a],
    [to, b],
  ]);
  const tables = [event.blocks ?? [], ...Object.values(event.seqs ?? {})].flat();
  return named.concat(tables.map((block) => [to, block]));
}

/* n tokens in b blocks: a block has room for n / b at least, and n tokens do not fit into b - 1. */
function narrowBlockSize(size, event) {
  for (const [seq, blocks] of Object.entries(event.seqs)) {
    const tokens = event.tokens[seq];
    if (blocks.length === 0) continue;
    size.least = Math.max(size.least, Math.ceil(tokens / blocks.length));
    if (blocks.length > 1)
      size.most = Math.min(size.most, Math.ceil(tokens / (blocks.length - 1)) - 1);
  }
}

function likelyBlockSize({ least, most }) {
  const power = 2 ** Math.ceil(Math.log2(least));
  return most === Infinity ? Math.max(16, power) : power <= most ? power : least;
}

// ---- names and lists in words ---------------------------------------------------------------------

/* 0 -> A, 25 -> Z, 26 -> AA: requests in the order of their admission. */
function letterOf(number) {
  const last = String.fromCharCode(65 + (number % 26));
  return number < 26 ? last : letterOf(Math.floor(number / 26) - 1) + last;
}

function inList(words, most = 8) {
  const shown =
    words.length > most ? [...words.slice(0, most), `${words.length - most} more`] : words;
  return shown.length < 2 ? shown.join("") : `${shown.slice(0, -1).join(", ")} and ${shown.at(-1)}`;
}

/* [3] -> "block 3", [3, 4, 5, 6, 9] -> "blocks 3 to 6 and 9" */
function blocksInWords(blocks, kind = "block") {
  const runs = [];
  for (const block of blocks) {
    const run = runs.at(-1);
    if (run && block === run[1] + 1) run[1] = block;
    else runs.push([block, block]);
  }
  const parts = runs.flatMap(([first, last]) =>
    last - first > 1
      ? [`${first} to ${last}`]
      : first === last
        ? [`${first}`]
        : [`${first}`, `${last}`],
  );
  return `${kind}${blocks.length === 1 ? "" : "s"} ${inList(parts)}`;
}

function count(number, word) {
  return `${number} ${word}${number === 1 ? "" : "s"}`;
}

function letterOfRequest(state, request) {
  return letterOf(requestOf(state, request).number);
}

function requestOf(state, request) {
  if (!state.requests.has(request)) {
    state.requests.set(request, { number: state.requests.size, sequences: new Map() });
  }
  return state.requests.get(request);
}

/* The first sequence of a request is A, the others, its samples or beams, are A/2, A/3, ... */
function nameOf(state, request, seq) {
  const { number, sequences } = requestOf(state, request);
  if (!sequences.has(seq)) sequences.set(seq, sequences.size + 1);
  const ordinal = sequences.get(seq);
  return letterOf(number) + (ordinal > 1 ? `/${ordinal}` : "");
}

// ---- who holds which block ------------------------------------------------------------------------

function poolOf(seq) {
  return seq.isSwapped ? "swap" : "pool";
}

function hold(state, seq, blocks) {
  const pool = state.pools[poolOf(seq)];
  for (const block of blocks) {
    const isKnown = !seq.isSwapped && state.cached.has(block);
    if (pool.holders[block] === 0 && !isKnown) pool.since[block] = state.step;
    pool.holders[block] += 1;
    pool.lastRequest[block] = seq.request;
  }
}

/* Let go of blocks, and mark those that nobody holds any more. */
function letGo(state, seq, blocks) {
  const name = poolOf(seq);
  const pool = state.pools[name];
  for (const block of blocks) {
    pool.holders[block] -= 1;
    if (pool.holders[block] === 0) {
      const stays = name === "pool" && state.cached.has(block);
      mark(state, name, block, stays ? "idle" : "freed");
    }
  }
}

function setTable(state, seq, blocks, isSwapped) {
  letGo(state, seq, seq.blocks);
  seq.isSwapped = isSwapped;
  seq.blocks = [...blocks];
  hold(state, seq, seq.blocks);
}

function addSequence(state, id, request, blocks, tokens, more = {}) {
  const old = state.sequences.get(id);
  if (old) letGo(state, old, old.blocks);
  const name = nameOf(state, request, id);
  const seq = { id, request, name, blocks: [...blocks], tokens, isSwapped: false, ...more };
  state.sequences.set(id, seq);
  hold(state, seq, seq.blocks);
  return seq;
}

/* Exchange blocks of a table one for one: [[old, new], ...]. */
function exchange(state, seq, pairs) {
  const to = new Map(pairs);
  const moved = seq.blocks.filter((block) => to.has(block));
  hold(
    state,
    seq,
    moved.map((block) => to.get(block)),
  );
  seq.blocks = seq.blocks.map((block) => to.get(block) ?? block);
  letGo(state, seq, moved);
}

function namesOfHolders(state, block, besides, pool = "pool") {
  return [...state.sequences.values()]
    .filter((seq) => seq !== besides && poolOf(seq) === pool && seq.blocks.includes(block))
    .map((seq) => seq.name);
}

// ---- marks and notes: what happened in this step --------------------------------------------------

function mark(state, pool, block, kind) {
  const key = `${pool}:${block}`;
  const kinds = state.marks.get(key) ?? [];
  if (!kinds.includes(kind)) kinds.push(kind);
  state.marks.set(key, kinds);
}

/* Keys and values are copied from one block to another. */
function move(state, [fromPool, from, fromKind], [toPool, to, toKind]) {
  mark(state, fromPool, from, fromKind);
  mark(state, toPool, to, toKind);
  state.moves.push([`${fromPool}:${from}`, `${toPool}:${to}`]);
}

function markAll(state, pool, blocks, kind) {
  for (const block of blocks) mark(state, pool, block, kind);
}

function note(state, kind, text) {
  state.notes.push({ kind, text });
}

/* One sentence for several alike: "A takes block 7, B block 8 for the next tokens." */
function noteTogether(state, kind, item, inWords) {
  let same = state.notes.find((other) => other.kind === kind && other.items);
  if (!same) state.notes.push((same = { kind, items: [] }));
  same.items.push(item);
  same.text = inWords(same.items);
}

function beginStep(state, step) {
  state.step = step;
  state.isScheduled = false;
  state.marks = new Map();
  state.moves = [];
  state.notes = [];
  state.givenUp = new Map();
}

// ---- the events -----------------------------------------------------------------------------------

const handlers = {
  /* A memory is built: with another engine on the same log, everything begins anew. */
  pool(state, event) {
    const { pool, swap } = state.pools;
    const shape = { blockSize: event.block_size, numBlocks: pool.size, numSwapBlocks: swap.size };
    const { numEvents, step, time } = state;
    Object.assign(state, emptyState(shape), { numEvents, step, time });
    const more = event.num_swap_blocks ? `, and a swap pool of ${event.num_swap_blocks}` : "";
    const size = `${count(event.num_blocks, "block")} of ${count(event.block_size, "slot")}`;
    note(state, "pool", `A pool of ${size} is built${more}. All of it is free.`);
  },

  admit(state, event) {
    for (const [key, blocks] of Object.entries(event.seqs)) {
      const [id, tokens, found] = [Number(key), event.tokens[key], event.found?.[key] ?? 0];
      const cameBack = state.requests.get(event.request)?.sequences.has(id) ?? false;
      const known = blocks.slice(0, Math.ceil(found / state.blockSize));
      const others = new Map(known.map((block) => [block, namesOfHolders(state, block)]));
      const seq = addSequence(state, id, event.request, blocks, tokens);
      markAll(state, "pool", blocks.slice(known.length), "new");
      markAll(state, "pool", known, "found");
      noteAdmission(state, seq, blocks.slice(known.length), cameBack);
      if (found) noteFound(state, seq, known, found, others);
    }
  },

  append(state, event) {
    const seq = state.sequences.get(event.seq);
    if (!seq) return;
    seq.blocks.push(...event.blocks);
    hold(state, seq, event.blocks);
    if (event.tokens > seq.tokens) mark(state, poolOf(seq), seq.blocks.at(-1), "written");
    seq.tokens = event.tokens;
    markAll(state, "pool", event.blocks, "new");
    if (event.blocks.length === 0) return;
    noteTogether(state, "new", [seq.name, event.blocks], (items) => {
      const takes = items.map(([name, blocks]) => `${name} takes ${blocksInWords(blocks)}`);
      return `A new block is needed for the next token: ${inList(takes)}.`;
    });
  },

  copy_on_write(state, event) {
    const seq = state.sequences.get(event.seq);
    if (!seq) return;
    state.totals.copied += event.pairs.length;
    for (const [source, target] of event.pairs) {
      const others = inList(namesOfHolders(state, source, seq), 3) || "the prefix cache";
      move(state, ["pool", source, "source"], ["pool", target, "copy"]);
      const owns = others.includes(" and ") ? "own" : "owns";
      const what = `${seq.name} writes to block ${source}, which ${others} ${owns} too`;
      note(state, "copy", `${what}: it is copied to block ${target} (copy-on-write).`);
    }
    exchange(state, seq, event.pairs);
  },

  merge(state, event) {
    const seq = state.sequences.get(event.seq);
    if (!seq) return;
    for (const [old, known] of event.pairs) {
      mark(state, "pool", known, "merged");
      const what = `Block ${old} of ${seq.name} holds the same as block ${known}, known before`;
      note(state, "merged", `${what}: ${seq.name} uses block ${known}, and lets go of its own.`);
    }
    exchange(state, seq, event.pairs);
  },

  fork(state, event) {
    const parent = state.sequences.get(event.parent);
    if (!parent) return;
    const isWhole = !state.isCounted && event.tokens === parent.tokens; // a reserved run is one piece
    const inUse = Math.ceil(event.tokens / state.blockSize);
    const blocks = isWhole ? parent.blocks : parent.blocks.slice(0, inUse);
    const { isSwapped } = parent;
    const child = addSequence(state, event.child, parent.request, blocks, event.tokens, {
      isSwapped,
    });
    markAll(state, poolOf(child), blocks, "shared");
    noteTogether(state, "shared", [child.name, parent.name], (items) => {
      const forks = items.map(([name, from]) => `${name} from ${from}`);
      return `Forked, and sharing all blocks for now: ${inList(forks)}.`;
    });
  },

  free(state, event) {
    const seq = state.sequences.get(event.seq);
    if (!seq) return;
    state.sequences.delete(event.seq);
    letGo(state, seq, seq.blocks);
    const goesOn = [...state.sequences.values()].some((other) => other.request === seq.request);
    if (!goesOn) leaveQueues(state, seq.request);
    if (state.isScheduled) noteEnd(state, seq, goesOn);
    else state.givenUp.set(seq.request, [...(state.givenUp.get(seq.request) ?? []), ...seq.blocks]);
  },

  swap_out(state, event) {
    const letter = letterOfRequest(state, event.request);
    for (const [from, to] of event.pairs) move(state, ["pool", from, "out"], ["swap", to, "out"]);
    moveTables(state, event.seqs, true);
    const moved = `${count(event.pairs.length, "block")} ${event.pairs.length === 1 ? "goes" : "go"}`;
    note(state, "out", `${letter} is preempted (swapping): ${moved} to the swap pool.`);
  },

  swap_in(state, event) {
    const letter = letterOfRequest(state, event.request);
    for (const [from, to] of event.pairs) move(state, ["swap", from, "in"], ["pool", to, "in"]);
    moveTables(state, event.seqs, false);
    const copied = new Set(event.pairs.map(([, to]) => to));
    const known = [...new Set(Object.values(event.seqs).flat())].filter(
      (block) => !copied.has(block),
    );
    markAll(state, "pool", known, "found");
    const need = known.length > 1 ? "need" : "needs";
    const rest = known.length
      ? ` ${count(known.length, "block")} ${need} no copy: the prefix cache still knows the content.`
      : "";
    note(
      state,
      "in",
      `${letter} comes back: ${count(copied.size, "block")} copied from the swap pool.${rest}`,
    );
  },

  cache(state, event) {
    for (const block of event.blocks) state.cached.add(block);
    markAll(state, "pool", event.blocks, "known");
    const name = state.sequences.get(event.seq)?.name ?? "?";
    noteTogether(state, "known", [name, event.blocks], (items) => {
      const parts = items.map(([owner, blocks]) => `${blocksInWords(blocks)} of ${owner}`);
      return `Full and written, so the prefix cache knows them from now on: ${inList(parts)}.`;
    });
  },

  evict(state, { block }) {
    state.cached.delete(block);
    state.totals.evicted += 1;
    state.pools.pool.since[block] = state.step;
    mark(state, "pool", block, "evicted");
    noteTogether(state, "evicted", block, (blocks) => {
      const which = blocksInWords([...blocks].sort((a, b) => a - b));
      const was = blocks.length === 1 ? "was" : "were";
      return `No empty block is left, so the prefix cache gives up what ${was} unused for longest: ${which} (eviction).`;
    });
  },

  pin(state, event) {
    const tokens = event.blocks.length * state.blockSize;
    const seq = addSequence(state, event.seq, `prefix ${event.seq}`, event.blocks, tokens, {
      isPinned: true,
    });
    const what = `${seq.name} is a pinned prefix: ${blocksInWords(event.blocks)}`;
    note(
      state,
      "pinned",
      `${what} ${event.blocks.length === 1 ? "stays" : "stay"} until it is freed.`,
    );
  },

  preempt(state, event) {
    state.totals.preempted += 1;
    if (event.mode === "swap") return; // swap_out has said it
    const blocks = new Set(state.givenUp.get(event.request));
    const gives = `it gives up ${count(blocks.size, "block")}, and waits to be computed again`;
    note(
      state,
      "freed",
      `${letterOfRequest(state, event.request)} is preempted (recomputation): ${gives}.`,
    );
  },

  end(state, event) {
    note(
      state,
      "freed",
      `${letterOfRequest(state, event.request)} ends for want of memory, with what it has.`,
    );
  },

  schedule(state, event) {
    state.isScheduled = true;
    state.queues = { running: event.running, waiting: event.waiting, swapped: event.swapped };
    noteComputed(state, event.tokens);
  },

  allocate: recount,
  share: recount,
  release: recount,
};

function recount(state, event) {
  state.isCounted = true;
  state.pools[event.pool].owners[event.block] = event.owners;
}

function moveTables(state, tables, isSwapped) {
  for (const [key, blocks] of Object.entries(tables)) {
    const seq = state.sequences.get(Number(key));
    if (seq) setTable(state, seq, blocks, isSwapped);
  }
}

function leaveQueues(state, request) {
  for (const [name, requests] of Object.entries(state.queues)) {
    state.queues[name] = requests.filter((other) => other !== request);
  }
}

function noteAdmission(state, seq, blocks, cameBack) {
  const is = cameBack ? "is admitted again, to be recomputed" : "is admitted";
  const takes = blocks.length
    ? `: ${blocksInWords(blocks)} for its ${count(seq.tokens, "token")}`
    : "";
  note(state, "new", `${seq.name} ${is}${takes}.`);
}

function noteFound(state, seq, known, found, others) {
  state.totals.found += found;
  const owners = [...new Set([...others.values()].flat())];
  const whose = owners.length
    ? `which ${inList(owners, 3)} ${owners.length > 1 ? "own" : "owns"} too`
    : "known from an ended request";
  const are = known.length > 1 ? "are" : "is";
  const text = `${blocksInWords(known, "Block")}, ${whose}, ${are} found: ${seq.name} need not compute ${count(found, "token")}.`;
  note(state, "found", text);
}

function noteEnd(state, seq, goesOn) {
  if (goesOn) {
    noteTogether(
      state,
      "ended",
      seq.name,
      (names) =>
        `${inList(names)} ${names.length > 1 ? "end or are" : "ends or is"} given up; blocks that nobody else owns are free.`,
    );
    return;
  }
  const cached =
    poolOf(seq) === "pool" ? seq.blocks.filter((block) => state.cached.has(block)) : [];
  const kept = cached.length
    ? ` The prefix cache keeps ${cached.length} of them, as long as nobody needs the room.`
    : "";
  const what = seq.isPinned ? "is pinned no longer" : "has ended";
  note(
    state,
    "freed",
    `${seq.name} ${what}: it lets go of ${count(seq.blocks.length, "block")}.${kept}`,
  );
}

function noteComputed(state, tokens) {
  const byNumber = new Map(); // how many tokens -> the sequences that compute as many
  let total = 0;
  for (const [key, number] of Object.entries(tokens)) {
    const name = state.sequences.get(Number(key))?.name ?? "?";
    byNumber.set(number, [...(byNumber.get(number) ?? []), name]);
    total += number;
  }
  if (total === 0) return;
  const parts = [...byNumber].map(
    ([number, names]) => `${number}${names.length > 1 ? " each" : ""} of ${inList(names)}`,
  );
  const whose =
    Object.keys(tokens).length === 1 ? ` of ${[...byNumber.values()][0]}` : `: ${parts.join("; ")}`;
  note(state, "computed", `The model computes ${count(total, "token")}${whose}.`);
}

/* The next state, in place: whoever wants to keep the old one copies it first. */
function apply(state, event) {
  if (event.step !== state.step) beginStep(state, event.step);
  state.numEvents += 1;
  state.time = event.time;
  if (Object.hasOwn(handlers, event.event)) handlers[event.event](state, event);
  return state;
}

// ---- what is read off a state ---------------------------------------------------------------------

/* For every block that sequences hold: which, at which place, and how many slots are filled. */
function holdings(state, poolName) {
  const held = new Map();
  for (const seq of state.sequences.values()) {
    if (poolOf(seq) !== poolName) continue;
    seq.blocks.forEach((block, logical) => {
      const filled = Math.max(0, Math.min(state.blockSize, seq.tokens - logical * state.blockSize));
      const one = held.get(block) ?? { holders: [], filled: 0 };
      one.holders.push({ seq, logical });
      one.filled = Math.max(one.filled, filled);
      held.set(block, one);
    });
  }
  return held;
}

function statistics(state, held = holdings(state, "pool")) {
  const all = [...held.values()];
  const idle = [...state.cached].filter((block) => !held.has(block)).length;
  const slots = held.size * state.blockSize;
  const filled = all.reduce((sum, block) => sum + block.filled, 0);
  return {
    used: held.size,
    idle,
    cached: state.cached.size,
    shared: all.filter((block) => block.holders.length > 1).length,
    free: state.pools.pool.size - held.size - idle,
    filled,
    slots,
  };
}

/* The state as plain JSON, for tests. */
function summary(state) {
  const counts = (numbers) =>
    Object.fromEntries([...numbers.entries()].filter(([, number]) => number));
  const held = (name) =>
    Object.fromEntries(
      [...holdings(state, name)].map(([b, { holders, filled }]) => [b, [holders.length, filled]]),
    );
  return {
    step: state.step,
    events: state.numEvents,
    sequences: Object.fromEntries(
      [...state.sequences.values()].map(({ id, request, blocks, tokens, isSwapped }) => [
        id,
        { request, blocks: [...blocks], tokens, swapped: isSwapped },
      ]),
    ),
    owners: { pool: counts(state.pools.pool.owners), swap: counts(state.pools.swap.owners) },
    holders: { pool: counts(state.pools.pool.holders), swap: counts(state.pools.swap.holders) },
    held: { pool: held("pool"), swap: held("swap") },
    cached: [...state.cached].sort((a, b) => a - b),
    queues: state.queues,
    totals: state.totals,
    notes: state.notes.map((one) => one.text),
  };
}

// ---- going to any place of a trace ----------------------------------------------------------------

const COUNTING = new Set(["allocate", "share", "release"]); // they belong to the event after them

/* Where one can stop, as numbers of events: after each step, and after each event that says something.
   A memory that is built begins a new stop, though its event bears the number of the step before. */
function stopsOf(events) {
  const stops = { steps: [], moments: [] };
  events.forEach((event, index) => {
    const next = events[index + 1];
    const isLast = !next || next.step !== event.step || next.event === "pool";
    if (isLast) stops.steps.push(index + 1);
    if (isLast || !COUNTING.has(event.event)) stops.moments.push(index + 1);
  });
  const beginsAtOnce = events.length > 0 && events[0].step > 0; // show the empty pool first
  for (const list of Object.values(stops)) if (beginsAtOnce) list.unshift(0);
  return stops;
}

/* Plays events forwards, and keeps copies of the state on the way, to go back to. */
class Player {
  constructor(events) {
    this.events = events;
    this.shape = shapeOf(events);
    this.stops = stopsOf(events);
    this.every = Math.max(200, Math.ceil(events.length / 100));
    this.state = emptyState(this.shape);
    this.copies = [structuredClone(this.state)];
    this.curve = this.stops.steps.map((stop) => {
      this.forward(stop);
      return statistics(this.state);
    });
    this.hasSteps = events.some((event) => event.event === "schedule");
    this.seek(0);
  }

  forward(numEvents) {
    while (this.state.numEvents < numEvents) {
      apply(this.state, this.events[this.state.numEvents]);
      const { numEvents: done } = this.state;
      if (done % this.every === 0 && !this.copies[done / this.every]) {
        this.copies[done / this.every] = structuredClone(this.state);
      }
    }
  }

  seek(numEvents) {
    const nearest = Math.floor(numEvents / this.every);
    const isBehind =
      this.state.numEvents <= numEvents && this.state.numEvents >= nearest * this.every;
    if (!isBehind) this.state = structuredClone(this.copies[nearest]);
    this.forward(numEvents);
    return this.state;
  }
}

// Node loads this file for the tests; in the page, what follows it sees all of the above.
if (typeof module !== "undefined") {
  module.exports = { apply, emptyState, shapeOf, stopsOf, summary, statistics, Player };
}
