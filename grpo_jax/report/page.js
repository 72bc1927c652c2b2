"use strict";
// Prompts and completions reach the document as text alone: `element` appends strings as text nodes, and nothing parses markup.

const PAGE = 50; // rows of the table at a time
const FULL = 2; // nats of log π/π_ref at which a token has all its colour
const HIDDEN = /[\p{Cc}\p{Cf}\p{Cs}\p{Co}\p{Zl}\p{Zp}]/u; // what a reader would not see, or what moves what he sees
const byId = (id) => document.getElementById(id);
const source = byId("data");
const live = source.dataset.live === "true";

let text = ""; // the data: a line of JSON for the runs, and one for each prompt
let starts = []; // where the lines of the prompts begin in it
let runs = [], prompts = [], columns = [], order = [], view = {}, page = {};
let version = "", joined = false, open = -1;

// ---- text ------------------------------------------------------------------------------------------------------------------

function element(name, attributes = {}, ...children) {
  const node = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    if (key === "style") Object.entries(value).forEach(([k, v]) => node.style.setProperty(k, v));
    else if (key.startsWith("on")) node.addEventListener(key.slice(2), value);
    else if (value !== undefined && value !== false) node.setAttribute(key, value === true ? "" : value);
  }
  node.append(...children.flat());
  return node;
}

function spelled(character) {
  return `\\u{${character.codePointAt(0).toString(16).padStart(4, "0")}}`;
}

/** Text as nodes: line ends are marked, and characters that cannot be seen are spelled out. */
function shown(text, oneLine = false) {
  const nodes = [];
  let plain = "";
  for (const character of text ?? "") {
    if (character === "\t" || !(character === "\n" || HIDDEN.test(character))) { plain += character; continue; }
    if (plain) nodes.push(plain);
    plain = character === "\n" && !oneLine ? "\n" : "";
    nodes.push(character === "\n" ? element("span", { class: "mark" }, "↵") : element("span", { class: "escape" }, spelled(character)));
  }
  return plain ? [...nodes, plain] : nodes;
}

const plainly = (text) => [...(text ?? "")].map((c) => (HIDDEN.test(c) ? spelled(c) : c)).join("");
const fixed = (x, digits = 3) => (x === null || x === undefined ? "–" : x.toFixed(digits));
const signed = (x, digits = 2) => (x === null || x === undefined ? "–" : (x < 0 ? "−" : "+") + Math.abs(x).toFixed(digits));
const letter = (r) => (runs.length > 1 ? " " + "AB"[r] : "");

// ---- the data, of which a prompt is parsed when it is opened -------------------------------------------------------------------

function read(data) {
  text = data;
  starts = [];
  const end = text.indexOf("\n");
  const head = JSON.parse(end < 0 ? text : text.slice(0, end));
  for (let at = end; at >= 0; at = text.indexOf("\n", at + 1)) starts.push(at + 1);
  ({ runs, prompts, joined } = head);
  page = head;
}

function promptAt(place) {
  const end = place + 1 < starts.length ? starts[place + 1] - 1 : text.length;
  return JSON.parse(text.slice(starts[place], end));
}

// ---- what is chosen, which the address holds behind its # ----------------------------------------------------------------------

function chosen() {
  const hash = location.hash.slice(1);
  const found = new URLSearchParams(hash.includes("=") ? hash : "");
  const number = (name) => (/^\d{1,9}$/.test(found.get(name) ?? "") ? Number(found.get(name)) : null);
  return { prompt: number("prompt"), sort: found.get("sort") ?? "index", down: found.get("order") === "down",
           search: found.get("search") ?? "", page: number("page") ?? 1 };
}

function address(changes) {
  const next = { ...chosen(), ...changes }, parts = new URLSearchParams();
  if (next.prompt !== null) parts.set("prompt", next.prompt);
  if (next.sort !== "index") parts.set("sort", next.sort);
  if (next.down) parts.set("order", "down");
  if (next.search) parts.set("search", next.search);
  if (next.page > 1) parts.set("page", next.page);
  return "#" + parts;
}

function go(changes, { replace = false } = {}) {
  const next = address(changes);
  if (replace) history.replaceState(null, "", next);
  else history.pushState(null, "", next);
  follow();
}

