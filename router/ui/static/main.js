// Puts the parts of the page together.

import { getJson } from "./api.js";
import { Chat } from "./chat.js";
import { byId } from "./dom.js";
import { Images } from "./images.js";
import { KeyDialog } from "./key.js";
import { Live } from "./live.js";
import { Requests } from "./requests.js";
import { sampleCards } from "./samples.js";
import { showServers } from "./servers.js";

const ABOUT_IMAGES = "What is in the image?";
const ONE_QUESTION = /^nano(-flash)?$/; // DvD's own small models have not learnt to follow a second turn

let latest = [];
const requests = new Requests();
const keyDialog = new KeyDialog(start);
const chat = new Chat({
  onKeyWanted: () => keyDialog.open(),
  onAsked: (id, question, answer) => {
    requests.expect(id, question, answer);
    live.now();
  },
});
const images = new Images(showPlaceholder);
const live = new Live({
  onNews: (news) => {
    latest = [...latest, ...news.requests].slice(-100);
    showState(news.state);
    showServers(news, latest);
    requests.update(news.requests);
  },
  onLost: (error) => {
    showState("lost");
    if (error.isKeyWanted) keyDialog.open();
    return error.isKeyWanted === true;
  },
  isBusy: () => chat.isAnswering || requests.areRunning,
});

let model = "";
const STATES = { ready: "", starting: "starting", draining: "shutting down", lost: "cannot be reached" };

function showState(state) {
  byId("state-dot").className = `dot ${state === "ready" ? "ready" : state === "lost" ? "bad" : "wait"}`;
  byId("served").textContent = [model, STATES[state] ?? state].filter(Boolean).join(" · ") || "ready";
}

async function start() {
  try {
    const models = await getJson("v1/models");
    model = models.data[0]?.id ?? "";
    if (ONE_QUESTION.test(model)) byId("remember").checked = false;
  } catch (error) {
    if (error.isKeyWanted) return keyDialog.open();
  }
  live.now();
}

function showPlaceholder() {
  const hasImages = images.count > 0;
  byId("question").placeholder = hasImages ? ABOUT_IMAGES : "Ask anything";
}

function options() {
  return {
    tiles: Number(byId("tiles").value),
    maxTokens: Math.max(0, Math.trunc(Number(byId("max-tokens").value))),
    temperature: Number(byId("temperature").value),
    remembers: byId("remember").checked,
  };
}

async function send() {
  if (chat.isAnswering) return;
  const field = byId("question");
  const text = field.value.trim() || (images.count ? ABOUT_IMAGES : "");
  if (!text) return field.focus();
  field.value = "";
  grow();
  await chat.ask(text, images.take(), options());
  live.now();
}

function grow() {
  const field = byId("question");
  field.style.height = "auto";
  field.style.height = `${Math.min(field.scrollHeight, 180)}px`;
}

byId("composer").addEventListener("submit", (event) => {
  event.preventDefault();
  send();
});
byId("question").addEventListener("input", grow);
byId("question").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    send();
  }
});
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape" && chat.isAnswering) chat.stop();
});
byId("stop").addEventListener("click", () => chat.stop());
byId("new-chat").addEventListener("click", () => {
  chat.startAnew();
  images.clear();
  byId("question").focus();
});
byId("options-toggle").addEventListener("click", () => {
  const panel = byId("options");
  panel.hidden = !panel.hidden;
  byId("options-toggle").setAttribute("aria-expanded", String(!panel.hidden));
});
byId("temperature").addEventListener("input", () => {
  byId("temperature-shown").textContent = byId("temperature").value;
});
byId("samples").append(
  ...sampleCards(async (file, question) => {
    if (chat.isAnswering) return;
    await images.add([file]);
    byId("question").value = question;
    await send();
  }),
);
start();
