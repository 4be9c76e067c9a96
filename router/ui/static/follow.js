// Keeps the end of the conversation in view while it grows, until whoever reads scrolls away from it.

import { byId } from "./dom.js";

const NEAR = 80; // pixels

export class Follower {
  #isFollowing = true;
  #growth = new ResizeObserver(() => this.#scroll());

  constructor() {
    document.addEventListener("scroll", () => this.#look(), { capture: true, passive: true });
  }

  /** Show a turn, and what becomes of it: text that comes, images that load. */
  follow(turn) {
    this.#isFollowing = true;
    this.#growth.observe(turn);
  }

  #look() {
    const { top } = byId("log-end").getBoundingClientRect();
    this.#isFollowing = top > 0 && top < byId("composer").getBoundingClientRect().top + NEAR;
  }

  #scroll() {
    if (this.#isFollowing) byId("log-end").scrollIntoView({ block: "nearest" });
  }
}
