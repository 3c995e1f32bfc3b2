// What the pages do beyond the theme. No request leaves the page.
(function () {
  "use strict";

  function ready(run) {
    if (document.readyState === "loading") document.addEventListener("DOMContentLoaded", run);
    else run();
  }

  // On a narrow screen the machine drawing scrolls inside its frame: show the lit part first.
  function showLitPart() {
    document.querySelectorAll(".machine-frame").forEach(function (frame) {
      const lit = frame.querySelector("svg")?.dataset.lit;
      if (lit && frame.scrollWidth > frame.clientWidth) {
        frame.scrollLeft = Number(lit) * frame.scrollWidth - frame.clientWidth / 2;
      }
    });
  }

  // A box that scrolls sideways must be reachable by keyboard, and only then be a stop.
  function reachScrollingBoxes() {
    const boxes = "div.math, .pst-scrollable-table-container, .bd-article pre";
    document.querySelectorAll(boxes).forEach(function (box) {
      if (box.scrollWidth > box.clientWidth + 1) box.setAttribute("tabindex", "0");
    });
  }

  // On paper every folded solution is open.
  let opened = [];
  window.addEventListener("beforeprint", function () {
    opened = Array.from(document.querySelectorAll("details:not([open])"));
    opened.forEach(function (part) { part.open = true; });
  });
  window.addEventListener("afterprint", function () {
    opened.forEach(function (part) { part.open = false; });
  });

  ready(function () {
    showLitPart();
    reachScrollingBoxes();
    window.addEventListener("resize", reachScrollingBoxes);
  });
  window.addEventListener("load", reachScrollingBoxes);
})();