function follow() {
  const before = view;
  view = chosen();
  const same = ["sort", "down", "search"].every((key) => before[key] === view[key]);
  if (!same) arrange();
  if (!same || before.page !== view.page) drawTable();
  const place = view.prompt === null ? -1 : prompts.findIndex(([index]) => index === view.prompt);
  if (place !== open) show(place);
}

// ---- curves ----------------------------------------------------------------------------------------------------------------

function drawn(name, attributes = {}, style = {}, ...children) {
  const node = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  for (const [key, value] of Object.entries(style)) node.style.setProperty(key, value);
  node.append(...children);
  return node;
}

function ticks(low, high, count) {
  const raw = (high - low) / count || 1, power = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 5, 10].find((m) => m * power >= raw) * power, found = [];
  for (let i = Math.ceil(low / step - 1e-9); i * step <= high + 1e-9 * step; i++) found.push(Number((i * step).toPrecision(12)));
  return found;
}

/**
 * A figure of series {label, colour, x, y, low, high, dash, dots, thin, flat}: a line or dots, and a band where there are ends.
 * The pointer reads the nearest x; `pick(i)` is called for a click on dot i.
 */
function chart(figure, { title, series, across, up, within, height = 260, pick, name }) {
  const plots = series.filter((one) => one.x.length);
  const width = Math.max(figure.clientWidth - 24, 240), left = 40, right = 12, top = 8, bottom = 34;
  const xs = plots.flatMap((one) => one.x), ys = plots.flatMap((one) => [...one.y, ...(one.low ?? []), ...(one.high ?? [])]).filter((y) => y !== null);
  const [x0, x1] = within?.x ?? [Math.min(...xs, 0), Math.max(...xs, 1)], [y0, y1] = within?.y ?? [Math.min(...ys, 0), Math.max(...ys, 0.01) * 1.04];
  const X = (x) => left + ((x - x0) / (x1 - x0)) * (width - left - right), Y = (y) => top + ((y1 - y) / (y1 - y0)) * (height - top - bottom);
  const svg = drawn("svg", { viewBox: `0 0 ${width} ${height}`, height, role: "img", "aria-label": title });
  for (const y of ticks(y0, y1, 5)) {
    svg.append(drawn("line", { class: "grid", x1: left, x2: width - right, y1: Y(y), y2: Y(y) }));
    svg.append(drawn("text", { x: left - 6, y: Y(y) + 4, "text-anchor": "end" }, {}, String(y)));
  }
  for (const x of ticks(x0, x1, Math.max(3, Math.min(8, width / 90)))) svg.append(drawn("text", { x: X(x), y: height - bottom + 16, "text-anchor": "middle" }, {}, String(x)));
  svg.append(drawn("text", { x: width - right, y: height - 3, "text-anchor": "end" }, {}, across));
  for (const one of plots) {
    const known = one.x.map((_, i) => i).filter((i) => one.y[i] !== null);
    const style = { stroke: one.colour, "stroke-width": one.thin ? 1 : 1.8, "stroke-dasharray": one.dash ?? "none" };
    if (one.low) {
      const banded = known.filter((i) => one.low[i] !== null), edge = (ends) => (i) => `${X(one.x[i]).toFixed(1)},${Y(ends[i]).toFixed(1)}`;
      const points = [...banded.map(edge(one.low)), ...banded.reverse().map(edge(one.high))].join(" ");
      svg.append(drawn("polygon", { points }, { fill: one.colour, opacity: 0.16 }));
    }
    if (one.dots) {
      const radius = one.dots === true ? 3.2 : one.dots;
      for (const i of known) svg.append(drawn("circle", { class: pick ? "dot" : "", cx: X(one.x[i]), cy: Y(one.y[i]), r: radius, "data-i": i }, { fill: one.hollow ? "var(--paper)" : one.colour, stroke: one.colour, opacity: one.faint ?? 1 }));
    }
    if (one.dots !== true || one.line) svg.append(drawn("polyline", { points: known.map((i) => `${X(one.x[i]).toFixed(1)},${Y(one.y[i]).toFixed(1)}`).join(" ") }, { fill: "none", ...style }));
  }
  const pointer = drawn("line", { class: "pointer", y1: top, y2: height - bottom, visibility: "hidden" });
  svg.append(pointer);
  const tip = element("div", { class: "tip", hidden: true });
  const leave = () => { tip.hidden = true; pointer.setAttribute("visibility", "hidden"); };
  const nearest = (one, x) => one.x.reduce((best, value, i) => (one.y[i] !== null && (best < 0 || Math.abs(value - x) < Math.abs(one.x[best] - x)) ? i : best), -1);
  svg.addEventListener("pointermove", (event) => {
    const box = svg.getBoundingClientRect(), at = ((event.clientX - box.left) / box.width) * width;
    if (pick) {
      const dot = event.target.closest?.(".dot");
      if (!dot) return leave();
      tip.replaceChildren(...name(Number(dot.dataset.i)));
    } else {
      const guide = plots.find((one) => one.guide) ?? plots[0], x = guide.x[nearest(guide, x0 + ((at - left) / (width - left - right)) * (x1 - x0))];
      if (x === undefined) return leave();
      pointer.setAttribute("x1", X(x)); pointer.setAttribute("x2", X(x)); pointer.setAttribute("visibility", "visible");
      const lines = plots.filter((one) => x >= one.x[0] && x <= one.x[one.x.length - 1]).map((one) => [one, nearest(one, x)]).filter(([, i]) => i >= 0);
      tip.replaceChildren(element("b", {}, `${across} ${x}`), ...lines.map(([one, i]) => element("div", {}, element("span", { style: { color: one.colour } }, one.label), element("span", {}, fixed(one.y[i]) + (one.low ? ` [${fixed(one.low[i])}, ${fixed(one.high[i])}]` : "")))));
    }
    tip.hidden = false;
    const outer = figure.getBoundingClientRect(), place = event.clientX - outer.left;
    tip.style.left = `${Math.max(4, Math.min(place + 14, outer.width - tip.offsetWidth - 4))}px`;
    tip.style.top = `${Math.max(4, event.clientY - outer.top - tip.offsetHeight - 14)}px`;
  });
  svg.addEventListener("pointerleave", leave);
  if (pick) svg.addEventListener("click", (event) => { const dot = event.target.closest(".dot"); if (dot) pick(Number(dot.dataset.i)); });
  const legend = plots.filter((one) => !one.silent).map((one) => element("span", { style: { "--key": one.colour, "--stroke": one.dash ? "dashed" : "solid" } }, one.label));
  figure.replaceChildren(element("figcaption", {}, title), element("div", { class: "legend" }, legend), svg, tip, element("p", { class: "quiet" }, up));
}

