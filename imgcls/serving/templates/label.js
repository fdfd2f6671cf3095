const MAX_KEYED = 30;
const KEYS = [..."123456789abcdefghijklmnopqrtuvwxy0"];  // without s and z: skip and undo
const OWN_KEY = /^[a-z0-9]$/;
const MAX_MATCHES = 12;
const SMALL_IMAGE = 200;

let queue = null;
let work = null;
let items = [];
let current = null;
let isUndoing = false;
let applied = Promise.resolve();
const pending = new Map();  // decisions that are not answered, by submission
const returned = new Map();  // decisions that were rejected, by row: to be decided again
const loaded = new Map();

const isMultilabel = () => queue.task === "multilabel";
const plural = (count, noun) => count + " " + noun + (count === 1 ? "" : "s");
const baseName = (path) => path.split(/[/\\#]/).pop() || path;
const createId = () =>
  [...crypto.getRandomValues(new Uint8Array(16))].map((byte) => byte.toString(16).padStart(2, "0")).join("");

// ---------------------------------------------------------------- annotator

const getName = () => byId("name").value.trim();

function showSetup(fields, text) {
  byId("setup").hidden = false;
  for (const name of ["key", "name"]) byId(name + "_field").hidden = !fields.includes(name);
  byId("work").hidden = byId("overview").hidden = true;
  showMessage(text || "", Boolean(text));
  byId(fields[0]).focus();
}

function change() {
  if (!pending.size && !isUndoing) return showSetup([queue.annotator ? "key" : "name"]);
  showMessage("Change the annotator once all decisions are saved: " + plural(Math.max(pending.size, 1), "decision") + " not saved yet.", true);
}

async function start() {
  if (isKeyMalformed()) return showSetup(["key"], KEY_MALFORMED);
  try {
    queue = await request("queue");
    if (!queue.annotator && !getName()) return showSetup(["name"]);
    if (getName() && !queue.annotator) localStorage.setItem("annotator", getName());
    work = await send("next", {});
    byId("setup").hidden = true;
  } catch (problem) {
    const isKeyProblem = problem.status === 401 || problem.status === 403;
    if (isKeyProblem) return showSetup(["key"], byId("key").value ? problem.message : "");
    if (problem.status === 400) return showSetup(["name"], problem.message);
    return showMessage(problem.message, true);
  }
  showMessage("");
  byId("who").textContent = "Labeling as " + work.annotator;
  byId("change").hidden = false;
  byId("work").hidden = byId("overview").hidden = byId("bar").hidden = false;
  byId("search_field").hidden = queue.classes.length <= MAX_KEYED;
  current = null;
  returned.clear();
  showKeys();
  apply(work);
}

// ---------------------------------------------------------------- images

const imagePath = (row) => "images/" + queue.queue + "/" + row;
const LOADERS = {
  image: (row) => request(imagePath(row)).then((blob) => URL.createObjectURL(blob)),
  suggestion: (row) => request(imagePath(row) + "/suggestion").then((reply) => reply.predictions[0]),
};

/** The image and its suggestion; what failed and may pass is loaded again by the next call. */
function load(row) {
  const entry = loaded.get(row) || {};
  loaded.set(row, entry);
  for (const [part, fetchPart] of Object.entries(LOADERS)) {
    if (entry[part]) continue;
    entry[part] = fetchPart(row);
    entry[part].catch((problem) => { if (problem.mayPass) delete entry[part]; });
  }
  return { ...entry };
}

/** Load the next images once the shown one is there. */
function preload() {
  const shown = current && loaded.get(current.row)?.image;
  Promise.resolve(shown).catch(() => null).then(() => { for (const item of items) load(item.row); });
}

function forgetImages() {
  const kept = new Set([...items.map((item) => item.row), ...returned.keys(), current?.row, work.last?.row]);
  for (const [row, { image }] of loaded) {
    if (kept.has(row)) continue;
    image?.then((url) => URL.revokeObjectURL(url), () => null);
    loaded.delete(row);
  }
}

function showStatus(text, isBroken, mayPass) {
  if (byId("retry").hidden === Boolean(mayPass)) {
    byId("retry").hidden = !mayPass;
    renderPanel();  // Enter is the key of another button
  }
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
    if (current === shown) showBroken(problem);
  });
  suggestion.then((row) => { if (current === shown) showSuggestion(row); }, (problem) => {
    if (current === shown) byId("suggestion").textContent = "No suggestion: " + problem.message;
  });
  if (document.activeElement !== byId("search")) byId("figure").focus({ preventScroll: true });
}

