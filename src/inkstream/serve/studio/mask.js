// A mask in memory: bytes from 0 (kept) to 255 (repainted), row by row. Shapes are drawn into it without smoothing.

/** Return a black mask of width * height. */
export const blank = (width, height) => ({ width, height, bytes: new Uint8Array(width * height) });

/** Return the box {left, top, right, bottom} that holds two boxes. Right and bottom are exclusive. */
export const joined = (a, b) =>
  a && b
    ? {
        left: Math.min(a.left, b.left),
        top: Math.min(a.top, b.top),
        right: Math.max(a.right, b.right),
        bottom: Math.max(a.bottom, b.bottom),
      }
    : (a ?? b);

/** Return a box in whole pixels inside a mask, or null if nothing of it is inside. */
function inside({ width, height }, left, top, right, bottom) {
  const box = {
    left: Math.max(0, Math.floor(left)),
    top: Math.max(0, Math.floor(top)),
    right: Math.min(width, Math.ceil(right)),
    bottom: Math.min(height, Math.ceil(bottom)),
  };
  return box.left < box.right && box.top < box.bottom ? box : null;
}

/** Fill a row from x to end (exclusive) where the middle of a pixel is between them. */
function fillRow(mask, y, from, to, value) {
  const first = Math.max(0, Math.ceil(from - 0.5));
  const end = Math.min(mask.width, Math.floor(to - 0.5) + 1);
  if (first < end) mask.bytes.fill(value, y * mask.width + first, y * mask.width + end);
}

/** Draw a line with round ends. a, b: {x, y, radius}. Returns the changed box. */
export function drawLine(mask, a, b, value) {
  const most = Math.max(a.radius, b.radius);
  const box = inside(
    mask,
    Math.min(a.x, b.x) - most,
    Math.min(a.y, b.y) - most,
    Math.max(a.x, b.x) + most,
    Math.max(a.y, b.y) + most,
  );
  if (!box) return null;
  const long = Math.hypot(b.x - a.x, b.y - a.y);
  const discs = Math.max(1, Math.ceil(long / Math.max(0.5, Math.min(a.radius, b.radius) / 8)));
  const reach = new Float64Array(2 * (box.bottom - box.top)).fill(Infinity); // of each row: its left and right end
  for (let i = 0; i <= discs; i += 1) {
    const part = i / discs;
    const [x, y, radius] = [a.x + (b.x - a.x) * part, a.y + (b.y - a.y) * part, a.radius + (b.radius - a.radius) * part];
    const last = Math.min(box.bottom - 1, Math.floor(y + radius - 0.5));
    for (let row = Math.max(box.top, Math.ceil(y - radius - 0.5)); row <= last; row += 1) {
      const half = Math.sqrt(Math.max(0, radius ** 2 - (row + 0.5 - y) ** 2));
      const at = 2 * (row - box.top);
      reach[at] = Math.min(reach[at], x - half);
      reach[at + 1] = Math.min(reach[at + 1], -(x + half));
    }
  }
  for (let row = box.top; row < box.bottom; row += 1) {
    const at = 2 * (row - box.top);
    if (reach[at] < Infinity) fillRow(mask, row, reach[at], -reach[at + 1], value);
  }
  if (most <= 0.5) fillRow(mask, Math.floor(b.y), Math.floor(b.x), Math.floor(b.x) + 1, value); // at least a pixel
  return box;
}

/** Fill a polygon, by the even-odd rule. points: [{x, y}]. Returns the changed box. */
export function drawPolygon(mask, points, value) {
  const xs = points.map(({ x }) => x);
  const ys = points.map(({ y }) => y);
  const box = inside(mask, Math.min(...xs), Math.min(...ys), Math.max(...xs), Math.max(...ys));
  if (!box) return null;
  for (let row = box.top; row < box.bottom; row += 1) {
    const y = row + 0.5;
    const crossings = [];
    points.forEach((a, i) => {
      const b = points[(i + 1) % points.length];
      if (a.y <= y !== b.y <= y) crossings.push(a.x + ((y - a.y) / (b.y - a.y)) * (b.x - a.x));
    });
    crossings.sort((one, other) => one - other);
    for (let i = 0; i + 1 < crossings.length; i += 2) fillRow(mask, row, crossings[i], crossings[i + 1], value);
  }
  return box;
}

/** Fill the rectangle between two corners. Returns the changed box. */
export function drawBox(mask, a, b, value) {
  const box = inside(mask, Math.min(a.x, b.x), Math.min(a.y, b.y), Math.max(a.x, b.x), Math.max(a.y, b.y));
  if (!box) return null;
  for (let row = box.top; row < box.bottom; row += 1)
    mask.bytes.fill(value, row * mask.width + box.left, row * mask.width + box.right);
  return box;
}

/** Replace each value by 255 minus it. Returns the changed box. */
export function invert(mask) {
  for (let i = 0; i < mask.bytes.length; i += 1) mask.bytes[i] = 255 - mask.bytes[i];
  return { left: 0, top: 0, right: mask.width, bottom: mask.height };
}

/** Return the part of all pixels that is white or grey, from 0 to 1. */
export function shareOf(mask) {
  let count = 0;
  for (const value of mask.bytes) if (value) count += 1;
  return count / mask.bytes.length;
}

/** Return a copy of a box of a mask, as runs of equal values: [value, length, ...]. */
export function copyBox(mask, box) {
  const runs = [];
  let [value, length] = [-1, 0];
  for (let row = box.top; row < box.bottom; row += 1) {
    for (let i = row * mask.width + box.left; i < row * mask.width + box.right; i += 1) {
      if (mask.bytes[i] === value) length += 1;
      else {
        if (length) runs.push(value, length);
        [value, length] = [mask.bytes[i], 1];
      }
    }
  }
  runs.push(value, length);
  return Uint32Array.from(runs);
}

/** Put a copy of a box back. */
export function pasteBox(mask, box, runs) {
  let [at, left] = [0, runs[1]];
  for (let row = box.top; row < box.bottom; row += 1) {
    let i = row * mask.width + box.left;
    const end = row * mask.width + box.right;
    while (i < end) {
      const length = Math.min(left, end - i);
      mask.bytes.fill(runs[at], i, i + length);
      i += length;
      left -= length;
      if (!left) left = runs[(at += 2) + 1];
    }
  }
}
