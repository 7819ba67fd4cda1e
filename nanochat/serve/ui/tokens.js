// The learner's window: an answer as the tokens it was written in, with the probability of each and of its rivals.

import { announce, byId, element } from "./dom.js";

export const ALTERNATIVES = 5; // what the server is asked for

// By message: [{token, logprob, top_logprobs}], and {chip} for what the calculator was asked and has answered. Not in the
// storage of the browser, where it would soon take all the room.
const known = new WeakMap();

// Keeps what an event of the stream tells about tokens.
export function remember(message, { logprobs = [], python, python_output }) {
  const chips = [python, python_output].filter((text) => text !== undefined).map((chip) => ({ chip }));
  if (logprobs.length + chips.length && !known.has(message)) known.set(message, []);
  known.get(message)?.push(...logprobs, ...chips);
}

export function tokensOf(message) {
  const tokens = known.get(message) ?? [];
  return tokens.some((token) => !token.chip) ? tokens : []; // a server may know none
}

const percent = (logprob) => {
  const p = 100 * Math.exp(logprob);
  return p >= 10 ? `${p.toFixed(0)} %` : p >= 0.1 ? `${p.toFixed(1)} %` : "< 0.1 %";
};
// 0: nearly certain; 4: a surprise.
const surprise = (logprob) => [0.9, 0.5, 0.2, 0.05].filter((limit) => Math.exp(logprob) < limit).length;
const visible = (text) => text.replaceAll("\n", "↵").replaceAll("\t", "⇥").replace(/^ | $/g, "␣") || "(nothing)";

function row(text, logprob, chosen) {
  const bar = element("span", "bar");
  bar.style.width = `${100 * Math.exp(logprob)}%`;
  const name = element("td", "", element("code", "", visible(text)));
  return element("tr", chosen ? "chosen" : "", name, element("td", "track", bar), element("td", "end", percent(logprob)));
}

// Shows the token and what else might have stood there, near `node`.
function peek(node, { token, logprob, top_logprobs: rivals }) {
  const box = byId("peek");
  const others = (rivals ?? []).filter((rival) => rival.token !== token);
  const rows = [...others.map((rival) => [rival.token, rival.logprob, false]), [token, logprob, true]];
  rows.sort((a, b) => b[1] - a[1]);
  const rest = 1 - rows.reduce((sum, [, value]) => sum + Math.exp(value), 0);
  const table = element("table", "", element("tbody", "", ...rows.map((values) => row(...values))));
  const note = rest > 0.0005 ? element("p", "", `${percent(Math.log(rest))} for all other tokens`) : null;
  box.replaceChildren(table, ...(note ? [note] : []));
  box.hidden = false;
  const at = node.getClientRects()[0] ?? node.getBoundingClientRect();
  const { width, height } = box.getBoundingClientRect();
  const above = at.top - height - 6;
  box.style.left = `${Math.max(8, Math.min(at.left, innerWidth - width - 8))}px`;
  box.style.top = `${above > 8 ? above : at.bottom + 6}px`;
}

function hide() {
  byId("peek").hidden = true;
}

// The tokens of a message. With the mouse, or with the arrow keys, one is looked at.
export function tokenView(message) {
  const tokens = tokensOf(message);
  const nodes = tokens.map(({ token, logprob, chip }) =>
    chip ? element("span", "chip", element("code", "", chip)) : element("span", `token s${surprise(logprob)}`, token.replaceAll("\n", "↵\n")),
  );
  const view = element("div", "tokens", ...nodes);
  let current = -1;
  const look = (index) => {
    nodes[current]?.classList.remove("looked-at");
    current = index;
    if (!nodes[current] || tokens[current].chip) return hide();
    nodes[current].classList.add("looked-at");
    return peek(nodes[current], tokens[current]);
  };
  view.tabIndex = 0;
  view.setAttribute("role", "group");
  view.setAttribute("aria-label", "Tokens of the answer: the arrow keys go from one to the next");
  view.addEventListener("pointerover", (event) => look(nodes.indexOf(event.target)));
  // A finger leaves as soon as it has tapped: what it has tapped stays, until it taps elsewhere.
  view.addEventListener("pointerleave", (event) => event.pointerType !== "touch" && look(-1));
  view.addEventListener("blur", () => look(-1));
  view.addEventListener("keydown", (event) => {
    const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (event.key === "Escape") look(-1);
    if (!step) return undefined;
    event.preventDefault();
    look(Math.max(0, Math.min(nodes.length - 1, current + step)));
    nodes[current].scrollIntoView({ block: "nearest" });
    const { token, logprob, chip, top_logprobs: rivals } = tokens[current];
    if (chip) return announce(chip);
    const others = (rivals ?? []).filter((rival) => rival.token !== token).slice(0, 2);
    const said = others.map((rival) => `${visible(rival.token)} ${percent(rival.logprob)}`);
    return announce([`${visible(token)} ${percent(logprob)}`, ...said].join(", "));
  });
  return view;
}

byId("log").addEventListener("scroll", hide);
document.addEventListener("pointerdown", (event) => event.target.closest(".token") ?? hide());
