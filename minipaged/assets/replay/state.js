/* The state of the pools, block tables and queues after any event of a trace. Draws nothing.

   A trace is a list of events (minipaged/tracing/events.py describes each kind). The state is a
   function of them:

       state = apply(apply(apply(emptyState(shape), event 0), event 1), event 2) ...

   Events are never undone: to go back, start from an earlier copy of the state. There are two
   pools, "pool" (the one that attention reads) and "swap". A block is a number in one of them.
   Unknown kinds of events are ignored. */

const SCHEMA_VERSION = 2; // the same as in events.py

/* Why these events cannot be replayed, in one sentence; null if they can. */
function refusal(events) {
  if (!Array.isArray(events) || !events.every(isObject)) {
    return "This trace is no list of events: record it again.";
  }
  const other = events.find((event) => event.v !== SCHEMA_VERSION);
  if (other) {
    const found = other.v === undefined ? "no version" : `version ${other.v}`;
    const reads = `this page reads only version ${SCHEMA_VERSION}`;
    return `This trace has events of ${found}, and ${reads}: record it again with this minipaged.`;
  }
  for (const [index, event] of events.entries()) {
    const fault = faultOf(event);
    if (fault === null) continue;
    const which = `event ${index + 1} cannot be replayed, since ${fault}`;
    return `This trace is damaged: ${which}. Record it again.`;
  }
  return null;
}

// ---- what the fields of an event must be (the same as in event_check.py) ------------------------

const MOST_BLOCKS = 200_000;
const MOST = 2 ** 31 - 1;

const isObject = (value) => typeof value === "object" && value !== null && !Array.isArray(value);
const isText = (value) => typeof value === "string";
const isWhole = (least, most) => (value) =>
  Number.isInteger(value) && least <= value && value <= most;
const isBlock = isWhole(0, MOST_BLOCKS - 1);
const isTime = (value) => typeof value === "number" && 0 <= value && value <= 1e12;
const listOf = (fits) => (value) => Array.isArray(value) && value.every(fits);
const isPair = (value) => listOf(isBlock)(value) && value.length === 2;
const byNumber = (fits) => (value) =>
  isObject(value) &&
  Object.keys(value).every((key) => /^[0-9]{1,10}$/.test(key)) &&
  Object.values(value).every(fits);
const areSpans = (value) =>
  isObject(value) &&
  [value.compute, value.all_reduce, [value.message, value.gather]].every(listOf(isTime)) &&
  value.compute.length === value.all_reduce.length + 2;
const oneOf = (...names) => [
  names.map((name) => `"${name}"`).join(" or "),
  (value) => names.includes(value),
];
const wholeFrom = (least, most) => `a whole number from ${least} to ${most.toLocaleString("en-US")}`;
const A_BLOCK = wholeFrom(0, MOST_BLOCKS - 1);
const A_COUNT = wholeFrom(0, MOST);

/* What a field may be, in words and as a check. */
const FORMS = {
  count: [A_COUNT, isWhole(0, MOST)],
  time: ["a number of seconds from 0 up", isTime],
  poolSize: [wholeFrom(0, MOST_BLOCKS), isWhole(0, MOST_BLOCKS)],
  blockSize: [wholeFrom(1, MOST), isWhole(1, MOST)],
  block: [A_BLOCK, isBlock],
  blocks: [`a list of blocks, each ${A_BLOCK}`, listOf(isBlock)],
  pairs: [`a list of pairs of blocks, each ${A_BLOCK}`, listOf(isPair)],
  tables: [
    `an object from sequence ids to lists of blocks, each ${A_BLOCK}`,
    byNumber(listOf(isBlock)),
  ],
  counts: [`an object from sequence ids to numbers, each ${A_COUNT}`, byNumber(isWhole(0, MOST))],
  names: ["an object from sequence ids to text", byNumber(isText)],
  owners: [
    `an object from blocks, each ${A_BLOCK}, to numbers, each ${A_COUNT}`,
    (value) => byNumber(isWhole(0, MOST))(value) && Object.keys(value).map(Number).every(isBlock),
  ],
  request: ["text", isText],
  requests: ["a list of text", listOf(isText)],
  spans: [
    "a list with message, compute, all_reduce and gather of each rank in microseconds, and two " +
      "more times of compute than of all_reduce",
    listOf(areSpans),
  ],
  pool: oneOf("pool", "swap"),
  mode: oneOf("swap", "recompute"),
};

