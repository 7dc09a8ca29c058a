"use strict";
// Asks every few seconds for the run and its nodes, and for what a node has said when something new of it was written.
const STATES = {
  waiting: "It waits for its nodes", running: "It runs", finished: "It is finished",
  failed: "It has failed", quiesced: "It was asked to end",
};
const PARTS = {
  ok: "It took part", silent: "It was silent", failed: "It failed",
  unusable: "What it said could not be used", "no-data": "It had nothing to train on",
};
const POINTS_MAX = 60; // of a line with its points drawn
const SILENT_S = 60;
const FIRST_S = 660; // a minute more than a round may take by default: how long the first one takes nobody knows
let answer = null; // of /api/run
let of = null; // of /api/node, with `key`: which node and run it is of, and of when
let shown = null; // name of a node; null for all
let chosen = ""; // name of a run; empty for the newest
let metric = null;
let skewMs = 0; // how far the controller's clock is before this one's

const titled = (name) => name.replaceAll("_", " ");
const ago = (seconds) => long(Math.max(0, (Date.now() + skewMs) / 1000 - seconds));
const times = (facts) => facts.mae === null || !facts.naive_mae ? "–" : (facts.mae / facts.naive_mae).toFixed(2);
const day = (seconds) => new Date(seconds * 1000).toLocaleString("en-GB", { dateStyle: "medium", timeStyle: "medium" });

async function look(late) {
  const found = await ask(`api/run${chosen ? `?${new URLSearchParams({ run: chosen })}` : ""}`);
  if (late()) return "";
  answer = found;
  skewMs = answer.now * 1000 - Date.now();
  const node = answer.nodes.find((each) => encodeURIComponent(each.name) === location.hash.slice(1));
  shown = node?.name ?? null;
  if (node?.losses && answer.run) {
    const key = `${shown} ${answer.name} ${written()}`;
    if (of?.key !== key) {
      const query = new URLSearchParams({ run: answer.name, node: shown });
      of = { key, ...(await ask(`api/node?${query}`)) };
    }
  } else of = null;
  if (late()) return "";
  show(node);
  return answer.name !== null && answer.name !== answer.runs[0].name ? "An older run" : "Live";
}
const written = () => answer.runs.find((run) => run.name === answer.name)?.written;

