// The page: form, requests, result, samples and history.

import { binaryCanvas, colorOf, decodeMask, priorCanvas } from "./masks.js";
import { errorOf, readEvents, splitResponse } from "./stream.js";
import { Viewer } from "./viewer.js";

const MAX_HISTORY = 20;
const THUMBNAIL_PX = 160;
const BUDGETS = [0, 5, 10, 20, 30, 50, 100, 200, 500, null];  // tokens; null for no limit
const TIMINGS = {
  queue_ms: "queue", image_decode_ms: "image decoding", image_encoder_ms: "image encoder",
  prefill_ms: "prefill", decode_ms: "decode", prior_ms: "prior", mask_decoder_ms: "mask decoder",
  resize_ms: "resize", total_ms: "total",
};

const STOPS = {
  reasoning_budget: "; the reasoning was cut at its limit",
  deadline: "; the reasoning was cut to meet the deadline",
};

const at = (id) => document.getElementById(id);
const viewer = new Viewer(at("canvas"));
const history = [];
let input = null;  // {blob, name, bitmap}
let current = null;  // the entry of the history that is shown
let running = null;  // AbortController of the request
let apiKey = "";

// ---------------------------------------------------------------- elements

function element(tag, properties = {}, ...children) {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...children);
  return made;
}

function status(text) { at("status").textContent = text; }

function fail(message) {
  at("error").textContent = message;
  at("error").hidden = !message;
}

function showText(text) {
  const { reasoning, parts } = splitResponse(text);
  at("reasoning").textContent = reasoning;
  at("response").replaceChildren(...parts.flatMap((part, index) => {
    if (index === parts.length - 1) return [part];
    const reference = element("span", { className: "reference", textContent: `${index + 1}` });
    reference.style.setProperty("--target-color", colorOf(index));
    return [part, reference];
  }));
}

function showTimings(timings) {
  at("timings-part").hidden = !timings;
  if (!timings) return;
  const rows = Object.entries(TIMINGS).map(([key, label]) => [label, `${timings[key].toFixed(1)} ms`]);
  rows.push(["response", `${timings.response_tokens} tokens`],
    ["speed", `${timings.tokens_per_second.toFixed(0)} tokens/s`]);
  at("timings").replaceChildren(...rows.map(([label, value]) =>
    element("tr", {}, element("td", { textContent: label }), element("td", { textContent: value }))));
}

function showTargets({ scores, boxes, areas }) {
  at("targets-part").hidden = !scores.length;
  at("targets").replaceChildren(...scores.map((score, index) => {
    const name = `Target ${index + 1}`;
    const toggle = element("input", { type: "checkbox", checked: true, ariaLabel: `Show ${name}` });
    toggle.addEventListener("change", () => viewer.setVisible(index, toggle.checked));
    const [x1, y1, x2, y2] = boxes[index];
    const numbers = `score ${score.toFixed(2)} · ${areas[index].toLocaleString("en")} px · ` +
      `box ${x1}, ${y1} to ${x2}, ${y2}`;
    const button = element("button", { type: "button", className: "name" },
      element("span", { className: "swatch" }), name, element("small", { textContent: numbers }));
    button.addEventListener("click", () => viewer.select(viewer.selected === index ? -1 : index));
    const item = element("li", {}, toggle, button);
    item.style.setProperty("--target-color", colorOf(index));
    return item;
  }));
  markSelected(-1);
}

function markSelected(selected) {
  [...at("targets").children].forEach((item, index) => {
    item.classList.toggle("selected", index === selected);
    item.querySelector(".name").ariaPressed = index === selected;
  });
}

function describeCanvas() {
  let text = "No image";
  if (input) {
    const { width, height } = viewer.image;
    const masks = current?.result?.masks.length ?? 0;
    text = `${input.name}, ${width} x ${height} pixels` + (masks ? `, ${masks} masks: ` +
      `${current.result.instruction}` : "");
  }
  at("canvas").ariaLabel = text;
  at("hint").hidden = !!input;
  at("file-name").textContent = input?.name ?? "Choose a file …";
}

function showBudget() {
  const budget = BUDGETS[at("budget").value];
  at("budget-text").textContent =
    budget === null ? "no limit" : budget === 0 ? "none" : `at most ${budget} tokens`;
}

function setView(name) {
  viewer.view = name;
  document.querySelector(`[name=view][value=${name}]`).checked = true;
  viewer.draw();
}

function clearResult() {
  current = null;
  fail("");
  showText("");
  showTimings(null);
  showTargets({ scores: [], boxes: [], areas: [] });
  status("");
}

// ---------------------------------------------------------------- image

async function setInput(blob, name) {
  running?.abort();
  let bitmap;
  try {
    bitmap = await createImageBitmap(blob);
  } catch {
    bitmap = null;  // a format that the server may read; its size comes with the result
  }
  input = { blob, name, bitmap };
  clearResult();
  viewer.setImage(bitmap ?? { width: 4, height: 3 });
  if (!bitmap) status("This browser cannot display the file; the server may still read it.");
  describeCanvas();
  markHistory();
}

