"use strict";
// Asks every few seconds what is forecast, and what was said of the metric that is shown when a step has ended.
const LEVELS = ["80", "95"];
const NAMES = { combination: "all, mixed: what is said", last: "the last value", model: "the federated model" };
const KINDS = { mean: "mean", median: "median", drift: "drift", memory: "memory by" };
let answer = null; // of /api/forecasts
let record = null; // of /api/record, with `of`: which metric it is of, and of when
let shown = null; // "node/metric"
let ahead = null; // horizon whose past is shown
let skewMs = 0; // how far the forecaster's clock is before this one's

// Numbers, times, words.
const unit = (found) => (found.unit ? `, ${found.unit}` : "");
const span = (lower, upper) => (lower === null ? "none yet" : `${number(lower)} to ${number(upper)}`);
function forecaster(name) {
  const [kind, steps] = name.split(/-(?=\d+$)/);
  const [first, ...more] = kind.split("-");
  return NAMES[name] ?? (KINDS[first] && steps ? `${[KINDS[first], ...more].join(" ")}, ${steps} steps` : name);
}
const key = (found) => `${encodeURIComponent(found.node)}/${encodeURIComponent(found.metric)}`;
const titled = (found) => found.metric.replaceAll("_", " ");

// Questions.
async function look(late) {
  const found = await ask("api/forecasts");
  if (late()) return "";
  answer = found;
  skewMs = answer.now === null ? 0 : answer.now * 1000 - Date.now();
  await choose();
  return answer.now === null ? "Recorded rows: times are those of the recording" : "Live";
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
  $("unsure").hidden = found.horizons.every((each) => each.lower_80 !== null);
  say("unsure", `No interval yet: fewer than ${answer.errors_min} forecasts this far ahead have come to their end.`);
  const farthest = found.horizons.at(-1).ahead_s;
  const came = points(record, record.values).filter(([time]) => time >= found.time - Math.max(farthest, 600));
  const from = [found.time, found.value];
  const said = found.horizons.map((each) => [found.time + each.ahead_s, each.yhat]);
  const bands = LEVELS.toReversed().map((level) => [`band-${level}`, [[...from, found.value],
    ...found.horizons.map((each) => [found.time + each.ahead_s, each[`lower_${level}`], each[`upper_${level}`]])]]);
  const text = found.horizons.map((each) => `${number(each.yhat)} in ${long(each.ahead_s)}`).join(", ");
  plot($("outlook"), {
    label: `${titled(found)} is ${number(found.value)} ${found.unit}; expected are ${text}.`,
    caption: "Solid: what came. Dashed: what is expected, forecast at the dots. What comes should be in the 80 % interval in 8 of 10 cases, in the lighter 95 % one in 19 of 20; how often it was stands below.",
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
    (past.coverage_80 === null ? "" : ` The 80 % interval held ${percent(past.coverage_80)} of what came, the 95 % interval ${percent(past.coverage_95)}${past.coverage_80 < 0.6 || past.coverage_95 < 0.8 ? ": do not rely on them yet" : ""}.`));
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

const again = follow("The forecaster", look);
addEventListener("hashchange", () => { again().then(() => $("metric").focus({ preventScroll: innerWidth >= 832 })); });
addEventListener("resize", () => { const found = answer?.forecasts.find((each) => key(each) === shown); if (found && record) show(found); });
setInterval(() => { if (answer && !document.hidden) showNow(); }, 1000);
