// Ask the server for what has changed; it has escaped every text in it.
const frame = document.getElementById("frame");
const contact = document.getElementById("contact");
const said = contact.textContent;

async function look() {
  if (!document.hidden) {
    try {
      const answer = await fetch("/frame");
      if (!answer.ok) throw new Error(`status ${answer.status}`);
      const parsed = new DOMParser().parseFromString(await answer.text(), "text/html");
      frame.replaceChildren(...parsed.body.childNodes);
      contact.textContent = said;
    } catch {
      contact.textContent = "The monitor does not answer: it was stopped, or the connection is gone. Trying again.";
    }
  }
  setTimeout(look, Number(frame.dataset.milliseconds));
}

setTimeout(look, Number(frame.dataset.milliseconds));
