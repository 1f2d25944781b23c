"use strict";
// Hovering (or touching) a figure, switches between two figures, colours of text, copy buttons.
const tip = document.createElement("div");
tip.id = "tip";
tip.hidden = true;
document.body.append(tip);

function show(event, lines) {
  tip.replaceChildren(...lines.map(([color, text]) => {
    const line = document.createElement("div");
    if (color) {
      const dot = document.createElement("i");
      dot.style.background = color;
      line.append(dot);
    }
    line.append(text);
    return line;
  }));
  tip.hidden = false;
  const left = Math.min(event.clientX + 14, innerWidth - tip.offsetWidth - 6);
  const below = event.clientY + 16;
  const top = below + tip.offsetHeight > innerHeight ? event.clientY - tip.offsetHeight - 10 : below;
  tip.style.left = `${Math.max(4, left)}px`;
  tip.style.top = `${Math.max(4, top)}px`;
}

function hide() { tip.hidden = true; }

const number = value => value === null ? "–" : Math.abs(value) >= 1e5 || (value && Math.abs(value) < 1e-3)
  ? value.toExponential(2) : String(Number(value.toPrecision(4)));

function place(share, [low, high, log]) {
  return log ? low * (high / low) ** share : low + share * (high - low);
}

function tellMap(axes, across, down) {
  const column = Math.min(axes.columns.length - 1, Math.floor(across * axes.columns.length));
  const row = Math.min(axes.rows.length - 1, Math.floor(down * axes.rows.length));
  const value = axes.map[row][column];
  const where = `${axes.ylabel} ${axes.rows[row]}, ${axes.xlabel} ${axes.columns[column]}`;
  return [["", axes.title], ["", `${where}: ${number(value)}`]];
}

function tellCurves(axes, across) {
  const x = place(across, axes.x);
  let nearest = null;
  for (const line of axes.lines)
    for (const point of line.points)
      if (point[1] !== null && (nearest === null || Math.abs(point[0] - x) < Math.abs(nearest - x)))
        nearest = point[0];
  if (nearest === null) return [];
  const reach = Math.abs(axes.x[1] - axes.x[0]) / 25;
  const found = [];
  for (const line of axes.lines) {
    let best = null;
    for (const point of line.points)
      if (point[1] !== null && (best === null || Math.abs(point[0] - nearest) < Math.abs(best[0] - nearest)))
        best = point;
    if (best !== null && Math.abs(best[0] - nearest) <= reach) found.push([line.color, `${line.name}: ${number(best[1])}`, best[1]]);
  }
  found.sort((a, b) => b[2] - a[2]);
  const shown = found.slice(0, 12);
  if (found.length > 12) shown.push(["", `and ${found.length - 12} more`]);
  return [["", `${axes.xlabel} ${axes.names[nearest] || number(nearest)}`], ...shown];
}

for (const plot of document.querySelectorAll(".plot")) {
  const all = JSON.parse(plot.querySelector("script").textContent);
  const svg = plot.querySelector("svg");
  const move = event => {
    const box = svg.getBoundingClientRect();
    const x = (event.clientX - box.left) / box.width, y = (event.clientY - box.top) / box.height;
    for (const axes of all) {
      const [left, top, width, height] = axes.box;
      const across = (x - left) / width, down = (y - top) / height;
      if (across < 0 || across > 1 || down < 0 || down > 1) continue;
      const lines = axes.map ? tellMap(axes, across, down) : tellCurves(axes, across);
      return lines.length ? show(event, lines) : hide();
    }
    hide();
  };
  plot.addEventListener("pointermove", move);
  plot.addEventListener("pointerdown", move);
  plot.addEventListener("pointerleave", hide);
}
addEventListener("scroll", hide, {passive: true});

// What goes on beyond the right edge fades there.
const sideways = document.querySelectorAll(".plot, .scroll");
const fade = one => one.classList.toggle("more", one.scrollLeft + one.clientWidth + 2 < one.scrollWidth);
for (const one of sideways) one.addEventListener("scroll", () => fade(one), {passive: true});
const fadeAll = () => sideways.forEach(fade);
addEventListener("resize", fadeAll);
addEventListener("toggle", fadeAll, true);  // of answers
fadeAll();

for (const button of document.querySelectorAll("button[data-switch]"))
  button.addEventListener("click", () => {
    const figure = button.closest("figure");
    for (const plot of figure.querySelectorAll(".plot")) plot.hidden = !plot.hidden;
    button.setAttribute("aria-pressed", String(button.getAttribute("aria-pressed") !== "true"));
    fadeAll();
  });

for (const button of document.querySelectorAll("button[data-copy]"))
  button.addEventListener("click", async () => {
    const text = document.getElementById(button.dataset.copy);
    getSelection().selectAllChildren(text);
    // The clipboard's own function may wait for a permission that nobody is asked for.
    if (!document.execCommand("copy")) await navigator.clipboard.writeText(text.textContent);
    button.textContent = "copied";
  });

addEventListener("beforeprint", () => document.querySelectorAll("details").forEach(one => { one.open = true; }));

const texts = document.getElementById("texts");
if (texts) {
  const data = JSON.parse(texts.querySelector("script").textContent);
  const select = texts.querySelector("select");
  const describeGates = (gates, top) => {
    const told = [];
    for (let i = 0; i < gates.length; i += 2)
      if (gates[i + 1] > 0) told.push(`expert ${gates[i]}: ${gates[i + 1]} %`);
    return told.length ? told.join("\n") : "no expert";
  };
  const draw = () => {
    const layer = Number(select.value);
    data.texts.forEach((text, index) => {
      const target = document.getElementById(`text-${index}`);
      const flat = text.gates[layer], width = flat.length / text.tokens.length;
      target.replaceChildren(...text.tokens.map((token, at) => {
        const gates = flat.slice(at * width, (at + 1) * width);
        const span = document.createElement("span");
        span.textContent = token;
        let leader = -1;
        for (let i = 0; i < gates.length && leader < 0; i += 2)
          if (gates[i] >= data.shared && gates[i + 1] > 0) leader = i;
        span.className = "token" + (at < text.prompt ? " asked" : "");
        if (leader >= 0) {
          const strength = Math.min(1, gates[leader + 1] / 100);
          span.style.setProperty("--c", data.colors[gates[leader] % data.colors.length]);
          span.style.setProperty("--s", `${Math.round(12 + 50 * strength)}%`);
          span.dataset.cycle = Math.floor(gates[leader] / data.colors.length) % 4;
        }
        span.dataset.gates = describeGates(gates);
        return span;
      }));
    });
  };
  select.addEventListener("change", draw);
  const tell = event => {
    const gates = event.target.dataset && event.target.dataset.gates;
    if (gates) show(event, gates.split("\n").map(line => ["", line])); else hide();
  };
  texts.addEventListener("pointermove", tell);
  texts.addEventListener("pointerdown", tell);
  texts.addEventListener("pointerleave", hide);
  draw();
}
