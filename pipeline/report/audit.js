// Shows the texts of an audit one at a time. Verdicts are stored in this browser, by reviewer, until they are exported.
// Untrusted text is only assigned to textContent.

const FIELDS = ["text", "question", "answer", "value", "expression"];
const NAME_KEY = `synth-audit-${audit.digest} reviewer`;
const byId = id => document.getElementById(id);
const state = {reviewer: "", at: 0, verdicts: new Map(), undo: []};
let isStored = true; // whether this browser stores verdicts

function keyOf(item) { return `synth-audit-${audit.digest}-${audit.seed} ${state.reviewer} ${nameOf(item)}`; }
function nameOf(item) { return `${item.id} ${item.text.content}${item.repeat ? " repeat" : ""}`; }

/** Read or write a value of this browser's storage, which may be unavailable. */
function stored(key, value) {
  try {
    if (value === undefined) return localStorage.getItem(key);
    if (value === null) localStorage.removeItem(key);
    else localStorage.setItem(key, value);
  } catch { isStored = false; window.onbeforeunload = () => state.verdicts.size ? "" : undefined; }
  return null;
}

/** Resume the audit of a reviewer at the first text without a verdict. */
function start(reviewer) {
  state.reviewer = reviewer;
  state.verdicts.clear();
  state.undo = [];
  stored(NAME_KEY, reviewer);
  const applied = new Map(audit.verdicts.filter(made => made.reviewer === reviewer).map(made => [`${made.sample_id} ${made.content}${made.repeat ? " repeat" : ""}`, made]));
  for (const item of audit.items) {
    const before = applied.get(nameOf(item)), made = stored(keyOf(item));
    if (made) state.verdicts.set(nameOf(item), JSON.parse(made));
    else if (before && made !== "") state.verdicts.set(nameOf(item), {verdict: before.verdict, error: before.error});
  }
  byId("who").hidden = true;
  byId("work").hidden = false;
  const first = audit.items.findIndex(item => !state.verdicts.has(nameOf(item)));
  show(first < 0 ? 0 : first);
}

function show(at) {
  state.at = Math.min(Math.max(at, 0), audit.items.length - 1);
  const item = audit.items[state.at], images = audit.pictures[item.id], pages = images.length;
  byId("pictures").replaceChildren(...images.map((src, page) => src
    ? element("img", {src, alt: pages > 1 ? `page ${page + 1}` : "the image of the text"})
    : element("p", {className: "soft", textContent: "no picture"})));
  byId("about").textContent = [item.from, item.text.kind, item.text.evidence_pages && `pages ${item.text.evidence_pages.join(", ")}`].filter(Boolean).join(" \u00b7 ");
  byId("words").replaceChildren(...FIELDS.filter(name => item.text[name]).map(name =>
    element("p", {className: name, textContent: item.text[name]})));
  update();
}

/** Store a verdict on the text that is shown. Null removes the verdict. */
function judge(made, at = state.at, keepsUndo = true) {
  const item = audit.items[at], name = nameOf(item);
  if (keepsUndo) state.undo.push([at, state.verdicts.get(name) ?? null]);
  if (made) state.verdicts.set(name, made);
  else state.verdicts.delete(name);
  stored(keyOf(item), made ? JSON.stringify(made) : "");
  update();
}

function update() {
  const counts = {right: 0, wrong: 0, cannot_tell: 0};
  for (const made of state.verdicts.values()) counts[made.verdict] += 1;
  const done = state.verdicts.size, total = audit.items.length;
  byId("state").textContent = `${state.reviewer}: ${done} of ${total} reviewed (${counts.right} right, ${counts.wrong} wrong, ${counts.cannot_tell} unclear)`;
  Object.assign(byId("done"), {max: total, value: done});
  const made = state.verdicts.get(nameOf(audit.items[state.at]));
  for (const button of document.querySelectorAll("[data-verdict]")) button.setAttribute("aria-pressed", String(made?.verdict === button.dataset.verdict));
  for (const button of document.querySelectorAll("[data-error]")) button.setAttribute("aria-pressed", String(made?.verdict === "wrong" && made.error === button.dataset.error));
  const warning = differing();
  byId("hint").textContent = [done === total ? "All texts are reviewed: export your verdicts." : `Text ${state.at + 1} of ${total}`, warning].filter(Boolean).join(" ");
  byId("hint").classList.toggle("warning", Boolean(warning));
  byId("undo").disabled = !state.undo.length;
  byId("export").disabled = !done;
}

