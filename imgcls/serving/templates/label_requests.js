// Requests of the labeling page.

let sending = Promise.resolve();

/** Whether a request may succeed later; status 0: there was no answer. */
const isTemporary = (status) => status === 0 || status === 429 || status >= 500;

class Rejected extends Error {
  constructor(status, problem) {
    super(problem.detail || problem.title || "error " + status);
    this.status = status;
    this.mayPass = isTemporary(status);
  }
}

/** Send a request until it is answered; `tries` limits the attempts after failures that may pass. */
async function request(path, { body, tries = 5, onWait, authorization = headers() } = {}) {
  const options = { headers: { ...authorization } };
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
    if (!isTemporary(response ? response.status : 0) || attempt >= tries) {
      const kind = response?.headers.get("Content-Type") || "";
      if (response) throw new Rejected(response.status, kind.includes("json") ? await response.json() : {});
      throw new Rejected(0, { detail: "The server cannot be reached." });
    }
    if (onWait) onWait();
    await sleep(Math.min(Number(response?.headers.get("Retry-After")) || 2 ** (attempt - 1), 10));
  }
}

/** Send changes of labels one after another, each until it is stored or rejected.
 *
 * A change belongs to the annotator at the time of the call, also if it is sent again later.
 */
function send(path, body) {
  const authorization = headers();
  let hasWaited = false;
  const onWait = () => {
    hasWaited = true;
    showMessage(plural(Math.max(pending.size, 1), "decision") + " not saved yet. Trying again.", true);
  };
  const common = { queue: queue.queue, ...(queue.annotator ? {} : { annotator: getName() }) };
  const sent = sending.then(() => request(path, { body: { ...common, ...body }, tries: Infinity, onWait, authorization }));
  sending = sent.catch(() => null);
  return sent.then((reply) => {
    if (hasWaited) showMessage("Saved.");
    if (hasWaited) showReturned();
    return reply;
  });
}
