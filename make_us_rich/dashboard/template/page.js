// The browser's side of the dashboard: a heartbeat, a chart and the cards of the pairs. Texts are set with textContent, never as HTML.
const time = { hm: { hour: "2-digit", minute: "2-digit" }, full: { weekday: "short", day: "numeric", month: "short", hour: "2-digit", minute: "2-digit" } };
const zone = Intl.DateTimeFormat().resolvedOptions().timeZone;

function minutes(value) {
  const m = Math.max(0, Math.floor(value));
  if (m < 90) return `${m} min`;
  return m < 2880 ? `${Math.floor(m / 60)} h ${m % 60} min` : `${Math.floor(m / 1440)} days`;
}

// Times in the viewer's zone, ages that grow and times left that shrink while the page is open.
function freshen(root) {
  for (const node of root.querySelectorAll("time[datetime]:not([data-done])")) {
    const at = new Date(node.dateTime);
    node.dataset.done = "1";
    if (isNaN(at)) continue;
    node.title = `${node.dateTime} (shown in ${zone})`;
    node.textContent = at.toLocaleString([], { ...(time[node.dataset.as] || time.full), hour12: false });
  }
  for (const node of root.querySelectorAll("[data-age],[data-left]")) {
    node.born ??= Date.now();
    const passed = (Date.now() - node.born) / 60000;
    const text = minutes("age" in node.dataset ? +node.dataset.age + passed : +node.dataset.left - passed);
    if (node.textContent !== text) node.textContent = text;
  }
}

const root = document.documentElement;
function theme(wanted) {
  const lab = document.body.dataset.jpThemeLight, own = document.body.dataset.voila !== undefined;
  const now = wanted || root.dataset.theme || (!own && lab ? (lab === "true" ? "light" : "dark") : matchMedia("(prefers-color-scheme: light)").matches ? "light" : "dark");
  if (root.dataset.theme === now) return;
  root.dataset.theme = now;
  window.dispatchEvent(new Event("mur-theme"));
}

function acts(event) {
  const button = event.target.closest?.("[data-act]");
  if (!button) return;
  if (button.dataset.act === "theme") {
    theme(root.dataset.theme === "dark" ? "light" : "dark");
    try { localStorage.setItem("mur-theme", root.dataset.theme); } catch { /* private window */ }
  }
  if (button.dataset.act === "run") window.dispatchEvent(new CustomEvent("mur-run", { detail: button.dataset.run }));
  if (button.dataset.act === "copy") {
    const text = button.parentElement.querySelector("code").textContent;
    const done = () => { button.textContent = "copied"; setTimeout(() => (button.textContent = "copy"), 1500); };
    navigator.clipboard?.writeText(text).then(done, () => getSelection().selectAllChildren(button.parentElement.querySelector("code")));
  }
}

// Labels that ipywidgets leaves without a name for screen readers.
function name(root) {
  for (const box of root.querySelectorAll(".mur .widget-text, .mur .widget-password, .mur .widget-dropdown")) {
    const field = box.querySelector("input,select"), label = box.querySelector("label");
    if (field && label && !field.ariaLabel) field.ariaLabel = label.textContent;
  }
  for (const field of root.querySelectorAll(".mur input[type=password]:not([autocomplete])")) field.autocomplete = "current-password";
}

// The process behind the page is gone: say so, and how to get a new one.
function lost(gone) {
  let note = document.getElementById("mur-lost");
  if (!gone) return note?.remove();
  if (note) return;
  note = part("div", "mur-banner mur-error");
  note.id = "mur-lost";
  note.setAttribute("role", "alert");
  const button = part("button", "mur-icon", "Reload the page");
  button.type = "button";
  button.onclick = () => location.reload();
  note.append(part("b", "", "This page is cut off"), part("span", "", "What it shows will not change any more, because its connection to the server is lost. "), button);
  document.querySelector(".mur")?.prepend(note);
}

