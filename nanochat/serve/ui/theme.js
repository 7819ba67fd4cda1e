// Light or dark, before anything is drawn: the button's choice, else the system's.
"use strict";

(() => {
  const systemDark = window.matchMedia("(prefers-color-scheme: dark)");

  function show() {
    let chosen = null; // or whatever else is in the storage
    try {
      chosen = localStorage.getItem("nanochat.theme");
    } catch {
      // storage may be forbidden
    }
    document.documentElement.dataset.theme = ["light", "dark"].includes(chosen) ? chosen : (systemDark.matches ? "dark" : "light");
  }

  systemDark.addEventListener("change", show);
  show();
})();
