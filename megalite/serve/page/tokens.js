// Text as the model made it, token by token: coloured, with what else it thought of.
// All text becomes text nodes: nothing that a model says can be an element.

export function make(tag, className, text) {
  const element = document.createElement(tag);
  if (className) element.className = className;
  if (text !== undefined) element.textContent = text;
  return element;
}

// Text with its code blocks; the rest as it stands.
export function plain(text) {
  const parts = document.createDocumentFragment();
  text.split(/^```[^\n]*\n?/m).forEach((part, i) => {
    if (part) parts.append(i % 2 ? make("pre", "", part.replace(/\n$/, "")) : part);
  });
  return parts;
}

// A tokens' text, where characters may be cut over several: each shows what it completes.
export function texts(tokens) {
  const decoder = new TextDecoder();
  return tokens.map((t, i) =>
    decoder.decode(new Uint8Array(t.bytes), { stream: i < tokens.length - 1 }));
}

const LEVELS = [0.02, 0.1, 0.3, 0.6];

export function level(logprob) {
  const p = Math.exp(logprob);
  return LEVELS.filter((limit) => p >= limit).length;
}

export function percent(logprob) {
  const p = 100 * Math.exp(logprob);
  return p >= 10 ? `${p.toFixed(0)}%` : p >= 0.1 ? `${p.toFixed(1)}%` : "<0.1%";
}

export function shown(text) {
  return text.replaceAll("\n", "⏎").replaceAll("\t", "⇥") || "▯";
}

// The tokens as spans; `choose(i, rival)` is called when another token is picked at place i.
export function coloured(tokens, choose) {
  const parts = make("div", "tokens");
  const said = texts(tokens);
  tokens.forEach((token, i) => {
    const span = make("span", `t p${level(token.logprob)}`, said[i]);
    span.tabIndex = i === 0 ? 0 : -1; // one stop for Tab; arrows go on from there
    span.setAttribute("role", "button");
    span.setAttribute("aria-label", `${shown(said[i])}, ${percent(token.logprob)}`);
    span.addEventListener("mouseenter", () => open(span, token, said[i]));
    span.addEventListener("focus", () => open(span, token, said[i]));
    span.addEventListener("click", () => open(span, token, said[i], (rival) => choose(i, rival)));
    span.addEventListener("keydown", (event) => {
      const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
      const next = parts.children[i + step];
      if (step && next) {
        span.tabIndex = -1;
        next.tabIndex = 0;
        next.focus();
        event.preventDefault();
      } else if (event.key === "Enter" && choose) {
        open(span, token, said[i], (rival) => choose(i, rival));
        tip().querySelector("button")?.focus();
        event.preventDefault();
      }
    });
    parts.append(span);
  });
  parts.addEventListener("mouseleave", () => {
    if (!tip().dataset.held) close();
  });
  return parts;
}

const tip = () => document.getElementById("tip");

export function close() {
  tip().hidden = true;
  delete tip().dataset.held;
}

function open(span, token, text, choose) {
  if (!choose && tip().dataset.held) return;
  const box = tip();
  const rivals = token.top_logprobs;
  const rank = rivals.findIndex((r) => r.logprob <= token.logprob + 1e-9);
  const place = rank < 0 ? `beyond the first ${rivals.length}` : `rank ${rank + 1}`;
  // Of the tokens that are known; the rest counts as one.
  const left = Math.max(0, 1 - rivals.reduce((sum, r) => sum + Math.exp(r.logprob), 0));
  const bits = [...rivals.map((r) => Math.exp(r.logprob)), left]
    .reduce((sum, p) => (p > 0 ? sum - p * Math.log2(p) : sum), 0);
  box.replaceChildren(
    make("p", "", `${percent(token.logprob)}, ${place}, entropy at least ${bits.toFixed(1)} bits`));
  for (const rival of rivals) {
    const same = rival.logprob === token.logprob && rival.token === token.token;
    const row = make(choose && !same ? "button" : "div", same ? "row same" : "row");
    row.append(make("code", "", shown(rival.token)), make("span", "", percent(rival.logprob)));
    if (choose && !same) {
      row.type = "button";
      row.addEventListener("click", () => { close(); choose(rival); });
    }
    box.append(row);
  }
  if (choose) box.append(make("p", "", "Choose one, and the text goes on from there."));
  if (choose) box.dataset.held = "1";
  box.hidden = false;
  const at = span.getBoundingClientRect();
  const width = box.offsetWidth, height = box.offsetHeight;
  const below = at.bottom + 6 + height < window.innerHeight;
  box.style.left = `${Math.max(8, Math.min(at.left, window.innerWidth - width - 8))}px`;
  box.style.top = `${below ? at.bottom + 6 : Math.max(8, at.top - height - 6)}px`;
}
