"""The report's script: pickers, and values for a pointer and the keyboard. Without it the page still has everything."""

SCRIPT = r"""
"use strict";
(() => {
  const all = (query, root = document) => [...root.querySelectorAll(query)];

  // pickers: of what carries data-layer or data-task, only what is picked is shown
  const pickers = {
    show(select) {
      const kind = select.dataset.of;
      for (const part of all("[data-" + kind + "]")) {
        part.hidden = select.value !== "all" && part.dataset[kind] !== select.value;
        if (part.tagName === "DETAILS") part.open = select.value !== "all" || part.open;
      }
    },
    colour(select) {
      for (const text of all("[data-choices]")) {
        const chosen = JSON.parse(text.dataset.choices)[select.value], names = JSON.parse(text.dataset.names);
        [...text.children].forEach((token, place) => {
          token.className = text.dataset.kind + chosen[place] % 8;
          token.title = names[chosen[place]];
        });
      }
      for (const words of all("[data-counted]")) words.textContent = JSON.parse(words.dataset.counted)[select.value];
    },
  };
  for (const select of all("select[data-picks]")) {
    const pick = () => pickers[select.dataset.picks](select);
    select.addEventListener("change", pick);
    pick();
  }
  for (const part of all(".pick")) part.hidden = false;

  // values: what a plot carries is told for the cell under the pointer, or that the arrow keys lead to
  const tip = document.createElement("div");
  tip.className = "tip";
  tip.setAttribute("role", "status");
  tip.hidden = true;
  document.body.append(tip);
  const tell = (plot, mark, row, column) => {
    const [x, y, wide, high] = mark.box, frame = plot.getBoundingClientRect();
    tip.textContent = mark.rows[row] + ", " + mark.columns[column] + ": " + mark.around.join(mark.words[row][column]);
    tip.hidden = false;
    const left = frame.left + frame.width * (x + wide * (column + 0.5) / mark.columns.length);
    const top = frame.top + frame.height * (y + high * row / mark.rows.length) - tip.offsetHeight - 6;
    const most = document.documentElement.clientWidth - tip.offsetWidth - 8;
    tip.style.left = Math.max(8, Math.min(most, left - tip.offsetWidth / 2)) + "px";
    tip.style.top = Math.max(8, top) + "px";
  };
  for (const plot of all("svg[data-marks]")) {
    const marks = JSON.parse(plot.dataset.marks);
    let at = null;
    const hide = () => { tip.hidden = true; };
    plot.setAttribute("tabindex", "0");
    plot.setAttribute("aria-describedby", "told");
    plot.addEventListener("pointermove", (event) => {
      const frame = plot.getBoundingClientRect();
      const px = (event.clientX - frame.left) / frame.width, py = (event.clientY - frame.top) / frame.height;
      const found = marks.find(({ box: [x, y, wide, high] }) => px >= x && px < x + wide && py >= y && py < y + high);
      if (!found) return hide();
      const [x, y, wide, high] = found.box;
      tell(plot, found, Math.floor((py - y) / high * found.rows.length),
        Math.floor((px - x) / wide * found.columns.length));
    });
    plot.addEventListener("pointerleave", hide);
    plot.addEventListener("blur", hide);
    plot.addEventListener("keydown", (event) => {
      const step = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] }[event.key];
      if (event.key === "Escape") return hide();
      if (!step) return;
      event.preventDefault();
      const start = marks.map((mark, number) => marks.slice(0, number).reduce((sum, one) => sum + one.rows.length, 0));
      const rows = marks.reduce((sum, one) => sum + one.rows.length, 0);
      at = at === null ? [0, 0] : [Math.max(0, Math.min(rows - 1, at[0] + step[0])), Math.max(0, at[1] + step[1])];
      const number = start.findLastIndex((first) => first <= at[0]);
      at[1] = Math.min(marks[number].columns.length - 1, at[1]);
      tell(plot, marks[number], at[0] - start[number], at[1]);
    });
  }

  // on paper nothing can be opened
  let closed = [];
  addEventListener("beforeprint", () => {
    closed = all("details.whole:not([open])");
    for (const part of closed) part.open = true;
  });
  addEventListener("afterprint", () => { for (const part of closed) part.open = false; });
})();
"""
