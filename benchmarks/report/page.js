"use strict";
// Whatever models and data sets wrote reaches the page by textContent alone, never as markup.

const $ = (id) => document.getElementById(id);

function make(tag, classes, text) {
  const element = document.createElement(tag);
  if (classes) element.className = classes;
  if (text !== undefined) element.textContent = text;
  return element;
}

const number = (value) =>
  value === null || value === undefined ? "–" : String(Number(value.toPrecision(3))).replace("-", "−");

// ---- theme, legends, tips

const THEMES = ["auto", "light", "dark"];
$("theme").addEventListener("click", () => {
  const now = document.documentElement.dataset.theme || "auto";
  const next = THEMES[(THEMES.indexOf(now) + 1) % THEMES.length];
  document.documentElement.dataset.theme = next;
  $("theme").textContent = `Theme: ${next}`;
});

for (const key of document.querySelectorAll(".key")) {
  key.addEventListener("click", () => {
    const shown = key.getAttribute("aria-pressed") !== "true";
    key.setAttribute("aria-pressed", String(shown));
    for (const line of key.closest("section").querySelectorAll(`g[data-line="${key.dataset.line}"]`)) {
      line.toggleAttribute("hidden", !shown);
    }
  });
}

for (const choice of document.querySelectorAll(".x-kind")) {
  const show = () => {
    for (const figure of choice.closest("section").querySelectorAll("figure[data-x]")) {
      figure.hidden = figure.dataset.x !== choice.value;
    }
  };
  choice.addEventListener("change", show);
  show();
}

const tip = $("tip");
document.addEventListener("pointerover", (event) => {
  const text = event.target.dataset && event.target.dataset.tip;
  tip.hidden = !text;
  if (!text) return;
  tip.textContent = text;
  const box = event.target.getBoundingClientRect();
  const left = Math.min(box.left + 12, document.documentElement.clientWidth - tip.offsetWidth - 8);
  tip.style.left = `${Math.max(8, left)}px`;
  tip.style.top = `${Math.max(8, box.top - tip.offsetHeight - 6)}px`;
});

// ---- rollouts

const SERIES = JSON.parse($("index").textContent);
const MODES = {
  advantage: { name: "Advantage", two: true, of: (x) => x, low: "pushed down", high: "pushed up" },
  logp: { name: "Log-probability", of: (x) => -x, low: "sure (0)", high: "unlikely" },
  entropy: { name: "Entropy", of: (x) => x, low: "decided (0)", high: "open" },
  kl: { name: "KL", two: true, of: (x) => x, low: "less likely than in the reference", high: "more likely" },
  ratio: { name: "Ratio", two: true, of: (x) => (x > 0 ? Math.log(x) : null), low: "below 1", high: "above 1" },
  credit: { name: "Credit", two: true, of: (x) => x, low: "costs", high: "earns" },
};
const FILTERS = {
  all: { name: "All", keeps: () => true },
  wrong: { name: "Wrong", keeps: (one) => one.correct === false },
  cut: { name: "Cut", keeps: (one) => one.cut },
  ungraded: { name: "Ungraded", keeps: (one) => one.reward === null },
  biggest: { name: "Biggest advantage", keeps: () => true },
};
const view = { source: 0, point: 0, other: 0, otherPoint: 0, compare: false, mode: "none", filter: "all", problem: null };
const unpacked = new Map();

function unpack(i) {
  if (!unpacked.has(i)) unpacked.set(i, inflate($(`block-${i}`).textContent));
  return unpacked.get(i);
}

async function inflate(text) {
  const bytes = Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  const points = JSON.parse(await new Response(stream).text());
  for (const point of points) name(point);
  return { points, scales: scales(points) };
}

// A problem is known at other points by its prompt; where that comes twice at a point, by which of the two it is.
function name(problems) {
  const seen = new Map();
  for (const problem of problems) {
    seen.set(problem.prompt, (seen.get(problem.prompt) || 0) + 1);
    problem.key = JSON.stringify([problem.prompt, seen.get(problem.prompt)]);
  }
}