function drawCurves() {
  const measured = ["var(--measured)", "var(--other)"], dashes = [undefined, "6 4"], success = [], spent = [];
  const last = Math.max(...runs.map((run) => run.iterations));
  runs.forEach((run, r) => {
    const level = (label, colour, ends, dash) => ends && success.push({ label: label + letter(r), colour, dash, x: [0, last], y: [ends.mean, ends.mean], low: [ends.low, ends.low], high: [ends.high, ends.high] });
    const { p_ref, p_star, attainable, forecast } = run.intervals, percent = `${Math.round(100 * run.confidence)}%`;
    success.push({ label: "mean reward of an iteration" + letter(r), colour: "var(--soft)", thin: true, x: run.rewards.iteration, y: run.rewards.mean, silent: r > 0 });
    if (p_ref) success.push({ label: "p_ref" + letter(r), colour: "var(--ink)", dash: "2 4", thin: true, x: [0, last], y: [p_ref.mean, p_ref.mean] });
    level("predicted p*", "var(--predicted)", p_star, dashes[r]);
    level("attainable p†", "var(--attainable)", attainable, dashes[r]);
    if (runs.length === 1) run.forecasts.slice(0, 2).forEach(({ iteration, path }) => success.push({ label: `forecast at ${iteration}, ${percent}`, colour: "var(--forecast)", dash: "8 3", x: path.iteration, y: path.mean, low: path.low, high: path.high }));
    const from = run.probes.iteration.at(-1), now = run.probes.mean.at(-1);
    if (forecast && now !== undefined) success.push({ label: `forecast of the end, ${percent}` + letter(r), colour: "var(--forecast)", dash: "8 3", x: [from, run.iterations], y: [now, forecast.mean], low: [now, forecast.low], high: [now, forecast.high] });
    success.push({ label: "measured p̂" + letter(r), colour: measured[r], x: run.probes.iteration, y: run.probes.mean, low: run.probes.low, high: run.probes.high, dots: 2.6, line: true, guide: r === 0 });
    const from0 = (values) => [0, ...values.slice(1)], rest = run.probes.useful.map((u, i) => (u === null || run.probes.at_rest[i] === null ? null : u + run.probes.at_rest[i]));
    const curve = (label, colour, values, dash) => values.some((x) => x !== null) && spent.push({ label: label + letter(r), colour, dash: r ? "6 4" : dash, x: run.probes.iteration, y: from0(values), guide: label.startsWith("KL") && r === 0 });
    curve("KL(π‖π_ref)", "var(--ink)", run.probes.kl);
    curve("useful, kl(p̂‖p_ref)", measured[r], run.probes.useful);
    if (rest.some((x) => x !== null)) curve("useful + at rest", "var(--predicted)", rest, "2 3");
  });
  const seams = runs[0].extended.map((one) => one.after);
  const note = seams.length ? ` Extended after iteration ${seams.join(", ")}.` : "";
  const levels = success.flatMap((one) => [...one.y, ...(one.low ?? []), ...(one.high ?? [])]).filter((y) => y !== null);
  const tenth = (round, value) => Math.min(1, Math.max(0, round(10 * value) / 10));
  const heights = [tenth(Math.floor, Math.min(...levels) - 0.02), tenth(Math.ceil, Math.max(...levels) + 0.02)];
  chart(byId("success"), { title: "Success probability", series: success, across: "iteration", up: `Mean over prompts, bands are ${Math.round(100 * runs[0].confidence)}% intervals.${note}`, within: { x: [0, last], y: heights }, height: 300 });
  chart(byId("spent"), { title: "What the KL was spent on", series: spent, across: "iteration", up: "Nats per completion, mean over prompts.", height: 250 });
  const moved = [{ label: "no change", colour: "var(--soft)", dash: "2 4", thin: true, x: [0, 1], y: [0, 1] }];
  const order = runs[0].prompts.p_ref.map((_, i) => i).sort((a, b) => runs[0].prompts.p_ref[a] - runs[0].prompts.p_ref[b]);
  const places = [];
  runs.slice(0, joined ? 2 : 1).forEach((run, r) => {
    const { p_ref, p_star, p_final } = run.prompts, ordered = order.filter((i) => i < p_ref.length);
    if (p_star) moved.push({ label: "predicted p*(p_ref)" + letter(r), colour: "var(--predicted)", dash: dashes[r], x: ordered.map((i) => p_ref[i]), y: ordered.map((i) => p_star[i]) });
    if (p_final) moved.push({ label: "measured p̂ of a prompt" + letter(r), colour: measured[r], x: p_ref, y: p_final, dots: true, faint: 0.65 });
  });
  const title = (place) => [element("b", {}, `prompt ${prompts[place][0]}`), element("div", {}, plainly(prompts[place][1] ?? "")), ...runs.slice(0, joined ? 2 : 1).map((run, r) => element("div", {}, `p_ref ${fixed(run.prompts.p_ref[place])}`, element("span", {}, `p̂${letter(r)} ${fixed(run.prompts.p_final?.[place])}`)))];
  chart(byId("moved"), { title: "Prompt by prompt", series: moved, across: "p_ref", up: "Success at the end over success under the reference; a dot opens its prompt.", within: { x: [0, 1], y: [0, 1] }, height: 250, pick: (i) => go({ prompt: prompts[i][0] }), name: title });
}

