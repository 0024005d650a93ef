// Small helpers for the page: elements, icons and numbers as text. Knows nothing of videos.

export const byId = (id) => document.getElementById(id);

/** Makes an element; `attributes` are set as attributes, except functions, which become listeners ("click"). */
export function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (typeof value === "function") element.addEventListener(name, value);
    else if (value === true) element.setAttribute(name, "");
    else if (value !== false && value !== null) element.setAttribute(name, value);
  }
  element.append(...children);
  return element;
}

const SVG = "http://www.w3.org/2000/svg";

export function icon(name) {
  const svg = document.createElementNS(SVG, "svg");
  svg.setAttribute("aria-hidden", "true");
  const use = document.createElementNS(SVG, "use");
  use.setAttribute("href", `#i-${name}`);
  svg.append(use);
  return svg;
}

export function setIcon(button, name, label) {
  if (button.dataset.icon === name) return;
  button.dataset.icon = name;
  button.replaceChildren(icon(name));
  button.setAttribute("aria-label", label);
}

/** Shows `text` in `element`, or hides it when there is none. */
export function show(element, text) {
  element.textContent = text ?? "";
  element.hidden = !text;
}

export const seconds = (value) => `${value.toFixed(1)} s`;

export const plural = (count, noun) => `${count} ${noun}${count === 1 ? "" : "s"}`;

/** "just now", "4 min ago", "3 h ago", else the date; `unix` in seconds. */
export function ago(unix) {
  const minutes = Math.floor((Date.now() / 1000 - unix) / 60);
  if (minutes < 1) return "just now";
  if (minutes < 60) return `${minutes} min ago`;
  if (minutes < 24 * 60) return `${Math.floor(minutes / 60)} h ago`;
  return new Date(unix * 1000).toLocaleDateString(undefined, { day: "numeric", month: "short" });
}
