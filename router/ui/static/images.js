// The images that go with the next question: chosen, dropped or pasted, shown as thumbnails, removed again.

import { announce, byId, el, plural } from "./dom.js";

const PIXELS_OF_THUMB = 64;

export class Images {
  #items = [];
  #onChange;

  constructor(onChange) {
    this.#onChange = onChange;
    byId("files").addEventListener("change", (event) => {
      this.add(event.target.files);
      event.target.value = ""; // the same file may be chosen again
    });
    document.addEventListener("paste", (event) => {
      const files = imagesOf(event.clipboardData);
      if (files.length) {
        event.preventDefault();
        this.add(files);
      }
    });
    this.#listenForDrops();
  }

  get count() {
    return this.#items.length;
  }

  /** Add files, in their order. What is no image is named and left out. */
  async add(files) {
    const chosen = [...files];
    const usable = chosen.filter((file) => file.type.startsWith("image/"));
    const others = chosen.length - usable.length;
    const items = await Promise.all(usable.map(async (file) => ({ name: file.name || "image", url: await dataUrl(file) })));
    this.#items.push(...items);
    this.#show();
    const added = items.length ? `${plural(items.length, "image")} added.` : "";
    announce(others ? `${added} ${plural(others, "file")} left out: only images can be read.` : added);
  }

  /** Hand over all of them, and begin anew. */
  take() {
    const taken = this.#items;
    this.#items = [];
    this.#show();
    return taken;
  }

  clear() {
    this.take();
  }

  #remove(item) {
    this.#items = this.#items.filter((other) => other !== item);
    this.#show();
    announce(`${item.name} removed.`);
    byId("question").focus();
  }

  #show() {
    byId("thumbs").replaceChildren(...this.#items.map((item) => this.#thumb(item)));
    this.#onChange();
  }

  #thumb(item) {
    const remove = el("button", { type: "button", class: "remove", "aria-label": `Remove ${item.name}`, text: "×" });
    remove.addEventListener("click", () => this.#remove(item));
    const size = PIXELS_OF_THUMB;
    return el("li", {}, el("img", { src: item.url, alt: item.name, width: size, height: size }), remove);
  }

  #listenForDrops() {
    const target = byId("drop-target");
    const hide = () => {
      target.hidden = true;
    };
    document.addEventListener("dragover", (event) => {
      if (!event.dataTransfer?.types.includes("Files")) return;
      event.preventDefault();
      target.hidden = false;
    });
    document.addEventListener("dragleave", (event) => {
      if (event.relatedTarget === null) hide();
    });
    document.addEventListener("drop", (event) => {
      if (!event.dataTransfer?.types.includes("Files")) return;
      event.preventDefault();
      hide();
      this.add(event.dataTransfer.files);
    });
  }
}

function imagesOf(data) {
  return [...(data?.files ?? [])].filter((file) => file.type.startsWith("image/"));
}

function dataUrl(file) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.addEventListener("load", () => resolve(reader.result));
    reader.addEventListener("error", () => reject(reader.error));
    reader.readAsDataURL(file);
  });
}
