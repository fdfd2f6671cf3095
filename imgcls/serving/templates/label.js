const MAX_KEYED = 30;
const KEYS = [..."123456789abcdefghijklmnopqrtuvwxy0"];
const MAX_MATCHES = 12;
const SMALL_IMAGE = 200;
const KEY_RIGHTS = "The key needs the scope label.";

let queue = null;
let work = null;
let items = [];
let current = null;
let isUndoing = false;
let sending = Promise.resolve();
let applied = Promise.resolve();
const pending = new Map();
const loaded = new Map();

const isMultilabel = () => queue.task === "multilabel";
const plural = (count, noun) => count + " " + noun + (count === 1 ? "" : "s");
const baseName = (path) => path.split(/[/\\#]/).pop() || path;
const createId = () =>
  [...crypto.getRandomValues(new Uint8Array(16))].map((byte) => byte.toString(16).padStart(2, "0")).join("");

// ---------------------------------------------------------------- requests

class Rejected extends Error {
  constructor(status, problem) {
    super(problem.detail || problem.title || "error " + status);
    this.status = status;
  }
}

/** Send a request until it is answered; `tries` limits the attempts after failures that may pass. */
async function request(path, { body, tries = 5, onWait } = {}) {
  const options = { headers: headers() };
  if (body) {
    Object.assign(options, { method: "POST", body: JSON.stringify(body) });
    options.headers["Content-Type"] = "application/json";
  }
  for (let attempt = 1; ; attempt += 1) {
    let response = null;
    try {
      response = await fetch("v1/labeling/" + path, options);
      if (response.ok) return await (response.headers.get("Content-Type").includes("json") ? response.json() : response.blob());
    } catch { response = null; }
    const mayPass = !response || response.status === 429 || response.status >= 500;
    if (!mayPass || attempt >= tries) {
      const kind = response?.headers.get("Content-Type") || "";
      if (response) throw new Rejected(response.status, kind.includes("json") ? await response.json() : {});
      throw new Rejected(0, { detail: "The server cannot be reached." });
    }
    if (onWait) onWait();
    await sleep(Math.min(Number(response?.headers.get("Retry-After")) || 2 ** (attempt - 1), 10));
  }
}

/** Send changes of labels one after another, each until it is stored or rejected. */
function send(path, body) {
  let hasWaited = false;
  const onWait = () => {
    hasWaited = true;
    showMessage(plural(Math.max(pending.size, 1), "decision") + " not saved yet. Trying again.", true);
  };
  const annotator = queue.annotator ? {} : { annotator: getName() };
  const sent = sending.then(() => request(path, { body: { ...annotator, ...body }, tries: Infinity, onWait }));
  sending = sent.catch(() => null);
  return sent.then((reply) => {
    if (hasWaited) showMessage("Saved.");
    return reply;
  });
}

// ---------------------------------------------------------------- annotator

const getName = () => byId("name").value.trim();

function showSetup(fields, text) {
  byId("setup").hidden = false;
  for (const name of ["key", "name"]) byId(name + "_field").hidden = !fields.includes(name);
  byId("work").hidden = byId("overview").hidden = true;
  showMessage(text || "", Boolean(text));
  byId(fields[0]).focus();
}

async function start() {
  if (isKeyMalformed()) return showSetup(["key"], KEY_MALFORMED);
  try {
    queue = await request("queue");
    if (!queue.annotator && !getName()) return showSetup(["name"]);
    if (getName() && !queue.annotator) localStorage.setItem("annotator", getName());
    byId("setup").hidden = true;
    work = await send("next", {});
  } catch (problem) {
    const isKeyProblem = problem.status === 401 || problem.status === 403;
    if (isKeyProblem) return showSetup(["key"], byId("key").value ? problem.message + ". " + KEY_RIGHTS : "");
    if (problem.status === 400) return showSetup(["name"], problem.message);
    return showMessage(problem.message, true);
  }
  showMessage("");
  byId("who").textContent = "Labeling as " + work.annotator;
  byId("change").hidden = false;
  byId("work").hidden = byId("overview").hidden = byId("bar").hidden = false;
  byId("search_field").hidden = queue.classes.length <= MAX_KEYED;
  current = null;
  apply(work);
}

// ---------------------------------------------------------------- images

function load(row) {
  if (!loaded.has(row)) {
    const image = request("images/" + row).then((blob) => URL.createObjectURL(blob));
    const suggestion = request("images/" + row + "/suggestion").then((reply) => reply.predictions[0]);
    for (const promise of [image, suggestion]) promise.catch(() => null);  // shown with the image
    loaded.set(row, { image, suggestion });
  }
  return loaded.get(row);
}

function forgetImages() {
  const kept = new Set([...items.map((item) => item.row), current?.row, work.last?.row]);
  for (const [row, { image }] of loaded) {
    if (kept.has(row)) continue;
    image.then((url) => URL.revokeObjectURL(url), () => null);
    loaded.delete(row);
  }
}

function showStatus(text, isBroken) {
  byId("status").textContent = text;
  byId("status").className = isBroken ? "broken" : "";
}

function show(item, labels) {
  current = { ...item, isReady: false, isTouched: Boolean(labels), chosen: new Set(labels || []), suggestion: null };
  const shown = current;
  byId("image").hidden = true;
  byId("image").removeAttribute("src");
  byId("caption").textContent = item.path;
  byId("suggestion").textContent = "";
  byId("search").value = "";
  showStatus("Loading");
  renderPanel();
  const { image, suggestion } = load(item.row);
  image.then((url) => { if (current === shown) showImage(url, item); }, (problem) => {
    if (current === shown) showStatus("This image cannot be shown: " + problem.message + ". Press s to skip it.", true);
  });
  suggestion.then((row) => { if (current === shown) showSuggestion(row); }, (problem) => {
    if (current === shown) byId("suggestion").textContent = "No suggestion: " + problem.message;
  });
  if (document.activeElement !== byId("search")) byId("figure").focus({ preventScroll: true });
}

function showImage(url, item) {
  const image = byId("image");
  image.alt = "Image to label: " + baseName(item.path);
  image.src = current.url = url;
}

byId("image").addEventListener("load", () => {
  const image = byId("image");
  if (image.src !== current?.url) return;
  image.className = Math.max(image.naturalWidth, image.naturalHeight) < SMALL_IMAGE ? "small" : "";
  image.hidden = false;
  showStatus("");
  current.isReady = true;
  renderPanel();
});
byId("image").addEventListener("error", () => {
  if (current?.url && byId("image").src === current.url) {
    showStatus("This image cannot be shown: the browser cannot decode it. Press s to skip it.", true);
  }
});

const getSuggested = () => {
  const row = current?.suggestion;
  return !row ? null : row.predicted_labels || [row.predicted_label];
};

function showSuggestion(row) {
  current.suggestion = row;
  const labels = getSuggested();
  const score = isMultilabel() ? "" : ", " + percent(row.confidence);
  byId("suggestion").textContent = "Suggestion: " + (labels.join(", ") || "no class") + score + (row.is_ood ? ", unlike the training data" : "");
  if (isMultilabel() && !current.isTouched) current.chosen = new Set(labels);
  renderPanel();
}

// ---------------------------------------------------------------- classes

/** The classes that have a button: all, or of many those that are likely. */
function listShownClasses() {
  if (queue.classes.length <= MAX_KEYED) return queue.classes;
  const top = current.suggestion?.topk_labels || [];
  return [...new Set([...top, ...current.chosen, ...findMatches()])].slice(0, MAX_KEYED);
}

/** The key of each class: its name if that is one key, such as a digit, else the next free one. */
function assignKeys(names) {
  const own = new Map();
  for (const name of names) {
    const key = name.toLowerCase();
    if (KEYS.includes(key) && !own.has(key)) own.set(key, name);
  }
  const free = KEYS.filter((key) => !own.has(key));
  return names.map((name) => (own.get(name.toLowerCase()) === name ? name.toLowerCase() : free.shift()));
}

function findMatches() {
  const text = byId("search").value.trim().toLowerCase();
  if (!text) return [];
  const matches = queue.classes.filter((name) => name.toLowerCase().includes(text));
  matches.sort((a, b) => b.toLowerCase().startsWith(text) - a.toLowerCase().startsWith(text));
  return matches.slice(0, MAX_MATCHES);
}

function renderPanel() {
  const isBlocked = !current || !current.isReady || isUndoing;
  const suggested = getSuggested() || [];
  const scores = new Map((current?.suggestion?.topk_labels || []).map((name, i) => [name, current.suggestion.topk_scores[i]]));
  const text = byId("search").value.trim();
  const shown = !current ? [] : text && queue.classes.length > MAX_KEYED ? findMatches() : listShownClasses();
  const keys = assignKeys(shown);
  const focused = document.activeElement?.dataset?.name;
  byId("classes").replaceChildren(...shown.map((name, i) => {
    const button = create("button", suggested.includes(name) ? "suggested" : "");
    button.type = "button";
    button.dataset.name = name;
    button.disabled = isBlocked;
    if (!text) {
      button.append(create("kbd", "", keys[i]));
      button.setAttribute("aria-keyshortcuts", keys[i]);
    } else if (i === 0) button.append(create("kbd", "", "Enter"));
    button.append(name);
    if (scores.has(name)) button.append(create("span", "score", percent(scores.get(name))));
    if (isMultilabel()) button.setAttribute("aria-pressed", String(current.chosen.has(name)));
    button.addEventListener("click", () => choose(name));
    return button;
  }));
  if (focused) [...byId("classes").children].find((button) => button.dataset.name === focused)?.focus();
  const chosen = isMultilabel() ? queue.classes.filter((name) => current?.chosen.has(name)) : suggested;
  const label = isMultilabel() ? "Save: " + (chosen.join(", ") || "no class") : suggested.length ? "Accept: " + suggested[0] : "Accept the suggestion";
  byId("accept").replaceChildren(create("kbd", "", "Enter"), label);
  byId("accept").disabled = isBlocked || !canAccept();
  byId("skip").disabled = !current || isUndoing;
  byId("undo").disabled = isUndoing || !(work?.last || pending.size);
}

const canAccept = () => (isMultilabel() ? current.isTouched || current.suggestion !== null : queue.classes.includes(getSuggested()?.[0]));

function choose(name) {
  if (!current?.isReady || isUndoing) return;
  if (!isMultilabel()) return decide([name]);
  current.isTouched = true;
  if (!current.chosen.delete(name)) current.chosen.add(name);
  byId("search").value = "";
  renderPanel();
}

function accept() {
  if (!current?.isReady || isUndoing) return;
  if (!canAccept()) return showMessage("There is no suggestion to accept yet.", true);
  decide(isMultilabel() ? queue.classes.filter((name) => current.chosen.has(name)) : getSuggested());
}

// ---------------------------------------------------------------- decisions

function decide(labels) {
  if (!current || isUndoing) return;
  const item = { row: current.row, path: current.path };
  const submission = createId();
  pending.set(submission, item.row);
  showMessage("");
  applied = send("decisions", { queue: queue.queue, row: item.row, submission, labels }).then((reply) => {
    pending.delete(submission);
    apply(reply);
    if (byId("overview").open) showReport();
  }, (problem) => {
    pending.delete(submission);
    const hint = problem.status === 409 ? " Load the page again." : "";
    showMessage(baseName(item.path) + " was not saved: " + problem.message + "." + hint, true);
    if (problem.status === 401 || problem.status === 403) return showSetup(["key"], problem.message);
    show(item, labels || []);
  });
  current = null;
  showNext();
}

async function undo() {
  if (isUndoing || !(work.last || pending.size)) return;
  isUndoing = true;
  renderPanel();
  try {
    await applied;
    const last = work.last;
    if (!last) return;
    const reply = await send("undo", { submission: last.submission });
    isUndoing = false;
    current = null;
    apply(reply, last.row !== null);
    if (last.row !== null) show({ row: last.row, path: last.path }, isMultilabel() ? last.labels || [] : undefined);
    showMessage("Undone: " + baseName(last.path) + (last.labels ? " was " + (last.labels.join(", ") || "no class") : " was skipped"));
  } catch (problem) {
    showMessage(problem.message, true);
  } finally {
    isUndoing = false;
    renderPanel();
  }
}

/** Take over the state that the server replied with. */
function apply(reply, keepsImage) {
  work = reply;
  const sent = new Set(pending.values());
  items = work.assigned.filter((item) => !sent.has(item.row));
  const done = work.labeled + work.skipped;
  byId("bar").max = Math.max(done + work.remaining, 1);
  byId("bar").value = done;
  const skipped = work.skipped ? ", " + work.skipped + " skipped" : "";
  byId("counts").textContent = work.labeled + " labeled" + skipped + ", " + work.remaining + " left";
  if (!current && !keepsImage) showNext();
  for (const item of items) load(item.row);
  forgetImages();
  renderPanel();
}

function showNext() {
  const sent = new Set(pending.values());
  const next = items.find((item) => !sent.has(item.row));
  if (next) return show(next);
  byId("image").hidden = true;
  byId("image").removeAttribute("src");
  byId("caption").textContent = byId("suggestion").textContent = "";
  if (pending.size) showStatus("Saving");
  else if (work.remaining) showStatus(plural(work.remaining, "image") + " left, assigned to other annotators. Load the page again later.");
  else showStatus("All images are done.");
  renderPanel();
}

// ---------------------------------------------------------------- progress and agreement

function createTable(names, rows) {
  const table = create("table");
  const head = table.createTHead().insertRow();
  for (const name of names) {
    const cell = create("th", "", name);
    cell.scope = "col";
    head.append(cell);
  }
  const body = table.createTBody();
  for (const values of rows) {
    const row = body.insertRow();
    for (const value of values) row.insertCell().textContent = value;
  }
  const box = create("div", "scroll");
  box.append(table);
  return box;
}

async function showReport() {
  let found;
  try {
    await applied;
    found = await request("progress");
  } catch (problem) {
    return byId("report").replaceChildren(create("p", "message error", problem.message));
  }
  const parts = [create("p", "", found.complete + " of " + plural(found.images, "image") + " complete, with " + plural(queue.annotations_per_image, "label") + " per image")];
  if (found.annotators.length) {
    parts.push(createTable(["Annotator", "Labeled", "Skipped"], found.annotators.map((each) => [each.name, each.labeled, each.skipped])));
  }
  if (found.agreements.length) {
    parts.push(create("h2", "", "Agreement"), createTable(["Annotators", "Images of both", "Same labels", "Cohen’s kappa"],
      found.agreements.map((each) => [each.first + ", " + each.second, each.images, percent(each.equal), each.kappa === null ? "undefined" : each.kappa.toFixed(2)])));
    parts.push(create("h2", "", "Disagreements"), createDisagreements(found.disagreements));
  }
  byId("report").replaceChildren(...parts);
}

function createDisagreements(disagreements) {
  if (!disagreements.length) return create("p", "", "None.");
  const list = create("ul");
  for (const { row, path, labels } of disagreements) {
    const button = create("button", "", baseName(path));
    button.type = "button";
    const texts = Object.entries(labels).map(([name, each]) => name + ": " + (each.join(", ") || "no class"));
    button.append(create("small", "", texts.join("; ")));
    button.addEventListener("click", () => {
      show({ row, path });
      byId("figure").scrollIntoView({ block: "nearest" });
    });
    const item = create("li");
    item.append(button);
    list.append(item);
  }
  return list;
}

// ---------------------------------------------------------------- events

addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || byId("work").hidden || !byId("setup").hidden) return;
  const element = event.target.closest("input, button, summary");
  if (element?.tagName === "INPUT" || (element && (event.key === "Enter" || event.key === " "))) return;
  const shown = queue.classes.length <= MAX_KEYED || !byId("search").value ? listKeyed() : [];
  const place = assignKeys(shown).indexOf(event.key.toLowerCase());
  if (event.key === "/" && !byId("search_field").hidden) {
    event.preventDefault();
    return byId("search").focus();
  }
  const action = { Enter: accept, Backspace: undo, z: undo, s: () => decide(null) }[event.key.length === 1 ? event.key.toLowerCase() : event.key];
  if (action === undefined && !(place in shown)) return;
  event.preventDefault();
  if (event.repeat) return;
  if (action) action();
  else choose(shown[place]);
});
const listKeyed = () => (current ? listShownClasses() : []);

