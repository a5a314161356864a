"use strict";
const at = (id) => document.getElementById(id);
const MAX_BYTES = 32e6;  // of a photo, as the server takes it
const photos = [];  // {name, address, card, text}: the last that was given first
let queue = Promise.resolve();

async function start() {
  const about = await (await fetch("api/captioner")).json();
  at("name").textContent = document.title = about.name;
  for (const style of about.styles) at("style").add(new Option(style, style, style === about.style, style === about.style));
  at("question-label").hidden = !about.answers;
}

function say(text, isBad = false) {
  at("status").textContent = text;
  at("status").classList.toggle("bad", isBad);
}

function read(file) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result);
    reader.onerror = () => reject(new Error(`${file.name} cannot be read`));
    reader.readAsDataURL(file);
  });
}

async function add(files) {
  for (const file of files) {
    if (!file.type.startsWith("image/")) say(`${file.name} is not an image`, true);
    else if (file.size > MAX_BYTES) say(`${file.name} has more than ${MAX_BYTES / 1e6} MB`, true);
    else {
      const card = at("card").content.firstElementChild.cloneNode(true);
      const photo = {name: file.name || "the photo", address: await read(file), card};
      const remove = card.querySelector(".remove"), copying = card.querySelector(".copy");
      remove.setAttribute("aria-label", `Remove ${photo.name}`);
      remove.onclick = () => { card.remove(); photos.splice(photos.indexOf(photo), 1); at("files").focus(); };
      copying.setAttribute("aria-label", `Copy what is said of ${photo.name}`);
      copying.onclick = () => copy(photo);
      photos.unshift(photo);
      at("photos").prepend(card);
      ask(photo);
    }
  }
}

function ask(photo) {  // one after another: the captioner reads one at a time
  photo.card.querySelector(".text").textContent = "...";
  const question = at("question").value.trim(), style = question ? null : at("style").value;
  queue = queue.then(() => photos.includes(photo) ? look(photo, style, question) : null);
}

async function look(photo, style, question) {
  say(`looking at ${photo.name}`);
  const body = JSON.stringify({image: photo.address, style, question});
  try {
    const answer = await fetch("api/look", {method: "POST", headers: {"Content-Type": "application/json"}, body});
    const value = await answer.json();
    if (!answer.ok) throw new Error(value.error.message);
    await show(photo, value);
    say("");
  } catch (error) {
    photo.text = "";
    photo.card.querySelector(".text").textContent = `${photo.name}: ${error.message}`;
    say(`${photo.name}: ${error.message}`, true);
  }
  photo.card.querySelector(".text").classList.toggle("bad", !photo.text);
}

async function show(photo, value) {
  const {card} = photo, words = card.querySelector(".words"), others = card.querySelector(".others");
  photo.text = value.text;
  card.querySelector(".text").textContent = value.text || "(nothing)";
  const image = new Image();
  image.src = value.seen;
  await image.decode();
  const canvas = card.querySelector("canvas");
  const paint = (shares) => draw(canvas, image, shares);
  canvas.setAttribute("aria-label", `${photo.name}: ${value.text}`);
  paint(null);
  words.replaceChildren(...value.words.map(({word, shares}) => {
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = word || "(space)";
    button.setAttribute("aria-pressed", "false");
    const press = (isOn) => {
      for (const other of words.children) other.setAttribute("aria-pressed", String(isOn && other === button));
      paint(isOn ? shares : null);
    };
    button.onclick = () => press(button.getAttribute("aria-pressed") === "false");
    button.onmouseenter = () => paint(shares);
    button.onmouseleave = () => { const on = [...words.children].findIndex((one) => one.getAttribute("aria-pressed") === "true"); paint(on < 0 ? null : value.words[on].shares); };
    return button;
  }));
  others.replaceChildren(...value.alternatives.filter(({text}) => text !== value.text).map(({text, likelihood}) => {
    const item = document.createElement("li"), score = document.createElement("span");
    score.textContent = ` ${Math.round(100 * Math.exp(likelihood))} % a token`;
    item.append(text, score);
    return item;
  }));
}

function draw(canvas, image, shares) {
  const pen = canvas.getContext("2d"), side = canvas.width;
  pen.globalCompositeOperation = "source-over";
  pen.clearRect(0, 0, side, side);
  pen.drawImage(image, 0, 0, side, side);
  if (!shares) return;
  const most = Math.max(...shares.flat(), 1e-9), small = new OffscreenCanvas(shares[0].length, shares.length);
  const dots = small.getContext("2d"), pixels = dots.createImageData(small.width, small.height);
  shares.flat().forEach((share, index) => { pixels.data[4 * index + 3] = 190 * (1 - share / most); });  // black where it does not look
  dots.putImageData(pixels, 0, 0);
  pen.imageSmoothingEnabled = true;
  pen.drawImage(small, 0, 0, side, side);
}

async function copy(photo) {
  const done = photo.card.querySelector(".done");
  try {
    await navigator.clipboard.writeText(photo.text || "");
    done.textContent = "copied";
  } catch {
    done.textContent = "the browser does not let pages copy: select the text";
  }
}

const give = (files) => add([...files]).catch((error) => say(error.message, true));
at("files").onchange = (event) => { const files = [...event.target.files]; event.target.value = ""; give(files); };
at("ask").onsubmit = (event) => { event.preventDefault(); photos.length ? photos.forEach(ask) : say("there are no photos yet"); };
for (const name of ["dragover", "dragleave", "drop"]) document.addEventListener(name, (event) => {
  event.preventDefault();
  at("drop").classList.toggle("over", name === "dragover");
  if (name === "drop") give(event.dataTransfer.files);
});
document.addEventListener("paste", (event) => { if (event.clipboardData.files.length) give(event.clipboardData.files); });
start().catch((error) => say(`the captioner does not answer: ${error.message}`, true));