// The size at which a colour is full, for each mode: 99 of 100 tokens of the source are no larger.
function scales(points) {
  const sizes = {};
  for (const point of points) for (const problem of point) for (const one of problem.completions) {
    one.biggest = Math.max(0, ...(one.values.advantage || []).map(Math.abs));
    for (const [mode, values] of Object.entries(one.values)) {
      const list = (sizes[mode] ||= []);
      for (const value of values) {
        const x = value === null ? null : MODES[mode].of(value);
        if (x) list.push(Math.abs(x));
      }
    }
  }
  for (const [mode, list] of Object.entries(sizes)) {
    const sorted = Float64Array.from(list).sort();
    sizes[mode] = sorted.length ? sorted[Math.floor(0.99 * (sorted.length - 1))] || 1e-9 : 1;
  }
  return sizes;
}

function radios(fieldset, name, options, chosen, change) {
  for (const old of fieldset.querySelectorAll("label")) old.remove();
  for (const [value, text] of options) {
    const label = make("label");
    const input = make("input");
    input.type = "radio";
    input.name = name;
    input.value = value;
    input.checked = value === chosen;
    input.addEventListener("change", () => change(value));
    label.append(input, make("span", "", text));
    fieldset.append(label);
  }
}

function options(select, indices) {
  select.replaceChildren();
  for (const [title, wanted] of [["With numbers for each token", true], ["As text", false]]) {
    const group = make("optgroup");
    group.label = title;
    for (const i of indices.filter((j) => SERIES[j].modes.length > 0 === wanted)) {
      const option = make("option", "", SERIES[i].name);
      option.value = i;
      group.append(option);
    }
    if (group.children.length) select.append(group);
  }
}

function chooseSource(i) {
  view.source = i;
  view.point = SERIES[i].labels.length - 1;
  const kin = SERIES.map((_, j) => j).filter((j) => SERIES[j].group === SERIES[i].group);
  options($("source-b"), kin);
  chooseOther(i);
  const offered = SERIES[i].modes;
  if (!offered.includes(view.mode)) view.mode = offered[0] || "none";
  radios($("modes"), "mode", [...offered.map((m) => [m, MODES[m].name]), ["none", "Nothing"]], view.mode, (mode) => {
    view.mode = mode;
    show();
  });
  $("modes").hidden = $("token").hidden = !offered.length;
  const filters = Object.keys(FILTERS).filter((f) => f !== "biggest" || offered.includes("advantage"));
  if (!filters.includes(view.filter)) view.filter = "all";
  radios($("filters"), "filter", filters.map((f) => [f, FILTERS[f].name]), view.filter, (filter) => {
    view.filter = filter;
    show();
  });
  $("rule").textContent = [`Shown: ${SERIES[i].rule}.`, ...SERIES[i].notes].join(" ");
  slider($("point"), SERIES[i].labels.length, view.point);
}

function chooseOther(i) {
  view.other = i;
  view.otherPoint = 0;
  $("source-b").value = i;
  slider($("point-b"), SERIES[i].labels.length, 0);
}

function slider(input, number, value) {
  input.max = number - 1;
  input.value = value;
  input.disabled = number < 2;
}

// What a point shows: its problems, only those completions that the filter lets through.
function filtered(problems) {
  const keeps = FILTERS[view.filter].keeps;
  const shown = problems.map((problem) => ({ ...problem, completions: problem.completions.filter(keeps) }));
  const biggest = (problem) => Math.max(0, ...problem.completions.map((one) => one.biggest));
  if (view.filter === "biggest") {
    for (const problem of shown) problem.completions.sort((a, b) => b.biggest - a.biggest);
    shown.sort((a, b) => biggest(b) - biggest(a));
  }
  return shown.filter((problem) => problem.completions.length);
}