function chooseFile(file) {
  if (!file) return;
  at("file").value = "";  // the same file can be chosen again
  if (file.type && !file.type.startsWith("image/")) {
    fail(`${file.name} is ${file.type}; choose an image file.`);
    return;
  }
  setInput(file, file.name || "pasted image");
}

// ---------------------------------------------------------------- request

async function post(body, signal) {
  const send = () => fetch("segment", { method: "POST", body, signal, headers: {
    Accept: "text/event-stream", ...(apiKey && { Authorization: `Bearer ${apiKey}` }) } });
  let response = await send();
  while (response.status === 401 && (apiKey = await requestKey())) response = await send();
  return response;
}

function requestKey() {
  const dialog = at("key-dialog");
  at("key").value = dialog.returnValue = "";
  dialog.showModal();
  return new Promise((resolve) => dialog.addEventListener("close", () =>
    resolve(dialog.returnValue === "ok" ? at("key").value : ""), { once: true }));
}

async function segment(event) {
  event?.preventDefault();
  if (!input) {
    fail("Choose an image first.");
    at("file").focus();
    return;
  }
  running?.abort();
  const stop = running = new AbortController();
  clearResult();
  viewer.setMasks([]);
  viewer.setPrior(null);
  setView("masks");
  const entry = current = { input, instruction: at("instruction").value, text: "", prior: null };
  const clock = startClock(stop.signal);
  at("stop").hidden = false;
  try {
    const response = await post(formOf(entry), stop.signal);
    if (!response.ok) fail(await errorOf(response));
    else for await (const [name, data] of readEvents(response)) await receive(entry, name, data);
  } catch (error) {
    if (!stop.signal.aborted) {
      fail(`Cannot reach the server (${error.message}). Check that it still runs, then try again.`);
    }
  } finally {
    clearInterval(clock);
    if (running === stop) {
      running = null;
      at("stop").hidden = true;
      if (stop.signal.aborted) status("Stopped.");
      else if (!entry.result) status("");
    }
  }
}

function formOf({ input: { blob, name }, instruction }) {
  const body = new FormData();
  body.append("image", blob, name);
  body.append("instruction", instruction);
  body.append("max_targets", at("max-targets").value);
  const budget = BUDGETS[at("budget").value];
  if (budget === 0) body.append("reasoning", "none");
  else if (budget !== null) body.append("max_reasoning_tokens", budget);
  if (at("deadline").value) body.append("deadline_ms", at("deadline").value);
  return body;
}

/** Show the time since the request began, and until its first event how many others are active. */
function startClock(signal) {
  const start = performance.now();
  let ahead = "", number = 0;
  const tick = async () => {
    if (signal.aborted || !current) return;
    const seconds = ((performance.now() - start) / 1000).toFixed(1);
    status(`Running, ${seconds} s${current.text ? "" : ahead}`);
    if (current.text || number++ % 10 !== 9) return;
    const health = await fetch("health", { signal }).then((answer) => answer.json()).catch(() => null);
    ahead = health?.active_requests > 1 ? `, ${health.active_requests - 1} other requests active` : "";
  };
  tick();
  return setInterval(tick, 100);
}

async function receive(entry, name, data) {
  if (name === "error") fail(data.error);
  if (name === "text") showText(entry.text += data.text);
  if (name === "prior") {
    const blob = await (await fetch(data.image)).blob();
    entry.prior = priorCanvas(await createImageBitmap(blob));
    viewer.setPrior(entry.prior);
  }
  if (name === "result") {
    entry.result = data;
    showResult(entry);
    remember(entry);
  }
}

function showResult(entry) {
  const { result } = entry, count = result.masks.length;
  if (!entry.input.bitmap) {
    const [height, width] = result.image_size;
    viewer.setImage({ width, height });
  }
  entry.text = result.response;
  showText(entry.text);
  showTargets(result);
  showTimings(result.timings);
  viewer.setPrior(entry.prior);
  viewer.setMasks(result.masks.map(decodeMask));
  const seconds = (result.timings.total_ms / 1000).toFixed(2);
  const cut = STOPS[result.stop_reason] ?? "";
  status(result.found ? `${count} ${count === 1 ? "mask" : "masks"} in ${seconds} s${cut}` :
    `Nothing in the image fits the instruction (${seconds} s).`);
  describeCanvas();
}

// ---------------------------------------------------------------- downloads

async function download(content, name) {
  const blob = content instanceof OffscreenCanvas ? await content.convertToBlob() : content;
  const link = element("a", { href: URL.createObjectURL(blob), download: name });
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 1000);
}

const stem = () => current.input.name.replace(/\.[^.]*$/, "");

/** The masks to save: the selected one, or all. */
function chosenMasks() {
  const { masks } = current.result;
  return viewer.selected < 0 ? masks : [masks[viewer.selected]];
}