const OWNERS = { pool: "pool", block: "block", ref_count: "count" };
const REPLACED = { seq_id: "count", pairs: "pairs" };
const BLOCKS_OF_ONE = { seq_id: "count", blocks: "blocks" };
const MOVED = { request_id: "request", block_tables: "tables", pairs: "pairs" };

const SIZES = { num_blocks: "poolSize", num_swap_blocks: "poolSize", block_size: "blockSize" };
const QUEUES = { running: "requests", waiting: "requests", swapped: "requests" };

/* The fields of each event beside step and time, by their form. */
const FIELDS = {
  init: SIZES,
  schedule: { ...QUEUES, num_scheduled_tokens: "counts" },
  ranks: { num_all_reduces: "count", spans: "spans" },
  admit: {
    request_id: "request",
    block_tables: "tables",
    num_tokens: "counts",
    num_cached_tokens: "counts",
  },
  append: { ...BLOCKS_OF_ONE, num_tokens: "count" },
  copy_on_write: REPLACED,
  fork: { parent: "count", child: "count", num_tokens: "count" },
  cache: BLOCKS_OF_ONE,
  deduplicate: REPLACED,
  evict: { block: "block" },
  pin: BLOCKS_OF_ONE,
  preempt: { request_id: "request", mode: "mode" },
  swap_out: MOVED,
  swap_in: MOVED,
  out_of_memory: { request_id: "request" },
  free: { seq_id: "count" },
  snapshot: {
    ...SIZES,
    ...QUEUES,
    request_ids: "names",
    block_tables: "tables",
    swap_block_tables: "tables",
    num_tokens: "counts",
    cached: "blocks",
    ref_counts: "owners",
    swap_ref_counts: "owners",
  },
  allocate: OWNERS,
  share: OWNERS,
  release: OWNERS,
};

/* By event: fields with block tables, and what must have an entry for each of their sequences. */
const OF_EACH_SEQUENCE = {
  admit: [
    ["block_tables", "num_tokens"],
    ["block_tables", "num_cached_tokens"],
  ],
  snapshot: [
    ["block_tables", "num_tokens"],
    ["swap_block_tables", "num_tokens"],
  ],
};

/* Why one event cannot be replayed, in a clause; null if it can, or if its kind is unknown. */
function faultOf(event) {
  const name = event.event;
  if (!isText(name)) return "it has no event";
  const own = Object.hasOwn(FIELDS, name) ? FIELDS[name] : {};
  for (const [field, form] of Object.entries({ step: "count", time: "time", ...own })) {
    if (!Object.hasOwn(event, field)) return `${name} has no ${field}`;
    const [words, fits] = FORMS[form];
    if (!fits(event[field])) {
      const value = JSON.stringify(event[field]);
      const shown = value.length <= 60 ? value : `${value.slice(0, 60)}...`;
      return `${field} of ${name} is ${shown}, and must be ${words}`;
    }
  }
  const pairs = Object.hasOwn(OF_EACH_SEQUENCE, name) ? OF_EACH_SEQUENCE[name] : [];
  for (const [tables, field] of pairs) {
    const missing = Object.keys(event[tables]).find((seq) => !Object.hasOwn(event[field], seq));
    if (missing !== undefined) return `${field} of ${name} lacks sequence ${missing}`;
  }
  return null;
}

// ---- a state, and the shape of its pools --------------------------------------------------------

function emptyPool(size) {
  return {
    size,
    holders: new Array(size).fill(0), // how many sequences have the block in their block table
    refCounts: new Array(size).fill(0), // from the allocator; the prefix cache is an owner, too
    since: new Array(size).fill(0), // the step in which its content began
    lastRequest: new Array(size).fill(null), // its last owner: a cached block outlives its request
  };
}

