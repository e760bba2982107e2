// The page: a list of turns, one answer that grows at a time, and what can be done with each.
// Next: api.js for the server, tokens.js for what a token looks like.

import { Refused, get, post, setToken, stream } from "./api.js";
import { close, coloured, make, plain, shown, texts } from "./tokens.js";

const $ = (id) => document.getElementById(id);
const settings = $("settings");
const TOP = 5;

// A turn: {role: user | assistant | text, content, tokens, prompt, problem, note}
let turns = [];
let growing = null; // {turn, abort}
let editing = null; // the place of the turn whose words are in the draft
let context = 0;

const mode = () => settings.mode.value;
const wantsColour = () => settings.probabilities.checked;

// -- what is asked -----------------------------------------------------------------------------

function sampling() {
  const asked = { stream: true, stream_options: { include_usage: true } };
  for (const name of ["temperature", "top_p", "top_k", "min_p", "repetition_penalty",
    "max_tokens", "seed"]) {
    const field = settings[name];
    if (field.value !== "") asked[name] = Number(field.value);
  }
  if (settings.stop.value) asked.stop = settings.stop.value.replaceAll("\\n", "\n");
  return asked;
}

function messages(upto) {
  const told = turns.slice(0, upto).filter((turn) => turn.role !== "text")
    .map(({ role, content }) => ({ role, content }));
  const system = settings.system.value.trim();
  return system ? [{ role: "system", content: system }, ...told] : told;
}

function request(upto) {
  if (mode() === "chat") {
    return ["/v1/chat/completions",
      { messages: messages(upto), ...sampling(), logprobs: true, top_logprobs: TOP }];
  }
  return ["/v1/completions", { prompt: turns[upto].content, ...sampling(), logprobs: TOP }];
}

// Both kinds of streams, told in the same way: text, tokens, and why it ended.
function read(event) {
  const choice = event.choices[0];
  if (!choice) return { text: "", tokens: [] };
  if (choice.delta) {
    return { text: choice.delta.content ?? "", tokens: choice.logprobs?.content ?? [],
      reason: choice.finish_reason };
  }
  const told = choice.logprobs;
  const tokens = (told?.tokens ?? []).map((token, i) => ({
    token, bytes: bytesOf(token), logprob: told.token_logprobs[i],
    top_logprobs: Object.entries(told.top_logprobs[i])
      .map(([rival, logprob]) => ({ token: rival, bytes: bytesOf(rival), logprob })),
  }));
  return { text: choice.text, tokens, reason: choice.finish_reason };
}

// Parts of characters come as `bytes:\xe2\x82`.
function bytesOf(token) {
  if (!/^bytes:(\\x[0-9a-f]{2})+$/.test(token)) return [...new TextEncoder().encode(token)];
  return token.slice(6).match(/[0-9a-f]{2}/g).map((pair) => parseInt(pair, 16));
}

// -- an answer ---------------------------------------------------------------------------------

async function grow(turn, upto) {
  stop();
  const abort = new AbortController();
  growing = { turn, abort };
  turn.problem = turn.note = "";
  draw();
  try {
    const [path, body] = request(upto);
    const each = (event) => {
      const { text, tokens, reason } = read(event);
      turn.content += text;
      turn.tokens.push(...tokens);
      if (reason === "length") turn.note = "cut off at its limit";
      if (event.usage) count(event.usage.prompt_tokens + event.usage.completion_tokens);
      draw(turn);
    };
    try {
      await stream(path, body, abort.signal, each);
    } catch (error) {
      // Less room than asked for: then as much as there is.
      if (error.code !== "context_length_exceeded" || !body.max_tokens) throw error;
      delete body.max_tokens;
      await stream(path, body, abort.signal, each);
    }
  } catch (error) {
    if (error.name === "AbortError") turn.note = "stopped";
    else if (error instanceof Refused && error.status === 401) return askForToken(() => grow(turn, upto));
    else turn.problem = error.message;
  } finally {
    if (growing?.abort === abort) growing = null;
  }
  draw();
  $("spoken").textContent = turn.problem || turn.content;
}

function stop() {
  growing?.abort.abort();
  growing = null;
}

