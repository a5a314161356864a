// Shows the rows that `add` receives, page by page, and stores reviews in this browser until they are exported.
// Untrusted text is only assigned to textContent and value.

const PER_PAGE = {images: 48, rejected: 100};
// Each review has its own key: with one key for all reviews, two tabs would overwrite each other's reviews.
const KEY_PREFIX = `synth-reviews-${report.digest} `;
const REASONS = {not_true: "not true of the image", unclear: "unclear or badly worded", trivial: "trivial",
  private: "private or offensive", other: "another reason"};
const FIELDS = ["text", "question", "answer", "evidence_pages", "expression"];
const lists = {};
const reviews = new Map(); // name of a text -> review
const pictures = new Map(); // sample id -> URL of the first image
let isStored = true; // whether this browser stores reviews

function add(kind, items) {
  if (kind === "images") for (const item of items) pictures.set(item.id, item.images[0]);
  lists[kind].take(items);
}

/** A list with a search, filters, an order and pages. Only one page is in the document. */
class List {
  constructor(kind, filters, draw, words, rank) {
    Object.assign(this, {kind, filters, draw, words, rank, items: [], found: [], page: 0});
    this.root = document.getElementById(kind);
    this.body = this.root.querySelector("[data-body]");
    this.search = this.root.querySelector("input[type=search]");
    this.search.addEventListener("input", () => this.filter());
    for (const name in filters) this.select(name).addEventListener("change", () => this.filter());
    this.order = this.select("order");
    this.order?.addEventListener("change", () => this.filter());
    for (const button of this.root.querySelectorAll("[data-turn]")) {
      button.addEventListener("click", () => this.turn(Number(button.dataset.turn)));
    }
  }

  select(name) { return this.root.querySelector(`select[name=${name}]`); }

  take(items) {
    for (const item of items) item.searched = this.words(item).join("\n").toLowerCase();
    this.items.push(...items);
    for (const [name, values] of Object.entries(this.filters)) {
      const select = this.select(name), known = new Set([...select.options].map(option => option.value));
      const found = name === "review" ? [] : new Set(items.flatMap(values));
      for (const value of [...found].filter(value => !known.has(value)).sort()) select.add(new Option(value, value));
      select.parentElement.hidden = name === "folder" && select.options.length < 3; // hidden if the only options are "all" and one folder
    }
    this.filter(false);
  }

  filter(fromStart = true) {
    if (!fromStart && this.order?.value && this.body.querySelector("form")) return; // keep an open edit in place
    const wanted = this.search.value.toLowerCase();
    const chosen = Object.entries(this.filters).map(([name, values]) => [this.select(name).value, values]).filter(([value]) => value);
    this.found = this.items.filter(item => item.searched.includes(wanted) && chosen.every(([value, values]) => values(item).includes(value)));
    if (this.order?.value) {
      const ranks = new Map(this.found.map(item => [item, this.rank(item, this.order.value)]));
      this.found.sort((one, other) => ranks.get(one) - ranks.get(other));
    }
    if (fromStart) this.page = 0;
    this.show();
  }

  turn(by) {
    this.page = Math.min(Math.max(this.page + by, 0), this.pages - 1);
    this.show();
    this.root.scrollIntoView();
  }

  get pages() { return Math.max(1, Math.ceil(this.found.length / PER_PAGE[this.kind])); }

  show() {
    this.page = Math.min(this.page, this.pages - 1);
    const first = this.page * PER_PAGE[this.kind];
    const shown = this.found.slice(first, first + PER_PAGE[this.kind]);
    if (!this.shown || shown.length !== this.shown.length || shown.some((item, at) => item !== this.shown[at])) {
      this.body.replaceChildren(...shown.map(this.draw)); // only if the page changes: the user may be reading it
      this.shown = shown;
    }
    const range = shown.length ? `${first + 1} to ${first + shown.length} of ` : "";
    this.root.querySelector("output").textContent = `${range}${this.found.length} found, ${this.items.length} in this report`;
    for (const button of this.root.querySelectorAll("[data-turn]")) {
      button.hidden = this.pages === 1;
      button.disabled = Number(button.dataset.turn) < 0 ? this.page === 0 : this.page === this.pages - 1;
    }
  }
}

