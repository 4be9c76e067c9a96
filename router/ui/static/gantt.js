// One request as a chart: a lane for each of router, vision, transmission and language, a bar for each stage.

import { duration, el, plural } from "./dom.js";

const LANES = [
  { name: "Router", stages: ["receive", "fetch", "queue"] },
  { name: "Vision", stages: ["score", "unpack", "vision_queue", "encode"] },
  { name: "Transmission", stages: ["transfer"] },
  { name: "Language", stages: ["language_queue", "prefill", "decode"] },
];
const WORDS = {
  receive: "request arrives",
  fetch: "images are fetched and measured",
  queue: "waits for a language server",
  score: "tiles are scored",
  unpack: "image becomes tiles",
  vision_queue: "tiles wait for a batch",
  encode: "encode",
  transfer: "features travel",
  language_queue: "waits for its first step",
  prefill: "prefill",
  decode: "decode",
};
const TICKS = 4;

/** How long a request takes, or has taken so far, in milliseconds. */
export function lengthOf(request) {
  const ends = request.stages.map((stage) => stage.end_ms ?? stage.start_ms);
  return Math.max(request.total_ms, ...ends, 1);
}

/** Milliseconds in which any of some stages went on; overlaps count once. */
export function time(request, ...stages) {
  let covered = 0;
  let until = -Infinity;
  for (const { start_ms, end_ms } of chosen(request, stages)) {
    const end = end_ms ?? request.total_ms;
    covered += Math.max(0, end - Math.max(start_ms, until));
    until = Math.max(until, end);
  }
  return covered;
}

function chosen(request, stages) {
  const found = request.stages.filter(({ stage }) => stages.includes(stage));
  return found.sort((one, other) => one.start_ms - other.start_ms);
}

/** The chart. It is for the eye: `stageTable` says the same in words. */
export function chart(request, { isDetailed }) {
  const length = lengthOf(request);
  const lanes = LANES.map((lane) => laneOf(lane, request, length, isDetailed)).filter((lane) => lane !== null);
  const axis = isDetailed ? axisOf(length) : null;
  return el("div", { class: isDetailed ? "gantt detailed" : "gantt", "aria-hidden": "true" }, ...lanes, axis);
}

function laneOf(lane, request, length, isDetailed) {
  const stages = chosen(request, lane.stages);
  if (!stages.length) return null;
  const rows = isDetailed ? packed(stages, request) : [stages];
  const bars = rows.map((row) => el("div", { class: "bars" }, ...row.map((stage) => bar(stage, request, length))));
  const label = isDetailed ? el("span", { class: "lane-name", text: lane.name }) : null;
  return el("div", { class: "lane" }, label, el("div", { class: "lane-rows" }, ...bars));
}

/** Stages that overlap, as those of several images do, each in a row where there is room. */
function packed(stages, request) {
  const rows = [];
  for (const stage of stages) {
    const row = rows.find((each) => (each.at(-1).end_ms ?? request.total_ms) <= stage.start_ms + 0.01);
    if (row) row.push(stage);
    else if (rows.length < 4) rows.push([stage]);
    else rows.at(-1).push(stage);
  }
  return rows;
}

function bar(stage, request, length) {
  const end = stage.end_ms ?? request.total_ms;
  const element = el("span", { class: `bar ${stage.stage}`, title: describe(stage, request) });
  if (stage.end_ms === null) element.classList.add("open");
  if (stage.failed) element.classList.add("failed");
  element.style.left = `${(100 * stage.start_ms) / length}%`;
  element.style.width = `${(100 * Math.max(0, end - stage.start_ms)) / length}%`;
  return element;
}

function axisOf(length) {
  const ticks = Array.from({ length: TICKS + 1 }, (_, index) => {
    const tick = el("span", { class: "tick", text: index ? duration((length * index) / TICKS) : "0" });
    tick.style.left = `${(100 * index) / TICKS}%`;
    return tick;
  });
  return el("div", { class: "axis" }, ...ticks);
}

function describe(stage, request) {
  const end = stage.end_ms ?? request.total_ms;
  return `${titleOf(stage)}: ${duration(end - stage.start_ms)}, from ${duration(stage.start_ms)} on`;
}

function titleOf(stage) {
  const image = stage.image === undefined ? "" : `, image ${stage.image + 1}`;
  const tiles = stage.num_tiles === undefined ? "" : `, ${tilesOf(stage)}`;
  const failed = stage.failed ? " (failed)" : "";
  return `${WORDS[stage.stage] ?? stage.stage}${image}${tiles}${failed}`;
}

function tilesOf({ first_tile, num_tiles }) {
  const first = first_tile + 1;
  return num_tiles === 1 ? `tile ${first}` : `tiles ${first} to ${first_tile + num_tiles}`;
}

/** The same as a table: stage, where, from when on, how long. */
export function stageTable(request) {
  const rows = request.stages.map((stage) => {
    const end = stage.end_ms ?? request.total_ms;
    return el(
      "tr",
      { class: stage.stage },
      el("th", { scope: "row" }, el("span", { class: `swatch ${stage.stage}` }), titleOf(stage)),
      el("td", { text: stage.server || "router" }),
      el("td", { text: duration(Math.max(0, stage.start_ms)) }),
      el("td", { text: stage.end_ms === null ? "…" : duration(end - stage.start_ms) }),
    );
  });
  const heads = ["Stage", "Where", "From", "For"].map((text) => el("th", { scope: "col", text }));
  return el(
    "div",
    { class: "table-scroll" },
    el(
      "table",
      {},
      el("caption", { class: "hidden", text: `Stages of a request that took ${duration(request.total_ms)}` }),
      el("thead", {}, el("tr", {}, ...heads)),
      el("tbody", {}, ...rows),
    ),
  );
}

/** One sentence: what a request spent its time on. */
export function inWords(request) {
  const parts = [];
  if (request.first_token_ms !== null) parts.push(`First word after ${duration(request.first_token_ms)}`);
  const vision = time(request, "score", "unpack", "vision_queue", "encode");
  const transfer = time(request, "transfer");
  if (vision) parts.push(`vision ${duration(vision)}`);
  if (transfer) parts.push(`transmission ${duration(transfer)}`);
  if (request.kind === "image" && !vision && request.feature_cache_hits === 0 && request.state === "ok") {
    parts.push("the image was known already");
  }
  const language = time(request, "language_queue", "prefill", "decode");
  if (language) parts.push(`language ${duration(language)}`);
  return `${parts.join(" · ")}.`;
}

export function counts(request) {
  const media = [];
  if (request.images) media.push(plural(request.images, "image"));
  if (request.videos) media.push(plural(request.videos, "video"));
  if (request.tiles) media.push(plural(request.tiles, "tile"));
  const known = request.cached_tokens ? ` (${request.cached_tokens} known already)` : "";
  return [...media, `${plural(request.prompt_tokens, "token")} read${known}`, `${request.completion_tokens} written`].join(" · ");
}