// ---- head, ledger, settings ------------------------------------------------------------------------------------------------

function drawHead() {
  const [run] = runs, count = (n) => n.toLocaleString("en"), done = (one) => ` iteration ${count(one.done)} of ${count(one.iterations)}`;
  const parts = runs.flatMap((one, r) => [r ? " compared with " : "", ...(letter(r) ? [letter(r).trim() + " "] : []), element("b", {}, plainly(one.name)), " ·" + done(one)]);
  document.title = `${plainly(run.name)} · ${run.title}`;
  byId("names").replaceChildren(...parts);
  byId("title").textContent = runs.length > 1 && runs[1].title !== run.title ? `${run.title} · ${runs[1].title}` : run.title;
  const words = runs.map((one, r) => element("p", {}, element("span", { class: `word ${one.standing ?? ""}` }, (letter(r) + " ").trimStart() + (one.standing ?? "on its way")), ...shown((one.words ?? "").replace(`${one.standing}: `, ""))));
  byId("words").replaceChildren(...words.map((p) => element("span", {}, ...p.childNodes, element("br"))));
  byId("progress").hidden = run.standing !== null;
  byId("progress").firstElementChild.style.width = `${(100 * run.done) / run.iterations}%`;
  const tile = (label, value, more, colour) => element("dl", { class: "tile", style: { "--key": colour } }, element("dt", {}, label), element("dd", {}, value, element("small", {}, more)));
  byId("tiles").replaceChildren(...runs.map((one, r) => {
    const names = { p_ref: ["p_ref", "var(--ink)"], p_star: ["predicted p*", "var(--predicted)"], attainable: ["attainable p†", "var(--attainable)"], p_now: [`p̂ at iteration ${one.probes.iteration.at(-1)}`, "var(--measured)"], forecast: ["forecast of the end", "var(--forecast)"], p_final: ["measured p̂", r ? "var(--other)" : "var(--measured)"] };
    const tiles = Object.entries(names).filter(([key]) => one.intervals[key]).map(([key, [label, colour]]) => { const { mean, low, high } = one.intervals[key]; return tile(label + letter(r), fixed(mean), low === null ? "" : `[${fixed(low)}, ${fixed(high)}]`, colour); });
    const kl = one.probes.kl.at(-1);
    if (kl !== undefined && kl !== null) tiles.push(tile("KL(π‖π_ref)" + letter(r), fixed(kl), "nats", "var(--line)"));
    return element("div", { class: "tiles" }, tiles);
  }));
}

