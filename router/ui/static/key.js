// Where somebody types the API key.

import { hasKey, useKey } from "./api.js";
import { byId } from "./dom.js";

export class KeyDialog {
  #onKey;

  constructor(onKey) {
    this.#onKey = onKey;
    const dialog = byId("key-dialog");
    byId("key-form").addEventListener("submit", (event) => {
      event.preventDefault();
      useKey(byId("key").value);
      dialog.close();
      this.#onKey();
    });
    byId("key-cancel").addEventListener("click", () => dialog.close());
    byId("change-key").addEventListener("click", () => this.open());
  }

  open() {
    byId("change-key").hidden = false;
    byId("key-wrong").textContent = hasKey() ? "The key that was used is not right." : "";
    const dialog = byId("key-dialog");
    if (!dialog.open) dialog.showModal();
  }
}