// The executed notebook of a run: a page without scripts, in a frame that could not run any.
function report({ title, problem }, page) {
  const box = part("dialog", "mur-report"), head = part("div", "mur-report-head"), close = part("button", "mur-icon", "Close");
  box.setAttribute("aria-label", title);
  close.type = "button";
  close.onclick = () => box.close();
  head.append(part("b", "", title), close);
  box.append(head);
  if (problem) box.append(part("p", "", problem));
  else {
    const frame = part("iframe", "");
    frame.setAttribute("sandbox", "");
    frame.title = title;
    frame.srcdoc = new TextDecoder().decode(page);
    box.append(frame);
  }
  box.addEventListener("close", () => box.remove());
  (document.querySelector(".mur") || document.body).append(box);
  box.showModal();
}

function live({ model, el }) {
  theme();
  let sent = 0, silent = 0;  // heartbeats without an answer, counted while the page is looked at
  model.on("msg:custom", (message, buffers) => {
    if (message.type === "pong") { silent = 0; lost(false); }
    if (message.type === "report") report(message, buffers[0]);
  });
  const open = (event) => model.send({ type: "run", run: event.detail });
  window.addEventListener("mur-run", open);
  const ping = () => {
    const visible = document.visibilityState === "visible";
    if (visible && ++silent > 5 && Date.now() - sent < 8000) lost(true);
    sent = Date.now();
    try { model.send({ type: "ping", visible }); } catch { /* no connection: the next one may have it */ }
  };
  const look = () => { freshen(document); name(document); };
  const seen = new MutationObserver(look);
  seen.observe(document.body, { childList: true, subtree: true });
  const beat = setInterval(ping, 4000), tick = setInterval(look, 10000);
  document.addEventListener("visibilitychange", ping);
  if (!window.murActs) { window.murActs = true; document.addEventListener("click", acts); }
  el.dataset.live = "1";
  ping(); look();
  return () => { clearInterval(beat); clearInterval(tick); seen.disconnect(); document.removeEventListener("visibilitychange", ping); window.removeEventListener("mur-run", open); };
}

// Plotly itself: already in the page, a file beside the template, or asked of the kernel (JupyterLab).
let loading;
function plotly(model) {
  if (window.Plotly?.react) return window.Plotly;
  loading ??= new Promise((resolve) => {
    const tag = document.getElementById("mur-plotly");
    const ask = () => {
      model.on("msg:custom", (message, buffers) => {
        if (message.type !== "plotly") return;
        const script = document.createElement("script"), define = window.define;
        script.src = URL.createObjectURL(new Blob([buffers[0]], { type: "text/javascript" }));
        window.define = undefined;
        script.onload = () => { window.define = define; resolve(window.Plotly); };
        document.head.append(script);
      });
      model.send({ type: "plotly" });
    };
    if (!tag) return ask();
    tag.addEventListener("load", () => resolve(window.Plotly));
    tag.addEventListener("error", ask);
  });
  return loading;
}

const moved = (ms) => (typeof ms === "number" ? ms - new Date(ms).getTimezoneOffset() * 60000 : ms);
function shown(figure, palette, narrow) {
  const light = root.dataset.theme === "light", swap = new Map(palette);
  const walk = (v) => (typeof v === "string" ? (light && swap.get(v)) || v : Array.isArray(v) ? v.map(walk) : v && typeof v === "object" ? Object.fromEntries(Object.entries(v).map(([k, w]) => [k, walk(w)])) : v);
  const { data, layout } = walk(figure);
  if (layout.xaxis?.type === "date") {
    for (const trace of data) trace.x = trace.x.map(moved);
    for (const each of layout.annotations || []) if (each.xref !== "paper") each.x = moved(each.x);
    for (const each of layout.shapes || []) if (each.xref !== "paper") { each.x0 = moved(each.x0); each.x1 = moved(each.x1); }
    if (narrow && layout.meta?.narrow) { layout.xaxis.range = layout.meta.narrow; layout.yaxis.range = layout.meta.narrow_y; }
    if (layout.xaxis.range) layout.xaxis.range = layout.xaxis.range.map(moved);
    if (narrow) layout.xaxis.nticks = 5;
  }
  if (narrow) layout.margin = { ...layout.margin, l: Math.min(layout.margin.l, 96), r: Math.min(layout.margin.r, 64) };
  return { data, layout };
}