function drawLedger() {
  const names = { useful: ["useful, kl(p̂‖p_ref)", "var(--measured)"], within_successes: ["within successes", "var(--forecast)"], within_failures: ["within failures", "var(--predicted)"] };
  byId("parts").replaceChildren(...runs.flatMap((run, r) => {
    if (!run.ledger) return [];
    const parts = Object.entries(run.ledger).map(([key, nats]) => [...names[key], nats]), total = parts.reduce((sum, [, , nats]) => sum + Math.max(0, nats ?? 0), 0) || 1;
    const bars = parts.map(([label, colour, nats]) => element("span", { title: label, style: { background: colour, width: `${(100 * Math.max(0, nats ?? 0)) / total}%` } }));
    return [element("div", { class: "quiet" }, `What the KL${letter(r)} was spent on, in nats`), element("div", { class: "bars" }, bars), element("div", { class: "legend" }, parts.map(([label, colour, nats]) => element("span", { style: { "--key": colour } }, `${label} ${signed(nats, 4)}`)))];
  }));
  const maps = runs.map((run) => new Map(run.lines)), labels = [...new Set(runs.flatMap((run) => run.lines.map(([label]) => label)))];
  byId("lines").tBodies[0].replaceChildren(...labels.map((label) => element("tr", {}, element("th", { scope: "row" }, label), maps.map((map, r) => element("td", {}, ...(runs.length > 1 ? [element("b", {}, "AB"[r] + "  ")] : []), ...shown(map.get(label) ?? "–"))))));
  const [config, other] = runs.map((run) => run.config), keys = Object.keys(config).filter((key) => !other || JSON.stringify(config[key]) !== JSON.stringify(other[key]));
  const details = byId("settings").querySelector("details");
  details.open ||= Boolean(other);
  details.querySelector("summary").textContent = other ? `${keys.length} settings differ` : `${keys.length} settings`;
  details.querySelector("tbody").replaceChildren(...keys.map((key) => element("tr", {}, element("th", { scope: "row" }, key), runs.map((run) => element("td", {}, ...shown(JSON.stringify(run.config[key]) ?? "–"))))));
}

function drawLatest() {
  const { latest } = page;
  byId("latest").hidden = !latest;
  if (!latest) return;
  const cards = latest.completions.map(([place, completion]) => element("div", { class: "card" }, element("div", { class: "model" }, element("a", { href: address({ prompt: prompts[place][0] }) }, ...shown(prompts[place][1]))), ...drawCompletion(completion)));
  byId("latest").replaceChildren(element("h2", {}, `Samples at iteration ${latest.iteration}`), element("div", { class: "sides" }, cards), heat());
}

