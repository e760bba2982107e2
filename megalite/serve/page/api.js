// What the page asks of the server. The token is a variable here, and nowhere else.

let token = "";

export function setToken(value) {
  token = value.trim();
}

export class Refused extends Error {
  constructor(status, message, code) {
    super(message);
    this.status = status;
    this.code = code;
  }
}

function headers() {
  const named = { "Content-Type": "application/json" };
  if (token) named.Authorization = `Bearer ${token}`;
  return named;
}

async function answered(response) {
  if (response.ok) return response;
  let error = { message: response.statusText || `status ${response.status}` };
  try {
    error = (await response.json()).error;
  } catch {
    // Not the server's own form: its status has to do.
  }
  throw new Refused(response.status, error.message, error.code);
}

export async function get(path) {
  return (await answered(await fetch(path, { headers: headers() }))).json();
}

export async function post(path, body) {
  const asked = { method: "POST", headers: headers(), body: JSON.stringify(body) };
  return (await answered(await fetch(path, asked))).json();
}

// Server-sent events of text that comes in pieces, cut anywhere.
export class Events {
  #rest = "";

  add(text) {
    const blocks = (this.#rest + text).split("\n\n");
    this.#rest = blocks.pop();
    return blocks
      .flatMap((block) => block.split("\n"))
      .filter((line) => line.startsWith("data:"))
      .map((line) => line.slice(5).trim());
  }
}

// Calls `each` with every event of a streamed answer, until it ends or `signal` says so.
export async function stream(path, body, signal, each) {
  const asked = { method: "POST", headers: headers(), body: JSON.stringify(body), signal };
  const response = await answered(await fetch(path, asked));
  const reader = response.body.getReader();
  // A character may be cut over two pieces: the decoder keeps its beginning.
  const decoder = new TextDecoder();
  const events = new Events();
  for (;;) {
    const { done, value } = await reader.read();
    if (done) break;
    for (const data of events.add(decoder.decode(value, { stream: true }))) {
      if (data === "[DONE]") return;
      const event = JSON.parse(data);
      if (event.error) throw new Refused(503, event.error.message);
      each(event);
    }
  }
  throw new Refused(0, "the connection ended before the answer did");
}
