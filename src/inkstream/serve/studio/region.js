// What the server repaints: the mask after its options, computed as the server does (engine/pictures/regions.py).

const WHITE = 128; // from this grey on, a pixel of a mask that is not soft is white
const CELL = 8; // pixels over which a soft mask's result fades in

/**
 * Return the repainted share of each pixel, {width, height, shares}, from 0 to 255. The result has the extended size.
 *
 * options: invert, soft, grow, blur, and extend {left, top, right, bottom}, in pixels of the mask.
 */
export function regionOf(mask, { invert = false, soft = false, grow = 0, blur = 0, extend = null }) {
  let bytes = byTable(mask.bytes, (value) => {
    if (!soft) return value >= WHITE !== invert ? 255 : 0;
    return invert ? 255 - value : value;
  });
  let size = { width: mask.width, height: mask.height };
  if (grow < 0) bytes = flipped(grown(flipped(bytes), size, -grow));
  if (extend) [bytes, size] = extended(bytes, size, extend);
  if (grow > 0) bytes = grown(bytes, size, grow);
  const shares = faded(bytes, size, soft ? Math.min(blur, CELL) : blur);
  if (soft) {
    const strengths = blur > CELL ? faded(bytes, size, blur) : shares;
    for (let i = 0; i < shares.length; i += 1) shares[i] = (Math.min(shares[i], strengths[i]) * bytes[i]) / 255;
  }
  return { ...size, shares };
}

/** Return bytes with each value replaced. */
function byTable(bytes, replace) {
  const table = Uint8Array.from({ length: 256 }, (_, value) => replace(value));
  const into = new Uint8Array(bytes.length);
  for (let i = 0; i < bytes.length; i += 1) into[i] = table[bytes[i]];
  return into;
}

const flipped = (bytes) => byTable(bytes, (value) => 255 - value);

/** Return a mask with white space around it, and the new size. */
function extended(bytes, { width, height }, { left, top, right, bottom }) {
  const size = { width: left + width + right, height: top + height + bottom };
  const whole = new Uint8Array(size.width * size.height).fill(255);
  for (let y = 0; y < height; y += 1)
    whole.set(bytes.subarray(y * width, (y + 1) * width), (y + top) * size.width + left);
  return [whole, size];
}

/** Return the brightest value within some pixels of each pixel, in a square. Beyond the edges all is black. */
function grown(bytes, { width, height }, pixels) {
  let from = bytes;
  for (const [lines, length, line, next] of [
    [height, width, width, 1],
    [width, height, 1, width],
  ]) {
    const into = new Uint8Array(from.length);
    const queue = new Int32Array(length); // indexes of a line, with falling values
    for (let i = 0; i < lines; i += 1) {
      const start = i * line;
      let [first, end] = [0, 0];
      for (let x = 0; x < length + pixels; x += 1) {
        if (x < length) {
          const value = from[start + x * next];
          while (end > first && from[start + queue[end - 1] * next] <= value) end -= 1;
          queue[end] = x;
          end += 1;
        }
        const middle = x - pixels;
        if (middle < 0) continue;
        while (queue[first] < middle - pixels) first += 1;
        into[start + middle * next] = from[start + queue[first] * next];
      }
    }
    from = into;
  }
  return from;
}

/** Return shares that rise from 0 at the edge of what is not black to 255, `pixels` inside of it. */
function faded(bytes, { width, height }, pixels) {
  const most = pixels + 1;
  const depth = new Uint16Array(bytes.length);
  for (let i = 0; i < bytes.length; i += 1) if (bytes[i]) depth[i] = most;
  for (let y = 0; y < height; y += 1) {
    const end = (y + 1) * width;
    for (let i = y * width; i < end; i += 1) {
      let least = depth[i];
      if (!least) continue;
      if (y) {
        const above = i - width;
        if (depth[above] + 1 < least) least = depth[above] + 1;
        if (i + 1 < end && depth[above + 1] + 1 < least) least = depth[above + 1] + 1;
        if (i > end - width && depth[above - 1] + 1 < least) least = depth[above - 1] + 1;
      }
      if (i > end - width && depth[i - 1] + 1 < least) least = depth[i - 1] + 1;
      depth[i] = least;
    }
  }
  let deepest = 1;
  for (let y = height - 1; y >= 0; y -= 1) {
    const start = y * width;
    for (let i = start + width - 1; i >= start; i -= 1) {
      let least = depth[i];
      if (!least) continue;
      if (y < height - 1) {
        const below = i + width;
        if (depth[below] + 1 < least) least = depth[below] + 1;
        if (i > start && depth[below - 1] + 1 < least) least = depth[below - 1] + 1;
        if (i < start + width - 1 && depth[below + 1] + 1 < least) least = depth[below + 1] + 1;
      }
      if (i < start + width - 1 && depth[i + 1] + 1 < least) least = depth[i + 1] + 1;
      depth[i] = least;
      if (least > deepest) deepest = least;
    }
  }
  const table = Uint8Array.from({ length: most + 1 }, (_, value) => Math.round((255 * value) / deepest));
  const shares = new Uint8Array(bytes.length);
  for (let i = 0; i < bytes.length; i += 1) if (depth[i]) shares[i] = table[depth[i]];
  return shares;
}
