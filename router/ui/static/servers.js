// The servers and what waits for them, as three stages in the order in which a request meets them.

import { byId, el, plural } from "./dom.js";

export function showServers({ servers, queue }, requests) {
  const tiers = (tier) => servers.filter((server) => server.tier === tier);
  byId("stages").replaceChildren(
    stage("router", "Router", [
      fact(plural(queue.running, "request"), "in flight"),
      fact(String(queue.waiting), "without a first word yet"),
      ...(queue.waiting_for_a_turn ? [fact(String(queue.waiting_for_a_turn), "waiting for a turn")] : []),
    ]),
    stage("vision", "Vision", tiers("vision").map(visionServer)),
    stage("transfer", "Transmission", transmission(requests)),
    stage("language", "Language", tiers("language").map(languageServer)),
  );
}

function stage(kind, title, contents) {
  const body = contents.length ? contents : [el("p", { class: "faint", text: "No server" })];
  return el("section", { class: `stage ${kind}`, "aria-label": title }, el("h3", { text: title }), ...body);
}

function fact(value, words) {
  return el("p", { class: "fact" }, el("strong", { text: value }), ` ${words}`);
}

function server({ name, state }, ...facts) {
  const head = el(
    "p",
    { class: "server-name" },
    el("span", { class: `dot ${state === "ready" ? "ready" : state === "starting" || state === "draining" ? "wait" : "bad"}` }),
    el("span", { text: name }),
    state === "ready" ? null : el("span", { class: "faint", text: state }),
  );
  return el("div", { class: "server" }, head, ...facts);
}

function visionServer(facts) {
  if (facts.queued_tiles === undefined) return server(facts);
  const load = facts.queued_tiles + facts.running_tiles;
  return server(
    facts,
    meter(`Tiles at ${facts.name}`, load, facts.max_queued_tiles),
    el("p", { class: "numbers", text: `${facts.running_tiles} at work · ${facts.queued_tiles} queued` }),
    el("p", { class: "numbers faint", text: facts.tiles_per_second ? `${facts.tiles_per_second} tiles/s lately` : "idle so far" }),
  );
}

function languageServer(facts) {
  if (facts.running === undefined) return server(facts);
  const used = facts.kv_blocks ? Math.round((100 * facts.kv_blocks_used) / facts.kv_blocks) : 0;
  return server(
    facts,
    meter(`Memory for tokens at ${facts.name}`, facts.kv_blocks_used, facts.kv_blocks),
    el("p", { class: "numbers", text: `${facts.running} running · ${facts.waiting} queued` }),
    el("p", { class: "numbers faint", text: `memory ${used} % · ${Math.round(facts.tokens_per_second)} tokens/s` }),
  );
}

function transmission(requests) {
  const last = requests.findLast((request) => request.transport);
  if (!last) return [el("p", { class: "numbers faint", text: "nothing yet" })];
  return [fact(last.transport, "carries features"), el("p", { class: "numbers faint", text: `last: ${bytes(last.feature_bytes)}` })];
}

function meter(label, value, max) {
  const share = max ? Math.min(1, value / max) : 0;
  const fill = el("span", { class: "fill" });
  fill.style.width = `${100 * share}%`;
  const values = { "aria-valuenow": value, "aria-valuemin": 0, "aria-valuemax": max || 1 };
  return el("div", { class: "meter", role: "meter", "aria-label": label, ...values }, fill);
}

function bytes(count) {
  if (count >= 2 ** 20) return `${(count / 2 ** 20).toFixed(1)} MiB`;
  return `${Math.round(count / 1024)} KiB`;
}