function send(text) {
  if (editing !== null) turns = turns.slice(0, editing);
  leaveEditing();
  if (mode() === "chat") {
    turns.push({ role: "user", content: text });
    answer();
  } else {
    turns = [{ role: "text", content: text, prompt: text, tokens: [] }];
    grow(turns[0], 0);
  }
}

function answer() {
  const turn = { role: "assistant", content: "", tokens: [] };
  turns.push(turn);
  grow(turn, turns.length - 1);
}

function again(i) {
  const turn = turns[i];
  turns = turns.slice(0, i + 1);
  turn.tokens = [];
  turn.content = turn.role === "text" ? turn.prompt : "";
  grow(turn, i);
}

// Go on from token `place` with another one in its stead: only a text can.
function branch(i, place, rival) {
  const turn = turns[i];
  turn.tokens = [...turn.tokens.slice(0, place),
    { ...turn.tokens[place], token: rival.token, bytes: rival.bytes, logprob: rival.logprob }];
  turn.content = turn.prompt + texts(turn.tokens).join("");
  grow(turn, i);
}

// -- what is seen ------------------------------------------------------------------------------

const NAMES = { user: "You", assistant: "Model", text: "Text" };

function draw(only) {
  const list = $("talk");
  const near = list.scrollHeight - list.scrollTop - list.clientHeight < 80;
  if (only) {
    const i = turns.indexOf(only);
    list.children[i]?.querySelector(".said").replaceChildren(body(only, i));
  } else {
    close();
    list.replaceChildren(...turns.map(row));
  }
  $("empty").hidden = turns.length > 0;
  $("send").hidden = growing !== null;
  $("stop").hidden = growing === null;
  if (near) list.scrollTop = list.scrollHeight;
}

function body(turn, i) {
  if (!turn.tokens?.length || !wantsColour()) return plain(turn.content);
  const parts = document.createDocumentFragment();
  if (turn.prompt) parts.append(turn.prompt);
  const chooses = turn.role === "text" && growing?.turn !== turn;
  parts.append(coloured(turn.tokens, chooses ? (place, rival) => branch(i, place, rival) : null));
  return parts;
}

function row(turn, i) {
  const item = make("li", `${turn.role}${growing?.turn === turn ? " growing" : ""}`);
  item.append(make("p", "who", NAMES[turn.role]));
  const said = make("div", "said");
  said.append(body(turn, i));
  item.append(said);
  if (turn.note) item.append(make("p", "who", `(${turn.note})`));
  if (turn.problem) {
    const problem = make("p", "wrong", turn.problem);
    problem.setAttribute("role", "alert");
    item.append(problem);
  }
  const acts = make("div", "acts");
  const act = (name, run) => {
    const button = make("button", "", name);
    button.type = "button";
    button.addEventListener("click", run);
    acts.append(button);
  };
  if (growing?.turn !== turn) {
    if (turn.role !== "user") act(turn.problem ? "Try again" : "Regenerate", () => again(i));
    if (turn.role === "text") act("Go on", () => grow(turn, i));
    if (turn.role !== "assistant") act("Edit", () => edit(i));
    act("Copy", () => copy(turn.content));
  }
  item.append(acts);
  return item;
}

function count(used) {
  if (!context) return;
  $("meter").hidden = false;
  $("used").value = used / context;
  $("count").textContent = `${used} / ${context}`;
}

async function copy(text) {
  await navigator.clipboard.writeText(text);
  $("spoken").textContent = "copied";
}

// -- what is typed -----------------------------------------------------------------------------

function edit(i) {
  stop();
  editing = i;
  $("editing").hidden = false;
  $("draft").value = turns[i].content;
  $("draft").focus();
  fit();
}

function leaveEditing() {
  editing = null;
  $("editing").hidden = true;
}

function fit() {
  const draft = $("draft");
  draft.style.height = "auto";
  draft.style.height = `${draft.scrollHeight + 2}px`;
}

let counting = 0;
function countDraft() {
  clearTimeout(counting);
  counting = setTimeout(async () => {
    const text = $("draft").value;
    if (!text || growing) return;
    const upto = editing ?? turns.length;
    const asked = mode() === "chat"
      ? { messages: [...messages(upto), { role: "user", content: text }] } : { text };
    try {
      count((await post("/tokenize", asked)).count);
    } catch {
      // The meter waits for the next answer.
    }
  }, 400);
}

