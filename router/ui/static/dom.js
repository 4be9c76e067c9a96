// Elements from plain values. Text is always text: nothing here, and nothing on this page, parses HTML.

/** An element with properties (`class`, `text`, `data`, `on`, attributes) and children. */
export function el(tag, { text, data = {}, on = {}, ...attributes } = {}, ...children) {
  const element = document.createElement(tag);
  if (text !== undefined) element.textContent = text;
  Object.assign(element.dataset, data);
  for (const [event, handler] of Object.entries(on)) element.addEventListener(event, handler);
  for (const [name, value] of Object.entries(attributes)) {
    if (value === true) element.setAttribute(name, "");
    else if (value !== false && value !== null && value !== undefined) element.setAttribute(name, value);
  }
  element.append(...children.filter((child) => child !== null));
  return element;
}

export const byId = (id) => document.getElementById(id);

/** Tell a screen reader, without moving the focus. */
export function announce(text) {
  byId("status").textContent = text;
}

/** `12 ms`, `1.25 s`: three figures at most. */
export function duration(ms) {
  if (ms >= 1000) return `${(ms / 1000).toFixed(ms >= 10000 ? 1 : 2)} s`;
  return `${ms >= 10 ? Math.round(ms) : ms.toFixed(1)} ms`;
}

export function plural(count, one, many = `${one}s`) {
  return `${count} ${count === 1 ? one : many}`;
}
