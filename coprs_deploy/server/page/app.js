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
let loading = null;  // promise of the blob and bitmap of the image that was chosen last
let current = null;  // the entry of the history that is shown
let running = null;  // AbortController of the request
let apiKey = "";
let speed = null;  // of the last result: {tokens, decode_ms, other_ms}

// ---------------------------------------------------------------- elements

function element(tag, properties = {}, ...children) {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...children);
  return made;
}

/** Say what happens. Only changes are written, since a screen reader speaks each of them. */
function status(text) { if (at("status").textContent !== text) at("status").textContent = text; }

function fail(message) {
  at("error").textContent = message;
  at("error").hidden = !message;
  if (message) at("error").scrollIntoView({ block: "nearest" });
}

const seconds = (ms) => `${(ms / 1000).toFixed(2)} s`;
const counted = (count, noun) => `${count} ${noun}${count === 1 ? "" : "s"}`;

function showText(text) {
  const { reasoning, parts } = splitResponse(text);
  at("reasoning").textContent = reasoning;
  at("reasoning").dataset.empty =
    running ? "…" : current ? "None." : "It appears here while it is written.";
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
    const numbers = `${summary(score, areas[index])} · box ${x1}, ${y1} to ${x2}, ${y2}`;
    const button = element("button", { type: "button", className: "name" },
      element("span", { className: "swatch" }), name, element("small", { textContent: numbers }));
    button.addEventListener("click", () => viewer.select(viewer.selected === index ? -1 : index));
    const item = element("li", {}, toggle, button);
    item.style.setProperty("--target-color", colorOf(index));
    return item;
  }));
  markSelected(-1);
}

const summary = (score, area) => `score ${score.toFixed(2)} · ${area.toLocaleString("en")} px`;

/** What the canvas shows of a selected target. */
const labelsOf = ({ scores, boxes, areas }) => scores.map((score, index) =>
  ({ box: boxes[index], text: `Target ${index + 1} · ${summary(score, areas[index])}` }));

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
    text = `${input.name}, ${width} x ${height} pixels` +
      (masks ? `, ${counted(masks, "mask")}: ${current.result.instruction}` : "");
  }
  at("canvas").ariaLabel = text;
  at("hint").hidden = !!input;
  at("file-name").textContent = input?.name ?? "Choose a file …";
}

/** Show the limits of the reasoning, and what they cost and save. */
function showLimits() {
  const budget = BUDGETS[at("budget").value], deadline = at("deadline").value;
  at("budget-text").textContent = at("budget").ariaValueText =
    budget === null ? "no limit" : budget === 0 ? "none" : `at most ${budget} tokens`;
  const parts = [budget === null ? "The whole reasoning: slowest, most exact." :
    budget === 0 ? "No reasoning: fastest, least exact." :
      `Reasoning cut after ${budget} tokens: faster, less exact.`];
  if (deadline) parts.push(`It is cut in time for a mask ${deadline} ms after the request arrived.`);
  if (budget !== null || deadline) parts.push("A mask always comes, even if nothing fits.");
  if (speed) {
    parts.push(`The last request: ${speed.tokens} tokens, ${seconds(speed.decode_ms + speed.other_ms)}.`);
    const ms = speed.other_ms + (budget ?? 0) * speed.decode_ms / Math.max(1, speed.tokens);
    if (budget !== null) parts.push(`With this limit: at most about ${seconds(ms)}.`);
  }
  at("trade").textContent = parts.join(" ");
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
  at("elapsed").textContent = "";
}

// ---------------------------------------------------------------- image

async function load(source) {
  const blob = await source;
  // null: a format that the server may read; its size comes with the result
  return { blob, bitmap: await createImageBitmap(blob).catch(() => null) };
}

