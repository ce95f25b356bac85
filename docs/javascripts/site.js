// Maths, diagrams and the visualiser. Each is loaded only on a page that has it, from docs/vendor/.

const vendor = new URL("../vendor/", document.currentScript.src);

function loadScript(path) {
  return new Promise((resolve, reject) => {
    const script = document.createElement("script");
    script.src = new URL(path, vendor);
    script.onload = resolve;
    script.onerror = () => reject(new Error(`cannot load ${path}`));
    document.head.append(script);
  });
}

function loadStyles(path) {
  const link = document.createElement("link");
  link.rel = "stylesheet";
  link.href = new URL(path, vendor);
  document.head.append(link);
}

function isDark() {
  return document.body.dataset.mdColorScheme === "slate";
}

async function showMaths() {
  const formulas = document.querySelectorAll(".arithmatex");
  if (formulas.length === 0) return;
  loadStyles("katex/katex.min.css");
  await loadScript("katex/katex.min.js");
  await loadScript("katex/auto-render.min.js");
  const delimiters = [
    { left: "\\[", right: "\\]", display: true },
    { left: "\\(", right: "\\)", display: false },
  ];
  for (const formula of formulas) renderMathInElement(formula, { delimiters });
}

// Each diagram keeps its text, to be drawn again in the colours of the other palette.
let diagrams = [];
let drawing = Promise.resolve();

async function showDiagrams() {
  diagrams = [...document.querySelectorAll("pre.diagram")].map((pre) => {
    const box = document.createElement("div");
    box.className = "diagram";
    const diagram = { box, text: pre.textContent };
    pre.replaceWith(box);
    return diagram;
  });
  if (diagrams.length === 0) return;
  await loadScript("mermaid/mermaid.min.js");
  redrawDiagrams();
}

function redrawDiagrams() {
  if (typeof mermaid !== "undefined") drawing = drawing.then(drawDiagrams);
}

async function drawDiagrams() {
  mermaid.initialize({
    startOnLoad: false,
    theme: isDark() ? "dark" : "neutral",
    fontFamily: getComputedStyle(document.body).fontFamily,
  });
  for (const [number, { box, text }] of diagrams.entries()) {
    const { svg } = await mermaid.render(`diagram-${number}`, text);
    box.innerHTML = svg;
    // On a narrow screen it scrolls rather than shrink until nobody can read it.
    const drawn = box.firstElementChild;
    drawn.style.minWidth = `min(${drawn.style.maxWidth || "100%"}, 32rem)`;
  }
}

// The visualiser is a page of its own in a frame, and takes over the site's palette.
function colourReplays() {
  for (const frame of document.querySelectorAll("iframe.replay")) {
    const root = frame.contentDocument?.documentElement;
    if (root) root.dataset.scheme = isDark() ? "dark" : "light";
  }
}

function followPalette() {
  new MutationObserver(() => {
    redrawDiagrams();
    colourReplays();
  }).observe(document.body, { attributeFilter: ["data-md-color-scheme"] });
  for (const frame of document.querySelectorAll("iframe.replay")) {
    frame.addEventListener("load", colourReplays);
  }
  colourReplays();
}

document.addEventListener("DOMContentLoaded", () => {
  followPalette();
  showMaths();
  showDiagrams();
});
