// Asks the router what goes on: often while something does, seldom otherwise, never while nobody looks.

import { getJson } from "./api.js";

const BUSY_MS = 250;
const IDLE_MS = 1500;
const LOST_MS = 3000;

export class Live {
  #cursor = "";
  #timer = null;
  #isAsking = false;
  #onNews;
  #onLost;
  #isBusy;

  constructor({ onNews, onLost, isBusy }) {
    this.#onNews = onNews;
    this.#onLost = onLost;
    this.#isBusy = isBusy;
    document.addEventListener("visibilitychange", () => this.now());
  }

  /** Ask at once, and go on from there. */
  async now() {
    clearTimeout(this.#timer);
    if (this.#isAsking || document.hidden) return;
    this.#isAsking = true;
    let wait = LOST_MS;
    try {
      const news = await getJson(`pipeline?since=${encodeURIComponent(this.#cursor)}`);
      this.#cursor = news.cursor;
      this.#onNews(news);
      wait = this.#isBusy() ? BUSY_MS : IDLE_MS;
    } catch (error) {
      if (this.#onLost(error)) return; // until somebody gives a key
    } finally {
      this.#isAsking = false;
    }
    clearTimeout(this.#timer);
    this.#timer = setTimeout(() => this.now(), wait);
  }
}