// ---- the table -----------------------------------------------------------------------------------------------------------------

function describeColumns() {
  const number = (key, label, values, more = {}) => (values ? [{ key, label, value: (i) => values[i], number: true, ...more }] : []);
  const [a, b] = runs.map((run) => run.prompts), two = runs.length > 1 && joined;
  columns = [
    { key: "index", label: "#", value: (i) => prompts[i][0], number: true, digits: 0 },
    { key: "prompt", label: "prompt", value: (i) => prompts[i][1] },
    { key: "target", label: "target", value: (i) => prompts[i][2], spare: true },
    ...number("p_ref", "p_ref", a.p_ref),
    ...number("p_star", two ? "p* A" : "p*", a.p_star, { spare: two }),
    ...number("attainable", "p†", two ? undefined : a.attainable, { spare: true }),
    ...number("p_final", two ? "p̂ A" : "p̂", a.p_final),
  ];
  if (two) columns.push(...number("p_star_b", "p* B", b.p_star, { spare: true }), ...number("p_final_b", "p̂ B", b.p_final));
  const difference = (x, y) => (i) => (x[i] === null || y[i] === null ? null : x[i] - y[i]);
  if (two && a.p_final && b.p_final) columns.push({ key: "change", label: "p̂ B − A", value: difference(b.p_final, a.p_final), number: true, sign: true });
  if (!two && a.p_final && a.p_star) columns.push({ key: "difference", label: "p̂ − p*", value: difference(a.p_final, a.p_star), number: true, sign: true, spare: true });
  if (!two) columns.push(...number("kl", "KL", a.kl, { spare: true }));
  if (!two && a.p_final) columns.push({ key: "gain", label: "p_ref → p̂", value: difference(a.p_final, a.p_ref), track: true, spare: true });
}

function arrange() {
  const column = columns.find(({ key }) => key === view.sort) ?? columns[0], wanted = view.search.toLowerCase();
  const found = (i) => [prompts[i][1], prompts[i][2], `#${prompts[i][0]}`].some((x) => (x ?? "").toLowerCase().includes(wanted));
  order = prompts.map((_, i) => i).filter((i) => !wanted || found(i));
  const values = new Map(order.map((i) => [i, column.value(i)])), compare = new Intl.Collator("en").compare;
  order.sort((i, j) => {
    const x = values.get(i) ?? null, y = values.get(j) ?? null;
    if (x === null || y === null) return (x === null) - (y === null) || i - j; // what is not known comes last
    return (typeof x === "number" ? x - y : compare(x, y)) * (view.down ? -1 : 1) || i - j;
  });
}

function track(i) {
  const { p_ref, p_star, p_final } = runs[0].prompts, [from, to] = [p_ref[i], p_final[i]].sort((a, b) => a - b), left = (x) => ({ left: `${100 * x}%` });
  return element("span", { class: "track" }, element("i", { style: { ...left(from), width: `${100 * (to - from)}%` } }), element("b", { style: left(p_final[i]) }), p_star ? element("u", { style: left(p_star[i]) }) : "");
}

function cell(column, i) {
  const value = column.value(i), spare = column.spare ? " spare" : "";
  if (column.track) return element("td", { class: spare.trim() }, track(i));
  if (column.key === "index") return element("td", { class: "number" }, String(value));
  if (column.number) return element("td", { class: "number" + spare }, column.sign ? signed(value, 3) : fixed(value));
  const words = value === null ? [element("span", { class: "quiet" }, "not kept")] : shown(value, true);
  return element("td", { class: `text ${column.key}${spare}` }, column.key === "prompt" ? element("a", { href: address({ prompt: prompts[i][0] }) }, ...words) : words);
}