function emptyState(shape) {
  return {
    numEvents: 0,
    step: 0,
    time: 0,
    blockSize: shape.blockSize,
    pools: { pool: emptyPool(shape.numBlocks), swap: emptyPool(shape.numSwapBlocks) },
    isCounted: false, // whether an allocator reports reference counts: baselines have none
    sequences: new Map(), // those that hold blocks, by id
    requests: new Map(), // all that ever ran, by id: their number, and that of their sequences
    numRequests: 0, // how many have a number
    isLive: false, // then all views of a server draw the same, whenever they began to watch
    snapshotStep: null, // what began before this step began at an unknown one
    cached: new Set(), // blocks of the pool that the prefix cache can find
    queues: { running: [], waiting: [], swapped: [] },
    totals: { preempted: 0, copied: 0, evicted: 0, cachedTokens: 0 },
    // What happened in this step:
    isScheduled: true, // whether the scheduler has decided it
    marks: new Map(), // "pool:7" -> kinds of what happened to the block
    moves: [], // [["pool:7", "swap:2"], ...]: keys and values that were copied
    notes: [], // the same in words
    takenFrom: new Map(), // request -> the blocks that preemption took from it
    ranks: [], // what it took on each of several ranks, once they have computed it
  };
}

/* The sizes of the pools, from the first event that has them; without one, the smallest that fit
   the trace. */
function shapeOf(events) {
  const init = events.find(({ event }) => event === "init" || event === "snapshot");
  const used = { pool: 0, swap: 0 };
  const size = { least: 1, most: Infinity };
  for (const event of events) {
    if (!Object.hasOwn(FIELDS, event.event)) continue;
    for (const [pool, block] of blocksIn(event)) used[pool] = Math.max(used[pool], block + 1);
    if (!init && event.event === "admit") narrowBlockSize(size, event);
  }
  if (init) {
    const numBlocks = Math.max(init.num_blocks, used.pool);
    const numSwapBlocks = Math.max(init.num_swap_blocks, used.swap);
    return { numBlocks, numSwapBlocks, blockSize: init.block_size, used };
  }
  return { numBlocks: used.pool, numSwapBlocks: used.swap, blockSize: likelyBlockSize(size), used };
}

function blocksIn(event) {
  if (Number.isInteger(event.block)) return [[event.pool ?? "pool", event.block]];
  const from = event.event === "swap_in" ? "swap" : "pool";
  const to = event.event === "swap_out" ? "swap" : "pool";
  const named = (event.pairs ?? []).flatMap(([a, b]) => [
    [from, a],
    [to, b],
  ]);
  const tables = [event.blocks ?? [], event.cached ?? [], Object.values(event.block_tables ?? {})];
  const swapped = Object.values(event.swap_block_tables ?? {}).flat();
  return named.concat(
    tables.flat(2).map((block) => [to, block]),
    swapped.map((block) => ["swap", block]),
  );
}

