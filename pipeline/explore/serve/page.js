"use strict";

// Names come from files, so they are only ever set as text, never as HTML.

const $ = (id) => document.getElementById(id);
const CELL = { wide: 148, narrow: 108, gap: 4, caption: 44 };
const MAX_HEIGHT = 10_000_000; // browsers cut taller elements off
const PICTURES_AT_A_TIME = 24;
const MAX_PICTURES = 1200;
const MAX_ITEMS = 5000;
const MAX_UPLOAD = 32 * 1024 * 1024;
const ERRORS_AT_A_TIME = 100;
const NEIGHBOURS = 60;
const HIT_PIXELS = 14;
const DOUBLE_CLICK = 300; // ms before the details move the pictures
const OTHERS = "#9a9aa3";
const DEGREES = [30, 10, 5, 2, 1, 0.5, 0.2, 0.1, 0.05, 0.02, 0.01, 0.005, 0.002, 0.001, 0.0005];
const VIRIDIS = ["#440154", "#3b528b", "#21918c", "#5ec962", "#fde725"];

let summary = null;
let labels = null;
let view = "images";

// ---------------------------------------------------------------- texts

/** Show characters that a reader cannot see, or that turn the text around, by their codes. */
function shown(text) {
  return String(text).replace(/[\p{C}\p{Zl}\p{Zp}]/gu, (c) => {
    const code = c.codePointAt(0);
    if (code < 0x100) return `\\x${code.toString(16).padStart(2, "0")}`;
    return code < 0x10000 ? `\\u${code.toString(16).padStart(4, "0")}` : `\\U${code.toString(16).padStart(8, "0")}`;
  });
}