function showBroken(problem) {
  if (problem.mayPass) return showStatus("This image cannot be loaded now: " + problem.message, true, true);
  showStatus("This image cannot be shown: " + problem.message + (problem.status === 409 ? "" : ". Skip it to continue."), true);
}

const retry = () => show(current, current.isTouched ? [...current.chosen] : undefined);

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
    showStatus("This image cannot be shown: the browser cannot decode it. Skip it to continue.", true);
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
    if (OWN_KEY.test(key) && !own.has(key)) own.set(key, name);
  }
  const free = KEYS.filter((key) => !own.has(key));
  return names.map((name) => (own.get(name.toLowerCase()) === name ? name.toLowerCase() : free.shift()));
}

/** A letter for skip or undo, unless a class has it as its name. */
const isFree = (key) => !queue.classes.some((name) => name.toLowerCase() === key);

function showKeys() {
  for (const [id, text, letter, key] of [["undo", "Undo", "z", "Backspace"], ["skip", "Skip", "s", "Delete"]]) {
    byId(id).replaceChildren(create("kbd", "", isFree(letter) ? letter : key), text);
    byId(id).setAttribute("aria-keyshortcuts", isFree(letter) ? letter + " " + key : key);
  }
}

const getSearchText = () => byId("search").value.trim();

function clearSearch() {
  byId("search").value = "";
  byId("figure").focus({ preventScroll: true });
  renderPanel();
}

function findMatches() {
  const text = getSearchText().toLowerCase();
  if (!text) return [];
  const matches = queue.classes.filter((name) => name.toLowerCase().includes(text));
  matches.sort((a, b) => b.toLowerCase().startsWith(text) - a.toLowerCase().startsWith(text));
  return matches.slice(0, MAX_MATCHES);
}

