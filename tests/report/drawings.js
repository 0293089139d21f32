() => {
  // Text of drawings that leaves its drawing, or lies on other text of it.
  const out = [];
  for (const svg of document.querySelectorAll("svg")) {
    const view = svg.viewBox.baseVal, back = svg.getCTM().inverse(), seen = [];
    const where = (svg.closest("figure") || svg.closest(".card") || {}).id;
    for (const text of svg.querySelectorAll("text")) {
      const box = text.getBBox(), m = back.multiply(text.getCTM());
      const corners = [[box.x, box.y], [box.x + box.width, box.y], [box.x, box.y + box.height], [box.x + box.width, box.y + box.height]]
        .map(([x, y]) => [m.a * x + m.c * y + m.e, m.b * x + m.d * y + m.f]);
      const xs = corners.map((p) => p[0]), ys = corners.map((p) => p[1]);
      const [left, right, top, bottom] = [Math.min(...xs), Math.max(...xs), Math.min(...ys), Math.max(...ys)];
      const said = text.lastChild ? text.lastChild.textContent : "";
      if (left < -0.5 || right > view.width + 0.5 || top < -2 || bottom > view.height + 2) out.push(`${where}: "${said}" leaves the drawing`);
      for (const o of seen) {
        const wide = Math.min(right, o.right) - Math.max(left, o.left), high = Math.min(bottom, o.bottom) - Math.max(top, o.top);
        if (wide > 3 && high > 4) out.push(`${where}: "${said}" lies on "${o.said}"`);
      }
      seen.push({ left, right, top, bottom, said });
    }
  }
  return out;
}
