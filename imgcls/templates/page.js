"use strict";
const SHOWN = 12;  // images of a gallery that are shown at first

// ---------------------------------------------------------------- tables

for (const table of document.querySelectorAll("table.sorts")) {
  const body = table.tBodies[0];
  table.querySelectorAll("thead th").forEach((head, column) => {
    const button = head.querySelector("button");
    if (!button) return;
    button.addEventListener("click", () => {
      const rising = head.getAttribute("aria-sort") !== "ascending";
      table.querySelectorAll("thead th").forEach(other => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", rising ? "ascending" : "descending");
      const key = row => row.cells[column].dataset.value ?? row.cells[column].textContent;
      const rows = [...body.rows];
      rows.sort((a, b) => {
        const x = key(a), y = key(b);
        if (x === "" || y === "") return (x === "") - (y === "");  // unknown values stay last
        const both = Number(x) - Number(y);
        const order = Number.isNaN(both) ? x.localeCompare(y) : both;
        return rising ? order : -order;
      });
      body.append(...rows);
    });
  });
}

for (const field of document.querySelectorAll("input[type=search][data-for]")) {
  const rows = [...document.getElementById(field.dataset.for).tBodies[0].rows];
  const count = field.form.querySelector("output");
  field.form.addEventListener("submit", event => event.preventDefault());
  field.addEventListener("input", () => {
    const wanted = field.value.trim().toLowerCase();
    for (const row of rows) row.hidden = !row.cells[0].textContent.toLowerCase().includes(wanted);
    const found = rows.filter(row => !row.hidden).length;
    count.textContent = wanted ? found + " of " + rows.length : "";
  });
}

// ---------------------------------------------------------------- confusion matrices

for (const part of document.querySelectorAll(".matrix-part")) {
  const readout = part.querySelector(".readout");
  const rows = [...part.querySelector("tbody").rows].map(row => [...row.querySelectorAll("td")]);
  const show = cell => { if (readout && cell && cell.title) readout.textContent = cell.title; };
  rows.flat().forEach((cell, index) => { cell.tabIndex = index ? -1 : 0; });
  part.addEventListener("mouseover", event => show(event.target.closest("td")));
  part.addEventListener("focusin", event => show(event.target.closest("td")));
  part.addEventListener("keydown", event => {
    const step = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] }[event.key];
    const row = rows.findIndex(cells => cells.includes(event.target));
    if (!step || row < 0) return;
    const next = rows[row + step[0]]?.[rows[row].indexOf(event.target) + step[1]];
    event.preventDefault();
    if (!next) return;
    event.target.tabIndex = -1;
    next.tabIndex = 0;
    next.focus();
  });
}

// ---------------------------------------------------------------- galleries

class Gallery {
  constructor(list) {
    this.list = list;
    this.items = [...list.children];
    this.matching = this.items;
    this.more = document.querySelector('.more button[data-for="' + list.id + '"]');
    this.form = document.querySelector('form.filters[data-for="' + list.id + '"]');
    this.isWhole = !this.more;
    this.more?.addEventListener("click", () => { this.isWhole = true; this.show(); });
    this.form?.addEventListener("change", () => this.filter());
    this.form?.addEventListener("submit", event => event.preventDefault());
    this.items.forEach(item => this.addZoom(item));
    this.show();
  }

  addZoom(item) {
    const image = item.querySelector(":scope > img");
    if (!image) return;
    const button = document.createElement("button");
    button.type = "button";
    button.className = "zoom";
    image.replaceWith(button);
    button.append(image);
    button.addEventListener("click", () => openViewer(this, item));
  }

  filter() {
    const wanted = [...new FormData(this.form)].filter(([, value]) => value !== "");
    this.matching = this.items.filter(item => {
      const facets = JSON.parse(item.dataset.facets);
      return wanted.every(([name, value]) => name === "confidence"
        ? Number(item.dataset.confidence) >= Number(value) : (facets[name] ?? []).includes(value));
    });
    this.show();
  }

  show() {
    const shown = new Set(this.isWhole ? this.matching : this.matching.slice(0, SHOWN));
    for (const item of this.items) item.hidden = !shown.has(item);
    if (this.more) {
      this.more.parentElement.hidden = shown.size === this.matching.length;
      this.more.textContent = "Show all " + this.matching.length;
    }
    const count = this.form?.querySelector("output");
    if (count) count.textContent = this.matching.length + " of " + this.items.length + " images";
  }
}

// ---------------------------------------------------------------- the enlarged image

const viewer = document.createElement("dialog");
viewer.id = "viewer";
viewer.setAttribute("aria-label", "Enlarged image");
viewer.innerHTML = '<div class="bar-top"><span class="place soft" role="status"></span><span>' +
  '<button type="button" data-step="-1" aria-label="Previous image">\u2190</button> ' +
  '<button type="button" data-step="1" aria-label="Next image">\u2192</button> ' +
  '<button type="button" data-close>Close</button></span></div>' +
  '<div class="body"><div class="about"></div></div>';
const enlarged = document.createElement("img");
enlarged.className = "picture-of";
viewer.querySelector(".body").prepend(enlarged);
let shown = null;  // the gallery and the item in the viewer

function openViewer(gallery, item) {
  if (!viewer.isConnected) document.body.append(viewer);
  fillViewer(gallery, item);
  viewer.showModal();
}

function fillViewer(gallery, item) {
  shown = { gallery, item };
  const source = item.querySelector(".zoom img");
  enlarged.src = source.src;
  enlarged.alt = source.alt;
  const about = viewer.querySelector(".about");
  about.replaceChildren(...[...item.children].filter(part => !part.matches(".zoom")).map(part => part.cloneNode(true)));
  about.querySelectorAll("details").forEach(part => { part.open = true; });
  about.querySelector(".path")?.before(...listScores(item));
  const all = listSteps(gallery);
  viewer.querySelector(".place").textContent = all.indexOf(item) + 1 + " of " + all.length;
}

function listScores(item) {
  if (!item.dataset.scores) return [];
  const list = document.createElement("ol");
  list.className = "scores";
  for (const [name, score] of JSON.parse(item.dataset.scores)) {
    const line = document.createElement("li");
    for (const text of [name, (100 * score).toFixed(1) + "%"]) {
      line.append(Object.assign(document.createElement("span"), { textContent: text }), " ");
    }
    const bar = document.createElement("i");
    bar.style.width = 100 * Math.min(1, score) + "%";
    line.append(bar);
    list.append(line);
  }
  return [list];
}

const listSteps = gallery => gallery.matching.filter(item => item.querySelector(".zoom"));

function stepViewer(step) {
  const all = listSteps(shown.gallery);
  const next = all[(all.indexOf(shown.item) + step + all.length) % all.length];
  if (next.hidden) { shown.gallery.isWhole = true; shown.gallery.show(); }
  fillViewer(shown.gallery, next);
}

viewer.addEventListener("click", event => {
  const step = event.target.dataset.step;
  if (step) stepViewer(Number(step));
  else if (event.target === viewer || "close" in event.target.dataset) viewer.close();
});
viewer.addEventListener("keydown", event => {
  const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
  if (step) { event.preventDefault(); stepViewer(step); }
});
viewer.addEventListener("close", () => shown.item.querySelector(".zoom").focus());

document.querySelectorAll("ul.gallery").forEach(list => new Gallery(list));