function renderPanel() {
  const isBlocked = !current || !current.isReady || isUndoing;
  const suggested = getSuggested() || [];
  const scores = new Map((current?.suggestion?.topk_labels || []).map((name, i) => [name, current.suggestion.topk_scores[i]]));
  const text = getSearchText();
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
  if (text && current && !shown.length) byId("classes").append(create("p", "", "No class found."));
  if (focused) [...byId("classes").children].find((button) => button.dataset.name === focused)?.focus();
  const chosen = isMultilabel() ? queue.classes.filter((name) => current?.chosen.has(name)) : suggested;
  const label = isMultilabel() ? "Save: " + (chosen.join(", ") || "no class") : suggested.length ? "Accept: " + suggested[0] : "Accept the suggestion";
  byId("accept").replaceChildren(...(text || !byId("retry").hidden ? [] : [create("kbd", "", "Enter")]), label);
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

/** Enter: the first class that was found, or the suggestion. */
function confirm() {
  if (!byId("retry").hidden) return retry();
  if (!getSearchText()) return accept();
  const [match] = findMatches();
  if (match) choose(match);
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
  const decision = { ...item, submission, labels };
  returned.delete(item.row);
  pending.set(submission, decision);
  showMessage("");
  applied = decision.isStored = send("decisions", { row: item.row, submission, labels }).then((reply) => {
    pending.delete(submission);
    apply(reply);
    refreshReport();
    return true;
  }, (problem) => {
    pending.delete(submission);
    returned.set(item.row, { ...decision, text: baseName(item.path) + " was not saved: " + problem.message + "." });
    showReturned();
    if (problem.status === 401 || problem.status === 403) showSetup(["key"], problem.message);
    else if (!current && !isUndoing) showNext();
    return false;
  });
  current = null;
  showNext();
  showReturned();
}

/** Why decisions were rejected, until they are decided again. */
function showReturned() {
  if (returned.size) showMessage([...returned.values()].map((each) => each.text).join(" "), true);
}

/** Undo the newest decision of this moment, also if it is not answered yet. */
async function undo() {
  const sent = [...pending.values()].at(-1);
  const decision = sent || work.last;
  if (isUndoing || !decision) return;
  isUndoing = true;
  renderPanel();
  try {
    if (sent && !(await sent.isStored)) {  // there is nothing to undo
      isUndoing = false;
      if (byId("work").hidden) return;
      return show(decision, isMultilabel() ? decision.labels || [] : undefined);
    }
    const reply = await send("undo", { submission: decision.submission });
    isUndoing = false;
    current = null;
    apply(reply, decision.row !== null);
    if (decision.row !== null) show(decision, isMultilabel() ? decision.labels || [] : undefined);
    showMessage("Undone: " + baseName(decision.path) + (decision.labels ? " was " + (decision.labels.join(", ") || "no class") : " was skipped"));
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
  items = [...returned.values(), ...work.assigned.filter((item) => !returned.has(item.row))].filter(isOpen);
  const done = work.labeled + work.skipped;
  byId("bar").max = Math.max(done + work.remaining, 1);
  byId("bar").value = done;
  const skipped = work.skipped ? ", " + work.skipped + " skipped" : "";
  byId("counts").textContent = work.labeled + " labeled" + skipped + ", " + work.remaining + " left";
  if (!current && !keepsImage) showNext();
  preload();
  forgetImages();
  renderPanel();
}

const isOpen = (item) => ![...pending.values()].some((each) => each.row === item.row);

/** Show the first image that was returned, else the first one that is assigned. */
function showNext() {
  const next = [...returned.values(), ...items].find(isOpen);
  if (next) return show(next, isMultilabel() && returned.get(next.row)?.labels || undefined);
  byId("image").hidden = true;
  byId("image").removeAttribute("src");
  byId("caption").textContent = byId("suggestion").textContent = "";
  if (pending.size) showStatus("Saving");
  else if (work.remaining) showStatus(plural(work.remaining, "image") + " left, assigned to other annotators. Load the page again later.");
  else showStatus("All images are done.");
  renderPanel();
}

// ---------------------------------------------------------------- events

addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || byId("work").hidden || !byId("setup").hidden) return;
  const element = event.target.closest("input, button, summary");
  if (element?.tagName === "INPUT" || (element && (event.key === "Enter" || event.key === " "))) return;
  const shown = !getSearchText() && current ? listShownClasses() : [];
  const place = assignKeys(shown).indexOf(event.key.toLowerCase());
  if (event.key === "/" && !byId("search_field").hidden) {
    event.preventDefault();
    return byId("search").focus();
  }
  const skip = () => decide(null);
  const actions = { Enter: confirm, Backspace: undo, Delete: skip };
  if (isFree("z")) actions.z = undo;
  if (isFree("s")) actions.s = skip;
  if (getSearchText()) actions.Escape = clearSearch;
  const action = actions[event.key.length === 1 ? event.key.toLowerCase() : event.key];
  if (action === undefined && !(place in shown)) return;
  event.preventDefault();
  if (event.repeat) return;
  if (action) action();
  else choose(shown[place]);
});

byId("search").addEventListener("input", renderPanel);
byId("search").addEventListener("keydown", (event) => {
  if (event.key === "Escape") clearSearch();
  else if (event.key === "Enter" && !event.repeat) {
    event.preventDefault();
    confirm();
  } else if (event.key === "ArrowDown") {
    event.preventDefault();
    byId("classes").firstElementChild?.focus();
  }
});
byId("accept").addEventListener("click", accept);
byId("undo").addEventListener("click", undo);
byId("skip").addEventListener("click", () => decide(null));
byId("change").addEventListener("click", change);
byId("retry").addEventListener("click", retry);
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