function drawTable() {
  const pages = Math.max(1, Math.ceil(order.length / PAGE)), at = Math.min(Math.max(view.page, 1), pages), table = byId("table");
  const sorted = columns.some(({ key }) => key === view.sort) ? view.sort : "index";
  const sort = (key) => go({ sort: key, down: sorted === key ? !view.down : false, page: 1 }, { replace: true });
  table.tHead.replaceChildren(element("tr", {}, columns.map((column) => element("th", { scope: "col", class: (column.number ? "number" : "") + (column.spare ? " spare" : ""), "aria-sort": sorted === column.key ? (view.down ? "descending" : "ascending") : undefined }, element("button", { type: "button", "data-sort": column.key, onclick: () => sort(column.key) }, column.label)))));
  table.tBodies[0].replaceChildren(...order.slice((at - 1) * PAGE, at * PAGE).map((i) => element("tr", { "data-index": prompts[i][0], onclick: (event) => event.target.closest("a") || go({ prompt: prompts[i][0] }) }, columns.map((column) => cell(column, i)))));
  byId("count").textContent = order.length === prompts.length ? `${prompts.length.toLocaleString("en")} prompts` : `${order.length.toLocaleString("en")} of ${prompts.length.toLocaleString("en")} prompts`;
  byId("at").textContent = `Page ${at} of ${pages}`;
  byId("back").disabled = at <= 1;
  byId("next").disabled = at >= pages;
  if (document.activeElement !== byId("search")) byId("search").value = view.search;
}

// ---- a prompt, before and after --------------------------------------------------------------------------------------------------

function heat() {
  return element("p", { class: "heat" }, element("span", {}, `−${FULL}`), element("i"), element("span", {}, `+${FULL} nats of log π/π_ref`));
}

function drawTokens({ pieces, log_ratios: ratios, truncated }) {
  return pieces.map((piece, i) => {
    const ratio = ratios?.[i], attributes = { class: "token" };
    if (typeof ratio === "number") {
      attributes.style = { background: `rgba(var(--${ratio < 0 ? "down" : "up"}), ${(0.75 * Math.min(1, Math.abs(ratio) / FULL)).toFixed(3)})` };
      attributes["data-nats"] = signed(ratio, 3);
    }
    const ends = piece === "" && i === pieces.length - 1 && truncated === false;
    return element("span", attributes, ...(piece ? shown(piece) : [element("span", { class: "mark" }, ends ? "■" : "‥")]));
  });
}

function drawCompletion(completion) {
  const { reward, verdict, truncated, log_ratios: ratios, pieces } = completion, right = reward > 0;
  const known = ratios?.filter((x) => x !== null) ?? [], total = known.reduce((sum, x) => sum + x, 0);
  const facts = [element("span", { class: `verdict${right ? " right" : ""}` }, `${right ? "✓" : "✗"} ${verdict ?? (right ? "correct" : "wrong")}`)];
  if (ratios) facts.push(element("span", {}, `${pieces.length} tokens`), element("span", {}, `Σ ${signed(total)} nats`));
  if (truncated) facts.push(element("span", {}, "truncated"));
  return [element("header", {}, facts), element("div", { class: "model", tabindex: 0 }, drawTokens(completion))];
}

function drawSheet(place) {
  const prompt = promptAt(place), [index] = prompts[place], many = runs.length > 1 && joined;
  byId("which").textContent = `Prompt ${index}`;
  const parts = [element("h3", {}, "Prompt"), element("div", { class: "card model" }, ...(prompt.prompt === null ? ["Its text is kept once the run has ended."] : shown(prompt.prompt)))];
  if (prompt.target) parts.push(element("h3", {}, "Target"), element("div", { class: "card model" }, ...shown(prompt.target)));
  const facts = runs.slice(0, many ? 2 : 1).map((run, r) => ["p_ref", "p_star", "attainable", "p_final"].filter((key) => run.prompts[key]).map((key) => `${{ p_ref: "p_ref", p_star: "p*", attainable: "p†", p_final: "p̂" }[key]}${letter(r)} ${fixed(run.prompts[key][place])}`).join(" · "));
  parts.push(element("p", { class: "quiet" }, facts.join(" — ")), heat());
  const column = (label, completions) => element("section", { style: { margin: 0 } }, element("h3", {}, label), completions.length ? completions.map((one) => element("div", { class: "card" }, drawCompletion(one))) : element("p", { class: "quiet" }, "none kept"));
  parts.push(element("div", { class: "sides" }, ...prompt.runs.flatMap((side, r) => (r ? [column("After B", side.after)] : [column(runs[0].standing === null ? "Reference" : "Before", side.before), ...(runs[0].standing === null ? [] : [column("After" + letter(0), side.after)])]))));
  const during = prompt.runs[0].during;
  if (during.length) parts.push(element("h3", {}, "On the way"), ...during.toReversed().map(({ iteration, completions }, i) => element("details", { open: i === 0 }, element("summary", {}, `iteration ${iteration}`), element("div", { class: "sides" }, completions.map((one) => element("div", { class: "card" }, drawCompletion(one)))))));
  byId("content").replaceChildren(...parts);
  byId("token").textContent = "Point at a token, or tap it, to read its log π/π_ref.";
  const at = order.indexOf(place);
  byId("previous").disabled = at <= 0;
  byId("following").disabled = at < 0 || at >= order.length - 1;
}