let turn = 0;
async function show() {
  const mine = ++turn;
  const [a, b] = await Promise.all([unpack(view.source), unpack(view.compare ? view.other : view.source)]);
  if (mine !== turn) return; // something else was asked for meanwhile
  for (const element of document.querySelectorAll(".second")) element.hidden = !view.compare;
  const label = SERIES[view.source].labels[view.point];
  const otherLabel = SERIES[view.other].labels[view.otherPoint];
  $("point-label").textContent = label;
  $("point").setAttribute("aria-valuetext", label);
  $("point-b-label").textContent = otherLabel;
  $("point-b").setAttribute("aria-valuetext", otherLabel);
  let problems = filtered(a.points[view.point]);
  let others = new Map();
  if (view.compare) {
    others = new Map(b.points[view.otherPoint].map((problem) => [problem.key, problem]));
    problems = problems.filter((problem) => others.has(problem.key));
  }
  const chosen = problems.find((problem) => problem.key === view.problem) || problems[0];
  listProblems(problems, chosen);
  showScale(a.scales);
  $("problem").replaceChildren();
  if (!chosen) {
    const why = view.compare ? "No problem that both points have passes the filter." : "Nothing here passes the filter.";
    $("problem").append(make("p", "empty", why));
    return;
  }
  view.problem = chosen.key;
  $("problem").append(question(chosen));
  if (view.compare) {
    const sides = make("div", "sides");
    sides.append(
      side(`${SERIES[view.source].name} · ${label}`, chosen.completions, a.scales),
      side(`${SERIES[view.other].name} · ${otherLabel}`, others.get(chosen.key).completions, a.scales),
    );
    $("problem").append(sides);
  } else {
    $("problem").append(cards(chosen.completions, a.scales));
  }
}

function verdict(one) {
  if (one.reward === null) return "ungraded";
  return one.correct === null ? "" : one.correct ? "right" : "wrong";
}

function listProblems(problems, chosen) {
  const list = $("problems");
  list.replaceChildren();
  problems.forEach((problem, i) => {
    const item = make("li");
    item.id = `problem-${i}`;
    item.setAttribute("role", "option");
    item.setAttribute("aria-selected", String(problem === chosen));
    item.append(make("span", "snippet", problem.prompt.trim().slice(-200) || "(empty)"));
    const marks = make("span", "marks");
    marks.setAttribute("role", "img");
    const right = problem.completions.filter((one) => one.correct).length;
    marks.setAttribute("aria-label", `${right} of ${problem.completions.length} right`);
    for (const one of problem.completions) marks.append(make("span", `mark ${verdict(one)}`));
    item.append(marks);
    item.addEventListener("click", () => {
      view.problem = problem.key;
      show();
    });
    list.append(item);
    if (problem === chosen) {
      list.setAttribute("aria-activedescendant", item.id);
      requestAnimationFrame(() => {
        const below = item.offsetTop + item.offsetHeight - list.offsetTop - list.clientHeight;
        const above = item.offsetTop - list.offsetTop;
        if (list.scrollTop < below) list.scrollTop = below;
        if (list.scrollTop > above) list.scrollTop = above;
      });
    }
  });
  $("problems-title").textContent = `Problems (${problems.length})`;
}

function question(problem) {
  const box = make("div", "question");
  const list = make("dl");
  list.append(make("dt", "", "Prompt"), make("dd", "text mono", problem.prompt));
  list.append(make("dt", "", "Reference"), make("dd", "text mono", problem.reference));
  box.append(list);
  return box;
}

function side(title, completions, scales) {
  const box = make("div", "side");
  box.append(make("h3", "", title), cards(completions, scales));
  return box;
}

function cards(completions, scales) {
  const box = make("div", "cards");
  for (const one of completions) box.append(card(one, scales));
  return box;
}

function card(one, scales) {
  const box = make("article", `card ${verdict(one)}`);
  const head = make("div", "head");
  if (one.label) head.append(make("span", "", one.label));
  if (verdict(one)) head.append(make("span", "verdict", verdict(one)));
  const reward = make("span", "", "reward ");
  reward.append(make("b", "", number(one.reward)));
  head.append(reward, make("span", "", one.cut ? `cut (${one.finish})` : one.finish), make("span", "", one.length === undefined ? "" : `${one.length} tokens`));
  for (const [name, value] of Object.entries(one.parts)) head.append(make("span", "", `${name} ${number(value)}`));
  if (scales.advantage && !one.values.advantage) head.append(make("span", "", "not learned from"));
  box.append(head);
  if (one.error !== null) box.append(make("p", "error", one.error));
  if (!one.tokens) {
    box.append(make("div", "tokens text mono", one.text));
    return box;
  }
  const body = make("div", "tokens text mono");
  body.tabIndex = 0;
  body.setAttribute("role", "group");
  body.setAttribute("aria-label", "Completion; arrow keys move through its tokens");
  one.tokens.forEach((text, i) => {
    if (i === one.left_out_at) body.append(make("span", "gap", `… ${one.left_out} tokens left out …`));
    body.append(token(one, i, text, scales));
  });
  body.addEventListener("pointerover", (event) => read(one, body, event.target));
  body.addEventListener("click", (event) => read(one, body, event.target));
  body.addEventListener("keydown", (event) => {
    const move = { ArrowRight: 1, ArrowLeft: -1, Home: -Infinity, End: Infinity }[event.key];
    if (!move) return;
    event.preventDefault();
    const all = [...body.querySelectorAll(".t")];
    const now = all.indexOf(body.querySelector(".current"));
    const next = Math.max(0, Math.min(all.length - 1, now + move));
    read(one, body, all[next]);
    all[next].scrollIntoView({ block: "nearest" });
  });
  box.append(body);
  return box;
}

