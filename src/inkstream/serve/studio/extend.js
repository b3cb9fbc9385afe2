// New space around a picture: the text of the field `extend`, and the pixels on each side.

export const SIDES = ["left", "top", "right", "bottom"];
export const MOST = 4096; // pixels on a side

/** Parts of the new space that are left of the picture and above it, by the anchor of a whole size. */
const ANCHORS = {
  center: [0.5, 0.5],
  left: [0, 0.5],
  right: [1, 0.5],
  top: [0.5, 0],
  bottom: [0.5, 1],
  "top-left": [0, 0],
  "top-right": [1, 0],
  "bottom-left": [0, 1],
  "bottom-right": [1, 1],
};

/** Return the new pixels {left, top, right, bottom} of a text such as left=128,right=64 or 1024x768@center. */
export function readExtend(text, { width, height }) {
  const sides = { left: 0, top: 0, right: 0, bottom: 0 };
  const whole = /^\s*(\d+)x(\d+)(?:@([a-z-]+))?\s*$/.exec(text ?? "");
  if (whole) {
    const [across, down] = [Math.max(0, whole[1] - width), Math.max(0, whole[2] - height)];
    const [x, y] = ANCHORS[whole[3] ?? "center"] ?? ANCHORS.center;
    sides.left = even(across * x);
    sides.top = even(down * y);
    return { ...sides, right: across - sides.left, bottom: down - sides.top };
  }
  for (const part of (text ?? "").split(",")) {
    const [name, pixels] = part.split("=").map((piece) => piece.trim());
    if (SIDES.includes(name) && /^\d+$/.test(pixels ?? "")) sides[name] = Math.min(MOST, Number(pixels));
  }
  return sides;
}

/** Return the text of new pixels, or null if there are none. */
export function writeExtend(sides) {
  const parts = SIDES.filter((name) => sides[name] > 0).map((name) => `${name}=${sides[name]}`);
  return parts.length ? parts.join(",") : null;
}

/** Round as the server does: a half to the even number. */
const even = (value) => (value % 1 === 0.5 ? 2 * Math.round(value / 2) : Math.round(value));
