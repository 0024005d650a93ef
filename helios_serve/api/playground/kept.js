// A session that a reload of the page interrupts, kept in the tab until the page is back. Knows no session and no page.

const KEY = "helios.session";

/** `session`: {id, plan, changes: [[event id, prompt]], position in seconds}. */
export const keep = (session) => sessionStorage.setItem(KEY, JSON.stringify(session));

/** What was kept, once; null when nothing was. */
export function takeKept() {
  const text = sessionStorage.getItem(KEY);
  sessionStorage.removeItem(KEY);
  return text === null ? null : JSON.parse(text);
}
