// Keeps the page's files in the browser, so that it opens without a network, and gives them the two headers under which
// browsers let a page run threads: static hosts do not send them.
//
// The export writes a name into CACHE that changes with the files: then the browser takes this file anew.

const CACHE = "nanochat-{version}";

async function renew() {
  // Other exports may live beside this one, on the same host: only files of this folder are forgotten.
  for (const name of await caches.keys()) {
    if (name === CACHE || !name.startsWith("nanochat-")) continue;
    const old = await caches.open(name);
    for (const request of await old.keys()) if (request.url.startsWith(self.registration.scope)) await old.delete(request);
  }
  await self.clients.claim();
}

function isolated(response) {
  const headers = new Headers(response.headers);
  headers.set("Cross-Origin-Opener-Policy", "same-origin");
  headers.set("Cross-Origin-Embedder-Policy", "require-corp");
  const { status, statusText } = response;
  return new Response(response.body, { status, statusText, headers });
}

async function answer(event) {
  const cache = await caches.open(CACHE);
  const kept = await cache.match(event.request, { ignoreSearch: true });
  if (kept) return isolated(kept);
  const response = await fetch(event.request);
  if (!response.ok || response.type === "opaque") return response;
  // A browser that has no room for the files still shows the page.
  event.waitUntil(cache.put(event.request, response.clone()).catch(() => {}));
  return isolated(response);
}

self.addEventListener("install", () => self.skipWaiting());
self.addEventListener("activate", (event) => event.waitUntil(renew()));
self.addEventListener("fetch", (event) => {
  const { method, headers } = event.request;
  if (method === "GET" && !headers.has("range")) event.respondWith(answer(event));
});
