// What a page owes to those who do not see it well, or not at all: contrast, names, landmarks, sizes of targets.
// Evaluated in the page; gives a list of complaints, a line each.

() => {
  const complaints = [];
  const complain = (what, element) => complaints.push(`${what}: ${element.outerHTML.slice(0, 120)}`);
  const modal = document.querySelector("dialog[open]");
  const root = modal ?? document.body;
  const visible = (element) =>
    element.checkVisibility({ opacityProperty: true, visibilityProperty: true }) && !element.closest(".unseen");
  const all = (selector) => [...root.querySelectorAll(selector)].filter(visible);

  // Contrast, WCAG 2.2, 1.4.3 and 1.4.11
  const parse = (color) => {
    const [r, g, b, a = 1] = color.match(/[\d.]+/g).map(Number);
    return color.startsWith("color(") ? [r * 255, g * 255, b * 255, a] : [r, g, b, a];
  };
  const over = (top, under) => [0, 1, 2].map((i) => top[i] * top[3] + under[i] * (1 - top[3])).concat(1);
  const behind = (element) => {
    const layers = [];
    for (let at = element; at; at = at.parentElement) {
      const color = parse(getComputedStyle(at).backgroundColor);
      if (color[3] > 0) layers.push(color);
      if (color[3] === 1) break;
    }
    return layers.reverse().reduce((under, top) => over(top, under), [255, 255, 255, 1]);
  };
  const light = (color) => {
    const [r, g, b] = color.map((value) =>
      value / 255 <= 0.04045 ? value / 255 / 12.92 : ((value / 255 + 0.055) / 1.055) ** 2.4,
    );
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const contrast = (a, b) => {
    const [dark, bright] = [light(a), light(b)].sort((x, y) => x - y);
    return (bright + 0.05) / (dark + 0.05);
  };
  const texts = all("*").filter((element) =>
    [...element.childNodes].some((node) => node.nodeType === 3 && node.data.trim()),
  );
  for (const element of [...texts, ...all("input, select, textarea"), ...all("svg.icon")]) {
    if (element.closest(":disabled, option, [aria-hidden=true]:not(svg)")) continue;
    const style = getComputedStyle(element);
    const big = parseFloat(style.fontSize) >= 24 || element.matches("svg");
    const ground = behind(element);
    const ratio = contrast(over(parse(style.color), ground), ground);
    if (ratio < (big ? 3 : 4.5)) complain(`contrast ${ratio.toFixed(2)}`, element);
  }

  // Names
  const textOf = (ids) =>
    ids
      .split(/\s+/)
      .map((id) => document.getElementById(id)?.textContent ?? "")
      .join(" ");
  const nameOf = (element) =>
    (element.getAttribute("aria-label") ?? "") ||
    (element.hasAttribute("aria-labelledby") ? textOf(element.getAttribute("aria-labelledby")) : "") ||
    [...(element.labels ?? [])].map((label) => label.textContent).join(" ") ||
    (element.matches("input, select, textarea") ? "" : element.textContent) ||
    [...element.querySelectorAll("img")].map((image) => image.alt).join(" ");
  const interactive =
    "button, a[href], input, select, textarea, summary, [role=button], [tabindex='0'], dialog, section, nav, progress";
  for (const element of all(interactive)) if (!nameOf(element).trim()) complain("no name", element);
  for (const image of all("img")) if (!image.hasAttribute("alt")) complain("no alt", image);

  // Structure
  const ids = [...document.querySelectorAll("[id]")].map((element) => element.id);
  for (const id of ids.filter((one, i) => ids.indexOf(one) !== i)) complaints.push(`id ${id} stands twice`);
  for (const name of ["aria-labelledby", "aria-describedby", "aria-controls", "for"]) {
    for (const element of root.querySelectorAll(`[${name}]`)) {
      for (const id of element.getAttribute(name).split(/\s+/))
        if (!document.getElementById(id)) complain(`${name} ${id} leads nowhere`, element);
    }
  }
  if (!document.documentElement.lang) complaints.push("the page has no language");
  if (!document.title) complaints.push("the page has no title");
  for (const [tag, count] of [
    ["main", 1],
    ["h1", 1],
    ["body > header", 1],
  ]) {
    if (document.querySelectorAll(tag).length !== count) complaints.push(`not one ${tag}`);
  }
  for (const element of root.querySelectorAll(
    "button button, a button, button a, label label, [role=listitem][tabindex]",
  ))
    complain("nested", element);
  for (const element of root.querySelectorAll("[tabindex]"))
    if (element.tabIndex > 0) complain("positive tabindex", element);

  // Targets, WCAG 2.2, 2.5.8
  for (const element of all("button, a[href], input, select, summary")) {
    const box = element.getBoundingClientRect();
    const label = element.closest("label")?.getBoundingClientRect() ?? box;
    const height = Math.max(box.height, label.height);
    if (box.width && (height < 20 || Math.max(box.width, label.width) < 20))
      complain(`target ${Math.round(box.width)} x ${Math.round(height)}`, element);
  }
  if (root.scrollWidth > innerWidth + 1) complaints.push(`wider than the window: ${root.scrollWidth}`);
  return complaints;
};
