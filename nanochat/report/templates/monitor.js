// Takes what is new into the page every few seconds, in place: readers stay where they are.
"use strict";

setInterval(async () => {
  const main = document.querySelector("main");
  if (main.contains(document.activeElement)) return; // somebody is reading with the keyboard
  try {
    const fresh = new DOMParser().parseFromString(await (await fetch(location.href)).text(), "text/html");
    document.querySelector("header").replaceWith(fresh.querySelector("header"));
    main.replaceWith(fresh.querySelector("main"));
  } catch {
    // The monitor has ended, for now.
  }
}, 1000 * Number(document.body.dataset.seconds));