$("compose").addEventListener("submit", (event) => {
  event.preventDefault();
  const text = $("draft").value;
  if (!text.trim() || growing) return;
  $("draft").value = "";
  fit();
  send(mode() === "chat" ? text.trim() : text);
});
$("draft").addEventListener("input", () => { fit(); countDraft(); });
$("draft").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    $("compose").requestSubmit();
  }
});
document.addEventListener("keydown", (event) => {
  if (event.key !== "Escape") return;
  close();
  if (growing) stop();
  else if (editing !== null) leaveEditing();
  openPanel(false);
});
document.addEventListener("click", (event) => {
  if (!event.target.closest("#tip, .t")) close();
});
$("stop").addEventListener("click", stop);
$("editing-stop").addEventListener("click", leaveEditing);
$("fresh").addEventListener("click", () => {
  stop();
  leaveEditing();
  turns = [];
  count(0);
  draw();
  $("draft").focus();
});

// -- settings and dialogs ----------------------------------------------------------------------

function openPanel(open) {
  $("panel").classList.toggle("open", open);
  $("panel-open").setAttribute("aria-expanded", String(open));
}
$("panel-open").addEventListener("click", () => openPanel(!$("panel").classList.contains("open")));
settings.addEventListener("submit", (event) => event.preventDefault());
settings.addEventListener("change", () => {
  const chat = mode() === "chat";
  for (const part of document.querySelectorAll(".chat-only")) part.hidden = !chat;
  $("legend").hidden = !wantsColour();
  $("draft").placeholder = chat ? "" : "A text to go on from";
  draw();
});
$("theme").addEventListener("click", () => {
  const root = document.documentElement;
  const dark = root.dataset.theme
    ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  root.dataset.theme = dark ? "light" : "dark";
});

function askForToken(then) {
  const dialog = $("token-dialog");
  dialog.onclose = () => {
    if (!$("token").value) return;
    setToken($("token").value);
    $("token").value = "";
    then();
  };
  dialog.showModal();
}

$("tokenizer-open").addEventListener("click", () => {
  $("cut-text").value ||= $("draft").value;
  $("tokenizer-dialog").showModal();
  cut();
});
$("cut-text").addEventListener("input", cut);
async function cut() {
  const { tokens } = await post("/tokenize", { text: $("cut-text").value });
  $("cut-count").textContent = `${tokens.length} tokens`;
  $("cut").replaceChildren(...tokens.map((token) => {
    const span = make("span", "", shown(token.text));
    span.append(make("small", "", token.id));
    return span;
  }));
}

$("curl-open").addEventListener("click", () => {
  const last = turns.length - (turns.at(-1)?.role === "assistant" ? 1 : 0);
  const draft = $("draft").value;
  if (mode() === "text" && !turns.length) turns = [{ role: "text", content: draft, prompt: draft }];
  const [path, body] = request(mode() === "chat" ? last : 0);
  if (mode() === "chat" && !body.messages.length) body.messages = [{ role: "user", content: draft }];
  const quoted = JSON.stringify(body, null, 1).replaceAll("'", "'\\''");
  $("curl").value = `curl -N '${location.origin}${path}' \\\n`
    + ` -H 'Content-Type: application/json' -H "Authorization: Bearer $TOKEN" \\\n -d '${quoted}'`;
  $("curl-dialog").showModal();
});
$("curl-copy").addEventListener("click", () => copy($("curl").value));

async function begin() {
  try {
    const model = (await get("/v1/models")).data[0];
    context = model.context;
    $("model").textContent = model.id;
    document.title = `${model.id} · megalite`;
    if (!model.chat) settings.mode.value = "text";
    settings.mode[0].disabled = !model.chat;
    settings.max_tokens.value = Math.min(settings.max_tokens.value, Math.floor(context / 2));
    settings.dispatchEvent(new Event("change"));
  } catch (error) {
    if (error instanceof Refused && error.status === 401) return askForToken(begin);
    $("empty").textContent = `The server does not answer: ${error.message}`;
  }
}
begin();
