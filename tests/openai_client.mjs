// The package openai of npm, as programs use it: node openai_client.mjs BASE_URL PICTURE MASK. What it was answered goes
// to stdout as JSON; tests/test_serve_openai_npm.py judges it.
import { readFile } from "node:fs/promises";
import OpenAI, { toFile } from "openai";

const [baseURL, picture, mask] = process.argv.slice(2);
const client = new OpenAI({ apiKey: "none", baseURL, maxRetries: 0 });
const small = { prompt: "a red circle", size: "32x32", model: "pocket", steps: 1, seed: 7 };
const file = async (path, name) => toFile(await readFile(path), name, { type: "image/png" });
const told = {};

told.models = [];
for await (const model of client.models.list()) told.models.push(model.id);

const { data, response } = await client.images.generate({ ...small, n: 2, style: "vivid" }).withResponse();
told.generated = data.data.map((one) => one.b64_json);
told.ignored = response.headers.get("inkstream-ignored");

const named = await client.images.generate({ ...small, model: "dall-e-3", quality: "standard" });
const fetched = await fetch(named.data[0].url);
told.fetched = [fetched.headers.get("content-type"), Buffer.from(await fetched.arrayBuffer()).toString("base64")];

const edit = { prompt: small.prompt, model: "pocket", steps: 1, seed: 7 };
const edited = await client.images.edit({
  ...edit,
  image: await file(picture, "picture.png"),
  mask: await file(mask, "mask.png"),
});
told.edited = edited.data[0].b64_json;

told.events = [];
const events = await client.images.generate({ ...small, steps: 4, stream: true, partial_images: 1 });
for await (const event of events) told.events.push([event.type, event.b64_json]);
const edits = await client.images.edit({ ...edit, image: [await file(picture, "picture.png")], stream: true });
for await (const event of edits) told.events.push([event.type, event.b64_json]);

told.errors = [];
for (const wrong of [{ size: "100x96" }, { background: "transparent" }, { model: "sdxl" }, { steps: 0 }]) {
  try {
    await client.images.generate({ ...small, ...wrong });
  } catch (error) {
    told.errors.push([error.constructor.name, error.status, error.param, error.code]);
  }
}

const leaving = new AbortController();
setTimeout(() => leaving.abort(), 500);
try {
  await client.images.generate({ ...small, size: "256x256", steps: 50 }, { signal: leaving.signal });
} catch (error) {
  told.left = error.constructor.name;
}

console.log(JSON.stringify(told));