/* n tokens in b blocks: a block has at least n / b slots, and b - 1 blocks are too few. */
function narrowBlockSize(size, event) {
  for (const [seq, blocks] of Object.entries(event.block_tables)) {
    const tokens = event.num_tokens[seq];
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

// ---- names and lists in words -------------------------------------------------------------------

const NUM_SHORT_LETTERS = 26 + 26 * 26; // A to ZZ

/* 0 -> A, 25 -> Z, 26 -> AA: requests in the order of admission. */
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

const MOST_RANKS_TOLD = 8;

const sumOf = (times) => times.reduce((sum, time) => sum + time, 0);

/* 3140 microseconds -> "3.1 ms" */
function inMilliseconds(micros) {
  const digits = micros >= 99_950 ? 0 : micros >= 95 ? 1 : 2;
  const figures = { minimumFractionDigits: digits, maximumFractionDigits: digits };
  return `${(micros / 1000).toLocaleString("en-US", figures)} ms`;
}

function letterOfRequest(state, request) {
  return letterOf(requestOf(state, request).number);
}

/* The number of a request, which is its letter and colour. */
function numberOf(state, request) {
  const known = state.requests.get(request);
  if (known) return known.number;
  const isId = state.isLive && /^[0-9]+$/.test(request); // else in the order of admission
  return isId ? Number(request) % NUM_SHORT_LETTERS : state.numRequests;
}

function requestOf(state, request) {
  if (!state.requests.has(request)) {
    state.requests.set(request, { number: numberOf(state, request), sequences: new Map() });
    state.numRequests += 1;
  }
  return state.requests.get(request);
}

/* The first sequence of request A is A; its other samples or beams are A/2, A/3, ... */
function nameOf(state, request, seq) {
  const { number, sequences } = requestOf(state, request);
  if (!sequences.has(seq)) sequences.set(seq, sequences.size + 1);
  const ordinal = sequences.get(seq);
  return letterOf(number) + (ordinal > 1 ? `/${ordinal}` : "");
}

// ---- which sequence holds which block -----------------------------------------------------------

function poolOf(seq) {
  return seq.isSwapped ? "swap" : "pool";
}

function hold(state, seq, blocks) {
  const pool = state.pools[poolOf(seq)];
  for (const block of blocks) {
    const isCached = !seq.isSwapped && state.cached.has(block);
    if (pool.holders[block] === 0 && !isCached) pool.since[block] = state.step;
    pool.holders[block] += 1;
    pool.lastRequest[block] = seq.request;
  }
}

/* Take blocks from a sequence, and mark those that no other sequence holds. */
function drop(state, seq, blocks) {
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
  drop(state, seq, seq.blocks);
  seq.isSwapped = isSwapped;
  seq.blocks = [...blocks];
  hold(state, seq, seq.blocks);
}

function addSequence(state, id, request, blocks, tokens, more = {}) {
  const old = state.sequences.get(id);
  if (old) drop(state, old, old.blocks);
  const name = nameOf(state, request, id);
  const seq = { id, request, name, blocks: [...blocks], tokens, isSwapped: false, ...more };
  state.sequences.set(id, seq);
  hold(state, seq, seq.blocks);
  return seq;
}

/* Replace blocks of a table one for one: [[old, new], ...]. */
function replaceBlocks(state, seq, pairs) {
  const to = new Map(pairs);
  const moved = seq.blocks.filter((block) => to.has(block));
  hold(
    state,
    seq,
    moved.map((block) => to.get(block)),
  );
  seq.blocks = seq.blocks.map((block) => to.get(block) ?? block);
  drop(state, seq, moved);
}

function namesOfHolders(state, block, except, pool = "pool") {
  return [...state.sequences.values()]
    .filter((seq) => seq !== except && poolOf(seq) === pool && seq.blocks.includes(block))
    .map((seq) => seq.name);
}

// ---- marks and notes: what happened in this step ------------------------------------------------

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

/* One sentence for several notes of a kind: "A takes block 7 and B takes block 8." */
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
  state.takenFrom = new Map();
  state.ranks = [];
}

// ---- the events ---------------------------------------------------------------------------------

const handlers = {
  /* A memory is built. With a second engine on the same log, everything starts again. */
  init(state, event) {
    beginAgain(state, event);
    const more = event.num_swap_blocks ? `, and a swap pool of ${event.num_swap_blocks}` : "";
    const size = `${count(event.num_blocks, "block")} of ${count(event.block_size, "slot")}`;
    note(state, "init", `The pool has ${size}${more}. All blocks are free.`);
  },

  /* The state as a whole, for a view that begins in mid-run. */
  snapshot(state, event) {
    beginAgain(state, event);
    state.isScheduled = true;
    state.snapshotStep = event.step;
    state.queues = { running: event.running, waiting: event.waiting, swapped: event.swapped };
    state.cached = new Set(event.cached);
    const tables = [...Object.entries(event.block_tables), ...Object.entries(event.swap_block_tables)];
    for (const [key, blocks] of tables) {
      const isPinned = !Object.hasOwn(event.request_ids, key);
      const request = isPinned ? `prefix ${key}` : event.request_ids[key];
      const isSwapped = !Object.hasOwn(event.block_tables, key);
      addSequence(state, Number(key), request, blocks, event.num_tokens[key], { isSwapped, isPinned });
    }
    for (const [pool, counts] of [
      ["pool", event.ref_counts],
      ["swap", event.swap_ref_counts],
    ]) {
      for (const [block, owners] of Object.entries(counts)) {
        recount(state, { pool, block: Number(block), ref_count: owners });
      }
    }
    for (const block of event.cached) state.pools.pool.since[block] = event.step;
    note(state, "init", `The view begins in step ${event.step}, in the middle of the run.`);
  },

  admit(state, event) {
    for (const [key, blocks] of Object.entries(event.block_tables)) {
      const [id, tokens] = [Number(key), event.num_tokens[key]];
      const cachedTokens = event.num_cached_tokens[key];
      const isBack = state.requests.get(event.request_id)?.sequences.has(id) ?? false;
      const hits = blocks.slice(0, Math.ceil(cachedTokens / state.blockSize));
      const others = new Map(hits.map((block) => [block, namesOfHolders(state, block)]));
      const seq = addSequence(state, id, event.request_id, blocks, tokens);
      markAll(state, "pool", blocks.slice(hits.length), "new");
      markAll(state, "pool", hits, "hit");
      noteAdmission(state, seq, blocks.slice(hits.length), isBack);
      if (cachedTokens) noteHits(state, seq, hits, cachedTokens, others);
    }
  },

  append(state, event) {
    const seq = state.sequences.get(event.seq_id);
    if (!seq) return;
    seq.blocks.push(...event.blocks);
    hold(state, seq, event.blocks);
    if (event.num_tokens > seq.tokens) mark(state, poolOf(seq), seq.blocks.at(-1), "written");
    seq.tokens = event.num_tokens;
    markAll(state, "pool", event.blocks, "new");
    if (event.blocks.length === 0) return;
    noteTogether(state, "new", [seq.name, event.blocks], (items) => {
      const takes = items.map(([name, blocks]) => `${name} takes ${blocksInWords(blocks)}`);
      return `The next token needs a new block: ${inList(takes)}.`;
    });
  },

  copy_on_write(state, event) {
    const seq = state.sequences.get(event.seq_id);
    if (!seq) return;
    state.totals.copied += event.pairs.length;
    for (const [source, target] of event.pairs) {
      const others = inList(namesOfHolders(state, source, seq), 3) || "the prefix cache";
      move(state, ["pool", source, "source"], ["pool", target, "copy"]);
      const what = `${seq.name} writes to block ${source}, which it shares with ${others}`;
      note(state, "copy", `${what}: the block is copied to block ${target} (copy-on-write).`);
    }
    replaceBlocks(state, seq, event.pairs);
  },

  deduplicate(state, event) {
    const seq = state.sequences.get(event.seq_id);
    if (!seq) return;
    for (const [own, cached] of event.pairs) {
      mark(state, "pool", cached, "deduplicated");
      const what = `Block ${own} of ${seq.name} has the same content as the cached block ${cached}`;
      note(state, "deduplicated", `${what}: ${seq.name} uses block ${cached} instead.`);
    }
    replaceBlocks(state, seq, event.pairs);
  },

  fork(state, event) {
    const parent = state.sequences.get(event.parent);
    if (!parent) return;
    const isWhole = !state.isCounted && event.num_tokens === parent.tokens; // a contiguous run
    const inUse = Math.ceil(event.num_tokens / state.blockSize);
    const blocks = isWhole ? parent.blocks : parent.blocks.slice(0, inUse);
    const { isSwapped } = parent;
    const child = addSequence(state, event.child, parent.request, blocks, event.num_tokens, {
      isSwapped,
    });
    markAll(state, poolOf(child), blocks, "shared");
    noteTogether(state, "shared", [child.name, parent.name], (items) => {
      const forks = items.map(([name, from]) => `${name} from ${from}`);
      return `Forks, which share all their blocks for now: ${inList(forks)}.`;
    });
  },

  free(state, event) {
    const seq = state.sequences.get(event.seq_id);
    if (!seq) return;
    state.sequences.delete(event.seq_id);
    drop(state, seq, seq.blocks);
    const goesOn = [...state.sequences.values()].some((other) => other.request === seq.request);
    if (!goesOn) leaveQueues(state, seq.request);
    const taken = state.takenFrom.get(seq.request) ?? [];
    if (state.isScheduled) noteEnd(state, seq, goesOn);
    else state.takenFrom.set(seq.request, [...taken, ...seq.blocks]);
  },

  swap_out(state, event) {
    const letter = letterOfRequest(state, event.request_id);
    for (const [from, to] of event.pairs) move(state, ["pool", from, "out"], ["swap", to, "out"]);
    moveTables(state, event.block_tables, true);
    const blocks = `${count(event.pairs.length, "block")} to the swap pool`;
    note(state, "out", `${letter} is preempted (swapping), and moves ${blocks}.`);
  },

  swap_in(state, event) {
    const letter = letterOfRequest(state, event.request_id);
    for (const [from, to] of event.pairs) move(state, ["swap", from, "in"], ["pool", to, "in"]);
    moveTables(state, event.block_tables, false);
    const copied = new Set(event.pairs.map(([, to]) => to));
    const all = [...new Set(Object.values(event.block_tables).flat())];
    const hits = all.filter((block) => !copied.has(block));
    markAll(state, "pool", hits, "hit");
    const are = hits.length > 1 ? "are still cached and need" : "is still cached and needs";
    const rest = hits.length ? ` ${count(hits.length, "block")} ${are} no copy.` : "";
    const back = `${count(copied.size, "block")} copied from the swap pool`;
    note(state, "in", `${letter} is swapped in: ${back}.${rest}`);
  },

  cache(state, event) {
    for (const block of event.blocks) state.cached.add(block);
    markAll(state, "pool", event.blocks, "cached");
    const name = state.sequences.get(event.seq_id)?.name ?? "?";
    noteTogether(state, "cached", [name, event.blocks], (items) => {
      const parts = items.map(([owner, blocks]) => `${blocksInWords(blocks)} of ${owner}`);
      return `The prefix cache adds blocks that are full and written: ${inList(parts)}.`;
    });
  },

  evict(state, { block }) {
    state.cached.delete(block);
    state.totals.evicted += 1;
    state.pools.pool.since[block] = state.step;
    mark(state, "pool", block, "evicted");
    noteTogether(state, "evicted", block, (blocks) => {
      const which = blocksInWords([...blocks].sort((a, b) => a - b));
      return `The pool has no empty block, so the prefix cache evicts ${which}.`;
    });
  },

  pin(state, event) {
    const tokens = event.blocks.length * state.blockSize;
    const name = `prefix ${event.seq_id}`;
    const seq = addSequence(state, event.seq_id, name, event.blocks, tokens, { isPinned: true });
    const keeps = `It keeps ${blocksInWords(event.blocks)} until it is released.`;
    note(state, "pinned", `${seq.name} is a pinned prefix. ${keeps}`);
  },

  preempt(state, event) {
    state.totals.preempted += 1;
    if (event.mode === "swap") return; // swap_out has a note
    const blocks = new Set(state.takenFrom.get(event.request_id));
    const loses = `it loses ${count(blocks.size, "block")} and will be computed again`;
    const letter = letterOfRequest(state, event.request_id);
    note(state, "freed", `${letter} is preempted (recomputation): ${loses}.`);
  },

  out_of_memory(state, event) {
    const letter = letterOfRequest(state, event.request_id);
    note(state, "freed", `${letter} ends early: the pool can never hold its next token.`);
  },

  schedule(state, event) {
    state.isScheduled = true;
    state.queues = { running: event.running, waiting: event.waiting, swapped: event.swapped };
    noteComputed(state, event.num_scheduled_tokens);
  },

  ranks(state, event) {
    state.ranks = event.spans.map((spans) => ({ ...spans, numAllReduces: event.num_all_reduces }));
    const told = state.ranks.slice(0, MOST_RANKS_TOLD);
    for (const [rank, { compute, all_reduce, numAllReduces }] of told.entries()) {
      const computed = `computed for ${inMilliseconds(sumOf(compute))}`;
      const spent = `spent ${inMilliseconds(sumOf(all_reduce))}`;
      const where = count(numAllReduces, "all-reduce");
      note(state, "ranks", `Rank ${rank} ${computed} and ${spent} in ${where}.`);
    }
    const more = state.ranks.length - told.length;
    if (more > 0) note(state, "ranks", `The lanes show ${more} more.`);
  },

  allocate: recount,
  share: recount,
  release: recount,
};

/* An empty state, except for the place in the trace and the sizes of the pools. */
function beginAgain(state, event) {
  const { pool, swap } = state.pools;
  const shape = { blockSize: event.block_size, numBlocks: pool.size, numSwapBlocks: swap.size };
  const { numEvents, step, time, isLive } = state;
  Object.assign(state, emptyState(shape), { numEvents, step, time, isLive });
}

function recount(state, event) {
  state.isCounted = true;
  state.pools[event.pool].refCounts[event.block] = event.ref_count;
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

function noteAdmission(state, seq, blocks, isBack) {
  const is = isBack ? "is admitted again, to be recomputed" : "is admitted";
  const takes = blocks.length
    ? `: ${blocksInWords(blocks)} for its ${count(seq.tokens, "token")}`
    : "";
  note(state, "new", `${seq.name} ${is}${takes}.`);
}

function noteHits(state, seq, hits, cachedTokens, others) {
  state.totals.cachedTokens += cachedTokens;
  const owners = [...new Set([...others.values()].flat())];
  const whose = owners.length ? ` (shared with ${inList(owners, 3)})` : "";
  const saved = `${count(cachedTokens, "token")} of ${seq.name} need not be computed`;
  note(state, "hit", `Prefix cache hit: ${blocksInWords(hits)}${whose}. ${saved}.`);
}

function noteEnd(state, seq, goesOn) {
  if (goesOn) {
    const words = (names) =>
      `${inList(names)} ${names.length > 1 ? "end" : "ends"}: blocks without other owners are free.`;
    noteTogether(state, "ended", seq.name, words);
    return;
  }
  const inPool = poolOf(seq) === "pool";
  const cached = inPool ? seq.blocks.filter((block) => state.cached.has(block)) : [];
  const stay = cached.length === 1 ? "stays" : "stay";
  const kept = cached.length ? ` ${cached.length} of them ${stay} cached until evicted.` : "";
  const what = seq.isPinned ? "is released" : "has ended";
  const blocks = `it gives back ${count(seq.blocks.length, "block")}`;
  note(state, "freed", `${seq.name} ${what}: ${blocks}.${kept}`);
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

/* The next state, in place. To keep the old one, copy it first. */
function apply(state, event) {
  if (event.step !== state.step) beginStep(state, event.step);
  state.numEvents += 1;
  state.time = event.time;
  if (Object.hasOwn(handlers, event.event)) handlers[event.event](state, event);
  return state;
}

// ---- what is read off a state -------------------------------------------------------------------

/* By block in use: the sequences that hold it, at which logical block, and its filled slots. */
function holdings(state, poolName) {
  const held = new Map();
  for (const seq of state.sequences.values()) {
    if (poolOf(seq) !== poolName) continue;
    let left = seq.tokens;
    for (let logical = 0; logical < seq.blocks.length; logical += 1, left -= state.blockSize) {
      const block = seq.blocks[logical];
      const filled = Math.max(0, Math.min(state.blockSize, left));
      const one = held.get(block);
      if (one) {
        one.holders.push({ seq, logical });
        one.filled = Math.max(one.filled, filled);
      } else held.set(block, { holders: [{ seq, logical }], filled });
    }
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
    refCounts: { pool: counts(state.pools.pool.refCounts), swap: counts(state.pools.swap.refCounts) },
    holders: { pool: counts(state.pools.pool.holders), swap: counts(state.pools.swap.holders) },
    held: { pool: held("pool"), swap: held("swap") },
    cached: [...state.cached].sort((a, b) => a - b),
    queues: state.queues,
    totals: state.totals,
    ranks: state.ranks,
    notes: state.notes.map((one) => one.text),
  };
}

/* Since when a block has its content, in words. */
function sinceWhen(state, poolName, block) {
  const step = state.pools[poolName].since[block];
  return `since step ${step}${step === state.snapshotStep ? " or before" : ""}`;
}

// ---- going to any place in a trace --------------------------------------------------------------

const COUNTING = new Set(["allocate", "share", "release"]); // details of the event after them

/* Where the player can stop, as numbers of events: after each step, and after each event but those
   of single blocks. An init event starts a new stop, though its step is that of the event before. */
function stopsOf(events) {
  const stops = { steps: [], moments: [] };
  events.forEach((event, index) => {
    const next = events[index + 1];
    const isLast = !next || next.step !== event.step || next.event === "init";
    if (isLast) stops.steps.push(index + 1);
    if (isLast || !COUNTING.has(event.event)) stops.moments.push(index + 1);
  });
  const isFromSnapshot = events[0]?.event === "snapshot";
  const startsInAStep = events.length > 0 && events[0].step > 0 && !isFromSnapshot;
  // The empty pool first, unless the trace begins with another one.
  for (const list of Object.values(stops)) if (startsInAStep) list.unshift(0);
  return stops;
}

/* Plays events forwards, and keeps copies of the state to go back to. */
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

// The tests load this file in node. In the page, it shares its scope with blocks.js and replay.js.
if (typeof module !== "undefined") {
  module.exports = { SCHEMA_VERSION, refusal, summary, Player };
}
