// Calls of the server's public API, and their errors. The page uses no other API.

import { recollect } from "./memory.js";

/** An error of the server, with the server's message. `status` is 0 if the server did not answer. */
export class Refusal extends Error {
  constructor(status, error = {}) {
    super(error.message ?? `HTTP ${status}`);
    this.status = status;
    this.param = error.param ?? null;
    this.code = error.code ?? null;
  }
}

let needKey = null;

/** Set the function that asks for a key. It is called if the server wants a key, and resolves once a key is set. */
export function onNeedKey(ask) {
  needKey = ask;
}

/** The headers of authentication. */
export function identity(key = recollect("key")) {
  return key ? { Authorization: `Bearer ${key}` } : {};
}

/**
 * Call the API and return the answer's JSON, or null if the answer is not JSON. body: a Blob is sent as it is, another
 * value as JSON. Throws Refusal. If the server wants a key, the user is asked for one, and the call is retried.
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

/** Return a path with a query. Values that are null, false or empty are left out. */
export function withQuery(path, values) {
  const query = new URLSearchParams();
  for (const [name, value] of Object.entries(values)) {
    if (value !== null && value !== undefined && value !== "" && value !== false) query.set(name, String(value));
  }
  return query.size ? `${path}?${query}` : path;
}

/** Fetch a picture of this server as a Blob. */
export async function bytes(path) {
  const answer = await fetch(path, { headers: identity() });
  if (!answer.ok) throw new Refusal(answer.status, (await answer.json()).error);
  return answer.blob();
}
