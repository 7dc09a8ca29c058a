"use strict";
// What the pages of nodes and of the federation have in common.
const POLL_MS = 2000;
const $ = (id) => document.getElementById(id);

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
  return value.toLocaleString("en", Math.abs(value) >= 100 ? { maximumFractionDigits: 0 } : { maximumSignificantDigits: 3 });
}
const percent = (share) => (share === null ? "–" : `${Math.round(share * 100)} %`);
const clock = (seconds, more = {}) =>
  new Date(seconds * 1000).toLocaleTimeString("en-GB", { hour: "2-digit", minute: "2-digit", ...more });
function long(seconds) {
  for (const [unit, length] of [["day", 86400], ["hour", 3600], ["minute", 60]]) {
    const count = Math.round(seconds / length * 10) / 10;
    if (count >= 1) return `${count} ${unit}${count === 1 ? "" : "s"}`;
  }
  return `${Math.round(seconds)} s`;
}

// Questions.
async function ask(path) {
  const token = sessionStorage.getItem("token");
  const headers = token ? { Authorization: `Bearer ${token}` } : {};
  const reply = await fetch(path, { headers, signal: AbortSignal.timeout(10000) });
  if (reply.status === 401) throw Object.assign(new Error("a token is needed"), { unauthorized: true, token });
  if (!reply.ok) throw new Error(`${reply.status}: ${await reply.text()}`);
  return reply.json();
}
// Asks every few seconds: *look* shows what it gets and returns what to say of it, unless it is told that it has become late.
function follow(whom, look) {
  let asked = 0, seen = false;
  async function again() {
    const mine = ++asked, late = () => mine !== asked;
    try {
      const said = await look(late);
      if (late()) return;
      seen = true;
      $("token").hidden = true;
      say("state", said);
    } catch (error) {
      if (late()) return;
      if (error.unauthorized) {
        $("content").hidden = true;
        $("token").hidden = false;
        say("state", error.token ? "This token is not known" : "");
        sessionStorage.removeItem("token");
      } else say("state", `${whom} does not answer${seen ? "; what is shown is old" : ""}`);
    }
  }
  $("token").onsubmit = (event) => {
    event.preventDefault();
    sessionStorage.setItem("token", $("secret").value.trim());
    $("secret").value = "";
    again();
  };
  setInterval(() => { if (!document.hidden) again(); }, POLL_MS);
  document.addEventListener("visibilitychange", () => { if (!document.hidden) again(); });
  again();
  return again;
}

// Figures.
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

// A plot: {label, caption, unit, bands, lines, marks, now}; points are [seconds, value], null for none. What is along its axis in the
// place of seconds has *ticks* and a *tick* of its own.
function plot(figure, { ticks: along = evenly, tick = clock, ...given }) {
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
  for (const time of along(first, last, width < 480 ? 3 : 6))
    svg.append(make("text", { x: x(time), y: height - 4, "text-anchor": "middle" }, tick(time)));
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
