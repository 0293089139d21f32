"use strict";
// Values under the pointer, sortable tables, search in cards. The page is complete without any of it.
(function () {
  const minus = (text) => text.replace("-", "\u2212");

  function show(value) {
    if (Number.isInteger(value)) return minus(value.toLocaleString("en-US"));
    return minus(String(Number(value.toPrecision(4))));
  }

  function warp(axis, value) {
    if (axis.k === "log") return Math.log10(Math.max(value, 1e-300));
    if (axis.k === "symlog") return Math.sign(value) * Math.log10(1 + Math.abs(value) / axis.u);
    return value;
  }

  function place(axis, value) {
    const low = warp(axis, axis.d[0]), high = warp(axis, axis.d[1]);
    const share = high === low ? 0.5 : (warp(axis, value) - low) / (high - low);
    return axis.r[0] + share * (axis.r[1] - axis.r[0]);
  }

  function points(data) {
    const found = [];
    for (const series of data.s) {
      series.x.forEach((x, i) => {
        const y = series.y[i];
        if (x === null || y === null) return;
        found.push([place(data.x, x), place(data.y, y), series, i]);
      });
    }
    return found;
  }

  function hover(figure) {
    const data = JSON.parse(figure.querySelector(":scope > script.hover").textContent);
    const svg = figure.querySelector(":scope > .drawing svg"), out = figure.querySelector(":scope > .readout");
    const ring = svg.appendChild(document.createElementNS(svg.namespaceURI, "circle"));
    ring.setAttribute("class", "cursor");
    ring.setAttribute("r", "6");
    ring.setAttribute("visibility", "hidden");
    let known = null, target = null;
    svg.addEventListener("pointermove", (event) => {
      known = known || points(data);
      const box = svg.getBoundingClientRect(), view = svg.viewBox.baseVal;
      const px = (event.clientX - box.left) * view.width / box.width;
      const py = (event.clientY - box.top) * view.height / box.height;
      let best = null, least = 60 * 60;
      for (const point of known) {
        const far = (point[0] - px) ** 2 + (point[1] - py) ** 2;
        if (far < least) { least = far; best = point; }
      }
      ring.setAttribute("visibility", best ? "visible" : "hidden");
      if (!best) { out.textContent = ""; target = null; return; }
      ring.setAttribute("cx", best[0]);
      ring.setAttribute("cy", best[1]);
      const series = best[2], i = best[3];
      target = series.h ? document.getElementById(series.h + series.i[i]) : null;
      svg.classList.toggle("leads", Boolean(target));
      const id = series.i ? " " + series.l + " " + show(series.i[i]) : "";
      out.textContent = series.n + id + ": " + data.x.n + " " + show(series.x[i]) + ", " + data.y.n + " " + show(series.y[i]) +
        (target ? " \u2013 a click opens its card" : "");
    });
    svg.addEventListener("click", () => { if (target) location.hash = target.id; });
    svg.addEventListener("pointerleave", () => {
      ring.setAttribute("visibility", "hidden");
      out.textContent = "";
    });
  }

  function key(row, column) {
    const cell = row.cells[column], data = cell.querySelector("data");
    return data ? Number(data.value) : cell.textContent.trim();
  }

  function compare(a, b) {
    if (typeof a === "number" && typeof b === "number") return a - b;
    if (typeof a === "number") return -1;
    if (typeof b === "number") return 1;
    return a < b ? -1 : a > b ? 1 : 0;
  }

  function sortable(table) {
    const heads = Array.from(table.tHead.rows[0].cells), body = table.tBodies[0];
    heads.forEach((head, column) => {
      const button = document.createElement("button");
      button.type = "button";
      button.append(...head.childNodes);
      head.append(button);
      button.addEventListener("click", () => {
        const down = head.getAttribute("aria-sort") === "ascending";
        heads.forEach((other) => other.removeAttribute("aria-sort"));
        head.setAttribute("aria-sort", down ? "descending" : "ascending");
        const rows = Array.from(body.rows).map((row) => [key(row, column), row]);
        rows.sort((a, b) => (down ? -1 : 1) * compare(a[0], b[0]));
        body.append(...rows.map((pair) => pair[1]));
      });
    });
  }

  // Numbers match whole: "latent 12" finds no latent 120. Everything else matches as part of the text.
  function matcher(wanted) {
    const words = wanted.toLowerCase().split(/\s+/).filter(Boolean);
    const tests = words.map((word) => /^\d+$/.test(word)
      ? (text) => new RegExp("(^|[^0-9.])" + word + "($|[^0-9.])").test(text)
      : (text) => text.includes(word));
    return (text) => tests.every((test) => test(text));
  }

  function search(line) {
    const input = line.querySelector("input"), count = line.querySelector(".count");
    const all = Array.from(document.querySelectorAll(".cards > .card"));
    const shelves = Array.from(document.querySelectorAll(".cards"));
    let texts = null, first = null;
    line.hidden = false;
    function find() {
      const heads = (card) => card.querySelector("summary").textContent.toLowerCase();
      texts = texts || all.map((card) => [heads(card), Array.from(card.querySelectorAll(".context"), (c) => c.textContent).join(" ").toLowerCase()]);
      const wanted = input.value.trim(), found = matcher(wanted), number = /^\d+$/.test(wanted);
      let n = 0;
      first = null;
      all.forEach((card, i) => {
        // A number alone is a latent's number, not a figure in some text.
        const fits = !wanted || found(number ? texts[i][0] : texts[i].join(" "));
        card.hidden = !fits;
        if (fits) { n += 1; first = first || card; }
      });
      shelves.forEach((shelf) => { shelf.hidden = Boolean(wanted) && !shelf.querySelector(".card:not([hidden])"); });
      count.textContent = wanted ? n + " of " + all.length + (n ? ", Enter opens the first" : "") : "";
    }
    input.addEventListener("input", find);
    input.addEventListener("keydown", (event) => {
      if (event.key === "Enter" && first && input.value.trim()) location.hash = first.id;
    });
    return () => { input.value = ""; find(); };
  }

  let showAll = () => {};

  // Opens whatever is folded around the place that the address names, and puts the keyboard there.
  function reveal() {
    let target = null;
    try { target = document.getElementById(decodeURIComponent(location.hash.slice(1))); } catch { return; }
    if (!target) return;
    if (target.closest(".cards [hidden], .cards[hidden]")) showAll();
    for (let node = target; node; node = node.parentElement) if (node.tagName === "DETAILS") node.open = true;
    target.scrollIntoView();
    const focus = target.matches("details") ? target.querySelector("summary") : target.querySelector("input");
    if (focus) focus.focus({ preventScroll: true });
  }

  function themes(button) {
    button.addEventListener("click", () => {
      const root = document.documentElement, dark = matchMedia("(prefers-color-scheme: dark)").matches;
      root.dataset.theme = (root.dataset.theme || (dark ? "dark" : "light")) === "dark" ? "light" : "dark";
    });
  }

  document.querySelectorAll("figure").forEach((figure) => {
    if (figure.querySelector(":scope > script.hover")) hover(figure);
  });
  document.querySelectorAll("table.sortable").forEach(sortable);
  document.querySelectorAll("#find").forEach((line) => { showAll = search(line); });
  document.querySelectorAll("#theme").forEach(themes);
  document.querySelectorAll(".scripted").forEach((item) => { item.hidden = false; });
  window.addEventListener("hashchange", reveal);
  if (location.hash) reveal();
  document.documentElement.dataset.ready = "yes";
})();