function drawImage(row) {
  const said = row.texts.find(text => text.text), boxes = row.texts.filter(text => text.box);
  const pictures = row.images.map((source, page) => source
    ? picture(source, `${said ? said.text : row.id}${row.images.length > 1 ? `, page ${page + 1}` : ""}`, page ? [] : boxes, row.size)
    : element("p", {className: "soft", textContent: "no picture"}));
  const [folder, name] = /^(.*\/)?([^]*)$/.exec(row.from || row.id).slice(1);
  const about = element("div", {className: "about"}, element("code", {}, element("span", {className: "soft", textContent: folder ?? ""}), name), element("span", {className: "tag", textContent: row.split}));
  const references = folded("reference captions", row.references), context = folded("context", row.context);
  const texts = element("ul", {className: "texts"}, ...row.texts.map(text => drawText(row, text)));
  return element("article", {className: `box card${row.small ? " small" : ""}`}, ...pictures, about, texts, context, references);
}

/** Return a section of texts that a click opens, or null without texts. */
function folded(title, texts) {
  return texts.length
    ? element("details", {}, element("summary", {textContent: title}), ...texts.map(text => element("p", {textContent: text})))
    : null;
}

/** Return a picture that a click enlarges to the size of the window. */
function picture(source, alt, boxes = [], size = []) {
  const image = element("img", {loading: "lazy", src: source, alt});
  const button = element("button", {type: "button", className: "picture"}, image, boxes.length ? drawBoxes(boxes, size) : null);
  button.setAttribute("aria-label", `Enlarge: ${alt}`);
  button.addEventListener("click", () => enlarge(source, alt, boxes, size));
  return button;
}

/** Return boxes to draw over a picture, in pixels of the picture. */
function drawBoxes(boxes, [width, height]) {
  const svg = shape("svg", {class: "boxes", viewBox: `0 0 ${width} ${height}`, "aria-hidden": "true"});
  const letters = Math.max(width, height) / 22; // height in pixels of the picture
  for (const {box: [left, top, right, bottom], label} of boxes) {
    svg.append(shape("rect", {x: left, y: top, width: Math.max(0, right - left), height: Math.max(0, bottom - top)}));
    svg.append(shape("text", {x: left + letters / 4, y: top + letters, "font-size": letters}, label));
  }
  return svg;
}

function shape(tag, attributes, text = "") {
  const made = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  made.textContent = text;
  return made;
}

function enlarge(source, alt, boxes, size) {
  const dialog = document.getElementById("large");
  dialog.querySelector(".boxes")?.remove();
  dialog.querySelector("img").replaceWith(element("img", {src: source, alt}));
  if (boxes.length) dialog.querySelector("img").after(drawBoxes(boxes, size));
  dialog.showModal();
}

function drawText(row, text) {
  const item = element("li", {tabIndex: -1});
  item.review = kind => review(row, text, kind, item);
  item.update = () => item.querySelector("form") || fill(item, row, text);
  return fill(item, row, text);
}

/** Fill a list item with a text and its review. */
function fill(item, row, text) {
  const made = reviews.get(nameOf(row, text));
  const now = made && made.verdict === "edited" ? {...text, ...made} : text;
  const words = now.text !== undefined || now.value !== undefined
    ? [element("p", {textContent: now.text ?? now.value})]
    : [element("p", {textContent: now.question}), element("p", {className: "answer", textContent: now.answer})];
  const proof = [now.evidence_pages ? `pages ${now.evidence_pages.join(", ")}` : "", now.expression || ""].filter(Boolean).join("; ");
  if (proof) words.push(element("p", {className: "style", textContent: proof}));
  if (text.scores && now === text) words.push(element("p", {className: "style", textContent: scoresOf(text)}));
  const buttons = Object.entries({good: "Good", bad: "Bad", edited: "Edit"}).map(([kind, label]) => {
    const button = element("button", {type: "button", textContent: label, disabled: kind === "edited" && isFixed(text)});
    button.setAttribute("aria-pressed", String(Boolean(made) && made.verdict === kind));
    button.addEventListener("click", () => review(row, text, kind, item));
    return button;
  });
  item.className = made ? made.verdict : "";
  const head = element("div", {className: "review"}, element("span", {className: "style", textContent: text.kind}), ...buttons);
  item.replaceChildren(head, ...words, ...(made && made.verdict === "bad" ? [element("div", {className: "review"}, ...why(nameOf(row, text)))] : []));
  return item;
}

/** Return whether a text cannot be edited here: it is cut, or it is a value of a custom task. */
function isFixed(text) { return Boolean(text.cut) || text.value !== undefined; }

function scoresOf(text) {
  return Object.entries(text.scores).map(([name, score]) => `${name.replace("_", " ")} ${score}`).join("; ");
}

/** Return the lowest score of the shown texts of a row. Rows without a score sort last. */
function lowest(row, name) {
  const kind = lists.images.select("kind").value;
  return Math.min(...row.texts.filter(text => !kind || text.kind === kind).map(text => text.scores?.[name] ?? 1e9), 1e9);
}