/** Warn if more than one in five texts that were shown twice have two verdicts. */
function differing() {
  const pairs = audit.items.filter(item => item.repeat).map(item => [item, {...item, repeat: false}].map(one => state.verdicts.get(nameOf(one))?.verdict));
  const judged = pairs.filter(pair => pair.every(verdict => verdict === "right" || verdict === "wrong"));
  const count = judged.filter(([first, second]) => first !== second).length;
  return count > 1 && count > judged.length / 5 ? `Your verdicts differ on ${count} of ${judged.length} texts that you judged twice. This is too many for a useful audit: look more closely.` : "";
}

/** Show the next text without a verdict, or stay if there is none. */
function advance() {
  const open = audit.items.map((item, n) => n).filter(n => !state.verdicts.has(nameOf(audit.items[n])));
  const next = open.find(n => n > state.at) ?? open[0];
  if (next !== undefined) show(next);
  else update();
  document.activeElement.blur();
}

function decide(verdict, error = "other") {
  judge({verdict, error});
  advance();
}

function undo() {
  const last = state.undo.pop();
  if (!last) return;
  show(last[0]);
  judge(last[1], last[0], false);
}

function exportVerdicts() {
  const verdicts = audit.items.flatMap(item => {
    const made = state.verdicts.get(nameOf(item));
    return made ? [{seed: audit.seed, reviewer: state.reviewer, sample_id: item.id, content: item.text.content, verdict: made.verdict, error: made.error, repeat: item.repeat}] : [];
  });
  const name = `audit-${audit.version}-${state.reviewer.replace(/[^\p{L}\p{N}]+/gu, "-")}.jsonl`;
  download(verdicts, name);
  byId("hint").classList.remove("warning");
  byId("hint").textContent = `exported; apply the verdicts with: synth review apply ${name}`;
}

const KEYS = {
  r: () => decide("right"), w: () => decide("wrong"), c: () => decide("cannot_tell"), u: undo,
  j: () => show(state.at + 1), k: () => show(state.at - 1),
  ...Object.fromEntries(audit.errors.map((error, n) => [n + 1, () => decide("wrong", error)])),
};

document.addEventListener("keydown", event => {
  if (byId("work").hidden || event.ctrlKey || event.metaKey || event.altKey) return;
  const act = KEYS[event.key];
  if (!act) return;
  event.preventDefault();
  act();
});
for (const button of document.querySelectorAll("[data-verdict]")) button.addEventListener("click", () => decide(button.dataset.verdict));
for (const button of document.querySelectorAll("[data-error]")) button.addEventListener("click", () => decide("wrong", button.dataset.error));
byId("undo").addEventListener("click", undo);
byId("export").addEventListener("click", exportVerdicts);
byId("back").addEventListener("click", KEYS.k);
byId("next").addEventListener("click", KEYS.j);
byId("leave").addEventListener("click", () => {
  stored(NAME_KEY, null);
  byId("work").hidden = true;
  byId("who").hidden = false;
  byId("reviewer").focus();
});
byId("who").addEventListener("submit", event => {
  event.preventDefault();
  const reviewer = byId("reviewer").value.trim();
  if (reviewer) start(reviewer);
});
if (stored(NAME_KEY)) start(stored(NAME_KEY));
else byId("reviewer").focus();