function copyRle() {
  const text = JSON.stringify(chosenMasks());
  const told = (message) => { at("copy-rle").textContent = message; setTimeout(() =>
    at("copy-rle").textContent = "Copy RLE", 1500); };
  // The clipboard exists on HTTPS and localhost only.
  if (!navigator.clipboard) {
    download(new Blob([text]), `${stem()}-rle.json`);
    return;
  }
  navigator.clipboard.writeText(text).then(() => told("Copied"), () => told("Not allowed"));
}

// ---------------------------------------------------------------- history and samples

function remember(entry) {
  const { width, height } = viewer.image;
  const scale = THUMBNAIL_PX / Math.max(width, height);
  const thumbnail = element("canvas", { width: Math.ceil(width * scale), height: Math.ceil(height * scale) });
  thumbnail.getContext("2d").drawImage(viewer.snapshot(), 0, 0, thumbnail.width, thumbnail.height);
  entry.thumbnail = thumbnail.toDataURL();
  history.unshift(entry);
  history.length = Math.min(history.length, MAX_HISTORY);
  at("history-part").hidden = false;
  at("history").replaceChildren(...history.map((each) => {
    const button = element("button", { type: "button" },
      element("img", { src: each.thumbnail, alt: "" }), element("span", { textContent: each.instruction }));
    button.addEventListener("click", () => recall(each));
    return element("li", {}, button);
  }));
  markHistory();
}

function markHistory() {
  [...at("history").querySelectorAll("button")].forEach((button, index) =>
    button.setAttribute("aria-current", history[index] === current));
}

function recall(entry) {
  running?.abort();
  input = entry.input;
  clearResult();
  current = entry;
  at("instruction").value = entry.instruction;
  viewer.setImage(input.bitmap ?? { width: 4, height: 3 });
  showResult(entry);
  markHistory();
}

async function showSamples() {
  const samples = await fetch("samples").then((response) => response.ok ? response.json() : []);
  at("samples").hidden = !samples.length;
  at("samples").querySelector("ul").append(...samples.map(({ image, instruction }) => {
    const button = element("button", { type: "button" },
      element("img", { src: image, alt: "" }), instruction);
    button.addEventListener("click", async () => {
      at("instruction").value = instruction;
      const response = await fetch(image);
      await setInput(await response.blob(), image.split("/").at(-1));
      segment();
    });
    return element("li", {}, button);
  }));
}

// ---------------------------------------------------------------- events

at("form").addEventListener("submit", segment);
at("stop").addEventListener("click", () => running?.abort());
at("file").addEventListener("change", () => chooseFile(at("file").files[0]));
for (const choice of document.querySelectorAll("[name=view]")) {
  choice.addEventListener("change", () => setView(choice.value));
}
at("budget").addEventListener("input", showBudget);
at("opacity").addEventListener("input", () => {
  viewer.opacity = at("opacity").value / 100;
  viewer.draw();
});

function compare(on) { viewer.comparing = on; viewer.draw(); }
at("compare").addEventListener("pointerdown", () => compare(true));
for (const name of ["pointerup", "pointerleave", "pointercancel", "blur"]) {
  at("compare").addEventListener(name, () => compare(false));
}
const isTyping = (event) => event.target.matches("input:not([type=radio], [type=checkbox], [type=range])");
addEventListener("keydown", (event) => {
  const holds = event.key.toLowerCase() === "c" || (event.key === " " && event.target === at("compare"));
  if (holds && !event.ctrlKey && !event.metaKey && !isTyping(event)) compare(true);
});
addEventListener("keyup", () => compare(false));

at("zoom-in").addEventListener("click", () => viewer.zoomBy(1.25));
at("zoom-out").addEventListener("click", () => viewer.zoomBy(0.8));
at("zoom-fit").addEventListener("click", () => viewer.fit());
viewer.addEventListener("draw", () => at("zoom-fit").textContent = `${Math.round(100 * viewer.zoom)} %`);
viewer.addEventListener("select", (event) => markSelected(event.detail));

at("download-mask").addEventListener("click", () =>
  download(binaryCanvas(chosenMasks().map(decodeMask)), `${stem()}-mask.png`));
at("download-overlay").addEventListener("click", () => download(viewer.snapshot(), `${stem()}-overlay.png`));
at("download-json").addEventListener("click", () =>
  download(new Blob([JSON.stringify(current.result, null, 2)], { type: "application/json" }), `${stem()}.json`));
at("copy-rle").addEventListener("click", copyRle);

addEventListener("dragover", (event) => {
  event.preventDefault();
  at("drop").hidden = false;
});
addEventListener("dragleave", (event) => { if (!event.relatedTarget) at("drop").hidden = true; });
addEventListener("drop", (event) => {
  event.preventDefault();
  at("drop").hidden = true;
  chooseFile(event.dataTransfer.files[0]);
});
addEventListener("paste", (event) => {
  const [file] = event.clipboardData.files;
  if (file) chooseFile(file);
});

fetch("health").then((response) => response.json()).then((health) => at("runtime").textContent = health.runtime);
showSamples();
showBudget();
clearResult();
describeCanvas();
