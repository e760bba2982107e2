// Serves Perfetto's trace processor, as a WebAssembly build of it comes with its UI, over HTTP: what
// the `perfetto` package talks to. Usage: node trace_processor.js DIRECTORY-OF-THE-UI; prints a port.
//
// The UI runs this build in a web worker and sends it messages of a protobuf stream. Here a context
// without node's own names looks like a worker to it, and each HTTP request becomes one message.
"use strict";
const fs = require("fs");
const http = require("http");
const path = require("path");
const vm = require("vm");

const APPEND = 1, FINALIZE = 2, QUERY = 3, STATUS = 10; // TraceProcessorRpc.TraceProcessorMethod
const METHODS = { "/parse": [APPEND, 101], "/notify_eof": [FINALIZE], "/query": [QUERY, 103], "/status": [STATUS] };
const FIRST_RESULT = 200; // fields of TraceProcessorRpc from here on are results

function varint(n) {
  const bytes = [];
  for (; n >= 128; n = Math.floor(n / 128)) bytes.push((n % 128) | 128);
  return Buffer.from([...bytes, n]);
}

function field(number, value) {
  return typeof value === "number"
    ? Buffer.concat([varint(number * 8), varint(value)])
    : Buffer.concat([varint(number * 8 + 2), varint(value.length), value]);
}

function* fields(bytes) {
  let at = 0;
  const next = () => {
    let n = 0, scale = 1, byte;
    do {
      byte = bytes[at++];
      n += (byte & 127) * scale;
      scale *= 128;
    } while (byte & 128);
    return n;
  };
  while (at < bytes.length) {
    const tag = next(), value = next(); // a number, or the length of what follows
    if (tag % 8 === 2) yield [(tag - 2) / 8, bytes.subarray(at, (at += value))];
  }
}

const directory = process.argv[2];
const replies = [];
const port = { postMessage: (data) => replies.push(Buffer.from(data)) };

class XMLHttpRequest {
  open(_, url) {
    this.name = path.basename(url);
  }
  send() {
    const file = fs.readFileSync(path.join(directory, this.name));
    this.response = file.buffer.slice(file.byteOffset, file.byteOffset + file.length);
  }
}

const worker = {
  XMLHttpRequest, TextDecoder, TextEncoder, URL, crypto, performance, setTimeout,
  console: { log: console.error, warn: console.error, error: console.error },
  location: { href: "file:///engine_bundle.js" },
  WorkerGlobalScope: class {},
};
worker.self = worker;
vm.runInContext(fs.readFileSync(path.join(directory, "engine_bundle.js"), "utf8"), vm.createContext(worker));
worker.onmessage({ data: port });

let sent = 0;
function call([method, argument], body) {
  const parts = [field(1, ++sent), field(2, method)];
  if (argument) parts.push(field(argument, body));
  replies.length = 0;
  const message = field(1, Buffer.concat(parts));
  port.onmessage({ data: vm.runInContext("bytes => new Uint8Array(bytes)", worker)(message) });
  const results = [];
  for (const [, rpc] of fields(Buffer.concat(replies)))
    for (const [number, result] of fields(rpc)) if (number > FIRST_RESULT) results.push(result);
  return Buffer.concat(results); // of one kind: messages one after another are one message
}

const server = http.createServer((request, response) => {
  const chunks = [];
  request.on("data", (chunk) => chunks.push(chunk));
  request.on("end", () => response.end(call(METHODS[request.url], Buffer.concat(chunks))));
});
server.listen(0, "127.0.0.1", () => console.log(server.address().port));
process.stdin.on("end", () => process.exit(0)).resume();
