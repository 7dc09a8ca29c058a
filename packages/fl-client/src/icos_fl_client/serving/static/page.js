"use strict";
// Asks every few seconds what is forecast, and what was said of the metric that is shown when a step has ended.
const POLL_MS = 2000;
const LEVELS = ["80", "95"];
const NAMES = { combination: "all, mixed: what is said", last: "the last value", model: "the federated model" };
const KINDS = { mean: "mean", median: "median", drift: "drift", memory: "memory by" };
const $ = (id) => document.getElementById(id);
let answer = null; // of /api/forecasts
let record = null; // of /api/record, with `of`: which metric it is of, and of when
let shown = null; // "node/metric"
let ahead = null; // horizon whose past is shown
let skewMs = 0; // how far the forecaster's clock is before this one's
let asked = 0; // questions so far: an answer that comes late is left alone

// What the DOM needs.
function make(tag, attributes = {}, ...children) {
  const svg = ["svg", "path", "line", "text", "circle", "g"].includes(tag);
  const made = svg ? document.createElementNS("http://www.w3.org/2000/svg", tag) : document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  made.append(...children);
  return made;
}
function say(id, text) { // what has not changed is not read out again
  if ($(id).textContent !== text) $(id).textContent = text;
}
function table(into, head, rows) {
  into.replaceChildren(make("thead", {}, make("tr", {}, ...head.map((h) => make("th", { scope: "col" }, h)))),
    make("tbody", {}, ...rows.map(([first, ...rest]) =>
      make("tr", {}, make("th", { scope: "row" }, first), ...rest.map((cell) => make("td", {}, cell))))));
}

// Numbers, times, words.
function number(value) {
  if (value === null || value === undefined) return "–";
  const size = Math.abs(value);
  return value.toLocaleString("en", { maximumFractionDigits: size >= 100 ? 0 : size >= 10 ? 1 : 2 });
}
const unit = (found) => (found.unit ? `, ${found.unit}` : "");
const percent = (share) => (share === null ? "–" : `${Math.round(share * 100)} %`);
const span = (lower, upper) => (lower === null ? "not known yet" : `${number(lower)} to ${number(upper)}`);
const clock = (seconds, more = {}) =>
  new Date(seconds * 1000).toLocaleTimeString("en-GB", { hour: "2-digit", minute: "2-digit", ...more });
function long(seconds) {
  for (const [unit, length] of [["day", 86400], ["hour", 3600], ["minute", 60]]) {
    const count = Math.round(seconds / length * 10) / 10;
    if (count >= 1) return `${count} ${unit}${count === 1 ? "" : "s"}`;
  }
  return `${Math.round(seconds)} s`;
}
function forecaster(name) {
  const [kind, steps] = name.split(/-(?=\d+$)/);
  const [first, ...more] = kind.split("-");
  return NAMES[name] ?? (KINDS[first] && steps ? `${[KINDS[first], ...more].join(" ")}, ${steps} steps` : name);
}
const key = (found) => `${encodeURIComponent(found.node)}/${encodeURIComponent(found.metric)}`;
const titled = (found) => found.metric.replaceAll("_", " ");

// Questions.
async function ask(path) {
  const token = sessionStorage.getItem("token");
  const headers = token ? { Authorization: `Bearer ${token}` } : {};
  const reply = await fetch(path, { headers, signal: AbortSignal.timeout(10000) });
  if (reply.status === 401) throw Object.assign(new Error("a token is needed"), { unauthorized: true, token });
  if (!reply.ok) throw new Error(`${reply.status}: ${await reply.text()}`);
  return reply.json();
}
async function look() {
  const mine = ++asked;
  try {
    const found = await ask("api/forecasts");
    if (mine !== asked) return;
    answer = found;
    skewMs = answer.now === null ? 0 : answer.now * 1000 - Date.now();
    $("token").hidden = true;
    await choose();
    say("state", answer.now === null ? "Recorded rows: times are those of the recording" : "Live");
  } catch (error) {
    if (mine !== asked) return;
    if (error.unauthorized) {
      $("content").hidden = true;
      $("token").hidden = false;
      say("state", error.token ? "This token is not known" : "");
      sessionStorage.removeItem("token");
    } else say("state", `The forecaster does not answer${answer ? "; what is shown is old" : ""}`);
  }
}
async function choose() {
  const keys = answer.forecasts.map(key);
  const wanted = location.hash.slice(1);
  shown = keys.includes(wanted) ? wanted : keys[0] ?? null;
  const found = answer.forecasts.find((each) => key(each) === shown);
  if (found) {
    const of = `${shown} ${found.time}`;
    if (record?.of !== of) {
      const query = new URLSearchParams({ node: found.node, metric: found.metric });
      record = { of, ...(await ask(`api/record?${query}`)) };
    }
  }
  show(found);
}

