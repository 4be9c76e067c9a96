// The list of requests: newest first, each a row with a chart that opens.

import { byId, duration, el } from "./dom.js";
import { chart, counts, inWords, stageTable } from "./gantt.js";

const MAX_ROWS = 40;
const STATES = { running: "running", ok: "done", failed: "failed", left: "stopped by the client" };

export class Requests {
  #rows = new Map(); // by id
  #own = new Map(); // id -> {question, answer}
  #opened = new Set();

  /** One that this page has sent; its answer gets a line on where the time went. */
  expect(id, question, answer) {
    this.#own.set(id, { question, answer });
  }

  get areRunning() {
    return [...this.#rows.values()].some((row) => row.request.state === "running");
  }

  update(requests) {
    for (const request of requests) {
      const row = this.#rows.get(request.id);
      if (row && row.request.came_at !== request.came_at && row.request.state !== "running" && request.state !== "running") {
        if (row.request.came_at > request.came_at) continue; // an id that was used twice: the later one
      }
      this.#show(request, row ?? this.#add(request));
    }
    for (const id of [...this.#rows.keys()].slice(0, Math.max(0, this.#rows.size - MAX_ROWS))) {
      this.#rows.get(id).element.remove();
      this.#rows.delete(id);
    }
    byId("no-requests").hidden = this.#rows.size > 0;
  }

  open(id) {
    const row = this.#rows.get(id);
    if (!row) return;
    this.#opened.add(id);
    this.#show(row.request, row);
    row.element.scrollIntoView({ block: "nearest" });
    row.toggle.focus({ preventScroll: true });
  }

  #add(request) {
    const { id } = request;
    const title = el("span", { class: "request-title" });
    const state = el("span", { class: "request-state" });
    const took = el("span", { class: "request-took" });
    const picture = el("div", { class: "request-chart" });
    const details = el("div", { class: "request-details", id: `details-${id}` });
    const toggle = el("button", { type: "button", class: "request-toggle", "aria-controls": details.id }, title, state, took);
    const element = el("li", { class: "request", data: { id } }, toggle, picture, details);
    toggle.addEventListener("click", () => {
      if (!this.#opened.delete(id)) this.#opened.add(id);
      this.#show(this.#rows.get(id).request, this.#rows.get(id));
    });
    if (this.#own.has(id)) {
      this.#opened.clear(); // only the latest question is open by itself
      for (const row of this.#rows.values()) this.#show(row.request, row);
      this.#opened.add(id);
    }
    const row = { element, toggle, title, state, took, picture, details, request };
    this.#rows.set(id, row);
    byId("requests").prepend(element);
    return row;
  }

  #show(request, row) {
    row.request = request;
    const isOpen = this.#opened.has(request.id);
    const own = this.#own.get(request.id);
    row.element.className = `request ${request.state}${own ? " own" : ""}`;
    row.title.textContent = own ? own.question : "Another client";
    row.state.textContent = request.state === "ok" ? "" : STATES[request.state];
    row.took.textContent = duration(request.total_ms);
    row.toggle.setAttribute("aria-expanded", String(isOpen));
    row.picture.replaceChildren(chart(request, { isDetailed: isOpen }));
    row.details.hidden = !isOpen;
    const words = request.state === "failed" ? `Failed: ${request.code}.` : inWords(request);
    const wait = request.feature_wait_ms > 0.5 ? `Prefill waited ${duration(request.feature_wait_ms)} for features.` : "";
    row.details.replaceChildren(
      ...(isOpen ? [el("p", { text: words }), ...this.#facts(request, wait)] : []),
    );
    if (own && request.first_token_ms !== null && request.state !== "running") this.#trace(request, own.answer);
  }

  #facts(request, wait) {
    return [
      ...(wait ? [el("p", { class: "faint", text: wait })] : []),
      el("p", { class: "faint", text: counts(request) }),
      el("details", { class: "all-stages" }, el("summary", { text: "All stages" }), stageTable(request)),
    ];
  }

  #trace(request, answer) {
    if (!answer.trace.hidden) return;
    const see = el("button", { type: "button", class: "link", text: "See the stages" });
    see.addEventListener("click", () => this.open(request.id));
    answer.trace.replaceChildren(chart(request, { isDetailed: false }), el("p", {}, `${inWords(request)} `, see));
    answer.trace.hidden = false;
  }
}
