// Functions of all pages.

function element(tag, properties = {}, ...children) {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...children.filter(child => child !== null));
  return made;
}

/** Save objects as a file with one line of JSON for each. */
function download(objects, name) {
  const lines = objects.map(object => JSON.stringify(object) + "\n");
  const link = element("a", {href: URL.createObjectURL(new Blob(lines, {type: "application/jsonl"})), download: name});
  link.click();
  URL.revokeObjectURL(link.href);
}
