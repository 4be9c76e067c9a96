// The router's API as this page uses it. The key stays in this tab and is sent to this origin only.

import { plainWords } from "./errors.js";

const KEY = "dvd-api-key";

export class ApiError extends Error {
  constructor(message, { code = "", isKeyWanted = false } = {}) {
    super(message);
    this.code = code;
    this.isKeyWanted = isKeyWanted;
  }
}

let key = sessionStorage.getItem(KEY) ?? "";

export const hasKey = () => key !== "";

export function useKey(value) {
  key = value.trim();
  if (key) sessionStorage.setItem(KEY, key);
  else sessionStorage.removeItem(KEY);
}

function headers(more = {}) {
  return key ? { ...more, Authorization: `Bearer ${key}` } : more;
}

async function ask(path, options) {
  let response;
  try {
    response = await fetch(path, { ...options, credentials: "omit", redirect: "error" });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError("The server cannot be reached. Is it still running?", { code: "unreachable" });
  }
  if (response.ok) return response;
  const body = await response.json().catch(() => null);
  throw asError(body?.error ?? {}, response.status, response.headers.get("Retry-After"));
}

function asError(error, status, retryAfter = null) {
  return new ApiError(plainWords(error, status, retryAfter), { code: error.code ?? "", isKeyWanted: status === 401 });
}

export async function getJson(path) {
  return (await ask(path, { headers: headers(), cache: "no-store" })).json();
}

/** Chunks of a streamed reply, until it ends. Throws ApiError, also for what goes wrong in the middle. */
export async function* chat(body, { id, signal }) {
  const response = await ask("v1/chat/completions", {
    method: "POST",
    headers: headers({ "Content-Type": "application/json", "X-Request-Id": id }),
    body: JSON.stringify({ ...body, stream: true, stream_options: { include_usage: true } }),
    signal,
  });
  for await (const { event, data } of events(response.body)) {
    if (data === "[DONE]") return;
    const chunk = JSON.parse(data);
    if (event === "error" || chunk.error) throw asError(chunk.error, 500);
    yield chunk;
  }
  throw new ApiError("The connection broke before the answer was complete.", { code: "cut_off" });
}

/** Server-sent events of a byte stream. */
async function* events(stream) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    while (true) {
      const { value, done } = await reader.read();
      if (done) return;
      const blocks = (rest + value).split("\n\n");
      rest = blocks.pop();
      for (const block of blocks) yield parse(block);
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}

function parse(block) {
  let event = "message";
  const data = [];
  for (const line of block.split("\n")) {
    if (line.startsWith("event:")) event = line.slice(6).trim();
    else if (line.startsWith("data:")) data.push(line.slice(5).trimStart());
  }
  return { event, data: data.join("\n") };
}