// What is shown.
function show(found) {
  $("content").hidden = false;
  $("metric").hidden = !found;
  showNodes();
  if (!found) return;
  document.title = `${titled(found)}, ${found.node}: forecasts`;
  say("title", `${titled(found)} of ${found.node}`);
  $("none").hidden = !found.none;
  $("expected").hidden = Boolean(found.none);
  if (found.none) say("none", `No forecast (${found.none.reason}): ${found.none.message}`);
  showNow();
  showAhead(found);
  showExpected(found);
  showFared(found);
  const model = found.model;
  say("model", model ? `Round ${model.round} takes part` + (model.created === null ? "." :
    `; the node got it ${answer.now === null ? `at ${clock(model.created)}` : `${long(answer.now - model.created)} ago`}.`)
    : `No model takes part: ${found.no_model}.`);
}
function showNodes() {
  const of = new Map(answer.nodes.map((node) => [node.name, []]));
  for (const found of answer.forecasts) of.set(found.node, [...(of.get(found.node) ?? []), found]);
  const there = JSON.stringify([...of].map(([name, metrics]) => [name, metrics.map(key)]));
  if ($("nodes").dataset.there !== there) { // only then: a link that is made anew loses the focus
    $("nodes").dataset.there = there;
    $("nodes").replaceChildren(...[...of].map(([name, metrics]) => make("li", {}, make("strong", {}, name), make("div"),
      make("ul", {}, ...metrics.map((found) => make("li", {}, make("a", { href: `#${key(found)}` }, make("span", {}, titled(found)), make("span"))))))));
    if (!of.size) $("nodes").append(make("li", {}, "No window yet: rows are awaited."));
  }
  [...of].forEach(([name, metrics], place) => {
    const [, health, links] = $("nodes").children[place].children;
    showHealth(health, answer.nodes.find((node) => node.name === name));
    metrics.forEach((found, at) => {
      const link = links.children[at].firstChild;
      if (key(found) === shown) link.setAttribute("aria-current", "page"); else link.removeAttribute("aria-current");
      link.lastChild.textContent = found.none ? found.none.reason : `${number(found.value)} ${found.unit}`;
    });
  });
}
function showHealth(into, node) {
  if (!node) return;
  into.replaceChildren(...node.conditions.map((each) =>
    make("small", {}, make("strong", {}, `⚠ ${each.condition}`), ` ${each.column.replaceAll("_", " ")}: ${each.reason}`)),
    make("small", {}, `${node.conditions.length ? "" : "healthy, "}window ${number(node.rows)} of ${number(node.capacity_rows)} rows`),
    make("progress", { value: node.rows, max: node.capacity_rows, "aria-label": `window of ${node.name}` }));
}
function showNow() {
  const found = answer?.forecasts.find((each) => key(each) === shown);
  if (!found || found.time === null) return $("now").replaceChildren("No step is whole yet.");
  const age = answer.now === null ? "" : `, ${long(Math.max(0, (Date.now() + skewMs) / 1000 - found.time))} ago`;
  $("now").replaceChildren(make("strong", {}, `${number(found.value)} ${found.unit}`),
    ` on average in the ${long(found.interval_s)} to ${clock(found.time, { second: "2-digit" })}${age}`);
}
function showAhead(found) {
  const names = found.horizons.map((each) => each.ahead);
  if (!names.includes(ahead)) ahead = names[Math.min(1, names.length - 1)];
  const there = [...$("ahead").querySelectorAll("input")].map((each) => each.value);
  if (there.join() === names.join()) return;
  $("ahead").querySelectorAll("label").forEach((each) => each.remove());
  for (const each of found.horizons) {
    const radio = make("input", { type: "radio", name: "ahead", value: each.ahead });
    radio.checked = each.ahead === ahead;
    radio.onchange = () => { ahead = each.ahead; showFared(answer.forecasts.find((one) => key(one) === shown)); };
    $("ahead").append(make("label", {}, radio, ` ${long(each.ahead_s)}`));
  }
}
function showExpected(found) {
  if (found.none) return;
  table($("horizons"), ["in", `forecast${unit(found)}`, "80 %", "95 %"], found.horizons.map((each) => [
    long(each.ahead_s), number(each.yhat), span(each.lower_80, each.upper_80), span(each.lower_95, each.upper_95)]));
  const farthest = found.horizons.at(-1).ahead_s;
  const came = points(record, record.values).filter(([time]) => time >= found.time - Math.max(farthest, 600));
  const from = [found.time, found.value];
  const said = found.horizons.map((each) => [found.time + each.ahead_s, each.yhat]);
  const bands = LEVELS.toReversed().map((level) => [`band-${level}`, [[...from, found.value],
    ...found.horizons.map((each) => [found.time + each.ahead_s, each[`lower_${level}`], each[`upper_${level}`]])]]);
  const text = found.horizons.map((each) => `${number(each.yhat)} in ${long(each.ahead_s)}`).join(", ");
  plot($("outlook"), {
    label: `${titled(found)} is ${number(found.value)} ${found.unit}; expected are ${text}.`,
    caption: "Solid: what came. Dashed: what is expected, forecast at the dots. What comes is in the 80 % interval in 8 of 10 cases, in the lighter 95 % one in 19 of 20.",
    unit: found.unit, bands, lines: [["came", came], ["yhat", [from, ...said]]], marks: [["mark", said]], now: found.time,
  });
  numbers($("outlook"), ["time", `what came${unit(found)}`],
    () => came.toReversed().map(([time, value]) => [clock(time, { second: "2-digit" }), number(value)]));
}
function showFared(found) {
  const horizon = found.horizons.find((each) => each.ahead === ahead);
  const past = record.horizons.find((each) => each.ahead === ahead);
  const said = past.errors.find((each) => each.name === "combination");
  say("fared", !said ? `No forecast of ${long(horizon.ahead_s)} ahead has come to its end yet.` :
    `In ${number(said.cases)} cases it was off by ${number(said.error)} ${found.unit === "%" ? "percentage points" : found.unit} on average` +
    (said.ratio === null ? "." : `: ${said.ratio.toFixed(2)} times the error of repeating the last value.`) +
    (past.coverage_80 === null ? "" : ` The 80 % interval held ${percent(past.coverage_80)} of what came, the 95 % interval ${percent(past.coverage_95)}.`));
  const came = points(record, record.values);
  const outside = came.filter(([, value], i) => value !== null && past.lower_80[i] !== null && (value < past.lower_80[i] || value > past.upper_80[i]));
  const judged = came.filter(([, value], i) => value !== null && past.lower_80[i] !== null).length;
  plot($("record"), {
    label: `What came of ${titled(found)}, over what had been said ${long(horizon.ahead_s)} before: ${outside.length} of ${judged} values are outside the 80 % interval.`,
    caption: `Solid: what came. Dashed: what had been said ${long(horizon.ahead_s)} before, with its 80 % interval. ${judged ? `Dots: the ${outside.length} of ${judged} values outside it.` : ""}`,
    unit: found.unit, bands: [["band-80", came.map(([time], i) => [time, past.lower_80[i], past.upper_80[i]])]],
    lines: [["came", came], ["yhat", points(record, past.yhat)]], marks: [["outside", outside]],
  });
  numbers($("record"), ["time", "what came", "had been said", "80 % interval"], () => came.map(([time, value], i) =>
    [clock(time, { second: "2-digit" }), number(value), number(past.yhat[i]), span(past.lower_80[i], past.upper_80[i])]).toReversed());
  $("by-forecaster").hidden = !said;
  if (said) showErrors(found, past.errors);
}
function showErrors(found, errors) {
  const sorted = errors.toSorted((one, other) => (one.ratio ?? 1) - (other.ratio ?? 1));
  const most = Math.max(1, ...sorted.map((each) => each.ratio ?? 0));
  table($("errors"), ["forecaster", "÷ last value", "", `error${unit(found)}`, "cases"], sorted.map((each) => {
    const bar = make("div", { class: "bar" });
    bar.style.width = `${100 * (each.ratio ?? 0) / most}%`;
    return [forecaster(each.name), each.ratio?.toFixed(2) ?? "–", bar, number(each.error), number(each.cases)];
  }));
  sorted.forEach((each, place) => $("errors").tBodies[0].rows[place].classList.toggle("said", each.name === "combination"));
}
const points = (from, values) => values.map((value, i) => [from.first_time + i * from.interval_s, value]);
function numbers(figure, head, rows) { // behind the plot, made when somebody looks
  let details = figure.querySelector("details");
  if (!details) {
    details = make("details", {}, make("summary", {}, "Numbers"),
      make("div", { class: "scroll", role: "region", tabindex: 0, "aria-label": "Numbers" }, make("table")));
    figure.append(details);
  }
  const fill = () => { if (details.open) table(details.querySelector("table"), head, rows()); };
  details.ontoggle = fill;
  fill();
}