/** Show a file, or the promise of one, unless something else is chosen while it loads. */
async function setInput(source, name) {
  const chosen = loading = load(source);
  const loaded = await chosen.catch(() => null);
  if (chosen !== loading) return;
  if (!loaded) {
    loading = null;
    fail(`Cannot load ${name}. Check that the server still runs, then try again.`);
    return;
  }
  abandon();
  const { bitmap } = loaded;
  input = { ...loaded, name };
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

async function post(body, id, signal) {
  const send = () => fetch("segment", { method: "POST", body, signal, headers: {
    Accept: "text/event-stream", "X-Request-ID": id,
    ...(apiKey && { Authorization: `Bearer ${apiKey}` }) } });
  let response = await send();
  while (response.status === 401 && (apiKey = await requestKey())) response = await send();
  return response;
}

function requestKey() {
  const dialog = at("key-dialog");
  at("key-text").textContent = apiKey ? "The server does not accept this API key; enter another one" :
    "This server needs an API key";
  at("key").value = dialog.returnValue = "";
  dialog.showModal();
  return new Promise((resolve) => dialog.addEventListener("close", () =>
    resolve(dialog.returnValue === "ok" ? at("key").value : ""), { once: true }));
}

async function segment(event) {
  event?.preventDefault();
  const chosen = loading;
  await chosen?.catch(() => null);
  if (chosen !== loading) return;
  if (!input) {
    fail("Choose an image first.");
    at("file").focus();
    return;
  }
  abandon();
  const stop = running = new AbortController();
  clearResult();
  viewer.setMasks([]);
  viewer.setPrior(null);
  setView("masks");
  const entry = current = { input, instruction: at("instruction").value, limits: limitsOfForm(), text: "",
    prior: null };
  showText("");
  const id = [...crypto.getRandomValues(new Uint32Array(4))].map((part) => part.toString(16)).join("-");
  at("stop").hidden = false;
  if (matchMedia("(max-width: 56rem)").matches) document.querySelector("main").scrollIntoView();
  const clock = startClock(entry, id, stop.signal);
  let response = null;
  try {
    response = await post(formOf(entry), id, stop.signal);
    if (!response.ok) fail(await errorOf(response));
    else for await (const [name, data] of readEvents(response)) {
      if (stop.signal.aborted) break;
      await receive(entry, name, data);
    }
    if (response.ok && !entry.result && at("error").hidden) throw new Error("no result");
  } catch (error) {
    if (!stop.signal.aborted) {
      fail(`${response ? "The server ended the connection before the result" : "Cannot reach the server"} ` +
        `(${error.message}). Check that it still runs, then try again.`);
    }
  } finally {
    clearInterval(clock);
    if (running === stop) {
      running = null;
      at("stop").hidden = true;
      if (!stop.signal.aborted) at("elapsed").textContent = "";
      if (stop.signal.aborted) status("Stopped");
      else if (!entry.result) status("");
      showText(entry.text);
    }
  }
}

/** The limits for the history. */
function limitsOfForm() {
  const budget = BUDGETS[at("budget").value], deadline = at("deadline").value;
  const limits = [budget === 0 ? "no reasoning" : budget && `${budget} tokens`, deadline && `${deadline} ms`];
  return limits.filter(Boolean).join(", ") || "no limit";
}

/** End the running request in favor of something else. */
function abandon() {
  running?.abort();
  running = null;
  at("stop").hidden = true;
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

/** Show the time since the request began, and until its first event the requests before it. */
function startClock(entry, id, signal) {
  const start = performance.now();
  let ahead = 0, number = 0;
  const tick = async () => {
    if (signal.aborted || entry.result) return;
    at("elapsed").textContent = `${((performance.now() - start) / 1000).toFixed(1)} s`;
    status(entry.text || !ahead ? "Running" : `Waiting, ${counted(ahead, "earlier request")}`);
    if (entry.text || number++ % 10 !== 2) return;
    const health = await fetch(`health?request_id=${id}`, { signal }).then((answer) => answer.json())
      .catch(() => null);
    ahead = health?.requests_ahead ?? 0;
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
    if (entry === current) viewer.setPrior(entry.prior);
  }
  if (name === "result") {
    entry.result = data;
    const { decode_ms, total_ms, response_tokens: tokens } = data.timings;
    speed = { tokens, decode_ms, other_ms: total_ms - decode_ms };
    showLimits();
    showResult(entry);
    remember(entry);
  }
}

function showResult(entry) {
  const { result } = entry;
  if (!entry.input.bitmap) {
    const [height, width] = result.image_size;
    viewer.setImage({ width, height });
  }
  entry.text = result.response;
  showText(entry.text);
  showTargets(result);
  showTimings(result.timings);
  viewer.setPrior(entry.prior);
  viewer.setMasks(result.masks.map(decodeMask), labelsOf(result));
  const cut = STOPS[result.stop_reason] ?? "", time = seconds(result.timings.total_ms);
  at("elapsed").textContent = "";
  status(result.found ? `${counted(result.masks.length, "mask")} in ${time}${cut}` :
    `Nothing in the image fits the instruction (${time}).`);
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
    const button = element("button", { type: "button", title: each.instruction },
      element("img", { src: each.thumbnail, alt: "" }), element("span", { textContent: each.instruction }),
      element("small", { textContent: `${each.limits} · ${seconds(each.result.timings.total_ms)}` }));
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
  abandon();
  loading = null;
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
    button.addEventListener("click", () => {
      at("instruction").value = instruction;
      setInput(fetch(image).then((response) => response.blob()), image.split("/").at(-1));
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
for (const name of ["budget", "deadline"]) at(name).addEventListener("input", showLimits);
at("opacity").addEventListener("input", () => {
  viewer.opacity = at("opacity").value / 100;
  viewer.draw();
});

function compare(on) { viewer.comparing = on; viewer.draw(); }
at("compare").addEventListener("pointerdown", () => compare(true));
at("compare").addEventListener("contextmenu", (event) => event.preventDefault());  // of a long touch
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

// Text may be dropped or pasted into the fields.
const NO_FILE = "That is no file; choose, drop or paste an image file.";
const isText = (event, data) => isTyping(event) && !data.types.includes("Files");
addEventListener("dragover", (event) => {
  if (isText(event, event.dataTransfer)) return;
  event.preventDefault();
  at("drop").hidden = !event.dataTransfer.types.includes("Files");
});
addEventListener("dragleave", (event) => { if (!event.relatedTarget) at("drop").hidden = true; });
addEventListener("drop", (event) => {
  at("drop").hidden = true;
  if (isText(event, event.dataTransfer)) return;
  event.preventDefault();  // a link would be opened in place of the page
  const [file] = event.dataTransfer.files;
  if (file) chooseFile(file); else fail(NO_FILE);
});
addEventListener("paste", (event) => {
  if (isText(event, event.clipboardData)) return;
  const [file] = event.clipboardData.files;
  if (file) chooseFile(file); else fail(NO_FILE);
});

fetch("health").then((response) => response.json()).then((health) => at("runtime").textContent = health.runtime);
showSamples();
showLimits();
clearResult();
describeCanvas();
