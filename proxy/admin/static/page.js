// The page of jobs: asks for /jobs again and again, and shows what it gets. All that comes from
// there is put in as text, never as HTML: users choose labels, messages and SQL.
"use strict";

const EVERY = 1000; // milliseconds
const element = (id) => document.getElementById(id);
// Built of the origin, since an address with a name and a password in it cannot be fetched.
const here = (path) => location.origin + path;

let token = null; // null: this user may not cancel
let asking = null; // the job that the dialog is about
const shown = new Map(); // by id: the list item
const WAITS = { queued: "room", pending: "a commit" };

async function refresh() {
  try {
    const answer = await fetch(here("/jobs"), { cache: "no-store" });
    if (!answer.ok) throw new Error(`${answer.status}: ${(await answer.text()).trim()}`);
    show(await answer.json());
    say(`as of ${new Date().toLocaleTimeString()}`);
  } catch (error) {
    say(`No news: ${error.message}`, true);
  }
}

function say(text, bad = false) {
  element("state").textContent = text;
  element("state").classList.toggle("bad", bad);
}

function show(news) {
  token = news.token;
  element("count").textContent = `(${news.count})`;
  const silent = news.silent ? ` · ${news.silent} processes do not answer` : "";
  const more = news.count - news.running.length; // before those that wait join them
  element("about").textContent = `pg-background-proxy ${news.version} · ${news.user}, `
    + `${token ? "who may cancel jobs" : "who may look"}${silent}`
    + (more > 0 ? ` · ${more} more jobs run than are shown` : "");
  const left = new Set(shown.keys());
  news.running.push(...news.waiting);
  list("running", news.running, left);
  list("ended", news.ended, left);
  for (const id of left) {
    shown.get(id).remove();
    shown.delete(id);
  }
  if (asking && !news.running.some((job) => job.id === asking.id)) close();
}

// Items are changed, not made anew, so that focus, selection and scrolling stay.
function list(name, jobs, left) {
  const parent = element(name);
  element(`none-${name}`).hidden = jobs.length > 0;
  jobs.forEach((job, place) => {
    let item = shown.get(job.id);
    if (!item) {
      item = element("job").content.cloneNode(true).querySelector("li");
      shown.set(job.id, item);
    }
    left.delete(job.id);
    fill(item, job, name === "running");
    if (parent.children[place] !== item) parent.insertBefore(item, parent.children[place] || null);
  });
}

function fill(item, job, running) {
  const part = (name) => item.querySelector(name);
  const waits = job.pid === null;
  const unnamed = waits ? "Job without a label" : `Job ${job.pid}`;
  put(part(".label"), job.label === null ? unnamed : job.label);
  const outcome = part(".outcome");
  put(outcome, running && !waits ? (job.canceled ? "is being canceled" : "") : job.state);
  outcome.className = `outcome ${job.state}`;
  const facts = [
    ["pid", waits ? "–" : job.pid], ["role", job.role], ["database", job.database],
    [running ? "age" : "took", span(job.seconds)],
  ];
  if (running) facts.push(["waits for", WAITS[job.state] || job.wait || "–"]);
  else {
    facts.push(["ended", new Date((job.launched + job.seconds) * 1000).toLocaleTimeString()]);
    if (job.rows !== null) facts.push(["rows", job.rows]);
    if (job.sqlstate !== null) facts.push(["SQLSTATE", job.sqlstate]);
  }
  const terms = part("dl");
  while (terms.children.length < facts.length) {
    const pair = document.createElement("div");
    pair.append(document.createElement("dt"), document.createElement("dd"));
    terms.append(pair);
  }
  while (terms.children.length > facts.length) terms.lastChild.remove();
  facts.forEach(([name, value], place) => {
    const [term, text] = terms.children[place].children;
    put(term, name);
    put(text, value);
  });
  const reported = job.percentage !== null || job.message !== null;
  part(".progress").hidden = !reported;
  if (reported) {
    part("progress").value = job.percentage || 0;
    part("progress").setAttribute("aria-label", `progress of ${title(job)}`);
    put(part(".percent"), job.percentage === null ? "" : `${job.percentage} %`);
    put(part(".message"), job.message || "");
  }
  part(".fault").hidden = job.error === null;
  put(part(".fault"), job.error || "");
  put(part(".sql"), job.sql);
  const button = part(".cancel");
  button.hidden = !running || token === null;
  button.disabled = job.canceled;
  button.setAttribute("aria-label", `Cancel ${title(job)} ${job.label || ""}`);
  button.onclick = () => ask(job);
}

function title(job) {
  return job.pid === null ? `${job.state} job` : `job ${job.pid}`;
}

function put(node, value) {
  const text = String(value);
  if (node.textContent !== text) node.textContent = text;
}

function span(seconds) {
  if (seconds < 10) return `${seconds.toFixed(1)} s`;
  const [days, hours, minutes] = [86400, 3600, 60].map((unit) => Math.floor(seconds / unit));
  const two = (number, base) => String(Math.floor(number) % base).padStart(2, "0");
  if (days) return `${days} d ${two(hours, 24)}:${two(minutes, 60)} h`;
  if (hours) return `${hours}:${two(minutes, 60)}:${two(seconds, 60)} h`;
  return minutes ? `${minutes}:${two(seconds, 60)} min` : `${Math.floor(seconds)} s`;
}

function ask(job) {
  asking = job;
  put(element("ask-what"), `${job.label === null ? "" : `${job.label}, `}${title(job)}, ${job.role} in ${job.database}`);
  put(element("ask-sql"), job.sql);
  element("ask").showModal();
  element("ask-no").focus();
}

function close() {
  asking = null;
  element("ask").close();
}

async function cancel() {
  const job = asking;
  close();
  if (!job) return;
  try {
    const answer = await fetch(here("/cancel"), {
      method: "POST",
      headers: { "Content-Type": "application/json", "X-CSRF-Token": token },
      body: JSON.stringify({ id: job.id }),
    });
    if (!answer.ok) throw new Error(`${answer.status}: ${(await answer.text()).trim()}`);
    await refresh();
  } catch (error) {
    say(`The ${title(job)} was not canceled: ${error.message}`, true);
  }
}

element("ask-no").onclick = close;
element("ask-yes").onclick = cancel;
element("ask").addEventListener("close", () => { asking = null; });

async function follow() {
  if (!document.hidden) await refresh();
  setTimeout(follow, EVERY);
}
document.addEventListener("visibilitychange", () => { if (!document.hidden) refresh(); });
follow();