// What is shown.
function show(node) {
  $("content").hidden = false;
  document.title = `${node ? node.name : "All nodes"}: federation`;
  say("title", node ? node.name : "All nodes");
  showNodes();
  showProblem();
  showRuns();
  showRun();
  showNode(node);
  showLosses(node);
  showErrors(node ? [node] : answer.nodes);
}
function showNodes() {
  const names = [null, ...answer.nodes.map((node) => node.name)];
  const there = JSON.stringify(names);
  if ($("nodes").dataset.there !== there) { // only then: a link that is made anew loses the focus
    $("nodes").dataset.there = there;
    $("nodes").replaceChildren(...names.map((name) => make("li", {},
      make("a", { href: `#${name === null ? "" : encodeURIComponent(name)}` }, make("span", {}, name ?? "All nodes"), make("span")), make("small"))));
  }
  names.forEach((name, place) => {
    const [link, small] = $("nodes").children[place].children;
    const node = answer.nodes[place - 1];
    if (name === shown) link.setAttribute("aria-current", "page"); else link.removeAttribute("aria-current");
    link.lastChild.textContent = node ? word(node) : `${answer.nodes.length}`;
    const cause = node && trouble(node);
    small.textContent = cause ? `⚠ ${cause}` : "";
    small.hidden = !cause;
  });
}
function word(node) {
  if (node.online?.state === "offline") return "offline";
  if (!node.last) return !node.losses ? "not in this run" : ended().length ? "not asked" : "no round yet";
  return node.last.state === "ok" ? `round ${node.last.round}` : node.last.state;
}
const ended = () => (answer.run?.rounds ?? []).filter((round) => round.state !== "running");
const trouble = (node) => node.last?.cause || (node.last ? "" : node.cause);
function showProblem() {
  const lines = [];
  if (answer.problem) lines.push(answer.problem);
  if (answer.superlink?.problem) lines.push(`Who is online is not known: ${answer.superlink.problem}`);
  const quiet = answer.run && ["waiting", "running"].includes(answer.run.state) ? answer.now - written() : 0;
  const longest = Math.max(ended().length ? SILENT_S : FIRST_S, ...ended().map((round) => 3 * round.seconds));
  if (quiet > longest) lines.push(`Nothing was written of this run for ${long(quiet)}: its ServerApp may be gone.`);
  $("problem").hidden = !lines.length;
  say("problem", lines.join(" "));
}
function showRuns() {
  $("older").hidden = answer.runs.length < 2;
  const there = JSON.stringify(answer.runs.map((run) => run.name));
  if ($("runs").dataset.there === there) return;
  $("runs").dataset.there = there;
  $("runs").replaceChildren(make("option", { value: "" }, "the newest run"), ...answer.runs.slice(1).map((run) =>
    make("option", { value: run.name }, `${run.name}, written ${day(run.written)}`)));
  $("runs").value = chosen;
}
function showRun() {
  const run = answer.run;
  $("progress").hidden = !run;
  if (!run) {
    say("run", answer.problem ? "It cannot be read." : "No run yet. One begins with icos-fl train, or flwr run.");
    return say("pace", "");
  }
  const newest = run.rounds.at(-1), reached = newest?.round ?? 0;
  const doing = run.state === "running" && newest?.state === "running"
    ? `: round ${reached} of ${run.rounds_total}, for ${ago(newest.started)}` : `: ${reached} of ${run.rounds_total} rounds`;
  say("run", `${STATES[run.state] ?? run.state}${run.state === "waiting" ? "" : doing}${run.reason ? `. ${run.reason}` : ""}`);
  $("progress").max = Math.max(1, run.rounds_total);
  $("progress").value = run.rounds.filter((round) => round.state !== "running").length + reached - run.rounds.length;
  const took = run.rounds.map((round) => round.seconds).filter((seconds) => seconds !== null).toSorted((a, b) => a - b);
  const skipped = run.rounds.filter((round) => round.state === "skipped");
  const lines = [];
  if (took.length) lines.push(`A round takes ${number(took[took.length >> 1])} s, the longest took ${number(took.at(-1))} s.`);
  if (skipped.length) lines.push(`${skipped.length} were skipped, the last one as ${skipped.at(-1).reason}.`);
  if (newest?.epsilon !== null && newest?.epsilon !== undefined) lines.push(`Differential privacy: ε ${number(newest.epsilon)} is spent.`);
  say("pace", lines.join(" "));
}
function showNode(node) {
  $("node").hidden = !node;
  if (!node) return;
  const lines = [];
  if (node.online) lines.push({
    online: `It is online since ${since(node.online)}.`, offline: `It is offline since ${since(node.online)}.`,
    registered: "It is registered, and was never online.",
  }[node.online.state] ?? "The SuperLink does not know it: it has left, or the SuperLink was started again.");
  if (node.last) lines.push(`${PARTS[node.last.state] ?? node.last.state} in round ${node.last.round}${node.last.cause ? `: ${node.last.cause}` : "."}`);
  else lines.push(!node.losses ? "It takes no part in this run." : ended().length ? "It was not asked in the last round." : "No round has ended yet.");
  if (node.cause) lines.push(`When it was asked what it can learn: ${node.cause}`);
  const offers = Object.entries(node.examples ?? {}).map(([name, count]) => `${titled(name)} (${number(count)} sequences)`);
  if (offers.length) lines.push(`It learns ${offers.join(", ")}.`);
  if (node.versions) lines.push(node.versions.length ? `It runs ${node.versions.join(", ")}.` : "It does not say which versions it runs: it is older than that, or has not answered.");
  if (JSON.stringify(lines) === $("facts").dataset.there) return;
  $("facts").dataset.there = JSON.stringify(lines);
  $("facts").replaceChildren(...lines.map((line) => make("li", {}, line)));
}
const since = (online) => { const time = Date.parse(online.since); return time ? day(time / 1000) : "some time"; };
function showLosses(node) {
  const found = node ? of : answer.run && { rounds: answer.run.rounds.map((round) => round.round), losses: answer.run.losses };
  const names = Object.keys(answer.run?.losses ?? {});
  $("learned").hidden = !names.length || !found;
  if ($("learned").hidden) return;
  if (!names.includes(metric)) metric = names[0];
  showMetrics(names);
  const whose = node ? node.name : "all nodes";
  const facts = found.losses[metric], line = (fact) => facts[fact].map((value, i) => [found.rounds[i], value]);
  const judged = line("eval_loss"), training = line("train_loss"), error = line("mae"), naive = line("naive_mae");
  const known = (points) => points.filter(([, value]) => value !== null);
  const last = (points) => known(points).at(-1);
  const few = (points) => (points.length <= POINTS_MAX ? known(points) : []);
  const axis = { ticks: whole, tick: (round) => `${round}`, bands: [] };
  plot($("loss"), {
    ...axis, unit: "loss",
    label: `Loss of ${titled(metric)}, ${whose}: ${last(judged) ? `${number(last(judged)[1])} in round ${last(judged)[0]}, ${number(known(judged)[0][1])} in round ${known(judged)[0][0]}` : "not judged yet"}.`,
    caption: "Solid: loss of the round's model on rows that no node trains on; it is known when the next round has returned. Dashed: loss in training. Along: rounds.",
    lines: [["training", training], ["judged", judged]], marks: [["muted-mark", few(training)], ["mark", few(judged)]],
  });
  plot($("error"), {
    ...axis, unit: "mean absolute error",
    label: `Error of ${titled(metric)}, ${whose}: ${last(error) ? `${number(last(error)[1])} in round ${last(error)[0]}, of repeating the last value ${number(last(naive)?.[1])}` : "not known yet"}.`,
    caption: "Solid: error of the round's model, in the metric's own unit. Dashed: of repeating the last value, in the same cases. Along: rounds.",
    lines: [["training", naive], ["judged", error]], marks: [["muted-mark", few(naive)], ["mark", few(error)]],
  });
  const seconds = new Map(answer.run.rounds.map((round) => [round.round, round.seconds]));
  if (!$("loss").hidden) numbers($("loss"), ["round", "training loss", "loss", "error", "last value's", "took, s"], () => found.rounds.map((round, i) =>
    [`${round}`, ...["train_loss", "eval_loss", "mae", "naive_mae"].map((fact) => number(facts[fact][i])), number(seconds.get(round))]).toReversed());
  say("young", $("loss").hidden ? `No round has come to its end with ${titled(metric)}${node ? " of this node" : ""} yet.` : "");
}
function whole(first, last, count) {
  const step = Math.max(1, nice(0, last - first + 1).map(Math.ceil)[1], Math.ceil((last - first) / count));
  const found = [];
  for (let round = Math.ceil(first / step) * step; round <= last; round += step) found.push(round);
  return found;
}
function showMetrics(names) {
  const there = [...$("metrics").querySelectorAll("input")].map((each) => each.value);
  if (there.join() === names.join()) return;
  $("metrics").querySelectorAll("label").forEach((each) => each.remove());
  for (const name of names) {
    const radio = make("input", { type: "radio", name: "metric", value: name });
    radio.checked = name === metric;
    radio.onchange = () => { metric = name; showLosses(answer.nodes.find((node) => node.name === shown)); };
    $("metrics").append(make("label", {}, radio, ` ${titled(name)}`));
  }
}
function showErrors(nodes) {
  const rows = nodes.flatMap((node) => Object.entries(node.losses ?? {}).map(([name, facts]) => [
    node.name, titled(name), times(facts), number(facts.mae), number(facts.naive_mae), number(facts.eval_loss)]));
  $("by-node").closest("section").hidden = !rows.length;
  const there = JSON.stringify(rows);
  if ($("by-node").dataset.there === there) return;
  $("by-node").dataset.there = there;
  table($("by-node"), ["node", "metric", "÷ last value", "error", "last value's", "loss"], rows);
}

const again = follow("The controller", look);
$("runs").onchange = () => { chosen = $("runs").value; again(); };
addEventListener("hashchange", () => { again().then(() => $("main").focus({ preventScroll: innerWidth >= 832 })); });
addEventListener("resize", () => { if (answer) showLosses(answer.nodes.find((node) => node.name === shown)); });
setInterval(() => { if (answer && !document.hidden) showRun(); }, 1000);
