// The server's public API, and its errors. The page uses nothing else.

import { recollect } from "./memory.js";

/** What the server refused, in its own words. `status` 0: it did not answer. */
export class Refusal extends Error {
  constructor(status, error = {}) {
    super(error.message ?? `HTTP ${status}`);
    this.status = status;
    this.param = error.param ?? null;
    this.code = error.code ?? null;
  }
}

let needKey = null;

/** Say what is to be done where the server wants a key: an async function that resolves once there is one. */
export function onNeedKey(ask) {
  needKey = ask;
}

/** Headers that say who asks. */
export function identity(key = recollect("key")) {
  return key ? { Authorization: `Bearer ${key}` } : {};
}

/**
 * The answer's JSON (null where it has none). body: a plain value goes as JSON, a Blob as it is. Throws Refusal; where
 * the server wants a key, it is asked for, and the call is made again.
 */
export async function ask(method, path, body = undefined, headers = {}) {
  const plain = body !== undefined && !(body instanceof Blob);
  let answer;
  try {
    answer = await fetch(path, {
      method,
      body: plain ? JSON.stringify(body) : body,
      headers: { ...(plain ? { "Content-Type": "application/json" } : {}), ...identity(), ...headers },
    });
  } catch {
    throw new Refusal(0);
  }
  const json = (answer.headers.get("content-type") ?? "").startsWith("application/json");
  const content = json ? await answer.json() : null;
  if (answer.ok) return content;
  if (answer.status === 401 && needKey) {
    await needKey();
    return ask(method, path, body, headers);
  }
  throw new Refusal(answer.status, content?.error);
}

export const get = (path) => ask("GET", path);
export const post = (path, body, headers) => ask("POST", path, body, headers);
export const patch = (path, body) => ask("PATCH", path, body);
export const remove = (path) => ask("DELETE", path);

/** A path with a query; values that are null, false or empty are left out. */
export function withQuery(path, values) {
  const query = new URLSearchParams();
  for (const [name, value] of Object.entries(values)) {
    if (value !== null && value !== undefined && value !== "" && value !== false) query.set(name, String(value));
  }
  return query.size ? `${path}?${query}` : path;
}

/** Bytes of a picture of this server, as a Blob. */
export async function bytes(path) {
  const answer = await fetch(path, { headers: identity() });
  if (!answer.ok) throw new Refusal(answer.status, (await answer.json()).error);
  return answer.blob();
}