/** Return the fields for the reason of a bad text, and a note. */
function why(name) {
  const made = reviews.get(name);
  const select = element("select", {}, ...report.reasons.map(reason => new Option(REASONS[reason] || reason, reason)));
  select.setAttribute("aria-label", "Why it is bad");
  select.value = made.reason;
  select.addEventListener("change", () => change(name, now => ({...now, reason: select.value})));
  const note = element("input", {type: "text", value: made.note || "", placeholder: "note", maxLength: 1000});
  note.setAttribute("aria-label", "Note");
  note.addEventListener("input", () => change(name, now => ({...now, note: note.value})));
  return [select, note];
}

/** Review a text. Repeating the same review removes it. */
function review(row, text, kind, item) {
  const name = nameOf(row, text), about = {sample_id: row.id, content: text.content, verdict: kind};
  if (kind === "edited") return isFixed(text) ? undefined : edit(row, text, item, about);
  const made = kind === "bad" ? {...about, reason: report.reasons[0]} : about;
  if (reviews.get(name)?.verdict === "edited" && !confirm("This discards your edit of this text. Continue?")) return undefined;
  change(name, now => now?.verdict === kind ? null : made);
  fill(item, row, text);
  item.focus();
  return undefined;
}

/** Replace a text by fields to edit it. Saving the original words removes the edit. */
function edit(row, text, item, about) {
  const name = nameOf(row, text), words = {...text, ...text.raw}, now = {...words, ...reviews.get(name)};
  const names = FIELDS.filter(name => words[name] !== undefined);
  const fields = names.map(name => {
    const field = element("textarea", {value: String(now[name]), rows: name === "text" ? 4 : 2});
    field.setAttribute("aria-label", name.replace("_", " "));
    return field;
  });
  const tidy = text => String(text).trim().replace(/\s+/g, " ");
  const done = () => { fill(item, row, text); item.focus(); };
  const save = element("button", {type: "submit", textContent: "Save"});
  const cancel = element("button", {type: "button", textContent: "Cancel"});
  const note = element("output", {className: "soft"});
  const form = element("form", {className: "edit"}, ...fields, element("div", {className: "review"}, save, cancel, note));
  cancel.addEventListener("click", done);
  const isChanged = () => fields.some((field, at) => tidy(field.value) !== tidy(now[names[at]]));
  form.addEventListener("keydown", event => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) { event.preventDefault(); form.requestSubmit(); }
    if (event.key !== "Escape") return;
    if (isChanged()) note.textContent = "changed: Ctrl+Enter saves the edit, Cancel discards it";
    else done();
  });
  form.addEventListener("submit", event => {
    event.preventDefault();
    const typed = fields.map(field => tidy(field.value));
    const same = typed.every((value, at) => value === tidy(words[names[at]]));
    const made = {...about, ...Object.fromEntries(names.map((name, at) => [name, name === "evidence_pages"
      ? typed[at].split(/[^0-9]+/).filter(Boolean).map(Number) : typed[at]]))};
    change(name, () => same ? null : made);
    done();
  });
  item.replaceChildren(form);
  fields[0].focus();
  return undefined;
}

function nameOf(row, text) { return `${row.id} ${text.content}`; }

function verdictsOf(row) { return row.texts.map(text => reviews.get(nameOf(row, text))?.verdict || "not reviewed"); }

/** Read the reviews of this browser: another tab may have added some. */
function readReviews() {
  if (!isStored) return;
  const stored = new Map();
  try {
    for (const key of keysOfReviews()) stored.set(key.slice(KEY_PREFIX.length), JSON.parse(localStorage.getItem(key)));
  } catch { isStored = false; return; }
  reviews.clear();
  for (const [name, made] of stored) if (made) reviews.set(name, made);
}

function keysOfReviews() {
  return Array.from({length: localStorage.length}, (_, at) => localStorage.key(at)).filter(key => key.startsWith(KEY_PREFIX));
}

/** Replace a review by `become(review)`. Null removes the review. */
function change(name, become) {
  readReviews();
  const made = become(reviews.get(name));
  if (made) reviews.set(name, made);
  else reviews.delete(name);
  store(name);
}

/** Store a review in this browser, or its removal. */
function store(name) {
  const made = reviews.get(name);
  try {
    if (made) localStorage.setItem(KEY_PREFIX + name, JSON.stringify(made));
    else localStorage.removeItem(KEY_PREFIX + name);
  } catch { isStored = false; }
  if (!isStored) window.onbeforeunload = () => reviews.size ? "" : undefined;
  count();
}