// A plot: {label, caption, unit, bands, lines, marks, now}; points are [seconds, value], null for none.
function plot(figure, given) {
  figure.hidden = false; // else it has no width
  const width = Math.max(280, figure.clientWidth), height = Math.min(300, 160 + width / 8), left = 52, bottom = 22, top = 28;
  const values = [...given.bands.flatMap(([, of]) => of.flatMap(([, lower, upper]) => [lower, upper])),
    ...given.lines.flatMap(([, of]) => of.map(([, value]) => value))].filter((value) => value !== null);
  figure.hidden = !values.length;
  if (figure.hidden) return;
  const times = [...given.bands, ...given.lines].flatMap(([, of]) => of.filter((each) => !each.includes(null)).map(([time]) => time));
  const most = Math.max(...values), ticks = nice(Math.min(...values), most), low = ticks[0], high = Math.max(most, ticks.at(-1));
  const first = Math.min(...times), last = Math.max(...times, first + 1);
  const x = (time) => left + (time - first) / (last - first) * (width - left - 8);
  const y = (value) => height - bottom - (value - low) / (high - low) * (height - bottom - top);
  const at = ([time, value]) => `${x(time).toFixed(1)},${y(value).toFixed(1)}`;
  const svg = make("svg", { role: "img", "aria-label": given.label, viewBox: `0 0 ${width} ${height}`, height });
  svg.append(make("text", { x: 0, y: 12 }, given.unit));
  for (const value of ticks)
    svg.append(make("line", { class: "grid", x1: left, x2: width - 8, y1: y(value), y2: y(value) }),
      make("text", { x: left - 6, y: y(value) + 4, "text-anchor": "end" }, number(value)));
  for (const time of evenly(first, last, width < 480 ? 3 : 6))
    svg.append(make("text", { x: x(time), y: height - 4, "text-anchor": "middle" }, clock(time)));
  for (const [kind, of] of given.bands)
    for (const run of runs(of)) {
      const upper = run.map(([time, , value]) => at([time, value])), lower = run.map(([time, value]) => at([time, value]));
      svg.append(make("path", { class: kind, d: `M${upper.join("L")}L${lower.reverse().join("L")}Z` }));
    }
  if (given.now !== undefined)
    svg.append(make("line", { class: "now", x1: x(given.now), x2: x(given.now), y1: top - 8, y2: height - bottom }),
      make("text", { x: x(given.now), y: 14, "text-anchor": "middle" }, "now"));
  for (const [kind, of] of given.lines) svg.append(make("path", { class: kind, d: runs(of).map((run) => `M${run.map(at).join("L")}`).join("") }));
  for (const [kind, of] of given.marks)
    for (const each of of) svg.append(make("circle", { class: kind, cx: x(each[0]), cy: y(each[1]), r: 3.5 }));
  const before = figure.querySelector("svg");
  if (before) { before.replaceWith(svg); figure.querySelector("figcaption").textContent = given.caption; }
  else figure.prepend(svg, make("figcaption", {}, given.caption));
}
function runs(of) { // without a value a line or band ends
  const found = [[]];
  for (const each of of) each.includes(null) ? found.push([]) : found.at(-1).push(each);
  return found.filter((run) => run.length > 1);
}
function nice(low, high) {
  const range = high - low || Math.abs(high) || 1;
  const rough = range / 4, power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 2.5, 5, 10].map((each) => each * power).find((each) => each >= rough);
  const ticks = [];
  for (let tick = Math.floor(low / step); ticks.length < 2 || tick * step <= high; tick++) ticks.push(tick * step);
  return ticks;
}
function evenly(first, last, count) {
  const step = [60, 120, 300, 600, 900, 1800, 3600, 7200, 10800, 21600, 43200, 86400].find((each) => (last - first) / each <= count) ?? 86400 * 7;
  const found = [];
  for (let time = Math.ceil(first / step) * step; time <= last; time += step) found.push(time);
  return found;
}

$("token").onsubmit = (event) => {
  event.preventDefault();
  sessionStorage.setItem("token", $("secret").value.trim());
  $("secret").value = "";
  look();
};
addEventListener("hashchange", () => { look().then(() => $("metric").focus({ preventScroll: innerWidth >= 832 })); });
addEventListener("resize", () => { const found = answer?.forecasts.find((each) => key(each) === shown); if (found && record) show(found); });
setInterval(() => { if (!document.hidden) look(); }, POLL_MS);
setInterval(() => { if (answer && !document.hidden) showNow(); }, 1000);
document.addEventListener("visibilitychange", () => { if (!document.hidden) look(); });
look();
