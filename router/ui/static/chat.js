// The conversation: what was said, what is sent, and the answer as it comes.

import { chat } from "./api.js";
import { announce, byId, el } from "./dom.js";
import { Follower } from "./follow.js";

export class Chat {
  #turns = []; // {role, text, images}
  #stopping = null; // AbortController of the answer that is coming
  #onKeyWanted;
  #onAsked;
  #follower = new Follower();

  constructor({ onKeyWanted, onAsked }) {
    this.#onKeyWanted = onKeyWanted;
    this.#onAsked = onAsked;
  }

  get isAnswering() {
    return this.#stopping !== null;
  }

  stop() {
    this.#stopping?.abort();
  }

  startAnew() {
    this.stop();
    this.#turns = [];
    for (const turn of [...byId("log").querySelectorAll(".turn")]) turn.remove();
    byId("welcome").hidden = false;
  }

  /** Ask, with images, and show the answer while it comes. */
  async ask(text, images, options) {
    byId("welcome").hidden = true;
    const question = { role: "user", text, images };
    this.#show(userTurn(question));
    const earlier = options.remembers ? this.#turns : [];
    const body = {
      messages: [...earlier, question].map(asMessage),
      temperature: options.temperature,
      ...(options.maxTokens ? { max_tokens: options.maxTokens } : {}),
      ...(options.tiles ? { max_dynamic_patch: options.tiles } : {}),
    };
    await this.#answer(question, body);
  }

  async #answer(question, body) {
    const id = `page-${crypto.getRandomValues(new Uint32Array(2)).join("-")}`;
    const answer = new AnswerTurn(id);
    this.#show(answer.element);
    this.#onAsked(id, question.text, answer);
    this.#stopping = new AbortController();
    this.#setBusy(true);
    try {
      for await (const chunk of chat(body, { id, signal: this.#stopping.signal })) {
        const delta = chunk.choices?.[0]?.delta ?? {};
        answer.add(delta.content ?? "", delta.reasoning_content ?? "");
        if (chunk.choices?.[0]?.finish_reason === "length") answer.note("Ended at the longest answer that you allow.");
      }
      this.#turns.push(question, { role: "assistant", text: answer.text, images: [] });
      announce(`Answer: ${answer.text}`);
    } catch (error) {
      this.#failed(error, answer, question, body);
    } finally {
      answer.end();
      this.#stopping = null;
      this.#setBusy(false);
    }
  }

  #failed(error, answer, question, body) {
    if (error.name === "AbortError") {
      if (answer.text) this.#turns.push(question, { role: "assistant", text: answer.text, images: [] });
      answer.note("Stopped.");
      announce("Stopped.");
      return;
    }
    if (error.isKeyWanted) this.#onKeyWanted();
    answer.fail(error.message ?? String(error), () => {
      answer.element.remove();
      this.#answer(question, body);
    });
  }

  #setBusy(isBusy) {
    const had = document.activeElement;
    byId("send").hidden = isBusy;
    byId("stop").hidden = !isBusy;
    if (isBusy && had === byId("send")) byId("stop").focus();
    if (!isBusy && (had === byId("stop") || had === document.body)) byId("question").focus();
  }

  #show(element) {
    byId("log-end").before(element);
    this.#follower.follow(element);
  }
}

/** One answer on the page. */
class AnswerTurn {
  text = "";
  #spoken = el("p", { class: "spoken" });
  #thoughts = null;
  #notes = el("div", { class: "notes" });

  constructor(id) {
    this.trace = el("div", { class: "trace", hidden: true });
    this.element = el(
      "article",
      { class: "turn answer coming", "aria-label": "Answer", "aria-busy": "true", data: { id } },
      ...[this.#spoken, this.#notes, this.trace],
    );
  }

  add(text, thought) {
    if (thought) {
      this.#thoughts ??= this.#makeThoughts();
      this.#thoughts.textContent += thought;
    }
    this.text += text;
    this.#spoken.textContent = this.text;
  }

  note(text) {
    this.#notes.append(el("p", { class: "note", text }));
  }

  fail(message, retry) {
    const again = el("button", { type: "button", class: "quiet", text: "Try again", on: { click: retry } });
    this.element.classList.add("failed");
    this.#notes.append(el("div", { class: "error", role: "alert" }, el("p", { text: message }), again));
  }

  end() {
    this.element.classList.remove("coming");
    this.element.setAttribute("aria-busy", "false");
  }

  #makeThoughts() {
    const thoughts = el("p");
    this.element.prepend(el("details", { class: "thoughts" }, el("summary", { text: "Thoughts" }), thoughts));
    return thoughts;
  }
}

function userTurn({ text, images }) {
  const pictures = images.map(({ url, name }) => el("img", { src: url, alt: name }));
  const row = pictures.length ? el("div", { class: "pictures" }, ...pictures) : null;
  return el("article", { class: "turn question", "aria-label": "You" }, row, el("p", { class: "spoken", text }));
}

function asMessage({ role, text, images }) {
  if (!images.length) return { role, content: text };
  const parts = images.map(({ url }) => ({ type: "image_url", image_url: { url } }));
  return { role, content: [...parts, { type: "text", text }] };
}
