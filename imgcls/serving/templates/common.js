const byId = (id) => document.getElementById(id);
const create = (name, style, text) => {
  const element = document.createElement(name);
  if (style) element.className = style;
  if (text !== undefined) element.textContent = text;
  return element;
};
const showMessage = (text, isError) => {
  byId("message").textContent = text;
  byId("message").className = isError ? "message error" : "message";
};
const percent = (value) => (100 * value).toFixed(1) + " %";
const sleep = (seconds) => new Promise((done) => setTimeout(done, 1000 * seconds));
const headers = () => {
  const key = byId("key").value.trim();
  return key ? { Authorization: "Bearer " + key } : {};
};
// not allowed in a header: fetch would fail without naming the reason
const isKeyMalformed = () => /[^\x21-\x7e]/.test(byId("key").value.trim());
const KEY_MALFORMED = "The API key contains invalid characters. Copy it again.";