function show(place) {
  open = place;
  const sheet = byId("sheet");
  if (place < 0) { if (sheet.open) sheet.close(); return; }
  drawSheet(place);
  if (!sheet.open) sheet.showModal();
  byId("content").scrollTop = 0;
}

function readToken(event) {
  const token = event.target.closest(".token");
  if (!token) return;
  document.querySelectorAll(".token.chosen").forEach((one) => one.classList.remove("chosen"));
  token.classList.add("chosen");
  const words = `“${token.textContent}” log π/π_ref ${token.dataset.nats ? `${token.dataset.nats} nats` : "not known"}`;
  byId("token").textContent = token.title = words;
}

// ---- all of it ---------------------------------------------------------------------------------------------------------------

function draw() {
  byId("report").hidden = false;
  drawHead();
  const begun = prompts.length > 0;
  for (const id of ["curves", "ledger", "prompts"]) byId(id).hidden = !begun;
  byId("status").textContent = !begun ? "The reference is being made and measured; what is found will show here." : "";
  drawLedger();
  if (!begun) return;
  drawCurves();
  drawLatest();
  describeColumns();
  view = chosen();
  arrange();
  drawTable();
}

async function refresh() {
  try {
    const answer = await fetch(`data?version=${encodeURIComponent(version)}`, { cache: "no-store" });
    if (answer.status === 200) {
      version = answer.headers.get("X-Version") ?? "";
      read(await answer.text());
      const scrolled = byId("content").scrollTop;
      draw();
      if (open >= 0) { drawSheet(open); byId("content").scrollTop = scrolled; }
    }
    if (prompts.length) byId("status").textContent = runs[0].standing === null ? "Live: this page follows the run." : "The run has ended.";
  } catch {
    byId("status").textContent = "What served this page is gone; it shows what was known last.";
  }
  setTimeout(refresh, 2000);
}

const step = (by) => { const place = order[order.indexOf(open) + by]; if (place !== undefined) go({ prompt: prompts[place][0] }, { replace: true }); };
byId("search").addEventListener("input", (event) => go({ search: event.target.value, page: 1 }, { replace: true }));
byId("back").addEventListener("click", () => go({ page: view.page - 1 }, { replace: true }));
byId("next").addEventListener("click", () => go({ page: view.page + 1 }, { replace: true }));
byId("previous").addEventListener("click", () => step(-1));
byId("following").addEventListener("click", () => step(1));
byId("close").addEventListener("click", () => go({ prompt: null }));
byId("sheet").addEventListener("cancel", (event) => { event.preventDefault(); go({ prompt: null }); });
byId("sheet").addEventListener("click", (event) => { if (event.target === byId("sheet")) go({ prompt: null }); });
byId("sheet").addEventListener("keydown", (event) => { const by = { ArrowLeft: -1, ArrowRight: 1 }[event.key]; if (by && !event.altKey && !event.ctrlKey && !event.metaKey) step(by); });
for (const name of ["pointerover", "click"]) document.addEventListener(name, readToken);
for (const name of ["popstate", "hashchange"]) window.addEventListener(name, follow);
let waiting = 0;
window.addEventListener("resize", () => { clearTimeout(waiting); waiting = setTimeout(() => prompts.length && drawCurves(), 150); });

read(source.textContent);
source.remove();
draw();
follow();
if (/^#\w+$/.test(location.hash)) byId(location.hash.slice(1))?.scrollIntoView(); // a link to a part of the page
if (live) refresh();