byId("search").addEventListener("input", renderPanel);
byId("search").addEventListener("keydown", (event) => {
  if (event.key === "Escape") {
    byId("search").value = "";
    byId("figure").focus();
    renderPanel();
  } else if (event.key === "Enter" && !event.repeat) {
    event.preventDefault();
    const [match] = findMatches();
    if (match) choose(match);
    else if (!byId("search").value.trim()) accept();
  } else if (event.key === "ArrowDown") {
    event.preventDefault();
    byId("classes").firstElementChild?.focus();
  }
});
byId("accept").addEventListener("click", accept);
byId("undo").addEventListener("click", undo);
byId("skip").addEventListener("click", () => decide(null));
byId("change").addEventListener("click", () => showSetup([queue.annotator ? "key" : "name"]));
byId("overview").addEventListener("toggle", () => { if (byId("overview").open) showReport(); });
byId("refresh").addEventListener("click", showReport);
byId("setup").addEventListener("submit", (event) => {
  event.preventDefault();
  sessionStorage.setItem("key", byId("key").value.trim());
  start();
});
addEventListener("beforeunload", (event) => { if (pending.size) event.preventDefault(); });

byId("key").value = sessionStorage.getItem("key") || "";
byId("name").value = localStorage.getItem("annotator") || "";
start();
