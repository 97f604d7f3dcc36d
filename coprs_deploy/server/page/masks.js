// Masks: COCO's compressed run-length encoding to pixels, and pixels to canvases.

export const COLORS = [
  "#ff4d8d", "#35a7ff", "#ffb000", "#2ec27e", "#b186ff", "#ff7f3f", "#00c2cb", "#c6d300",
];

/** The color of a target as #rrggbb; further ones are spread over the hues, light enough for black text. */
export function colorOf(index) {
  if (index < COLORS.length) return COLORS[index];
  const hue = (index * 137.5) % 360;
  const channel = (offset) => {
    const at = (offset + hue / 30) % 12;
    return Math.round(255 * (0.72 - 0.22 * Math.max(-1, Math.min(at - 3, 9 - at, 1))));
  };
  return `#${[0, 8, 4].map((offset) => channel(offset).toString(16).padStart(2, "0")).join("")}`;
}

/** Decode {size: [height, width], counts} to one byte a pixel, row by row; 1 is inside. */
export function decodeMask({ size: [height, width], counts }) {
  const runs = decodeCounts(counts);
  const mask = new Uint8Array(height * width);
  let position = 0;
  runs.forEach((length, number) => {
    if (number % 2) {
      // Runs go down the columns.
      for (let at = position; at < position + length; at++) {
        mask[(at % height) * width + Math.floor(at / height)] = 1;
      }
    }
    position += length;
  });
  return { mask, width, height };
}

// Six bits a character, the lowest first: five of the number and one that says whether it goes on.
// From the third run on, the difference to the run before the last is stored.
function decodeCounts(text) {
  const runs = [];
  for (let at = 0; at < text.length;) {
    let value = 0, shift = 0, code;
    do {
      code = text.charCodeAt(at++) - 48;
      value |= (code & 31) << shift;
      shift += 5;
    } while (code & 32);
    if (code & 16) value |= -1 << shift;
    if (runs.length > 2) value += runs[runs.length - 2];
    runs.push(value);
  }
  return runs;
}

/** Draw a mask in one color: its pixels, or only those on its outline. */
export function maskCanvas({ mask, width, height }, color, { outline = false } = {}) {
  const canvas = new OffscreenCanvas(width, height);
  const context = canvas.getContext("2d");
  const image = context.createImageData(width, height);
  const pixels = new Uint32Array(image.data.buffer);
  const value = packColor(color);
  const reach = outline ? Math.max(1, Math.round(Math.max(width, height) / 250)) : 0;
  for (let y = 0, at = 0; y < height; y++) {
    for (let x = 0; x < width; x++, at++) {
      if (!mask[at]) continue;
      const inside = outline && x >= reach && y >= reach && x + reach < width && y + reach < height
        && mask[at - reach] && mask[at + reach] && mask[at - reach * width] && mask[at + reach * width];
      if (!inside) pixels[at] = value;
    }
  }
  context.putImageData(image, 0, 0);
  return canvas;
}

function packColor(color) {
  const [red, green, blue] = [1, 3, 5].map((at) => parseInt(color.slice(at, at + 2), 16));
  return ((255 << 24) | (blue << 16) | (green << 8) | red) >>> 0;  // little endian
}

/** Draw masks in white on black, as one image of the original size. */
export function binaryCanvas(decoded) {
  const [{ width, height }] = decoded;
  const canvas = new OffscreenCanvas(width, height);
  const context = canvas.getContext("2d");
  context.fillRect(0, 0, width, height);
  for (const each of decoded) context.drawImage(maskCanvas(each, "#ffffff"), 0, 0);
  return canvas;
}

/** Color a gray image of the prior: from transparent black over red to light yellow. */
export function priorCanvas(bitmap) {
  const canvas = new OffscreenCanvas(bitmap.width, bitmap.height);
  const context = canvas.getContext("2d");
  context.drawImage(bitmap, 0, 0);
  const image = context.getImageData(0, 0, bitmap.width, bitmap.height);
  for (let at = 0; at < image.data.length; at += 4) {
    const [red, green, blue] = heat(image.data[at] / 255);
    image.data.set([red, green, blue, 255], at);
  }
  context.putImageData(image, 0, 0);
  return canvas;
}

const HEAT = [[10, 8, 40], [87, 16, 110], [188, 55, 84], [249, 142, 9], [252, 255, 164]];

function heat(value) {
  const at = Math.min(value, 0.9999) * (HEAT.length - 1);
  const [low, high] = [HEAT[Math.floor(at)], HEAT[Math.floor(at) + 1]];
  return low.map((channel, index) => channel + (high[index] - channel) * (at % 1));
}
