() => {
  const out = [], all = (q) => [...document.querySelectorAll(q)], say = (what, e) => out.push(what + ": " + e.outerHTML.slice(0, 80));
  const ids = all("[id]").map((e) => e.id);
  ids.filter((id, i) => ids.indexOf(id) !== i).forEach((id) => out.push("id used twice: " + id));
  let level = 0;
  for (const h of all("h1,h2,h3,h4,h5,h6")) {
    const mine = Number(h.tagName[1]);
    if (mine > level + 1) say("heading skips a level", h);
    level = mine;
  }
  if (all("h1").length !== 1 || all("main").length !== 1 || all("nav").length !== 1) out.push("landmarks");
  const named = (e) => e.textContent.trim() || e.getAttribute("aria-label") || (e.labels && e.labels.length);
  all("button,a,input,summary,[role=group]").filter((e) => !named(e)).forEach((e) => say("no name", e));
  all("svg").filter((e) => e.getAttribute("role") !== "img" || !e.querySelector("title").textContent || !e.querySelector("desc").textContent).forEach((e) => say("drawing without words", e));
  all("svg a, svg [tabindex], summary a, summary button, a a").forEach((e) => say("control inside a control", e));
  all("table").filter((e) => !e.caption || !e.caption.textContent.trim()).forEach((e) => say("table without caption", e));
  all("th").filter((e) => !e.scope).forEach((e) => say("head without scope", e));
  all("th").filter((e) => !e.textContent.trim()).forEach((e) => say("empty head", e));
  all("dl").forEach((e) => { if ([...e.children].some((c) => !["DT", "DD", "DIV"].includes(c.tagName))) say("list of terms holds something else", e); });
  all("ul,ol").forEach((e) => { if ([...e.children].some((c) => c.tagName !== "LI")) say("list holds something else", e); });
  all("[aria-labelledby]").filter((e) => !document.getElementById(e.getAttribute("aria-labelledby"))).forEach((e) => say("label missing", e));
  all("[tabindex]").filter((e) => Number(e.getAttribute("tabindex")) > 0).forEach((e) => say("order of focus changed", e));
  if (!document.documentElement.lang || !document.title) out.push("language or title missing");
  return out;
}