function count() {
  const counts = {good: 0, bad: 0, edited: 0};
  for (const made of reviews.values()) counts[made.verdict] += 1;
  document.getElementById("reviewed").textContent = reviews.size ? `${counts.good} good, ${counts.bad} bad, ${counts.edited} edited` : "nothing reviewed yet";
  document.getElementById("export").disabled = document.getElementById("forget").disabled = !reviews.size;
}

function exportReviews() {
  for (const form of document.querySelectorAll("#images form.edit")) form.requestSubmit(); // save open edits
  const name = `reviews-${report.version}.jsonl`;
  download([...reviews.values()], name);
  document.getElementById("reviewed").textContent = `exported; apply them with: synth review apply ${name}`;
}

function drawRejected(row) {
  const sources = [row.id, row.repeats].map(id => report.pictures[id] || pictures.get(id)).filter(Boolean);
  const shown = sources.map((source, at) => picture(source, at ? row.what : row.where));
  const name = element("code", {textContent: shortened(row.where), title: row.where});
  return element("tr", {}, element("td", {textContent: row.step}), element("td", {className: "bad", textContent: row.reason}),
    element("td", {className: "thumb"}, ...shown, name), element("td", {className: "text", textContent: row.what}));
}

/** Return the end of a long path. */
function shortened(where) {
  return where.length > 40 ? `\u2026${where.slice(-39)}` : where;
}

function folderOf(where) { return where.slice(0, Math.max(0, where.lastIndexOf("/"))) || "/"; }

/** Focus another text on this page. */
function step(by) {
  const items = [...document.querySelectorAll("#images .texts > li")];
  const at = items.indexOf(document.activeElement.closest?.(".texts > li"));
  const next = items[at < 0 ? 0 : Math.min(Math.max(at + by, 0), items.length - 1)];
  next?.focus();
  next?.scrollIntoView({block: "nearest"});
}

const KEYS = {
  j: () => step(1), k: () => step(-1), n: () => lists.images.turn(1), p: () => lists.images.turn(-1),
  g: item => item?.review("good"), b: item => item?.review("bad"), e: item => item?.review("edited"),
  o: item => item?.closest("article").querySelector(".picture")?.click(),
  "/": () => { document.querySelector(".filters").open = true; lists.images.search.focus(); }, "?": () => document.getElementById("keys").showModal(),
};

document.addEventListener("keydown", event => {
  const typing = event.target.closest("input, textarea, select, dialog[open]");
  if (typing || event.ctrlKey || event.metaKey || event.altKey || !KEYS[event.key]) return;
  event.preventDefault();
  KEYS[event.key](document.activeElement.closest(".texts > li"));
});
document.getElementById("export").addEventListener("click", exportReviews);
document.getElementById("forget").addEventListener("click", () => {
  if (!confirm("Delete all reviews in this browser?")) return;
  try { for (const key of keysOfReviews()) localStorage.removeItem(key); } catch { isStored = false; }
  reviews.clear();
  count();
  lists.images.shown = null;
  lists.images.show();
});
document.getElementById("large").addEventListener("click", event => event.currentTarget.close());
if (innerWidth < 600) document.querySelector(".filters").open = false; // so that the first photo is visible
document.getElementById("help").addEventListener("click", () => KEYS["?"]());
/** Show the reviews of other tabs. */
function refresh() {
  count();
  for (const item of document.querySelectorAll("#images .texts > li")) item.update();
}

window.addEventListener("focus", () => { // a new tab may miss a storage event
  const before = JSON.stringify([...reviews]);
  readReviews();
  if (JSON.stringify([...reviews]) !== before) refresh(); // only on a change, since a refresh would replace a button that is being clicked
});
window.addEventListener("storage", event => {
  if (event.key !== null && !event.key.startsWith(KEY_PREFIX)) return;
  readReviews();
  if (event.key !== null) { // the event is newer than the storage that this tab reads
    const name = event.key.slice(KEY_PREFIX.length);
    if (event.newValue) reviews.set(name, JSON.parse(event.newValue));
    else reviews.delete(name);
  }
  refresh();
});

lists.images = new List("images",
  {split: row => [row.split], folder: row => [folderOf(row.from)], kind: row => row.texts.map(text => text.kind), review: verdictsOf}, drawImage,
  row => [row.id, row.from, ...row.references, ...row.context, ...row.texts.flatMap(text => [...FIELDS, "value"].map(name => text[name] ?? ""))], lowest);
lists.rejected = new List("rejected", {step: row => [row.step], reason: row => [row.reason]}, drawRejected, Object.values);
readReviews();
count();