async function chart({ model, el }) {
  const box = document.createElement("div");
  box.className = "mur-chart";
  box.style.height = model.get("height");
  box.setAttribute("role", "img");
  el.append(box);
  const Plotly = await plotly(model);
  let narrow, late = false, queue = Promise.resolve();
  const draw = () => (queue = queue.then(async () => {
    const figure = model.get("figure");
    late = !box.clientWidth;  // nobody sees it now: it is drawn when it comes into view
    if (!figure.data || late) return;
    narrow = box.clientWidth < 600;
    const { data, layout } = shown(figure, model.get("palette"), narrow);
    box.setAttribute("aria-label", model.get("label"));
    await Plotly.react(box, data, layout, { displaylogo: false, displayModeBar: false, responsive: false, doubleClick: "reset", showTips: false });
    box.dataset.drawn = 1 + Number(box.dataset.drawn || 0);
  }).catch((error) => console.error("the chart could not be drawn", error)));
  const size = new ResizeObserver(() => {
    if (!box.clientWidth) return;
    if (late || narrow !== box.clientWidth < 600) draw();
    else queue = queue.then(() => Plotly.Plots.resize(box)).catch(() => {});
  });
  model.on("change:figure", draw);
  window.addEventListener("mur-theme", draw);
  size.observe(box);
  draw();
  return () => { size.disconnect(); window.removeEventListener("mur-theme", draw); Plotly.purge(box); };
}

function part(tag, name, text) {
  const node = document.createElement(tag);
  node.className = name;
  if (text !== undefined) node.textContent = text;
  return node;
}

function spark(values) {
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg"), line = document.createElementNS(svg.namespaceURI, "polyline");
  const low = Math.min(...values), high = Math.max(...values), step = 100 / Math.max(1, values.length - 1);
  svg.setAttribute("viewBox", "0 0 100 28"); svg.setAttribute("preserveAspectRatio", "none"); svg.setAttribute("aria-hidden", "true");
  line.setAttribute("points", values.map((v, i) => `${(i * step).toFixed(1)},${(26 - (24 * (v - low)) / (high - low || 1)).toFixed(1)}`).join(" "));
  svg.append(line);
  svg.classList.add("mur-spark", values.at(-1) >= values[0] ? "mur-up" : "mur-down");
  return svg;
}

function card(line, chosen, choose) {
  const button = part("button", "mur-card"), head = part("span", "mur-card-head");
  button.type = "button";
  button.dataset.series = line.series;
  button.setAttribute("aria-pressed", String(line.series === chosen));
  head.append(part("b", "", line.name), part("span", `mur-badge mur-${line.badge}`, line.word));
  const price = part("span", "mur-card-price");
  price.append(part("span", "mur-num", line.last), part("span", line.change.startsWith("-") ? "mur-change mur-down" : "mur-change mur-up", line.change));
  button.append(head, price);
  if (line.closes.length > 1) button.append(spark(line.closes));
  if (line.problem) button.append(part("span", "mur-card-note", line.problem));
  else {
    const range = part("span", "mur-card-range");
    range.append(part("span", "", line.range), part("span", "", line.rise));
    button.append(range);
  }
  button.onclick = () => choose(line.series);
  return button;
}

function cards({ model, el }) {
  const box = part("div", "mur-cards");
  box.setAttribute("role", "group");
  box.setAttribute("aria-label", "Pairs");
  el.append(box);
  const choose = (series) => { model.set("chosen", series); model.save_changes(); };
  const draw = () => {
    const held = document.activeElement?.dataset?.series;
    box.replaceChildren(...model.get("cards").map((line) => card(line, model.get("chosen"), choose)));
    if (held) box.querySelector(`[data-series="${CSS.escape(held)}"]`)?.focus();
  };
  model.on("change:cards change:chosen", draw);
  draw();
}

export default { render: (context) => ({ live, chart, cards })[context.model.get("kind")](context) };
