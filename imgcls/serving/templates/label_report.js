// Progress and agreement, at the bottom of the labeling page.

const REPORT_INTERVAL_S = 30;
let reportedAt = 0;
let reportTimer = null;

function createTable(title, names, rows) {
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
  box.tabIndex = 0;  // else the keyboard cannot scroll it
  box.setAttribute("role", "region");
  box.setAttribute("aria-label", title);
  box.append(table);
  return box;
}

/** Refresh an open report after a decision, at most every REPORT_INTERVAL_S. */
function refreshReport() {
  if (reportTimer || !byId("overview").open) return;
  const wait = Math.max(0, reportedAt + 1000 * REPORT_INTERVAL_S - Date.now());
  reportTimer = setTimeout(() => {
    reportTimer = null;
    if (byId("overview").open) showReport();
  }, wait);
}

async function showReport() {
  let found;
  reportedAt = Date.now();
  try {
    await applied;
    found = await request("progress");
  } catch (problem) {
    return byId("report").replaceChildren(create("p", "message error", problem.message));
  }
  const parts = [create("p", "", found.complete + " of " + plural(found.images, "image") + " complete, with " + plural(queue.annotations_per_image, "label") + " per image")];
  if (found.annotators.length) {
    parts.push(createTable("Annotators", ["Annotator", "Labeled", "Skipped"], found.annotators.map((each) => [each.name, each.labeled, each.skipped])));
  }
  if (found.agreements.length) {
    parts.push(create("h2", "", "Agreement"), createTable("Agreement", ["Annotators", "Images of both", "Same labels", "Cohen’s kappa"],
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
