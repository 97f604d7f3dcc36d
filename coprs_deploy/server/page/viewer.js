// The canvas: an image with the prior or masks over it, zoom, pan and selection.

import { maskCanvas, colorOf } from "./masks.js";

const MAX_ZOOM = 32;
const DRAG_PX = 4;

export class Viewer extends EventTarget {
  #canvas;
  #image = null;
  #prior = null;
  #targets = [];
  #pointers = new Map();
  #dragged = false;
  #scale = 1;  // canvas pixels for one image pixel, relative to the whole image in view
  #center = [0.5, 0.5];  // point of the image in the middle of the canvas, 0 to 1

  view = "masks";
  opacity = 0.45;
  comparing = false;
  selected = -1;

  constructor(canvas) {
    super();
    this.#canvas = canvas;
    new ResizeObserver(() => this.draw()).observe(canvas);
    canvas.addEventListener("wheel", (event) => this.#onWheel(event), { passive: false });
    canvas.addEventListener("pointerdown", (event) => this.#onDown(event));
    canvas.addEventListener("pointermove", (event) => this.#onMove(event));
    for (const name of ["pointerup", "pointercancel"]) {
      canvas.addEventListener(name, (event) => this.#onUp(event));
    }
    canvas.addEventListener("dblclick", () => this.fit());
    canvas.addEventListener("keydown", (event) => this.#onKey(event));
  }

  get image() { return this.#image; }
  get zoom() { return this.#scale; }

  /** Show an image (ImageBitmap, or {width, height} if the browser cannot decode it). */
  setImage(image) {
    this.#image = image;
    this.#prior = null;
    this.#targets = [];
    this.selected = -1;
    this.fit();
  }

  setPrior(canvas) { this.#prior = canvas; this.draw(); }

  /** Show decoded masks; each may be hidden with setVisible, and has its label when it is selected. */
  setMasks(decoded, labels = []) {
    this.#targets = decoded.map((mask, index) => ({
      mask,
      label: labels[index],
      visible: true,
      fill: maskCanvas(mask, colorOf(index)),
      outline: maskCanvas(mask, colorOf(index), { outline: true }),
    }));
    this.selected = -1;
    this.draw();
  }

  setVisible(index, visible) { this.#targets[index].visible = visible; this.draw(); }

  select(index) {
    this.selected = index;
    this.draw();
    this.dispatchEvent(new CustomEvent("select", { detail: index }));
  }

  fit() { this.#scale = 1; this.#center = [0.5, 0.5]; this.draw(); }

  /** Zoom by a factor; a point of the canvas, in pixels, stays where it is. */
  zoomBy(factor, [x, y] = [this.#canvas.width / 2, this.#canvas.height / 2]) {
    if (!this.#image) return;
    const before = this.#toImage(x, y);
    this.#scale = Math.min(MAX_ZOOM, Math.max(1, this.#scale * factor));
    const after = this.#toImage(x, y);
    this.#moveCenter(before[0] - after[0], before[1] - after[1]);
    this.draw();
  }

  draw() {
    const canvas = this.#canvas, context = canvas.getContext("2d");
    const ratio = globalThis.devicePixelRatio || 1;
    const width = Math.round(canvas.clientWidth * ratio);
    const height = Math.round(canvas.clientHeight * ratio);
    if (canvas.width !== width || canvas.height !== height) Object.assign(canvas, { width, height });
    context.clearRect(0, 0, width, height);
    if (this.#image) {
      this.#paint(context, this.#rectangle());
      if (!this.comparing && this.view === "masks") this.#paintSelected(context, ratio);
    }
    this.dispatchEvent(new Event("draw"));
  }

  /** Draw what is shown, at the size of the image, for a download. */
  snapshot() {
    const { width, height } = this.#image;
    const canvas = new OffscreenCanvas(width, height);
    this.#paint(canvas.getContext("2d"), [0, 0, width, height]);
    return canvas;
  }

  #paint(context, [left, top, width, height]) {
    context.imageSmoothingEnabled = width < 4 * this.#image.width;
    if (this.#image instanceof ImageBitmap) {
      context.drawImage(this.#image, left, top, width, height);
    } else {
      context.fillStyle = "#808080";
      context.fillRect(left, top, width, height);
    }
    if (this.comparing || this.view === "image") return;
    if (this.view === "prior" || !this.#targets.length) {
      if (!this.#prior) return;
      context.imageSmoothingEnabled = true;
      context.globalAlpha = Math.min(1, this.opacity + 0.2);
      context.drawImage(this.#prior, left, top, width, height);
      context.globalAlpha = 1;
      return;
    }
    this.#targets.forEach(({ visible, fill, outline }, index) => {
      if (!visible) return;
      context.globalAlpha = index === this.selected ? Math.min(1, this.opacity + 0.25) : this.opacity;
      context.drawImage(fill, left, top, width, height);
      context.globalAlpha = 1;
      context.drawImage(outline, left, top, width, height);
    });
  }

  // The box of the selected target, and its label inside the canvas.
  #paintSelected(context, ratio) {
    const target = this.#targets[this.selected];
    if (!target?.visible) return;
    const [left, top, width, height] = this.#rectangle(), { box: [x1, y1, x2, y2], text } = target.label;
    const [across, down] = [width / this.#image.width, height / this.#image.height];
    const [x, y] = [left + x1 * across, top + y1 * down];
    const color = colorOf(this.selected), pad = 5 * ratio;
    const size = 0.875 * ratio * parseFloat(getComputedStyle(this.#canvas).fontSize);
    for (const [style, lineWidth] of [["#000", size / 3], [color, size / 6]]) {
      Object.assign(context, { strokeStyle: style, lineWidth });
      context.strokeRect(x, y, (x2 - x1) * across, (y2 - y1) * down);
    }
    context.font = `600 ${size}px system-ui, sans-serif`;
    const box = [context.measureText(text).width + 2 * pad, size + 2 * pad];
    const [labelX, labelY] = [x, y - box[1]].map((value, axis) =>
      Math.max(0, Math.min(value, [this.#canvas.width, this.#canvas.height][axis] - box[axis])));
    context.fillStyle = color;
    context.fillRect(labelX, labelY, ...box);
    Object.assign(context, { fillStyle: "#000", textBaseline: "middle" });
    context.fillText(text, labelX + pad, labelY + box[1] / 2);
  }

  // Left, top, width and height of the image on the canvas.
  #rectangle() {
    const { width, height } = this.#canvas;
    const fitted = Math.min(width / this.#image.width, height / this.#image.height);
    const scale = fitted * this.#scale;
    const size = [this.#image.width * scale, this.#image.height * scale];
    const [left, top] = [width, height].map((length, axis) =>
      length / 2 - this.#center[axis] * size[axis]);
    return [left, top, ...size];
  }

  #toImage(x, y) {
    const [left, top, width, height] = this.#rectangle();
    return [(x - left) / width, (y - top) / height];
  }

  #toCanvas(event) {
    const box = this.#canvas.getBoundingClientRect();
    const ratio = this.#canvas.width / box.width;
    return [(event.clientX - box.left) * ratio, (event.clientY - box.top) * ratio];
  }

  #moveCenter(dx, dy) {
    const free = 0.5 - 0.5 / this.#scale;
    this.#center = [this.#center[0] + dx, this.#center[1] + dy].map((value) =>
      Math.min(0.5 + free, Math.max(0.5 - free, value)));
  }

  #pan(dx, dy) {
    const [, , width, height] = this.#rectangle();
    this.#moveCenter(-dx / width, -dy / height);
    this.draw();
  }

  #targetAt(x, y) {
    const [u, v] = this.#toImage(x, y);
    if (this.view !== "masks" || u < 0 || v < 0 || u >= 1 || v >= 1) return -1;
    return this.#targets.findLastIndex(({ visible, mask: { mask, width, height } }) =>
      visible && mask[Math.floor(v * height) * width + Math.floor(u * width)]);
  }

  #onWheel(event) {
    if (!this.#image) return;
    event.preventDefault();
    this.zoomBy(Math.exp(-event.deltaY * (event.ctrlKey ? 0.01 : 0.002)), this.#toCanvas(event));
  }

  #onDown(event) {
    if (!this.#image) return;
    this.#canvas.setPointerCapture(event.pointerId);
    this.#pointers.set(event.pointerId, { start: this.#toCanvas(event), at: this.#toCanvas(event) });
    this.#dragged = this.#pointers.size > 1;
  }

  #onMove(event) {
    const at = this.#toCanvas(event), pointer = this.#pointers.get(event.pointerId);
    if (!pointer) {
      this.#canvas.classList.toggle("over-mask", !!this.#image && this.#targetAt(...at) >= 0);
      return;
    }
    const others = [...this.#pointers].filter(([id]) => id !== event.pointerId);
    if (others.length) {
      const other = others[0][1].at;
      const [before, after] = [pointer.at, at].map(([x, y]) => Math.hypot(x - other[0], y - other[1]));
      if (before > 0) this.zoomBy(after / before, other);
    } else {
      this.#dragged ||= Math.hypot(at[0] - pointer.start[0], at[1] - pointer.start[1]) > DRAG_PX;
      if (this.#dragged) this.#pan(at[0] - pointer.at[0], at[1] - pointer.at[1]);
    }
    this.#canvas.classList.toggle("panning", this.#dragged);
    pointer.at = at;
  }

  #onUp(event) {
    const pointer = this.#pointers.get(event.pointerId);
    this.#pointers.delete(event.pointerId);
    this.#canvas.classList.remove("panning");
    if (pointer && !this.#dragged && event.type === "pointerup") {
      this.select(this.#targetAt(...pointer.at));
    }
  }

  #onKey(event) {
    const step = 0.1 * Math.min(this.#canvas.width, this.#canvas.height);
    const actions = {
      "+": () => this.zoomBy(1.25), "=": () => this.zoomBy(1.25), "-": () => this.zoomBy(0.8),
      0: () => this.fit(),
      ArrowLeft: () => this.#pan(step, 0), ArrowRight: () => this.#pan(-step, 0),
      ArrowUp: () => this.#pan(0, step), ArrowDown: () => this.#pan(0, -step),
      Escape: () => this.select(-1),
    };
    if (!this.#image || event.ctrlKey || event.metaKey || !(event.key in actions)) return;
    event.preventDefault();
    actions[event.key]();
  }
}
