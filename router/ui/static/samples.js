// Pictures to begin with, drawn here and now: plain enough for the smallest model, and known to whoever looks.

import { el } from "./dom.js";

const SIDE = 448; // one tile
const PAPER = "#f6f4ee";
const INK = {
  red: "#d42626",
  orange: "#f5800a",
  green: "#2a9646",
  blue: "#205ccd",
  purple: "#8032a8",
};

const SAMPLES = [
  { name: "a shape", question: "What is in the image?", draw: (pen) => triangle(pen, INK.orange, 236, 208, 76) },
  {
    name: "some shapes",
    question: "How many shapes are there?",
    draw: (pen) => {
      circle(pen, INK.blue, 104, 118, 52);
      square(pen, INK.red, 316, 96, 46);
      triangle(pen, INK.green, 208, 262, 54);
      circle(pen, INK.purple, 346, 318, 44);
    },
  },
  { name: "another shape", question: "Which shape is this?", draw: (pen) => star(pen, INK.purple, 190, 236, 80) },
];

/** A card for each sample; `choose` gets a file and a question. */
export function sampleCards(choose) {
  return SAMPLES.map((sample) => {
    const canvas = el("canvas", { width: SIDE, height: SIDE, "aria-hidden": "true" });
    const pen = canvas.getContext("2d");
    pen.fillStyle = PAPER;
    pen.fillRect(0, 0, SIDE, SIDE);
    sample.draw(pen);
    const card = el("button", { type: "button", class: "sample" }, canvas, el("span", { text: sample.question }));
    card.addEventListener("click", () =>
      canvas.toBlob((blob) => choose(new File([blob], `${sample.name}.png`, { type: "image/png" }), sample.question)),
    );
    return el("li", {}, card);
  });
}

function circle(pen, colour, x, y, size) {
  pen.fillStyle = colour;
  pen.beginPath();
  pen.arc(x, y, size / 2, 0, 2 * Math.PI);
  pen.fill();
}

function square(pen, colour, x, y, size) {
  pen.fillStyle = colour;
  pen.fillRect(x - size / 2, y - size / 2, size, size);
}

function star(pen, colour, x, y, size) {
  pen.fillStyle = colour;
  pen.beginPath();
  for (let corner = 0; corner < 10; corner += 1) {
    const angle = -Math.PI / 2 + (corner * Math.PI) / 5;
    const radius = (corner % 2 ? 0.22 : 0.5) * size;
    pen.lineTo(x + radius * Math.cos(angle), y + radius * Math.sin(angle));
  }
  pen.fill();
}

function triangle(pen, colour, x, y, size) {
  pen.fillStyle = colour;
  pen.beginPath();
  pen.moveTo(x, y - size / 2);
  pen.lineTo(x + size / 2, y + size / 2);
  pen.lineTo(x - size / 2, y + size / 2);
  pen.fill();
}