const count = (number) => number.toLocaleString("en");
const plural = (number, word) => `${count(number)} ${word}${number === 1 ? "" : "s"}`;
const lastName = (id) => shown(id.split(/[/#]/).filter(Boolean).pop() ?? id);
const rounded = (number) => (number === null || number === undefined ? "" : String(Number(number.toPrecision(3))));

function element(name, className, text) {
  const made = document.createElement(name);
  if (className) made.className = className;
  if (text !== undefined) made.textContent = text;
  return made;
}

function notice(text) {
  $("notice").hidden = !text;
  $("notice").firstElementChild.textContent = text ? shown(text) : "";
}

// ---------------------------------------------------------------- requests

async function answer(request) {
  let response;
  try {
    response = await request;
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Error("The server does not answer: is nightshift serve still running?");
  }
  let content;
  try {
    content = await response.json();
  } catch (error) {
    if (error.name === "AbortError") throw error;
    content = { error: `The server answered with ${response.status}.` };
  }
  if (!response.ok) throw new Error(content.error);
  return content;
}

const address = (name, values) => `/api/${name}?${new URLSearchParams({ v: summary?.v ?? "", ...values })}`;
const ask = (name, values = {}, signal) => answer(fetch(address(name, values), { signal }));
const post = (name, content, signal) =>
  answer(
    fetch(`/api/${name}`, {
      method: "POST",
      headers: { "Content-Type": "application/json" },
      body: JSON.stringify({ v: summary.v, ...content }),
      signal,
    }),
  );

/** Do something, and show what goes wrong. */
async function tell(work) {
  try {
    return await work();
  } catch (error) {
    if (error.name !== "AbortError") notice(error.message);
    return undefined;
  }
}

// ---------------------------------------------------------------- the grid of pictures

const pictures = new Map(); // row → data URL, or "" if there is none
const grid = {
  list: null, // {title, rows, values} of similar or chosen images; null for the filter
  total: 0,
  items: new Map(), // index → {row, id, label, score}
  cells: new Map(), // index → element
  focus: 0,
  anchor: 0,
  busy: null, // the controller of the request in progress
  timer: 0,
};

function filter() {
  const values = { text: $("text").value, label: $("label").value, low: $("low").value, high: $("high").value };
  return { ...Object.fromEntries(Object.entries(values).filter(([, value]) => value !== "")), sort: $("sort").value };
}

function measure() {
  const width = $("viewport").clientWidth;
  const wanted = width < 500 ? CELL.narrow : CELL.wide;
  const columns = Math.max(2, Math.floor((width + CELL.gap) / (wanted + CELL.gap)));
  const side = (width - CELL.gap * (columns - 1)) / columns;
  const rowHeight = side + CELL.caption;
  const lines = Math.ceil(grid.total / columns);
  const whole = lines * rowHeight;
  const view = $("viewport").clientHeight;
  const height = Math.min(whole, MAX_HEIGHT);
  const factor = height > view && whole > height ? (whole - view) / (height - view) : 1;
  return { columns, side, rowHeight, lines, height, factor, view };
}

function visible(sizes = measure()) {
  const top = $("viewport").scrollTop * sizes.factor;
  const first = Math.max(0, Math.floor(top / sizes.rowHeight));
  const last = Math.min(sizes.lines, Math.ceil((top + sizes.view) / sizes.rowHeight));
  return [first * sizes.columns, Math.min(grid.total, last * sizes.columns), top];
}

/** Draw the cells that are in view, and remove all others. */
function draw() {
  const sizes = measure();
  $("spacer").style.height = `${sizes.height}px`;
  const [first, stop, top] = visible(sizes);
  const offset = $("viewport").scrollTop - top;
  for (const [index, cell] of grid.cells) {
    if (index < first || index >= stop) {
      cell.remove();
      grid.cells.delete(index);
    }
  }
  for (let index = first; index < stop; index++) {
    if (!grid.cells.has(index)) {
      const cell = newCell(index);
      grid.cells.set(index, cell);
      $("viewport").append(cell);
    }
    const cell = grid.cells.get(index);
    cell.style.width = `${sizes.side}px`;
    cell.style.left = `${(index % sizes.columns) * (sizes.side + CELL.gap)}px`;
    cell.style.top = `${Math.floor(index / sizes.columns) * sizes.rowHeight + offset}px`;
    fill(cell, index);
  }
}

function newCell(index) {
  const cell = element("div", "cell");
  cell.id = `cell-${index}`;
  cell.dataset.index = index;
  cell.setAttribute("role", "option");
  const first = element("p", "first");
  first.append(element("span"), element("span"));
  cell.append(element("div", "picture"), first, element("p", "name"));
  return cell;
}

function fill(cell, index) {
  const item = grid.items.get(index);
  const chosen = isChosen(index);
  cell.classList.toggle("focus", index === grid.focus);
  cell.setAttribute("aria-selected", String(chosen));
  cell.setAttribute("aria-posinset", index + 1);
  cell.setAttribute("aria-setsize", grid.total);
  if (!item) return;
  const [picture, first, name] = cell.children;
  const mark = marks.of.get(item.id)?.label;
  const url = pictures.get(item.row);
  const key = JSON.stringify([item.row, url === undefined ? 0 : url === "" ? 1 : 2, mark ?? null]);
  if (cell.dataset.key === key) return;
  cell.dataset.key = key;
  picture.replaceChildren(...(url ? [image(url)] : url === "" ? [element("span", "", "no picture")] : []));
  if (mark !== undefined) picture.append(element("span", "badge", shown(mark)));
  const value = grid.list?.values?.[index];
  first.children[0].textContent = item.label === null ? lastName(item.id) : shown(item.label);
  first.children[1].textContent = value === undefined ? rounded(item.score) : value.toFixed(3);
  name.textContent = item.label === null ? shown(item.id) : lastName(item.id);
  cell.title = shown(item.id);
  const parts = [lastName(item.id), item.label, mark !== undefined ? `marked ${mark}` : null];
  cell.setAttribute("aria-label", shown(parts.filter((part) => part !== null).join(", ")));
}

function image(url) {
  const made = element("img");
  made.src = url;
  made.alt = "";
  made.draggable = false;
  return made;
}

/** Load what is in view and not known: names first, then pictures. A request for what has left the view is aborted. */
async function load() {
  if (grid.busy) {
    const [first, stop] = visible();
    if (grid.busy.stop <= first || grid.busy.first >= stop) grid.busy.controller.abort();
    return;
  }
  const controller = new AbortController();
  grid.busy = { controller, first: 0, stop: 0 };
  try {
    while (await loadNext(controller.signal)) draw();
  } catch (error) {
    if (error.name !== "AbortError") {
      notice(error.message);
      return;
    }
  } finally {
    grid.busy = null;
  }
  if (controller.signal.aborted) soon();
}

async function loadNext(signal) {
  const [first, stop] = visible();
  Object.assign(grid.busy, { first, stop });
  const indices = Array.from({ length: stop - first }, (_, number) => first + number);
  const missing = indices.filter((index) => !grid.items.has(index));
  if (missing.length) {
    await loadItems(missing[0], missing[missing.length - 1] + 1, signal);
    return true;
  }
  const rows = indices.map((index) => grid.items.get(index).row).filter((row) => !pictures.has(row));
  if (!rows.length) return false;
  await loadPictures(rows.slice(0, PICTURES_AT_A_TIME), signal);
  return true;
}

async function loadItems(first, stop, signal) {
  const list = grid.list;
  const found = list
    ? await post("some", { rows: list.rows.slice(first, stop) }, signal)
    : await ask("rows", { ...filter(), start: first, stop: Math.min(stop, first + 200) }, signal);
  if (signal.aborted) throw new DOMException("", "AbortError");
  found.rows.forEach((item, number) => grid.items.set(first + number, item));
  if (!list && found.total !== grid.total) setTotal(found.total);
  forget(grid.items, MAX_ITEMS, (index) => !grid.cells.has(index));
}

async function loadPictures(rows, signal) {
  const { pictures: found } = await post("pictures", { rows }, signal);
  for (const row of rows) pictures.set(row, found[row] ? `data:image/jpeg;base64,${found[row]}` : "");
  const inView = new Set([...grid.cells.keys()].map((index) => grid.items.get(index)?.row));
  forget(pictures, MAX_PICTURES, (row) => !inView.has(row));
}

function forget(map, most, mayGo) {
  for (const key of map.keys()) {
    if (map.size <= most) return;
    if (mayGo(key)) map.delete(key);
  }
}

function soon() {
  if (!grid.timer) grid.timer = setTimeout(() => ((grid.timer = 0), load()), 50);
}

function setTotal(total) {
  grid.total = total;
  grid.focus = Math.min(grid.focus, Math.max(0, total - 1));
  const all = summary.rows;
  let text = plural(total, "image");
  if (grid.list) text = grid.list.title;
  else if (total !== all) text = `${count(total)} of ${plural(all, "image")}`;
  $("list-title").textContent = text;
  $("list-close").hidden = !grid.list && total === all && !Object.keys(filter()).some((name) => name !== "sort");
  $("list-close").textContent = "Show all";
}

/** Show the images of the filter, or of a list. */
async function show(list = null) {
  grid.busy?.controller.abort();
  grid.list = list;
  grid.items.clear();
  for (const cell of grid.cells.values()) cell.remove();
  grid.cells.clear();
  grid.focus = grid.anchor = 0;
  $("viewport").scrollTop = 0;
  if (list) setTotal(list.rows.length);
  else {
    const values = filter();
    const found = await tell(() => ask("rows", { ...values, start: 0, stop: 60 }));
    if (!found || grid.list || JSON.stringify(values) !== JSON.stringify(filter())) return;
    found.rows.forEach((item, number) => grid.items.set(number, item));
    setTotal(found.total);
    if (!found.total && summary.rows) $("list-title").textContent = "No image fits the filter.";
  }
  draw();
  focusOn(0, false, false);
  load();
}

const isChosen = (index) => index >= Math.min(grid.anchor, grid.focus) && index <= Math.max(grid.anchor, grid.focus);

function chosen() {
  const [first, last] = [Math.min(grid.anchor, grid.focus), Math.max(grid.anchor, grid.focus)];
  return Array.from({ length: last - first + 1 }, (_, number) => grid.items.get(first + number)).filter(Boolean);
}

function focusOn(index, extend = false, open = true, wait = 60) {
  if (!grid.total) return closeDetail();
  grid.focus = Math.max(0, Math.min(grid.total - 1, index));
  if (!extend) grid.anchor = grid.focus;
  reveal(grid.focus);
  draw();
  $("viewport").setAttribute("aria-activedescendant", `cell-${grid.focus}`);
  if (open || !$("detail").hidden) openDetail(wait);
  soon();
}

function reveal(index) {
  const sizes = measure();
  const top = Math.floor(index / sizes.columns) * sizes.rowHeight;
  const now = $("viewport").scrollTop * sizes.factor;
  if (top < now) $("viewport").scrollTop = top / sizes.factor;
  else if (top + sizes.rowHeight > now + sizes.view) $("viewport").scrollTop = (top + sizes.rowHeight - sizes.view) / sizes.factor;
}

// ---------------------------------------------------------------- the chosen image

const detail = { item: null, timer: 0, controller: null };

function openDetail(wait) {
  clearTimeout(detail.timer);
  detail.timer = setTimeout(() => {
    const item = grid.items.get(grid.focus);
    if (item) showDetail(item);
    else if (view === "images") openDetail(100);
  }, wait);
}

async function showDetail(item) {
  detail.controller?.abort();
  detail.controller = new AbortController();
  const { signal } = detail.controller;
  const wasHidden = $("detail").hidden;
  detail.item = item;
  $("detail").hidden = false;
  $("similar").hidden = !summary.vectors;
  showMark();
  const small = pictures.get(item.row);
  $("detail-picture").replaceChildren(...(small ? [image(small)] : []));
  if (wasHidden && view === "images") {
    draw();
    reveal(grid.focus);
    soon();
  }
  if (wasHidden && view !== "images") plot.resize();
  await tell(async () => {
    const { columns } = await ask("row", { row: item.row }, signal);
    if (detail.item !== item) return;
    $("columns").replaceChildren(...Object.entries(columns).filter(([, value]) => value !== null).flatMap(column));
    const { pictures: found } = await post("pictures", { rows: [item.row], size: "large" }, signal);
    if (detail.item !== item) return;
    const large = found[item.row];
    $("detail-picture").replaceChildren(large ? image(`data:image/jpeg;base64,${large}`) : missingPicture());
  });
}

function missingPicture() {
  return element("span", "", shown(`The picture cannot be read from the archive: ${summary.archive}`));
}

function column([name, value]) {
  const digits = (each) => (typeof each === "number" && !Number.isInteger(each) ? Number(each.toPrecision(9)) : each);
  const text = Array.isArray(value) ? value.map(digits).join(", ") : digits(value);
  return [element("dt", "", shown(name)), element("dd", "", shown(typeof text === "object" ? JSON.stringify(text) : text))];
}

function closeDetail() {
  clearTimeout(detail.timer);
  detail.item = null;
  $("detail").hidden = true;
  if (view === "images") {
    draw();
    soon();
  } else plot.resize();
}

function showMark() {
  const mark = detail.item && marks.of.get(detail.item.id);
  $("detail-mark").textContent = mark ? `marked as ${shown(mark.label)}` : "not marked";
}

async function similar(item) {
  if (!item) return;
  if (!summary.vectors) return notice(NO_VECTORS);
  $("list-title").textContent = "Searching …";
  const found = await tell(() => ask("neighbours", { row: item.row, count: NEIGHBOURS }));
  if (!found) return setTotal(grid.total);
  await openView("images");
  await show({ title: `similar to ${lastName(item.id)}, with their similarity`, rows: found.rows, values: found.similarities });
  $("viewport").focus();
}

async function searchBy(file) {
  if (!file) return;
  if (!summary.upload) return notice(summary.vectors ? "Windows of scenes have no file of their own: choose an image here, and find similar ones." : NO_VECTORS);
  if (file.size > MAX_UPLOAD) return notice(`The file has ${(file.size / 2 ** 20).toFixed(1)} MB: at most 32 MB are accepted.`);
  notice("");
  await openView("images");
  $("list-title").textContent = "Searching; the first time takes some seconds, to load the network …";
  const request = { method: "POST", headers: { "Content-Type": "application/octet-stream" }, body: file };
  const found = await tell(() => answer(fetch(address("search", { count: NEIGHBOURS }), request)));
  if (!found) return setTotal(grid.total);
  await show({ title: `similar to ${shown(file.name)}, with their similarity`, rows: found.rows, values: found.similarities });
}

// ---------------------------------------------------------------- marks

const marks = { classes: [], of: new Map() }; // classes: {name, key}; of: image_id → {label, row, v}

const storeName = () => `nightshift:${summary.uri}`;

function loadMarks() {
  try {
    const stored = JSON.parse(localStorage.getItem(storeName()) ?? "{}");
    marks.classes = (stored.classes ?? []).filter(({ name, key }) => typeof name === "string" && /^[a-z]$/.test(key));
    marks.of = new Map(stored.of ?? []);
  } catch {
    notice("The marks that this browser has stored cannot be read: they start anew.");
  }
  drawMarks();
}

function saveMarks() {
  try {
    localStorage.setItem(storeName(), JSON.stringify({ classes: marks.classes, of: [...marks.of] }));
  } catch {
    notice("This browser cannot store more marks: export them before you close the page.");
  }
  drawMarks();
  draw();
  showMark();
}

function drawMarks() {
  const counts = new Map();
  for (const { label } of marks.of.values()) counts.set(label, (counts.get(label) ?? 0) + 1);
  $("classes").replaceChildren(
    ...marks.classes.map(({ name, key }) => {
      const item = element("li");
      const button = element("button");
      button.type = "button";
      button.title = `Mark the chosen images as ${shown(name)} (${key})`;
      button.append(element("kbd", "", key), element("span", "word", shown(name)), element("span", "", count(counts.get(name) ?? 0)));
      button.addEventListener("click", () => mark(name));
      item.append(button);
      return item;
    }),
  );
  const none = marks.of.size === 0;
  for (const id of ["show-marks", "export", "clear"]) $(id).hidden = none;
  $("mark-text").textContent = none ? (marks.classes.length ? "choose images and press a letter" : "add labels to mark images") : plural(marks.of.size, "mark");
}

function addClass(text) {
  const name = text.trim();
  if (!name || marks.classes.some((each) => each.name === name)) return;
  const taken = new Set(marks.classes.map((each) => each.key));
  const wanted = [...name.toLowerCase(), ..."abcdefghijklmnopqrstuvwxyz"];
  const key = wanted.find((letter) => /^[a-z]$/.test(letter) && !taken.has(letter));
  if (!key) return notice("There are 26 labels, one per letter: that is the most this page can have.");
  marks.classes.push({ name, key });
  saveMarks();
}

/** Mark the chosen images; if all of them have this mark, remove it. */
function mark(label) {
  const items = view === "images" ? chosen() : detail.item ? [detail.item] : [];
  if (!items.length) return;
  const all = items.every((item) => marks.of.get(item.id)?.label === label);
  for (const item of items) {
    if (all || label === null) marks.of.delete(item.id);
    else marks.of.set(item.id, { label, row: item.row, v: summary.v });
  }
  saveMarks();
}

/** A CSV file with the columns image and label, as `nightshift fit --labels` reads it. */
function csv() {
  const quoted = (text) => `"${text.replaceAll('"', '""')}"`;
  const lines = [...marks.of].map(([id, { label }]) => `${quoted(id)},${quoted(label)}\n`);
  return `image,label\n${lines.join("")}`;
}

function exportMarks() {
  const link = element("a");
  link.href = URL.createObjectURL(new Blob([csv()], { type: "text/csv" }));
  link.download = "labels.csv";
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 1000);
}

async function showMarked() {
  const own = [...marks.of.values()].filter(({ v }) => v === summary.v);
  const others = marks.of.size - own.length;
  if (others) notice(`${plural(others, "mark")} set before the output changed cannot be shown here; the export has them.`);
  own.sort((a, b) => (a.label < b.label ? -1 : a.label > b.label ? 1 : a.row - b.row));
  await openView("images");
  await show({ title: plural(own.length, "marked image"), rows: own.map(({ row }) => row) });
}

// ---------------------------------------------------------------- plots: clusters and map

class Plot {
  constructor(canvas) {
    this.canvas = canvas;
    this.points = null; // {rows, labels, scores, x, y, boxes}
    this.selected = -1;
    this.pointers = new Map();
    this.listen();
  }

  /** data: the answer of the server, with x and y. isMap: y is a latitude, x a longitude. */
  set(data, isMap) {
    this.isMap = isMap;
    this.points = data;
    this.selected = -1;
    this.all();
  }

  resize() {
    const { clientWidth: width, clientHeight: height } = this.canvas;
    const ratio = devicePixelRatio || 1;
    this.canvas.width = width * ratio;
    this.canvas.height = height * ratio;
    this.context = this.canvas.getContext("2d");
    this.context.setTransform(ratio, 0, 0, ratio, 0, 0);
    if (this.isWhole) this.fit();
    this.draw();
  }

  all() {
    this.isWhole = true;
    this.resize();
  }

  /** Choose the scale so that all points are in view. */
  fit() {
    if (!this.points?.rows.length) return;
    const [low, high] = [this.corner(Math.min, 0), this.corner(Math.max, 1)];
    const { clientWidth: width, clientHeight: height } = this.canvas;
    const room = Math.max(20, Math.min(width, height) * 0.06);
    const span = [Math.max(high[0] - low[0], 1e-9), Math.max(high[1] - low[1], 1e-9)];
    this.squeeze = this.isMap ? Math.max(0.05, Math.cos((Math.PI / 180) * Math.min(85, Math.abs((low[1] + high[1]) / 2)))) : 1;
    this.scale = Math.min((width - 2 * room) / (span[0] * this.squeeze), (height - 2 * room) / span[1]);
    this.centre = [(low[0] + high[0]) / 2, (low[1] + high[1]) / 2];
  }

  corner(choose, side) {
    const { x, y, boxes } = this.points;
    let found = side ? [-Infinity, -Infinity] : [Infinity, Infinity];
    for (let number = 0; number < x.length; number++) {
      const [px, py] = boxes ? [boxes[number][2 * side], boxes[number][2 * side + 1]] : [x[number], y[number]];
      found = [choose(found[0], px), choose(found[1], py)];
    }
    return found;
  }

  toScreen(x, y) {
    const { clientWidth: width, clientHeight: height } = this.canvas;
    return [width / 2 + (x - this.centre[0]) * this.scale * this.squeeze, height / 2 - (y - this.centre[1]) * this.scale];
  }

  toPlane(left, top) {
    const { clientWidth: width, clientHeight: height } = this.canvas;
    return [this.centre[0] + (left - width / 2) / (this.scale * this.squeeze), this.centre[1] - (top - height / 2) / this.scale];
  }

  draw() {
    const context = this.context;
    if (!context) return;
    context.clearRect(0, 0, this.canvas.clientWidth, this.canvas.clientHeight);
    if (!this.points?.rows.length || !this.scale) return;
    const texts = this.isMap ? this.drawDegrees() : [];
    const radius = this.points.rows.length > 2000 ? 2.5 : 4;
    this.points.rows.forEach((_, number) => this.drawPoint(number, radius));
    this.drawTexts(texts);
    if (this.selected >= 0) {
      const [left, top] = this.toScreen(this.points.x[this.selected], this.points.y[this.selected]);
      context.strokeStyle = styleOf("--ink");
      context.lineWidth = 2.5;
      context.beginPath();
      context.arc(left, top, 9, 0, 7);
      context.stroke();
    }
    if (this.box) {
      context.strokeStyle = context.fillStyle = styleOf("--accent");
      context.lineWidth = 1.5;
      const [x, y, right, bottom] = this.box;
      context.strokeRect(x, y, right - x, bottom - y);
      context.globalAlpha = 0.15;
      context.fillRect(x, y, right - x, bottom - y);
      context.globalAlpha = 1;
    }
  }

  drawPoint(number, radius) {
    const context = this.context;
    context.fillStyle = colorOf(this.points, number);
    const box = this.points.boxes?.[number];
    if (box) {
      const [left, top] = this.toScreen(box[0], box[3]);
      const [right, bottom] = this.toScreen(box[2], box[1]);
      if (right - left > 3 && bottom - top > 3) {
        context.globalAlpha = 0.8;
        context.fillRect(left + 0.5, top + 0.5, right - left - 1, bottom - top - 1);
        context.globalAlpha = 1;
        return;
      }
    }
    const [left, top] = this.toScreen(this.points.x[number], this.points.y[number]);
    context.globalAlpha = 0.75;
    context.beginPath();
    context.arc(left, top, radius, 0, 7);
    context.fill();
    context.globalAlpha = 1;
  }

  /** Draw lines of round degrees. Returns their numbers, which are drawn above the images. */
  drawDegrees() {
    const { clientWidth: width, clientHeight: height } = this.canvas;
    const [west, north] = this.toPlane(0, 0);
    const [east, south] = this.toPlane(width, height);
    const step = DEGREES.find((each) => (east - west) / each >= 3) ?? DEGREES[DEGREES.length - 1];
    const digits = Math.max(0, Math.ceil(-Math.log10(step)));
    const text = (value, [negative, positive]) => `${Math.abs(value).toFixed(digits)}° ${value < 0 ? negative : positive}`;
    const texts = [];
    this.context.strokeStyle = styleOf("--line");
    this.context.lineWidth = 1;
    for (let x = Math.ceil(west / step) * step; x <= east; x += step) {
      const [left] = this.toScreen(x, 0);
      line(this.context, left, 0, left, height);
      texts.push([text(x, "WE"), left + 3, height - 5]);
    }
    for (let y = Math.ceil(south / step) * step; y <= north; y += step) {
      const [, top] = this.toScreen(0, y);
      line(this.context, 0, top, width, top);
      if (top < height - 20) texts.push([text(y, "SN"), 4, top - 3]);
    }
    return texts;
  }

  drawTexts(texts) {
    const context = this.context;
    context.font = "11px system-ui, sans-serif";
    context.strokeStyle = styleOf("--panel");
    context.fillStyle = styleOf("--ink");
    context.lineWidth = 3;
    for (const [text, left, top] of texts) {
      context.strokeText(text, left, top);
      context.fillText(text, left, top);
    }
  }

  nearest(left, top, most) {
    let [best, distance] = [-1, most * most];
    this.points?.rows.forEach((_, number) => {
      const [x, y] = this.toScreen(this.points.x[number], this.points.y[number]);
      const away = (x - left) ** 2 + (y - top) ** 2;
      if (away < distance) [best, distance] = [number, away];
    });
    return best >= 0 ? best : this.covering(left, top);
  }

  covering(left, top) {
    if (!this.points?.boxes) return -1;
    const [x, y] = this.toPlane(left, top);
    return this.points.boxes.findIndex(([west, south, east, north]) => x >= west && x <= east && y >= south && y <= north);
  }

  zoom(factor, left = this.canvas.clientWidth / 2, top = this.canvas.clientHeight / 2) {
    if (!this.points?.rows.length) return;
    const [x, y] = this.toPlane(left, top);
    this.isWhole = false;
    this.scale *= factor;
    const [newX, newY] = this.toPlane(left, top);
    this.centre = [this.centre[0] + x - newX, this.centre[1] + y - newY];
    this.draw();
  }

  async select(number) {
    if (number < 0) return;
    this.selected = number;
    const [left, top] = this.toScreen(this.points.x[number], this.points.y[number]);
    const { clientWidth: width, clientHeight: height } = this.canvas;
    if (left < 0 || top < 0 || left > width || top > height) this.centre = [this.points.x[number], this.points.y[number]];
    this.draw();
    const found = await tell(() => post("some", { rows: [this.points.rows[number]] }));
    if (found && this.selected === number) await showDetail(found.rows[0]);
  }

  /** The nearest point in a direction, by the angle and the distance. */
  step(dx, dy) {
    if (!this.points?.rows.length) return;
    if (this.selected < 0) return this.select(0);
    const from = this.toScreen(this.points.x[this.selected], this.points.y[this.selected]);
    let [best, least] = [-1, Infinity];
    this.points.rows.forEach((_, number) => {
      const [x, y] = this.toScreen(this.points.x[number], this.points.y[number]);
      const along = (x - from[0]) * dx + (y - from[1]) * dy;
      const across = Math.abs((x - from[0]) * dy) + Math.abs((y - from[1]) * dx);
      if (number !== this.selected && along > 0.01 && across <= along * 2 && along + 2 * across < least) [best, least] = [number, along + 2 * across];
    });
    this.select(best);
  }

  listen() {
    const at = (event) => {
      const box = this.canvas.getBoundingClientRect();
      return [event.clientX - box.left, event.clientY - box.top];
    };
    this.canvas.addEventListener("pointerdown", (event) => {
      if (!this.points?.rows.length) return;
      this.canvas.setPointerCapture(event.pointerId);
      const isBox = event.shiftKey || $("select-box").getAttribute("aria-pressed") === "true";
      this.press = { start: at(event), last: at(event), isBox, moved: false };
      $("tip").hidden = true;
    });
    this.canvas.addEventListener("pointermove", (event) => (this.press ? this.drag(at(event)) : this.hover(at(event))));
    this.canvas.addEventListener("pointerup", (event) => this.release(at(event)));
    this.canvas.addEventListener("pointercancel", () => ((this.press = this.box = null), this.draw()));
    this.canvas.addEventListener("pointerleave", () => ($("tip").hidden = true));
    this.canvas.addEventListener("dblclick", (event) => {
      const number = this.points ? this.nearest(...at(event), HIT_PIXELS) : -1;
      if (number >= 0) this.select(number).then(() => similar(detail.item));
    });
    this.canvas.addEventListener(
      "wheel",
      (event) => {
        event.preventDefault();
        this.zoom(Math.exp(-event.deltaY / 400), ...at(event));
      },
      { passive: false },
    );
  }

  drag([left, top]) {
    const { start, last, isBox } = this.press;
    this.press.moved ||= Math.hypot(left - start[0], top - start[1]) > 5;
    if (!this.press.moved) return;
    this.isWhole &&= isBox;
    if (isBox) this.box = [Math.min(start[0], left), Math.min(start[1], top), Math.max(start[0], left), Math.max(start[1], top)];
    else this.centre = [this.centre[0] - (left - last[0]) / (this.scale * this.squeeze), this.centre[1] + (top - last[1]) / this.scale];
    this.press.last = [left, top];
    this.draw();
  }

  release([left, top]) {
    const { press, box } = this;
    this.press = this.box = null;
    if (!press) return;
    if (!press.moved) this.select(this.nearest(left, top, HIT_PIXELS));
    else if (box) this.choose(box);
    this.draw();
  }

  async choose([x, y, right, bottom]) {
    const rows = this.points.rows.filter((_, number) => {
      const [left, top] = this.toScreen(this.points.x[number], this.points.y[number]);
      return left >= x && left <= right && top >= y && top <= bottom;
    });
    if (!rows.length) return;
    $("select-box").setAttribute("aria-pressed", "false");
    await openView("images");
    await show({ title: `${plural(rows.length, "image")} of a box`, rows });
  }

  hover([left, top]) {
    const number = this.points?.rows.length ? this.nearest(left, top, HIT_PIXELS) : -1;
    const text = number < 0 ? "" : describe(this.points, number);
    $("tip").hidden = !text;
    $("tip").textContent = text;
    $("tip").style.left = `${Math.min(left + 14, this.canvas.clientWidth - 150)}px`;
    $("tip").style.top = `${Math.min(top + 14, this.canvas.clientHeight - 30)}px`;
  }
}

const styleOf = (name) => getComputedStyle(document.documentElement).getPropertyValue(name);

function line(context, x, y, right, bottom) {
  context.beginPath();
  context.moveTo(x, y);
  context.lineTo(right, bottom);
  context.stroke();
}

function describe(points, number) {
  const label = labels?.names[points.labels[number]];
  const score = points.scores && points.scores[number] >= 0 ? rounded(points.scores[number]) : "";
  return [label !== undefined ? shown(label) : "", score].filter(Boolean).join(" · ") || `row ${points.rows[number]}`;
}

function colorOf(points, number) {
  if (labels?.names.length) return summary.palette[points.labels[number]] ?? OTHERS;
  if (points.scores && labels?.range) {
    const [low, high] = labels.range;
    const place = (points.scores[number] - low) / Math.max(high - low, 1e-9);
    return VIRIDIS[Math.max(0, Math.min(VIRIDIS.length - 1, Math.round(place * (VIRIDIS.length - 1))))];
  }
  return summary.palette[0];
}

function drawLegend() {
  const item = (color, text) => {
    const made = element("li");
    const swatch = element("span", "swatch");
    swatch.style.background = color;
    made.append(swatch, element("span", "", text));
    return made;
  };
  const names = labels?.names ?? [];
  const items = names.slice(0, summary.palette.length).map((name, code) => item(summary.palette[code], shown(name)));
  if (names.length > summary.palette.length) items.push(item(OTHERS, `${names.length - summary.palette.length} other labels`));
  if (!names.length && labels?.range) items.push(item(VIRIDIS[0], `score ${rounded(labels.range[0])}`), item(VIRIDIS[4], `score ${rounded(labels.range[1])}`));
  $("legend").replaceChildren(...items);
}

let plot;

async function showPlot(name) {
  const isMap = name === "map";
  $("method-label").hidden = isMap || summary.methods.length < 2;
  const method = $("method").value;
  $("plot-text").textContent = !isMap && method === "tsne" ? "Computing, for up to a minute …" : "Reading …";
  const started = summary.v;
  const data = await tell(() => (isMap ? ask("places") : ask("projection", { method })));
  if (!data) $("plot-text").textContent = "";
  if (!data || view !== name || started !== summary.v) return;
  if (isMap) {
    data.x = data.boxes.map(([west, , east]) => (west + east) / 2);
    data.y = data.boxes.map(([, south, , north]) => (south + north) / 2);
  }
  plot.set(data, isMap);
  drawLegend();
  const total = summary.rows;
  const sample = data.rows.length < total ? `${count(data.rows.length)} of ${plural(total, "image")}` : plural(total, "image");
  const without = data.without ? `, ${count(data.without)} without a place` : "";
  const explained = data.explained ? `; ${Math.round(data.explained * 100)} % of the variance` : "";
  $("plot-text").textContent = `${sample}${without}${explained}`;
}

// ---------------------------------------------------------------- errors

const errors = { start: 0, total: 0 };

async function showErrors(start = 0) {
  errors.start = start;
  const values = { type: $("error-type").value, text: $("error-text").value, start, stop: start + ERRORS_AT_A_TIME };
  const found = await tell(() => ask("errors", values));
  if (!found) return;
  errors.total = found.total;
  const stop = Math.min(start + ERRORS_AT_A_TIME, found.total);
  const cut = summary.errors > summary.max_errors ? ` (the first ${count(summary.max_errors)} of ${count(summary.errors)})` : "";
  $("error-range").textContent = found.total ? `${count(start + 1)}–${count(stop)} of ${count(found.total)}${cut}` : "none";
  $("error-back").disabled = start === 0;
  $("error-next").disabled = stop >= found.total;
  options($("error-type"), "all errors", found.types.map(({ type, count: number }) => [type, `${shown(type)} (${count(number)})`]));
  $("error-rows").querySelector("tbody").replaceChildren(
    ...found.rows.map((row) => {
      const line = element("tr");
      line.append(...["image_id", "stage", "error_type", "message"].map((name) => element("td", "", shown(row[name] ?? ""))));
      return line;
    }),
  );
  $("error-rows").scrollTop = 0;
}

function options(select, first, rest) {
  const value = select.value;
  const make = (each, text) => {
    const option = element("option", "", text);
    option.value = each;
    return option;
  };
  select.replaceChildren(make("", first), ...rest.map(([each, text]) => make(each, text)));
  select.value = value;
}

// ---------------------------------------------------------------- views

const NO_VECTORS = "This output has no vectors, so it has no similar images and no clusters: run nightshift embed, or classify with --embeddings.";

/** What a view has to say instead of its content: [title, text]; null if it has content. */
function emptiness(name) {
  const isRunning = !summary.finished;
  if (name === "errors") return summary.errors ? null : ["No errors", isRunning ? "So far every image could be read." : "Every image could be read."];
  if (!summary.rows) {
    if (isRunning) return ["Nothing yet", `The run has not written its first part. This page looks again every 10 seconds.${summary.errors ? ` There are ${plural(summary.errors, "error")} so far.` : ""}`];
    if (summary.errors) return ["No images", `None of the images could be read: see the ${plural(summary.errors, "error")}.`];
    return ["No images", "The run has finished, and its archive had no image with data."];
  }
  if (name === "clusters" && !summary.vectors) return ["No clusters", NO_VECTORS];
  if (name === "map" && !summary.places) return ["No map", "The images of this output have no place on the Earth: those of raster scenes and of map tiles have one."];
  return null;
}

async function openView(name) {
  if (view !== name) closeDetail();
  view = name;
  const empty = emptiness(name);
  for (const button of document.querySelectorAll("[data-view]")) button.setAttribute("aria-pressed", String(button.dataset.view === name));
  $("empty").hidden = !empty;
  if (empty) [$("empty").children[0].textContent, $("empty").children[1].textContent] = empty;
  $("images").hidden = name !== "images" || Boolean(empty);
  $("plot").hidden = !["clusters", "map"].includes(name) || Boolean(empty);
  $("errors").hidden = name !== "errors" || Boolean(empty);
  if (empty) return;
  if (name === "images") {
    draw();
    soon();
  } else if (name === "errors") await showErrors();
  else await showPlot(name);
}

async function start() {
  const fresh = await tell(() => ask("summary"));
  if (!fresh) return;
  const isSame = summary?.v === fresh.v;
  const isFirst = summary === null;
  summary = fresh;
  if (!summary.finished && !summary.rows) setTimeout(start, 10_000);
  if (isSame) return;
  pictures.clear();
  document.title = `${shown(summary.title)} – Nightshift`;
  $("title").textContent = shown(summary.title);
  $("title").title = shown(summary.uri);
  const rows = `${plural(summary.rows, "image")}, ${plural(summary.errors, "error")}`;
  $("state").textContent = [rows, shown(summary.model), summary.finished ? "" : "the run has not finished"].filter(Boolean).join(" · ");
  $("again").hidden = summary.finished;
  $("pick").hidden = !summary.upload;
  options($("method"), "", summary.methods.map((each) => [each, { pca: "principal components", tsne: "t-SNE" }[each]]));
  $("method").firstElementChild.remove();
  $("method").value = "pca";
  if (isFirst) loadMarks();
  await openView(view);
  if (!summary.rows) return;
  await show();
  await loadLabels();
}

async function loadLabels() {
  labels = (await tell(() => ask("labels"))) ?? null;
  if (!labels) return;
  $("label").hidden = !labels.names.length;
  options($("label"), "all labels", labels.names.map((name, code) => [code, `${shown(name)} (${count(labels.counts[code])})`]));
  $("scores").hidden = !labels.range;
  if (labels.range) {
    $("low").placeholder = rounded(labels.range[0]);
    $("high").placeholder = rounded(labels.range[1]);
  }
  if (view === "clusters" || view === "map") drawLegend();
}

function resetFilter() {
  for (const id of ["text", "label", "low", "high"]) $(id).value = "";
  $("sort").value = "archive";
}

// ---------------------------------------------------------------- events

function later(work, wait = 250) {
  let timer;
  return () => {
    clearTimeout(timer);
    timer = setTimeout(work, wait);
  };
}

const ARROWS = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
const VIEWS = ["images", "clusters", "map", "errors"];

function onKey(event) {
  if (event.ctrlKey || event.metaKey || event.altKey || !summary || $("help").open) return;
  const isField = event.target.matches("input, select");
  if (event.key === "Escape") return back(isField ? event.target : null);
  if (isField) return;
  const isButton = event.target.matches("button");
  if (event.key === "/") {
    event.preventDefault();
    const id = view === "errors" ? "error-text" : "text";
    return openView(view === "errors" ? "errors" : "images").then(() => $(id).focus());
  }
  if (event.key === "?") return $("help").showModal();
  if (VIEWS[event.key - 1]) return openView(VIEWS[event.key - 1]);
  if (event.key === "Enter" && !isButton) return similar(view === "images" ? grid.items.get(grid.focus) : detail.item);
  if (event.key === "Backspace") return mark(null);
  const named = marks.classes.find(({ key }) => key === event.key.toLowerCase());
  if (named) return mark(named.name);
  if (view === "images" && move(event)) event.preventDefault();
  if ((view === "clusters" || view === "map") && steer(event)) event.preventDefault();
}

function move(event) {
  const { columns, view: height, rowHeight } = measure();
  const page = columns * Math.max(1, Math.floor(height / rowHeight));
  const arrow = ARROWS[event.key];
  const steps = { Home: -grid.focus, End: grid.total - 1 - grid.focus, PageUp: -page, PageDown: page };
  const by = arrow ? arrow[0] + arrow[1] * columns : steps[event.key];
  if (by === undefined) return false;
  focusOn(grid.focus + by, event.shiftKey);
  return true;
}

function steer(event) {
  if (event.key === "+" || event.key === "=") plot.zoom(1.4);
  else if (event.key === "-") plot.zoom(1 / 1.4);
  else if (event.key === "0") plot.all();
  else if (ARROWS[event.key]) plot.step(...ARROWS[event.key]);
  else return false;
  return true;
}

function back(field) {
  if (field) return $(view === "images" ? "viewport" : "canvas").focus();
  if (!$("detail").hidden) return closeDetail();
  if (view !== "images") return openView("images");
  if (grid.list) return show();
  return undefined;
}

function listen() {
  plot = new Plot($("canvas"));
  $("viewport").addEventListener("scroll", () => (requestAnimationFrame(draw), soon()));
  $("viewport").addEventListener("click", (event) => {
    const cell = event.target.closest(".cell");
    if (cell) focusOn(Number(cell.dataset.index), event.shiftKey, true, $("detail").hidden ? DOUBLE_CLICK : 60);
  });
  $("viewport").addEventListener("dblclick", (event) => {
    clearTimeout(detail.timer);
    if (event.target.closest(".cell")) similar(grid.items.get(grid.focus));
  });
  new ResizeObserver(() => view === "images" && summary?.rows && (draw(), soon())).observe($("viewport"));
  new ResizeObserver(() => view !== "images" && plot.resize()).observe($("plot-area"));
  const changed = later(() => show());
  for (const id of ["text", "low", "high"]) $(id).addEventListener("input", changed);
  for (const id of ["label", "sort"]) $(id).addEventListener("change", () => show());
  $("list-close").addEventListener("click", () => (resetFilter(), show()));
  for (const id of ["filters", "error-filters"]) $(id).addEventListener("submit", (event) => event.preventDefault());
  $("error-text").addEventListener("input", later(() => showErrors()));
  $("error-type").addEventListener("change", () => showErrors());
  $("error-back").addEventListener("click", () => showErrors(Math.max(0, errors.start - ERRORS_AT_A_TIME)));
  $("error-next").addEventListener("click", () => showErrors(errors.start + ERRORS_AT_A_TIME));
  for (const button of document.querySelectorAll("[data-view]")) button.addEventListener("click", () => openView(button.dataset.view));
  $("method").addEventListener("change", () => showPlot(view));
  $("select-box").addEventListener("click", (event) => {
    const button = event.currentTarget;
    button.setAttribute("aria-pressed", String(button.getAttribute("aria-pressed") !== "true"));
  });
  $("zoom-in").addEventListener("click", () => plot.zoom(1.4));
  $("zoom-out").addEventListener("click", () => plot.zoom(1 / 1.4));
  $("zoom-all").addEventListener("click", () => plot.all());
  $("help-button").addEventListener("click", () => $("help").showModal());
  $("notice").lastElementChild.addEventListener("click", () => notice(""));
  $("again").addEventListener("click", start);
  $("similar").addEventListener("click", () => similar(detail.item));
  $("detail-close").addEventListener("click", closeDetail);
  $("pick").addEventListener("click", () => $("file").click());
  $("file").addEventListener("change", (event) => searchBy(event.target.files[0]).then(() => ($("file").value = "")));
  $("new-class").addEventListener("submit", (event) => {
    event.preventDefault();
    addClass($("class-name").value);
    $("class-name").value = "";
  });
  $("export").addEventListener("click", exportMarks);
  $("show-marks").addEventListener("click", showMarked);
  $("clear").addEventListener("click", () => {
    if (!confirm(`Remove ${plural(marks.of.size, "mark")} and all labels?`)) return;
    marks.of.clear();
    marks.classes = [];
    saveMarks();
  });
  document.addEventListener("keydown", onKey);
  document.addEventListener("dragover", (event) => (event.preventDefault(), document.body.classList.add("dropping")));
  document.addEventListener("dragleave", (event) => event.relatedTarget ?? document.body.classList.remove("dropping"));
  document.addEventListener("drop", (event) => {
    event.preventDefault();
    document.body.classList.remove("dropping");
    if (summary) searchBy(event.dataTransfer.files[0]);
  });
}

listen();
start();
