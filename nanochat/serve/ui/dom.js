// Small helpers to build the document. Whatever a model or a person wrote goes in as text, never as HTML.

export const byId = (id) => document.getElementById(id);

export function element(tag, className, ...children) {
  const node = document.createElement(tag);
  if (className) node.className = className;
  node.append(...children.filter((child) => child !== undefined && child !== null));
  return node;
}

export function icon(name) {
  const space = "http://www.w3.org/2000/svg";
  const svg = document.createElementNS(space, "svg");
  svg.setAttribute("aria-hidden", "true");
  const use = svg.appendChild(document.createElementNS(space, "use"));
  use.setAttribute("href", `#i-${name}`);
  return svg;
}

// A button that shows an icon and is called `label`.
export function iconButton(name, label, action) {
  const node = element("button", "icon", icon(name));
  node.type = "button";
  node.title = label;
  node.setAttribute("aria-label", label);
  node.addEventListener("click", action);
  return node;
}

export function textButton(label, className, action) {
  const node = element("button", className, label);
  node.type = "button";
  node.addEventListener("click", action);
  return node;
}

// Copies a text; the button shows a tick for a moment, screen readers hear "Copied".
export async function copyText(text, button) {
  try {
    await navigator.clipboard.writeText(text);
  } catch {
    // Without HTTPS browsers forbid the above; this old way still works.
    const area = element("textarea", "visually-hidden");
    area.value = text;
    document.body.append(area);
    area.select();
    const copied = document.execCommand("copy");
    area.remove();
    if (!copied) {
      announce("The browser does not allow copying here");
      return;
    }
  }
  announce("Copied");
  const use = button.querySelector("use");
  use.setAttribute("href", "#i-check");
  setTimeout(() => use.setAttribute("href", "#i-copy"), 1500);
}

export function announce(text) {
  byId("status").textContent = text;
}

// A text box cuts what is longer than it may hold: says so while it happens, nobody should learn it from the answer.
export function tellCuts(box) {
  const said = byId("cut");
  box.addEventListener("beforeinput", (event) => {
    said.hidden = true;
    if (!["insertFromPaste", "insertFromDrop", "insertReplacementText"].includes(event.inputType)) return;
    const text = (event.data ?? event.dataTransfer?.getData("text/plain") ?? "").replace(/\r\n?/g, "\n");
    const over = box.value.length - (box.selectionEnd - box.selectionStart) + text.length - box.maxLength;
    if (over <= 0) return;
    said.textContent = `The text is too long and was cut: a message may have ${box.maxLength.toLocaleString("en")} characters, the last ${over.toLocaleString("en")} are left out.`;
    said.hidden = false;
  });
}