function token(one, i, text, scales) {
  const visible = text === "" ? "·" : text.replaceAll("\n", "⏎\n").replaceAll("\t", "⇥\t");
  const span = make("span", visible === text ? "t" : "t control", visible);
  span.dataset.i = i;
  if (one.sampled && !one.sampled[i]) {
    span.classList.add("given");
    return span;
  }
  const values = one.values[view.mode];
  const value = values && values[i] !== null ? MODES[view.mode].of(values[i]) : null;
  if (value) {
    const share = Math.min(1, Math.abs(value) / scales[view.mode]);
    span.classList.add(MODES[view.mode].two ? (value > 0 ? "plus" : "minus") : "amount");
    span.style.setProperty("--a", (8 + 67 * share).toFixed(0));
  }
  return span;
}

function read(one, body, span) {
  if (span.dataset.i === undefined) return;
  for (const old of document.querySelectorAll(".t.current")) old.classList.remove("current");
  span.classList.add("current");
  const i = Number(span.dataset.i);
  const parts = [`token ${i + 1} of ${one.tokens.length}: “${one.tokens[i]}”`, `id ${one.ids[i]}`];
  if (one.sampled && !one.sampled[i]) parts.push("given by the environment, not sampled");
  else for (const [mode, values] of Object.entries(one.values)) parts.push(`${MODES[mode].name.toLowerCase()} ${number(values[i])}`);
  $("token").classList.add("live");
  $("token").textContent = parts.join("  ·  ");
}

function showScale(scales) {
  const mode = MODES[view.mode];
  const legend = $("legend");
  legend.hidden = !mode;
  if (!mode) return;
  const full = scales[view.mode];
  const [low, high] = view.mode === "ratio" ? [Math.exp(-full), Math.exp(full)] : view.mode === "logp" ? [0, -full] : [mode.two ? -full : 0, full];
  legend.replaceChildren(
    make("span", "", `${mode.low} ${number(low)}`),
    make("span", `ramp ${mode.two ? "two" : "one"}`),
    make("span", "", `${number(high)} ${mode.high}`),
    make("span", "", "99 of 100 tokens lie within; colours are the same at every point"),
  );
}

function start() {
  options($("source"), SERIES.map((_, i) => i));
  $("source").addEventListener("change", () => {
    chooseSource(Number($("source").value));
    show();
  });
  $("source-b").addEventListener("change", () => {
    chooseOther(Number($("source-b").value));
    show();
  });
  $("point").addEventListener("input", () => {
    view.point = Number($("point").value);
    show();
  });
  $("point-b").addEventListener("input", () => {
    view.otherPoint = Number($("point-b").value);
    show();
  });
  $("compare").addEventListener("change", () => {
    view.compare = $("compare").checked;
    show();
  });
  $("problems").addEventListener("keydown", (event) => {
    const items = [...$("problems").children];
    const now = items.findIndex((item) => item.getAttribute("aria-selected") === "true");
    const next = { ArrowDown: now + 1, ArrowUp: now - 1, Home: 0, End: items.length - 1 }[event.key];
    if (next === undefined) return;
    event.preventDefault();
    if (items[next]) items[next].click();
  });
  chooseSource(Number($("source").value));
  show();
}

if (SERIES.length) start();
